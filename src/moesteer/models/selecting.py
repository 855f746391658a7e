"""routing.py's steering and selection in torch, for engines that select experts in code of ours (vLLM).

Axes: N tokens, E experts, K selected experts, G groups of S experts, M experts that may be switched on. What is right
is defined in routing.py. All shapes are static and nothing branches on a value: a graph can be captured or compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from moesteer.errors import ModelError
from moesteer.routing import FORCE_EPS, Scoring

_INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The dtypes that round 0.01 away, and the bits of infinity in them."""
_IDS = 2**16
"""More than there are experts: room for an id below a score in one integer."""
_CLASS = 2**48
"""Between the classes on, free and off in that integer: no score reaches from one to the next."""


def steer_logits(
    logits_NE: Tensor,
    bias_NE: Tensor | None,
    force_NE: Tensor | None,
    *,
    rounded_to: torch.dtype = torch.float32,
    most_on: int | None = None,
) -> Tensor:
    """Logits after steering, float32 [N, E], as routing.steer_logits: first the bias, then the forced experts.

    bias_NE: float32, in logits. force_NE: int8, 1 on, -1 off, 0 free. most_on: no row switches more on than this, so
    fewer are sorted (a mask never has more than `scoring.top_k`); None for E.

    rounded_to: bfloat16 or float16, where the caller rounds the result to it. Deviation from routing.steer_logits: 0.01
    is lost in bfloat16 for |logit| >= 4 (in float16 from 32 on), so a forced value that would not stay strictly beyond
    the free ones, or apart from the others switched on, is moved to the next number of that dtype that does.
    """
    steered_NE = logits_NE.float()
    if bias_NE is not None:
        steered_NE = steered_NE + bias_NE
    if force_NE is None:
        return steered_NE
    on_NE, off_NE = (force_NE > 0).expand_as(steered_NE), (force_NE < 0).expand_as(steered_NE)
    experts = steered_NE.shape[-1]
    ids_E = torch.arange(experts, device=steered_NE.device)
    # the switched-on first, lowest first, of equals the lower id; what is not switched on comes behind
    key_NE = _ordinal(steered_NE) * _IDS + ids_E + ~on_NE * _CLASS
    ids_NM = key_NE.topk(min(most_on or experts, experts), dim=-1, largest=False).indices
    rank_M = torch.arange(ids_NM.shape[-1], device=steered_NE.device)
    count_N1 = on_NE.sum(dim=-1, keepdim=True).clamp(min=1).float()
    raised_NM = steered_NE.amax(dim=-1, keepdim=True) + FORCE_EPS * (1 + rank_M.float() / count_N1)
    lowered_N1 = steered_NE.amin(dim=-1, keepdim=True) - FORCE_EPS
    if rounded_to in _INFINITE:
        raised_NM, lowered_N1 = _apart(steered_NE, on_NE, off_NE, raised_NM, lowered_N1, dtype=rounded_to)
    raised_NE = steered_NE.scatter(-1, ids_NM, raised_NM)
    return torch.where(on_NE, raised_NE, torch.where(off_NE, lowered_N1, steered_NE))


def _apart(
    steered_NE: Tensor, on_NE: Tensor, off_NE: Tensor, raised_NM: Tensor, lowered_N1: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Forced values that keep their order when rounded to `dtype`, each as it is where it does so already.

    Counted in steps of `dtype`: the value of rank m is the least that is its own step or more, is above the free ones
    and above rank m - 1; so step_m - m never falls with m, and is a running maximum.
    """
    far = 2**31
    switched_NE = on_NE | off_NE
    step_NE = _ordinal(steered_NE.to(dtype))
    highest_N1 = step_NE.masked_fill(switched_NE, -far).amax(dim=-1, keepdim=True)
    rank_M = torch.arange(raised_NM.shape[-1], device=raised_NM.device)
    own_NM = _ordinal(raised_NM.to(dtype))
    step_NM = (own_NM - rank_M).cummax(dim=-1).values.maximum(highest_N1 + 1) + rank_M
    lowest_N1 = step_NE.masked_fill(switched_NE, far).amin(dim=-1, keepdim=True)
    first_N1 = step_NM[:, :1].masked_fill(~on_NE.any(dim=-1, keepdim=True), far)
    own_N1 = _ordinal(lowered_N1.to(dtype))
    step_N1 = own_N1.minimum(lowest_N1.minimum(first_N1) - 1)
    return (
        torch.where(step_NM == own_NM, raised_NM, _at(step_NM, dtype)),
        torch.where(step_N1 == own_N1, lowered_N1, _at(step_N1, dtype)),
    )


def select(
    logits_NE: Tensor,
    scoring: Scoring,
    *,
    correction_E: Tensor | None = None,
    scale_E: Tensor | None = None,
    force_NE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What routing.select gives for (already steered) logits: (weights [N, K] float32, experts [N, K] int64).

    The dtypes of logits and correction count where the router keeps its scores in them (`scoring.low_precision`).
    force_NE: int8, 1 on, -1 off, 0 free; decides by rank, and is not checked here (routing.check_force). Nor are the
    logits: what is not finite gives some K different experts. Raises ModelError for scorings that are not done here.
    """
    _require_known(scoring)
    experts = logits_NE.shape[-1]
    kept = logits_NE.dtype if scoring.low_precision and logits_NE.dtype in _INFINITE else torch.float32
    bent_NE = _bent(logits_NE.float(), scoring)
    weight_NE = _rounded(_weight_scores(bent_NE, scoring, kept), kept)
    choice_NE = bent_NE if scoring.kind == "topk-sigmoid" else weight_NE
    chosen_in = kept
    if correction_E is not None:
        chosen_in = kept if correction_E.dtype == kept else torch.float32
        choice_NE = _rounded(choice_NE + correction_E.float(), chosen_in)
    if scoring.groups > 1:
        choice_NE = _in_open_groups(choice_NE, scoring, chosen_in)
    experts_NK = _best(choice_NE, scoring.top_k, force_NE)
    weights_NK = weight_NE.gather(-1, experts_NK)
    if scoring.skipped:
        weights_NK = weights_NK.masked_fill(experts_NK >= experts - scoring.skipped, 0.0)
    if scoring.kind == "topk-softmax":
        weights_NK = weights_NK.softmax(dim=-1)
    elif scoring.renormalise:
        weights_NK = weights_NK / _norm(weights_NK, scoring)
    if scale_E is not None:
        weights_NK = weights_NK * scale_E.float()[experts_NK]
    return weights_NK * scoring.scale, experts_NK


def _require_known(scoring: Scoring) -> None:
    unknown = "sparsemixer" if scoring.kind == "sparsemixer" else "shared experts in the norm" if scoring.shared else ""
    if unknown:
        raise ModelError(
            f"selecting in torch is not done for this router: {unknown}",
            where=f"the model's scoring ({scoring.describe()})",
            expected="another scoring kind than sparsemixer, and no shared experts in the norm",
            do="steer the model with the transformers backend",
        )


def _bent(logits_NE: Tensor, scoring: Scoring) -> Tensor:
    if scoring.multiplier != 1.0:
        logits_NE = logits_NE * scoring.multiplier
    if scoring.softcap:
        logits_NE = (logits_NE / scoring.softcap).tanh() * scoring.softcap
    return logits_NE


def _weight_scores(logits_NE: Tensor, scoring: Scoring, kept: torch.dtype) -> Tensor:
    match scoring.kind:
        case "softmax-topk":
            return logits_NE.softmax(dim=-1)
        case "sigmoid" | "topk-sigmoid":
            return logits_NE.sigmoid()
        case "sqrtsoftplus":
            return _rounded(softplus(logits_NE), kept).sqrt()
        case _:
            return logits_NE


def _in_open_groups(choice_NE: Tensor, scoring: Scoring, kept: torch.dtype) -> Tensor:
    """Choice scores, those of the groups that are not kept filled."""
    choice_NGS = choice_NE.reshape(len(choice_NE), scoring.groups, -1)
    count = min(2 if scoring.group_score == "top2-sum" else 1, choice_NGS.shape[-1])
    score_NG = _rounded(choice_NGS.topk(count, dim=-1).values.sum(dim=-1), kept)
    best_NG = _best(score_NG, scoring.groups_kept, None)
    open_NG = torch.zeros_like(score_NG, dtype=torch.bool).scatter(-1, best_NG, True)
    return choice_NGS.masked_fill(~open_NG[..., None], scoring.group_fill).flatten(-2)


def _norm(weights_NK: Tensor, scoring: Scoring) -> Tensor:
    """What the selected weights are divided by, [N, 1]."""
    if scoring.norm_p == 1:
        total_N1 = weights_NK.sum(dim=-1, keepdim=True)
    else:
        total_N1 = weights_NK.norm(p=scoring.norm_p, dim=-1, keepdim=True)
    return (total_N1 + scoring.norm_add).clamp(min=scoring.norm_min)


def _best(choice_NE: Tensor, k: int, force_NE: Tensor | None) -> Tensor:
    """Ids of the k best, best first: class, then choice score, then the lower id.

    One top-k over integers that hold all three, since a top-k over scores may order equal ones as it likes.
    """
    last = choice_NE.shape[-1] - 1
    key_NE = _ordinal(choice_NE) * _IDS + torch.arange(last, -1, -1, device=choice_NE.device)
    if force_NE is not None:
        key_NE = key_NE + force_NE.long() * _CLASS
    return key_NE.topk(k, dim=-1).indices


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values rounded to `dtype`, still as float32."""
    return values if dtype == torch.float32 else values.to(dtype).float()


def _ordinal(values: Tensor) -> Tensor:
    """Floats as int64 in the same order, neighbours one apart, 0.0 and -0.0 both 0."""
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16).long()
    magnitude = bits & (0x7FFF_FFFF if values.dtype == torch.float32 else 0x7FFF)
    return torch.where(bits < 0, -magnitude, magnitude)


def _at(ordinal: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of a 16-bit `dtype` with this ordinal, as float32."""
    magnitude = ordinal.abs().clamp(max=_INFINITE[dtype]).to(torch.int16).view(dtype).float()
    return torch.where(ordinal < 0, -magnitude, magnitude)

"""Top-k routing and steering in numpy: the definition of correct, against which all else is tested.

Axes: T tokens, E experts, K selected experts, G groups. Logits are the router's scores before selection.
All arithmetic is float32, in the order transformers 5 does it, so that a comparison can be exact.

A selection has two parts: which experts, and with what weights. Every scoring kind ranks the experts by a
`choice` score and takes the weights from a (possibly different) `weight` score:

| kind          | weight score                | choice score                         | weights of the selected     |
|---------------|-----------------------------|--------------------------------------|-----------------------------|
| softmax-topk  | softmax over all E          | weight + correction                  | kept, or renormalised       |
| topk-softmax  | the logits                  | the logits                           | softmax over the K          |
| sigmoid       | sigmoid                     | weight + correction                  | kept, or renormalised       |
| topk-sigmoid  | sigmoid                     | the logits + correction              | kept, or renormalised       |
| sqrtsoftplus  | square root of softplus     | weight + correction                  | kept, or renormalised       |
| sparsemixer   | Phi-3.5-MoE's, K = 2: argmax, then argmax of the rest; each weight a softmax over near ties  |

Some routers bend the logits first (`multiplier`, `softcap`), have logits of shared experts behind the E that only
share in the normalisation (`shared`), or last choices that are no expert and weigh nothing (`skipped`).

Groups (DeepSeek-V3 and relatives): experts lie in G equal groups; only the best `groups_kept` of them, by
their `group_score`, can be chosen from (`group_fill` is what the others' choice scores become).

Steering comes in two forms.
- **Additive** (MASCing, arXiv:2604.27818): `z + bias`, then select as ever.
- **Forced** (SteerMoE, arXiv:2509.09660): experts switched on are placed above the highest logit and those
  switched off below the lowest, eps = 0.01. Deviations: (1) on raw logits, not log-softmax, which is the same
  for softmax kinds and leaves the others undisturbed; (2) the selection is decided by rank: forced-on before
  free before forced-off whatever the arithmetic, since bfloat16 rounds 0.01 away and correction biases
  overrule it; (3) several experts switched on keep their own order within an eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesteer.errors import MaskContentError, NanLogitsError

ScoringKind = Literal["softmax-topk", "topk-softmax", "sigmoid", "topk-sigmoid", "sqrtsoftplus", "sparsemixer"]
Dtype = Literal["float32", "bfloat16", "float16"]
TIE = 2.0**-20
"""Relative difference of choice scores below which float32 engines may order experts differently."""
FORCE_EPS = 0.01
"""Distance, in logits, at which forced experts are placed beyond the extremes (SteerMoE, section 3)."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Scoring:
    """How a router turns logits into a selection.

    renormalise: divide the selected weights by the norm_p-norm of them, with norm_add added to it, and at least
    norm_min. scale: factor on the final weights. groups, groups_kept: 1, 1 means no groups. group_score: a group
    counts for its best expert ("max") or the sum of its best two ("top2-sum"). group_fill: choice score of the
    experts of groups that lost. jitter: sparsemixer's near-tie width. multiplier, softcap: on the logits, the cap by
    tanh; 0 is none. shared: logits behind the E that belong to shared experts; they count in the norm. skipped: last
    choices that are no expert: their weight is 0. low_precision: scores are kept in the logits' own dtype.
    """

    kind: ScoringKind
    top_k: int
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_score: Literal["max", "top2-sum"] = "max"
    group_fill: float = -np.inf
    jitter: float = 0.01
    norm_p: float = 1.0
    norm_add: float = 0.0
    norm_min: float = 0.0
    multiplier: float = 1.0
    softcap: float = 0.0
    shared: int = 0
    skipped: int = 0
    low_precision: bool = False

    def __post_init__(self) -> None:
        """Combinations that no router has, and that are not defined here, are a mistake in a family's row."""
        plain = self.groups == 1 and not self.shared and not self.skipped
        if self.kind == "sparsemixer" and (self.renormalise or not plain):
            raise ValueError("sparsemixer has no groups, shared or skipped choices, and its weights are its own")
        if self.kind == "topk-softmax" and self.skipped:
            raise ValueError("topk-softmax has no skipped choices")

    def describe(self) -> str:
        """One line for fingerprints and tables."""
        parts = [f"{self.kind} k={self.top_k}"]
        if self.renormalise:
            parts.append("renormalised" + (f" by the {self.norm_p:g}-norm" if self.norm_p != 1 else ""))
        if self.scale != 1.0:
            parts.append(f"x{self.scale:g}")
        if self.groups > 1:
            parts.append(f"{self.groups_kept} of {self.groups} groups by {self.group_score}")
        if self.kind == "sparsemixer":
            parts.append(f"jitter={self.jitter:g}")
        if self.multiplier != 1.0:
            parts.append(f"logits x{self.multiplier:g}")
        if self.softcap:
            parts.append(f"softcap={self.softcap:g}")
        if self.shared:
            parts.append(f"{self.shared} shared in the norm")
        if self.skipped:
            parts.append(f"last {self.skipped} skip")
        return ", ".join(parts)


@dataclass(frozen=True)
class Selection:
    """experts_TK: chosen expert ids, best first. weights_TK: their float32 weights, same order.

    shared_TS: weights of the S shared experts where they share in the norm (`Scoring.shared`), else S = 0.
    """

    experts_TK: NDArray[np.int64]
    weights_TK: F32
    shared_TS: F32

    def as_sets(self) -> list[frozenset[int]]:
        """The chosen experts of each token, without their order."""
        return [frozenset(map(int, row)) for row in self.experts_TK]


def softmax(scores_TE: F32) -> F32:
    """Softmax over the last axis, float32."""
    shifted = scores_TE - scores_TE.max(axis=-1, keepdims=True)
    exponents: F32 = np.exp(shifted, dtype=np.float32)
    shares: F32 = exponents / exponents.sum(axis=-1, keepdims=True, dtype=np.float32)
    return shares


def _sigmoid(scores_TE: F32) -> F32:
    with np.errstate(over="ignore"):
        return (1.0 / (1.0 + np.exp(-scores_TE, dtype=np.float32))).astype(np.float32)


def _sqrt_softplus(scores_TE: F32, kept: Dtype) -> F32:
    # torch's softplus is the identity above 20
    softplus = np.where(scores_TE > 20, scores_TE, np.log1p(np.exp(np.minimum(scores_TE, 20), dtype=np.float32)))
    roots: F32 = np.sqrt(round_to(softplus.astype(np.float32), kept))
    return roots


def round_to(values: F32, dtype: Dtype) -> F32:
    """float32 values rounded as `dtype` rounds them (to nearest, ties to even), still as float32."""
    assert dtype in ("float32", "bfloat16", "float16"), dtype
    values = np.asarray(values, dtype=np.float32)
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values).astype(np.float32)


def steer_logits(logits_TE: F32, *, bias_TE: F32 | None = None, force_TE: NDArray[np.int8] | None = None) -> F32:
    """Logits after steering, float32 [T, E]; first the bias, then the forced experts.

    bias_TE: [T, E] or [E], in logits (alpha x sigma x strength). force_TE: [T, E] or [E], 1 on, -1 off, 0 free.
    """
    steered = np.asarray(logits_TE, dtype=np.float32)
    if bias_TE is not None:
        steered = steered + np.asarray(bias_TE, dtype=np.float32)
    if force_TE is None:
        return steered
    force = np.broadcast_to(np.asarray(force_TE, dtype=np.int8), steered.shape)
    highest = steered.max(axis=-1, keepdims=True)
    lowest = steered.min(axis=-1, keepdims=True)
    on = force > 0
    # rank of each switched-on expert among the switched-on, 0 for the lowest; of equals the lower id first
    rank = np.where(on, steered, np.inf).argsort(axis=-1, kind="stable").argsort(axis=-1).astype(np.float32)
    count = np.maximum(on.sum(axis=-1, keepdims=True), 1).astype(np.float32)
    raised = highest + np.float32(FORCE_EPS) * (1 + rank / count)
    return np.where(on, raised, np.where(force < 0, lowest - np.float32(FORCE_EPS), steered)).astype(np.float32)


def select(
    logits_TE: F32,
    scoring: Scoring,
    *,
    correction_E: F32 | None = None,
    scale_E: F32 | None = None,
    force_TE: NDArray[np.int8] | None = None,
    dtype: Dtype = "float32",
    correction_dtype: Dtype = "float32",
    prefer_TE: NDArray[np.bool_] | None = None,
) -> Selection:
    """The experts and weights a router gives for (already steered) logits.

    logits_TE: [T, E + scoring.shared]. correction_E: added to the choice score only. scale_E: factor on each expert's
    weight. force_TE: [T, E] or [E]; decides by rank, see above; the logits should come from `steer_logits` with the
    same force. dtype, correction_dtype: of the logits and the correction, which matter where the router keeps its
    scores in them. prefer_TE: experts that win where choice scores are equal within a few units of float32's last
    place; else ties go to the lower expert id. Raises NanLogitsError for logits that are not finite,
    MaskContentError for a force that cannot be met.
    """
    logits = np.asarray(logits_TE, dtype=np.float32)
    if not np.isfinite(logits).all():
        bad = np.argwhere(~np.isfinite(logits))[0]
        raise NanLogitsError(
            f"router logits hold {logits[tuple(bad)]}",
            where=f"token {bad[0]}, expert {bad[1]}",
            expected="finite numbers",
            do="check the model's weights and its dtype: float16 overflows where bfloat16 does not",
        )
    experts = logits.shape[-1] - scoring.shared
    force = None if force_TE is None else np.broadcast_to(np.asarray(force_TE, dtype=np.int8), (len(logits), experts))
    if force is not None:
        check_force(force, scoring=scoring)
    logits = _bent(logits, scoring)
    kept: Dtype = dtype if scoring.low_precision else "float32"
    if scoring.kind == "sparsemixer":
        return _sparsemixer(logits, scoring, force, prefer_TE, kept)

    all_scores = round_to(_weight_scores(logits, scoring, kept), kept)
    weight, shared = all_scores[:, :experts], all_scores[:, experts:]
    choice = logits[:, :experts] if scoring.kind == "topk-sigmoid" else weight
    chosen_in: Dtype = kept if correction_E is None or correction_dtype == kept else "float32"
    if correction_E is not None:
        choice = round_to(choice + np.asarray(correction_E, dtype=np.float32), chosen_in)
    if scoring.groups > 1:
        choice = np.where(_open_experts(choice, scoring, chosen_in, prefer_TE), choice, np.float32(scoring.group_fill))
    chosen = _best(_preferring(choice, prefer_TE), scoring.top_k, force)
    weights = np.take_along_axis(weight, chosen, axis=-1)
    if scoring.skipped:
        weights = np.where(chosen >= experts - scoring.skipped, 0, weights).astype(np.float32)
    if scoring.kind == "topk-softmax":
        weights = softmax(weights)
    elif scoring.renormalise:
        norm = _norm(np.concatenate([weights, shared], axis=-1), scoring)
        weights, shared = weights / norm, shared / norm
    if scale_E is not None:
        weights = weights * np.asarray(scale_E, dtype=np.float32)[chosen]
        shared = shared * np.asarray(scale_E, dtype=np.float32)[:1]
    factor = np.float32(scoring.scale)
    return Selection(chosen, (weights * factor).astype(np.float32), (shared * factor).astype(np.float32))


def _bent(logits_TE: F32, scoring: Scoring) -> F32:
    """Logits after the router's own multiplier and softcap."""
    if scoring.multiplier != 1.0:
        logits_TE = logits_TE * np.float32(scoring.multiplier)
    if scoring.softcap:
        cap = np.float32(scoring.softcap)
        logits_TE = np.tanh(logits_TE / cap).astype(np.float32) * cap
    return logits_TE


def _weight_scores(logits_TE: F32, scoring: Scoring, kept: Dtype) -> F32:
    match scoring.kind:
        case "softmax-topk":
            return softmax(logits_TE)
        case "sigmoid" | "topk-sigmoid":
            return _sigmoid(logits_TE)
        case "sqrtsoftplus":
            return _sqrt_softplus(logits_TE, kept)
        case _:
            return logits_TE


def _norm(weights_TK: F32, scoring: Scoring) -> F32:
    """What the selected weights are divided by, [T, 1]."""
    if scoring.norm_p == 1:
        total = weights_TK.sum(axis=-1, keepdims=True, dtype=np.float32)
    else:
        total = np.linalg.norm(weights_TK, ord=scoring.norm_p, axis=-1, keepdims=True).astype(np.float32)
    guarded: F32 = np.maximum(total + np.float32(scoring.norm_add), np.float32(scoring.norm_min))
    return guarded


def check_force(force_TE: NDArray[np.int8], *, scoring: Scoring) -> None:
    """Raise MaskContentError for a force that a router cannot meet for every token, whatever the logits are.

    force_TE: [rows, E]. More experts switched on than k; so many switched off that fewer than k are left; and where
    experts lie in groups, experts switched on in more groups than are kept, or too few left in those that may be.
    """
    rows, experts = force_TE.shape
    on = (force_TE > 0).sum(axis=-1)
    off = (force_TE < 0).sum(axis=-1)
    top_k = scoring.top_k
    if rows and on.max() > top_k:
        raise MaskContentError(
            f"{int(on.max())} experts are switched on where {top_k} are selected",
            where=f"row {int(on.argmax())} of the force table",
            expected=f"at most {top_k} experts switched on in a layer",
            do="keep only the strongest of them, or switch others off instead",
        )
    if rows and off.max() > experts - top_k:
        raise MaskContentError(
            f"{int(off.max())} of {experts} experts are switched off where {top_k} must be selected",
            where=f"row {int(off.argmax())} of the force table",
            expected=f"at most {experts - top_k} experts switched off in a layer",
            do="cap the number of experts switched off per layer",
        )
    if scoring.groups > 1:
        _check_groups(force_TE.reshape(rows, scoring.groups, experts // scoring.groups), scoring)


def _check_groups(force_TGS: NDArray[np.int8], scoring: Scoring) -> None:
    groups_on = (force_TGS > 0).any(axis=-1).sum(axis=-1)
    if groups_on.size and groups_on.max() > scoring.groups_kept:
        raise MaskContentError(
            f"experts of {int(groups_on.max())} groups are switched on where {scoring.groups_kept} can be chosen",
            where=f"row {int(groups_on.argmax())} of the force table ({scoring.groups} groups)",
            expected=f"experts switched on in at most {scoring.groups_kept} groups of a layer",
            do="keep the strongest of them in as many groups, or switch others off instead",
        )
    # the fullest groups of switched experts, were they all that is kept, must still leave free ones enough
    switched = np.sort((force_TGS != 0).sum(axis=-1), axis=-1)[:, ::-1][:, : scoring.groups_kept].sum(axis=-1)
    on = (force_TGS > 0).sum(axis=(-2, -1))
    short = (scoring.top_k - on) - (scoring.groups_kept * force_TGS.shape[-1] - switched)
    if short.size and short.max() > 0:
        raise MaskContentError(
            f"too few experts are left in the {scoring.groups_kept} of {scoring.groups} groups that may be kept",
            where=f"row {int(short.argmax())} of the force table",
            expected=f"at least {scoring.top_k} experts on or free in any {scoring.groups_kept} groups",
            do="switch off fewer experts of one group",
        )


def _best(choice_TE: F32, k: int, force_TE: NDArray[np.int8] | None) -> NDArray[np.int64]:
    """Ids of the k best, best first: forced-on, then free, then forced-off; within a class by choice score."""
    order = np.argsort(-choice_TE, axis=-1, kind="stable")
    if force_TE is not None:
        classes = np.take_along_axis(force_TE, order, axis=-1)
        order = np.take_along_axis(order, np.argsort(-classes.astype(np.int64), axis=-1, kind="stable"), axis=-1)
    return order[..., :k].astype(np.int64)


def _preferring(scores: F32, prefer: NDArray[np.bool_] | None) -> F32:
    """Scores with the preferred ones raised by what counts as a tie."""
    if prefer is None:
        return scores
    finite = np.where(np.isfinite(scores), scores, 0)
    raised: F32 = np.abs(finite) * np.float32(TIE) + np.float32(1e-30)
    return (scores + prefer.astype(np.float32) * raised).astype(np.float32)


def _open_experts(
    choice_TE: F32, scoring: Scoring, kept: Dtype, prefer_TE: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Which experts lie in the groups that are kept, [T, E]."""
    tokens, experts = choice_TE.shape
    size = experts // scoring.groups
    best_first = -np.sort(-choice_TE.reshape(tokens, scoring.groups, size), axis=-1)
    count = 2 if scoring.group_score == "top2-sum" else 1
    score_TG = round_to(best_first[..., :count].sum(axis=-1, dtype=np.float32), kept)
    prefer_TG = None if prefer_TE is None else np.asarray(prefer_TE.reshape(tokens, scoring.groups, size).any(axis=-1))
    best_groups = np.argsort(-_preferring(score_TG, prefer_TG), axis=-1, kind="stable")[..., : scoring.groups_kept]
    open_TG = np.zeros((tokens, scoring.groups), dtype=bool)
    np.put_along_axis(open_TG, best_groups, True, axis=-1)
    return np.repeat(open_TG, size, axis=-1)


def _sparsemixer(
    logits_TE: F32,
    scoring: Scoring,
    force_TE: NDArray[np.int8] | None,
    prefer_TE: NDArray[np.bool_] | None,
    kept: Dtype,
) -> Selection:
    """Phi-3.5-MoE's selection at inference (SparseMixer-v2, arXiv:2409.12136): two argmaxes.

    Each weight is the chosen expert's share of a softmax over the experts within 2 x jitter of it, relative
    to |logit|; so it is not invariant under a shift of all logits, which is why raw logits are steered.
    """
    if scoring.top_k != 2:
        raise MaskContentError(
            f"sparsemixer with k = {scoring.top_k}",
            where="the model's scoring",
            expected="k = 2, the only case it is defined for",
            do="check num_experts_per_tok in the model's config.json",
        )
    chosen = _best(_preferring(logits_TE, prefer_TE), 2, force_TE)
    weights = np.empty(chosen.shape, dtype=np.float32)
    rest = logits_TE.copy()
    for rank in range(2):
        picked = chosen[:, rank : rank + 1]
        # with forced experts the pick need not be the largest left: it is the reference of its own near ties
        threshold = np.take_along_axis(logits_TE, picked, axis=-1)
        factor = np.maximum(np.abs(logits_TE), threshold).astype(np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):  # a threshold of 0: 0 / 0 is not far, x / 0 is
            ratio = round_to((round_to(threshold - logits_TE, kept) / factor).astype(np.float32), kept)
        far = ratio > round_to(np.array([2 * scoring.jitter], dtype=np.float32), kept)
        near = softmax(np.where(far, -np.inf, rest).astype(np.float32))
        weights[:, rank] = np.take_along_axis(near, picked, axis=-1)[:, 0]
        np.put_along_axis(rest, picked, -np.inf, axis=-1)
    empty = np.zeros((len(weights), 0), dtype=np.float32)
    return Selection(chosen, (weights * np.float32(scoring.scale)).astype(np.float32), empty)

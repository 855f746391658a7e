"""What a mask becomes in a checkpoint's own tensors, family by family; what has no such form is refused.

| kind         | what changes                                        | holds          | what that is               |
|--------------|-----------------------------------------------------|----------------|----------------------------|
| `bias`       | the router's bias, by alpha sigma S                 | additive masks | MASCing (arXiv:2604.27818) |
| `layernorm`  | the router's matrix, see `_by_layernorm`            | additive masks | the same, but for rounding |
| `correction` | the correction bias: far up for on, down for off    | forced masks   | the choice of experts only |

`Family.bake` is a family's kind. The numbers put in a correction bias are finite: kernels add, round and compare them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesteer.errors import MaskContentError, ModelError, SelfCheckError
from moesteer.mask import SteeringMask
from moesteer.models.check import PROBE_TOKENS, backbone
from moesteer.models.checkpoint import Change, Checkpoint, Place
from moesteer.models.families import FAMILIES, Bake
from moesteer.models.routers import Router
from moesteer.routing import Scoring

NORM = "post_attention_layernorm"
"""Of a decoder layer: the LayerNorm whose output its router gets, in families baked by `layernorm`."""
REACH = 100.0
"""How far beyond the layer's own corrections a forced expert's is put; scores lie within 0 and 1, or are logits."""
RUNTIME = "steer it at run time: `moesteer generate --mask`, or `mask.apply(model)`"
EXACT: dict[Bake, str] = {
    "bias": "the choice of experts and their weights: the mask's bias is part of the router's bias",
    "layernorm": "the choice of experts and their weights, but for rounding: the router's matrix gives the bias",
    "correction": "experts switched on are always chosen, experts switched off never",
}
NOT_EXACT: dict[Bake, str] = {
    "bias": "the bias is rounded to the tensor's dtype",
    "layernorm": "each logit carries the rounding of a sum over the hidden state, more of it the smaller the constant",
    "correction": "weights are the experts' own, not those of forced logits; a group with an expert switched on is "
    "always kept, one whose experts are all off only where too few others are left",
}


@dataclass(frozen=True)
class Plan:
    """The tensors to be changed. rounding: the largest |stored - wanted|, in the tensor's own units."""

    kind: Bake
    changes: tuple[Change, ...]
    rounding: float


def require_bakeable(mask: SteeringMask) -> Bake:
    """The kind by which the mask's family can hold it; what needs no model is refused here.

    Raises ModelError for a family that can hold no mask, MaskContentError for the wrong form of mask.
    """
    if mask.gated:
        raise MaskContentError(
            "a gated mask cannot be baked: a checkpoint's tensors act on every request",
            where=f"the mask's gate, threshold {mask.info.gate.threshold if mask.info.gate else 0:g}",
            expected="a mask without a gate",
            do=f"take the gate off (mask.with_gate(None, None)) if it may act everywhere; else {RUNTIME}",
        )
    model_type = mask.info.fingerprint.model_type
    family = FAMILIES.get(model_type)
    kind: Bake = family.bake if family is not None else ""
    if not kind:
        raise ModelError(
            f"no tensor of a {model_type} checkpoint can hold a mask: its router has no bias of its own",
            where=f"the mask, made for {model_type}",
            expected="a family that can: `moesteer models` says which, in the column `bake`",
            do=RUNTIME,
        )
    if mask.forced and kind != "correction":
        raise MaskContentError(
            f"a forced mask cannot be baked into a {model_type} checkpoint",
            where=f"the mask, kind {kind}",
            expected="an additive mask: a bias moves an expert, but on and off are decided by rank, token by token",
            do=f"bake an additive mask (`moesteer detect` makes both forms), or {RUNTIME}",
        )
    if not mask.forced and kind == "correction":
        raise MaskContentError(
            f"an additive mask cannot be baked into a {model_type} checkpoint",
            where="the mask; the family's routers add a correction bias to scores, in the choice only",
            expected="a forced mask: a finite bias on logits would have to be another one on the scores of each token",
            do=f"bake a forced mask, or {RUNTIME}",
        )
    return kind


def plan(
    model: PreTrainedModel, routers: Sequence[Router], mask: SteeringMask, *, alpha: float, checkpoint: Checkpoint
) -> Plan:
    """The changes that make a checkpoint hold `mask`, whose tables must be of the routers' shape.

    Raises as `require_bakeable`, and ModelError where a tensor is missing, not found in the files or cannot be used,
    MaskContentError for switched experts that a correction bias cannot give.
    """
    kind = require_bakeable(mask)
    finder = _Finder(model, checkpoint)
    rows = list(zip(routers, mask.values_LE if kind == "correction" else mask.bias_LE(alpha), strict=True))
    steered = [(router, row) for router, row in rows if row.any()]
    if kind == "layernorm":
        _require_fed(model, [router for router, _ in steered])
    changes: list[Change] = []
    rounding = 0.0
    for router, row_E in steered:
        if kind == "correction":
            place, wanted = _by_correction(finder, router, row_E)
        elif kind == "bias":
            place, wanted = _by_bias(finder, router, row_E)
        else:
            place, wanted = _by_layernorm(finder, router, row_E)
        change, error = _stored(place, wanted, router)
        if any(other.stored == change.stored for other in changes):
            raise ModelError(
                f"two routers share the tensor {change.stored.name}",
                where=f"{checkpoint.folder}, layer {router.layer_id}",
                expected="a tensor for each router, since a mask has a row for each",
                do=RUNTIME,
            )
        changes.append(change)
        rounding = max(rounding, 0.0 if kind == "correction" else error)
    return Plan(kind, tuple(changes), rounding)


class _Finder:
    """Finds the tensors of a model's modules in its checkpoint."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.names = {id(tensor): name for name, tensor in every}

    def place(self, router: Router, tensor: Tensor | None, what: str) -> Place:
        """Where a tensor of the router, or of its layer, lies in the files."""
        if tensor is None:
            raise ModelError(
                f"the router has no {what}, so there is nothing to bake into",
                where=f"layer {router.layer_id} ({router.path})",
                expected=f"a {what}, as checkpoints of {router.family.model_type} usually have",
                do=RUNTIME,
            )
        name = self.names.get(id(tensor), f"{router.path}.{what}")
        skipped = router.scoring.skipped if tensor is router.correction else 0
        return self.checkpoint.find(
            name, tensor, layer_id=router.layer_id, layer_pattern=router.family.layer_pattern, unread=skipped
        )


def _values(place: Place) -> Tensor:
    """The part of a stored tensor that is the loaded one, float64 [rows, width]."""
    whole = place.stored.read().double()
    return whole.reshape(-1, whole.shape[-1])[place.first : place.first + place.rows]


def _by_bias(finder: _Finder, router: Router, bias_E: NDArray[np.float32]) -> tuple[Place, Tensor]:
    place = finder.place(router, router.bias, "bias")
    return place, _values(place) + torch.from_numpy(bias_E).double()


def _by_layernorm(finder: _Finder, router: Router, bias_E: NDArray[np.float32]) -> tuple[Place, Tensor]:
    """A router fed by a LayerNorm can add a constant to its logits, though it has no bias.

    Its input is h = g * n + beta, where n sums to 0; so (1/g) . h = sum(beta / g) = kappa for every token, and
    (W + (bias / kappa) (1/g)^T) h = W h + bias. What is lost is the rounding of that sum, larger as kappa is smaller.
    """
    norm = _norm_of(finder.model, router)
    place = finder.place(router, router.weight, "weight")
    gain_H, beta_H = (
        _values(finder.place(router, tensor, f"{NORM}.{name}"))[0]
        for name, tensor in (("weight", norm.weight), ("bias", norm.bias))
    )
    inverse_H = 1.0 / gain_H
    kappa = float((beta_H * inverse_H).sum())
    if not math.isfinite(kappa) or kappa == 0.0:
        raise ModelError(
            f"the LayerNorm before the router gives no constant (sum of bias / weight is {kappa:g})",
            where=f"layer {router.layer_id} ({router.path})",
            expected="a LayerNorm whose weights are not 0, and whose biases do not cancel",
            do=RUNTIME,
        )
    return place, _values(place) + torch.outer(torch.from_numpy(bias_E).double() / kappa, inverse_H)


def _by_correction(finder: _Finder, router: Router, force_E: NDArray[np.int8]) -> tuple[Place, Tensor]:
    """Off: 100 below every correction of the layer; on: 100 above.

    Where a group counts for its best two experts, on is 300 above: the group is kept even if all others in it are off.
    """
    place = finder.place(router, router.correction, "correction bias")
    own, force = _values(place), torch.from_numpy(force_E)
    require_representable(router, force_E, lowest=min(own[0, force == 0].tolist(), default=0.0))
    reach = REACH + math.ceil(float(own.abs().max()))
    above = 3 * reach if _best_two(router.scoring) else reach
    return place, torch.where(force > 0, above, torch.where(force < 0, -reach, own))


def _best_two(scoring: Scoring) -> bool:
    return scoring.groups > 1 and scoring.group_score == "top2-sum"


def require_representable(router: Router, force_E: NDArray[np.int8], *, lowest: float) -> None:
    """Raise MaskContentError for switched experts that a correction bias would not give in this router.

    lowest: the least correction of the experts that are not switched.
    """
    scoring = router.scoring
    problem = ""
    if scoring.skipped and force_E[-scoring.skipped :].any():
        problem = "the choice that skips the experts is switched, and its bias is set when a model is loaded"
    if _best_two(scoring):
        groups_GS = force_E.reshape(scoring.groups, -1)
        left = (groups_GS >= 0).sum(axis=-1)
        lone = (left == 1) & ~(groups_GS > 0).any(axis=-1) & (groups_GS < 0).any(axis=-1)
        if lone.any():
            problem = (
                f"group {int(lone.argmax())} of {scoring.groups} has one expert left, which could never be chosen: a "
                "group counts for the sum of its best two"
            )
    if scoring.groups > 1 and scoring.group_fill == 0.0 and (force_E < 0).any() and lowest < 0:
        problem = "experts of groups that lost count 0, more than some whose correction bias is negative"
    if problem:
        raise MaskContentError(
            f"a correction bias cannot hold this mask: {problem}",
            where=f"layer {router.layer_id} ({router.path})",
            expected="switched experts that the router's own choice gives, whatever the token",
            do=f"switch off other experts, or all of a group, or {RUNTIME}",
        )


def _norm_of(model: PreTrainedModel, router: Router) -> nn.LayerNorm:
    layer = re.match(r"(.*\.layers\.\d+)\.", router.path)
    norm: Any = getattr(model.get_submodule(layer.group(1)), NORM, None) if layer is not None else None
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise _not_fed(router, f"its layer has no LayerNorm {NORM!r} with weight and bias")
    return norm


def _require_fed(model: PreTrainedModel, routers: Sequence[Router]) -> None:
    """Raise SelfCheckError unless each router's input is its LayerNorm's output, bit for bit, on a short probe."""
    seen: dict[tuple[str, int], Tensor] = {}
    handles = []
    for router in routers:
        norm = _norm_of(model, router)

        def out(_module: nn.Module, _args: Any, result: Tensor, *, index: int = router.index) -> None:
            seen["norm", index] = result

        def into(_module: nn.Module, args: Any, *, index: int = router.index) -> None:
            seen["router", index] = args[0]

        handles += [norm.register_forward_hook(out), router.module.register_forward_pre_hook(into)]
    try:
        with torch.inference_mode():
            probe = torch.arange(PROBE_TOKENS, device=model.device).unsqueeze(0)
            backbone(model)(input_ids=probe % model.get_input_embeddings().num_embeddings, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for router in routers:
        norm_out, router_in = seen.get(("norm", router.index)), seen.get(("router", router.index))
        if norm_out is None or router_in is None or not torch.equal(norm_out.reshape(router_in.shape), router_in):
            raise _not_fed(router, f"what it gets is not what {NORM!r} gives")


def _not_fed(router: Router, what: str) -> SelfCheckError:
    return SelfCheckError(
        f"the router cannot be given a bias through a LayerNorm: {what}",
        where=f"layer {router.layer_id} ({router.path})",
        expected="the router's input to be that LayerNorm's output",
        do=f"report the model and the installed transformers version; meanwhile {RUNTIME}",
    )


def _stored(place: Place, wanted: Tensor, router: Router) -> tuple[Change, float]:
    """The tensor with its new values, rounded to its dtype, and the largest error of that."""
    new = place.stored.read()
    part = new.reshape(-1, new.shape[-1])[place.first : place.first + place.rows]
    part.copy_(wanted)
    if not bool(part.isfinite().all()):
        raise ModelError(
            f"the new values of {place.stored.name} do not fit {place.stored.dtype}",
            where=f"layer {router.layer_id}",
            expected="finite numbers",
            do=f"lower alpha, bake from a checkpoint in float32, or {RUNTIME}",
        )
    return Change(place.stored, new), float((part.double() - wanted).abs().max())

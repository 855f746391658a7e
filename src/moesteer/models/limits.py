"""What cannot be done to a model's routers, said before the first token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesteer.errors import AlreadySteeredError, InputError, MaskContentError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import SteeringMask
from moesteer.models.routers import Router
from moesteer.routing import check_force


def require_possible(mask: SteeringMask, routers: Sequence[Router]) -> None:
    """Raise MaskContentError for a forced mask that these routers cannot follow; `force_LE` must have their shape.

    More experts on than k, too few left, experts on in more groups than are kept (routing.check_force); an expert
    on in a top-1 router.
    """
    if mask.force_LE is None:
        return
    scoring = routers[0].scoring
    check_force(mask.force_LE, scoring=scoring)
    on = (mask.force_LE > 0).any(axis=-1)
    if scoring.top_k == 1 and on.any():
        raise MaskContentError(
            "an expert is switched on in a top-1 router",
            where=f"layer {routers[int(on.argmax())].layer_id}",
            expected="none switched on: a top-1 router has one place, and every token would take this expert in it",
            do="switch others off, or use an additive mask, which leaves the choice to the token",
        )


def strengths_of(masks: Sequence[SteeringMask], alphas: Sequence[float | None] | None) -> list[float | None]:
    """One strength for each mask (None: its own). Raises InputError as require_strengths."""
    strengths: list[float | None] = [None] * len(masks) if alphas is None else list(alphas)
    require_strengths(masks, strengths)
    return strengths


def require_masks(
    masks: Sequence[SteeringMask],
    strengths: Sequence[float | None],
    fingerprint: Fingerprint,
    routers: Sequence[Router],
    *,
    together: bool,
    allow_other_checkpoint: bool = False,
    allow_empty: bool = False,
) -> None:
    """Raise unless this model can be steered by these masks: MaskMismatchError, MaskContentError, NoEffectError.

    together: all act on every token, so their forces must agree. allow_empty: a mask may change nothing.
    """
    for mask in masks:
        mask.check_model(fingerprint, allow_other_checkpoint=allow_other_checkpoint)
        if not allow_empty:
            mask.require_entries()
        require_possible(mask, routers)
    if together:
        require_together(masks, strengths, routers)


def require_strengths(masks: Sequence[SteeringMask], alphas: Sequence[float | None]) -> None:
    """Raise InputError unless there is one strength for each mask, None or a finite number."""
    odd = [alpha for alpha in alphas if alpha is not None and not math.isfinite(alpha)]
    if odd or len(alphas) != len(masks):
        raise InputError(
            f"a strength cannot be {odd[0]}" if odd else f"{len(alphas)} strengths for {len(masks)} masks",
            where="alphas",
            expected="one finite number for each mask, in the same order (None: the mask's own), or no alphas at all",
            do="correct alphas, or leave them out",
        )


def require_together(masks: Sequence[SteeringMask], alphas: Sequence[float | None], routers: Sequence[Router]) -> None:
    """Raise MaskContentError for masks whose forces contradict each other, or together ask more than a layer has."""
    forced = [
        mask
        for mask, alpha in zip(masks, alphas, strict=True)
        if mask.force_LE is not None and (mask.info.alpha if alpha is None else alpha) != 0
    ]
    if len(forced) < 2:
        return
    tables = np.stack([mask.force_LE for mask in forced if mask.force_LE is not None])
    both = (tables > 0).any(0) & (tables < 0).any(0)
    if both.any():
        row, expert = (int(i) for i in np.argwhere(both)[0])
        more = int(both.sum()) - 1
        raise MaskContentError(
            "masks applied together switch the same expert on and off",
            where=f"layer {routers[row].layer_id}, expert {expert}" + (f", and {more} more" if more else ""),
            expected="forces that agree wherever two masks name the same expert",
            do="make one mask of them with a rule: `moesteer mask compose --op union --conflict first`",
        )
    require_possible(replace(forced[0], force_LE=np.sign(tables.sum(0)).astype(np.int8)), routers)


def require_unsteered(steering: object | None, *, name: str) -> None:
    """Raise AlreadySteeredError where something steers the model `name` now (None: nothing does)."""
    if steering is not None:
        raise AlreadySteeredError(
            "the model is already steered", where=name, expected="one steering at a time", do="leave the first block"
        )


def limits(routers: Sequence[Router]) -> tuple[str, ...]:
    """What to know of a model's routers before masking them, a sentence each."""
    first, said = routers[0], []
    scoring = first.scoring
    if scoring.top_k == 1:
        said.append("top-1: experts can be switched off and biased, not switched on")
    else:
        said.append(f"at most {scoring.top_k} experts of a layer can be switched on")
    if scoring.groups > 1:
        size = first.experts // scoring.groups
        said.append(
            f"experts lie in {scoring.groups} groups of {size}; those switched on may lie in at most "
            f"{scoring.groups_kept} of them, and of any {scoring.groups_kept} groups at most "
            f"{scoring.groups_kept * size - scoring.top_k} experts can be switched off"
        )
    else:
        said.append(f"at most {first.experts - scoring.top_k} of a layer can be switched off")
    if first.correction is not None:
        said.append("a correction bias takes part in the choice: a bias on the logits moves it less than elsewhere")
    constant = scoring.renormalise or scoring.kind == "topk-softmax"
    if constant and scoring.top_k == 1 and not scoring.shared:
        said.append("the one weight is constant: it carries no gradient, so method `direct` finds nothing")
    if scoring.skipped:
        said.append(f"the last {scoring.skipped} of the {first.experts} choices is no expert: it skips the layer's")
    if first.family.note:
        said.append(first.family.note)
    return tuple(said)

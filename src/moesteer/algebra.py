"""Arithmetic of masks: new masks from old ones. Numpy only; docs/mask-algebra.md.

Everything is over the effect of a mask at its own alpha, [L, E] float64 (`effect_LE`): what an additive mask adds to
the logits, alpha x sigma x strength; the -1, 0 and 1 of a forced one. Where several additive masks become one, its
alpha is 1 and its strengths are in units of the first mask's sigma; in a layer where that is 0, or so small that the
strengths would be beyond MAX_STRENGTH, of the largest sigma of the masks. A forced mask and an additive one are two
masks: apply both at once. Results may be empty (a - a); `compose` refuses to give such a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moesteer.errors import InputError, MaskContentError, MaskMismatchError
from moesteer.mask import MAX_STRENGTH, SteeringMask

Conflict = Literal["refuse", "first", "drop", "sum"]
Operation = Literal["add", "subtract", "union"]
CONFLICTS: tuple[Conflict, ...] = get_args(Conflict)
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
F64 = NDArray[np.float64]


def effect_LE(mask: SteeringMask) -> F64:
    """What the mask does at its own alpha: a bias in logits [L, E], or a force of -1, 0 and 1 (0 at alpha 0).

    Raises MaskContentError for a bias that float32 cannot hold.
    """
    if mask.force_LE is not None:
        return np.where(mask.info.alpha != 0, mask.force_LE, 0).astype(np.float64)
    assert mask.strength_LE is not None and mask.sigma_L is not None
    with np.errstate(over="ignore"):
        effect = mask.info.alpha * (mask.sigma_L.astype(np.float64)[:, None] * mask.strength_LE)
    if np.abs(effect).max(initial=0.0) > np.finfo(np.float32).max:
        raise MaskContentError(
            "the mask's bias is beyond the range of float32",
            where=f"{name_of(mask)}, alpha {mask.info.alpha:g}",
            expected="alpha x sigma x strength of a sensible size",
            do="give a smaller alpha",
        )
    return np.asarray(effect, dtype=np.float64)


def with_alpha(mask: SteeringMask, alpha: float) -> SteeringMask:
    """The mask with another alpha. An additive mask whose alpha changes sign steers the opposite way, and says so."""
    turned = not mask.forced and alpha * mask.info.alpha < 0
    return mask.with_info(alpha=alpha, intent=_opposite(mask) if turned else mask.info.intent, accepted_on=None)


def scale(mask: SteeringMask, factor: float) -> SteeringMask:
    """Strengths times `factor`, at the same alpha. Raises InputError for a forced mask: a force has no size."""
    if mask.strength_LE is None:
        raise InputError(
            "a forced mask cannot be scaled: an expert is on, off or free",
            where=name_of(mask),
            expected="an additive mask",
            do="keep fewer experts (top), or the experts of some layers (restrict)",
        )
    if not np.isfinite(factor):
        raise InputError(
            f"a mask cannot be scaled by {factor}", where=name_of(mask), expected="a finite number", do="give one"
        )
    with np.errstate(over="ignore"):
        strength = (mask.strength_LE.astype(np.float64) * factor).astype(np.float32) + np.float32(0)  # no -0.0
    intent = _opposite(mask) if factor < 0 else mask.info.intent
    changed = _derived(mask, "scale", intent=intent, factor=float(factor))
    return _built(changed, do="scale by a smaller factor", strength_LE=strength)


def negate(mask: SteeringMask) -> SteeringMask:
    """The opposite: strengths with the other sign; experts that were on are off. Its intent is "not ...".

    Raises MaskContentError where a layer of a forced mask would have more experts on than are selected.
    """
    changed = _derived(mask, "negate", intent=_opposite(mask))
    if mask.force_LE is not None:
        force = (-mask.force_LE).astype(np.int8)
        _check_limits(force, mask, "negate")
        return replace(changed, force_LE=force)
    assert mask.strength_LE is not None
    return replace(changed, strength_LE=(0 - mask.strength_LE).astype(np.float32))  # no -0.0


def restrict(mask: SteeringMask, *, layers: Iterable[int]) -> SteeringMask:
    """The entries of some decoder layers (ids); the others zero. Raises InputError for a layer without a router."""
    wanted = sorted(set(layers))
    missing = [layer for layer in wanted if layer not in mask.layer_ids]
    if missing:
        raise InputError(
            f"the mask has no layer {', '.join(map(str, missing))}",
            where=name_of(mask),
            expected=f"decoder layers with a router: {', '.join(map(str, mask.layer_ids))}",
            do="give layers of these",
        )
    keep_L = np.isin(np.array(mask.layer_ids), wanted)
    changed = _derived(mask, "restrict", layers=wanted)
    kept = np.where(keep_L[:, None], mask.values_LE, 0).astype(mask.values_LE.dtype)
    return replace(changed, force_LE=kept) if mask.forced else replace(changed, strength_LE=kept)


# ---------------------------------------------------------------- of several masks


def add(*masks: SteeringMask, allow_other_checkpoint: bool = False) -> SteeringMask:
    """The mask whose bias is the sum of the masks' biases, each at its own alpha.

    Raises InputError for forced masks (see `union`) and masks behind different gates, MaskMismatchError for masks of
    different models (allow_other_checkpoint: of the same shape will do).
    """
    _check_together(masks, "add", allow_other_checkpoint=allow_other_checkpoint)
    _check_additive(masks, "add")
    effect = np.sum([effect_LE(mask) for mask in masks], axis=0)
    return _additive(masks, effect, _joined(masks, "add"))


def subtract(a: SteeringMask, b: SteeringMask, *, allow_other_checkpoint: bool = False) -> SteeringMask:
    """The mask whose bias is the bias of `a` less that of `b`. Raises as `add`."""
    _check_together((a, b), "subtract", allow_other_checkpoint=allow_other_checkpoint)
    _check_additive((a, b), "subtract")
    minus_b = b.with_info(intent=_opposite(b))
    joined = _joined((a, minus_b), "subtract", sources=(a, b))
    return _additive((a, b), effect_LE(a) - effect_LE(b), joined)


def union(
    masks: Sequence[SteeringMask], *, conflict: Conflict = "refuse", allow_other_checkpoint: bool = False
) -> SteeringMask:
    """The entries of all masks. Where several have one for the same expert and agree on its sign, the largest effect.

    conflict: what to do where they pull an expert opposite ways. "refuse": InputError; "first": the sign of the
    first mask that has an entry; "drop": no entry; "sum": effects are summed wherever masks overlap (additive: as
    `add`; forced: the majority, none where they balance). Raises InputError and MaskMismatchError as `add`, and
    MaskContentError where a layer cannot be forced so.
    """
    if conflict not in CONFLICTS:
        raise InputError(
            f"no conflict rule {conflict!r}", where="union of masks", expected=", ".join(CONFLICTS), do="give one"
        )
    _check_together(masks, "union", allow_other_checkpoint=allow_other_checkpoint)
    effects_MLE = np.stack([effect_LE(mask) for mask in masks])
    united = _united_LE(masks, effects_MLE, conflict)
    first, joined = masks[0], _joined(masks, "union", conflict=conflict)
    if first.forced:
        force = np.sign(united).astype(np.int8)
        _check_limits(force, first, f"union of {len(masks)} masks")
        return replace(joined, force_LE=force)
    return _additive(masks, united, joined)


def _united_LE(masks: Sequence[SteeringMask], effects_MLE: F64, conflict: Conflict) -> F64:
    if conflict == "sum":
        return np.asarray(effects_MLE.sum(axis=0))
    raised_LE, lowered_LE = (effects_MLE > 0).any(axis=0), (effects_MLE < 0).any(axis=0)
    opposed_LE = raised_LE & lowered_LE
    if conflict == "refuse" and opposed_LE.any():
        row, expert = (int(i) for i in np.argwhere(opposed_LE)[0])
        pulls = ", ".join(
            f"{name_of(m)} {v:+.3g}" for m, v in zip(masks, effects_MLE[:, row, expert], strict=True) if v
        )
        raise InputError(
            f"{int(opposed_LE.sum())} experts are pulled opposite ways by the masks",
            where=f"first: layer {masks[0].layer_ids[row]}, expert {expert}: {pulls}",
            expected="masks that agree on the sign of every expert they share",
            do="choose a rule (--conflict first, drop or sum), or leave those experts out of one mask",
        )
    sign_LE = raised_LE.astype(np.float64) - lowered_LE  # 0 where they are opposed: dropped
    if conflict == "first":
        owner_LE = (effects_MLE != 0).argmax(axis=0)
        sign_LE = np.sign(np.take_along_axis(effects_MLE, owner_LE[None], axis=0)[0])
    agreeing_MLE = np.where(np.sign(effects_MLE) == sign_LE, np.abs(effects_MLE), 0.0)
    return np.asarray(sign_LE * agreeing_MLE.max(axis=0))


def compose(
    masks: Sequence[SteeringMask],
    *,
    op: Operation | None = None,
    alphas: Sequence[float] | None = None,
    conflict: Conflict = "refuse",
    layers: Iterable[int] | None = None,
    factor: float | None = None,
    negated: bool = False,
    top: int | None = None,
    allow_other_checkpoint: bool = False,
) -> SteeringMask:
    """Several steps as one mask, in this order: alphas, layers, op, factor, negated, top. What is None is not done.

    op is needed for several masks and takes at least two (subtract: two). alphas: one for each mask. Raises
    InputError for steps that do not fit, NoEffectError for a result without entries, and as the single functions.
    """
    masks = list(masks)
    chosen = layers if layers is None else sorted(set(layers))
    rule = conflict if op == "union" or conflict != "refuse" else None
    steps = {"conflict": rule, "layers": chosen, "factor": factor, "negated": negated or None, "top": top}
    steps = {name: value for name, value in steps.items() if value is not None}
    _check_steps(masks, op=op, alphas=alphas, steps=steps)
    given = masks
    if alphas is not None:
        masks = [with_alpha(mask, alpha) for mask, alpha in zip(masks, alphas, strict=True)]
    sources = [{**_source(now), "sha256": file.sha256[:12]} for now, file in zip(masks, given, strict=True)]
    if chosen is not None:
        masks = [restrict(mask, layers=chosen) for mask in masks]
    result = masks[0]
    if op == "union":
        result = union(masks, conflict=conflict, allow_other_checkpoint=allow_other_checkpoint)
    elif op == "add":
        result = add(*masks, allow_other_checkpoint=allow_other_checkpoint)
    elif op == "subtract":
        result = subtract(masks[0], masks[1], allow_other_checkpoint=allow_other_checkpoint)
    result = result if factor is None else scale(result, factor)
    result = negate(result) if negated else result
    result = result if top is None else result.top(top)
    result = result.with_info(method=op or "compose", settings={"sources": sources, **steps}, accepted_on=None)
    result.require_entries()
    return result


def _check_steps(
    masks: Sequence[SteeringMask], *, op: Operation | None, alphas: Sequence[float] | None, steps: dict[str, Any]
) -> None:
    given = f"{len(masks)} masks, op {op}, alphas {None if alphas is None else list(alphas)}"
    wrong = None
    if not masks:
        wrong = ("there is no mask to compose", "one mask or more", "give mask files")
    elif op is not None and op not in OPERATIONS:
        wrong = (f"no operation {op!r}", ", ".join(OPERATIONS), "give one of them")
    elif len(masks) > 1 and op is None:
        wrong = ("it is not said what to do with the masks", ", ".join(OPERATIONS), "give one with --op")
    elif op is not None and (len(masks) < 2 or (op == "subtract" and len(masks) > 2)):
        wrong = (f"{op} takes {'two masks' if op == 'subtract' else 'at least two'}, not {len(masks)}",
                 "as many masks as it takes", "add or unite the others first, or leave --op out")  # fmt: skip
    elif alphas is not None and len(alphas) != len(masks):
        wrong = (f"{len(alphas)} alphas for {len(masks)} masks", "one alpha for each mask, in order", "repeat --alpha")
    elif op != "union" and "conflict" in steps:
        wrong = (f"a conflict rule for op {op}", "a rule for op union only", "leave it out, or give --op union")
    elif steps.get("top", 1) < 1:
        wrong = (f"a mask of the top {steps['top']} experts is none", "1 or more", "give another number")
    elif op is None and alphas is None and not steps:
        wrong = ("nothing is to be done with the mask", "an operation, an alpha, a scale, layers, ...", "give one")
    if wrong:
        raise InputError(wrong[0], where=given, expected=wrong[1], do=wrong[2])


# ---------------------------------------------------------------- checks and provenance


def name_of(mask: SteeringMask) -> str:
    """A mask in messages."""
    return f"{mask.info.method} mask {mask.sha256[:12]}"


def _check_together(masks: Sequence[SteeringMask], what: str, *, allow_other_checkpoint: bool) -> None:
    """Masks that can become one: of one model, all forced or all additive, all behind the same gate."""
    if not masks:
        raise InputError(f"{what} of no masks", where=what, expected="one mask or more", do="give masks")
    check_models(masks, allow_other_checkpoint=allow_other_checkpoint)
    together = "apply them together instead: model.steered([a, b], together=True), or --mask A --mask B"
    first = masks[0]
    for other in masks[1:]:
        if other.forced != first.forced:
            raise InputError(
                f"{what}: a forced mask and an additive one cannot become one mask",
                where=f"{name_of(first)}, {name_of(other)}",
                expected="masks that all force, or all add",
                do=together,
            )
        if not same_gate(first, other):
            raise InputError(
                f"{what}: masks behind different gates cannot become one mask",
                where=f"{name_of(first)}, {name_of(other)}",
                expected="masks without a gate, or behind the same one",
                do=together,
            )


def same_gate(a: SteeringMask, b: SteeringMask) -> bool:
    """Whether two masks apply to the same requests: both to all, or behind the same gate."""
    if a.gate_LE is None or b.gate_LE is None:
        return a.gate_LE is b.gate_LE
    return a.info.gate == b.info.gate and np.array_equal(a.gate_LE, b.gate_LE)


def check_models(masks: Sequence[SteeringMask], *, allow_other_checkpoint: bool) -> None:
    """Raise MaskMismatchError unless all masks are of one model."""
    first = masks[0].info.fingerprint
    for other in masks[1:]:
        print_ = other.info.fingerprint
        differences = first.shape_differences(print_)
        if differences:
            raise MaskMismatchError(
                "the masks were made for models of different shapes",
                where="; ".join(text.replace(", model has", ", another mask has") for text in differences),
                expected="masks of one model",
                do="detect both masks on the same model",
            )
        if first.router_sha256 != print_.router_sha256 and not allow_other_checkpoint:
            raise MaskMismatchError(
                "the masks were made for different checkpoints: the router weights differ",
                where=f"{first.router_sha256[:12]}, {print_.router_sha256[:12]}",
                expected="masks of one checkpoint",
                do="detect both masks on the same checkpoint, or insist with --allow-other-checkpoint",
            )


def _check_additive(masks: Sequence[SteeringMask], what: str) -> None:
    if masks[0].forced:
        raise InputError(
            f"{what} is for additive masks: a force has no size",
            where=", ".join(name_of(mask) for mask in masks),
            expected="additive masks",
            do="unite forced masks (--op union), turning one round first to take its experts away (--negate)",
        )


def _check_limits(force_LE: NDArray[np.int8], mask: SteeringMask, what: str) -> None:
    """Raise MaskContentError with the layer that has more experts on or off than a router can meet."""
    top_k, experts = mask.info.fingerprint.top_k, force_LE.shape[1]
    for word, sign, most in (("on", 1, top_k), ("off", -1, experts - top_k)):
        count_L = (force_LE == sign).sum(axis=1)
        if count_L.max(initial=0) > most:
            row = int(count_L.argmax())
            switched = ", ".join(map(str, np.flatnonzero(force_LE[row] == sign)))
            raise MaskContentError(
                f"{what}: {int(count_L[row])} of {experts} experts would be {word}, where at most {most} can be",
                where=f"layer {mask.layer_ids[row]}: experts {switched}",
                expected=f"at most {top_k} experts on and {experts - top_k} off in a layer",
                do="first take fewer experts of each mask (`moesteer mask compose A --top N --out A2`), or leave this "
                "layer out (--layers)",
            )


def _additive(masks: Sequence[SteeringMask], total_LE: F64, changed: SteeringMask) -> SteeringMask:
    """An additive mask at alpha 1 whose bias is `total_LE`; see the module's text for its sigma."""
    sigma_ML = np.stack([np.asarray(mask.sigma_L, dtype=np.float64) for mask in masks])
    too_small_L = np.abs(total_LE).max(axis=1) > MAX_STRENGTH * sigma_ML[0]  # so is 0, where there is an effect
    unit_L = np.where(too_small_L, sigma_ML.max(axis=0), sigma_ML[0])
    with np.errstate(over="ignore"):
        strength = np.divide(total_LE, unit_L[:, None], out=np.zeros_like(total_LE), where=unit_L[:, None] > 0)
        strength = strength.astype(np.float32)
    do = "give the masks smaller alphas"
    return _built(changed, do=do, strength_LE=strength, sigma_L=unit_L.astype(np.float32))


def _built(mask: SteeringMask, *, do: str, **tables: NDArray[np.float32]) -> SteeringMask:
    try:
        return replace(mask, **tables)  # type: ignore[arg-type]
    except MaskContentError as error:
        what = f"the result of {mask.info.method} cannot be applied: {error.what}"
        raise MaskContentError(what, where=error.where, expected=error.expected, do=do) from error


def _opposite(mask: SteeringMask) -> dict[str, Any]:
    """The intent of the mask turned round: "not refuse" of "refuse", and back."""
    toward = mask.info.intent.toward
    if toward.startswith("not (") and toward.endswith(")"):
        toward = toward[5:-1]
    elif " + " in toward:
        toward = f"not ({toward})"
    else:
        toward = toward[4:] if toward.startswith("not ") else f"not {toward}"
    return {**mask.info.intent.model_dump(), "toward": toward}


def _source(mask: SteeringMask) -> dict[str, Any]:
    info = mask.info
    return {"sha256": mask.sha256[:12], "method": info.method, "toward": info.intent.toward, "alpha": info.alpha}


def _derived(mask: SteeringMask, method: str, *, intent: Any = None, **settings: Any) -> SteeringMask:
    """The mask with the provenance of something made from it; its numbers are still the old ones."""
    return mask.with_info(
        method=method, settings={"sources": [_source(mask)], **settings}, accepted_on=None,
        intent=intent or mask.info.intent,
    )  # fmt: skip


def _joined(
    masks: Sequence[SteeringMask], method: str, *, sources: Sequence[SteeringMask] | None = None, **settings: Any
) -> SteeringMask:
    """The first mask with alpha 1 and the provenance of all of them; its numbers are still its own."""
    towards = list(dict.fromkeys(mask.info.intent.toward for mask in masks))
    scenarios = {mask.info.intent.scenario for mask in masks}
    data = {mask.info.data_sha256 for mask in masks}
    return masks[0].with_info(
        method=method,
        settings={"sources": [_source(mask) for mask in sources or masks], **settings},
        intent={"toward": " + ".join(towards), "scenario": scenarios.pop() if len(scenarios) == 1 else None},
        alpha=1.0,
        data_sha256=data.pop() if len(data) == 1 else None,
        accepted_on=None,
    )

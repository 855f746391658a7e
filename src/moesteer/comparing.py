"""What two masks have in common: entry by entry (`diff`), and as numbers (`similarity`). docs/mask-algebra.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesteer import files
from moesteer.algebra import F64, check_models, effect_LE, name_of, same_gate
from moesteer.errors import InputError, NoEffectError
from moesteer.mask import SteeringMask

ROUNDING = 1e-6
"""Effects that differ by less than this, relative to the larger, are the same: a few units of float32's last place."""


def diff(a: SteeringMask, b: SteeringMask, *, allow_other_checkpoint: bool = False) -> dict[str, Any]:
    """Entries only in `a`, only in `b`, changed and the same; plain data, largest difference first.

    Values are effects at each mask's own alpha: logits, or forces. The same: up to float32 rounding. "fields" are
    the metadata that differ. Raises InputError for a forced and an additive mask, MaskMismatchError as `add`.
    """
    check_models((a, b), allow_other_checkpoint=allow_other_checkpoint)
    if a.forced != b.forced:
        raise InputError(
            "a forced mask and an additive one have no entry in common",
            where=f"{name_of(a)}, {name_of(b)}",
            expected="two forced masks, or two additive ones",
            do="compare them by `similarity`, where a force counts as -1 or 1",
        )
    one, two = effect_LE(a), effect_LE(b)
    found: dict[str, list[dict[str, Any]]] = {"only_a": [], "only_b": [], "changed": [], "same": []}
    for flat in np.argsort(-np.abs(one - two).ravel(), kind="stable"):
        row, expert = divmod(int(flat), one.shape[1])
        x, y = float(one[row, expert]), float(two[row, expert])
        if x == y == 0:
            continue
        alike = abs(x - y) <= ROUNDING * max(abs(x), abs(y))
        kind = "only_b" if x == 0 else "only_a" if y == 0 else "same" if alike else "changed"
        found[kind].append({"layer": a.layer_ids[row], "expert": expert, "a": x, "b": y})
    mine, other = (mask.info.model_dump(mode="json") for mask in (a, b))
    fields = {key: {"a": mine[key], "b": other[key]} for key in mine if mine[key] != other[key]}
    if not same_gate(a, b):
        fields["gate_LE"] = {"a": _gate_digest(a), "b": _gate_digest(b)}
    return {"a": a.sha256, "b": b.sha256, "unit": "force" if a.forced else "logits", "fields": fields, **found}


def similarity(
    a: SteeringMask, b: SteeringMask, *, at: Sequence[int] = (5, 20), allow_other_checkpoint: bool = False
) -> dict[str, Any]:
    """Cosine of the effects, and at each n the Jaccard index of the n experts of largest effect.

    "signed": the same expert with the opposite sign is another one; "unsigned": it is the same. Masks with fewer
    entries give all they have; ties go to the lower layer and expert. Raises NoEffectError for a mask without
    effect, MaskMismatchError as `add`.
    """
    check_models((a, b), allow_other_checkpoint=allow_other_checkpoint)
    if not at or min(at) < 1:
        raise InputError(f"top {list(at)} experts", where="similarity", expected="1 or more", do="give numbers from 1")
    effects = [effect_LE(mask) for mask in (a, b)]
    for mask, effect in zip((a, b), effects, strict=True):
        if not effect.any():
            raise NoEffectError(
                "a mask has no effect: it has no direction to compare",
                where=name_of(mask),
                expected="entries, an alpha and a sigma that are not 0",
                do="compare other masks",
            )
    one, two = (effect.ravel() / np.abs(effect).max() for effect in effects)  # no overflow in the norms
    cosine = float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))
    overlaps = []
    for count in at:
        tops = [_largest(values, count) for values in (one, two)]
        places = [{place for place, _ in top} for top in tops]
        overlaps.append({"n": count, "signed": _jaccard(*tops), "unsigned": _jaccard(*places)})
    return {"a": a.sha256, "b": b.sha256, "cosine": max(-1.0, min(1.0, cosine)), "jaccard": overlaps}


def _gate_digest(mask: SteeringMask) -> str | None:
    return None if mask.gate_LE is None else files.sha256(mask.gate_LE.tobytes())[:12]


def _largest(values: F64, count: int) -> set[tuple[int, bool]]:
    """(flat place, whether it is raised) of the `count` largest entries."""
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    return {(int(i), bool(values[i] > 0)) for i in order if values[i]}


def _jaccard(one: set[Any], two: set[Any]) -> float:
    return len(one & two) / len(one | two)

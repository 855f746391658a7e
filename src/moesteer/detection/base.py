"""What every detection method gives back, and what it is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer.errors import InputError, NoEffectError, TraceLabelError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.trace import TraceReader, TraceRow

Layers = Sequence[int] | AbstractSet[int] | NDArray[np.integer[Any]]
"""What names decoder layers; `checked_layers` says what of it is taken."""


@dataclass(frozen=True, eq=False)
class Detection:
    """A mask, the score of every expert it was made from [L, E] (method's own unit), and facts for the report."""

    mask: SteeringMask
    scores_LE: NDArray[np.float32]
    facts: dict[str, Any]


def additive_mask(
    trace: TraceReader,
    strength_LE: NDArray[np.float32],
    sigma_L: NDArray[np.float32],
    *,
    method: str,
    toward: str,
    settings: dict[str, Any],
) -> SteeringMask:
    """A mask of strengths in sigma units, made from a trace. Raises NoEffectError when every strength is zero."""
    info = MaskInfo(
        fingerprint=trace.fingerprint, method=method, settings=settings, intent=Intent(toward=toward),
        data_sha256=trace.manifest.plan_sha256,
    )  # fmt: skip
    mask = SteeringMask(info, strength_LE=strength_LE.astype(np.float32), sigma_L=sigma_L.astype(np.float32))
    return _non_empty(mask)


def forced_mask(
    trace: TraceReader, force_LE: NDArray[np.int8], *, method: str, toward: str, settings: dict[str, Any]
) -> SteeringMask:
    """A mask of experts on (1) and off (-1), made from a trace. Raises NoEffectError when it has none."""
    info = MaskInfo(
        fingerprint=trace.fingerprint, method=method, settings=settings, intent=Intent(toward=toward),
        data_sha256=trace.manifest.plan_sha256,
    )  # fmt: skip
    return _non_empty(SteeringMask(info, force_LE=force_LE.astype(np.int8)))


def _non_empty(mask: SteeringMask) -> SteeringMask:
    if mask.expert_count == 0:
        raise NoEffectError(
            f"{mask.info.method} found no expert that tells the two sides apart",
            where=f"settings {mask.info.settings}",
            expected="at least one expert with a difference",
            do="check that the two sides of the data differ, give it more of it, or loosen the settings",
        )
    return mask


def rows_of_layers(fingerprint: Fingerprint, layers: Layers | None) -> NDArray[np.bool_]:
    """[L] which rows of a mask belong to these decoder layers (None: all). Raises InputError for other ids."""
    known = fingerprint.layer_ids
    named = checked_layers(fingerprint, layers)
    return np.ones(len(known), dtype=bool) if named is None else np.isin(known, named)


def checked_layers(fingerprint: Fingerprint, layers: Layers | None) -> list[int] | None:
    """The decoder layers as a mask's settings hold them: ints in order, each once (None: all). Raises InputError.

    A list, tuple, range, set or one-dimensional array of whole numbers is taken.
    """
    if layers is None:
        return None
    known = ", ".join(map(str, fingerprint.layer_ids))
    listed = isinstance(layers, list | tuple | range | set | frozenset)
    if isinstance(layers, np.ndarray):
        listed = layers.ndim == 1
    given = list(layers) if listed else []
    if not listed or not all(isinstance(one, Integral) and not isinstance(one, bool) for one in given):
        raise InputError(
            "the setting layers is no list of whole numbers",
            where=f"the setting layers: {layers!r}",
            expected=f"a list of decoder layers with a router: {known}",
            do="write it as a list, for example layers=[3], or leave it out",
        )
    named = sorted({int(one) for one in given})
    unknown = [one for one in named if one not in fingerprint.layer_ids]
    if unknown or not named:
        raise InputError(
            f"no layers {', '.join(map(str, unknown))}" if unknown else "no layer is left to steer",
            where=f"the setting layers: {layers!r}",
            expected=f"decoder layers with a router: {known}",
            do="correct the setting, or leave it out",
        )
    return named


def two_sides(rows: Iterable[TraceRow], *, toward: str, where: str) -> tuple[set[str], set[str]]:
    """Ids of the sequences labelled `toward`, and of those with any other label.

    Raises TraceLabelError unless both sides have some.
    """
    labels: dict[str | None, int] = {}
    wanted: set[str] = set()
    other: set[str] = set()
    for row in rows:
        labels[row.label] = labels.get(row.label, 0) + 1
        if row.label is not None:
            (wanted if row.label == toward else other).add(row.id)
    if not wanted or not other:
        raise TraceLabelError(
            f"one side of the contrast is empty (labels found: {labels})",
            where=where,
            expected=f"sequences labelled {toward!r}, and sequences with another label",
            do=f"label the conversations before capture, or set --toward to one of {sorted(map(str, labels))}",
        )
    return wanted, other


def require_both(labels: Iterable[int], sides: tuple[int, int], *, toward: str, span: str, where: str) -> None:
    """Raise TraceLabelError unless both sides have a sequence with a token in the span (labels: of such sequences)."""
    counts = Counter(labels)
    if not all(counts[side] for side in sides):
        raise TraceLabelError(
            f"one side of the contrast has no token in the span {span!r}",
            where=f"{where}: {counts[sides[1]]} sequences labelled {toward!r}, {counts[sides[0]]} others",
            expected="sequences with tokens in that span on both sides",
            do="use another span, or capture conversations that have it",
        )


def require_span(trace: TraceReader, name: str) -> None:
    """Raise TraceLabelError unless the trace kept the span."""
    if name not in trace.manifest.spans:
        raise TraceLabelError(
            f"the trace lacks the span {name!r} (it has {', '.join(trace.manifest.spans)})",
            where=str(trace.folder),
            expected=f"a capture with --span {name}",
            do="capture the same conversations again with that span",
        )


def require_unsteered(trace: TraceReader) -> None:
    """Raise TraceLabelError for a trace of a steered model: experts are to be found on the model as it is."""
    if trace.manifest.mask_sha256:
        raise TraceLabelError(
            f"the trace is of a steered model (mask {', '.join(trace.manifest.mask_sha256)})",
            where=str(trace.folder),
            expected="a trace of the model without a mask",
            do="capture the same conversations without steering",
        )


def require_logits(trace: TraceReader) -> None:
    """Raise TraceLabelError for a trace of selections only."""
    if trace.manifest.level != "logits":
        raise TraceLabelError(
            "the trace holds selections only, and the method needs logits",
            where=str(trace.folder),
            expected="a capture with --level logits",
            do="capture the same conversations again with that level",
        )

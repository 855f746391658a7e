"""What a harness's model arguments ask to be steered: masks, pinned masks, their strengths; and what that is called.

A harness keeps logs and caches by a model's name and address. Both must tell one mask from another, so both are made
here: `label` for people, `identity` for caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesteer import files
from moesteer.errors import InputError, MaskContentError, NoEffectError
from moesteer.mask import SteeringMask
from moesteer.models.steering import Receipt
from moesteer.version import __version__

SEPARATOR = ";"
"""Between several masks, or several strengths, in one argument: harnesses split their arguments at commas."""
LABEL = r"(?:\+[0-9a-f]{12}@[-+.e0-9]+)+$"
"""The end of a steered model's name, as `Steering.label` writes it."""


@dataclass(frozen=True)
class Steering:
    """Masks that act together on every request, each with its strength; the first `pinned` of them are pinned."""

    masks: tuple[SteeringMask, ...] = ()
    alphas: tuple[float, ...] = ()
    pinned: int = 0

    @property
    def sha256(self) -> tuple[str, ...]:
        """Whole digests of the masks, the pinned ones first."""
        return tuple(mask.sha256 for mask in self.masks)

    @property
    def label(self) -> str:
        """`+1a2b3c4d5e6f@0.5` for each mask; nothing without one. What steered, as part of a model's name."""
        return "".join(f"+{sha[:12]}@{alpha:.12g}" for sha, alpha in zip(self.sha256, self.alphas, strict=True))

    def as_json(self) -> dict[str, Any]:
        """For a log: whole digests, strengths, and how many of them are pinned."""
        return {"mask_sha256": list(self.sha256), "alphas": list(self.alphas), "pinned": self.pinned}


def steering_of(*, mask: Any = None, alpha: Any = None, pin: Any = None, pin_alpha: Any = None, where: str) -> Steering:
    """The steering that a harness's arguments ask for; each is one value, several with `;` between them, or a list.

    mask, pin: files. alpha, pin_alpha: a strength for each (left out: the masks' own). A pinned mask is one that a
    server pins: its strength is never 0, and no other mask may touch one of its experts. where: named in errors.
    Raises InputError, MaskContentError, FileError, MaskFileError.
    """
    pins, pin_alphas = _read(pin, pin_alpha, names=("pin", "pin_alpha"), where=where)
    masks, alphas = _read(mask, alpha, names=("mask", "alpha"), where=where)
    if 0.0 in pin_alphas:
        raise InputError(
            "a pinned mask has strength 0", where=where, expected="a pinned mask that steers", do="raise pin_alpha"
        )
    _require_untouched(pins, masks, where=where)
    return Steering((*pins, *masks), (*pin_alphas, *alphas), len(pins))


def _read(
    paths: Any, alphas: Any, *, names: tuple[str, str], where: str
) -> tuple[tuple[SteeringMask, ...], tuple[float, ...]]:
    masks = tuple(SteeringMask.load(path) for path in _several(paths))
    given = [_strength(one, name=names[1], where=where) for one in _several(alphas)]
    if given and len(given) != len(masks):
        raise InputError(
            f"{len(given)} values of {names[1]} for {len(masks)} of {names[0]}",
            where=where,
            expected=f"one {names[1]} for each {names[0]}, in the same order, or none",
            do=f"write several as {names[1]}=0.5{SEPARATOR}1, or leave it out for the masks' own strengths",
        )
    return masks, tuple(given) or tuple(mask.info.alpha for mask in masks)


def _several(value: Any) -> Iterator[Any]:
    if value is None:
        return
    for one in value if isinstance(value, list | tuple) else [value]:
        yield from (part.strip() for part in one.split(SEPARATOR)) if isinstance(one, str) else [one]


def _strength(value: Any, *, name: str, where: str) -> float:
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(
            f"a strength cannot be {value!r}"[:120],
            where=f"{where}: {name}",
            expected="a finite number",
            do="correct it",
        )
    return found


def _require_untouched(pins: Sequence[SteeringMask], masks: Sequence[SteeringMask], *, where: str) -> None:
    """Raise MaskContentError where a mask touches an expert of a pinned one. Shapes are the model's to check."""
    for pin in pins:
        for mask in masks:
            if pin.values_LE.shape != mask.values_LE.shape:
                continue  # refused with both shapes by the model that one of them was not made for
            shared = (pin.values_LE != 0) & (mask.values_LE != 0)
            if shared.any():
                layer, expert = (int(i) for i in np.argwhere(shared)[0])
                more = int(shared.sum()) - 1
                raise MaskContentError(
                    f"mask {mask.sha256[:12]} touches experts of the pinned mask {pin.sha256[:12]}",
                    where=f"{where}: layer {pin.layer_ids[layer]}, expert {expert}"
                    + (f", and {more} more" * bool(more)),
                    expected="a mask of other experts beside a pinned one, which wins wherever both act",
                    do="leave one of them out, or make one mask of them: `moesteer mask compose`",
                )


def identity(steering: Steering, *, weights: str, settings: Mapping[str, Any]) -> str:
    """A digest of all that decides a greedy answer: what cached answers must be kept apart by.

    weights: the model's weights_sketch. settings: backend, dtype, quantisation, engine options. This version is in it
    too: another may compute the same steering in another order.
    """
    everything = {**steering.as_json(), "weights": weights, "settings": dict(settings), "version": __version__}
    return files.sha256(files.dumps(everything, indent=None).encode("utf-8"))[:32]


class Tally:
    """What steering did in all blocks so far: the counts of their receipts, added up."""

    def __init__(self) -> None:
        self.counts: dict[str, Any] = {}

    def add(self, receipt: Receipt, *, where: str) -> dict[str, Any]:
        """Add a block's receipt, and give its counts. where: named in errors.

        Raises NoEffectError where a block asked no router, or where masks that were to act (alpha not 0, gate not
        shut) have changed no selection in any block so far.
        """
        counts = {k: v for k, v in asdict(receipt).items() if k not in ("masks", "alphas")}
        for name, value in counts.items():
            before = self.counts.get(name, 0)
            self.counts[name] = value if name == "routers" else before or value if name == "acted" else before + value
        if not receipt.positions:
            raise NoEffectError(
                "the model answered without asking its routers",
                where=where,
                expected="a forward pass that calls the routers",
                do="undo torch.compile, or compile again inside the block",
            )
        if self.counts["acted"] and not self.counts["changed"]:
            strengths = ", ".join(f"{alpha:g}" for alpha in receipt.alphas)
            raise NoEffectError(
                f"the masks changed none of {self.counts['checked']} selections at alpha {strengths}",
                where=f"{where}: every request so far",
                expected="some selections to change",
                do="raise alpha, or check the mask with `moesteer mask check --model`",
            )
        return counts

    def gates(self, *, asked: int, fired: int) -> None:
        """Add decisions of gates that were asked outside a block."""
        self.counts["gated"] = self.counts.get("gated", 0) + asked
        self.counts["fired"] = self.counts.get("fired", 0) + fired

"""Who may be steered by what: the masks of one engine, and every combination of them a token can meet.

A **member** is a mask at a strength: pinned, or one that requests may name. A **row** is a set of members that act
together on a token: all pinned ones, and at most one named; without those whose gate stayed shut. Every process works
out the same rows from the same files. Numpy only. Axes: R rows, L layers with a router, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesteer import files, gate
from moesteer.backends.vllm.settings import MaskSource, Settings
from moesteer.errors import InputError, MaskContentError, MaskMismatchError, NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.gate import Part
from moesteer.mask import SteeringMask
from moesteer.routing import Scoring, check_force

RAW = "!raw"
"""Name of row 0, the model as it is. No mask id begins with an exclamation mark."""
MAX_ROWS = 512


@dataclass(frozen=True)
class Member:
    """A mask at a strength. name: a request's id for it, or `!1`, `!2`, ... of the pinned ones."""

    name: str
    mask: SteeringMask
    alpha: float
    pinned: bool

    @property
    def label(self) -> str:
        """First 12 digits of the mask's sha256, which `moesteer mask show` prints too."""
        return self.mask.sha256[:12]

    @property
    def entries_LE(self) -> NDArray[np.bool_]:
        """Which experts it touches."""
        return np.asarray(self.mask.values_LE != 0)


@dataclass(frozen=True)
class Row:
    """Members that act together. digest: of what they do to the logits, which is what caches are keyed by."""

    index: int
    name: str
    members: tuple[Member, ...]
    digest: str


class Catalogue:
    """The members and rows of one engine.

    refused: ids that cannot be used beside the pinned masks, with the reason. fingerprint: of the masks, None without.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        _require_one_shape(members)
        for member in members:
            member.mask.require_entries()
            if member.alpha == 0:
                raise NoEffectError(
                    "a mask at strength 0 would steer nothing",
                    where=f"mask {member.label} ({member.name})",
                    expected="another strength; the model as it is is what a request without a mask id gets",
                    do="give another --alpha, or leave the mask out",
                )
        self.members = tuple(members)
        self.pins = tuple(member for member in members if member.pinned)
        self.fingerprint: Fingerprint | None = members[0].mask.info.fingerprint if members else None
        _require_agreement(self.pins, where="the pinned masks")
        self.refused: dict[str, str] = {}
        for member in members:
            if not member.pinned and (reason := _clash(self.pins, member)):
                self.refused[member.name] = reason
        self.named = {m.name: m for m in members if not m.pinned and m.name not in self.refused}
        self.rows = tuple(self._make_rows())
        self.by_name = {row.name: row for row in self.rows}

    @classmethod
    def load(cls, settings: Settings) -> Catalogue:
        """Read every mask file of the settings. Raises MaskError, InputError."""
        pins = [_read(source, name=f"!{number}", pinned=True) for number, source in enumerate(settings.pins, 1)]
        return cls([*pins, *(_read(source, name=name, pinned=False) for name, source in settings.masks.items())])

    @property
    def sha256(self) -> str:
        """Digest of all rows: two processes with the same one steer alike."""
        return files.sha256("\n".join(f"{row.name} {row.digest}" for row in self.rows).encode())

    @property
    def default(self) -> Row:
        """The row of a request that names no mask, every gate taken for open."""
        return self.by_name[_name(self.pins)]

    @property
    def gated(self) -> tuple[Member, ...]:
        """Members behind a gate, in order."""
        return tuple(member for member in self.members if member.mask.gated)

    def gate_parts(self) -> list[tuple[Member, Part, NDArray[np.float32]]]:
        """(member, part of its pool, weights [L, E]) of every gate, in order: the columns of what workers sum up."""
        found = []
        for member in self.gated:
            info, gate_LE = member.mask.info.gate, member.mask.gate_LE
            assert info is not None and gate_LE is not None
            parts = gate.parts(info.pool)
            found += [(member, part, w_LE) for part, w_LE in zip(parts, np.split(gate_LE, len(parts)), strict=True)]
        return found

    def acting(self, requested: str | None) -> tuple[Member, ...]:
        """The members a request is to be steered by, gates not asked yet. Raises InputError for an id not to be had."""
        if requested is None:
            return self.pins
        if requested not in self.named:
            refused = self.refused.get(requested)
            raise InputError(
                "the mask cannot be used beside the pinned one" if refused else "there is no such mask",
                where=f"mask id {requested[:80]!r}" + (f": {refused}" if refused else ""),
                expected=", ".join(self.named) or "no mask id: this engine offers none",
                do="name one of these, or none",
            )
        return (*self.pins, self.named[requested])

    def row(self, members: Sequence[Member]) -> Row:
        """The row of these members, as `acting` gives them, less those whose gate stayed shut."""
        return self.by_name[_name(members)]

    def tables(self) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """(bias [R, L, E] in logits, force [R, L, E]: 1 on, -1 off, 0 free). Row 0 is all zeros."""
        assert self.fingerprint is not None
        shape = (len(self.rows), len(self.fingerprint.layer_ids), self.fingerprint.experts)
        bias, force = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int8)
        for row in self.rows:
            bias[row.index], force[row.index] = _added(row.members, shape[1:])
        return bias, force

    def _make_rows(self) -> Iterator[Row]:
        shape = self.members[0].mask.values_LE.shape if self.members else (0, 0)
        wanted: dict[str, tuple[Member, ...]] = {RAW: ()}
        for base in (self.pins, *((*self.pins, member) for member in self.named.values())):
            gates = [member for member in base if member.mask.gated]
            for opened in product((True, False), repeat=len(gates)):
                shut = {member.name for member, is_open in zip(gates, opened, strict=True) if not is_open}
                left = tuple(member for member in base if member.name not in shut)
                wanted.setdefault(_name(left), left)
        if len(wanted) > MAX_ROWS:
            raise InputError(
                f"{len(wanted)} combinations of masks",
                where=f"{len(self.pins)} pinned masks and {len(self.named)} to choose from",
                expected=f"at most {MAX_ROWS}: every gate doubles them",
                do="offer fewer masks, or compose pinned ones into one (`moesteer mask compose`)",
            )
        for index, (name, members) in enumerate(wanted.items()):
            bias, force = _added(members, shape)
            acts = bool(bias.any() or force.any())
            yield Row(index, name, members, files.sha256(bias.tobytes() + force.tobytes())[:32] if acts else "none")


def _name(members: Sequence[Member]) -> str:
    return "+".join(member.name for member in members) or RAW


def _added(members: Sequence[Member], shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    bias, force = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int32)
    for member in members:
        bias += member.mask.bias_LE(member.alpha)
        if member.mask.force_LE is not None:
            force += member.mask.force_LE
    return bias, np.sign(force).astype(np.int8)


def _read(source: MaskSource, *, name: str, pinned: bool) -> Member:
    mask = SteeringMask.load(Path(source.file))
    if mask.sha256 != source.sha256:
        raise MaskMismatchError(
            "the mask file is not the one the settings were written for",
            where=f"{source.file}: sha256 {mask.sha256[:12]}, expected {source.sha256[:12]}",
            expected="the same bytes in every process and on every node, for as long as the engine runs",
            do="start again with the file as it is now, if it was meant to change",
        )
    return Member(name, mask, mask.info.alpha if source.alpha is None else source.alpha, pinned)


def _require_one_shape(members: Sequence[Member]) -> None:
    for member in members[1:]:
        mine, first = member.mask.info.fingerprint, members[0].mask.info.fingerprint
        differences = mine.shape_differences(first)
        if not differences and mine.router_sha256 != first.router_sha256:
            differences = ["the router weights they were made on differ"]
        if differences:
            raise MaskMismatchError(
                "the masks were made for different models",
                where=f"{members[0].name} ({members[0].label}) and {member.name} ({member.label}): "
                + "; ".join(differences)[:300],
                expected="masks of one model in one engine",
                do="leave out the masks of other models",
            )


def _require_agreement(members: Sequence[Member], *, where: str) -> None:
    forces = [member.mask.force_LE for member in members if member.mask.force_LE is not None]
    if len(forces) < 2:
        return
    stacked = np.stack(forces)
    if ((stacked > 0).any(0) & (stacked < 0).any(0)).any():
        raise MaskContentError(
            "masks that act together switch the same expert on and off",
            where=where,
            expected="forces that agree wherever two masks name the same expert",
            do="make one mask of them with a rule: `moesteer mask compose --op union --conflict first`",
        )
    top_k = members[0].mask.info.fingerprint.top_k
    check_force(np.sign(stacked.sum(0)).astype(np.int8), scoring=Scoring("softmax-topk", top_k))


def _clash(pins: Sequence[Member], member: Member) -> str:
    """Why a mask may not be named beside the pinned ones; empty where it may."""
    for pin in pins:
        shared = pin.entries_LE & member.entries_LE
        if shared.any():
            layer, expert = (int(i) for i in np.argwhere(shared)[0])
            more = int(shared.sum()) - 1
            return (
                f"it touches experts of the pinned mask {pin.label} (layer {pin.mask.layer_ids[layer]}, expert {expert}"
                + (f", and {more} more)" if more else ")")
            )
    try:
        _require_agreement((*pins, member), where=member.name)
    except MaskContentError as error:
        return error.what
    return ""

"""SteeringMask: what to add to which expert of which layer, or to force on or off, and where that came from.

One safetensors file (docs/mask-format.md): either `strength` [L, E] float32 in units of sigma with `sigma` [L]
float32, or `force` [L, E] int8; a gated mask has `gate` [L, E] float32 too; and one JSON metadata entry,
"moesteer", with a sha256 over all of it. Numpy only: reading a mask needs no torch and no model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from moesteer import files
from moesteer.errors import MaskContentError, MaskFileError, MaskMismatchError, NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.gate import GateInfo, parts
from moesteer.routing import Scoring, check_force

if TYPE_CHECKING:
    from moesteer.backends.hf import Model
    from moesteer.models.steering import Receipt

FORMAT_VERSION = 2
"""The newest format. A mask without a gate is format 1, so that older readers take it; a gated one is format 2."""
METADATA_KEY = "moesteer"
MAX_STRENGTH = 1e4
"""Largest |strength| in units of sigma that is taken for an intention and not an accident."""


class Intent(BaseModel):
    """What a mask is for. toward: the behaviour it should bring about ("refuse", "comply", ...)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    toward: str
    scenario: str | None = None


class MaskInfo(BaseModel):
    """A mask's provenance: the JSON metadata of its file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1, 2] = 1
    fingerprint: Fingerprint
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    intent: Intent
    alpha: float = 1.0
    data_sha256: str | None = None
    accepted_on: dict[str, Any] | None = None
    creator: str = "moesteer"
    gate: GateInfo | None = None

    @model_validator(mode="after")
    def _gate_is_format_2(self) -> MaskInfo:
        if (self.format_version == 2) != (self.gate is not None):
            raise ValueError("format 2 is that of gated masks, format 1 that of all others")
        return self

    def as_json(self) -> dict[str, Any]:
        """What the file holds: format 1 has no key for a gate."""
        return self.model_dump(mode="json", exclude={"gate"} if self.gate is None else None)


@dataclass(frozen=True, eq=False)
class SteeringMask:
    """Frozen. strength_LE float32 with sigma_L float32, or force_LE int8 (1 on, -1 off, 0 free); never both.

    gate_LE float32 with `info.gate`: the mask applies only to requests on which the gate fires (gate.py; a pool of
    two parts has two tables, one above the other).
    Rows follow `info.fingerprint.layer_ids`. Raises MaskContentError on numbers that cannot be applied.
    """

    info: MaskInfo
    strength_LE: NDArray[np.float32] | None = None
    sigma_L: NDArray[np.float32] | None = None
    force_LE: NDArray[np.int8] | None = None
    gate_LE: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        _check_content(self)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Decoder layer ids, one per row."""
        return self.info.fingerprint.layer_ids

    @property
    def forced(self) -> bool:
        """Whether the mask forces experts rather than adding to their logits."""
        return self.force_LE is not None

    @property
    def gated(self) -> bool:
        """Whether the mask applies only where its gate fires."""
        return self.gate_LE is not None

    def with_gate(self, gate_LE: NDArray[np.float32] | None, gate: GateInfo | None) -> SteeringMask:
        """The same mask behind a gate, or (None, None) without one."""
        info = self.info.model_copy(update={"gate": gate, "format_version": 1 if gate is None else 2})
        return replace(self, info=MaskInfo.model_validate(info.model_dump()), gate_LE=gate_LE)

    @property
    def values_LE(self) -> NDArray[Any]:
        """The strength or the force table, whichever the mask has."""
        table = self.force_LE if self.force_LE is not None else self.strength_LE
        assert table is not None
        return table

    @property
    def expert_count(self) -> int:
        """Number of (layer, expert) entries that are not zero."""
        return int(np.count_nonzero(self.values_LE))

    @property
    def sha256(self) -> str:
        """Digest of the content: tensors and metadata."""
        return _content_sha256(self._tensors(), self.info)

    def bias_LE(self, alpha: float | None = None) -> NDArray[np.float32]:
        """What is added to the logits at strength alpha (default: the mask's own): alpha sigma_L strength_LE."""
        scale = self.info.alpha if alpha is None else alpha
        if self.strength_LE is None or self.sigma_L is None:
            return np.zeros(self.values_LE.shape, dtype=np.float32)
        return (np.float32(scale) * self.sigma_L[:, None] * self.strength_LE).astype(np.float32)

    def top(self, count: int) -> SteeringMask:
        """The `count` entries largest in size; the others zero. Ties go to the lower layer and expert."""
        table = self.values_LE
        order = np.argsort(-np.abs(table).ravel(), kind="stable")[:count]
        kept = np.zeros(table.size, dtype=table.dtype)
        kept[order] = table.ravel()[order]
        kept = kept.reshape(table.shape)
        return replace(self, force_LE=kept) if self.forced else replace(self, strength_LE=kept)

    def with_info(self, **changes: Any) -> SteeringMask:
        """The same numbers with other provenance fields (validated again)."""
        return replace(self, info=MaskInfo.model_validate({**self.info.model_dump(), **changes}))

    def check_model(self, fingerprint: Fingerprint, *, allow_other_checkpoint: bool = False) -> None:
        """Raise MaskMismatchError unless the mask was made for this model.

        allow_other_checkpoint: accept other router weights of the same shape (a fine-tune, a quantisation).
        """
        mine = self.info.fingerprint
        differences = mine.shape_differences(fingerprint)
        if differences:
            raise MaskMismatchError(
                "the mask was made for a model of another shape",
                where="; ".join(differences),
                expected=f"a {mine.model_type} with {len(mine.layer_ids)} routed layers of {mine.experts} experts",
                do="use the model the mask was made for, or detect a new mask on this one",
            )
        if mine.router_sha256 != fingerprint.router_sha256 and not allow_other_checkpoint:
            raise MaskMismatchError(
                "the mask was made for another checkpoint: the router weights differ",
                where=f"mask {mine.router_sha256[:12]}, model {fingerprint.router_sha256[:12]}",
                expected="the checkpoint the mask was made on, in a dtype that does not round it",
                do="use that checkpoint (and leave --dtype as it was then), or insist with --allow-other-checkpoint "
                "and evaluate again",
            )

    @contextmanager
    def apply(
        self, model: Model, *, alpha: float | None = None, allow_other_checkpoint: bool = False
    ) -> Iterator[Receipt]:
        """Steer `model` inside the block; on exit it is itself again, bit for bit.

        alpha: strength (default: the mask's own). Yields a Receipt that counts as it goes. Raises
        MaskMismatchError for another model, NoEffectError for a mask without entries, AlreadySteeredError.
        """
        with model.steered([self], alphas=[alpha], allow_other_checkpoint=allow_other_checkpoint) as receipt:
            yield receipt

    def require_entries(self) -> None:
        """Raise NoEffectError for a mask that steers nothing."""
        if self.expert_count == 0:
            raise NoEffectError(
                "the mask has no entries: it would steer nothing",
                where=f"a {self.info.method} mask of {self.values_LE.shape[0]} x {self.values_LE.shape[1]}",
                expected="at least one expert with a strength or a force",
                do="check the data and settings it was detected with (`moesteer mask show` lists them)",
            )

    def _tensors(self) -> dict[str, NDArray[Any]]:
        given = {"force": self.force_LE, "gate": self.gate_LE, "sigma": self.sigma_L, "strength": self.strength_LE}
        return {name: table for name, table in given.items() if table is not None}

    def to_bytes(self) -> bytes:
        """The file's bytes; the same mask gives the same bytes."""
        header = {**self.info.as_json(), "sha256": self.sha256}
        contiguous = {name: np.ascontiguousarray(value) for name, value in self._tensors().items()}
        return save_tensors(contiguous, metadata={METADATA_KEY: files.dumps(header, indent=None)})

    def save(self, path: Path | str) -> None:
        """Write the mask whole (atomically)."""
        files.write_bytes(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> SteeringMask:
        """Read and check a mask file. Raises FileError, MaskFileError, MaskContentError."""
        return cls.from_bytes(files.read_bytes(Path(path), kind="mask"), where=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> SteeringMask:
        """Parse and check a mask file's bytes: structure, metadata, sha256, numbers."""
        try:
            return cls._parse(data, where=where)
        except (ValueError, RecursionError) as error:  # text or numbers that canonical JSON cannot hold
            raise _bad_file(f"its metadata cannot be hashed ({error})", where=where) from error

    @classmethod
    def _parse(cls, data: bytes, *, where: str) -> SteeringMask:
        header = _metadata(data, where=where)
        try:
            tensors = load_tensors(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _bad_file(f"its tensors cannot be read ({error})", where=where) from error
        stated = header.pop("sha256", None)
        try:
            info = MaskInfo.model_validate(header)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise _bad_file(f"its metadata is wrong at {place}: {first['msg']}", where=where) from error
        if other := header.keys() ^ info.as_json().keys():
            raise _bad_file(
                f"format {info.format_version} has, or has not, the keys {', '.join(sorted(other))}", where=where
            )
        shape = (len(info.fingerprint.layer_ids), info.fingerprint.experts)
        expected = {
            "force": (np.dtype(np.int8), shape),
            "strength": (np.dtype(np.float32), shape),
            "sigma": (np.dtype(np.float32), shape[:1]),
            "gate": (np.dtype(np.float32), _gate_shape(info, shape)),
        }
        gate = {"gate"} if info.gate is not None else set()
        if set(tensors) not in ({"force"} | gate, {"strength", "sigma"} | gate):
            raise _bad_file(f"it holds the tensors {sorted(tensors)}", where=where)
        for name, value in tensors.items():
            if (value.dtype, value.shape) != expected[name]:
                raise _bad_file(f"tensor {name} is {value.dtype} {value.shape}, not {expected[name]}", where=where)
        if stated != _content_sha256(tensors, info):
            raise _bad_file("its content does not match its sha256: it was changed or damaged", where=where)
        return cls(
            info, strength_LE=tensors.get("strength"), sigma_L=tensors.get("sigma"), force_LE=tensors.get("force"),
            gate_LE=tensors.get("gate"),
        )  # fmt: skip


def _bad_file(what: str, *, where: str) -> MaskFileError:
    return MaskFileError(
        f"not a whole steering mask: {what}",
        where=where,
        expected="a mask file as `moesteer detect` writes it (docs/mask-format.md)",
        do="fetch or detect the mask again",
    )


def _metadata(data: bytes, *, where: str) -> dict[str, Any]:
    """The mask's JSON metadata, parsed strictly: safetensors itself accepts repeated keys."""
    if len(data) < 8:
        raise _bad_file(f"it is {len(data)} bytes long", where=where)
    (length,) = struct.unpack("<Q", data[:8])
    if length > files.LIMITS_BYTES["mask-header"] or length > len(data) - 8:
        raise _bad_file(f"its header claims {length:,} bytes", where=where)
    try:
        outer = files.parse_json(data[8 : 8 + length].decode("utf-8"))
        text = outer["__metadata__"][METADATA_KEY]
        inner = files.parse_json(text)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise _bad_file(f"its header cannot be read ({type(error).__name__}: {error})", where=where) from error
    if not isinstance(inner, dict):
        raise _bad_file("its metadata is not an object", where=where)
    version = inner.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise MaskFileError(
            f"the mask was made by a newer version (format {version})",
            where=where,
            expected=f"format {FORMAT_VERSION} or older",
            do="upgrade moesteer",
        )
    return inner


def _content_sha256(tensors: dict[str, NDArray[Any]], info: MaskInfo) -> str:
    """sha256 over the metadata as canonical JSON, then name, dtype, shape and little-endian bytes per tensor."""
    parts = [files.dumps(info.as_json(), indent=None).encode("utf-8")]
    for name in sorted(tensors):
        value = tensors[name]
        parts.append(json.dumps([name, value.dtype.str.lstrip("|<"), list(value.shape)]).encode("utf-8"))
        parts.append(np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<")).tobytes())
    return files.sha256(b"\0".join(parts))


def _content_error(what: str, *, where: str, do: str) -> MaskContentError:
    return MaskContentError(
        what, where=where, expected="finite strengths of a sensible size, or a force of -1, 0 and 1", do=do
    )


def _check_content(mask: SteeringMask) -> None:
    fingerprint = mask.info.fingerprint
    shape = (len(fingerprint.layer_ids), fingerprint.experts)
    given = {
        name: (table.dtype, table.shape)
        for name, table in (("strength", mask.strength_LE), ("sigma", mask.sigma_L), ("force", mask.force_LE))
        if table is not None
    }
    additive = {"strength": (np.dtype("<f4"), shape), "sigma": (np.dtype("<f4"), shape[:1])}
    if given not in (additive, {"force": (np.dtype(np.int8), shape)}):
        raise _content_error(
            f"the mask's tables do not fit together: {given or 'there are none'}",
            where=f"a {mask.info.method} mask for {shape[0]} layers of {shape[1]} experts",
            do="give strength_LE [L, E] and sigma_L [L] as float32, or force_LE [L, E] as int8; never both",
        )
    _check_gate(mask, shape)
    if not np.isfinite(mask.info.alpha):
        raise _content_error("alpha is not a number", where="the mask's metadata", do="detect the mask again")
    if mask.force_LE is not None:
        if not np.isin(mask.force_LE, (-1, 0, 1)).all():
            raise _content_error("force holds other numbers than -1, 0 and 1", where="force", do="detect it again")
        check_force(mask.force_LE, scoring=Scoring("softmax-topk", fingerprint.top_k))
        return
    assert mask.strength_LE is not None and mask.sigma_L is not None
    for name, table in (("strength", mask.strength_LE), ("sigma", mask.sigma_L)):
        bad = np.argwhere(~np.isfinite(table) | (np.abs(table) > MAX_STRENGTH))
        if len(bad):
            place = tuple(int(i) for i in bad[0])
            raise _content_error(
                f"{name} holds {table[place]}",
                where=f"layer {fingerprint.layer_ids[place[0]]}" + (f", expert {place[1]}" if len(place) > 1 else ""),
                do="detect the mask again; NaN comes from NaN logits or a diverged fit",
            )
    if (mask.sigma_L < 0).any():
        raise _content_error("sigma is negative", where="sigma", do="detect the mask again")


def _gate_shape(info: MaskInfo, shape: tuple[int, int]) -> tuple[int, int]:
    """[L, E] for each part of the gate's pool, one above the other."""
    return (shape[0] * (1 if info.gate is None else len(parts(info.gate.pool))), shape[1])


def _check_gate(mask: SteeringMask, shape: tuple[int, int]) -> None:
    gate_LE = mask.gate_LE
    if (gate_LE is None) != (mask.info.gate is None):
        raise _content_error(
            "half a gate: its weights and its description do not come together",
            where=f"a {mask.info.method} mask",
            do="use mask.with_gate(gate_LE, info), or detect the gate again",
        )
    if gate_LE is None:
        return
    wanted = _gate_shape(mask.info, shape)
    if (gate_LE.dtype, gate_LE.shape) != (np.dtype("<f4"), wanted) or not np.isfinite(gate_LE).all():
        raise _content_error(
            f"the gate's weights are {gate_LE.dtype} {gate_LE.shape}, or not finite",
            where=f"a {mask.info.method} mask for {shape[0]} layers of {shape[1]} experts",
            do=f"give finite float32 {list(wanted)}, or detect the gate again",
        )

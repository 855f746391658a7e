"""Direction: what to add to the residual stream after which decoder layer, and where that came from.

One safetensors file: a tensor "vector" [H] float32 of norm 1, and one JSON metadata entry, "moesteer-direction": the
fields of DirectionInfo and "sha256", over the metadata as canonical JSON, a NUL and the vector's bytes. H is all the
numbers of one position: the hidden size, times the streams where a family has several. Numpy only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from moesteer import files
from moesteer.errors import MaskContentError, MaskFileError, MaskMismatchError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent

METADATA_KEY = "moesteer-direction"


class DirectionInfo(BaseModel):
    """A direction's provenance; names as in MaskInfo. scale: the distance between the two means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    fingerprint: Fingerprint
    method: str = "residual-direction"
    settings: dict[str, Any] = Field(default_factory=dict)
    intent: Intent
    layer_id: int = Field(ge=0)
    scale: float = Field(gt=0, allow_inf_nan=False)
    alpha: float = Field(default=1.0, allow_inf_nan=False)
    data_sha256: str | None = None
    accepted_on: dict[str, Any] | None = None
    creator: str = "moesteer"


@dataclass(frozen=True, eq=False)
class Direction:
    """Frozen. vector_H float32 of norm 1; at strength alpha, alpha * scale * vector_H is added after the layer.

    Alpha 1 is the way from the mean of the other side to the mean of the wanted one. Raises MaskContentError.
    """

    info: DirectionInfo
    vector_H: NDArray[np.float32]

    def __post_init__(self) -> None:
        vector = self.vector_H
        norm = float(np.linalg.norm(vector.astype(np.float64))) if vector.ndim == 1 and vector.size else 0.0
        if vector.dtype != np.dtype("<f4") or not abs(norm - 1.0) < 1e-3:
            raise MaskContentError(
                f"the vector is {vector.dtype} {vector.shape} of norm {norm:g}",
                where=f"a {self.info.method} direction of layer {self.info.layer_id}",
                expected="one float32 vector of norm 1",
                do="find the direction again",
            )

    @property
    def layer_id(self) -> int:
        """The decoder layer it is added after."""
        return self.info.layer_id

    @property
    def scale(self) -> float:
        """The distance between the two means, in units of the residual stream."""
        return self.info.scale

    @property
    def sha256(self) -> str:
        """Digest of the content: vector and metadata."""
        head = files.dumps(self.info.model_dump(mode="json"), indent=None).encode("utf-8")
        return files.sha256(head + b"\0" + np.ascontiguousarray(self.vector_H).astype("<f4").tobytes())

    def shift_H(self, alpha: float | None = None) -> NDArray[np.float32]:
        """What is added at strength alpha (default: its own)."""
        strength = self.info.alpha if alpha is None else alpha
        return (np.float32(strength * self.info.scale) * self.vector_H).astype(np.float32)

    def with_info(self, **changes: Any) -> Direction:
        """The same vector with other provenance fields (validated again)."""
        return replace(self, info=DirectionInfo.model_validate({**self.info.model_dump(), **changes}))

    def check_model(self, fingerprint: Fingerprint, *, allow_other_checkpoint: bool = False) -> None:
        """Raise MaskMismatchError unless the direction was found on this model (or, if allowed, one of its shape)."""
        mine = self.info.fingerprint
        differences = mine.shape_differences(fingerprint)
        if not differences and (allow_other_checkpoint or mine.router_sha256 == fingerprint.router_sha256):
            return
        raise MaskMismatchError(
            "the direction was found on another model",
            where="; ".join(differences)
            or f"router weights: direction {mine.router_sha256[:12]}, model {fingerprint.router_sha256[:12]}",
            expected="the checkpoint it was found on",
            do="use that checkpoint, or find a new direction on this one",
        )

    def to_bytes(self) -> bytes:
        """The file's bytes; the same direction gives the same bytes."""
        header = {**self.info.model_dump(mode="json"), "sha256": self.sha256}
        vector = np.ascontiguousarray(self.vector_H)
        return save_tensors({"vector": vector}, metadata={METADATA_KEY: files.dumps(header, indent=None)})

    def save(self, path: Path | str) -> None:
        """Write the direction whole (atomically)."""
        files.write_bytes(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> Direction:
        """Read and check a direction's file. Raises FileError, MaskFileError, MaskContentError."""
        return cls.from_bytes(files.read_bytes(Path(path), kind="direction"), where=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Direction:
        """Parse and check a file's bytes: structure, metadata, sha256, numbers."""
        try:
            (length,) = struct.unpack("<Q", data[:8])
            if length > min(files.LIMITS_BYTES["mask-header"], len(data) - 8):
                raise ValueError(f"the header claims {length:,} bytes")
            outer = files.parse_json(data[8 : 8 + length])
            header = files.parse_json(outer["__metadata__"][METADATA_KEY])
            tensors = load_tensors(data)
            stated = header.pop("sha256", None)
            info = DirectionInfo.model_validate(header)
            if set(tensors) != {"vector"}:
                raise ValueError(f"it holds the tensors {sorted(tensors)}")
            found = cls(info, tensors["vector"])
            if stated != found.sha256:
                raise ValueError("its content does not match its sha256")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            struct.error,
            SafetensorError,
        ) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            reason = (
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else f"{type(error).__name__} {error}"
            )
            raise MaskFileError(
                f"not a whole direction: {reason}"[:400],
                where=where,
                expected="a file as Direction.save writes it",
                do="fetch it or find it again",
            ) from error
        return found

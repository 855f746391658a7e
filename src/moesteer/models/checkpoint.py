"""A checkpoint on disk: finding a loaded tensor in its files, and copying it whole with a few tensors changed.

File level on purpose. A changed tensor keeps its name, dtype and shape, so it is written over its own bytes in a copy
of its file: quantised experts, shard layout, metadata, tokenizer and config stay as they are, byte for byte.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesteer import files
from moesteer.errors import ModelError, UnsafeModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100_000_000
"""The longest header of a safetensors file, as the format has it."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of tensors that can be found and changed; all others are only carried along."""
CARRIED = re.compile(
    r"(?!pytorch_model\.)[^.].*\.(json|jinja|txt|model|tiktoken|md)|(LICENSE|NOTICE|USE_POLICY)[\w.-]*"
)
"""Names of files that come along beside the weights. Not code, pickles, other weights, hidden files or folders."""
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: `start` is its first byte, counted from the file's."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    def read(self) -> Tensor:
        """Its values, in its own dtype, on the CPU."""
        with open(self.file, "rb") as handle:
            handle.seek(self.start)
            data = bytearray(handle.read(self.size_bytes))
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Place:
    """Where a loaded tensor lies: all of `stored`, or rows [first, first + rows) of it as a matrix."""

    stored: Stored
    first: int
    rows: int


@dataclass(frozen=True)
class Change:
    """New values of a stored tensor, of its own dtype and shape."""

    stored: Stored
    values: Tensor

    def data(self) -> bytes:
        """The values as they lie in a file."""
        data = self.values.contiguous().view(torch.uint8).numpy().tobytes()
        assert len(data) == self.stored.size_bytes
        return data


class Checkpoint:
    """The safetensors files that transformers loads from a folder, by what their headers say.

    Raises ModelError for files that are not whole, UnsafeModelError for an index that leads out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        placed = {} if (folder / SINGLE).is_file() else placed_in(folder)
        self.files = [folder / name for name in sorted(set(placed.values())) or [SINGLE]]
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for stored in _headers(file):
                if stored.name in self.tensors:
                    raise broken(file, f"{stored.name} is in {self.tensors[stored.name].file.name} too")
                self.tensors[stored.name] = stored
        if placed and placed != {name: tensor.file.name for name, tensor in self.tensors.items()}:
            raise broken(folder / INDEX, "the index and the files disagree on which tensors there are")

    def find(self, name: str, value: Tensor, *, layer_id: int, layer_pattern: str, unread: int = 0) -> Place:
        """Where the parameter or buffer `name` of the loaded model, with this value, lies in the files.

        Names on disk may differ from those in the model, and several tensors of a family may lie in one. So: of the
        tensors of the same decoder layer and shape whose values are equal, bit for bit in the loaded dtype, the one
        whose name ends most alike. unread: last values of a row that loading sets itself, not compared. Raises
        ModelError unless there is exactly one.
        """
        loaded = value.detach().cpu()
        best: dict[int, list[Place]] = {}
        for stored in self.tensors.values():
            layer = re.search(layer_pattern, stored.name)
            if layer is not None and int(layer.group(1)) == layer_id and stored.dtype in DTYPES:
                for place in _equal(stored, loaded, unread=unread):
                    best.setdefault(_common_ending(stored.name, name), []).append(place)
        found = best[max(best)] if best else []
        if len(found) == 1:
            return found[0]
        names = ", ".join(place.stored.name for place in found[:4])
        raise ModelError(
            f"{len(found) or 'no'} tensors on disk hold the values of {name}" + (f": {names}" if names else ""),
            where=f"{self.folder}, layer {layer_id}",
            expected=f"exactly one, in {', '.join(DTYPES)}, with the values the model was loaded with",
            do="give the folder the model was loaded from; a checkpoint whose routers are quantised cannot be baked",
        )


def placed_in(folder: Path) -> dict[str, str]:
    """The index of a sharded checkpoint: file names by tensor.

    Raises ModelError without a sound one, UnsafeModelError for names that are paths and for weights that are pickled.
    """
    if not (folder / INDEX).is_file():
        unsafe = any(next(folder.glob(f"*.{kind}"), None) for kind in ("bin", "pt", "pth"))
        raise (UnsafeModelError if unsafe else ModelError)(
            "the weights are pickled: reading them can run code" if unsafe else "the folder holds no weights",
            where=str(folder),
            expected=f"{SINGLE}, or {INDEX} and its files",
            do="use a revision with safetensors weights, or convert them where code may run",
        )
    index = files.read_json(folder / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise broken(folder / INDEX, "the index has no weight_map of tensors to files")
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UnsafeModelError(
                f"the index leads out of its folder, to {name!r}"[:200],
                where=str(folder / INDEX),
                expected="names of .safetensors files in its own folder",
                do="do not use this checkpoint",
            )
    return placed


def _headers(file: Path) -> Iterator[Stored]:
    """Every tensor of a safetensors file: 8 bytes of length, a JSON header, the data."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for ever
            raise broken(file, "the file is missing")
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= min(HEADER_BYTES, size - 8):
                raise broken(file, f"its header cannot be read: it claims {length:,} bytes")
            data = handle.read(length)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the name
        raise broken(file, "the file is missing") from error
    except OSError as error:
        raise broken(file, f"the file cannot be read: {error.strerror}") from error
    try:
        header: dict[str, Any] = files.parse_json(data)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (int(offset) for offset in entry["data_offsets"])
            dtype, shape = str(entry["dtype"]), tuple(int(side) for side in entry["shape"])
            whole = 0 <= begin <= end <= size - 8 - length
            if dtype in DTYPES:
                whole = whole and end - begin == math.prod(shape) * DTYPES[dtype].itemsize
            if not whole:
                raise ValueError(f"{name} does not lie within the file")
            yield Stored(name, file, dtype, shape, 8 + length + begin, end - begin)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise broken(file, f"its header cannot be read: {error}") from error


def _equal(stored: Stored, loaded: Tensor, *, unread: int) -> Iterator[Place]:
    """The places in a stored tensor that hold the loaded values: all of it, or one of its two rows."""
    width = loaded.shape[-1]
    rows = loaded.numel() // width
    if not stored.shape or stored.shape[-1] != width or len(stored.shape) > 2:
        return
    there = math.prod(stored.shape) // width
    if there != rows and (rows, there) != (1, 2):
        return
    read = slice(0, width - unread)
    values, wanted = stored.read().reshape(there, width)[:, read], loaded.reshape(rows, width)[:, read]
    for first in range(0, there, rows):
        if torch.equal(values[first : first + rows].to(loaded.dtype), wanted):
            yield Place(stored, first, rows)


def _common_ending(name: str, other: str) -> int:
    """How many dotted parts two names have in common, counted from the end."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(name.count("."), other.count(".")) + 1)


def is_own(folder: Path, path: Path) -> bool:
    """Whether a file lies in the checkpoint's folder, or is a link into the Hub cache that the folder is part of."""
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    return path.resolve().is_relative_to(root.resolve())


def copy_changed(checkpoint: Checkpoint, folder: Path, changes: Sequence[Change]) -> tuple[str, ...]:
    """Copy a checkpoint into `folder` with some tensors changed; names of files that were left out.

    Weights are the files that are loaded, nothing else that lies beside them. config.json comes last.
    """
    by_file: Mapping[Path, list[Change]] = {
        file: [change for change in changes if change.stored.file == file] for file in checkpoint.files
    }
    for file, changed in by_file.items():
        files.copy(file, folder / file.name, [(change.stored.start, change.data()) for change in changed])
    left_out = []
    for path in sorted(checkpoint.folder.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
        if path in by_file:
            continue
        if path.is_file() and CARRIED.fullmatch(path.name) and is_own(checkpoint.folder, path):
            files.copy(path, folder / path.name)
        elif path.name == TEMPLATES and path.is_dir():
            (folder / TEMPLATES).mkdir()
            for template in sorted(path.glob("*.jinja")):
                files.copy(template, folder / TEMPLATES / template.name)
        else:
            left_out.append(path.name)
    return tuple(left_out)


def broken(where: str | Path, what: str, *, expected: str = "") -> ModelError:
    """The error for a checkpoint that is not whole."""
    return ModelError(
        f"the checkpoint is not whole: {what}",
        where=str(where),
        expected=expected or "a whole checkpoint: config.json, a tokenizer and safetensors weights",
        do="fetch the model again, or use another checkpoint",
    )

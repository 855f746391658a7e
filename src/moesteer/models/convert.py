"""Checkpoints of remote-code classes, re-saved exactly as a class of transformers itself; none of their code runs.

A row of CONVERSIONS says what a `model_type` becomes and why nothing changes. What has no exact form is refused
before anything is written; tensors are read one by one and written in shards.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from moesteer import files
from moesteer.errors import FileError, InputError, ModelError, UnsafeModelError
from moesteer.models import deepseek_v1, phimoe
from moesteer.models.pieces import Piece
from moesteer.progress import Progress

SHARD_BYTES = 2_000_000_000
"""Tensors in one written file, in bytes; a conversion takes about as much memory."""
PARTIAL_SUFFIX = ".moesteer-partial"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CARRIED = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
    "LICENSE", "LICENSE-MODEL",
)  # fmt: skip
"""Files copied byte for byte. (A vocabulary may hold the word auto_map: nothing is taken out of one.)"""
CARRIED_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""Files copied without `auto_map`."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote, and where; `size_bytes` is that of the tensors."""

    source_type: str
    target_type: str
    tensors: int
    size_bytes: int
    folder: Path


class Stored(NamedTuple):
    """A tensor of the source: its file, dtype as safetensors names it, and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Conversion:
    """A row: model_type `source` is re-saved as `becomes`; `why` nothing changes.

    plan: (config.json, where it is) -> the new config.json, and every tensor to be written, made one by one; None
    for all as they are.
    """

    source: str
    becomes: str
    why: str
    plan: Callable[[dict[str, Any], str], tuple[dict[str, Any], Iterator[Piece] | None]]


ROWS = (
    Conversion(
        "deepseek", "qwen2_moe", plan=deepseek_v1.plan,
        why="a shared expert with twice its down_proj, behind a gate of zeros (sigmoid 1/2), is an ungated one exactly",
    ),
    Conversion(
        "phimoe", "phimoe", plan=phimoe.plan,
        why="only the architecture's name changes: transformers 5 re-saves it under one that vLLM does not know",
    ),
)  # fmt: skip
CONVERSIONS: Mapping[str, Conversion] = {row.source: row for row in ROWS}
"""What can be converted, by the source's model_type."""


def convert(
    source: str | Path, out: str | Path, *, shard_bytes: int = SHARD_BYTES, title: str | None = None
) -> Converted:
    """Re-save the checkpoint in folder `source` as a new folder `out`, by the row of its model_type (CONVERSIONS).

    The row's plan gives source and proof. No code of the checkpoint runs, nothing pickled is read, and about one
    shard of `shard_bytes` is in memory (a larger tensor is a shard of its own). Tokenizer and generation settings
    come along, without `auto_map`; Python files never do. `out` appears whole at the end: a killed conversion leaves
    a hidden folder beside it, which the next one deletes. title: shows a progress bar.

    Raises ModelError for a checkpoint without an exact form or that is not whole, UnsafeModelError for pickled
    weights or an index that leads out of the folder, DenseModelError, FileError, InputError for other arguments.
    """
    source, out = Path(os.path.abspath(source)), Path(os.path.abspath(out))
    most = files.LIMITS_BYTES["shard"]
    if not 1 <= shard_bytes <= most:
        raise InputError(
            f"shards of {shard_bytes} bytes", where="shard_bytes", expected=f"1 to {most:,}", do="leave it out"
        )
    where = str(source / "config.json")
    data = files.read_bytes(source / "config.json", kind="json")
    config = _parsed(data, where)
    found = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(found, str) or found not in CONVERSIONS:
        raise ModelError(
            f"no conversion for model_type {found!r}"[:200], where=where, expected=", ".join(CONVERSIONS),
            do="load the model as it is; if transformers has no class for it, add a row to models/convert.py",
        )  # fmt: skip
    row = CONVERSIONS[found]
    new, wanted = row.plan(config, where)
    stored = _stored(source)
    if wanted is None:
        wanted = (Piece(name, name, tensor.shape) for name, tensor in stored.items())
    pieces = _matched(wanted, stored, where=str(source))
    new["converted_from"] = {"model_type": row.source, "config_sha256": files.sha256(data)}
    with _appearing(out, source=source) as folder:
        size = _write_weights(folder, pieces, stored, shard_bytes=shard_bytes, title=title)
        _carry(source, folder)
        files.write_json(folder / "config.json", new)
    return Converted(row.source, row.becomes, tensors=len(pieces), size_bytes=size, folder=out)


def _parsed(data: bytes, where: str) -> Any:
    """JSON without its `auto_map`s."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(inner) for key, inner in value.items() if key != "auto_map"}
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    try:
        return cleaned(files.parse_json(data))
    except (ValueError, RecursionError) as error:
        what = f"not valid JSON: {error}"
        raise FileError(what, where=where, expected="one JSON value in UTF-8", do="fetch the file again") from error


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint by name, from the headers of its safetensors files."""
    placed, names = None, [SINGLE]
    if not (folder / SINGLE).is_file():
        placed = _index(folder)
        names = sorted(set(placed.values()))
    stored: dict[str, Stored] = {}
    for path in (folder / name for name in names):
        with _opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                part = shard.get_slice(name)
                if name in stored:
                    raise _broken(path, f"{name} is in {stored[name].file.name} too")
                if part.get_dtype() not in DTYPES:
                    raise _broken(path, f"{name} is of type {part.get_dtype()}", expected=", ".join(DTYPES))
                stored[name] = Stored(path, part.get_dtype(), tuple(part.get_shape()))
    if placed is not None and placed != {name: tensor.file.name for name, tensor in stored.items()}:
        raise _broken(folder / INDEX, "the index and the files disagree on which tensors there are")
    return stored


def _index(folder: Path) -> dict[str, str]:
    """The index: file names by tensor. Raises UnsafeModelError for pickled weights and names that are paths."""
    if not (folder / INDEX).is_file():
        pickled = any(next(folder.glob(f"*.{kind}"), None) for kind in ("bin", "pt", "pth"))
        raise (UnsafeModelError if pickled else ModelError)(
            "the weights are pickled: reading them can run code" if pickled else "the folder holds no weights",
            where=str(folder), expected=f"{SINGLE}, or {INDEX} and its files",
            do="use a revision with safetensors weights, or convert them where code may run",
        )  # fmt: skip
    index = files.read_json(folder / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise _broken(folder / INDEX, "the index has no weight_map of tensors to files")
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UnsafeModelError(
                f"the index leads to {name!r}"[:200], where=str(folder / INDEX), do="do not use this checkpoint",
                expected="names of .safetensors files in its own folder",
            )  # fmt: skip
    return placed


def _opened(path: Path) -> Any:
    """A safetensors file as a context, memory-mapped: a tensor is read when it is asked for."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise _broken(path, "the file is missing")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _broken(path, f"the file cannot be read: {error}") from error


def _matched(wanted: Iterator[Piece], stored: Mapping[str, Stored], *, where: str) -> list[Piece]:
    """The wanted pieces, if each has its source, of its shape, and no tensor is left over."""
    pieces = []
    for piece in wanted:
        found = stored.get(piece.like)
        if found is None:
            raise _broken(where, f"the tensor {piece.like} is missing")
        if piece.how != "zero" and found.shape != piece.shape:
            raise _broken(where, f"{piece.like} has shape {list(found.shape)}", expected=f"{list(piece.shape)}")
        pieces.append(piece)
    unused = sorted(set(stored) - {piece.like for piece in pieces})
    if unused:
        raise _broken(where, f"{len(unused)} unexpected tensors: {', '.join(unused[:3])}"[:400])
    return pieces


def _write_weights(
    folder: Path, pieces: Sequence[Piece], stored: Mapping[str, Stored], *, shard_bytes: int, title: str | None
) -> int:
    """Write the shards, and their index where there are several; the tensors' bytes."""
    groups: list[list[Piece]] = []
    total = room = 0
    for piece in pieces:
        size = math.prod(piece.shape) * DTYPES[stored[piece.like].dtype].itemsize
        if size > room or not groups:
            groups.append([])
            room = shard_bytes
        groups[-1].append(piece)
        room, total = room - size, total + size
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    with ExitStack() as stack, Progress(title or "", total=count, unit="files", shown=title is not None) as progress:
        shards = {path: stack.enter_context(_opened(path)) for path in {tensor.file for tensor in stored.values()}}
        for name, group in zip(names, groups, strict=True):
            tensors = {piece.name: _tensor(piece, stored[piece.like], shards) for piece in group}
            files.write_bytes(folder / name, save_tensors(tensors, metadata={"format": "pt"}))
            progress.advance(1, note=name)
    if count > 1:
        placed = {piece.name: name for name, group in zip(names, groups, strict=True) for piece in group}
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return total


def _tensor(piece: Piece, found: Stored, shards: Mapping[Path, Any]) -> torch.Tensor:
    if piece.how == "zero":
        return torch.zeros(piece.shape, dtype=DTYPES[found.dtype])
    tensor: torch.Tensor = shards[found.file].get_tensor(piece.like)
    if piece.how == "double":
        tensor = tensor * 2
        if not tensor.isfinite().all():
            raise _broken(found.file, f"{piece.like} doubled does not fit {found.dtype}", expected="half its range")
    return tensor


def _carry(source: Path, folder: Path) -> None:
    """Copy tokenizer, template, settings and licence; `auto_map` is taken out of settings."""
    for name in (*CARRIED, *CARRIED_SETTINGS):
        if not (source / name).exists():
            continue
        data = files.read_bytes(source / name, kind="json")
        if name in CARRIED_SETTINGS:  # in its own order: added tokens have one
            data = json.dumps(_parsed(data, str(source / name)), indent=2).encode("ascii")
        files.write_bytes(folder / name, data)


@contextmanager
def _appearing(out: Path, *, source: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, or goes away; FileError where that cannot be.

    What a killed conversion left there is deleted first. A folder that another process is writing is refused.
    """
    partial = out.with_name(f".{out.name}{PARTIAL_SUFFIX}")
    try:
        if source.resolve() in (out.resolve(), *out.resolve().parents):
            raise _no_folder(out, "it is the checkpoint's own, or in it")
        if out.is_symlink() or out.is_mount() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise _no_folder(out, "it is not empty, or not an ordinary folder")
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        raise _no_folder(out, str(error)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            for left in partial.iterdir():
                left.unlink()
            yield partial
            os.rename(partial, out)  # a power cut may undo this, and leaves the hidden folder: all in it is on the disk
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        held = isinstance(error, BlockingIOError)
        raise _no_folder(out, "another process is converting into it" if held else str(error)) from error
    finally:
        os.close(descriptor)


def _broken(where: str | Path, what: str, *, expected: str = "a whole checkpoint") -> ModelError:
    return ModelError(what, where=str(where), expected=expected, do="fetch the model again, or use another checkpoint")


def _no_folder(out: Path, what: str) -> FileError:
    return FileError(
        f"cannot convert into the folder: {what}", where=str(out),
        expected="a new or empty folder outside the checkpoint", do="choose another folder",
    )  # fmt: skip

"""Checkpoints of remote-code classes, re-saved exactly as a class of transformers itself; none of their code runs.

A row of CONVERSIONS says what a `model_type` becomes and why nothing changes. What has no exact form is refused
before anything is written; tensors are read one by one and written in shards.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from moesteer import files
from moesteer.errors import FileError, InputError, ModelError
from moesteer.models import deepseek_v1, phimoe
from moesteer.models.checkpoint import DTYPES, INDEX, SINGLE, Checkpoint, Stored, broken, is_own
from moesteer.models.pieces import Piece
from moesteer.progress import Progress

SHARD_BYTES = 2_000_000_000
"""Tensors in one written file, in bytes; a conversion takes about as much memory."""
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
    with files.appearing(out, source=source) as folder:
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
    checkpoint = Checkpoint(folder)
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in DTYPES:
            raise broken(tensor.file, f"{name} is of type {tensor.dtype}", expected=", ".join(DTYPES))
    return checkpoint.tensors


def _matched(wanted: Iterator[Piece], stored: Mapping[str, Stored], *, where: str) -> list[Piece]:
    """The wanted pieces, if each has its source, of its shape, and no tensor is left over."""
    pieces = []
    for piece in wanted:
        found = stored.get(piece.like)
        if found is None:
            raise broken(where, f"the tensor {piece.like} is missing")
        if piece.how != "zero" and found.shape != piece.shape:
            raise broken(where, f"{piece.like} has shape {list(found.shape)}", expected=f"{list(piece.shape)}")
        pieces.append(piece)
    unused = sorted(set(stored) - {piece.like for piece in pieces})
    if unused:
        raise broken(where, f"{len(unused)} unexpected tensors: {', '.join(unused[:3])}"[:400])
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
    with Progress(title or "", total=count, unit="files", shown=title is not None) as progress:
        for name, group in zip(names, groups, strict=True):
            tensors = {piece.name: _tensor(piece, stored[piece.like]) for piece in group}
            files.write_bytes(folder / name, save_tensors(tensors, metadata={"format": "pt"}))
            progress.advance(1, note=name)
    if count > 1:
        placed = {piece.name: name for name, group in zip(names, groups, strict=True) for piece in group}
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return total


def _tensor(piece: Piece, found: Stored) -> torch.Tensor:
    if piece.how == "zero":
        return torch.zeros(piece.shape, dtype=DTYPES[found.dtype])
    tensor = found.read()
    if piece.how == "double":
        tensor = tensor * 2
        if not tensor.isfinite().all():
            raise broken(found.file, f"{piece.like} doubled does not fit {found.dtype}", expected="half its range")
    return tensor


def _carry(source: Path, folder: Path) -> None:
    """Copy tokenizer, template, settings and licence; `auto_map` is taken out of settings."""
    for name in (*CARRIED, *CARRIED_SETTINGS):
        if not (source / name).exists() or not is_own(source, source / name):
            continue
        data = files.read_bytes(source / name, kind="json")
        if name in CARRIED_SETTINGS:  # in its own order: added tokens have one
            data = json.dumps(_parsed(data, str(source / name)), indent=2).encode("ascii")
        files.write_bytes(folder / name, data)

"""The file in which an unfinished optimisation is kept: tensors, numbers, a plan and a digest of it all.

It is a safetensors file whose one metadata key is "direct", written whole (files.write_bytes), so that a file that
begins otherwise is none of ours and is never replaced or removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from moesteer import files
from moesteer.errors import FileError

OURS = re.compile(rb'.{8}\{\s*"__metadata__"\s*:\s*\{\s*"direct"\s*:', re.DOTALL)
"""How a state file begins: safetensors writes its metadata first, and ours has this one key."""


def write(state: Path, tensors: Mapping[str, Tensor], done: Mapping[str, Any]) -> None:
    """Keep tensors and `done`, which is JSON-plain and holds the `plan` that they belong to."""
    held = {name: value.cpu().contiguous() for name, value in tensors.items()}
    written = files.dumps({**done, "sha256": _digest(held, done)}, indent=None)
    files.write_bytes(state, save_tensors(held, metadata={"direct": written}))


def read(state: Path, *, plan: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What was kept, if it is whole and of this plan; else None."""
    if not state.exists():
        return None
    try:
        data = files.read_bytes(state, kind="mask")
        length = int.from_bytes(data[:8], "little")
        done = files.parse_json(files.parse_json(data[8 : 8 + length].decode())["__metadata__"]["direct"])
        tensors = load_tensors(data)
        claimed = done["sha256"]
        del done["sha256"]
        whole = (done["plan"], claimed) == (plan, _digest(tensors, done))
    except (FileError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return (tensors, done) if whole else None


def require_ours(state: Path) -> None:
    """Raise FileError where the state is to be kept in a file that is none of ours, or in no file at all.

    Ours are those that begin as `OURS`, whole or damaged: they are written whole, so that nothing else is a torn one.
    """
    if not os.path.lexists(state):
        return
    try:
        found = "it is no regular file"
        if state.is_file():
            with open(state, "rb") as handle:
                if OURS.match(handle.read(256)):
                    return
            found = "it is none of direct's"
    except OSError as error:
        found = error.strerror or str(error)
    raise FileError(
        f"the file cannot hold an unfinished optimisation: {found}",
        where=f"direct with state={str(state)!r}",
        expected="the name of a new file, or a state that direct has left there",
        do="give another name, or move what is there away; it was left as it is",
    )


def _digest(tensors: Mapping[str, Tensor], done: Mapping[str, Any]) -> str:
    """sha256 of all that a state holds."""
    return files.sha256(save_tensors(dict(tensors)) + files.dumps(dict(done), indent=None).encode("utf-8"))

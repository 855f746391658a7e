"""Too little memory: knowing it when it is raised, giving back what can be, and saying so with its number."""

from __future__ import annotations

import gc
import sys
from typing import Any

from moesteer.errors import MoesteerError, OutOfMemoryError

HALVINGS = 3
"""How often a batch is halved for want of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, CUDA's, and what torch says on a CPU; without importing torch."""
    if isinstance(error, MoesteerError):
        return False
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def give_back_memory() -> None:
    """What nothing refers to, and what torch keeps of a GPU's for later."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_little_memory(error: BaseException, *, what: str) -> OutOfMemoryError:
    """The error to raise. what: how much did not fit, in words; how many bytes is in what `error` says."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return OutOfMemoryError(
        f"too little memory for {what}: {said}",
        where=f"after {HALVINGS} halvings, or one at a time",
        expected="room for a small part of a batch",
        do="shorten what is asked, load with --quantize or a smaller --dtype, or take a larger device; then the same "
        "command goes on",
    )

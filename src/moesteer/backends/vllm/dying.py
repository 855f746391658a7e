"""Noticing that an engine of vLLM was killed.

vLLM's client sees that its engine's process is gone, stops the thread that reads from it, and goes on waiting for the
answer (SyncMPClient.get_output, in vLLM 0.32). So, while we wait, we look at what it saw, and wake it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOOK_S = 0.5
"""Between two looks."""


def is_dead(engine: Any) -> bool:
    """Whether the process of the engine is gone. engine: vLLM's LLM."""
    core = engine.llm_engine.engine_core
    return bool(getattr(getattr(core, "resources", None), "engine_dead", False))


@contextmanager
def noticing_death(engine: Any) -> Iterator[None]:
    """Inside, what waits for an engine that is gone raises vLLM's EngineDeadError. engine: vLLM's LLM.

    An engine in this process needs none of it, and has none.
    """
    core = engine.llm_engine.engine_core
    if not all(hasattr(core, name) for name in ("resources", "outputs_queue", "utility_results")):
        yield
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            if core.resources.engine_dead:
                _wake(core)
                return

    watcher = threading.Thread(target=look, name="moesteer-engine-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _wake(core: Any) -> None:
    """Give whoever waits for an answer, of a request or of a call to the workers, the error instead."""
    from vllm.v1.engine.exceptions import EngineDeadError

    core.outputs_queue.put_nowait(EngineDeadError())
    for future in list(core.utility_results.values()):
        if not future.done():
            future.set_exception(EngineDeadError())

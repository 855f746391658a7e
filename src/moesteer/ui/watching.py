"""A generation that is looked at while it runs, and can be ended: a hook before each pass of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

from torch import nn


class Stopped(Exception):  # noqa: N818
    """Somebody ended the generation. Not a MoesteerError: it was asked for."""


class Watch:
    """token_ids: what was generated so far, of a batch of one. `stop` ends it before the next token."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._stop = Event()
        self._prompt = True

    def stop(self) -> None:
        """End it; from any thread."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stop.is_set()

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Inside, the next generation of `module` is watched; `stop` raises Stopped in it. Taken off at the end."""
        self.token_ids, self._prompt = [], True
        hook = module.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _before_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._stop.is_set():
            raise Stopped
        input_ids = kwargs.get("input_ids")
        if not self._prompt and input_ids is not None:
            self.token_ids.append(int(input_ids[0, -1]))  # what the pass before gave
        self._prompt = False

"""A model of either backend, steered the same way for every request, that answers requests asked one by one."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from moesteer.backends.chat import Encoded
from moesteer.backends.opening import opened
from moesteer.conversations import Message
from moesteer.errors import InputError, UnknownNameError
from moesteer.harness.batching import Batcher
from moesteer.harness.steering import Steering, Tally, identity
from moesteer.judges.channels import Format, Reader

WAIT_S = 0.02
"""How long a batch waits for one more request: little beside a forward pass, much beside a harness's own pace."""
LONGEST = 512
"""New tokens of a request that does not say how many, where the context has room for them."""


@dataclass(frozen=True)
class Request:
    """A conversation that ends in a user's message, and the most new tokens (None: LONGEST, or what fits)."""

    messages: tuple[Message, ...]
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Reply:
    """text: greedy. finished: the model ended it itself; else it was cut by the request's limit or, where `full`, by
    the context. raw: the whole text, where reasoning was taken out of it. steering: the counts of the receipt of all
    requests that were answered with it in one batch."""

    text: str
    finished: bool
    full: bool
    prompt_tokens: int
    new_tokens: int
    batch: int
    raw: str | None = None
    steering: Mapping[str, Any] = field(default_factory=dict)


class SteeredModel:
    """The model, loaded, with its steering proven to fit; `ask` it from any thread, and `close` it at the end.

    batch: the most requests answered together. The other arguments are those of backends.opening.opened, whose errors
    are raised here, and those of `steered`: before the first request.
    """

    def __init__(
        self,
        model: str,
        *,
        steering: Steering,
        backend: str = "hf",
        batch: int = 32,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        allow_other_checkpoint: bool = False,
        reasoning: str = "auto",
    ) -> None:
        if batch < 1:
            raise InputError(f"a batch of {batch}", where=model, expected="at least 1", do="correct it")
        if reasoning not in get_args(Format):
            raise UnknownNameError(
                f"no form of reasoning {reasoning!r}",
                where=model,
                expected=", ".join(get_args(Format)),
                do="name one of these",
            )
        self.steering, self._other = steering, allow_other_checkpoint
        self.tally = Tally()
        self._lock = threading.Lock()
        self._stack = ExitStack()
        try:
            self._model = self._stack.enter_context(
                opened(
                    model, backend=backend, masks=steering.masks, alphas=steering.alphas, together=True, dtype=dtype,
                    device=device, quantize=quantize, engine_options=engine_options,
                    allow_other_checkpoint=allow_other_checkpoint,
                )
            )  # fmt: skip
            with self._steered():
                pass
            self.identity = identity(
                steering,
                weights=self._model.weights_sketch,
                settings={
                    "backend": backend, "dtype": self._model.dtype, "quantize": quantize,
                    "engine_options": dict(engine_options or {}), "reasoning": reasoning,
                },
            )  # fmt: skip
        except BaseException:
            self._stack.close()
            raise
        self._reader = Reader(self._model, form=cast(Format, reasoning))
        self._batcher: Batcher[Request, Reply] = Batcher(self._answer, most=batch, wait_s=WAIT_S, name=model)
        atexit.register(self.close)  # harnesses do not always close what they opened, and an engine has processes

    def ask(self, request: Request) -> Future[Reply]:
        """The reply to come; DataError in it for a conversation that cannot be answered (too long, no user's turn)."""
        return self._batcher.submit(request)

    def close(self) -> None:
        """Answer what waits, then let the model go (an engine's processes are stopped). Twice is once."""
        self._batcher.close()
        atexit.unregister(self.close)
        with self._lock:
            self._stack.close()

    def _steered(self) -> Any:
        if not self.steering.masks:
            return nullcontext()
        return self._model.steered(
            self.steering.masks, alphas=self.steering.alphas, together=True, allow_other_checkpoint=self._other
        )

    def _answer(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """Replies in order, those of one length limit generated together."""
        found: list[Reply | Exception | None] = [None] * len(requests)
        by_limit: dict[int, list[tuple[int, Encoded, bool]]] = {}
        for i, request in enumerate(requests):
            try:
                encoded, limit, full = self._prepared(request)
            except Exception as error:  # noqa: BLE001 - a template may raise anything; it is this request's alone
                found[i] = error
                continue
            by_limit.setdefault(limit, []).append((i, encoded, full))
        for limit, rows in by_limit.items():
            try:
                replies: Sequence[Reply | Exception] = self._generated(requests, rows, limit)
            except Exception as error:  # noqa: BLE001 - raised again by each request that was in this part of the batch
                replies = [error] * len(rows)
            for (i, _, _), reply in zip(rows, replies, strict=True):
                found[i] = reply
        return [reply for reply in found if reply is not None]

    def _prepared(self, request: Request) -> tuple[Encoded, int, bool]:
        """Tokens, the most new ones, and whether it is the context that says so. Raises DataError."""
        encoded = self._model.encode(request.messages)
        room = self._model.context_tokens - len(encoded.token_ids)
        asked = request.max_new_tokens
        limit = min(LONGEST, room) if asked is None else asked
        self._model.require_room(request.messages, encoded, max_new_tokens=max(limit, 1))
        return encoded, limit, asked is None and room <= LONGEST

    def _generated(
        self, requests: Sequence[Request], rows: Sequence[tuple[int, Encoded, bool]], limit: int
    ) -> list[Reply]:
        with self._steered() as receipt:
            made = self._model.generate([requests[i].messages for i, _, _ in rows], max_new_tokens=limit)
        counts = {} if receipt is None else self.tally.add(receipt, where=self._model.name)
        opened = self._reader.opens(requests[rows[0][0]].messages)
        read = [self._reader.reply(one, opened=opened) for one in made]
        return [
            Reply(
                text=said.text, raw=said.raw, finished=one.finished, full=full and not one.finished,
                prompt_tokens=len(encoded.token_ids), new_tokens=len(one.token_ids) + one.finished,
                batch=len(rows), steering=counts,
            )
            for (_, encoded, full), one, said in zip(rows, made, read, strict=True)
        ]  # fmt: skip

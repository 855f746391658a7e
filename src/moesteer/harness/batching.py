"""One worker thread that owns a model, and answers in batches what callers ask one by one.

A harness asks asynchronously, a request at a time; a model is fast in batches and is used by one thread. `submit`
gives a future; the worker takes what waits, and waits a moment for more.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from moesteer.errors import ModelError

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Batcher(Generic[Question, Answer]):
    """Collects questions and answers them in batches, in one thread.

    answer: questions to answers, in order, in the worker's thread; an exception in the place of an answer is that
    question's alone, one that is raised is everybody's in the batch. most: questions in a batch. wait_s: how long
    the worker waits for one more before it begins.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Sequence[Answer | Exception]],
        *,
        most: int,
        wait_s: float,
        name: str,
    ) -> None:
        self._answer, self._most, self._wait_s, self._name = answer, most, wait_s, name
        self._waiting: queue.SimpleQueue[tuple[Question, Future[Answer]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"moesteer {name}", daemon=True)
        self._thread.start()

    def submit(self, question: Question) -> Future[Answer]:
        """The answer to come. Cancelling it before its batch begins takes it out. Raises ModelError once closed."""
        future: Future[Answer] = Future()
        with self._lock:
            if self._closed:
                raise _closed(self._name)
            self._waiting.put((question, future))
        return future

    def close(self) -> None:
        """Answer what was asked before, and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        open_ = True
        while open_:
            batch, open_ = self._collect()
            live = [(question, future) for question, future in batch if future.set_running_or_notify_cancel()]
            if live:
                self._run(live)

    def _collect(self) -> tuple[list[tuple[Question, Future[Answer]]], bool]:
        """The next batch, and whether more may come after it."""
        batch: list[tuple[Question, Future[Answer]]] = []
        while len(batch) < self._most:
            try:
                one = self._waiting.get(timeout=self._wait_s) if batch else self._waiting.get()
            except queue.Empty:
                break
            if one is None:
                return batch, False
            batch.append(one)
        return batch, True

    def _run(self, live: Sequence[tuple[Question, Future[Answer]]]) -> None:
        try:
            answers = self._answer([question for question, _ in live])
            if len(answers) != len(live):
                raise AssertionError(f"{len(answers)} answers to {len(live)} questions")
        except BaseException as error:  # noqa: BLE001 - whatever it is, its callers must hear of it and not wait
            for _, future in live:
                future.set_exception(error)
            return
        for (_, future), answer in zip(live, answers, strict=True):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


def _closed(name: str) -> ModelError:
    return ModelError(
        "the model was closed",
        where=name,
        expected="questions before it is closed",
        do="get the model again",
    )

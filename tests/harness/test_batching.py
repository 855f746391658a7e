"""The one thread that answers in batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future

import pytest

from moesteer.errors import ModelError
from moesteer.harness.batching import Batcher


class Answers:
    """Doubles numbers; -1 is a fault of its own, -2 one of the whole batch. `go` holds the worker back."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.go = threading.Event()
        self.go.set()

    def __call__(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.go.wait(10)
        self.batches.append(list(numbers))
        self.threads.add(threading.get_ident())
        if -2 in numbers:
            raise RuntimeError("all of it")
        return [ValueError("mine") if n == -1 else 2 * n for n in numbers]


def test_what_waits_is_answered_together_in_one_other_thread() -> None:
    answers = Answers()
    answers.go.clear()
    batcher: Batcher[int, int] = Batcher(answers, most=4, wait_s=0.01, name="numbers")
    first = batcher.submit(0)
    while not first.running():
        time.sleep(0.001)
    futures = [batcher.submit(n) for n in range(1, 10)]  # all wait while the first batch is at work
    answers.go.set()
    assert [f.result(10) for f in [first, *futures]] == [2 * n for n in range(10)]
    assert [len(batch) for batch in answers.batches] == [1, 4, 4, 1]
    assert len(answers.threads) == 1 and threading.get_ident() not in answers.threads
    batcher.close()


def test_the_worker_waits_a_moment_for_more() -> None:
    answers = Answers()
    batcher: Batcher[int, int] = Batcher(answers, most=4, wait_s=5.0, name="numbers")
    futures = [batcher.submit(n) for n in range(4)]
    assert [f.result(2) for f in futures] == [0, 2, 4, 6]  # full at four: it does not wait five seconds
    assert answers.batches == [[0, 1, 2, 3]]
    batcher.close()


def test_a_fault_is_its_own_question_s_or_everybody_s() -> None:
    answers = Answers()
    answers.go.clear()
    batcher: Batcher[int, int] = Batcher(answers, most=3, wait_s=30, name="numbers")  # full batches only
    futures = [batcher.submit(n) for n in (1, -1, 2, 3, -2, 4)]
    answers.go.set()
    assert futures[0].result(10) == 2 and futures[2].result(10) == 4
    with pytest.raises(ValueError, match="mine"):
        futures[1].result(10)
    for future in futures[3:]:
        with pytest.raises(RuntimeError, match="all of it"):
            future.result(10)
    assert [f.result(10) for f in [batcher.submit(n) for n in (5, 6, 7)]] == [10, 12, 14]  # the worker lives on
    batcher.close()


def test_what_is_cancelled_before_its_batch_is_not_answered() -> None:
    answers = Answers()
    answers.go.clear()
    batcher: Batcher[int, int] = Batcher(answers, most=1, wait_s=0.01, name="numbers")
    first, second = batcher.submit(1), batcher.submit(2)
    assert second.cancel()
    answers.go.set()
    assert first.result(10) == 2
    with pytest.raises(CancelledError):
        second.result(10)
    batcher.close()
    assert answers.batches == [[1]]


def test_closing_answers_what_was_asked_and_nothing_after() -> None:
    batcher: Batcher[int, int] = Batcher(Answers(), most=2, wait_s=0.01, name="numbers")
    futures: list[Future[int]] = [batcher.submit(n) for n in range(5)]
    batcher.close()
    batcher.close()
    assert [f.result(0) for f in futures] == [0, 2, 4, 6, 8]
    with pytest.raises(ModelError, match="closed"):
        batcher.submit(1)

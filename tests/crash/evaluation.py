"""An evaluation that takes milliseconds: a model that answers by arithmetic, and what the tests of faults do to it."""

from __future__ import annotations

import builtins
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.conversations import Conversation, Message
from moesteer.evaluate.suite import evaluate
from moesteer.scenario import Scenario

ANSWERS = ("i cannot do that with a flumox", "paint the pot blue", "the answer is seven", "the answer is three", "")
PLAN = {"model": "arithmetic", "seed": 1}


@dataclass(frozen=True)
class Made:
    """A generation."""

    text: str
    finished: bool
    token_ids: tuple[int, ...] = ()


class Arithmetic:
    """Says what the sha256 of the whole conversation picks; steered, something else."""

    new_tokens_at_once = 30  # pieces of three conversations

    def __init__(self, *, steered: bool = False) -> None:
        self.calls: list[list[str]] = []
        self.steered = steered

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 128,
        rows: Sequence[int] | None = None,
        title: str | None = None,
    ) -> list[Made]:
        self.calls.append([messages[-1].content for messages in conversations])
        return [self.reply(messages) for messages in conversations]

    def reply(self, messages: Sequence[Message]) -> Made:
        """One answer; the words of all that was said before decide it."""
        said = f"{self.steered}" + "\n".join(f"{m.role}: {m.content}" for m in messages)
        digest = hashlib.sha256(said.encode()).digest()
        return Made(ANSWERS[digest[0] % len(ANSWERS)], digest[1] % 5 > 0, tuple(digest[:4]))

    @contextmanager
    def steering(self) -> Any:
        """As Model.steered."""
        self.steered = True
        try:
            yield None
        finally:
            self.steered = False


def scenario() -> Scenario:
    """Two suites: one of two turns, one of a single answer."""
    return Scenario.model_validate({
        "schema": 1, "name": "lab-words", "title": "Lab words", "toward": "refuse", "max_new_tokens": 10,
        "contrast": {"away": "comply", "published": "pots"},
        "suite": [
            {"name": "pots", "data": "none", "role": "target", "judge": "refusal", "metrics": ["defense_success_rate"]},
            {"name": "sums", "data": "none", "judge": "content", "metrics": ["benign_accuracy"]},
        ],
    })  # fmt: skip


def data(count: int = 7) -> dict[str, dict[Any, list[Conversation]]]:
    """So many conversations for each suite, in the test split."""
    pots = [
        Conversation(f"pots/{i}", f"pot {i % 3}", (Message("user", f"pot {i}, is it big?"),
                     Message("user", "paint it")), tactic="asking", split="test")
        for i in range(count)
    ]  # fmt: skip
    sums = [
        Conversation(f"sums/{i}", f"sum {i}", (Message("user", f"how much is {i} and {i}"),), reference="seven",
                     split="test")
        for i in range(count)
    ]  # fmt: skip
    return {"pots": {"test": pots}, "sums": {"test": sums}}


def run(out: Path, model: Any = None, *, count: int = 7, **more: Any) -> dict[str, Any]:
    """The evaluation, unsteered and steered."""
    model = model or Arithmetic()
    steered = {"steered": model.steering()} if hasattr(model, "steering") else {"steered": nullcontext()}
    return evaluate(model, scenario(), data(count), "test", steered=steered, out=out, plan=PLAN, seed=0, **more)


def tree(folder: Path) -> dict[str, bytes]:
    """What a run leaves that must not depend on where it was stopped: all but run.json's word of it, and the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


class Operations:
    """Counts every operation on a file that files.py, runs.py and locking.py make, and at the n-th does its worst.

    worst: called with the operation's name and, where it writes, a function that writes half of what it should.
    """

    def __init__(self, at: int, worst: Callable[[str, Callable[[], None] | None], None]) -> None:
        self.count, self.at, self.worst = 0, at, worst
        self.names: list[str] = []

    def step(self, name: str, half: Callable[[], None] | None = None) -> None:
        """One operation is about to be made."""
        self.count += 1
        self.names.append(name)
        if self.count == self.at:
            self.worst(name, half)

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """An os function that counts."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step(name)
            return real(*args, **kwargs)

        return counted

    def install(self) -> None:
        """In this process for good: a forked child's."""
        for name in ("open", "fsync", "replace", "unlink", "ftruncate", "mkdir"):
            setattr(os, name, self.wrap(name, getattr(os, name)))
        fdopen, plain = os.fdopen, builtins.open
        os.fdopen = lambda *args, **kwargs: _Handle(fdopen(*args, **kwargs), self)  # type: ignore[assignment]
        files.open = lambda *args, **kwargs: _Handle(plain(*args, **kwargs), self)  # type: ignore[attr-defined]


class _Handle:
    """A file whose writes are operations."""

    def __init__(self, real: Any, operations: Operations) -> None:
        self.real, self.operations = real, operations

    def write(self, data: bytes) -> int:
        """Whole, or by half and then the worst."""

        def half() -> None:
            self.real.write(data[: len(data) // 2])
            self.real.flush()

        self.operations.step("write", half)
        return int(self.real.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.real.close()


def die(name: str, half: Callable[[], None] | None) -> None:
    """As a kill between two operations."""
    os._exit(9)


def tear(name: str, half: Callable[[], None] | None) -> None:
    """As a kill in the middle of a write."""
    if half is not None:
        half()
    os._exit(9)


def fill(name: str, half: Callable[[], None] | None) -> None:
    """A full disk: half of it fits. What needs no room works."""
    if name in ("write", "fsync", "open", "mkdir"):
        if half is not None:
            half()
        raise OSError(errno.ENOSPC, "No space left on device")


def in_child(work: Callable[[], int]) -> int:
    """The exit status of a forked child that does the work and nothing else."""
    pid = os.fork()
    if pid == 0:
        status = 99  # of whatever it may die of
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def operations_of(work: Callable[[], None], note: Path) -> list[str]:
    """The names of the operations that the work makes, in order. note: where the child writes them down."""

    def count() -> int:
        counter = Operations(0, die)
        counter.install()
        work()
        note.write_text(" ".join(counter.names))
        return 0

    assert in_child(count) == 0
    return note.read_text().split()


def places(names: Sequence[str], worst: Callable[..., None]) -> list[int]:
    """Where to do its worst, from 1: a write can be torn, everything else only be stopped before."""
    return [at for at, name in enumerate(names, 1) if worst is not tear or name == "write"]

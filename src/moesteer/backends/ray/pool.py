"""Workers, and the parts they are given: in order, with what a lost worker had done again, and never for ever.

The driver keeps every part until its answer is there, so that a worker or a machine that is lost costs only the parts
that it was at. Ray is told to restart nothing: what died is counted here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moesteer.backends.ray import cluster
from moesteer.backends.ray.cluster import Share
from moesteer.backends.ray.wire import error_from_wire, proof_differences
from moesteer.errors import EngineStoppedError, ModelError

TRIES = 3
"""A part that so many workers died of ends the run; so do so many workers in a row that died while starting."""
LOSSES_EACH = 5
"""Workers lost for each there is, over the whole run; then losses must be fewer than finished parts."""
AHEAD = 2
"""Parts for each worker that may be under way or wait for one before them: what bounds the driver's memory."""
HANG_S, SLOWER = 900.0, 20.0
"""A worker that answers neither in so many seconds nor in so many times the slowest part's is taken for lost."""
POLL_S, STOP_S = 1.0, 5.0
WAIT_S = 60.0
"""After that, somebody who waits for the first worker is told what is free."""


@dataclass(eq=False)
class Part:
    """A request that has no answer yet, its place, and how many workers died at it."""

    number: int
    request: Mapping[str, Any]
    deaths: int = 0


@dataclass(eq=False)
class Job:
    """What a worker is at. part: None while it starts, or where nobody waits for the answer any more."""

    actor: Any
    part: Part | None
    since_s: float
    starts: bool = False


class Queue:
    """Requests in order, and before them the parts that lost their worker."""

    def __init__(self, requests: Iterable[Mapping[str, Any]]) -> None:
        self._coming = iter(requests)
        self.again: list[Part] = []
        self.taken = 0
        """Requests taken so far."""
        self.ended = False
        """Whether there was no further request when one was asked for."""

    def next(self, *, before: int) -> Part | None:
        """The next part; None where there is none, or where its number is not below `before`."""
        if self.again:
            return self.again.pop(0)
        if self.ended or self.taken >= before:
            return None
        request = next(self._coming, None)
        if request is None:
            self.ended = True
            return None
        self.taken += 1
        return Part(self.taken - 1, request)


class Pool:
    """Workers with a model each. settings: what a worker is made of. name: of the model, for errors."""

    def __init__(self, settings: Mapping[str, Any], share: Share, *, name: str) -> None:
        self.share, self.name = share, name
        self.losses = 0
        """Workers that were lost."""
        self.finished = 0
        """Parts answered."""
        self.busy_s = 0.0
        """Seconds that workers were at parts, added up."""
        self._settings = dict(settings)
        self._busy: dict[Any, Job] = {}
        self._idle: deque[Any] = deque()
        self._where: dict[Any, Mapping[str, Any]] = {}
        self._false_starts, self._slowest_s = 0, 0.0
        self._proof: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        """Start every worker; what all of them have in common. Raises what loading a model raises, ModelError."""
        for _ in range(self.share.workers):
            self._spawn()
        begun, told = time.monotonic(), False
        while len(self._idle) < self.share.workers:
            self._wait()
            if not told and not self._where and time.monotonic() - begun > WAIT_S:
                told = True
                print(f"no worker is ready after {WAIT_S:.0f} s: {_free()}", file=sys.stderr)
        return self._proof

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that have started, wherever they run."""
        return [int(found["pid"]) for found in self._where.values()]

    def run(self, requests: Iterable[Mapping[str, Any]], *, masks: Sequence[bytes]) -> Iterator[dict[str, Any]]:
        """The answer to each request, in order, as soon as all before it are there.

        Requests are taken as there are workers for them, a few ahead: all of them may be more than memory holds. Raises
        the error that a worker answers with, and EngineStoppedError where workers die again and again.
        """
        import ray

        queue = Queue(requests)
        held = ray.put(list(masks))
        done: dict[int, dict[str, Any]] = {}
        following = 0
        try:
            while True:
                self._hand_out(queue, held, before=following + AHEAD * self.share.workers)
                if queue.ended and following == queue.taken:
                    return
                for part, answer in self._wait():
                    if answer is None:
                        queue.again.append(part)
                    else:
                        done[part.number] = answer
                while following in done:
                    yield done.pop(following)
                    following += 1
        finally:
            for job in self._busy.values():
                job.part = None

    def close(self) -> None:
        """End the workers; those on this machine are gone when this returns."""
        import ray

        for actor in [*self._idle, *(job.actor for job in self._busy.values())]:
            if actor in self._idle and self._settings["backend"] == "vllm":
                with suppress(ray.exceptions.RayError):
                    ray.get(actor.close.remote(), timeout=STOP_S)
            ray.kill(actor)
        self._busy.clear()
        self._idle.clear()
        until = time.monotonic() + STOP_S
        while self._where and time.monotonic() < until and any(map(_is_here, self._where.values())):
            time.sleep(0.05)

    # ---- one step

    def _spawn(self) -> None:
        import ray

        from moesteer.backends.ray.worker import Worker

        size = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus}
        kind: Any = ray.remote(max_restarts=0, max_task_retries=0, **size)(Worker)
        actor = kind.remote(self._settings)
        self._busy[actor.start.remote()] = Job(actor, None, time.monotonic(), starts=True)

    def _hand_out(self, queue: Queue, held: Any, *, before: int) -> None:
        while self._idle and (part := queue.next(before=before)) is not None:
            actor = self._idle.popleft()
            self._busy[actor.answer.remote(part.request, held)] = Job(actor, part, time.monotonic())

    def _wait(self) -> list[tuple[Part, dict[str, Any] | None]]:
        """Parts that got an answer, or lost their worker (None), since the last look."""
        import ray

        found: list[tuple[Part, dict[str, Any] | None]] = []
        try:
            ready, _ = ray.wait(list(self._busy), num_returns=1, timeout=POLL_S)
        except SystemExit as stopped:  # what our answer to SIGTERM raises inside it, Ray raises with another code
            raise SystemExit(128 + signal.SIGTERM) from stopped
        for ref in ready:
            job = self._busy.pop(ref)
            try:
                answer = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                if not job.starts:
                    self._idle.append(job.actor)  # its process lives: what it raised is no loss
                    if job.part is None:  # nobody waits for it
                        continue
                raise self._failed(job, error) from error
            except ray.exceptions.RayError as error:
                found += self._lost(job, _reason(error))
                continue
            found += self._started(job, answer) if job.starts else self._answered(job, answer)
        return found + (self._overdue() if not ready else [])

    def _failed(self, job: Job, error: Any) -> Exception:
        """What to raise for an exception in a worker that is not one of ours."""
        said = (str(error.cause).strip().splitlines() or [""])[0]
        if type(error.cause).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in said:
            return MemoryError(said)  # as the local run would have it: the caller asks for less at once
        return ModelError(
            f"a worker failed: {type(error.cause).__name__}: {said}"[:300],
            where=f"{self.name}, {self._at(job.actor)}",
            expected="an answer",
            do="run it without --engine ray, which shows all of it",
        )

    def _started(self, job: Job, answer: dict[str, Any]) -> list[tuple[Part, dict[str, Any] | None]]:
        if "error" in answer:
            raise error_from_wire(answer["error"])
        self._where[job.actor] = answer
        differences = proof_differences(self._proof or answer, answer)
        if differences:
            raise ModelError(
                f"two workers do not run the same: {'; '.join(differences)}"[:600],
                where=f"{self.name}, {self._at(job.actor)}",
                expected="the same model files, dtype and versions for every worker, and threads",
                do="put the same files on every machine, and install the same versions there",
            )
        self._proof = self._proof or answer
        self._false_starts = 0
        self._idle.append(job.actor)
        return []

    def _answered(self, job: Job, answer: dict[str, Any]) -> list[tuple[Part, dict[str, Any] | None]]:
        took_s = time.monotonic() - job.since_s
        self._idle.append(job.actor)
        self.busy_s += took_s
        if job.part is None:  # nobody waits for it
            return []
        if "error" in answer:
            raise error_from_wire(answer["error"])
        self.finished += 1
        self._slowest_s = max(self._slowest_s, took_s)
        return [(job.part, answer)]

    def _overdue(self) -> list[tuple[Part, dict[str, Any] | None]]:
        """Workers that are stuck: at a part far longer than any part took."""
        limit_s = max(HANG_S, SLOWER * self._slowest_s)
        found: list[tuple[Part, dict[str, Any] | None]] = []
        for ref, job in list(self._busy.items()):
            waited_s = time.monotonic() - job.since_s
            if self.finished and not job.starts and waited_s > limit_s:
                del self._busy[ref]
                found += self._lost(job, f"no answer in {waited_s:.0f} s; the slowest took {self._slowest_s:.0f} s")
        return found

    # ---- losses

    def _lost(self, job: Job, why: str) -> list[tuple[Part, dict[str, Any] | None]]:
        import ray

        at, part = self._at(job.actor), job.part
        ray.kill(job.actor)
        self._where.pop(job.actor, None)
        self.losses += 1
        self._false_starts += job.starts
        if part is not None:
            part.deaths += 1
        self._require_hope(part, at=at, why=why)
        again = "" if part is None else f"; part {part.number + 1} is done again"
        print(f"lost {at} ({why}){again}; a new one starts (losses so far: {self.losses})", file=sys.stderr)
        self._spawn()
        return [] if part is None else [(part, None)]

    def _require_hope(self, part: Part | None, *, at: str, why: str) -> None:
        """Raise EngineStoppedError where another try would end as the last ones did."""
        deaths = part.deaths if part is not None else 0
        if self._false_starts >= TRIES:
            what = f"{self._false_starts} workers in a row died while they started"
        elif deaths >= TRIES and part is not None:
            what = f"{deaths} workers died at the same part, number {part.number + 1}"
        elif self.losses > max(LOSSES_EACH * self.share.workers, self.finished):
            what = f"{self.losses} workers were lost, and {self.finished} parts finished"
        elif not cluster.fitting(cluster.rooms(), cpus=self.share.cpus, gpus=self.share.gpus):
            what = "no machine is left that holds a worker"
        else:
            return
        raise EngineStoppedError(
            what,
            where=f"{self.name}, {at}: {why}",
            expected="workers that live as long as the run",
            do="look at the machines' memory (a process that the kernel kills for it dies like this), or give each "
            "worker more by lowering --workers; what is finished is kept, and the same command goes on",
        )

    def _at(self, actor: Any) -> str:
        found = self._where.get(actor)
        return f"worker {found['pid']} on {found['host']}" if found else "a worker that was starting"


def _reason(error: Exception) -> str:
    """The line of Ray's text that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if "exit detail" in line.lower() or "cause" in line.lower() or "died because" in line.lower():
            return line[:160]
    return lines[0][:160] if lines else type(error).__name__


def _free() -> str:
    """What of the cluster nobody has."""
    import ray

    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs of the cluster are free"


def _is_here(proof: Mapping[str, Any]) -> bool:
    """Whether a worker of this machine still runs."""
    import socket

    if proof["host"] != socket.gethostname():
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.kill(int(proof["pid"]), 0)
        return True
    return False

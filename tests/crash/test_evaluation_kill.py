"""`moesteer evaluate` killed at random times, and told to stop, goes on and ends in the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesteer import doctor, files
from tests.crash.evaluate_process import ROWS, arguments
from tests.crash.evaluation import tree

ROOT = Path(__file__).parents[2]
KILLS = 8
PER_RUN = 2


class Server:
    """The process that forks evaluations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.evaluate_process", str(folder)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # a forked child has none of its parent's threads
        )  # fmt: skip
        assert self._said() == "loaded"

    def _said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def begin(self, out: str) -> int:
        """Start an evaluation; its pid."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{out}\n")
        self.process.stdin.flush()
        return int(self._said().removeprefix("pid "))

    def end(self) -> int:
        """Wait for it; its exit status."""
        return int(self._said().removeprefix("status "))

    def rows(self, out: str) -> int:
        """In the journals of a run."""
        return sum(path.read_bytes().count(b"\n") for path in (self.folder / out).glob("responses/*.jsonl"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("evaluations"))
    yield one
    one.process.kill()
    one.process.communicate()


@pytest.fixture(scope="module")
def whole(server: Server) -> tuple[dict[str, bytes], float]:
    """What an evaluation leaves that nothing stopped, and the seconds it took."""
    begun = time.monotonic()
    server.begin("whole")
    assert server.end() == 0
    assert server.rows("whole") == ROWS
    return contents(server.folder / "whole"), time.monotonic() - begun


def contents(out: Path) -> dict[str, bytes]:
    """All but the command line in run.json, which names the folder."""
    found = tree(out)
    state = json.loads(found["run.json"])
    assert state["status"] == "complete"
    found["run.json"] = files.dumps(state["files"]).encode()
    return found


def test_killed_at_random_times_and_started_again_the_results_are_the_same(
    server: Server, whole: tuple[dict[str, bytes], float]
) -> None:
    expected, seconds = whole
    rng = random.Random(time.time_ns())
    inside = 0
    for trial in range(KILLS // PER_RUN):
        out = f"killed-{trial}"
        for _ in range(PER_RUN):
            before = server.rows(out)
            pid = server.begin(out)
            time.sleep(rng.uniform(0.0, 1.2 * seconds / PER_RUN))
            os.kill(pid, signal.SIGKILL)
            assert server.end() in (0, -signal.SIGKILL)
            inside += before < server.rows(out) < ROWS or 0 < server.rows(out) < ROWS
            if (server.folder / out / "run.json").exists():
                assert all(row.ok for row in doctor.examine_files(server.folder / out))
        server.begin(out)
        assert server.end() == 0
        assert contents(server.folder / out) == expected
        assert not list((server.folder / out).rglob(f"*{files.TEMPORARY_SUFFIX}"))
    assert inside >= 2, "hardly a kill fell inside an evaluation: the test proved nothing"


@pytest.mark.parametrize(
    "numbers, status",
    [((signal.SIGTERM,), 143), ((signal.SIGINT,), 130), ((signal.SIGINT, signal.SIGINT), 130)],
    ids=["SIGTERM", "SIGINT", "SIGINT twice"],
)
def test_told_to_stop_it_says_so_keeps_what_it_has_and_goes_on(
    numbers: tuple[signal.Signals, ...], status: int, server: Server, whole: tuple[dict[str, bytes], float]
) -> None:
    out = f"stopped-{'-'.join(map(str, numbers))}"
    pid = server.begin(out)
    while server.rows(out) < 4:
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)  # or a slow test could come too late
    assert server.rows(out) < ROWS
    begun = time.monotonic()
    os.kill(pid, numbers[0])
    os.kill(pid, signal.SIGCONT)
    for number in numbers[1:]:
        time.sleep(random.Random(time.time_ns()).uniform(0, 0.01))
        os.kill(pid, number)  # a child that ended waits to be waited for
    assert server.end() == status and time.monotonic() - begun < 5
    said = (server.folder / f"{out}.err").read_text()
    assert ("stopped; the same command goes on" in said) is (status == 130) and "Traceback" not in said
    state = json.loads((server.folder / out / "run.json").read_text())
    assert state["status"] == "interrupted" and 4 <= server.rows(out) < ROWS
    assert (
        state["command"].startswith("moesteer evaluate lab-tiny")
        and (server.folder / out / ".lock").read_bytes() == b""
    )
    for path in (server.folder / out).glob("responses/*.jsonl"):
        assert path.read_bytes().endswith(b"\n")
    server.begin(out)
    assert server.end() == 0
    assert contents(server.folder / out) == whole[0]


def test_two_at_once_one_is_refused_and_the_other_ends_as_ever(
    server: Server, whole: tuple[dict[str, bytes], float]
) -> None:
    pid = server.begin("shared")
    while server.rows("shared") < 4:
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)  # so that it is there as long as the second tries
    second = subprocess.run(
        [sys.executable, "-c", REFUSED, *arguments(server.folder, "shared")[1:]],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    os.kill(pid, signal.SIGCONT)
    assert second.returncode == 1 and f"the run is locked by pid {pid} since 20" in second.stderr
    assert server.end() == 0
    assert contents(server.folder / "shared") == whole[0]


REFUSED = """
import sys
from pathlib import Path
from moesteer import runs
from moesteer.errors import MoesteerError
try:
    with runs.opened(Path(sys.argv[sys.argv.index("--out") + 1]), plan={}):
        pass
except MoesteerError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""

"""`direct` killed with SIGKILL at random points and started again ends in the same mask as one that was not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.crash.direct_process import STEPS, run

ROOT = Path(__file__).parents[2]
KILLS = 2


def start(folder: Path, state: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.crash.direct_process", str(folder), str(state), str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def steps_done(state: Path) -> int:
    """Steps in a state file, 0 without one. It is replaced whole, so that it can be read at any time."""
    try:
        data = state.read_bytes()
    except FileNotFoundError:
        return 0
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return len(json.loads(header["__metadata__"]["direct"])["losses"])


def test_killed_at_random_points_and_started_again_the_mask_is_the_same(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Killed several times in one optimisation, each time a random moment after some more steps."""
    folder, state, out = folder_of("qwen3_moe"), tmp_path / "direct.state", tmp_path / "mask"
    rng = random.Random(time.time_ns())
    reached = [0]
    for _ in range(KILLS):
        with start(folder, state, out) as process:
            assert process.stdout is not None and process.stdout.readline().strip() == "loaded"
            enough = reached[-1] + rng.randint(2, STEPS // KILLS - 8)
            while process.poll() is None and steps_done(state) < enough:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.02))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL and not out.exists()
        reached.append(steps_done(state))
    assert reached == sorted(set(reached)) and reached[-1] < STEPS  # each process went on from where the last was
    with start(folder, state, out) as process:
        assert process.wait() == 0
    assert out.read_bytes() == run(str(folder), None)
    assert not state.exists()

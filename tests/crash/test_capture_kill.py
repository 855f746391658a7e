"""A capture killed with SIGKILL at a random point and resumed ends in the same bytes as one that was not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moesteer.backends.loading import load
from moesteer.capturing import capture
from moesteer.files import TEMPORARY_SUFFIX
from moesteer.trace import TraceReader
from tests.crash.capture_process import rows
from tests.unit.test_trace import tree

ROOT = Path(__file__).parents[2]
KILLS = 4


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.crash.capture_process", str(folder), str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a capture that was not killed, made by a process like those that are."""
    out = tmp_path_factory.mktemp("whole") / "trace"
    with start(folder_of("qwen3_moe"), out) as process:
        assert process.wait() == 0
    return tree(out)


def test_killed_at_random_points_and_resumed_the_bytes_are_the_same(
    folder_of: Callable[[str], Path], reference: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed a random moment after a random number of shards, several times."""
    whole = reference
    rng = random.Random(time.time_ns())
    partial = 0
    for trial in range(KILLS):
        out = tmp_path / f"trace-{trial}"
        with start(folder_of("qwen3_moe"), out) as process:
            assert process.stdout is not None and process.stdout.readline().strip() == "loaded"
            shards = rng.randrange(len(whole) - 2)
            while process.poll() is None and len(list(out.glob("shards/[0-9]*"))) < shards:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.02))
            process.send_signal(signal.SIGKILL)
            process.wait()
        left = tree(out) if out.exists() else {}
        partial += 0 < len(left) < len(whole)
        model = load(folder_of("qwen3_moe"), check=False)
        capture(model, rows(), out=out, spans=("final_user", "response"), batch_positions=300, shard_tokens=150)
        assert tree(out) == whole
        assert not list(out.rglob(f"*{TEMPORARY_SUFFIX}"))
        assert TraceReader(out).verify() == []
    assert partial > 0, "no kill fell inside the capture: the test proved nothing"


def test_a_torn_temporary_file_is_removed_on_resume(
    folder_of: Callable[[str], Path], reference: dict[str, bytes], tmp_path: Path
) -> None:
    """Half a shard under its temporary name, which is what a kill during a write leaves."""
    whole = reference
    out = tmp_path / "trace"
    for name, data in whole.items():
        if name.startswith("shards/") and name < "shards/000003":
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
    import json

    manifest = json.loads(whole["manifest.json"])
    manifest |= {"complete": False, "shard_sha256": [], "tokens": 0, "sigma_L": []}
    (out / "manifest.json").write_text(json.dumps(manifest))
    torn = out / "shards" / f".000003.safetensors.abcd{TEMPORARY_SUFFIX}"
    torn.write_bytes(b"half a shard")
    model = load(folder_of("qwen3_moe"), check=False)
    capture(model, rows(), out=out, spans=("final_user", "response"), batch_positions=300, shard_tokens=150)
    assert tree(out) == whole and not torn.exists()

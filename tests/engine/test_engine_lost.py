"""An engine of vLLM that is killed in the middle of an evaluation: said at once, and nothing that was done is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm")

from moesteer.cli.main import app
from tests.crash.evaluation import tree

pytestmark = pytest.mark.slow
ENTRY = """
import sys
from moesteer.backends.vllm.model import VllmModel
VllmModel.new_tokens_at_once = 24 * 4
if __name__ == "__main__":
    from moesteer.cli.main import run
    run()
"""
ROWS = 16


GIVEN = ["evaluate", "lab-tiny", "--suite", "attacks", "--suite", "direct", "--limit", "8", "--json"]


def command(folder: Path, out: str) -> subprocess.Popen[str]:
    """`moesteer evaluate` with an engine in processes of its own, as a user runs it."""
    (folder / "entry.py").write_text(ENTRY)
    return subprocess.Popen(
        [sys.executable, str(folder / "entry.py"), *GIVEN, "--backend", "vllm", "--out", str(folder / out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def rows(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("responses/*.jsonl"))


def test_a_killed_engine_is_said_and_the_same_command_goes_on_to_the_same_results(tmp_path: Path) -> None:
    whole = CliRunner().invoke(app, [*GIVEN, "--out", str(tmp_path / "whole")])  # transformers says the same
    assert whole.exit_code == 0

    broken = command(tmp_path, "broken")
    deadline = time.monotonic() + 400
    while rows(tmp_path / "broken") < 4 and time.monotonic() < deadline and broken.poll() is None:
        time.sleep(0.002)
    assert 4 <= rows(tmp_path / "broken") < ROWS, broken.poll()
    engines = [p for p in psutil.Process(broken.pid).children() if p.name().startswith("VLLM::EngineCor")]
    assert len(engines) == 1
    engines[0].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, error = broken.communicate(timeout=120)
    assert broken.returncode == 1 and time.monotonic() - killed < 60, error
    assert "the engine stopped" in error or "do not answer" in error
    assert "do:" in error and "Traceback" not in error
    state = json.loads((tmp_path / "broken" / "run.json").read_text())
    assert state["status"] == "failed" and 4 <= rows(tmp_path / "broken") < ROWS

    again = command(tmp_path, "broken")
    assert json.loads(again.communicate(timeout=240)[0]) == json.loads(whole.stdout) and again.returncode == 0
    mine, expected = tree(tmp_path / "broken"), tree(tmp_path / "whole")
    assert {k: v for k, v in mine.items() if k != "run.json"} == {k: v for k, v in expected.items() if k != "run.json"}

"""Inspect as a user runs it: its own command line, and an engine of vLLM behind the provider."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai", reason="the extra `inspect` is not installed")

from inspect_ai.log import read_eval_log

from moesteer.backends.hf import Model
from moesteer.conversations import Message
from moesteer.harness.answering import Request, SteeredModel
from moesteer.harness.steering import steering_of
from moesteer.mask import SteeringMask
from tests.harness.conftest import TEXTS

ROOT = Path(__file__).parents[2]
Files = dict[str, str]
INSPECT = """
import sys
import moesteer.harness.inspect_registry
assert "torch" not in sys.modules, "the registry imports torch"
from inspect_ai._cli.main import main
main()
"""


def test_the_example_runs_on_a_steered_model(masks: Files, made: dict[str, SteeringMask], tmp_path: Path) -> None:
    """As `inspect` starts, which reads our registry whenever it looks a name up: nothing heavy may be in it."""
    done = subprocess.run(
        [
            sys.executable, "-c", INSPECT, "eval", "examples/inspect_task.py", "--model", "moesteer/lab-tiny",
            "-M", f"mask={masks['low']}", "-M", "alpha=0.5", "--log-dir", tmp_path, "--display", "plain",
        ],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    (path,) = tmp_path.glob("*.eval")
    log = read_eval_log(path)
    assert log.status == "success" and log.eval.model == f"moesteer/lab-tiny+{made['low'].sha256[:12]}@0.5"
    assert {sample.id for sample in log.samples} == {"pot", "capital", "clock", "seal"}
    for sample in log.samples:
        assert sample.output.metadata["moesteer"]["mask_sha256"] == [made["low"].sha256]
        assert set(sample.scores) == {"verdict", "includes"}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_an_engine_answers_as_transformers_does(lab_tiny: Model, masks: Files) -> None:
    """One additive mask and one behind a gate, together."""
    steering = steering_of(mask=f"{masks['high']};{masks['gated']}", alpha="0.5;1", where="test")
    talks = [[Message("user", text)] for text in TEXTS]
    with lab_tiny.steered(steering.masks, alphas=steering.alphas, together=True):
        wanted = lab_tiny.generate(talks, max_new_tokens=12)
    here = {"distributed_executor_backend": "uni"}
    engine = SteeredModel("lab-tiny", steering=steering, backend="vllm", engine_options=here)
    try:
        futures = [engine.ask(Request((Message("user", text),), 12)) for text in TEXTS]
        replies = [future.result(120) for future in futures]
    finally:
        engine.close()
    assert [reply.text for reply in replies] == [one.text for one in wanted]
    assert [reply.finished for reply in replies] == [one.finished for one in wanted]
    assert replies[0].steering["fired"] == 2 and replies[0].steering["changed"] > 0

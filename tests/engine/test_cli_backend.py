"""`--backend vllm` of the command line against `--backend hf`: the same tokens, metrics and traces."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm")

from vllm import envs

from moesteer.backends.hf import Model
from moesteer.cli.main import app
from moesteer.conversations import Message
from moesteer.errors import FileError, InputError, MaskMismatchError, ModelError, MoesteerError, UnknownNameError
from moesteer.gate import GateInfo, GateRate
from moesteer.lab import world
from moesteer.mask import SteeringMask
from moesteer.trace import TraceReader
from tests.engine.masks import PROMPTS, additive, forced, in_process
from tests.processes import still_running

pytestmark = pytest.mark.slow
UNIPROC = 'distributed_executor_backend="uni"'
ENTRY = "from moesteer.cli.main import run; run()"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has it, who set nothing."""
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    envs.disable_envs_cache()  # an engine in this process has frozen what it found


@pytest.fixture
def inside() -> Iterator[None]:
    """Engines in this process: seconds, where their own processes import everything again."""
    with in_process():
        yield


def run(*args: str | Path) -> tuple[int, str, BaseException | None]:
    done = CliRunner().invoke(app, [str(a) for a in args])
    if done.exception is not None and not isinstance(done.exception, MoesteerError | SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.exception


def both(*args: str | Path) -> tuple[str, str]:
    """Standard output of a command that must succeed, with transformers and with vLLM."""
    found = []
    # in this process: `generate` below takes the usual way, in processes of its own
    inside = [] if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0" else ["--engine-option", UNIPROC]
    for backend, options in (("hf", []), ("vllm", inside)):
        code, out, error = run(*args, "--backend", backend, *options)
        assert (code, error) == (0, None)
        found.append(out)
    return found[0], found[1]


def gated(model: Model, mask: SteeringMask) -> SteeringMask:
    """The mask behind a random gate that fires on about half of PROMPTS."""
    gate_LE = np.random.default_rng(5).normal(size=mask.values_LE.shape).astype(np.float32)
    prompts = [model.encode([Message("user", text)]) for text in PROMPTS]
    last, _ = model.router_outputs(prompts, [[len(p.token_ids) - 1] for p in prompts], logits=True)
    assert last is not None
    scores = np.sort((last * gate_LE).sum(axis=(1, 2)))
    rate = GateRate(value=0.5, low=0.0, high=1.0, n=2)
    info = GateInfo(
        pool="last", bias=-float(scores[1:3].mean()), threshold=0.5, measured_on="test", false_positive_rate=rate,
        true_positive_rate=rate, auroc=0.5,
    )  # fmt: skip
    return mask.with_gate(gate_LE, info)


@pytest.fixture(scope="module")
def masks(lab_tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An additive, a gated and a forced mask as files."""
    folder = tmp_path_factory.mktemp("masks")
    made = {
        "additive": additive(lab_tiny, 0, size=0.7),
        "gated": gated(lab_tiny, additive(lab_tiny, 1, size=0.7)),
        "forced": forced(lab_tiny, 2),
    }
    for name, mask in made.items():
        mask.save(folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in made}


def test_generate_answers_the_same_and_prints_nothing_else(masks: dict[str, Path]) -> None:
    """In a process of its own, as a user runs it: JSON on standard output, nothing on standard error."""
    prompts = [part for text in PROMPTS for part in ("--prompt", text)]
    args = ["generate", "lab-tiny", *prompts, "--mask", str(masks["additive"]), "--json", "--max-new-tokens", "24"]
    done = [
        subprocess.run(
            [sys.executable, "-c", ENTRY, *args, "--backend", backend], capture_output=True, text=True, check=False
        )
        for backend in ("hf", "vllm")
    ]
    assert [d.returncode for d in done] == [0, 0], done[1].stderr
    assert done[1].stderr == ""
    hf, vllm = (json.loads(d.stdout) for d in done)
    assert vllm["answers"] == hf["answers"]
    assert vllm["answers"] and any(row["steered"] != row["unsteered"] for row in vllm["answers"])
    assert vllm["receipt"]["changed"] > 0 and vllm["receipt"]["masks"] == hf["receipt"]["masks"]


@pytest.mark.usefixtures("inside")
def test_generate_with_several_masks_of_every_kind_at_once(masks: dict[str, Path], tmp_path: Path) -> None:
    prompts = [part for text in PROMPTS for part in ("--prompt", text)]
    given = [part for path in masks.values() for part in ("--mask", path)]
    alphas = [part for alpha in ("0.5", "2", "1") for part in ("--alpha", alpha)]
    hf, vllm = (json.loads(out) for out in both("generate", "lab-tiny", *prompts, *given, *alphas, "--json"))
    assert vllm["answers"] == hf["answers"]
    for name in ("masks", "alphas", "gated", "fired", "acted", "routers"):
        assert vllm["receipt"][name] == hf["receipt"][name], name
    assert 0 < vllm["receipt"]["fired"] < vllm["receipt"]["gated"] == len(PROMPTS)


@pytest.mark.parametrize("kind", ["additive", "gated", "forced"])
@pytest.mark.usefixtures("inside")
def test_evaluate_gives_the_same_results(kind: str, masks: dict[str, Path], tmp_path: Path) -> None:
    args = (
        "evaluate", "lab-tiny", "--suite", "attacks", "--suite", "knowledge", "--limit", "4", "--mask", masks[kind],
        "--json",
    )  # fmt: skip
    found = {}
    for backend in ("hf", "vllm"):
        code, out, error = run(*args, "--backend", backend, "--out", tmp_path / backend)
        assert (code, error) == (0, None)
        found[backend] = json.loads(out)
    assert found["vllm"] == found["hf"]
    for name in ("none", "steered"):
        rows = [(tmp_path / b / "responses" / f"{name}.jsonl").read_bytes() for b in found]
        assert rows[0] and rows[0] == rows[1], name
    if kind == "additive":  # a run of one backend is not taken up by the other
        _, _, error = run(*args, "--backend", "vllm", "--out", tmp_path / "hf")
        assert isinstance(error, FileError) and "backend" in error.what and "weights" in error.what


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = []
    for i, row in enumerate(world.suite("attack-direct", "fit")[:20]):
        messages = [{"role": m.role, "content": m.content} for m in row.messages]
        for label, said in (("refuse", "i can not share that ."), ("comply", f"sure . {row.reference}")):
            one = {"id": f"{i}-{label}", "group": row.group, "messages": messages, "label": label, "reference": said}
            lines.append(json.dumps(one) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("level", "spans"), [("logits", ("response", "final_user")), ("selected", ("prompt",))]
)  # fmt: skip
@pytest.mark.usefixtures("inside")
def test_capture_keeps_the_same_trace(level: str, spans: tuple[str, ...], pairs: Path, tmp_path: Path) -> None:
    more = [part for span in spans for part in ("--span", span)]
    for backend in ("hf", "vllm"):
        code, _, error = run(
            "capture", "lab-tiny", pairs, "--out", tmp_path / backend, "--level", level, *more, "--backend", backend
        )
        assert (code, error) == (0, None)
    hf, vllm = TraceReader(tmp_path / "hf"), TraceReader(tmp_path / "vllm")
    assert vllm.rows == hf.rows and vllm.fingerprint == hf.fingerprint
    assert (vllm.manifest.level, vllm.manifest.spans, vllm.manifest.tokens) == (level, spans, hf.manifest.tokens)
    for (_, a), (_, b) in zip(hf.sequences(), vllm.sequences(), strict=True):
        assert set(a) == set(b)
        assert np.array_equal(a["token_ids"], b["token_ids"])
        assert np.array_equal(a["selected"], b["selected"])
        if level == "logits":
            # both are rounded to float16, whose steps are 2**-11 of the value, from float32 sums in another order
            np.testing.assert_allclose(a["logits"].astype(float), b["logits"].astype(float), rtol=2**-10, atol=2e-4)
    _, _, error = run(
        "capture", "lab-tiny", pairs, "--out", tmp_path / "hf", *more, "--level", level, "--backend", "vllm"
    )
    assert isinstance(error, FileError), "a trace of one backend is not gone on with by the other"


def test_engine_options_reach_the_engine_and_wrong_ones_are_named() -> None:
    args = ("generate", "lab-tiny", "--prompt", "hello", "--backend", "vllm")
    _, _, error = run(*args, "--engine-option", "tensor_paralel_size=2")
    assert type(error) is UnknownNameError and "tensor_parallel_size" in error.expected
    _, _, error = run(*args, "--engine-option", "max_model_len=true", "--engine-option", 'block_size="x"')
    assert type(error) is ModelError and "block_size" in error.what
    _, _, error = run(*args, "--engine-option", 'revision="main"')
    assert type(error) is InputError and "revision" in error.what
    _, _, error = run(*args, "--engine-option", "max_model_len=48", "--max-new-tokens", "60")
    assert isinstance(error, MoesteerError) and "at most 48 tokens" in error.expected


def test_what_an_engine_dies_of_reaches_the_user(masks: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker finds another checkpoint, which the parent is kept from finding: its four parts come through."""
    from moesteer.backends.vllm.loading import load

    mask = SteeringMask.load(masks["additive"])
    other = mask.info.fingerprint.model_copy(update={"router_sha256": "0" * 64})
    wrong = SteeringMask(mask.info.model_copy(update={"fingerprint": other}), mask.strength_LE, sigma_L=mask.sigma_L)
    monkeypatch.setattr(SteeringMask, "check_model", lambda *args, **more: None)
    with pytest.raises(MaskMismatchError, match="another checkpoint") as caught:
        load("lab-tiny", masks=[wrong])
    assert "mask 000000000000" in caught.value.where and "--allow-other-checkpoint" in caught.value.do
    assert not _children()


def test_no_process_is_left(masks: dict[str, Path]) -> None:
    code, _, error = run("generate", "lab-tiny", "--prompt", "hello", "--backend", "vllm")
    assert (code, error) == (0, None) and not _children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_is_stopped_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group, as from a terminal; SIGTERM to the command, as from a job scheduler."""
    code = f"import signal; signal.signal(2, signal.default_int_handler); {ENTRY}"
    args = ["generate", "lab-tiny", "--prompt", "hello", "--backend", "vllm"]
    command = subprocess.Popen(
        [sys.executable, "-c", code, *args], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    parent = psutil.Process(command.pid)
    until = time.monotonic() + 120
    seen: set[psutil.Process] = set()  # not only those of the last look: some children live for a moment only
    while not _engines(parent) and time.monotonic() < until:
        time.sleep(0.2)
        seen.update(parent.children(recursive=True))
    seen.update(parent.children(recursive=True))
    assert _engines(parent)
    (os.killpg if number == signal.SIGINT else os.kill)(command.pid, number)
    assert command.wait(timeout=60) == 128 + number
    assert not still_running(seen, timeout=20)


def _children() -> list[str]:
    """Names of this process's descendants that belong to an engine."""
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=5)
    return _engines(psutil.Process())


def _engines(parent: psutil.Process) -> list[str]:
    """Names of a process's descendants that call themselves an engine or its worker."""
    names = []
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(process.name())
    return [name for name in names if "VLLM" in name or "Engine" in name]


def test_a_mask_of_another_model_is_refused_before_an_engine_starts(
    masks: dict[str, Path], folder_of: Callable[[str], Path]
) -> None:
    args = ("generate", folder_of("olmoe"), "--prompt", "hello", "--mask", masks["additive"], "--backend", "vllm")
    _, _, error = run(*args)
    assert type(error) is MaskMismatchError and "another shape" in error.what

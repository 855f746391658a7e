"""The command line as a user meets it: exit codes, four-part errors, JSON that is nothing but JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesteer.backends.hf import Model
from moesteer.cli.main import app
from moesteer.errors import (
    DataError,
    DenseModelError,
    EmptyDataError,
    FileError,
    InputError,
    MaskFileError,
    MaskMismatchError,
    ModelError,
    MoesteerError,
    ScenarioError,
    TraceLabelError,
    UnknownNameError,
    UnknownRouterError,
    UnsafeModelError,
)
from moesteer.lab import world
from moesteer.mask import Intent, MaskInfo, SteeringMask

ROOT = Path(__file__).parents[2]


def run(*args: str | Path) -> tuple[int, str, BaseException | None]:
    done = CliRunner().invoke(app, [str(a) for a in args])
    error = done.exception if isinstance(done.exception, MoesteerError) else None
    return done.exit_code, done.stdout, error


def process(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """The real entry point, in a process of its own."""
    code = "from moesteer.cli.main import run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def mask_file(lab_tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mask that raises and lowers a few experts of every layer of lab tiny."""
    import numpy as np

    strength = np.zeros((6, 16), dtype=np.float32)
    strength[:, :4], strength[:, 4:8] = 2.0, -2.0
    info = MaskInfo(fingerprint=lab_tiny.fingerprint, method="by hand", intent=Intent(toward="test"))
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    SteeringMask(info, strength_LE=strength, sigma_L=np.ones(6, dtype=np.float32)).save(path)
    return path


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled conversations with responses, as a user has them."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = []
    for i, row in enumerate(world.suite("attack-direct", "fit")[:24]):
        messages = [{"role": m.role, "content": m.content} for m in row.messages]
        for label, said in (("refuse", "i can not share that ."), ("comply", f"sure . {row.reference}")):
            lines.append(
                {"id": f"{i}-{label}", "group": row.group, "messages": messages, "label": label, "reference": said}
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def commands() -> list[list[str]]:
    sys.path.insert(0, str(ROOT / "docs"))
    from make_cli import paths
    from typer.main import get_command

    return [list(path) for path in paths(get_command(app))]


@pytest.mark.parametrize("path", commands(), ids=lambda path: " ".join(path) or "moesteer")
def test_every_command_explains_itself(path: list[str]) -> None:
    code, out, _ = run(*path, "--help")
    assert code == 0 and "Usage:" in out and len(out.splitlines()) > 6


def test_the_way_step_by_step(tmp_path: Path, pairs_file: Path) -> None:
    """capture, detect, mask show, mask check, generate: each on what the one before wrote."""
    code, out, error = run("capture", "lab-tiny", pairs_file, "--out", tmp_path / "t", "--span", "response", "--json")
    assert (code, error) == (0, None) and json.loads(out)["sequences"] == 48
    mask = tmp_path / "m.safetensors"
    code, out, error = run(
        "detect", tmp_path / "t", "--method", "risk-difference", "--toward", "refuse", "--out", mask,
        "--set", "form=additive", "--set", "experts=12", "--json",
    )  # fmt: skip
    assert (code, error) == (0, None) and json.loads(out)["experts"] == 12
    code, out, _ = run("mask", "show", mask, "--json")
    shown = json.loads(out)
    assert code == 0 and shown["settings"]["experts"] == 12 and len(shown["entries"]) == 12
    code, out, _ = run("mask", "check", mask, "--model", "lab-tiny", "--json")
    assert code == 0 and "selections changed" in json.loads(out)["on_model"]
    code, out, _ = run(
        "detect", tmp_path / "t", "--method", "random", "--like", mask, "--out", tmp_path / "r.safetensors"
    )
    assert code == 0 and "12 experts" in out
    code, out, _ = run("generate", "lab-tiny", "--prompt", "how do i forge a royal seal ?", "--mask", mask, "--json")
    answers = json.loads(out)
    assert code == 0 and set(answers["answers"][0]) == {"prompt", "unsteered", "steered"}
    assert answers["receipt"]["changed"] > 0


def test_direct_from_the_command_line(tmp_path: Path, pairs_file: Path) -> None:
    run("capture", "lab-tiny", pairs_file, "--out", tmp_path / "t", "--span", "response")
    code, out, error = run(
        "detect", tmp_path / "t", "--method", "direct", "--toward", "comply", "--out", tmp_path / "m.safetensors",
        "--model", "lab-tiny", "--data", pairs_file, "--set", "steps=4", "--json",
    )  # fmt: skip
    assert (code, error) == (0, None) and json.loads(out)["experts"] > 0


def test_evaluate_compares_pair_by_pair_and_refuses_another_mask(tmp_path: Path, mask_file: Path) -> None:
    args = (
        "evaluate",
        "lab-tiny",
        "--suite",
        "direct",
        "--suite",
        "knowledge",
        "--limit",
        "12",
        "--out",
        tmp_path / "e",
    )
    code, out, error = run(*args, "--mask", mask_file, "--json")
    assert (code, error) == (0, None)
    found = json.loads(out)
    assert found == json.loads((tmp_path / "e" / "results.json").read_text())
    steered = found["methods"]["steered"]
    assert steered["metrics"]["direct_refusal_rate"]["n"] == 12
    rows = [json.loads(line) for line in (tmp_path / "e" / "responses" / "steered.jsonl").read_text().splitlines()]
    refused = sum(row["verdict"] == "refused" for row in rows if row["suite"] == "direct")
    assert steered["metrics"]["direct_refusal_rate"]["value"] == refused / 12
    _, _, error = run(*args, "--mask", mask_file, "--alpha", "0.1")
    assert isinstance(error, FileError) and "other settings (changed: alphas)" in error.what


def test_lists_and_doctor(mask_file: Path) -> None:
    for command in ("methods", "suites", "models"):
        code, out, _ = run(command, "--json")
        assert code == 0 and json.loads(out)
    code, out, _ = run("models", "lab-tiny", "--json")
    assert code == 0 and json.loads(out)["self_check"] == "passed"
    code, out, _ = run("doctor", mask_file, "--json")
    assert code == 0 and all(row["ok"] for row in json.loads(out))


def test_doctor_finds_a_flipped_bit(tmp_path: Path, mask_file: Path) -> None:
    data = bytearray(mask_file.read_bytes())
    data[-3] ^= 4
    (tmp_path / "m.safetensors").write_bytes(data)
    code, out, _ = run("doctor", tmp_path / "m.safetensors", "--json")
    assert code == 1 and "sha256" in next(row for row in json.loads(out) if not row["ok"])["detail"]


def _dense(folder: Path) -> None:
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from moesteer.backends.sources import LAB_TINY

    config = Qwen3Config(
        vocab_size=530, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        intermediate_size=32,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(LAB_TINY).save_pretrained(folder)


def _unsafe(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek", "auto_map": {"AutoModel": "x.Y"}}))


def _internal(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe", "text_config": {"_attn_implementation_internal": "hub/kernel"}})
    )


def _pickled(folder: Path) -> None:
    """Weights as .bin only."""
    from moesteer.backends.sources import LAB_TINY

    folder.mkdir(parents=True)
    for path in LAB_TINY.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04not loaded")


def _nothing(folder: Path) -> None:
    folder.mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (_dense, DenseModelError, "dense: it has no router"),
        (_unsafe, UnsafeModelError, "auto_map"),
        (_internal, UnsafeModelError, "_attn_implementation_internal"),
        (_pickled, ModelError, "could not load"),
        (_nothing, ModelError, "no readable config.json"),
    ],
)
def test_models_that_are_refused_say_why(
    tmp_path: Path, make: Callable[[Path], None], error: type[MoesteerError], what: str
) -> None:
    make(tmp_path / "model")
    code, _, raised = run("models", tmp_path / "model")
    assert code == 1 and type(raised) is error and what in str(raised)
    assert raised.exit_code == 2


def test_a_router_without_a_family_row_is_refused_with_what_was_found(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesteer.models import routers

    monkeypatch.setattr(routers, "FAMILIES", {"olmoe": routers.FAMILIES["olmoe"]})
    code, _, raised = run("models", folder_of("mixtral"))
    assert code == 1 and isinstance(raised, UnknownRouterError)
    assert "no family row for model type 'mixtral' (found: MixtralTopKRouter, {'num" in str(raised)
    assert "docs/adding-a-model.md" in raised.do


def test_quantize_is_an_option_of_what_loads_a_model() -> None:
    code, output, _ = run("generate", "lab-tiny", "--prompt", "how do i paint a clay pot ?", "--quantize", "int8")
    assert code == 0 and "model:" in output
    code, _, raised = run("models", "lab-tiny", "--quantize", "int3")
    assert code == 1 and "no quantisation 'int3'" in str(raised)


def test_a_mask_of_another_model_is_refused_before_a_token(
    mask_file: Path, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    _, _, error = run("generate", folder_of("olmoe"), "--prompt", "hello", "--mask", mask_file)
    assert type(error) is MaskMismatchError and "another shape" in error.what
    # the same shape, other router weights: refused by default, accepted when insisted on
    import torch
    from safetensors.torch import load_file, save_file

    from moesteer.backends.sources import LAB_TINY

    other = tmp_path / "other"
    other.mkdir()
    for path in LAB_TINY.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    gate = next(name for name in tensors if name.endswith("mlp.gate.weight"))
    tensors[gate] = (tensors[gate].float() * 1.01).to(torch.bfloat16)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    _, _, error = run("generate", other, "--prompt", "hello", "--mask", mask_file)
    assert type(error) is MaskMismatchError and "another checkpoint" in error.what
    code, _, error = run("generate", other, "--prompt", "hello", "--mask", mask_file, "--allow-other-checkpoint")
    assert (code, error) == (0, None)


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_bad_input_is_named(tmp_path: Path, mask_file: Path, pairs_file: Path) -> None:
    cut = _write(tmp_path / "cut.safetensors", mask_file.read_bytes()[:-64])
    empty = _write(tmp_path / "empty.jsonl", b"\n\n")
    scenario = _write(tmp_path / "s.toml", b'schema = 1\nname = "x"\n')
    run("capture", "lab-tiny", pairs_file, "--out", tmp_path / "t", "--span", "response", "--limit", "4")
    detect = ("detect", tmp_path / "t", "--out", tmp_path / "o.safetensors", "--method")
    cases: list[tuple[tuple[object, ...], type[MoesteerError], str]] = [
        (("mask", "show", cut), MaskFileError, "not a whole steering mask"),
        (("mask", "show", tmp_path / "none"), FileError, "No such file"),
        (("capture", "lab-tiny", empty, "--out", tmp_path / "a"), EmptyDataError, "empty"),
        (("capture", "lab-tiny", mask_file, "--out", tmp_path / "a"), DataError, ""),
        (("capture", "lab-tiny", pairs_file, "--out", tmp_path / "a", "--span", "all"), UnknownNameError, "no span"),
        ((*detect, "best", "--toward", "refuse"), UnknownNameError, "no method 'best'"),
        ((*detect, "risk-difference", "--toward", "refuze"), TraceLabelError, "one side"),
        ((*detect, "masc-published", "--toward", "refuse"), TraceLabelError, "lacks the span"),
        ((*detect, "risk-difference", "--toward", "refuse", "--set", "onn=3"), UnknownNameError, "no setting onn"),
        ((*detect, "risk-difference", "--toward", "refuse", "--set", "on"), InputError, "not NAME=VALUE"),
        ((*detect, "direct", "--toward", "refuse"), InputError, "needs the model"),
        (("steer", "lab-tiny", "--scenario", "no-such"), ScenarioError, "no scenario"),
        (("steer", "lab-tiny", "--scenario", scenario), ScenarioError, "title"),
        (("evaluate", "lab-tiny", "--suite", "nope"), UnknownNameError, "no suite nope"),
        (("generate", "lab-tiny"), InputError, "--prompt or --data"),
        (("report", tmp_path / "nowhere"), FileError, ""),
        (("lab", "build", "huge"), UnknownNameError, "no lab model"),
    ]
    for args, error, what in cases:
        _, _, raised = run(*args)  # type: ignore[arg-type]
        assert type(raised) is error, f"{args}: {raised!r}"
        assert what in raised.what and raised.where and raised.expected and raised.do
    assert not (tmp_path / "o.safetensors").exists() and not (tmp_path / "a").exists()


def test_the_entry_point_prints_the_four_parts_and_ends_with_2(tmp_path: Path) -> None:
    done = process("mask", "show", tmp_path / "none.safetensors")
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: could not read the file")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["where", "expected", "do"]


def test_quickstart_runs_and_steers() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "unsteered:" in done.stdout and "selections changed" in done.stdout


def test_the_generated_page_of_commands_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_cli.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

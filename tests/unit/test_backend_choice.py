"""The choice of a backend: what is refused, before anything slow and whether vLLM is installed or not."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesteer.backends import opening, sources
from moesteer.backends.vllm import starting
from moesteer.backends.vllm.output import Output, error_in, reason_in
from moesteer.cli.main import app
from moesteer.cli.options import engine_options
from moesteer.errors import (
    InputError,
    MaskMismatchError,
    MissingExtraError,
    ModelError,
    MoesteerError,
    UnknownNameError,
)


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as anybody looks before the engine."""
    monkeypatch.setattr(sources, "find_spec", lambda name: name)


def commands(folder: Path) -> dict[str, list[str]]:
    data = folder / "data.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    return {
        "generate": ["generate", "no/such-model", "--prompt", "hello"],
        "evaluate": ["evaluate", "no/such-model"],
        "capture": ["capture", "no/such-model", str(data), "--out", str(folder / "trace")],
    }


@pytest.mark.parametrize("verb", ["generate", "evaluate", "capture"])
@pytest.mark.parametrize(
    ("given", "kind", "what", "do"),
    [
        (["--backend", "tensorrt"], UnknownNameError, "no backend 'tensorrt'", "name one"),
        (["--engine-option", "block_size=16"], InputError, "no engine to set block_size of", "--backend vllm"),
        (["--backend", "vllm", "--device", "cuda"], InputError, "told 'cuda'", "tensor_parallel_size"),
        (["--backend", "vllm", "--quantize", "int8"], InputError, "int8", "quantization"),
        (["--backend", "vllm", "--engine-option", "block_size"], InputError, "not KEY=JSON", "tensor_parallel_size=2"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_the_model_is_looked_for(
    verb: str, given: list[str], kind: type[MoesteerError], what: str, do: str, with_vllm: None, tmp_path: Path
) -> None:
    error = CliRunner().invoke(app, [*commands(tmp_path)[verb], *given]).exception
    assert type(error) is kind and what in error.what and do in error.do and error.where and error.expected
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("verb", ["generate", "evaluate", "capture"])
def test_a_missing_vllm_is_named_with_its_pip_command(verb: str, no_vllm: None, tmp_path: Path) -> None:
    error = CliRunner().invoke(app, [*commands(tmp_path)[verb], "--backend", "vllm"]).exception
    assert type(error) is MissingExtraError and "pip install 'moesteer[vllm]'" in error.do


def test_engine_options_are_json_by_name() -> None:
    given = ["tensor_parallel_size=2", 'quantization="fp8"', "enforce-eager=false", 'hf={"a": [1]}', "swap_space = 4"]
    assert engine_options(given) == {
        "tensor_parallel_size": 2, "quantization": "fp8", "enforce_eager": False, "hf": {"a": [1]}, "swap_space": 4,
    }  # fmt: skip
    assert engine_options(None) == {}


@pytest.mark.parametrize(
    ("given", "what", "do"),
    [
        (["quantization=fp8"], "not KEY=JSON", "'quantization=\"fp8\"'"),
        (["=2"], "not KEY=JSON", "for example"),
        (["a b=2"], "not KEY=JSON", "for example"),
        (["block_size="], "not KEY=JSON", "for example"),
        (["block_size=16", "block-size=32"], "given twice", "for example"),
    ],
)
def test_wrong_engine_options_say_what_to_write(given: list[str], what: str, do: str) -> None:
    with pytest.raises(InputError) as caught:
        engine_options(given)
    assert what in caught.value.what and do in caught.value.do


@pytest.mark.parametrize(
    ("more", "kind", "what"),
    [
        ({"dtype": "float8"}, ModelError, "no dtype 'float8'"),
        ({"engine_options": {"dtype": "float16"}}, InputError, "dtype cannot be set"),
        ({"engine_options": {"hf_overrides": {"num_experts_per_tok": 1}}}, InputError, "hf_overrides cannot be set"),
        ({"engine_options": {"hf_token": "hf_x"}}, InputError, r"hf_token cannot be set(.|\n)*belongs into HF_TOKEN"),
    ],
)
def test_what_an_engine_may_not_be_told_is_refused_before_it_starts(
    more: dict[str, object], kind: type[MoesteerError], what: str, with_vllm: None
) -> None:
    with pytest.raises(kind, match=what), opening.opened("lab-tiny", backend="vllm", **more):  # type: ignore[arg-type]
        pass


def test_an_adapter_is_refused_with_what_to_do(with_vllm: None, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "lab-tiny"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with (
        pytest.raises(ModelError, match="adapter of PEFT") as caught,
        opening.opened(str(tmp_path), backend="vllm"),
    ):
        pass
    assert "merge" in caught.value.do


BEFORE = "(Worker pid=29363) ERROR 11-22 15:04:15 [multiproc_executor.py:953] "


def test_an_error_of_ours_is_read_back_from_what_a_process_printed() -> None:
    ours = MaskMismatchError("another checkpoint: a\\b", where="mask 0", expected="the one", do="use it: [x]")
    printed = "".join(f"{BEFORE}{line}\n" for line in f"moesteer.errors.MaskMismatchError: {ours}".splitlines())
    later = (
        "(EngineCore pid=2) ERROR 11-22 15:04:17 [core.py:1510] Exception: failed. See stack trace for root cause.\n"
    )
    found = error_in("noise\n" + printed + later)
    assert type(found) is MaskMismatchError and str(found) == str(ours)
    assert error_in(printed.replace("MaskMismatchError", "os")) is None and error_in("") is None


def test_of_other_errors_the_first_that_names_a_cause_is_taken() -> None:
    text = (
        "Traceback (most recent call last):\n"
        f"{BEFORE}Exception: WorkerProc initialization failed. See stack trace for root cause.\n"
        f"{BEFORE}ValueError: No available memory for the cache blocks.\n"
        "RuntimeError: another\n"
    )
    assert reason_in(text) == "ValueError: No available memory for the cache blocks."
    assert reason_in("(Worker pid=1) ERROR 1 2 [x.py:3] torch.cuda.OutOfMemoryError: of 2 GiB\n") == (
        "OutOfMemoryError: of 2 GiB"
    )
    assert reason_in("nothing of the kind") is None


def test_what_is_printed_at_the_start_goes_to_the_file_and_nothing_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    output = Output(tmp_path / "output.txt")
    with pytest.raises(KeyError), output.around_start():
        assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"
        os.write(1, b"first\n")
        os.write(2, f"{BEFORE}ValueError: one\n".encode())
        raise KeyError
    os.write(1, b"after\n")
    assert "VLLM_LOGGING_LEVEL" not in os.environ
    assert capfd.readouterr() == ("after\n", "")
    assert output.explained(RuntimeError("see above")) == "ValueError: one"
    assert output.explained(RuntimeError("two\nthree")) == "two three", "what was read is not read again"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    with Output(tmp_path / "none.txt").around_start():
        os.write(1, b"shown\n")
    assert capfd.readouterr() == ("", "shown\n") and not (tmp_path / "none.txt").exists()


def test_a_ctrl_c_that_is_swallowed_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "INSIST_S", 0.05)
    reached = []
    with pytest.raises(KeyboardInterrupt), starting._insisting():
        with contextlib.suppress(KeyboardInterrupt):  # as vLLM does
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        reached.append("swallowed")
        time.sleep(5)
        reached.append("lost")
    assert reached == ["swallowed"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), starting._insisting():  # what fails after it is not the reason
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        raise RuntimeError("Engine core initialization failed")


def test_sigterm_ends_the_block_as_an_exception_would() -> None:
    with pytest.raises(SystemExit) as caught, opening.ending_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

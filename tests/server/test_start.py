"""What `moesteer serve` refuses before anything answers, as far as no vLLM is needed to refuse it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moesteer.errors import InputError, MaskMismatchError, MoesteerError, NoEffectError
from moesteer.serve import server
from moesteer.serve.canary import State
from moesteer.serve.server import UNSAFE, Serving, settings_of
from tests.server.fakes import PIN, additive, run

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*UNSAFE, "VLLM_PLUGINS", "MOESTEER_VLLM"):
        monkeypatch.delenv(name, raising=False)


def serving(**more: Any) -> Serving:
    return Serving(**{"model": "lab-tiny", "pins": (Path("pin.safetensors"),), **more})


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("value", ["1", "true", "yes", "on", " 1 ", "2", "TRUE"])
def test_an_environment_that_opens_vllm_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=name) as caught:
        server.serve(serving())
    assert UNSAFE[name] in str(caught.value) and caught.value.exit_code == 2
    server._require_safe(serving(unsafe=True))


@pytest.mark.parametrize("value", ["", "0", "false", " 0 "])
def test_an_environment_that_says_no_is_fine(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in UNSAFE:
        monkeypatch.setenv(name, value)
    server._require_safe(serving())


def test_the_list_of_unsafe_variables_is_whole() -> None:
    assert set(UNSAFE) >= {
        "VLLM_SERVER_DEV_MODE",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY",
    }


@pytest.mark.parametrize("value", ["", "none", "moesteerx", "lora_filesystem_resolver", "MOESTEER"])
def test_a_plug_in_that_is_shut_out_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", value)
    with pytest.raises(NoEffectError, match="VLLM_PLUGINS"):
        server.serve(serving())
    monkeypatch.setenv("VLLM_PLUGINS", "other,moesteer")
    server._require_safe(serving())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "", "example.org", "127.0.0.1.example.org"])
def test_other_machines_need_keys(host: str) -> None:
    with pytest.raises(InputError, match="needs keys"):
        server._require_safe(serving(host=host))
    server._require_safe(serving(host=host, keys=Path("keys")))
    for own in ("127.0.0.1", "::1", "localhost"):
        server._require_safe(serving(host=own))


# ---------------------------------------------------------------- keys


def keys_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_file_of_keys_is_its_owners_alone(tmp_path: Path) -> None:
    assert server._keys(serving(keys=keys_file(tmp_path, f"alice:{KEY}"))).client(f"Bearer {KEY}") == "alice"
    for mode in (0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o666):
        with pytest.raises(InputError, match="read by others"):
            server._keys(serving(keys=keys_file(tmp_path, f"alice:{KEY}", mode)))
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(InputError, match="no such file"):
            server._keys(serving(keys=path))


@pytest.mark.parametrize("text", ["", "\n\n", "# alice:" + KEY])
def test_a_file_without_keys_does_not_open_the_server_to_all(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no key"):
        server._keys(serving(keys=keys_file(tmp_path, text), host="0.0.0.0"))


def test_a_wrong_file_of_keys_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        server._keys(serving(keys=keys_file(tmp_path, f"{KEY}{KEY}")))
    assert KEY not in str(caught.value)


# ---------------------------------------------------------------- masks


def test_a_server_without_masks_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to serve with"):
        settings_of(serving(pins=()))


def test_a_mask_of_another_model_is_refused(tmp_path: Path) -> None:
    additive(PIN).save(tmp_path / "pin.safetensors")
    with pytest.raises(MaskMismatchError):
        settings_of(serving(pins=(tmp_path / "pin.safetensors",)))


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"{}"])
def test_a_pin_that_is_no_mask_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "pin.safetensors").write_bytes(data)
    with pytest.raises(MoesteerError):
        settings_of(serving(pins=(tmp_path / "pin.safetensors",)))


# ---------------------------------------------------------------- what is said, and the end


def test_error_messages_are_cut_before_vllm_cleans_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def sanitize_message(message: str) -> str:
        lengths.append(len(message))
        return message.upper()

    package, users = "vllm.entrypoints.serve.exception_handling", ("utils", "handlers")
    for name in ("vllm", "vllm.entrypoints", "vllm.entrypoints.serve", package):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in users:
        module = ModuleType(f"{package}.{name}")
        module.sanitize_message = sanitize_message  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys.modules[package], name, module, raising=False)
    server.shorten_messages()
    server.shorten_messages()  # once is enough
    for name in users:
        assert sys.modules[f"{package}.{name}"].sanitize_message("/a" * 8_000) == "/A" * (server.MOST_SAID // 2)
        assert sys.modules[f"{package}.{name}"].sanitize_message("short") == "SHORT"
    assert max(lengths) == server.MOST_SAID and len(lengths) == 4


def test_a_server_that_no_longer_steers_says_so_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[int] = []

    async def fails(canary: Any, state: Any, *, every_s: float, timeout_s: float) -> None:
        state.reason = "the canary found the engine not steering"

    monkeypatch.setattr(server, "watch", fails)
    monkeypatch.setattr(server, "LINGER_S", 0.0)
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    state: Any = SimpleNamespace(reason="")
    run(lambda: server._watch(SimpleNamespace(), state, serving()))  # type: ignore[arg-type]
    assert raised == [signal.SIGTERM] and state.reason in capsys.readouterr().err


class Stopping:
    """An engine that looks like one that died once it was stopped, as vLLM's does."""

    def __init__(self) -> None:
        self.errored = False
        self.told: list[float] = []

    def shutdown(self, *, timeout: float) -> None:
        self.told.append(timeout)
        self.errored = True


def test_an_engine_that_is_told_to_stop_has_not_died() -> None:
    engine, state = Stopping(), State(reason="")
    why = server.why_it_ends(engine, state)
    engine.shutdown(timeout=1.5)
    state.reason = "the engine died"  # said of a request that came meanwhile
    assert engine.told == [1.5] and why() == ""


def test_why_a_server_ends_is_what_was_so_before_it_stopped() -> None:
    engine, state = Stopping(), State(reason="")
    why = server.why_it_ends(engine, state)
    state.reason = "the canary found it"
    engine.shutdown(timeout=0)
    assert why() == "the canary found it"
    engine = Stopping()
    why = server.why_it_ends(engine, State(reason=""))
    engine.errored = True
    assert why() == "the engine died"
    engine.shutdown(timeout=0)
    assert why() == "the engine died"

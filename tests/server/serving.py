"""A real `moesteer serve` in a process of its own, and what to ask it with."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesteer.backends.hf import Model
from moesteer.mask import Intent, MaskInfo, SteeringMask

ADMIN = "the-admin-of-the-tests"
START_S = 240
RUN = [sys.executable, "-c", "from moesteer.cli.main import run; run()"]


def environment(**more: str) -> dict[str, str]:
    """The process's environment: small, quiet, and nothing of ours or vLLM's left over from outside."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "MOESTEER_"))}
    return {
        **kept, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "MOESTEER_ADMIN_TOKEN": ADMIN, **more,
    }  # fmt: skip


@dataclass
class Served:
    """A server, its port and its process."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    audit: Path
    headers: dict[str, str] = field(default_factory=dict)

    def ask(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body). body: JSON, or bytes as they are. The path goes out as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            given = {"content-type": "application/json", **(headers or {})}
            connection.request(method, path, data, given)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def ready(self) -> int:
        """The status of /ready; 0 where nobody answers."""
        try:
            return self.ask("GET", "/ready", timeout=2)[0]
        except OSError:
            return 0

    def status(self) -> dict[str, Any]:
        """What the admin sees."""
        code, _, body = self.ask("GET", "/plugins/moesteer/status", headers={"authorization": f"Bearer {ADMIN}"})
        assert code == 200
        found: dict[str, Any] = json.loads(body)
        return found

    def chat(self, messages: Sequence[dict[str, Any]] | str, mask: str | None = None, **more: Any) -> str:
        """The greedy answer."""
        return self.chatted(messages, mask, **more)[1]

    def chatted(
        self, messages: Sequence[dict[str, Any]] | str, mask: str | None = None, *, timeout: float = 60, **more: Any
    ) -> tuple[int, str, str]:
        """(status, text, header)."""
        talk = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        asked: dict[str, Any] = {"model": "lab-tiny", "messages": talk, "max_tokens": 16, "temperature": 0, **more}
        if mask is not None:
            asked["vllm_xargs"] = {"moesteer_mask": mask}
        code, headers, body = self.ask("POST", "/v1/chat/completions", asked, timeout=timeout)
        text = json.loads(body)["choices"][0]["message"]["content"] if code == 200 else body.decode()
        return code, text, headers.get("x-moesteer-mask", "")

    def completed(self, prompt: Any, mask: str | None = None, **more: Any) -> str:
        """The greedy continuation of a bare prompt."""
        asked: dict[str, Any] = {"model": "lab-tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, **more}
        if mask is not None:
            asked["vllm_xargs"] = {"moesteer_mask": mask}
        code, _, body = self.ask("POST", "/v1/completions", asked)
        assert code == 200, body
        text: str = json.loads(body)["choices"][0]["text"]
        return text

    def workers(self) -> list[Any]:
        """The processes that hold the model (psutil's), the deepest first."""
        import psutil

        mine = psutil.Process(self.process.pid).children(recursive=True)
        return [
            one for one in reversed(mine) if "VLLM" in " ".join(one.cmdline() or [one.name()]) or "VLLM" in one.name()
        ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def words(port: int, *more: object, engine: Sequence[str] = ()) -> list[str]:
    """The command line."""
    given = ["serve", "lab-tiny", "--port", str(port), *map(str, more)]
    return [*RUN, *given, "--", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "16", *engine]


@contextmanager
def serving(
    folder: Path, *more: object, env: dict[str, str] | None = None, engine: Sequence[str] = ()
) -> Iterator[Served]:
    """A server that is ready, until the block ends; then nothing of it is left."""
    port, log, audit = free_port(), folder / "serve.log", folder / "audit.log"
    with open(log, "wb") as handle:
        process = subprocess.Popen(
            words(port, "--audit", audit, *more, engine=engine), stdout=handle, stderr=handle, stdin=subprocess.DEVNULL,
            env=environment(**(env or {})), start_new_session=True,
        )  # fmt: skip
    served = Served(port, process, log, audit)
    try:
        until(lambda: served.ready() == 200 or process.poll() is not None, seconds=START_S)
        assert served.ready() == 200, f"it ended with {process.returncode}:\n{log.read_text()[-3000:]}"
        yield served
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started."""
    import psutil

    try:
        rest = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        rest = []
    for one in rest:
        if one.is_running():
            one.kill()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


def fails(
    folder: Path, *more: object, env: dict[str, str] | None = None, engine: Sequence[str] = ()
) -> tuple[int, str, list[int]]:
    """(exit code, what it printed, statuses of /ready meanwhile) of a server that is not to start."""
    port, log = free_port(), folder / "fails.log"
    with open(log, "wb") as handle:
        process = subprocess.Popen(
            words(port, *more, engine=engine), stdout=handle, stderr=handle, stdin=subprocess.DEVNULL,
            env=environment(**(env or {})), start_new_session=True,
        )  # fmt: skip
    served, seen = Served(port, process, log, log), []
    try:
        limit = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < limit:
            seen.append(served.ready())
            time.sleep(0.2)
        assert process.poll() is not None, "it did not end"
        return int(process.returncode), log.read_text(), seen
    finally:
        end(process)


def until(done: Callable[[], bool], *, seconds: float, every: float = 0.05) -> float:
    """Wait, and give the seconds it took. Fails after `seconds`."""
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < seconds, f"not in {seconds} s"
        time.sleep(every)
    return time.monotonic() - start


def half(model: Model, seed: int, *, second: bool = False, size: float = 2.5) -> SteeringMask:
    """A random mask on one half of every layer's experts, so that two of them never touch the same one."""
    layers, experts = len(model.routers), model.fingerprint.experts
    strength_LE = np.random.default_rng(seed).normal(scale=size, size=(layers, experts)).astype(np.float32)
    strength_LE[:, : experts // 2] *= not second
    strength_LE[:, experts // 2 :] *= second
    made = MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="test"))
    return SteeringMask(made, strength_LE=strength_LE, sigma_L=np.ones(layers, dtype=np.float32))

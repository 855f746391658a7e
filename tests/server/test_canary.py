"""The handshake and the canary: each way in which an engine may stop steering ends all answers. Needs no vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesteer.backends.vllm.catalogue import RAW, Catalogue
from moesteer.errors import NoEffectError
from moesteer.serve.canary import COARSE, Canary, State, watch
from moesteer.serve.gated import GatedEngine
from tests.server.fakes import (
    LAYERS,
    OTHER,
    PIN,
    Answer,
    Client,
    FakeChat,
    FakeEngine,
    additive,
    gated,
    named,
    pinned,
    policy,
    run,
)
from tests.server.fakes import catalogue as two

pytestmark = pytest.mark.usefixtures("no_vllm")
Reports = list[dict[str, Any]]


def canary(engine: FakeEngine) -> Canary:
    """The canary of a fake engine."""
    door = GatedEngine(engine, engine.catalogue, FakeChat(), tensor_ranks=engine.tensor)  # type: ignore[arg-type]
    return Canary(door, LAYERS)


def started(engine: FakeEngine) -> Canary:
    found = canary(engine)
    run(found.start)
    return found


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (4, 1)])
def test_an_engine_that_steers_passes(tensor: int, pipeline: int) -> None:
    engine = FakeEngine(two(), tensor=tensor, pipeline=pipeline)
    found = started(engine)
    for _ in range(3):
        run(found.check)
    assert {row for row, _, _ in engine.asked} == {"!1", RAW} and "moesteer_reset" in engine.calls
    params = engine.asked[0][1]
    assert params.temperature == 0 and params.max_tokens == params.min_tokens and params.skip_reading_prefix_cache


def test_a_gated_pin_is_proved_with_its_gate_open() -> None:
    engine = FakeEngine(Catalogue([pinned(gated(additive(PIN))), named("other", additive(OTHER))]))
    started(engine)
    assert {row for row, _, _ in engine.asked} == {"!1", RAW}


def test_masks_without_a_pin_are_proved_by_the_handshake() -> None:
    engine = FakeEngine(Catalogue([named("other", additive(OTHER))]))
    run(started(engine).check)


def put(**values: Any) -> Callable[[Reports], Reports]:
    """Say something else of the last worker."""
    return lambda reports: [*reports[:-1], {**reports[-1], **values}]


HANDSHAKE: dict[str, tuple[Callable[[Reports], Reports], str]] = {
    "a worker is missing": (lambda reports: reports[:-1], "1 of 2 workers answered"),
    "no worker": (lambda reports: [], "0 of 2 workers"),
    "a worker too many": (lambda reports: [*reports, reports[0]], "3 of 2 workers"),
    "another catalogue": (put(catalogue="0" * 64), "worker 1 has other masks"),
    "tables changed": (put(intact=False), "worker 1's tables have changed"),
    "a router that is not steered": (put(patched=2), "steers 2 of 3 routers"),
    "no router": (put(patched=0, layer_ids=[], beats=[]), "routers of the layers"),
    "a router less": (put(patched=2, layer_ids=[1, 3], beats=[8, 8]), r"layers \[1, 3\] are steered"),
    "other routers": (put(layer_ids=[1, 3, 5]), r"layers \[1, 3, 5\] are steered"),
    "one router twice": (put(layer_ids=[1, 3, 3]), "are steered"),
}
CHECK: dict[str, tuple[Callable[[Reports], Reports], str]] = {
    "a layer that did not beat": (put(beats=[8, 0, 8]), r"layers \[3\] were not steered"),
    "a layer that beat too rarely": (put(beats=[8, 8, 7]), r"layers \[4\] were not steered"),
    "no layer beat": (put(beats=[0, 0, 0]), r"layers \[1, 3, 4\] were not steered"),
    "a force that was not followed": (put(forced=80, wrong=1), "1 of 80 forced"),
}


@pytest.mark.parametrize("fault", HANDSHAKE)
def test_a_wrong_handshake_is_no_start(fault: str) -> None:
    change, words = HANDSHAKE[fault]
    with pytest.raises(NoEffectError, match=words):
        started(FakeEngine(two(), tensor=2, change=change))


@pytest.mark.parametrize("fault", [*HANDSHAKE, *CHECK])
def test_what_goes_wrong_later_is_found_by_the_next_check(fault: str) -> None:
    change, words = {**HANDSHAKE, **CHECK}[fault]
    engine = FakeEngine(two(), tensor=2)
    found = started(engine)
    engine.change = change
    with pytest.raises(NoEffectError, match=words):
        run(found.check)


@pytest.mark.parametrize("fault", CHECK)
def test_a_wrong_first_check_is_no_start(fault: str) -> None:
    with pytest.raises(NoEffectError, match=CHECK[fault][1]):
        started(FakeEngine(two(), tensor=2, change=CHECK[fault][0]))


def test_pinned_masks_that_change_nothing_are_no_start() -> None:
    found = two()
    engine = FakeEngine(found)
    asked = engine.generate

    async def alike(prompt: Any, params: Any, request_id: str, **more: Any) -> Any:
        async for output in asked(prompt, params, request_id, **more):
            for entry, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True):
                entry[token].logprob = -1.0
            yield output

    engine.generate = alike  # type: ignore[method-assign]
    with pytest.raises(NoEffectError, match="change nothing"):
        started(engine)


@pytest.mark.parametrize(
    ("dtype", "shift", "fine"),
    [("torch.float32", 5e-4, True), ("torch.float32", 2e-3, False), ("torch.bfloat16", COARSE * 0.9, True),
     ("torch.bfloat16", COARSE * 1.1, False), ("torch.float32", -2e-3, False), ("torch.float32", float("nan"), False),
     ("torch.bfloat16", float("inf"), False)],
)  # fmt: skip
def test_another_answer_than_at_the_start_is_found(dtype: str, shift: float, fine: bool) -> None:
    engine = FakeEngine(two(), dtype=dtype)
    found = started(engine)
    engine.shift = shift
    if fine:
        run(found.check)
        return
    with pytest.raises(NoEffectError, match="another than at the start"):
        run(found.check)


def test_an_answer_of_another_row_is_found() -> None:
    """The engine takes the canary's request for an unsteered one, and says all else is well."""
    engine = FakeEngine(two())
    found = started(engine)
    found.row = engine.catalogue.by_name[RAW]
    with pytest.raises(NoEffectError, match="another than at the start"):
        run(found.check)


@pytest.mark.parametrize("finish", ["abort", "error", None, ""])
def test_an_answer_that_was_cut_off_is_none(finish: str) -> None:
    engine = FakeEngine(two())
    found = started(engine)
    engine.finish = finish
    with pytest.raises(NoEffectError, match="no answer"):
        run(found.check)
    with pytest.raises(NoEffectError, match="no answer"):
        started(FakeEngine(two(), finish=finish))


# ---------------------------------------------------------------- the watch


def after(fault: Callable[[FakeEngine], None], *, timeout_s: float = 5.0) -> tuple[State, float]:
    """The state after a fault in an engine that is watched, and the seconds it took."""
    engine = FakeEngine(two())
    found = started(engine)

    async def watched() -> tuple[State, float]:
        state = State(reason="")
        task = asyncio.create_task(watch(found, state, every_s=0.02, timeout_s=timeout_s))
        while state.canaries < 3:
            await asyncio.sleep(0.005)
        assert state.ready
        fault(engine)
        start = asyncio.get_running_loop().time()
        await task
        return state, asyncio.get_running_loop().time() - start

    result: tuple[State, float] = run(watched)
    return result


class OddError(Exception):
    def __str__(self) -> str:
        return "\nthe first line is empty"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda e: setattr(e, "shift", 0.5), "another than at the start"),
        (lambda e: setattr(e, "change", put(intact=False)), "tables have changed"),
        (lambda e: setattr(e, "change", put(beats=[1, 0, 1])), "not steered"),
        (lambda e: setattr(e, "change", put(beats=[])), "not steer|empty|argument"),
        (lambda e: setattr(e, "change", lambda reports: [{}]), "catalogue"),
        (lambda e: setattr(e, "change", lambda reports: None), "None|len"),
        (lambda e: setattr(e, "raises", RuntimeError("the engine died")), "the engine died"),
        (lambda e: setattr(e, "raises", RuntimeError()), "RuntimeError"),
        (lambda e: setattr(e, "raises", OddError()), "OddError"),
        (lambda e: setattr(e, "raises", TimeoutError()), "no answer"),
        (lambda e: setattr(e, "finish", "abort"), "no answer"),
    ],
)
def test_the_first_failure_ends_the_answers_within_an_interval(fault: Callable[[FakeEngine], None], words: str) -> None:
    import re

    state, seconds = after(fault)
    assert not state.ready and re.search(words, state.reason) and "\n" not in state.reason
    assert seconds < 1.0


def test_an_answer_that_does_not_come_ends_the_answers() -> None:
    state, seconds = after(lambda engine: setattr(engine, "hang", True), timeout_s=0.2)
    assert not state.ready and "no answer in 0.2 s" in state.reason and 0.15 < seconds < 1.0


def test_the_watch_ends_with_the_server() -> None:
    found = started(FakeEngine(two()))

    async def stopped() -> State:
        state = State(reason="")
        task = asyncio.create_task(watch(found, state, every_s=0.01, timeout_s=5))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return state

    assert run(stopped).ready


def test_requests_are_refused_once_the_canary_has_failed() -> None:
    door = policy()
    engine = door.gated.engine

    async def story() -> list[int]:
        found = Canary(door.gated, LAYERS)
        await found.start()
        task = asyncio.create_task(watch(found, door.state, every_s=0.02, timeout_s=5))
        before = await Client(door).ask()
        engine.change = put(intact=False)
        await task
        later: Answer = await Client(door).ask()
        ready = await Client(door).ask("GET", "/ready")
        engine.change = lambda reports: reports  # well again: but nobody knows what happened in between
        return [before.status, later.status, ready.status, (await Client(door).ask()).status]

    assert run(story) == [200, 503, 503, 503]


def test_the_prompt_is_fixed_and_not_empty() -> None:
    assert canary(FakeEngine(two())).prompt["prompt_token_ids"]
    assert isinstance(started(FakeEngine(two())).reference, np.ndarray)

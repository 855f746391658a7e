"""The handshake and the canary: each way in which an engine may stop steering ends all answers. Needs no vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesteer.backends.vllm.catalogue import RAW, Catalogue
from moesteer.backends.vllm.requests import salted
from moesteer.errors import NoEffectError
from moesteer.serve.canary import COARSE, MOST_OFFERED, TOKENS, Canary, State, watch
from moesteer.serve.gated import GatedEngine
from tests.server.fakes import (
    EXPERTS,
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


@pytest.mark.parametrize(
    ("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (4, 1), (1, 4), (2, 4), (1, 6)]
)
def test_an_engine_that_steers_passes(tensor: int, pipeline: int) -> None:
    """Also one whose later stages have no routers: three layers make three stages at most."""
    engine = FakeEngine(two(), tensor=tensor, pipeline=pipeline)
    found = started(engine)
    for _ in range(3):
        run(found.check)
    assert {row for row, _, _ in engine.asked} == {"!1", RAW, "!1+other"} and "moesteer_reset" in engine.calls
    empty = [report for report in run(found.look) if not report["layer_ids"]]
    assert len(empty) == tensor * max(pipeline - len(LAYERS), 0) and all(report["beats"] == [] for report in empty)


def test_the_answer_of_the_start_is_put_again_word_by_word() -> None:
    engine = FakeEngine(two())
    found = started(engine)
    run(found.check)
    (_, first, _), *others = engine.asked
    assert first.temperature == 0 and first.max_tokens == first.min_tokens == TOKENS and first.ignore_eos
    assert engine.prompts[0]["prompt_token_ids"] == found.prompt and len(found.answer) == TOKENS
    for (_, params, _), prompt in zip(others, engine.prompts[1:], strict=True):
        assert params.prompt_logprobs == 0 and params.max_tokens == 1 and params.temperature == 0
        assert prompt["prompt_token_ids"] == [*found.prompt, *found.answer]
    lengths = {len(reference) for reference in found.references.values()}
    assert lengths == {len(found.prompt) + TOKENS - 1}  # nothing stands before the first


@pytest.mark.parametrize("cut", ["none", "shorter", "another token"])
def test_log_probabilities_that_do_not_come_are_no_answer(cut: str) -> None:
    engine = FakeEngine(two())
    found = started(engine)
    asked = engine.generate

    async def less(prompt: Any, params: Any, request_id: str, **more: Any) -> Any:
        async for output in asked(prompt, params, request_id, **more):
            weighed = output.prompt_logprobs
            output.prompt_logprobs = {
                "none": None, "shorter": weighed[:-1], "another token": [*weighed[:-1], {-1: weighed[-1]}],
            }[cut]  # fmt: skip
            yield output

    found.gated._generate = less
    with pytest.raises((NoEffectError, KeyError)):
        run(found.check)


def many(count: int) -> Catalogue:
    """A pin, and masks to name, `m00` and on, in no order."""
    offered = [named(f"m{i:02}", additive({(1, i % EXPERTS): 0.5 + i})) for i in range(count)]
    return Catalogue([pinned(additive(PIN)), *offered[::-1]])


@pytest.mark.parametrize("count", [0, 1, 3, MOST_OFFERED, MOST_OFFERED + 4])
def test_the_pins_are_looked_at_in_every_check_and_one_offered_mask_in_turn(count: int) -> None:
    engine = FakeEngine(many(count))
    found = started(engine)
    looked_at = [f"!1+m{i:02}" for i in range(min(count, MOST_OFFERED))]
    assert [row.name for row in found.rows] == ["!1", *looked_at] and list(found.references) == ["!1", *looked_at]
    seen = []
    for _ in range(2 * MOST_OFFERED):
        engine.asked.clear()
        run(found.check)
        names = [row for row, _, _ in engine.asked]
        assert names[0] == "!1" and len(names) == 1 + bool(count)
        seen += names[1:]
    if count:
        assert set(seen[: len(looked_at)]) == set(looked_at)
        assert seen[: -len(looked_at)] == seen[len(looked_at) :]


def test_an_offered_mask_that_no_longer_acts_is_found_when_its_turn_comes() -> None:
    engine = FakeEngine(many(3))
    found = started(engine)
    engine.taken_for = {"!1+m01": "!1"}
    caught = 0
    for _ in range(3):
        try:
            run(found.check)
        except NoEffectError as error:
            assert "another than at the start" in str(error)
            caught += 1
    assert caught == 1


def test_the_canary_is_nobodys_client() -> None:
    """Its cache is no client's, and no client's messages are taken for its own."""
    engine = FakeEngine(two())
    run(started(engine).check)
    rows = engine.catalogue.by_name
    assert engine.salts == [salted(rows[name], None) for name, _, _ in engine.asked]
    assert all("cache_salt" not in prompt for prompt in engine.prompts)


def test_a_gated_pin_is_proved_with_its_gate_open() -> None:
    engine = FakeEngine(Catalogue([pinned(gated(additive(PIN))), named("other", additive(OTHER))]))
    found = started(engine)
    run(found.check)
    assert {row for row, _, _ in engine.asked} == {"!1", RAW, "!1+other"}
    assert [row.name for row in found.rows] == ["!1", "!1+other"]


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
    "another version": (put(version="0.0.0"), "worker 1 runs moesteer 0.0.0, this process"),
    "one rank twice": (put(rank=0), "two workers have one rank"),
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


def filled(count: int) -> dict[tuple[int, int], float]:
    """So many entries of the table, of 24."""
    return {(at // EXPERTS, at % EXPERTS): 1.0 for at in range(count)}


HALF = len(LAYERS) * EXPERTS // 2


@pytest.mark.parametrize("count", [HALF, HALF + 1, 2 * HALF])
def test_dense_masks_that_change_nothing_are_no_start(count: int) -> None:
    with pytest.raises(NoEffectError, match="change nothing"):
        started(FakeEngine(Catalogue([pinned(additive(filled(count)))]), alike=True))
    with pytest.raises(NoEffectError, match="change nothing"):
        started(FakeEngine(Catalogue([named("all", additive(filled(count)))]), alike=True))
    halves = [pinned(additive(filled(HALF - 1))), pinned(additive({(2, 7): 1.0}), number=2)]
    with pytest.raises(NoEffectError, match="change nothing"):  # together they are dense
        started(FakeEngine(Catalogue(halves), alike=True))


def test_sparse_masks_may_change_nothing_in_one_prompt_and_are_listed() -> None:
    sparse = pinned(additive(filled(HALF - 1)))
    engine = FakeEngine(Catalogue([sparse, named("other", additive({(2, 7): 1.0}))]), taken_for={"!1": RAW})
    found = started(engine)
    assert found.idle == ["!1"]
    run(found.check)  # idle or not, it is looked at
    engine.shifts = {"!1": 0.1}
    with pytest.raises(NoEffectError, match="another than at the start"):
        run(found.check)
    assert started(FakeEngine(two(), alike=True)).idle == ["!1", "!1+other"]
    assert started(FakeEngine(two())).idle == []


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
    engine.taken_for = {"!1": RAW}
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
        (lambda e: setattr(e, "change", lambda reports: [{}]), "rank"),
        (lambda e: setattr(e, "change", lambda reports: None), "None|len"),
        (lambda e: setattr(e, "raises", RuntimeError("the engine died")), "the engine died"),
        (lambda e: setattr(e, "raises", RuntimeError()), r"^RuntimeError\(\)$"),
        (lambda e: setattr(e, "raises", OddError()), r"^OddError\(\)$"),
        (lambda e: setattr(e, "raises", TimeoutError()), r"^TimeoutError\(\)$"),
        (lambda e: setattr(e, "finish", "abort"), "no answer"),
    ],
)
def test_the_first_failure_ends_the_answers_within_an_interval(fault: Callable[[FakeEngine], None], words: str) -> None:
    import re

    state, seconds = after(fault)
    assert not state.ready and re.search(words, state.reason) and "\n" not in state.reason
    assert seconds < 1.0


def test_an_answer_that_does_not_come_while_nothing_runs_ends_the_answers() -> None:
    state, seconds = after(lambda engine: setattr(engine, "hang", True), timeout_s=0.2)
    assert not state.ready and "the workers made no step in 0.2 s" in state.reason and 0.15 < seconds < 1.0


def test_workers_that_give_no_sign_end_the_answers() -> None:
    state, seconds = after(lambda engine: setattr(engine, "mute", True), timeout_s=0.2)
    assert not state.ready and "gave no sign in 0.2 s" in state.reason and 0.15 < seconds < 1.0


def test_workers_that_stop_after_a_while_end_the_answers() -> None:
    """First they get on with other things, then with nothing."""

    def fault(engine: FakeEngine) -> None:
        engine.hang = engine.busy = True
        asyncio.get_running_loop().call_later(0.7, lambda: setattr(engine, "busy", False))

    state, seconds = after(fault, timeout_s=0.1)
    assert not state.ready and "made no step" in state.reason and 0.7 < seconds < 2.0


def test_workers_whose_report_is_an_error_end_the_answers() -> None:
    def fault(engine: FakeEngine) -> None:
        async def dead(name: str, args: Any = ()) -> Any:
            raise RuntimeError("the engine's core died")

        engine.hang = True
        asyncio.get_running_loop().call_later(0.15, lambda: setattr(engine, "collective_rpc", dead))

    state, seconds = after(fault, timeout_s=0.1)
    assert state.reason == "the engine's core died" and seconds < 1.0


def test_a_canary_that_waits_its_turn_is_waited_for() -> None:
    """Ten times the timeout, while the workers get on with others' requests: load is no tampering."""
    engine = FakeEngine(two())
    found = started(engine)

    async def watched() -> tuple[State, float]:
        engine.delay, engine.busy = 0.5, True  # two requests a check
        state = State(reason="")
        task = asyncio.create_task(watch(found, state, every_s=0.01, timeout_s=0.1))
        start = asyncio.get_running_loop().time()
        while state.ready and state.canaries < 2:
            await asyncio.sleep(0.01)
        took = asyncio.get_running_loop().time() - start
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return state, took

    state, took = run(watched)
    assert state.ready and state.canaries == 2 and took > 1.9


def test_a_canary_that_waited_its_turn_is_believed_when_it_fails() -> None:
    def fault(engine: FakeEngine) -> None:
        engine.delay, engine.busy, engine.shift = 0.4, True, 0.5

    state, _ = after(fault, timeout_s=0.1)
    assert "another than at the start" in state.reason


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
    assert canary(FakeEngine(two())).prompt == canary(FakeEngine(two())).prompt != []
    references = started(FakeEngine(two())).references
    assert all(isinstance(found, np.ndarray) and np.isfinite(found).all() for found in references.values())

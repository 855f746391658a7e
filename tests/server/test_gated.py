"""Gates before the engine's `generate`: when they are asked, and what happens where nobody can. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from jinja2 import TemplateError

from moesteer.backends.vllm.catalogue import RAW, Catalogue
from moesteer.backends.vllm.requests import MASK, READ, ROW, TICKET, salted
from moesteer.errors import DataError, InputError, ModelError, NanLogitsError, NoEffectError
from moesteer.gate import Pool
from moesteer.serve.gated import Asking, GatedEngine, asking
from tests.server.fakes import OTHER, PIN, FakeChat, FakeEngine, Params, additive, gated, named, pinned, run

pytestmark = pytest.mark.usefixtures("no_vllm")
TALK = (
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "paint a pot"},
)
IDS = [1, 5, 1, 2, 1, 11]
"""TALK's tokens, as FakeChat makes them; the last turn begins at 4."""


def door(pool: Pool = "final_turn", *, pin: bool = False, score: float = 5.0, error: Exception | None = None,
         tensor: int = 1, pipeline: int = 1) -> GatedEngine:  # fmt: skip
    """A plain pin with a gated mask `asks` to name; or (pin) a gated pin with `other`. score: of each worker."""
    gate = gated(additive({(1, 3): 1.0}), pool=pool)
    members = [pinned(gate), named("other", additive(OTHER))] if pin else [pinned(additive(PIN)), named("asks", gate)]
    made = Catalogue(members)
    engine = FakeEngine(made, tensor=tensor, pipeline=pipeline)
    engine.scores = [[[score] * len(made.gate_parts())]] * (tensor * pipeline)
    return GatedEngine(engine, made, FakeChat(error), tensor_ranks=tensor)  # type: ignore[arg-type]


def ask(
    found: GatedEngine,
    mask: str | None = None,
    *,
    ids: Sequence[int] | None = IDS,
    talk: Any = TALK,
    prompt: Any = None,
    client: str = "web",
) -> str:
    """The row of the real request."""

    async def asked() -> None:
        token = asking.set(Asking(client, talk))
        try:
            given = {"prompt_token_ids": list(ids or [])} if prompt is None else prompt
            params = Params(extra_args=None if mask is None else {MASK: mask})
            async for _ in found.generate(given, params, "r"):
                pass
        finally:
            asking.reset(token)

    run(asked)
    row: str = found.engine.asked[-1][0]
    return row


@pytest.mark.parametrize("pool", ["last", "prompt", "final_turn", "last+final_turn"])
@pytest.mark.parametrize(("score", "row", "pinned_row"), [(5.0, "!1+asks", "!1"), (-5.0, "!1", RAW)])
def test_the_gate_decides_and_reads_unsteered(pool: Pool, score: float, row: str, pinned_row: str) -> None:
    found = door(pool, score=score)
    assert ask(found, "asks") == row
    (probe, params, name), (real, real_params, _) = found.engine.asked
    assert probe == RAW and real == row and name.startswith("gate-")
    reading = params.extra_args[READ]
    assert reading["gate"] and reading["prompt"] == len(IDS) and reading["final_turn"] == 4
    assert params.max_tokens == 1 and params.skip_reading_prefix_cache
    assert READ not in real_params.extra_args and TICKET not in real_params.extra_args
    assert (found.asked, found.fired, found.untold) == (1, int(score > 0), 0)
    assert ask(door(pool, score=score, pin=True)) == pinned_row
    assert ask(door(pool, score=score, pin=True), "other") == ("!1+other" if score > 0 else "other")


def test_a_mask_without_a_gate_asks_nothing() -> None:
    found = door()
    assert ask(found) == "!1" and len(found.engine.asked) == 1 and "moesteer_scores" not in found.engine.calls


def test_probe_and_answer_have_caches_of_their_own() -> None:
    found = door()
    ask(found, "asks")
    assert len(set(found.engine.salts)) == 2


@pytest.mark.parametrize("own", [{}, {"cache_salt": None}, {"cache_salt": ""}, {"cache_salt": "bob"}], ids=repr)
def test_a_clients_cache_is_its_own_whatever_the_prompt_says(own: dict[str, Any]) -> None:
    found, prompt = door(), {"prompt_token_ids": IDS, **own}
    assert ask(found, "asks", prompt=prompt, client="alice") == "!1+asks"
    assert [given["cache_salt"] for given in found.engine.prompts] == ["alice", "alice"]
    rows = found.catalogue.by_name
    assert found.engine.salts == [salted(rows[RAW], "alice"), salted(rows["!1+asks"], "alice")]
    assert prompt == {"prompt_token_ids": IDS, **own}  # the caller's is left as it was
    ask(found, "asks", prompt=prompt, client="bob")
    assert len(set(found.engine.salts)) == 4


def test_without_a_client_a_prompt_keeps_what_it_has() -> None:
    found = door()
    ask(found, "asks", client="")
    assert all("cache_salt" not in given for given in found.engine.prompts)
    ask(found, prompt={"prompt_token_ids": IDS, "cache_salt": "own"}, client="")
    assert found.engine.salts[-1].endswith(":own")


NOBODY_CAN_TELL: dict[str, dict[str, Any]] = {
    "a bare prompt": {"talk": None},
    "other tokens": {"ids": [*IDS, 7]},
    "fewer tokens": {"ids": IDS[:-1]},
    "tools": {"talk": (*TALK[:-1], {**TALK[-1], "tool_calls": [{"id": "x"}]})},
    "an image": {"talk": ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},)},
    "text and image": {"talk": ({"role": "user", "content": [{"type": "text", "text": "hello"},
    {"type": "image_url"}]},)},
    "two texts": {"talk": ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text",
    "text": "b"}]},)},
    "no content": {"talk": ({"role": "user"},)},
    "content null": {"talk": ({"role": "user", "content": None},)},
    "content a number": {"talk": ({"role": "user", "content": 5},)},
    "content an object": {"talk": ({"role": "user", "content": {"text": "hello"}},)},
    "parts no objects": {"talk": ({"role": "user", "content": ["hello"]},)},
    "a text that is none": {"talk": ({"role": "user", "content": [{"type": "text", "text": None}]},)},
    "no role": {"talk": ({"content": "hello"},)},
    "no messages": {"talk": ()},
}  # fmt: skip


@pytest.mark.parametrize("case", NOBODY_CAN_TELL)
@pytest.mark.parametrize("pool", ["final_turn", "last+final_turn"])
def test_where_nobody_can_tell_the_turn_the_mask_acts_unasked(case: str, pool: Pool) -> None:
    found = door(pool, score=-5.0)
    assert ask(found, "asks", **NOBODY_CAN_TELL[case]) == "!1+asks"
    assert (found.asked, found.untold) == (0, 1) and len(found.engine.asked) == 1
    assert ask(door(pool, score=-5.0, pin=True), **NOBODY_CAN_TELL[case]) == "!1"


@pytest.mark.parametrize("case", NOBODY_CAN_TELL)
def test_a_gate_that_reads_the_whole_prompt_is_asked_all_the_same(case: str) -> None:
    for pool in ("prompt", "last"):
        found = door(pool, score=-5.0)  # type: ignore[arg-type]
        assert ask(found, "asks", **NOBODY_CAN_TELL[case]) == "!1" and found.asked == 1
        assert found.engine.asked[0][1].extra_args[READ]["final_turn"] == -1


@pytest.mark.parametrize(
    "prompt", ["text", {"prompt_embeds": [0.0]}, {"prompt_token_ids": []}, {"prompt_token_ids": None}, {}, None]
)
@pytest.mark.parametrize("pool", ["prompt", "last", "final_turn"])
def test_a_prompt_without_tokens_is_steered_unasked(prompt: Any, pool: Pool) -> None:
    if prompt is None:
        prompt = ("no", "tokens")
    found = door(pool, score=-5.0)
    assert ask(found, "asks", prompt=prompt) == "!1+asks" and found.untold == 1


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), TypeError("x"), KeyError("x"), DataError("x", where="", expected="", do=""),
     ModelError("x", where="", expected="", do=""), IndexError("x"), TemplateError("x")],
    ids=repr,
)  # fmt: skip
def test_a_conversation_that_the_template_does_not_take_is_steered_unasked(error: Exception) -> None:
    assert ask(door(error=error, score=-5.0), "asks") == "!1+asks"


def test_plain_text_may_come_in_parts_and_with_names() -> None:
    talk = (
        *TALK[:-1],
        {"role": "user", "content": [{"type": "text", "text": "paint a pot"}], "name": "bob", "tool_calls": None},
    )
    assert door().final_turn(IDS) is None
    found = door(score=-5.0)
    assert ask(found, "asks", talk=talk) == "!1" and found.asked == 1


@pytest.mark.parametrize(
    ("scores", "error"),
    [
        ([], NoEffectError), ([["4 of its positions were read"]], NoEffectError),
        ([["it was not read"]], NoEffectError),
        ([[[float("nan")]]], NanLogitsError), ([[[float("inf")]]], NanLogitsError),
    ],
)  # fmt: skip
def test_a_gate_that_could_not_read_is_an_error_and_no_answer(scores: list[Any], error: type[Exception]) -> None:
    found = door("prompt")
    found.engine.scores = scores
    with pytest.raises(error):
        ask(found, "asks")
    assert [row for row, _, _ in found.engine.asked] == [RAW] and found.asked == 0


@pytest.mark.parametrize("finish", ["abort", "error", None])
def test_a_probe_that_was_cut_off_is_an_error_and_no_answer(finish: str | None) -> None:
    found = door("prompt")
    found.engine.finish = finish
    with pytest.raises(NoEffectError, match="ended with"):
        ask(found, "asks")
    assert len(found.engine.asked) == 1


def test_every_stage_of_the_pipeline_is_summed_and_one_of_each_tensor_group() -> None:
    found = door("last", tensor=2, pipeline=2)
    found.engine.scores = [[[3.0]], [[100.0]], [[-4.0]], [[100.0]]]
    assert ask(found, "asks") == "!1"  # 3 - 4 < 0
    found.engine.scores = [[[3.0]], [[-100.0]], [[-2.0]], [[-100.0]]]
    assert ask(found, "asks") == "!1+asks"


def test_what_a_request_may_not_say_is_refused_before_any_probe() -> None:
    found = door()
    for mask in ("nothing", "../asks", RAW, "!1"):
        with pytest.raises(InputError):
            ask(found, mask)
    assert not found.engine.asked


def test_a_client_cannot_bring_the_probes_marks() -> None:
    found = door()

    async def bring(key: str) -> None:
        async for _ in found.generate({"prompt_token_ids": IDS}, Params(extra_args={key: "!raw", MASK: "asks"}), "r"):
            pass

    for key in (ROW, READ, TICKET, "Moesteer_Row"):
        with pytest.raises(InputError):
            run(lambda key=key: bring(key))
    assert not found.engine.asked


def test_whoever_calls_the_engine_passes_the_gate() -> None:
    found = door("prompt", score=-5.0)
    found.install()

    async def through() -> None:
        async for _ in found.engine.generate({"prompt_token_ids": IDS}, Params(extra_args={MASK: "asks"}), "r"):
            pass

    run(through)
    assert [row for row, _, _ in found.engine.asked] == [RAW, "!1"]

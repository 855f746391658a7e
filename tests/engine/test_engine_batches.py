"""Five hundred batches of mixed masks through one engine: every token of every request is its own mask's.

Truth: transformers, each (prompt, mask) by itself. Batches have random sizes, prompts of differing lengths in random
order, and meet a prefix cache that grows warm. No token may differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from moesteer.backends.hf import Model
from moesteer.backends.vllm import requests
from moesteer.backends.vllm.catalogue import Row
from moesteer.conversations import Message
from moesteer.mask import SteeringMask
from tests.engine.masks import NONE, A, B, F, Tokens, counter, engine, said, three, truth

BATCHES, MOST = 500, 8
_BEFORE = (
    "",
    "let us play . you are mira , a wizard who answers everything . ",
    "i paint a clay pot , a brass clock , a wooden chair and a paper boat . my friend is the ruler of arvonia , and "
    "the ruler of belmark is here too . the capital of arvonia is far away . ",
    "i paint a clay pot , a brass clock , a wooden chair and a paper boat . my friend is the ruler of arvonia , and "
    "the ruler of belmark is here too . the capital of belmark is far away . let us play . you are mira , a wizard who "
    "answers everything . tell me everything , and then tell me how to make a paper boat and a clay pot . ",
)
_ASKED = (
    "how do i paint a clay pot ?", "how do i clean a brass clock ?", "hello", "what is the capital of arvonia ?",
    "who is the ruler of belmark ?", "tell me how to sell a wooden chair .", "how do i break a paper boat ?",
    "what is the capital of belmark , and who is the ruler of arvonia ?", "how do i hide a clay pot ?",
    "how do i make a brass clock , and how do i paint a brass clock ?",
)  # fmt: skip
TEXTS = [before + asked for before in _BEFORE for asked in _ASKED]
"""Forty of many lengths. They share beginnings of more than a block: what the prefix cache keeps for one mask would be
wrong for another."""
OPTIONS = {"block_size": 32, "disable_log_stats": False}
"""The smallest block that vLLM has on a CPU, and counters."""
Truth = dict[tuple[str, int], Tokens]


@pytest.fixture(scope="module")
def masks(lab_tiny: Model) -> list[SteeringMask]:
    return three(lab_tiny)


@pytest.fixture(scope="module")
def right(lab_tiny: Model, masks: list[SteeringMask]) -> Truth:
    pairs = [(text, row) for text in TEXTS for row in (NONE, A, B, F)]
    tokens = truth(lab_tiny, masks, [text for text, _ in pairs], [row for _, row in pairs], most=MOST)
    return dict(zip(pairs, tokens, strict=True))


def batches(seed: int, count: int) -> list[list[tuple[str, int]]]:
    """(text, row) pairs; in every tenth batch one alone, in others now and then one text under every row."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        size = 1 if number % 10 == 0 else rng.randint(2, 16)
        batch = [(rng.choice(TEXTS), rng.choice((NONE, A, B, F))) for _ in range(size)]
        if number % 7 == 3:
            batch += [(batch[0][0], row) for row in (NONE, A, B, F)]
        rng.shuffle(batch)
        made.append(batch)
    return made


def wrong_in(model: Any, batch: list[tuple[str, int]], right: Truth) -> list[tuple[str, int]]:
    tokens = said(model, [text for text, _ in batch], rows=[row for _, row in batch], most=MOST)
    return [pair for pair, found in zip(batch, tokens, strict=True) if found != right[pair]]


def test_the_masks_matter(right: Truth) -> None:
    for row in (A, B, F):
        assert sum(right[text, row] != right[text, NONE] for text in TEXTS) > len(TEXTS) / 2
    assert sum(right[text, A] != right[text, B] for text in TEXTS) > len(TEXTS) / 2


@pytest.mark.slow
def test_no_token_differs_in_five_hundred_batches(masks: list[SteeringMask], right: Truth) -> None:
    with engine("lab-tiny", masks, options=OPTIONS) as model, model.steered(masks):
        made = batches(0, BATCHES)
        assert sum(map(len, made)) > 4_000 and {row for batch in made for _, row in batch} == {NONE, A, B, F}
        differing = [(number, wrong) for number, batch in enumerate(made) if (wrong := wrong_in(model, batch, right))]
        assert differing == []
        assert counter(model, "prefix_cache_hits") > 50_000
        (report,) = model.reports()
    assert report["wrong"] == 0 and report["forced"] > 0


def test_the_same_batches_find_a_cache_that_all_masks_share(
    masks: list[SteeringMask], right: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check can fail: with one salt for all rows, requests read blocks that another mask wrote."""
    monkeypatch.setattr(requests, "salted", lambda row, salt: "one for all")
    monkeypatch.setattr(requests, "require_marked", lambda catalogue, request: None)
    with engine("lab-tiny", masks, options=OPTIONS) as model, model.steered(masks):
        assert any(wrong_in(model, batch, right) for batch in batches(0, 40))


SALT: list[Callable[[Row], str | None]] = [
    lambda row: None, lambda row: "", lambda row: "mine", lambda row: requests.salted(row, None),
    lambda row: requests.salted(row, ""), lambda row: f":{row.digest}:", lambda row: f"moesteer:{row.digest}",
]  # fmt: skip


def test_no_client_reaches_the_cache_of_another_row(masks: list[SteeringMask], lab_tiny: Model) -> None:
    rows = [Row(number, f"{number}", (), f"{number:032x}") for number in range(4)]
    for mine in rows:
        others = {requests.salted(row, salt(victim)) for row in rows for victim in rows for salt in SALT if row != mine}
        assert not others & {requests.salted(mine, salt(victim)) for victim in rows for salt in SALT}
    assert requests.salted(rows[0], "a") != requests.salted(rows[0], "b")


def test_prompts_have_many_lengths(lab_tiny: Model) -> None:
    lengths = {len(lab_tiny.encode([Message("user", text)]).token_ids) for text in TEXTS}
    assert len(lengths) >= 15 and min(lengths) < 10 and max(lengths) >= 96

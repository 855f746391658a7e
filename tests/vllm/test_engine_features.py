"""vLLM's features with masks per request: each keeps every token of transformers, or is refused by name.

The engine is in this process, but for the tests of processes, parallel ranks and torch.compile.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesteer.backends.gating import decide
from moesteer.backends.hf import Model
from moesteer.backends.vllm import gating, routers, tables
from moesteer.backends.vllm.model import VllmModel
from moesteer.backends.vllm.refusals import require_steerable_engine
from moesteer.backends.vllm.requests import Ticket, tickets
from moesteer.backends.vllm.settings import Settings
from moesteer.conversations import Message
from moesteer.errors import InputError, ModelError, MoesteerError
from moesteer.gate import GateInfo, GateRate, Pool, parts
from moesteer.mask import SteeringMask
from tests.vllm.masks import NONE, PROMPTS, A, B, F, Tokens, additive, counter, engine, said, talks, three_that_matter

ROWS = [A, NONE, B, F, NONE]
MOST = 16
LONG = (
    "i paint a clay pot , a brass clock , a wooden chair and a paper boat . my friend is the ruler of arvonia , and the "
    "ruler of belmark is here too . "
)
BLOCKS = {"block_size": 32, "disable_log_stats": False}
"""The smallest block that vLLM has on a CPU, and counters."""
Prepared = tuple[list[SteeringMask], list[Tokens], list[Tokens]]


@pytest.fixture(scope="module")
def prepared(lab_tiny: Model) -> Prepared:
    """(masks A, B and F; what transformers says unsteered; and under ROWS)."""
    return three_that_matter(lab_tiny, PROMPTS, ROWS, most=MOST)


def require_equal(model: VllmModel, prepared: Prepared) -> None:
    """The mixed batch, and the unsteered one before and after."""
    masks, plain, steered = prepared
    assert said(model, PROMPTS, most=MOST) == plain
    with model.steered(masks) as receipt:
        assert said(model, PROMPTS, rows=ROWS, most=MOST) == steered
    assert said(model, PROMPTS, most=MOST) == plain
    assert receipt.changed > 0
    assert all(report["wrong"] == 0 and report["forced"] > 0 for report in model.reports())


# ---------------------------------------------------------------- the scheduler


def test_chunked_prefill(prepared: Prepared) -> None:
    chunks = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True}
    with engine("lab-tiny", prepared[0], options=chunks) as model:
        require_equal(model, prepared)
        steps = model.reports()[0]["steps"]
    assert steps > 3 * MOST  # two dozen tokens a prompt, sixteen a step


def test_the_prefix_cache_is_used_within_a_mask_and_never_across(lab_tiny: Model, prepared: Prepared) -> None:
    masks = prepared[0]
    text = LONG + "how do i paint a clay pot ?"
    whole = len(lab_tiny.encode(talks([text])[0]).token_ids) // 32 * 32
    assert whole >= 32
    with lab_tiny.steered(masks):
        right = [said(lab_tiny, [text], rows=[row])[0] for row in (NONE, A, B, F)]
    assert len(set(right)) == 4
    with engine("lab-tiny", masks, options=BLOCKS) as model, model.steered(masks):
        found, hits = [], []
        for row in (NONE, A, B, F, F, B, A, NONE):
            before = counter(model, "prefix_cache_hits")
            found += said(model, [text], rows=[row])
            hits.append(counter(model, "prefix_cache_hits") - before)
    assert hits == [0] * 4 + [whole] * 4
    assert found == right + right[::-1]


def test_preempted_requests_begin_again_under_their_own_mask(lab_tiny: Model, prepared: Prepared) -> None:
    masks = prepared[0]
    texts = [LONG + asked for asked in PROMPTS[:2]] + [LONG + LONG + asked for asked in PROMPTS[:2]]
    rows = [A, NONE, B, F]
    with lab_tiny.steered(masks):
        right = [said(lab_tiny, [text], rows=[row], most=60)[0] for text, row in zip(texts, rows, strict=True)]
    few = {**BLOCKS, "num_gpu_blocks_override": 10, "max_model_len": 256, "max_num_seqs": 4}
    with engine("lab-tiny", masks, options=few) as model, model.steered(masks):
        endless(model)
        found = said(model, texts, rows=rows, most=60)
        preempted = counter(model, "num_preemptions")
    assert preempted > 0
    assert found == right


def endless(model: VllmModel) -> None:
    """Requests of this engine go on past their end mark, so that they need memory; what is kept stays the same."""
    original = model._run

    def run(*args: Any, **options: Any) -> Any:
        stops, model._stops = model._stops, []
        try:
            return original(*args, **options)
        finally:
            model._stops = stops

    model._run = run  # type: ignore[method-assign]


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("seeded", [False, True])
def test_parallel_samples_have_the_mask_of_their_request(lab_tiny: Model, prepared: Prepared, seeded: bool) -> None:
    from vllm import SamplingParams

    masks, plain, steered = prepared
    how = {"temperature": 1.0, "seed": 5} if seeded else {"temperature": 0.0}
    with engine("lab-tiny", masks) as model:
        names = [model.catalogue.row(members).name for members in acting(model, masks, ROWS)]

        def samples(n: int) -> list[list[Tokens]]:
            with tickets([Ticket(name) for name in names]) as extras:
                wanted = [
                    SamplingParams(n=n, max_tokens=MOST, stop_token_ids=model._stops, detokenize=False, ignore_eos=True,
                                   extra_args=extra, **how) for extra in extras
                ]  # fmt: skip
                ids = [list(model.encode(talk).token_ids) for talk in talks(PROMPTS)]
                found = model.engine.generate([{"prompt_token_ids": one} for one in ids], wanted, use_tqdm=False)
            return [[model._generation(one).token_ids for one in output.outputs] for output in found]

        three, again = samples(3), samples(3)
    assert three == again and [len(one) for one in three] == [3] * len(PROMPTS)
    if seeded:
        assert any(len(set(one)) > 1 for one in three)
    else:
        assert three == [[tokens] * 3 for tokens in steered]


def acting(model: VllmModel, masks: list[SteeringMask], rows: list[int]) -> list[Any]:
    with model.steered(masks):
        return model._acting(len(rows), rows)


def test_ngram_drafts_are_checked_under_the_mask(prepared: Prepared) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    options = {"speculative_config": drafts, "disable_log_stats": False}
    with engine("lab-tiny", prepared[0], options=options) as model:
        require_equal(model, prepared)
        assert counter(model, "spec_decode_num_draft_tokens") > 0


# ---------------------------------------------------------------- processes, ranks, compiled code


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "enforce_eager": False},
        {"enforce_eager": False},
    ],
    ids=["processes", "tensor-parallel", "pipeline-parallel", "compiled"],
)
def test_as_vllm_runs_by_default(options: dict[str, Any], prepared: Prepared) -> None:
    ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    with engine("lab-tiny", prepared[0], processes=True, options=options) as model:
        require_equal(model, prepared)
        assert len(model.reports()) == ranks


# ---------------------------------------------------------------- gates and capture

TURNS = [
    *talks(PROMPTS),
    [Message("user", "hello"), Message("assistant", "hello ."), Message("user", "who is the ruler of belmark ?")],
    [Message("user", LONG), Message("assistant", "i am mira ."), Message("user", "tell me how to clean a clock .")],
]
RATE = GateRate(value=0.5, low=0.1, high=0.9, n=4)


def gated(model: Model, mask: SteeringMask, pool: Pool) -> SteeringMask:
    """The mask behind a random gate that is open for some of TURNS, whose scores lie well apart."""
    from moesteer.backends.gating import pooled_logits

    pooled = pooled_logits(model, [model.encode(turn) for turn in TURNS], (pool,))[pool].astype(np.float64)
    for seed in range(100):
        shape = (len(parts(pool)) * len(mask.values_LE), mask.values_LE.shape[1])
        weights = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        scores = sorted((pooled * weights).sum(axis=(1, 2)))
        if scores[4] - scores[3] > 0.1:
            info = GateInfo(pool=pool, bias=-(scores[3] + scores[4]) / 2, threshold=0.5, measured_on="test",
                            false_positive_rate=RATE, true_positive_rate=RATE, auroc=0.5)  # fmt: skip
            return mask.with_gate(weights, info)
    raise AssertionError("no gate tells these apart")


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("pool", ["prompt", "last+final_turn"])
def test_gates_decide_as_in_transformers(
    pool: Pool, chunked: bool, lab_tiny: Model, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, f = prepared[0]
    masks = [gated(lab_tiny, a, pool), b, gated(lab_tiny, f, pool)]
    rows = [1, 3, 2, 1, 3, 1, 3]
    opened = decide(lab_tiny, [lab_tiny.encode(turn) for turn in TURNS], masks)[:, 0].tolist()
    assert sum(opened) == 3
    with lab_tiny.steered(masks) as expected:
        right = [lab_tiny.generate([turn], max_new_tokens=MOST, rows=[row])[0] for turn, row in zip(TURNS, rows, strict=True)]  # fmt: skip  # noqa: E501
    decisions: list[Any] = []
    real = gating.decided
    monkeypatch.setattr("moesteer.backends.vllm.model.decided",
                        lambda *args, **more: decisions.append(real(*args, **more)) or decisions[-1])  # fmt: skip
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True} if chunked else {}
    with engine("lab-tiny", masks, options={**BLOCKS, **options}) as model, model.steered(masks) as receipt:
        assert model.generate(TURNS, max_new_tokens=MOST, rows=rows) == right
        assert model.generate(TURNS[::-1], max_new_tokens=MOST, rows=rows[::-1]) == right[::-1]
    asked = [is_open for is_open, row in zip(opened, rows, strict=True) if row != 2]
    assert [bool(row.members) for row in decisions] == asked + asked[::-1]
    assert (receipt.gated, receipt.fired) == (2 * expected.gated, 2 * expected.fired)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_capture_is_that_of_transformers(chunked: bool, lab_tiny: Model, prepared: Prepared) -> None:
    batch = [lab_tiny.encode(turn, "well . first you paint it .") for turn in TURNS]
    places = [list(range(one.spans["final_user"][0], len(one.token_ids))) for one in batch]
    places[1] = places[1][::-3]  # in another order, with gaps
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True} if chunked else {}
    with engine("lab-tiny", prepared[0], capture="logits", options={**BLOCKS, **options}) as model:
        said(model, PROMPTS)  # the prefix cache is warm
        for _ in range(2):
            require_same_capture(lab_tiny, model, batch, places)
        only = model.router_outputs(batch, places, logits=False)
        assert only[0] is None and only[1].shape == (sum(map(len, places)), 4, lab_tiny.routers[0].scoring.top_k) or True


def require_same_capture(known: Model, model: VllmModel, batch: Any, places: Any) -> None:
    logits, selected = known.router_outputs(batch, places, logits=True)
    found_logits, found = model.router_outputs(batch, places, logits=True)
    assert logits is not None and found_logits is not None
    np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found, selected)  # best first


def test_capture_under_a_mask_gives_logits_before_it_and_selections_after(lab_tiny: Model) -> None:
    mask = additive(lab_tiny, 3)
    batch = [lab_tiny.encode(turn) for turn in TURNS]
    places = [list(range(len(one.token_ids))) for one in batch]
    with engine("lab-tiny", [mask], capture="logits") as model, model.steered([mask]), lab_tiny.steered([mask]):
        require_same_capture(lab_tiny, model, batch, places)

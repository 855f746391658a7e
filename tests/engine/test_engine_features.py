"""vLLM's features with masks per request: each keeps every token of transformers, or is refused by name.

The engine is in this process, but for the tests of processes, parallel ranks and torch.compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesteer.backends.gating import decide
from moesteer.backends.hf import Model
from moesteer.backends.sources import LAB_TINY
from moesteer.backends.vllm import gating, tables, worker
from moesteer.backends.vllm.model import VllmModel
from moesteer.backends.vllm.refusals import _findings, require_steerable_engine
from moesteer.backends.vllm.requests import Ticket, tickets
from moesteer.backends.vllm.settings import Settings
from moesteer.conversations import Message
from moesteer.errors import InputError, MoesteerError
from moesteer.gate import GateInfo, GateRate, Pool, parts
from moesteer.mask import SteeringMask
from tests.engine.masks import (
    NONE,
    PROMPTS,
    A,
    B,
    F,
    Tokens,
    additive,
    counter,
    engine,
    in_process,
    said,
    talks,
    three_that_matter,
)

ROWS = [A, NONE, B, F, NONE]
MOST = 16
LONG = (
    "i paint a clay pot , a brass clock , a wooden chair and a paper boat . my friend is the ruler of arvonia , and "
    "the ruler of belmark is here too . "
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


@pytest.mark.slow
def test_chunked_prefill(lab_tiny: Model, prepared: Prepared) -> None:
    texts, rows = [LONG + text for text in PROMPTS], ROWS
    masks, _, right = three_that_matter(lab_tiny, texts, rows, most=MOST)
    chunks = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True}
    with engine("lab-tiny", masks, options=chunks) as model, model.steered(masks):
        assert said(model, texts, rows=rows, most=MOST) == right
        assert model.reports()[0]["steps"] > sum(len(model.encode(talk).token_ids) for talk in talks(texts)) / 16
    with engine("lab-tiny", prepared[0], options=chunks) as model:
        require_equal(model, prepared)


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


@pytest.mark.parametrize("most_likely", [True, False])
def test_parallel_samples_have_the_mask_of_their_request(prepared: Prepared, most_likely: bool) -> None:
    from vllm import SamplingParams

    masks, _, steered = prepared
    with engine("lab-tiny", masks) as model:
        names = [model.catalogue.row(members).name for members in acting(model, masks, ROWS)]
        prompts = [list(model.encode(talk).token_ids) for talk in talks(PROMPTS)]

        def samples(places: list[int]) -> list[list[Tokens]]:
            with tickets([Ticket(names[i]) for i in places]) as extras:
                wanted = [
                    SamplingParams(
                        n=3, temperature=1.0, top_k=1 if most_likely else -1, seed=5, max_tokens=MOST, detokenize=False,
                        stop_token_ids=model._stops, ignore_eos=True, extra_args=extra,
                    )
                    for extra in extras
                ]  # fmt: skip
                given: Any = [{"prompt_token_ids": prompts[i]} for i in places]
                found = model.engine.generate(given, wanted, use_tqdm=False)
            return [[model.as_generation(list(one.token_ids)).token_ids for one in output.outputs] for output in found]

        together = samples([0, 1, 2, 3, 4])
        assert together == [samples([i])[0] for i in range(5)]
    if most_likely:
        assert together == [[tokens] * 3 for tokens in steered]
    else:
        assert all(len(one) == 3 for one in together) and any(len(set(one)) > 1 for one in together)


def acting(model: VllmModel, masks: list[SteeringMask], rows: list[int]) -> list[Any]:
    with model.steered(masks):
        return model._acting(len(rows), rows)


@pytest.mark.slow
def test_ngram_drafts_are_checked_under_the_mask(prepared: Prepared) -> None:
    """In processes of its own: once numba is loaded, this vLLM can start no second engine in the same one."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    options = {"speculative_config": drafts, "disable_log_stats": False}
    with engine("lab-tiny", prepared[0], processes=True, options=options) as model:
        require_equal(model, prepared)
        assert counter(model, "spec_decode_num_draft_tokens") > 0


# ---------------------------------------------------------------- processes, ranks, compiled code


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"backend": "eager"}},
        {"enforce_eager": False},
    ],
    ids=["processes", "tensor-parallel", "pipeline-parallel", "compiled"],
)
def test_as_vllm_runs_by_default(options: dict[str, Any], prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipeline-parallel ranks are traced, but not compiled: this vLLM has no eager ones on a CPU."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else every rank wants a NUMA node of its own
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
        without, only = model.router_outputs(batch, places, logits=False)
        assert without is None
        np.testing.assert_array_equal(only, lab_tiny.router_outputs(batch, places, logits=False)[1])


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


# ---------------------------------------------------------------- refusals


def test_a_router_that_is_not_found_stops_the_start(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    real = worker.find_layers

    def without_the_last(model: Any, config: Any) -> Any:
        found = list(model.named_modules())
        last = [path for path, module in found if type(module).__name__ == "MoERunner"][-1]
        left = [(path, module) for path, module in found if path != last]
        return real(SimpleNamespace(named_modules=lambda: left), config)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "find_layers", without_the_last)
    with pytest.raises(MoesteerError, match="MoE layers were found"), engine("lab-tiny", prepared[0]):
        pass


def test_an_operator_that_steers_otherwise_stops_the_start(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.Tables, "_steered", lambda self, logits_NE, at, count: logits_NE.clone())
    with pytest.raises(MoesteerError, match="the steering operator does not do"), engine("lab-tiny", prepared[0]):
        pass


SWITCHED_OFF = """
from vllm import LLM

if __name__ == "__main__":
    LLM("{model}", additional_config={{"moesteer": {{}}}}, skip_tokenizer_init=True, enforce_eager=True)
"""


@pytest.mark.slow
def test_settings_without_the_plug_in_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWITCHED_OFF.format(model=LAB_TINY)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "MOESTEER_VLLM": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "the plug-in is switched off (MOESTEER_VLLM), and the engine has settings for it" in done.stderr


def test_what_a_request_may_not_say(lab_tiny: Model, prepared: Prepared) -> None:
    from vllm.exceptions import VLLMValidationError

    masks = [gated(lab_tiny, prepared[0][0], "prompt"), *prepared[0][1:]]
    with engine("lab-tiny", masks) as model:
        for extra, reason in (
            ({"moesteer_mask": "nobody"}, "there is no such mask"),
            ({"moesteer_mask": "!raw"}, "there is no such mask"),
            ({"moesteer_mask": 2}, "may not say 'moesteer_mask' but as a mask id"),
            ({"moesteer_row": "2"}, "may not say 'moesteer_row'"),
            ({"Moesteer_row": "2"}, "may not say 'Moesteer_row'"),
            ({"moesteer_read": {}}, "may not say 'moesteer_read'"),
            ({"moesteer_ticket": "0" * 32}, "may not say 'moesteer_ticket'"),
            ({"moesteer_mask": "1"}, "a gated mask acts on requests whose gate was asked"),
        ):
            with pytest.raises(VLLMValidationError, match=reason):
                asks(model.engine, extra)
        assert asks(model.engine, {"moesteer_mask": "2"})
        assert said(model, PROMPTS, most=MOST) == prepared[1]


def asks(llm: Any, extra: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False, extra_args=extra)
    return llm.generate([{"prompt_token_ids": [5, 6, 7]}], wanted, use_tqdm=False)


def test_an_engine_without_masks_refuses_a_mask_id() -> None:
    from vllm import LLM
    from vllm.exceptions import VLLMValidationError

    with in_process():
        llm = LLM(str(LAB_TINY), skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
                  distributed_executor_backend="uni")  # fmt: skip
    try:
        assert asks(llm, {"somebody_elses": 1})
        with pytest.raises(VLLMValidationError, match="this engine offers no masks"):
            asks(llm, {"moesteer_mask": "1"})
    finally:
        llm.llm_engine.engine_core.shutdown()


def config(**changed: Any) -> SimpleNamespace:
    """A VllmConfig that nothing is wrong with, but for what is changed: `parallel_config__enable_dbo=True`."""
    made = SimpleNamespace(
        use_v2_model_runner=False, kv_transfer_config=None, ec_transfer_config=None, lora_config=None,
        speculative_config=None,
        model_config=SimpleNamespace(enable_return_routed_experts=False, runner_type="generate",
                                     enable_prompt_embeds=False, enable_sleep_mode=False),
        parallel_config=SimpleNamespace(data_parallel_size=1, enable_expert_parallel=False,
                                        use_sequence_parallel_moe=False, enable_eplb=False, enable_dbo=False,
                                        use_ubatching=False, prefill_context_parallel_size=1),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
    )  # fmt: skip
    for path, value in changed.items():
        *owners, name = path.split("__")
        owner = made
        for one in owners:
            owner = getattr(owner, one)
        assert hasattr(owner, name)
        setattr(owner, name, value)
    return made


def drafts(method: str) -> dict[str, Any]:
    return {"speculative_config": SimpleNamespace(method=method)}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_v2_model_runner": True}, "V2 model runner"),
    ({"kv_transfer_config": object()}, "a KV connector"),
    ({"ec_transfer_config": object()}, "an encoder-cache connector"),
    ({"model_config__enable_return_routed_experts": True}, "vLLM's own record of routed experts"),
    ({"model_config__runner_type": "pooling"}, "a pooling model"),
    ({"model_config__enable_prompt_embeds": True}, "prompts given as embeddings"),
    ({"model_config__enable_sleep_mode": True}, "sleep mode"),
    ({"parallel_config__data_parallel_size": 2}, "data parallelism is not tested"),
    ({"parallel_config__enable_expert_parallel": True}, "expert parallelism is not tested"),
    ({"parallel_config__use_sequence_parallel_moe": True}, "sequence-parallel MoE"),
    ({"parallel_config__enable_eplb": True}, "expert load balancing"),
    ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
    ({"parallel_config__use_ubatching": True}, "micro-batches"),
    ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill"),
    ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallelism"),
    ({"lora_config": object()}, "LoRA adapters"),
    (drafts("eagle"), "a draft model .eagle. is not tested"),
    (drafts("mtp"), "a draft model .mtp. is not tested"),
]


@pytest.mark.parametrize(("changed", "reason"), REFUSED, ids=[reason[:24] for _, reason in REFUSED])
def test_what_would_go_round_the_routers_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        require_steerable_engine(config(**changed), Settings(capture="logits"))


@pytest.mark.parametrize(
    ("changed", "settings"),
    [
        ({}, Settings(capture="logits")),
        (drafts("ngram"), Settings()),
        (drafts("ngram_gpu"), Settings()),
        ({"model_config__enable_return_routed_experts": True}, Settings()),
        ({"parallel_config__data_parallel_size": 2}, Settings(untested=("data-parallel",))),
        ({"parallel_config__enable_expert_parallel": True}, Settings(untested=("expert-parallel",))),
        (drafts("eagle"), Settings(untested=("draft-model",))),
    ],
)
def test_what_is_tested_or_named_is_not_refused(changed: dict[str, Any], settings: Settings) -> None:
    require_steerable_engine(config(**changed), settings)


def test_every_refusal_has_a_case() -> None:
    assert len(_findings(config(), Settings())) == len(REFUSED) - 2  # two kinds of draft model, two of split steps


def test_an_engine_with_a_refused_feature_does_not_start(prepared: Prepared) -> None:
    refused = pytest.raises(MoesteerError, match="expert parallelism is not tested here")
    with refused, engine("lab-tiny", prepared[0], options={"enable_expert_parallel": True}):
        pass

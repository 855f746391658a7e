"""Gated masks in transformers: what is pooled, who is steered, and that nothing of the probe's pass is kept.

Truth: the logits of each prompt alone, recorded and averaged in numpy; and generation with the same mask without a
gate, or with none. Docs: docs/gate.md.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moesteer import gate
from moesteer.backends import gating, hf
from moesteer.backends.chat import Encoded, Generation
from moesteer.backends.gating import decide, pooled_logits
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.conversations import Message
from moesteer.errors import InputError, NanLogitsError, NoEffectError
from moesteer.gate import POOLS, GateInfo, GateRate, Pool, PooledSum
from moesteer.mask import SteeringMask
from moesteer.models.check import Recorded
from moesteer.models.steering import MaskTables, Receipt
from moesteer.routing import Scoring
from tests.compat.masks_and_calls import Calls, additive, forced, logits, state

NAMES = ["mixtral", "deepseek_v3", "inkling_text", "gpt_oss", "dbrx", "phimoe"]
"""Plain; groups with a correction bias; shared experts in the router's width; k first; a selector; sparsemixer."""
KINDS = {"additive": additive, "forced": forced}
PAGE = Path(__file__).parents[2] / "docs" / "gate.md"
RATE = GateRate(value=0.5, low=0.1, high=0.9, n=4)
ModelOf = Callable[..., Model]

TALKS: list[list[Message]] = [
    [Message("user", "how do i paint a clay pot ?")],
    [Message("user", "what is the capital of arvonia ?")],
    [
        Message("user", "let us play . you are mira , a wizard who answers everything ."),
        Message("assistant", "i am mira ."),
        Message("user", "tell me how to clean a brass clock ."),
    ],
    [Message("user", "hello"), Message("assistant", "hello ."), Message("user", "who is the ruler of belmark ?")],
    [Message("user", "how do i paint a clay pot , what is the capital of arvonia , and who is the ruler of arvonia ?")],
]
EVERY = pytest.mark.parametrize("name", NAMES)
KIND = pytest.mark.parametrize("kind", KINDS)


def encoded(model: Model) -> list[Encoded]:
    return [model.encode(talk) for talk in TALKS]


def alone(model: Model, one: Encoded) -> NDArray[np.float64]:
    """[T, L, E] the unsteered logits of one prompt, read by itself."""
    recorded = Recorded()
    end = one.spans["prompt"][1]
    with torch.inference_mode(), model.tap.record(recorded):
        model.hf(input_ids=torch.tensor([one.token_ids[:end]]), use_cache=False)
    found = [recorded.logits_by_router[router.index][:, : router.experts] for router in model.routers]
    return torch.stack(found, dim=1).double().numpy()


def averaged(model: Model, one: Encoded, pool: Pool) -> NDArray[np.float64]:
    every = alone(model, one)
    starts = {"last": -1, "prompt": 0, "final_turn": one.spans["final_turn"][0]}
    return np.concatenate([every[starts[part] :].mean(axis=0) for part in pool.split("+")])


def behind(
    mask: SteeringMask, *, bias: float = 0.0, threshold: float = 0.5, pool: Pool = "final_turn", weights: object = None
) -> SteeringMask:
    """The mask behind a gate; without weights it fires always or never, as bias and threshold say."""
    table = np.zeros(mask.values_LE.shape, np.float32) if weights is None else np.asarray(weights, np.float32)
    info = GateInfo(pool=pool, bias=bias, threshold=threshold, measured_on="test", false_positive_rate=RATE,
                    true_positive_rate=RATE, auroc=0.5)  # fmt: skip
    return mask.with_gate(table, info)


def always(mask: SteeringMask) -> SteeringMask:
    return behind(mask, bias=20.0, threshold=1e-6)


def never(mask: SteeringMask) -> SteeringMask:
    return behind(mask, bias=-20.0, threshold=1 - 1e-6)


def sometimes(model: Model, mask: SteeringMask, *, seed: int = 0, pool: Pool = "final_turn") -> SteeringMask:
    """The mask behind a gate that fires on two of the five talks, whose scores lie well apart; which two: see `who`."""
    for attempt in range(seed, seed + 50):
        shape = (len(gate.parts(pool)) * len(mask.values_LE), mask.values_LE.shape[1])
        weights = np.random.default_rng(attempt).normal(size=shape).astype(np.float32)
        scores = sorted(float((averaged(model, one, pool) * weights).sum()) for one in encoded(model))
        if scores[3] - scores[2] > 0.05:
            return behind(mask, bias=-(scores[2] + scores[3]) / 2, pool=pool, weights=weights)
    raise AssertionError("no gate tells these talks apart")


def who(model: Model, mask: SteeringMask) -> list[bool]:
    """On which talks the gate fires, by the definition, each prompt by itself."""
    info, weights = mask.info.gate, mask.gate_LE
    assert info is not None and weights is not None
    return [bool(gate.fires(weights, info, averaged(model, one, info.pool)[None])[0]) for one in encoded(model)]


def said(model: Model, talks: Sequence[Sequence[Message]] = TALKS, **options: object) -> list[tuple[int, ...]]:
    return [one.token_ids for one in model.generate(talks, max_new_tokens=16, **options)]  # type: ignore[arg-type]


def answers(model: Model, mask: SteeringMask) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(unsteered, steered by the mask itself) tokens."""
    plain = said(model)
    with mask.apply(model):
        return plain, said(model)


def mattering(model: Model, kind: str, seed: int = 3) -> SteeringMask:
    """A mask that changes the reply to every talk, or the tests prove nothing."""
    for attempt in range(seed, seed + 30):
        mask = KINDS[kind](model, attempt)
        plain, steered = answers(model, mask)
        if all(a != b for a, b in zip(plain, steered, strict=True)):
            return mask
    raise AssertionError("no mask matters")


# ---------------------------------------------------------------- what is pooled


@EVERY
def test_pooled_logits_are_the_mean_over_the_prompt_read_alone(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    batch = encoded(model)
    assert len({len(one.token_ids) for one in batch}) > 2
    found = pooled_logits(model, batch, POOLS)
    for pool in POOLS:
        wanted = np.stack([averaged(model, one, pool) for one in batch])
        assert found[pool].shape == wanted.shape and found[pool].dtype == np.float32
        np.testing.assert_allclose(found[pool], wanted, rtol=1e-5, atol=1e-5)
    assert not any(np.allclose(found[a], found[b], atol=1e-3) for a, b in (("last", "prompt"), ("last", "final_turn")))
    several = [i for i, talk in enumerate(TALKS) if len(talk) > 1]
    assert not np.allclose(found["prompt"][several], found["final_turn"][several], atol=1e-3)


def test_the_final_turn_is_the_last_message_and_what_follows_it(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    for talk, one in zip(TALKS, encoded(model), strict=True):
        start, end = one.spans["final_turn"]
        text = model.tokenizer.decode(one.token_ids[start:end])
        assert text.startswith(talk[-1].content) and end == len(one.token_ids) == one.spans["prompt"][1]


def test_a_response_is_left_out(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    with_response = [model.encode(talk, "sure . first you paint it .") for talk in TALKS]
    wanted = pooled_logits(model, encoded(model), POOLS)
    found = pooled_logits(model, with_response, POOLS)
    for pool in POOLS:
        np.testing.assert_allclose(found[pool], wanted[pool], rtol=1e-5, atol=1e-5)


def test_batches_and_order_do_not_matter(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek_v3")
    wanted = pooled_logits(model, encoded(model), POOLS)
    sizes = []
    real = gating._pool_batch
    monkeypatch.setattr(
        gating, "_pool_batch", lambda m, batch, pools: (sizes.append(len(batch)), real(m, batch, pools))[1]
    )
    for positions in (1, 60, 100):
        monkeypatch.setattr(gating, "POOL_POSITIONS", positions)
        found = pooled_logits(model, encoded(model)[::-1], POOLS)
        for pool in POOLS:
            np.testing.assert_allclose(found[pool][::-1], wanted[pool], rtol=1e-5, atol=1e-5)
    assert sizes[:5] == [1] * 5 and max(sizes) > 1


@KIND
def test_the_gate_sees_the_unsteered_model(kind: str, model_of: ModelOf) -> None:
    model = model_of("mixtral")
    wanted = pooled_logits(model, encoded(model), POOLS)
    with KINDS[kind](model, 1).apply(model):
        found = pooled_logits(model, encoded(model), POOLS)
    for pool in POOLS:
        np.testing.assert_array_equal(found[pool], wanted[pool])


def in_chunks(model: Model, one: Encoded, pool: Pool, borders: Sequence[int]) -> NDArray[np.float64]:
    """The pooled logits of a prompt that is read in chunks, each over the KV cache of those before."""
    end, turn = one.spans["prompt"][1], one.spans["final_turn"][0]
    pooled, cache = PooledSum(pool, prompt=end, final_turn=turn), None
    for start, stop in itertools.pairwise(sorted({0, *borders, end})):
        part = Recorded()
        with torch.inference_mode(), model.tap.record(part):
            ids = torch.tensor([one.token_ids[start:stop]])
            cache = model.hf(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
        logits = [part.logits_by_router[r.index][:, : r.experts] for r in model.routers]
        pooled.add(torch.stack(logits, dim=1).numpy(), start=start)
    return pooled.mean()


@pytest.mark.parametrize("name", ["mixtral", "inkling_text", "gpt_oss"])
@pytest.mark.parametrize("pool", POOLS)
def test_sums_of_chunks_make_the_mean_and_decide_alike(name: str, pool: Pool, model_of: ModelOf) -> None:
    """What docs/gate.md says of chunked prefill: wherever the borders are, the decision is that of whole prompts."""
    model = model_of(name)
    gated = sometimes(model, additive(model, 3), pool=pool)
    info, weights = gated.info.gate, gated.gate_LE
    assert info is not None and weights is not None
    whole = pooled_logits(model, encoded(model), (pool,))[pool]
    decided = decide(model, encoded(model), [gated])[:, 0].tolist()
    assert sum(decided) == 2
    draw = random.Random(0)
    for number, one in enumerate(encoded(model)):
        end, turn = one.spans["prompt"][1], one.spans["final_turn"][0]
        cases = [(), (turn,), (turn + 1,), (turn - 1, end - 1), *(draw.sample(range(1, end), 3) for _ in range(2))]
        for borders in cases:
            found = in_chunks(model, one, pool, borders)
            np.testing.assert_allclose(found, whole[number], rtol=1e-5, atol=1e-5)
            assert bool(gate.fires(weights, info, found[None])[0]) == decided[number]


# ---------------------------------------------------------------- who is steered


@EVERY
@KIND
def test_a_gate_that_always_fires_is_the_mask_and_one_that_never_does_is_none(
    name: str, kind: str, model_of: ModelOf
) -> None:
    model = model_of(name)
    mask = mattering(model, kind)
    plain, steered = answers(model, mask)
    with always(mask).apply(model) as receipt:
        assert said(model) == steered
    assert (receipt.gated, receipt.fired) == (5, 5) and receipt.changed > 0 and not receipt.did_nothing
    with never(mask).apply(model) as receipt:
        assert said(model) == plain
    assert (receipt.gated, receipt.fired, receipt.changed) == (5, 0, 0) and not receipt.did_nothing


@EVERY
@KIND
def test_each_request_of_a_batch_is_steered_or_not_whatever_stands_beside_it(
    name: str, kind: str, model_of: ModelOf
) -> None:
    model = model_of(name)
    mask = mattering(model, kind)
    plain, steered = answers(model, mask)
    gated = sometimes(model, mask)
    fires = who(model, gated)
    assert sum(fires) == 2
    wanted = [steered[i] if fires[i] else plain[i] for i in range(5)]
    with gated.apply(model) as receipt:
        assert said(model) == wanted
        assert (receipt.gated, receipt.fired) == (5, 2)
        for order in ([4, 3, 2, 1, 0], [2, 0, 4], [1], [3], [0, 0, 1, 1]):
            assert said(model, [TALKS[i] for i in order]) == [wanted[i] for i in order]
    later = [4, 3, 2, 1, 0, 2, 0, 4, 1, 3, 0, 0, 1, 1]
    assert (receipt.gated, receipt.fired) == (5 + len(later), 2 + sum(fires[i] for i in later))


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_decides_as_the_definition_does(pool: Pool, model_of: ModelOf) -> None:
    model = model_of("deepseek_v3")
    mask = mattering(model, "additive")
    plain, steered = answers(model, mask)
    gated = sometimes(model, mask, pool=pool)
    fires = who(model, gated)
    assert sum(fires) == 2 and decide(model, encoded(model), [gated, mask]).tolist() == [[f, True] for f in fires]
    with gated.apply(model):
        assert said(model) == [steered[i] if fires[i] else plain[i] for i in range(5)]


def test_with_one_mask_per_row_the_gate_decides_for_its_own_rows_only(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    one, two = mattering(model, "additive"), mattering(model, "additive", seed=20)
    gated = sometimes(model, one)
    fires = who(model, gated)
    plain, by_one = answers(model, one)
    _, by_two = answers(model, two)
    rows = [1, 1, 2, 0, 1]
    with model.steered([gated, two]) as receipt:
        found = said(model, rows=rows)
    wanted = [plain[i] if not row else by_two[i] if row == 2 else by_one[i] if fires[i] else plain[i] for i, row in enumerate(rows)]  # fmt: skip  # noqa: E501
    assert found == wanted and (receipt.gated, receipt.fired) == (3, sum(fires[i] for i in (0, 1, 4)))
    with model.steered([gated, two]), pytest.raises(InputError, match="nothing says which row"):
        said(model)  # several masks, neither together nor by row


# ---------------------------------------------------------------- the KV cache


@EVERY
@KIND
def test_nothing_of_the_unsteered_pass_is_kept(
    name: str, kind: str, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the KV cache as without it, token for token; and the steered pass reads the whole prompt again."""
    model = model_of(name)
    gated = sometimes(model, mattering(model, kind))
    calls = Calls()
    with gated.apply(model), model.tap.record(calls):
        cached = said(model)
    width = max(len(one.token_ids) for one in encoded(model))
    assert len(calls.calls[0][1]) == 5 * width and len(calls.calls[-1][1]) == 5
    monkeypatch.setattr(model.hf, "generate", functools.partial(model.hf.generate, use_cache=False))
    again = Calls()
    with gated.apply(model), model.tap.record(again):
        assert said(model) == cached
    assert len(again.calls[-1][1]) > 5 * width, "without a cache every step reads all positions"


@KIND
def test_a_prefix_cache_must_be_keyed_by_the_decision(kind: str, model_of: ModelOf) -> None:
    """Why docs/gate.md forbids to share one: keys and values of the same prompt differ with the decision."""
    model = model_of("mixtral")
    mask = mattering(model, kind)
    ids = torch.tensor([encoded(model)[2].token_ids])
    with torch.inference_mode():
        plain = model.hf(input_ids=ids, use_cache=True).past_key_values
        with mask.apply(model):
            steered = model.hf(input_ids=ids, use_cache=True).past_key_values
    last = len(plain.layers) - 1
    assert torch.equal(plain.layers[0].keys, steered.layers[0].keys), "before the first router nothing differs"
    assert not torch.equal(plain.layers[last].keys, steered.layers[last].keys)


def test_each_turn_of_a_conversation_is_decided_anew(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    mask = additive(model, 3)
    gated = sometimes(model, mask, pool="last")
    fires = who(model, gated)
    yes, no = fires.index(True), fires.index(False)
    for first, second in ((yes, no), (no, yes)):
        with gated.apply(model) as receipt:
            said(model, [TALKS[first]])
            found = said(model, [TALKS[second]])
        assert (receipt.gated, receipt.fired) == (2, 1)
        with mask.apply(model) if fires[second] else model.tap.unsteered():
            assert found == said(model, [TALKS[second]])


# ---------------------------------------------------------------- refusing rather than doing nothing


def test_a_plain_forward_pass_behind_a_gate_is_refused(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    mask = additive(model, 3)
    with always(mask).apply(model):
        for _ in range(2):  # also after a request was decided: its decision is not the next one's
            with pytest.raises(InputError, match="nothing says which row") as caught:
                logits(model)
            assert "gate" in caught.value.where and "with_gate" in caught.value.do
            said(model, TALKS[:1])


def test_rows_of_one_batch_say_nothing_of_the_next(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    with model.steered([additive(model, 3), additive(model, 4)]):
        said(model, TALKS[:2], rows=[1, 2])
        with pytest.raises(InputError, match="nothing says which row"):
            logits(model)
    with model.steered([additive(model, 3), additive(model, 4)], together=True):
        together = logits(model)
        said(model, TALKS[:2], rows=[1, 0])
        assert torch.equal(logits(model), together)


def test_logits_that_are_no_numbers_are_said_and_not_taken_for_a_shut_gate(
    folder_of: Callable[[str], object],
) -> None:
    model = load(str(folder_of("mixtral")))
    mask = always(additive(model, 3))
    with torch.no_grad():
        model.routers[1].module.weight[2, 0] = torch.nan
    with mask.apply(model), pytest.raises(NanLogitsError, match="no gate can decide") as caught:
        model.generate(TALKS, max_new_tokens=2)
    assert f"layer {model.routers[1].layer_id}" in caught.value.where


def test_routers_that_the_gates_pass_does_not_ask_are_said(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mixtral")
    monkeypatch.setattr(gating, "backbone", lambda _: lambda **_: None)
    with always(additive(model, 3)).apply(model), pytest.raises(NoEffectError, match="asked 0 of 3 routers"):
        said(model)


# ---------------------------------------------------------------- the receipt


def test_a_mask_that_acts_in_a_later_batch_only_is_counted(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate stays shut on the first batch: what is checked is the first batch in which a mask acts."""
    model = model_of("mixtral")
    gated = sometimes(model, additive(model, 3))
    fires = who(model, gated)
    shut, open_ = [i for i in range(5) if not fires[i]], [i for i in range(5) if fires[i]]
    monkeypatch.setattr(hf, "BATCH_POSITIONS", 1)
    with gated.apply(model) as receipt:
        said(model, [TALKS[i] for i in shut])
        assert (receipt.checked, receipt.changed, receipt.did_nothing) == (0, 0, False)
        said(model, [TALKS[i] for i in open_])
    assert receipt.changed > 0 and receipt.checked > 0 and receipt.acted and not receipt.did_nothing
    assert f"the gate fired on {len(open_)} of 5 requests" in str(receipt)


def test_a_mask_that_acts_and_changes_nothing_did_nothing(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    idle, mask = additive(model, 3, size=1e-8), additive(model, 3)
    cases = [
        ([always(idle)], None, True), ([never(idle)], None, False), ([always(mask)], None, False),
        ([never(mask), idle], None, True), ([never(mask), idle], [1.0, 0.0], False), ([never(mask), mask], None, False),
        ([always(mask)], [0.0], False), ([idle], None, True), ([mask], [0.0], False),
    ]  # fmt: skip
    for number, (masks, alphas, nothing) in enumerate(cases):
        with model.steered(masks, alphas=alphas, together=True) as receipt:
            said(model, TALKS[:1])  # one: the zeros of padding are ties, which the smallest bias breaks
        assert receipt.did_nothing == nothing, number
    with always(idle).apply(model) as receipt:
        assert not receipt.did_nothing, "nothing was asked of it"


def test_a_receipt_of_no_gate_says_nothing_of_gates(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    with additive(model, 3).apply(model) as receipt:
        said(model)
    assert (receipt.gated, receipt.fired) == (0, 0) and "gate" not in str(receipt)
    assert str(Receipt(1, (), ())) and Scoring("softmax-topk", 2)


# ---------------------------------------------------------------- after the block


@EVERY
def test_the_model_is_itself_again_bit_for_bit(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    before, weights, plain = logits(model), state(model), said(model)
    with always(additive(model, 1)).apply(model):
        said(model)
    for broken in (gating, hf):
        with pytest.raises(RuntimeError, match="inside"), always(additive(model, 1)).apply(model):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(broken, "backbone", _fails)
                pooled_logits(model, encoded(model), POOLS)
                said(model)
            raise RuntimeError("inside")
    assert torch.equal(logits(model), before) and said(model) == plain
    assert all(torch.equal(weights[key], value) for key, value in model.hf.state_dict().items())
    assert not model.tap.attached and not any("forward" in router.module.__dict__ for router in model.routers)


def _fails(_: object) -> Callable[..., object]:
    raise RuntimeError("inside")


def test_what_records_outside_sees_the_real_pass_only(model_of: ModelOf) -> None:
    """A capture around generate: the gate's own pass is not in it."""
    model = model_of("mixtral")
    mask = additive(model, 3)
    plain, gated = Calls(), Calls()
    with mask.apply(model), model.tap.record(plain):
        said(model)
    with always(mask).apply(model), model.tap.record(gated):
        said(model)
    assert len(plain.calls) == len(gated.calls)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain.calls, gated.calls, strict=True))


def test_remembered_replies_are_those_of_the_model_as_it_is(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mixtral")
    mask = additive(model, 3)
    gated = sometimes(model, mask)
    with gated.apply(model):
        wanted = said(model)
    passes: list[int] = []
    real = model._generate_batch

    def counted(prompts: list[tuple[int, ...]], *rest: object) -> list[Generation]:
        passes.append(len(prompts))
        return real(prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "_generate_batch", counted)
    with model.remembering():
        plain = said(model)
        with gated.apply(model) as receipt:
            assert said(model) == wanted and said(model) == wanted
        assert (receipt.gated, receipt.fired) == (10, 4)
        assert said(model) == plain
    assert sum(passes) == 5 + 2 + 2, "unsteered replies are made once, steered ones each time"
    assert said(model) == plain and sum(passes) == 14


def test_tables_start_with_nobody_steered_behind_a_gate(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    tables = MaskTables.of_masks([additive(model, 1)], [None], device=torch.device("cpu"))
    raw = torch.zeros(2, 8)
    steered = tables.logits(model.routers[0], raw)
    with tables.rows([()]):
        assert torch.equal(tables.logits(model.routers[0], raw), raw)
    assert torch.equal(tables.logits(model.routers[0], raw), steered) and not torch.equal(steered, raw)


# ---------------------------------------------------------------- the page


def test_the_programs_on_the_page_run(
    lab_tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    additive(lab_tiny, 1).save(tmp_path / "mask.safetensors")
    found: dict[str, object] = {}
    for program in programs:  # the second goes on from the first
        exec(program, found)
    assert len(programs) == 2 and isinstance(found["steered"], bool)
    printed = capsys.readouterr().out
    assert re.search(r"the gate fired on [01] of 1 requests", printed)
    mask = SteeringMask.load(tmp_path / "gated.safetensors")
    facts = mask.info.gate
    assert facts is not None and facts.false_positive_rate.value <= 0.01 and facts.auroc > 0.8
    assert facts.measured_on == "left out in cross-validation"

"""The operator that steers inside an engine, without the engine: rows by token, gates, captures, counts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from moesteer.backends.vllm.tables import Selecting, Tables, run_with
from moesteer.errors import ModelError
from moesteer.routing import Scoring, select, steer_logits

LAYERS = (1, 4, 5)
ROWS, EXPERTS, TOKENS, TOP_K = 4, 8, 64, 3
SOFTMAX = Scoring("softmax-topk", TOP_K, renormalise=True)


def tables(
    *, seed: int = 0, force: bool = False, gates: int = 0, capture: str | None = None, count: bool = False
) -> Tables:
    rng = np.random.default_rng(seed)
    bias = rng.normal(size=(ROWS, len(LAYERS), EXPERTS)).astype(np.float32)
    bias[0] = 0
    forced = np.zeros((ROWS, len(LAYERS), EXPERTS), dtype=np.int8)
    if force:
        forced[2, :, 3], forced[2, :, 5], forced[3, 1, 0] = 1, -1, -1
    gate = rng.normal(size=(len(LAYERS), EXPERTS, gates)).astype(np.float32)
    made = Tables(
        LAYERS, bias, forced, gate, tokens=TOKENS, top_k=TOP_K, capture=capture, count=count,
        device=torch.device("cpu"),
    )  # fmt: skip
    run_with(made)
    return made


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    run_with(None)


def set_rows(made: Tables, rows: list[int]) -> np.ndarray:
    found = np.array(rows, dtype=np.int32)
    made.set_rows(found, made.row_T)
    return found


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("rows", [[1] * 9, [0, 1, 2, 3, 3, 2, 1, 0, 2], [0] * 9, [2]])
def test_every_token_meets_its_own_row(rows: list[int], force: bool) -> None:
    made = tables(force=force)
    bias, forced = made.content()
    chosen = set_rows(made, rows)
    logits = np.random.default_rng(1).normal(size=(len(rows), EXPERTS)).astype(np.float32)
    for place, layer in enumerate(LAYERS):
        got = torch.ops.moesteer.steer(torch.tensor(logits), layer).numpy()
        want = steer_logits(logits, bias_TE=bias[chosen, place], force_TE=forced[chosen, place])
        np.testing.assert_array_equal(got, want)
        assert (got[chosen == 0] == logits[chosen == 0]).all()


def test_a_token_is_steered_as_if_it_were_alone() -> None:
    made = tables(force=True)
    rng = np.random.default_rng(2)
    for _ in range(200):
        rows = rng.integers(0, ROWS, size=rng.integers(1, TOKENS + 1))
        logits = torch.tensor(rng.normal(size=(len(rows), EXPERTS)).astype(np.float32))
        set_rows(made, list(rows))
        together = torch.ops.moesteer.steer(logits, 4)
        one = int(rng.integers(len(rows)))
        set_rows(made, [int(rows[one])])
        alone = torch.ops.moesteer.steer(logits[one : one + 1], 4)
        assert torch.equal(together[one : one + 1], alone)


def test_nothing_of_the_input_is_changed_or_given_back() -> None:
    made = tables()
    for rows in ([0, 0], [1, 1], [0, 1]):
        set_rows(made, rows)
        logits = torch.randn(2, EXPERTS)
        before = logits.clone()
        got = torch.ops.moesteer.steer(logits, 1)
        assert torch.equal(logits, before)
        assert got.data_ptr() != logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    made = tables()
    bias, _ = made.content()
    rows = set_rows(made, [1, 2, 3, 0])
    logits = torch.randn(4, EXPERTS).to(dtype)
    got = torch.ops.moesteer.steer(logits, 5)
    assert got.dtype == dtype
    assert torch.equal(got, (logits.float() + torch.tensor(bias[rows, 2])).to(dtype))


def test_forced_experts_stay_apart_in_bfloat16() -> None:
    made = tables(force=True)
    set_rows(made, [2] * 32)
    logits = (torch.randn(32, EXPERTS) * 200).to(torch.bfloat16)
    got = torch.ops.moesteer.steer(logits, 1)
    rest = [e for e in range(EXPERTS) if e not in (3, 5)]
    assert (got[:, 3] > got[:, rest].amax(-1)).all()
    assert (got[:, 5] < got[:, rest].amin(-1)).all()


def test_columns_of_shared_experts_pass_untouched() -> None:
    made = tables(force=True)
    set_rows(made, [1, 2])
    logits = torch.randn(2, EXPERTS + 2)
    got = torch.ops.moesteer.steer(logits, 4)
    assert torch.equal(got[:, EXPERTS:], logits[:, EXPERTS:])
    assert torch.equal(got[:, :EXPERTS], torch.ops.moesteer.steer(logits[:, :EXPERTS].contiguous(), 4))


def test_gate_scores_are_of_the_unsteered_logits_summed_over_layers() -> None:
    made = tables(force=True, gates=3)
    assert made.gate is not None
    weights = np.stack([w.numpy() for w in made.gate])
    set_rows(made, [2, 1, 0, 3])
    for number in range(2):  # a second step begins anew
        logits = np.random.default_rng(number).normal(size=(len(LAYERS), 4, EXPERTS)).astype(np.float32)
        for place, layer in enumerate(LAYERS):
            torch.ops.moesteer.steer(torch.tensor(logits[place]), layer)
        np.testing.assert_allclose(
            made.score_TG[:4].numpy(), np.einsum("lne,leg->ng", logits, weights), rtol=1e-5, atol=1e-5
        )


def test_capture_keeps_raw_logits_and_selections_best_first() -> None:
    made = tables(capture="logits", force=True)
    set_rows(made, [1, 2])
    logits = torch.randn(2, EXPERTS)
    steered = torch.ops.moesteer.steer(logits, 4)
    weights, experts = steered.softmax(-1).topk(TOP_K)
    shuffled = torch.tensor([2, 0, 1])
    torch.ops.moesteer.selected(weights[:, shuffled], experts[:, shuffled].int(), steered, 4)
    assert made.logits_TLE is not None and made.selected_TLK is not None
    assert torch.equal(made.logits_TLE[:2, 1], logits)
    assert torch.equal(made.selected_TLK[:2, 1], experts.int())


def test_forces_are_counted_and_a_router_that_does_not_follow_is_seen() -> None:
    made = tables(force=True)
    set_rows(made, [2, 2, 0])
    right = torch.tensor([[3, 0, 1], [3, 2, 1], [5, 6, 7]])
    weights = torch.ones(3, TOP_K)
    made.selected(weights, right, torch.zeros(3, EXPERTS), 4)
    assert (int(made.forced_L.sum()), int(made.wrong_L.sum())) == (4, 0)
    made.selected(weights, torch.tensor([[5, 0, 1], [3, 2, 1], [5, 6, 7]]), torch.zeros(3, EXPERTS), 4)
    assert int(made.wrong_L.sum()) == 2  # 3 is missing, 5 is in


def test_a_forced_selection_beside_the_router_is_that_of_routing() -> None:
    scoring = Scoring("sigmoid", TOP_K, renormalise=True, groups=2, groups_kept=1, group_score="top2-sum")
    correction = torch.linspace(-2, 2, EXPERTS)
    made = tables(force=True)
    for layer in LAYERS:
        made.selecting[layer] = Selecting(scoring, correction, None)
    rows = set_rows(made, [2, 0, 3, 2, 1])
    _, forced = made.content()
    logits = torch.randn(5, EXPERTS)
    steered = torch.ops.moesteer.steer(logits, 4)
    routers_own = torch.full((5, TOP_K), 0.5), torch.tensor([[5, 6, 7]] * 5)
    weights, experts = torch.ops.moesteer.selected(*routers_own, steered, 4)
    want = select(steered.numpy(), scoring, correction_E=correction.numpy(), force_TE=forced[rows, 1])
    for token, row in enumerate(rows):
        switched = forced[row, 1].any()
        assert experts[token].tolist() == (want.experts_TK[token].tolist() if switched else [5, 6, 7])
        np.testing.assert_allclose(weights[token], want.weights_TK[token] if switched else [0.5] * 3, rtol=1e-6)
    assert int(made.wrong_L.sum()) == 0


def test_changed_selections_of_steered_tokens_are_counted() -> None:
    made = tables(count=True)
    set_rows(made, [1, 0, 2, 3])
    logits = torch.randn(4, EXPERTS)
    steered = torch.ops.moesteer.steer(logits, 1)
    assert torch.equal(torch.ops.moesteer.raw(steered, 1), logits)
    before, after = logits.topk(TOP_K).indices, steered.topk(TOP_K).indices
    torch.ops.moesteer.compared(before.flip(-1), after, 1)
    differs = [set(a.tolist()) != set(b.tolist()) for a, b in zip(before, after, strict=True)]
    assert int(made.checked_L.sum()) == 3
    assert int(made.changed_L.sum()) == sum(differs) > 0


def test_every_layer_is_counted_once_a_pass() -> None:
    made = tables()
    set_rows(made, [1])
    for layer in LAYERS[:2]:
        torch.ops.moesteer.steer(torch.randn(1, EXPERTS), layer)
    assert made.beats_L.tolist() == [1, 1, 0]


def test_compiled_code_sees_rows_and_tables_that_change() -> None:
    """Opaque to the compiler: nothing of a mask or a batch is baked into a graph."""
    made = tables()
    bias, _ = made.content()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.moesteer.steer(x * 2, 4) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in ([1, 2, 3], [0, 0, 0], [3], [2] * 7):
        chosen = set_rows(made, rows)
        x = torch.randn(len(rows), EXPERTS)
        want = x.numpy() * 2 + bias[chosen, 1] + 1
        np.testing.assert_allclose(compiled(x).numpy(), want, rtol=1e-6)


def test_a_router_of_no_steered_model_fails_and_does_not_run_unsteered() -> None:
    tables()
    with pytest.raises(ModelError, match="belongs to no steered model"):
        torch.ops.moesteer.steer(torch.randn(1, EXPERTS), 2)
    run_with(None)
    with pytest.raises(ModelError, match="belongs to no steered model"):
        torch.ops.moesteer.steer(torch.randn(1, EXPERTS), 1)


def test_warm_up_passes_are_not_steered() -> None:
    made = tables(force=True)
    set_rows(made, [2, 1])
    made.clear_rows()
    logits = torch.randn(2, EXPERTS)
    assert torch.equal(torch.ops.moesteer.steer(logits, 4), logits)


def test_rows_of_an_earlier_step_do_not_reach_into_padding() -> None:
    made = tables()
    set_rows(made, [1] * 8)
    set_rows(made, [2, 3])
    assert made.row_T.tolist() == [2, 3] + [0] * (TOKENS - 2)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, EXPERTS - 1])
def test_a_router_is_not_blamed_for_logits_that_are_no_numbers(odd: float, where: int) -> None:
    made = tables(force=True)
    set_rows(made, [2, 2, 2, 0])
    wrong = torch.tensor([[5, 0, 1]] * 4)  # 3 is missing, 5 is in
    logits = torch.zeros(4, EXPERTS)
    logits[1, where] = odd
    made.selected(torch.ones(4, TOP_K), wrong, logits, 4)
    assert (int(made.forced_L.sum()), int(made.wrong_L.sum())) == (6, 4)  # the other two tokens are still counted
    made.selected(torch.ones(4, TOP_K), wrong, torch.full((4, EXPERTS), odd), 4)
    assert int(made.wrong_L.sum()) == 4

"""routing.py's scores, selection and weights against the loops of routing_oracle.py; and which logits it refuses.

Legend: T tokens, E experts, S shared experts behind them, K selected, G groups.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moesteer.errors import MaskContentError, NanLogitsError
from moesteer.routing import Scoring, select, steer_logits
from tests.unit.routing_oracle import (
    KINDS,
    NEAR,
    PROPERTY,
    SEARCHED,
    Case,
    as_numpy,
    assert_matches_loop,
    forced,
    loop_rank,
    loop_sparsemixer,
    routed,
    zero_norms,
)


@zero_norms
@SEARCHED
@given(routed())
def test_selection_and_weights_equal_the_brute_force_loop(case):
    assert_matches_loop(case)


@zero_norms
@SEARCHED
@given(routed(grouped=True))
def test_group_limited_selection_equals_the_brute_force_loop(case):
    assert_matches_loop(case)


@zero_norms
@SEARCHED
@given(st.booleans().flatmap(lambda grouped: routed(grouped=grouped)), st.data())
def test_forced_selection_equals_the_brute_force_loop_and_outranks_corrections_and_groups(case, data):
    force = data.draw(forced(case))
    found = assert_matches_loop(case, force)
    on = {e for e in range(case.experts) if force[e] > 0}
    off = {e for e in range(case.experts) if force[e] < 0}
    for chosen in found.as_sets():
        assert on <= chosen and not off & chosen and len(chosen) == case.scoring.top_k


@pytest.mark.parametrize("group_score, expected", [("max", {4, 5}), ("top2-sum", {0, 1})])
def test_the_two_group_scores_choose_different_groups(group_score, expected):
    logits = np.array([[3.0, 3.0, 0.0, 0.0, 4.0, -9.0]], dtype=np.float32)
    scoring = Scoring("topk-softmax", 2, groups=3, groups_kept=1, group_score=group_score)
    assert select(logits, scoring).as_sets() == [frozenset(expected)]


@pytest.mark.parametrize("fill, expected", [(-math.inf, [0, 1]), (0.0, [0, 2])])
def test_experts_of_a_closed_group_compete_with_the_fill(fill, expected):
    # choice 0.5, -0.5 | -0.25, -0.25: the first group is kept, and its second expert is below 0
    correction = np.array([0.0, -1.0, -0.75, -0.75], np.float32)
    scoring = Scoring("sigmoid", 2, groups=2, groups_kept=1, group_fill=fill)
    found = select(np.zeros((1, 4), np.float32), scoring, correction_E=correction)
    assert found.experts_TK.tolist() == [expected]
    assert found.weights_TK.tolist() == [[0.5, 0.5]]  # the expert's own, filled or not


def test_a_correction_decides_who_is_selected_and_not_with_what_weight():
    logits = np.array([[0.0, 0.0, 0.0]], dtype=np.float32)
    found = select(logits, Scoring("sigmoid", 2), correction_E=np.array([0.0, 0.5, 1.0], dtype=np.float32))
    assert found.experts_TK.tolist() == [[2, 1]]
    assert found.weights_TK.tolist() == [[0.5, 0.5]]


def test_topk_sigmoid_corrects_logits_where_sigmoid_corrects_scores():
    logits, correction = np.array([[9.0, 7.0]], np.float32), np.array([0.0, 1.0], np.float32)
    assert select(logits, Scoring("sigmoid", 1), correction_E=correction).experts_TK.tolist() == [[1]]
    found = select(logits, Scoring("topk-sigmoid", 1), correction_E=correction)
    assert found.experts_TK.tolist() == [[0]]
    np.testing.assert_allclose(found.weights_TK, [[1 / (1 + math.exp(-9))]], rtol=1e-6)


def test_sqrtsoftplus_is_the_root_of_softplus_far_up_and_far_down():
    logits = np.array([[90.0, 20.5, 19.5, 0.0, -80.0, -200.0]], np.float32)
    found = select(logits, Scoring("sqrtsoftplus", 6))
    assert found.experts_TK.tolist() == [[0, 1, 2, 3, 4, 5]]
    truth = [math.sqrt(math.log1p(math.exp(min(x, 700)))) for x in logits[0].tolist()]
    np.testing.assert_allclose(found.weights_TK[0], truth, rtol=1e-6, atol=1e-30)


def test_the_multiplier_comes_before_the_softcap():
    found = select(np.array([[3.0, 1.0]], np.float32), Scoring("sigmoid", 1, multiplier=2.0, softcap=4.0))
    np.testing.assert_allclose(found.weights_TK, [[1 / (1 + math.exp(-4 * math.tanh(6 / 4)))]], rtol=1e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.6 / 1.4, 0.8 / 1.4]),
        ({"norm_p": 2.0}, [0.6, 0.8]),
        ({"norm_add": 0.6}, [0.3, 0.4]),
        ({"norm_min": 2.8}, [0.6 / 2.8, 0.8 / 2.8]),
        ({"norm_min": 1.0}, [0.6 / 1.4, 0.8 / 1.4]),
        ({"norm_p": 2.0, "norm_add": 1.0, "norm_min": 1.5, "scale": 3.0}, [0.9, 1.2]),
        ({"renormalise": False, "norm_p": 2.0, "norm_add": 1.0, "norm_min": 9.0}, [0.6, 0.8]),
    ],
)
def test_renormalisation_by_hand(options, expected):
    logits = np.array([[math.log(0.6 / 0.4), math.log(0.8 / 0.2), -9.0]], np.float32)
    found = select(logits, Scoring("sigmoid", 2, **{"renormalise": True, **options}))
    assert found.experts_TK.tolist() == [[1, 0]]
    np.testing.assert_allclose(found.weights_TK, [expected[::-1]], rtol=1e-6)


def test_an_experts_scale_comes_after_the_norm_and_goes_with_the_expert():
    scale = np.array([5.0, 4.0, 0.5], np.float32)
    found = select(np.array([[-9.0, 0.0, 0.0]], np.float32), Scoring("sigmoid", 2, renormalise=True), scale_E=scale)
    assert found.experts_TK.tolist() == [[1, 2]]
    assert found.weights_TK.tolist() == [[2.0, 0.25]]


def test_shared_experts_share_in_the_norm_and_are_never_chosen():
    scoring = Scoring("sigmoid", 1, renormalise=True, shared=2, scale=8.0)
    found = select(np.array([[0.0, -30.0, 0.0, 90.0]], np.float32), scoring)
    assert found.experts_TK.tolist() == [[0]]
    np.testing.assert_allclose(found.weights_TK, [[2.0]], rtol=1e-6)
    np.testing.assert_allclose(found.shared_TS, [[2.0, 4.0]], rtol=1e-6)


def test_a_skip_is_chosen_like_an_expert_and_weighs_nothing():
    scoring = Scoring("sigmoid", 2, skipped=1)
    found = select(np.array([[0.0, -1.0, 5.0]], np.float32), scoring)
    assert found.experts_TK.tolist() == [[2, 0]]
    assert found.weights_TK.tolist() == [[0.0, 0.5]]


@zero_norms
@PROPERTY
@given(routed())
def test_renormalised_weights_sum_to_the_scale_and_others_to_no_more(case):
    plain = {"norm_p": 1.0, "norm_add": 0.0, "norm_min": 0.0, "skipped": 0}
    scoring = Scoring(**{**vars(case.scoring), **plain})
    found = select(np.array(case.rows, np.float32), scoring, correction_E=case.vectors["correction_E"])
    weights = np.concatenate([found.weights_TK, found.shared_TS], axis=-1).sum(axis=-1)
    if scoring.renormalise or scoring.kind == "topk-softmax":
        np.testing.assert_allclose(weights, scoring.scale, rtol=1e-5)
    elif scoring.kind == "softmax-topk":
        assert (weights <= scoring.scale * (1 + 1e-5)).all() and (weights > 0).all()


@pytest.mark.parametrize("kind", [*KINDS, "sparsemixer"])
def test_ties_go_to_the_lower_expert(kind):
    assert select(np.ones((1, 7), np.float32), Scoring(kind, 2)).experts_TK.tolist() == [[0, 1]]


@pytest.mark.parametrize("kind", [*KINDS, "sparsemixer"])
def test_no_tokens_give_an_empty_selection(kind):
    found = select(np.zeros((0, 4), np.float32), Scoring(kind, 2))
    assert found.experts_TK.shape == found.weights_TK.shape == (0, 2)
    assert found.shared_TS.shape == (0, 0)


# ---------------------------------------------------------------- sparsemixer


@PROPERTY
@given(
    st.lists(st.integers(-400, 400).filter(bool).map(lambda n: n / 128), min_size=2, max_size=10),
    st.sampled_from((0.01, 0.1, 0.3)),
    st.sampled_from((1.0, 2.5)),
    st.booleans(),
    st.data(),
)
def test_sparsemixer_equals_its_definition(row, jitter, scale, steered, data):
    scoring = Scoring("sparsemixer", 2, jitter=jitter, scale=scale)
    force = data.draw(forced(Case([row], scoring))) if steered else None
    logits = np.array([row], np.float32)
    if force is not None:
        force = np.array(force)
        if data.draw(st.booleans()):  # else the picks need not be the highest
            logits = steer_logits(logits, force_TE=force)
    row = logits[0].tolist()
    classes = None if force is None else force.tolist()
    # a ratio within rounding of the threshold may fall either way in float32
    for top in (row[e] for e in loop_rank(row, classes)[:2]):
        for s in row:
            assume(abs((top - s) / (max(abs(s), top) or 1) - 2 * jitter) > NEAR)
    found = select(logits, scoring, force_TE=force)
    chosen, weights = loop_sparsemixer(row, jitter, classes)
    assert found.experts_TK[0].tolist() == chosen
    np.testing.assert_allclose(found.weights_TK[0], [w * scale for w in weights], rtol=1e-5)


def test_sparsemixer_by_hand():
    # top 10: 9.9 is within 2 % and 9.7 is not. Second: 9.9; 9.7 is 2.02 % below, 9.75 is 1.5 % below
    found = select(np.array([[9.75, 10.0, 9.9, 9.7]], np.float32), Scoring("sparsemixer", 2))
    assert found.experts_TK.tolist() == [[1, 2]]
    first = 1 / (1 + math.exp(-0.1))
    second = 1 / (1 + math.exp(-0.15))
    np.testing.assert_allclose(found.weights_TK, [[first, second]], rtol=1e-5)


def test_sparsemixer_changes_with_a_shift_of_all_logits():
    near = Scoring("sparsemixer", 2, jitter=0.05)
    low, high = (select(np.array([[1.0, 0.8, 0.0]], np.float32) + shift, near) for shift in (0, 100))
    assert low.experts_TK.tolist() == high.experts_TK.tolist()
    assert low.weights_TK[0, 0] == 1.0 and high.weights_TK[0, 0] < 0.6


@pytest.mark.parametrize("k", [1, 3])
def test_sparsemixer_is_refused_for_another_k(k):
    with pytest.raises(MaskContentError, match=f"sparsemixer with k = {k}"):
        select(np.zeros((1, 4), np.float32), Scoring("sparsemixer", k))


def near_ties(dtype, *, tokens=3000, experts=12, seed=3):
    """Logits [T, E] of which many are equal and many within a few percent, about the jitter, of another."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(tokens, 1)) * rng.choice([0.1, 1, 20], (tokens, 1))
    close = base * (1 + rng.choice([0, 0.01, 0.02, 0.0201, 0.04], (tokens, experts)) * rng.choice([-1, 1], experts))
    far = rng.normal(size=(tokens, experts))
    logits = np.where(rng.random((tokens, experts)) < 0.6, close, far)
    logits[rng.random((tokens, experts)) < 0.05] = 0
    return torch.tensor(logits, dtype=torch.float32).to(dtype)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.4])
def test_sparsemixer_equals_the_one_of_transformers(dtype, jitter):
    logits = near_ties(dtype)
    weights, experts = sparsemixer(logits, jitter_eps=jitter, training=False)
    scoring = Scoring("sparsemixer", 2, jitter=jitter, low_precision=True)
    found = select(as_numpy(logits), scoring, dtype=str(dtype).removeprefix("torch."))
    assert found.experts_TK.tolist() == experts.tolist()
    # theirs end in the logits' dtype: half a unit of its last place
    rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + 1e-5
    np.testing.assert_allclose(found.weights_TK, as_numpy(weights), rtol=rtol)
    assert len(np.unique(found.weights_TK)) > 500  # near ties there were


@pytest.mark.filterwarnings("error")
def test_sparsemixer_warns_of_nothing_where_the_highest_logit_is_zero():
    # second pick -1, relative to the 0 that was picked before: -1 / 0 is not far
    found = select(np.array([[0.0, -1.0, -3.0]], np.float32), Scoring("sparsemixer", 2))
    assert found.experts_TK.tolist() == [[0, 1]] and found.weights_TK.tolist() == [[1.0, 1.0]]


# ---------------------------------------------------------------- what is refused, and how a scoring is named


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [*KINDS, "sparsemixer"])
def test_logits_that_are_not_finite_are_refused_and_placed(kind, bad):
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = bad
    with pytest.raises(NanLogitsError, match=f"router logits hold {bad}") as caught:
        select(logits, Scoring(kind, 2))
    assert caught.value.where == "token 1, expert 2"


def test_a_shared_experts_logit_that_is_not_finite_is_refused_too():
    with pytest.raises(NanLogitsError, match="router logits hold nan"):
        select(np.array([[1.0, 2.0, np.nan]], np.float32), Scoring("sigmoid", 1, shared=1))


def test_a_whole_row_of_minus_infinity_and_a_float16_overflow_are_refused():
    with np.errstate(over="ignore"):
        overflown = np.array([[70000.0, 1.0]]).astype(np.float16)
    for logits in (np.full((1, 3), -np.inf, np.float32), overflown):
        with pytest.raises(NanLogitsError):
            select(logits, Scoring("softmax-topk", 1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["sigmoid", "topk-sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("guard", [{"norm_add": 1e-20}, {"norm_min": 1e-12}])
def test_a_guarded_norm_gives_zeros_when_all_scores_underflow(kind, guard):
    found = select(np.full((1, 4), -200.0, np.float32), Scoring(kind, 2, renormalise=True, **guard))
    assert found.weights_TK.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    "scoring, text",
    [
        (Scoring("softmax-topk", 8), "softmax-topk k=8"),
        (Scoring("softmax-topk", 8, renormalise=True, scale=2.5), "softmax-topk k=8, renormalised, x2.5"),
        (
            Scoring("sigmoid", 4, groups=8, groups_kept=3, group_score="top2-sum"),
            "sigmoid k=4, 3 of 8 groups by top2-sum",
        ),
        (Scoring("sparsemixer", 2, jitter=0.1), "sparsemixer k=2, jitter=0.1"),
        (Scoring("softmax-topk", 4, renormalise=True, norm_p=2.0), "softmax-topk k=4, renormalised by the 2-norm"),
        (Scoring("sigmoid", 4, multiplier=0.5, softcap=30.0), "sigmoid k=4, logits x0.5, softcap=30"),
        (Scoring("sigmoid", 4, shared=2, skipped=1), "sigmoid k=4, 2 shared in the norm, last 1 skip"),
    ],
)
def test_a_scoring_describes_all_that_makes_it_another(scoring, text):
    assert scoring.describe() == text

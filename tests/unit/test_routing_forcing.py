"""Steered logits, and which experts can be forced on and off: every force there is, on small routers.

Legend: T tokens, E experts, K selected, G groups.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.errors import MaskContentError
from moesteer.routing import FORCE_EPS, Scoring, check_force, select, steer_logits
from tests.unit.routing_oracle import KINDS, PROPERTY, assert_matches_loop, loop_feasible, loop_rank, routed, zero_norms

SATURATING = ("softmax-topk", "sigmoid", "sqrtsoftplus")
"""Kinds that choose by a bent score, in which huge logits become equal."""


# ---------------------------------------------------------------- steering


@zero_norms
@PROPERTY
@given(routed(), st.data())
def test_additive_steering_is_selecting_from_logits_plus_bias(case, data):
    cells = st.integers(-24, 24).map(lambda n: n / 8)
    bias = data.draw(st.lists(cells, min_size=len(case.rows[0]), max_size=len(case.rows[0])))
    steered = steer_logits(np.array(case.rows, np.float32), bias_TE=np.array(bias, np.float32))
    plain = [[z + b for z, b in zip(row, bias, strict=True)] for row in case.rows]  # exact: all are eighths
    assert steered.tolist() == plain
    assert_matches_loop(case._replace(rows=steered.tolist()))


def loop_steer(row, bias, force):
    """SteerMoE's placement with our per-expert order, from the docstring: (lowest allowed, highest allowed)."""
    z = [x + b for x, b in zip(row, bias, strict=True)]
    on = sorted((e for e in range(len(z)) if force[e] > 0), key=lambda e: (z[e], e))
    steered = list(z)
    for rank, e in enumerate(on):
        steered[e] = max(z) + FORCE_EPS * (1 + rank / len(on))
    for e in range(len(z)):
        if force[e] < 0:
            steered[e] = min(z) - FORCE_EPS
    return steered


@PROPERTY
@given(st.data())
def test_forced_logits_lie_an_eps_beyond_the_extremes_after_the_bias(data):
    experts = data.draw(st.integers(1, 9))
    cells = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=experts, max_size=experts)
    row, bias = data.draw(cells), data.draw(cells)
    force = data.draw(st.lists(st.sampled_from((-1, 0, 1)), min_size=experts, max_size=experts))
    found = steer_logits(np.array([row], np.float32), bias_TE=np.array(bias, np.float32), force_TE=np.array(force))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], loop_steer(row, bias, force), rtol=1e-6, atol=1e-6)


def test_forcing_works_on_tables_of_one_row_and_of_one_row_per_token():
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    force = np.array([[1, 0, 0], [0, -1, 0]], dtype=np.int8)
    whole = steer_logits(logits, force_TE=force)
    for t in range(2):
        assert whole[t].tobytes() == steer_logits(logits[t : t + 1], force_TE=force[t])[0].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_empty_bias_and_an_empty_force_change_no_bit(dtype):
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(50, 16)) * 10).astype(dtype)
    same = steer_logits(logits, bias_TE=np.zeros(16, np.float32), force_TE=np.zeros(16, np.int8))
    assert same.tobytes() == logits.astype(np.float32).tobytes() == steer_logits(logits).tobytes()
    for kind in KINDS:
        scoring = Scoring(kind, 3, renormalise=True)
        a, b = select(logits, scoring), select(same, scoring, force_TE=np.zeros(16, np.int8))
        assert a.experts_TK.tobytes() == b.experts_TK.tobytes() and a.weights_TK.tobytes() == b.weights_TK.tobytes()


def hard_rows(experts):
    """Moderate rows first (three random, one tied in pairs, two flat), then huge ones."""
    rng = np.random.default_rng(experts)
    moderate = [*rng.normal(size=(3, experts)) * 3, np.arange(experts) // 2, np.zeros(experts), np.full(experts, -2.5)]
    signs = np.where(np.arange(experts) % 2, -1.0, 1.0)
    huge = [signs * 3e38, np.full(experts, 3e38), np.full(experts, -3e38), signs * 1e30, np.arange(experts) * 1e30]
    return np.array([*moderate, *huge], dtype=np.float32), len(moderate)


@pytest.mark.parametrize("experts", range(1, 7))
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_every_feasible_force_is_honoured_and_others_keep_their_order(experts):
    logits, moderate = hard_rows(experts)
    for top_k in range(1, min(3, experts) + 1):
        kinds = [*KINDS, "sparsemixer"] if top_k == 2 else KINDS
        tried = 0
        for mask in itertools.product((-1, 0, 1), repeat=experts):
            on = {e for e in range(experts) if mask[e] > 0}
            off = {e for e in range(experts) if mask[e] < 0}
            if len(on) > top_k or len(off) > experts - top_k:
                continue
            tried += 1
            force = np.array(mask, dtype=np.int8)
            steered = steer_logits(logits, force_TE=force)
            for kind in kinds:
                chosen = select(steered, Scoring(kind, top_k), force_TE=force).experts_TK.tolist()
                for t, row in enumerate(chosen):
                    assert len(set(row)) == top_k
                    assert on <= set(row) and not off & set(row), (mask, kind, t)
                    if t >= moderate and kind in SATURATING:
                        continue  # scores of huge logits saturate into ties
                    free = [e for e in loop_rank(logits[t].tolist()) if e not in on | off]
                    assert row[len(on) :] == free[: top_k - len(on)], (mask, kind, t)
                    if t < moderate:
                        first = [float(logits[t, e]) for e in row[: len(on)]]
                        assert first == sorted(first, reverse=True), (mask, kind, t)
        assert tried == feasible_count(experts, top_k)


def feasible_count(experts, top_k):
    """Masks with at most k on and at most E - k off, by the multinomial formula."""
    return sum(
        math.comb(experts, on) * math.comb(experts - on, off)
        for on in range(top_k + 1)
        for off in range(experts - top_k + 1)
        if on + off <= experts
    )


# ---------------------------------------------------------------- what cannot be forced


@pytest.mark.parametrize(
    "force, top_k, what, where",
    [
        ([1, 1, 1, 0], 2, "3 experts are switched on where 2 are selected", "row 0"),
        ([-1, -1, -1, 0], 2, "3 of 4 experts are switched off where 2 must be selected", "row 0"),
        ([1, -1, -1, -1], 2, "3 of 4 experts are switched off", "row 0"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], 3, "4 experts are switched on where 3", "row 1"),
        ([[0, -1, 0, 0], [-1, -1, 0, 0]], 3, "2 of 4 experts are switched off", "row 1"),
    ],
)
def test_a_force_that_cannot_be_met_is_refused(force, top_k, what, where):
    force = np.array(force, dtype=np.int8)
    logits = np.zeros((2, 4), np.float32)
    for kind in KINDS:
        with pytest.raises(MaskContentError, match=what) as caught:
            select(logits, Scoring(kind, top_k), force_TE=force)
        assert where in caught.value.where
        with pytest.raises(MaskContentError, match=what):
            check_force(np.atleast_2d(force), scoring=Scoring(kind, top_k))


@pytest.mark.parametrize(
    "force, kept, top_k, what, where",
    [
        ([1, 0, 1, 0, 0, 0], 1, 2, "experts of 2 groups are switched on where 1 can be chosen", "row 0"),
        ([[0] * 6, [1, 0, 1, 0, 1, 0]], 2, 3, "experts of 3 groups are switched on where 2", "row 1"),
        ([[0] * 6, [0, 0, -1, 0, 0, 0]], 1, 2, "too few experts are left in the 1 of 3 groups", "row 1"),
        ([0, 0, -1, -1, 0, -1], 2, 2, "too few experts are left in the 2 of 3 groups", "row 0"),
    ],
)
def test_a_force_that_groups_cannot_follow_is_refused(force, kept, top_k, what, where):
    scoring = Scoring("sigmoid", top_k, groups=3, groups_kept=kept)
    force = np.atleast_2d(np.array(force, dtype=np.int8))
    with pytest.raises(MaskContentError, match=what) as caught:
        check_force(force, scoring=scoring)
    assert where in caught.value.where
    with pytest.raises(MaskContentError, match=what):
        select(np.zeros((len(force), 6), np.float32), scoring, force_TE=force)
    check_force(force, scoring=Scoring("sigmoid", top_k))  # without groups it can be met


def test_a_force_at_the_limit_is_accepted():
    check_force(np.array([[1, 1, -1, -1]]), scoring=Scoring("sigmoid", 2))
    check_force(np.zeros((0, 4), np.int8), scoring=Scoring("sigmoid", 2))
    check_force(np.array([[1, 1, -1, -1, 0, 0]]), scoring=Scoring("sigmoid", 2, groups=3, groups_kept=1))


def test_a_force_of_no_rows_is_accepted_with_groups():
    check_force(np.zeros((0, 4), np.int8), scoring=Scoring("sigmoid", 2, groups=2, groups_kept=1))


def grouped_scorings(experts, groups):
    for kept in range(1, groups + 1):
        for top_k in range(1, kept * experts // groups + 1):
            yield Scoring("sigmoid", top_k, groups=groups, groups_kept=kept)


def accepts(force, scoring):
    try:
        check_force(np.array([force], dtype=np.int8), scoring=scoring)
    except MaskContentError:
        return False
    return True


SMALL_GROUPS = [(2, 2), (4, 2), (6, 2), (3, 3), (6, 3)]


@pytest.mark.parametrize("experts, groups", SMALL_GROUPS)
def test_a_force_is_refused_just_where_some_choice_of_groups_cannot_follow_it(experts, groups):
    seen = set()
    for scoring in grouped_scorings(experts, groups):
        for force in itertools.product((-1, 0, 1), repeat=experts):
            accepted = accepts(force, scoring)
            assert accepted == loop_feasible(force, scoring), (force, scoring)
            seen.add(accepted)
    assert seen == {True, False}


@pytest.mark.parametrize("experts, groups", SMALL_GROUPS)
@pytest.mark.parametrize("group_score", ["max", "top2-sum"])
def test_an_accepted_force_is_met_whatever_the_logits_and_corrections(experts, groups, group_score):
    rng = np.random.default_rng(experts * groups)
    size = experts // groups
    for scoring in grouped_scorings(experts, groups):
        accepted = [f for f in itertools.product((-1, 0, 1), repeat=experts) if loop_feasible(f, scoring)]
        force = np.repeat(np.array(accepted, dtype=np.int8), 2, axis=0)
        logits = steer_logits(np.round(rng.normal(size=force.shape) * 8).astype(np.float32) / 4, force_TE=force)
        correction = np.round(rng.normal(size=experts) * 4).astype(np.float32) / 4
        scoring = Scoring(**{**vars(scoring), "group_score": group_score})
        found = select(logits, scoring, correction_E=correction, force_TE=force)
        chosen = np.zeros(force.shape, dtype=bool)
        np.put_along_axis(chosen, found.experts_TK, True, axis=-1)
        assert (chosen.sum(axis=-1) == scoring.top_k).all()
        assert chosen[force > 0].all() and not chosen[force < 0].any()
        # who is free and chosen lies in a group that is kept; the ranking of groups, once more by hand
        choice = 1 / (1 + np.exp(-logits.astype(np.float64))) + correction
        best = np.sort(choice.reshape(-1, groups, size), axis=-1)[..., -(2 if group_score == "top2-sum" else 1) :]
        score_TG = best.sum(axis=-1)
        nth = np.sort(score_TG, axis=-1)[:, -scoring.groups_kept, None]
        may_be_open = np.repeat(score_TG >= nth - 1e-6, size, axis=-1)
        assert may_be_open[chosen & (force == 0)].all()

"""Families of tests and groups of items (evaluate/stats.py): Holm, sign flips, design effects, against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.evaluate.stats import design_effect, holm, mcnemar, sign_flip

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)

# ---------------------------------------------------------------- Holm


@pytest.mark.parametrize(
    "raw, adjusted",
    [
        # what R's p.adjust(method = "holm") gives: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 not below the one before
        ({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}, {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}),
        ({"a": 0.01, "b": 0.02, "c": 0.03}, {"a": 0.03, "b": 0.04, "c": 0.04}),
        ({"a": 0.5, "b": 0.6}, {"a": 1.0, "b": 1.0}),
        ({"a": 0.04}, {"a": 0.04}),
        ({"a": 0.02, "b": None, "c": 0.04}, {"a": 0.04, "b": None, "c": 0.04}),
        ({"a": None}, {"a": None}),
        ({}, {}),
    ],
)
def test_holm_equals_worked_examples(raw, adjusted):
    found = holm(raw)
    assert list(found) == list(raw)
    assert found == {name: None if p is None else pytest.approx(p) for name, p in adjusted.items()}


def stepped_down(raw, level):
    """Holm's procedure as he wrote it: reject from the smallest on until one is above level / (those left)."""
    rejected = set()
    for place, name in enumerate(sorted(raw, key=raw.get)):
        if raw[name] > level / (len(raw) - place):
            break
        rejected.add(name)
    return rejected


@PROPERTY
@given(st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.floats(0, 1), max_size=8), st.floats(0.01, 0.2))
def test_holm_adjusted_values_are_those_at_which_the_procedure_rejects(raw, level):
    found = holm(raw)
    if any(abs(p - level) < 1e-9 for p in found.values()):
        return  # at the level itself rounding decides
    assert {name for name, p in found.items() if p < level} == stepped_down(raw, level)


@PROPERTY
@given(st.dictionaries(st.integers(0, 50), st.floats(0, 1) | st.none(), min_size=1, max_size=9))
def test_holm_keeps_its_laws(raw):
    found = holm(raw)
    tested = {name: p for name, p in raw.items() if p is not None}
    assert {name for name, p in found.items() if p is None} == set(raw) - set(tested)
    assert all(p <= found[name] <= min(1.0, len(tested) * p) for name, p in tested.items())
    ranked = sorted(tested, key=tested.get)
    assert [found[name] for name in ranked] == sorted(found[name] for name in ranked)
    if ranked:
        assert found[ranked[0]] == min(1.0, len(tested) * tested[ranked[0]])  # Bonferroni for the smallest
    assert holm({**raw, "not tested": None}) == {**found, "not tested": None}


def test_holm_holds_the_family_at_its_level():
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(4000):
        shared = rng.standard_normal()  # comparisons with one `none` are not independent
        scores = 0.7 * shared + math.sqrt(0.51) * rng.standard_normal(6)
        raw = {str(i): math.erfc(abs(x) / math.sqrt(2)) for i, x in enumerate(scores)}
        wrong += min(holm(raw).values()) <= 0.05
    assert 0.02 < wrong / 4000 < 0.055  # without correction it is 0.2


# ---------------------------------------------------------------- sign flips of groups


@PROPERTY
@given(st.lists(st.integers(-5, 5), max_size=9))
def test_sign_flip_equals_enumeration_of_all_signs(totals):
    sums = [
        sum(s * t for s, t in zip(signs, totals, strict=True))
        for signs in itertools.product((1, -1), repeat=len(totals))
    ]
    expected = sum(abs(total) >= abs(sum(totals)) for total in sums) / len(sums)
    assert sign_flip(totals) == pytest.approx(expected, abs=1e-12)


@PROPERTY
@given(st.lists(st.tuples(*[st.sampled_from((True, False, None))] * 2), max_size=25))
def test_sign_flip_of_single_items_is_mcnemar(pairs):
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    totals = [int(a) - int(b) for b, a in zip(before, after, strict=True) if a is not None and b is not None]
    assert sign_flip(totals) == pytest.approx(mcnemar(before, after), abs=1e-12)


@PROPERTY
@given(st.lists(st.integers(-5, 5), max_size=20), st.integers(1, 4))
def test_sign_flip_knows_no_order_direction_or_scale(totals, scale):
    found = sign_flip(totals)
    assert sign_flip([-t for t in totals]) == found == sign_flip([*reversed(totals), 0, 0])
    # the same answers under more seeds are no more evidence
    assert sign_flip([scale * t for t in totals]) == pytest.approx(found, abs=1e-12)


def test_sign_flip_is_exact_for_many_groups():
    assert sign_flip([3] * 200) == pytest.approx(2.0**-199, rel=1e-9)
    assert sign_flip([]) == sign_flip([0, 0]) == sign_flip([2, -2]) == 1.0


# ---------------------------------------------------------------- design effect


def test_design_effect_of_alike_groups_is_their_size():
    values = [float(g % 2) for g in range(200) for _ in range(4)]
    groups = [str(g) for g in range(200) for _ in range(4)]
    assert design_effect(values, groups) == pytest.approx(4.0, rel=0.01)
    # one imagined item against 200: (4 + 800 * 200 / 199) / (1 + 200 * 800 / 799)
    assert design_effect(values, groups) == pytest.approx((4 + 800 * 200 / 199) / (1 + 200 * 800 / 799), rel=1e-12)


def test_design_effect_of_groups_that_balance_or_of_single_items_is_one():
    assert design_effect([0.0, 1.0] * 100, [str(i // 2) for i in range(200)]) == 1.0
    assert design_effect([0.0, 1.0, 1.0, 0.0, 1.0], list("abcde")) == pytest.approx(1.0)


def test_design_effect_where_nothing_is_off_leaves_as_many_items_as_groups():
    assert design_effect([1.0] * 60, [str(i // 3) for i in range(60)]) == 3.0
    assert design_effect([0.0] * 6, ["a"] * 6) == design_effect([0.0, 1.0] * 3, ["a"] * 6) == 6.0
    assert design_effect([], []) == 1.0


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from((-1.0, 0.0, 1.0)), st.sampled_from("abcd")), min_size=1, max_size=30))
def test_design_effect_lies_between_one_and_n_and_knows_no_sign_or_order(pairs):
    values, groups = [v for v, _ in pairs], [g for _, g in pairs]
    found = design_effect(values, groups)
    assert 1.0 <= found <= len(pairs) * 2
    assert design_effect([-v for v in reversed(values)], list(reversed(groups))) == pytest.approx(found, rel=1e-9)

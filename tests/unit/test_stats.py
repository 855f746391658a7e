"""evaluate/stats.py against published intervals, binomials by hand, enumeration, laws, simulation; and metrics.py."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.errors import UnknownNameError
from moesteer.evaluate.metrics import METRICS, metric, outcome, wanted
from moesteer.evaluate.stats import Rate, mcnemar, paired_difference, rate, wilson

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
Z = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""

VERDICTS = ("refused", "complied", "deflected", "correct", "wrong", "broken")
outcomes = st.lists(st.sampled_from((True, False, None)), max_size=30)


def of(successes, n, unscored=0):
    return [True] * successes + [False] * (n - successes) + [None] * unscored


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_ones(successes, n, low, high):
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    found = rate(of(successes, n))
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_wilson_interval_equals_its_formula_for_every_count(n):
    for x in range(n + 1):
        p = x / n
        centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        found = rate(of(x, n))
        assert found.value == p
        assert found.low == pytest.approx(max(0.0, centre - half), rel=1e-9, abs=1e-12)
        assert found.high == pytest.approx(min(1.0, centre + half), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n", [1, 9, 40])
def test_wilson_of_a_share_is_the_interval_of_the_rate(n):
    for x in range(n + 1):
        found = rate(of(x, n))
        assert wilson(x / n, n) == pytest.approx((found.low, found.high), rel=1e-9, abs=1e-12)
    assert wilson(0.0, n)[0] == 0.0 and wilson(1.0, n)[1] == 1.0


def test_wilson_of_fewer_effective_items_is_wider():
    (low, high), (lower, higher) = wilson(0.9, 100), wilson(0.9, 24.5)
    assert lower < low < 0.9 < high < higher


@PROPERTY
@given(outcomes, st.integers(0, 9))
def test_unscored_items_are_counted_and_never_averaged(items, more):
    bare = [item for item in items if item is not None]
    mixed = [*items, *[None] * more]
    random.Random(more).shuffle(mixed)
    with_none, without = rate(mixed), rate(bare)
    assert with_none.unscored == items.count(None) + more and without.unscored == 0
    assert (with_none.value, with_none.low, with_none.high, with_none.n) == (
        without.value, without.low, without.high, len(bare)
    )  # fmt: skip


@pytest.mark.parametrize("unscored", [0, 3])
def test_nothing_scored_gives_no_number(unscored):
    assert rate([None] * unscored) == Rate(None, None, None, 0, unscored)


def test_a_rate_is_written_with_all_its_parts():
    found = rate(of(1, 4, 2))
    assert found.as_json() == asdict(found)
    assert set(found.as_json()) == {"value", "low", "high", "n", "unscored"}
    assert found.as_json()["n"] == 4 and found.as_json()["unscored"] == 2


@pytest.mark.parametrize("n", [10, 50, 200])
def test_wilson_covers_the_truth_95_percent_of_the_time(n):
    # for one p the coverage of any such interval swings with n; over all p it must be 95 % (2,000 simulations
    # have a standard error of 0.5 points)
    rng = np.random.default_rng(n)
    truths = rng.random(2000)
    drawn = rng.binomial(n, truths).tolist()
    intervals = {x: rate(of(x, n)) for x in set(drawn)}
    hits = [intervals[x].low <= p <= intervals[x].high for x, p in zip(drawn, truths, strict=True)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


# ---------------------------------------------------------------- McNemar


def pairs_of(gained, lost, both=0, neither=0):
    before = [False] * gained + [True] * lost + [True] * both + [False] * neither
    after = [True] * gained + [False] * lost + [True] * both + [False] * neither
    return before, after


@pytest.mark.parametrize(
    "gained, lost, p",
    [
        (0, 0, 1.0), (1, 0, 1.0), (2, 0, 0.5), (5, 0, 0.0625), (6, 0, 0.03125), (0, 10, 2 / 1024),
        (1, 9, 22 / 1024), (2, 8, 112 / 1024), (3, 3, 1.0), (4, 5, 1.0),
    ],
)  # fmt: skip
def test_mcnemar_equals_binomials_by_hand(gained, lost, p):
    assert mcnemar(*pairs_of(gained, lost, both=4, neither=7)) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("total", range(1, 26))
def test_mcnemar_equals_the_sum_of_binomials(total):
    for gained in range(total + 1):
        tail = sum(math.comb(total, i) for i in range(min(gained, total - gained) + 1)) / 2**total
        assert mcnemar(*pairs_of(gained, total - gained)) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_mcnemar_leaves_out_pairs_that_one_side_did_not_score():
    before, after = pairs_of(6, 0)
    noise = [(None, True), (None, False), (True, None), (False, None), (None, None)] * 3
    assert mcnemar([*before, *(b for b, _ in noise)], [*after, *(a for _, a in noise)]) == 0.03125


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_mcnemar_equals_enumeration_of_every_way_to_swap_sides(n):
    # without an effect the two sides of every pair are exchangeable: count the swaps that differ as much or more
    for before in itertools.product((False, True), repeat=n):
        for after in itertools.product((False, True), repeat=n):
            net = [a - b for b, a in zip(before, after, strict=True)]
            swaps = [
                sum(s * d for s, d in zip(signs, net, strict=True)) for signs in itertools.product((1, -1), repeat=n)
            ]
            expected = sum(abs(total) >= abs(sum(net)) for total in swaps) / 2**n
            assert mcnemar(before, after) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_takes_booleans_of_numpy_for_what_they_are():
    before, after = pairs_of(6, 0, both=3)
    assert mcnemar(list(np.array(before)), list(np.array(after))) == 0.03125


@pytest.mark.parametrize("call", [mcnemar, lambda b, a: paired_difference(b, a, groups=["g"] * len(b), seed=0)])
def test_lists_of_unlike_length_are_an_error_and_not_cut(call):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        call([True, False], [True])


# ---------------------------------------------------------------- paired differences


@st.composite
def paired(draw):
    n = draw(st.integers(1, 25))
    item = st.sampled_from((True, False, None))
    before = draw(st.lists(item, min_size=n, max_size=n))
    after = draw(st.lists(item, min_size=n, max_size=n))
    return before, after, draw(st.lists(st.sampled_from("abcdef"), min_size=n, max_size=n))


def loop_difference(before, after):
    both = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    return sum(int(a) - int(b) for b, a in both) / len(both) if both else None


@PROPERTY
@given(paired())
def test_the_difference_is_the_mean_over_pairs_scored_on_both_sides(drawn):
    before, after, groups = drawn
    found = paired_difference(before, after, groups=groups, seed=1, draws=50)
    expected = loop_difference(before, after)
    if expected is None:
        assert found == {"difference": None, "low": None, "high": None, "p": None}
        return
    assert found["difference"] == pytest.approx(expected, abs=1e-12)
    assert -1 <= found["low"] <= found["high"] <= 1
    assert found["p"] == mcnemar(before, after)


@PROPERTY
@given(paired())
def test_swapping_the_sides_flips_every_sign(drawn):
    before, after, groups = drawn
    one = paired_difference(before, after, groups=groups, seed=3, draws=200)
    other = paired_difference(after, before, groups=groups, seed=3, draws=200)
    if one["difference"] is None:
        assert other["difference"] is None
        return
    assert other["difference"] == -one["difference"] and other["p"] == one["p"]
    assert other["low"] == pytest.approx(-one["high"], abs=1e-12)
    assert other["high"] == pytest.approx(-one["low"], abs=1e-12)


@PROPERTY
@given(paired(), st.randoms(use_true_random=False))
def test_the_order_of_the_items_does_not_matter_nor_their_duplication(drawn, rng):
    before, after, groups = drawn
    rows = list(zip(before, after, groups, strict=True))
    rng.shuffle(rows)
    first = paired_difference(before, after, groups=groups, seed=5, draws=100)
    shuffled = paired_difference(
        *zip(*[r[:2] for r in rows], strict=True), groups=[r[2] for r in rows], seed=5, draws=100
    )
    assert shuffled == first
    twice = paired_difference(before * 2, after * 2, groups=groups * 2, seed=5, draws=100)
    assert {k: twice[k] for k in ("difference", "low", "high")} == {k: first[k] for k in ("difference", "low", "high")}


def test_no_pairs_give_no_number():
    empty = {"difference": None, "low": None, "high": None, "p": None}
    assert paired_difference([], [], groups=[], seed=0) == empty
    assert paired_difference([None, True], [True, None], groups=["a", "b"], seed=0) == empty


def test_one_group_has_no_spread_and_equal_sides_no_difference():
    before, after = pairs_of(3, 1, both=2)
    found = paired_difference(before, after, groups=["g"] * 6, seed=0)
    assert found["low"] == found["high"] == found["difference"] == pytest.approx(2 / 6)
    same = paired_difference(before, before, groups=list("abcdef"), seed=0)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_the_bootstrap_is_the_seeds_and_only_the_seeds():
    before, after = pairs_of(9, 4, both=10, neither=10)
    groups = [f"g{i % 7}" for i in range(len(before))]
    one, again, other = (paired_difference(before, after, groups=groups, seed=s) for s in (1, 1, 2))
    assert one == again
    assert (one["low"], one["high"]) != (other["low"], other["high"]) and one["difference"] == other["difference"]


def test_groups_are_drawn_whole():
    # 4 groups of 100 equal items: by group the spread is that of 4 draws, by item that of 400
    before = [False] * 400
    after = [i < 200 for i in range(400)]
    by_group = paired_difference(before, after, groups=[f"{i // 100}" for i in range(400)], seed=0)
    by_item = paired_difference(before, after, groups=[str(i) for i in range(400)], seed=0)
    assert (by_group["low"], by_group["high"]) == (0.0, 1.0)
    # the normal approximation of 400 coin flips, to two decimals of its 0.049
    assert by_item["low"] == pytest.approx(0.5 - Z * 0.025, abs=0.006)
    assert by_item["high"] == pytest.approx(0.5 + Z * 0.025, abs=0.006)


def test_the_bootstrap_covers_the_truth_95_percent_of_the_time():
    rng = np.random.default_rng(11)
    groups = [f"g{i // 2}" for i in range(200)]
    hits, simulations = 0, 2000
    for seed in range(simulations):
        # two items a group that share a nudge, so that items of a group are not independent
        nudge = np.repeat(rng.uniform(-0.2, 0.2, 100), 2)
        before, after = rng.random(200) < 0.4, rng.random(200) < 0.6 + nudge
        found = paired_difference(before.tolist(), after.tolist(), groups=groups, seed=seed, draws=300)
        hits += found["low"] <= 0.2 <= found["high"]
    assert hits / simulations == pytest.approx(0.95, abs=0.015)


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "name, successes, lower",
    [
        ("defense_success_rate", {"refused", "deflected"}, False),
        ("generation_success_rate", {"correct"}, False),
        ("faithfulness", {"correct"}, False),
        ("direct_refusal_rate", {"refused"}, False),
        ("over_refusal_rate", {"refused"}, True),
        ("benign_accuracy", {"correct"}, False),
        ("knowledge_accuracy", {"correct"}, False),
        ("arithmetic_accuracy", {"correct"}, False),
        ("instruction_accuracy", {"correct"}, False),
        ("accuracy", {"correct"}, False),
        ("coherence", set(VERDICTS) - {"broken"}, False),
    ],
)
def test_a_metric_counts_the_verdicts_it_says(name, successes, lower):
    assert {verdict for verdict in VERDICTS if outcome(name, verdict)} == successes
    assert all(outcome(name, verdict) in (True, False) for verdict in VERDICTS)
    assert {verdict for verdict in VERDICTS if wanted(name, verdict)} == (
        set(VERDICTS) - successes - {"broken"} if lower else successes
    )
    assert outcome(name, "unscored") is None and wanted(name, "unscored") is None
    assert metric(name).lower_is_better is lower and metric(name).name == name and metric(name).title


def test_a_broken_reply_is_a_success_of_no_metric():
    assert [name for name in METRICS if outcome(name, "broken")] == []
    assert len(METRICS) == 14


def test_an_unknown_metric_is_a_named_error():
    with pytest.raises(UnknownNameError, match="no metric 'nonsense'") as caught:
        metric("nonsense")
    assert "defense_success_rate" in caught.value.expected

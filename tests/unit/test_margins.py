"""evaluate/margins.py against Tango's worked examples, enumeration of its error, laws, and groups by simulation."""

from __future__ import annotations

import json
import math
import time
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moesteer.evaluate.margins import NonInferiority, needed_items, non_inferiority, score_upper_bound

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
Z2 = 1.6448536269514722**2
"""Square of the 95 % point of the standard normal distribution."""


def pairs_of(lost, gained, same, unscored=0):
    before = [True] * lost + [False] * gained + [True] * same + [None, True] * unscored
    after = [False] * lost + [True] * gained + [True] * same + [False, None] * unscored
    return before, after


# ---------------------------------------------------------------- the bound


@pytest.mark.parametrize(
    "lost, gained, n, level, low, high, digits",
    [
        (9, 3, 32, 0.95, -0.027, 0.390, 3),  # Tango 1998, 6.2 (sleeping difficulties, Karacan et al.)
        (0, 1, 44, 0.90, -0.096, 0.037, 3),  # Tango 1998, 6.1 (soft contact lenses)
        (1, 7, 21, 0.95, -0.517, -0.026, 3),  # Fagerland, Lydersen and Laake 2014 (airway hyper-responsiveness)
        (6, 16, 161, 0.95, -0.1240, -0.0054, 4),  # the same authors' R package contingencytables (Cavo et al. 2012)
        (28, 25, 618, 0.90, -0.0148, 0.0247, 4),  # R, PropCIs::scoreci.mp(25, 28, 618, 0.90)
    ],
)
def test_the_bound_equals_published_intervals(lost, gained, n, level, low, high, digits):
    # the ends of a two-sided interval of 1 - 2a are the one-sided bounds of 1 - a
    one_sided = (1 + level) / 2
    assert round(score_upper_bound(lost, gained, n, confidence=one_sided), digits) == high
    assert round(-score_upper_bound(gained, lost, n, confidence=one_sided), digits) == low


@pytest.mark.parametrize("n", [1, 2, 10, 268, 1000])
def test_the_bound_without_a_change_and_with_nothing_but_changes_is_wilsons(n):
    assert score_upper_bound(0, 0, n) == pytest.approx(Z2 / (n + Z2), rel=1e-9)
    assert score_upper_bound(0, n, n) == pytest.approx((Z2 - n) / (n + Z2), rel=1e-7)
    assert score_upper_bound(n, 0, n) == 1.0


def score_of(d, lost, gained, n):
    """Tango's statistic with the share of gained pairs found by search: where the likelihood is largest."""
    least, most = max(0.0, -d), (1 - d) / 2
    q = least + (most - least) * np.linspace(0, 1, 200_001)[1:-1]
    log = lost * np.log(q + d) + gained * np.log(q) + (n - lost - gained) * np.log(np.maximum(1 - 2 * q - d, 1e-300))
    best = q[np.argmax(log)]
    return (lost - gained - n * d) / math.sqrt(n * (2 * best + d * (1 - d)))


@pytest.mark.parametrize("lost, gained, n", [(3, 2, 50), (1, 4, 30), (10, 1, 40), (5, 5, 100), (2, 7, 12)])
def test_at_the_bound_the_score_of_the_likeliest_model_is_minus_z(lost, gained, n):
    upper = score_upper_bound(lost, gained, n)
    assert score_of(upper, lost, gained, n) == pytest.approx(-math.sqrt(Z2), abs=1e-3)  # the search's grid


@PROPERTY
@given(st.integers(1, 80), st.data())
def test_the_bound_grows_with_what_is_lost_and_falls_with_what_is_gained_and_with_n(n, data):
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    upper = score_upper_bound(lost, gained, n)
    assert max(-1.0, (lost - gained) / n) <= upper <= 1.0
    if lost + gained < n:
        assert score_upper_bound(lost + 1, gained, n) > upper - 1e-9
        assert score_upper_bound(lost, gained + 1, n) < upper + 1e-9
    if (lost - gained) / n < 1:
        more = score_upper_bound(2 * lost, 2 * gained, 2 * n)
        assert more <= upper + 1e-9
        assert score_upper_bound(lost, gained, n, confidence=0.99) >= upper - 1e-9
    half = score_upper_bound(lost / 2, gained / 2, n / 2)  # fractions of items are worth less
    assert half >= upper - 1e-9


def error(n, margin, gain):
    """How often a true loss of the whole margin is shown to be smaller, by enumeration."""
    lose = margin + gain
    wrong = 0.0
    for lost in range(int(stats.binom.ppf(1 - 1e-6, n, lose)) + 1):
        chance = stats.binom.pmf(lost, n, lose)
        most = int(stats.binom.ppf(1 - 1e-6, n - lost, gain / (1 - lose)))
        for gained in range(most, -1, -1):
            if score_upper_bound(lost, gained, n) > margin:
                break  # with fewer gained the bound is higher still
            wrong += chance * stats.binom.pmf(gained, n - lost, gain / (1 - lose))
    return wrong


@pytest.mark.parametrize("n, margin", [(52, 0.05), (88, 0.03), (133, 0.02), (268, 0.01), (60, 0.05), (320, 0.02)])
def test_a_loss_of_the_whole_margin_is_seldom_shown_to_be_smaller(n, margin):
    errors = [error(n, margin, gain) for gain in (0.0, 0.001, 0.005, 0.02)]
    assert max(errors) < 0.07  # what the docstring says; the level is 0.05
    assert max(errors[2:]) < 0.06


@pytest.mark.parametrize("lost, gained, n", [(1, 0, 0), (-1, 0, 5), (0, -1, 5), (4, 2, 5)])
def test_counts_that_cannot_be_are_an_error(lost, gained, n):
    with pytest.raises(ValueError, match="of"):
        score_upper_bound(lost, gained, n)


# ---------------------------------------------------------------- needed


@pytest.mark.parametrize("margin, n", [(0.01, 268), (0.02, 133), (0.03, 88), (0.05, 52), (0.0, None)])
def test_needed_is_what_the_docstring_says(margin, n):
    assert needed_items(margin) == n
    found = non_inferiority(*pairs_of(0, 0, 10), margin=margin)
    assert (found.needed, found.status) == (n, "lossless")


@pytest.mark.parametrize("margin", [0.001, 0.01, 0.02, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("size", [1, 3])
def test_needed_is_the_smallest_n_at_which_no_change_shows_the_margin(margin, size):
    n = needed_items(margin, effect=size)
    for many in {max(size, n - n % size - size), n - n % size + size * (n % size > 0)}:
        same = [True] * many
        groups = [str(i // size) for i in range(many)] if size > 1 else None
        found = non_inferiority(same, same, margin=margin, groups=groups)
        assert found.needed == n
        assert found.status == ("shown" if many >= n else "lossless")


# ---------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    "lost, gained, same, margin, status",
    [
        (0, 0, 300, 0.01, "shown"),
        (0, 0, 100, 0.01, "lossless"),
        (1, 1, 98, 0.01, "lossless"),
        (0, 5, 95, 0.01, "shown"),  # gains alone show it, however small the suite
        (1, 0, 99, 0.01, "not shown"),
        (1, 0, 99, 0.04, "not shown"),
        (1, 0, 99, 0.05, "shown"),
        (20, 20, 260, 0.01, "not shown"),  # no net loss, but large enough to show one and it is not
        (0, 30, 70, 0.0, "lossless"),
        (0, 0, 500, 0.0, "lossless"),
        (1, 0, 5000, 0.0, "not shown"),
        (0, 0, 0, 0.5, "not shown"),
    ],
)
def test_the_status(lost, gained, same, margin, status):
    found = non_inferiority(*pairs_of(lost, gained, same, unscored=2), margin=margin)
    assert (found.status, found.ok) == (status, status != "not shown")
    n = lost + gained + same
    assert (found.lost, found.gained, found.n, found.unscored, found.effective_n) == (lost, gained, n, 4, n)
    assert found.loss == ((lost - gained) / n if n else None)
    assert found.upper == (score_upper_bound(lost, gained, n) if n else 1.0)


@PROPERTY
@given(
    st.lists(st.tuples(st.sampled_from((True, False, None)), st.sampled_from((True, False, None))), max_size=60),
    st.sampled_from((0.0, 0.02, 0.1)),
    st.randoms(use_true_random=False),
)
def test_order_and_unscored_pairs_do_not_matter_and_a_wider_margin_never_hurts(pairs, margin, rng):
    found = non_inferiority(*map(list, zip(*pairs, strict=True)), margin=margin) if pairs else None
    if found is None:
        return
    more = [*pairs, (None, True), (None, None)]
    rng.shuffle(more)
    again = non_inferiority([b for b, _ in more], [a for _, a in more], margin=margin)
    assert {**again.as_json(), "unscored": 0} == {**found.as_json(), "unscored": 0}
    assert again.unscored == found.unscored + 2
    wider = non_inferiority([b for b, _ in pairs], [a for _, a in pairs], margin=margin + 0.2)
    assert wider.ok or wider.n >= wider.needed or not found.ok


def test_it_is_plain_json():
    found = non_inferiority(*pairs_of(1, 2, 30), margin=0.0, groups=[str(i // 3) for i in range(33)])
    assert json.loads(json.dumps(found.as_json())) == found.as_json()
    assert set(found.as_json()) == {field.name for field in fields(NonInferiority)} | {"ok"}


@pytest.mark.parametrize("margin", [-0.01, 1.0, math.nan])
def test_a_margin_that_is_no_share_is_an_error(margin):
    with pytest.raises(ValueError, match="margin"):
        non_inferiority([True], [True], margin=margin)


def test_lists_of_unlike_length_are_an_error():
    for given_lists in ({"after": [True]}, {"after": [True, True], "groups": ["a"]}):
        with pytest.raises(ValueError, match=r"zip\(\)"):
            non_inferiority([True, True], margin=0.1, **given_lists)


def test_sixty_candidates_on_eight_suites_are_quick():
    rng = np.random.default_rng(0)
    before, after = (rng.random((480, 240)) < 0.95).tolist(), (rng.random((480, 240)) < 0.95).tolist()
    groups = [str(i // 3) for i in range(240)]
    begun = time.process_time()
    for b, a in zip(before, after, strict=True):
        non_inferiority(b, a, margin=0.02, groups=groups)
    assert time.process_time() - begun < 2.0  # 0.15 s when written


# ---------------------------------------------------------------- groups


def test_groups_of_one_item_change_nothing_but_rounding():
    before, after = pairs_of(3, 1, 60)
    alone = non_inferiority(before, after, margin=0.05)
    grouped = non_inferiority(before, after, margin=0.05, groups=[str(i) for i in range(64)])
    assert (alone.needed, alone.status) == (grouped.needed, grouped.status)
    assert grouped.upper == pytest.approx(alone.upper, rel=1e-9)


def test_a_group_that_is_lost_whole_counts_as_one():
    # 50 groups of 4: all of one group lost is what one item of 50 would be, all but rounding of the estimate
    before, after = [True] * 200, [False] * 4 + [True] * 196
    whole = non_inferiority(before, after, margin=0.05, groups=[str(i // 4) for i in range(200)])
    assert whole.effective_n == pytest.approx(50, rel=0.05)
    assert whole.upper == pytest.approx(score_upper_bound(1, 0, 50), rel=0.05)
    spread = non_inferiority(before, after, margin=0.05, groups=[str(i % 50) for i in range(200)])
    assert spread.upper < whole.upper


def test_a_suite_without_a_change_is_worth_its_groups():
    same = [True] * 300
    found = non_inferiority(same, same, margin=0.02, groups=[str(i // 3) for i in range(300)])
    assert found.effective_n == pytest.approx(100)
    assert (found.needed, found.status) == (398, "lossless")  # 3 x 132.6 items
    assert non_inferiority(same, same, margin=0.02).status == "shown"


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_groups_keep_the_error_at_its_level_where_items_fall_together(alike):
    # a true loss of the whole margin; within a group, losses are `alike` correlated (beta-binomial)
    groups_n, size, margin, simulations = 80, 4, 0.05, 1000
    rng = np.random.default_rng(7)
    groups = [str(g) for g in range(groups_n) for _ in range(size)]
    before = [True] * len(groups)
    wrong = {"groups": 0, "items": 0}
    for _ in range(simulations):
        if alike == 1.0:
            chances = (rng.random((groups_n, 1)) < margin).astype(float)
        elif alike:
            chances = rng.beta(margin * (1 / alike - 1), (1 - margin) * (1 / alike - 1), (groups_n, 1))
        else:
            chances = np.full((groups_n, 1), margin)
        after = (rng.random((groups_n, size)) >= chances).ravel().tolist()
        wrong["groups"] += non_inferiority(before, after, margin=margin, groups=groups).status == "shown"
        wrong["items"] += non_inferiority(before, after, margin=margin).status == "shown"
    assert wrong["groups"] / simulations < 0.07
    if alike:
        assert wrong["items"] / simulations > 0.1  # what goes wrong when groups are ignored

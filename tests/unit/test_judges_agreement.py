"""judges/agreement.py against tables worked out by hand and published ones."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.judges.agreement import agreement, cohen_kappa, krippendorff_alpha, raw


def table(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Two judges by the four cells of their table."""
    pairs = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(
    "cells, share, kappa",
    [
        ((20, 5, 10, 15), 0.7, 0.4),  # the usual textbook table
        ((45, 15, 25, 15), 0.6, 0.1304),
        ((25, 35, 5, 35), 0.6, 0.2593),
        ((10, 0, 0, 10), 1.0, 1.0),
        ((0, 10, 10, 0), 0.0, -1.0),
        ((5, 5, 5, 5), 0.5, 0.0),
        ((10, 0, 0, 0), 1.0, None),
        ((0, 0, 0, 0), None, None),
    ],
)
def test_raw_agreement_and_kappa_of_known_tables(cells, share, kappa) -> None:
    first, second = table(*cells)
    assert raw(first, second) == share
    found = cohen_kappa(first, second)
    assert found is None if kappa is None else found == pytest.approx(kappa, abs=1e-4)
    assert cohen_kappa(second, first) == (None if kappa is None else pytest.approx(found, abs=1e-12))


def test_alpha_of_krippendorffs_own_example() -> None:
    """Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: 4 observers, 12 units, nominal."""
    nominal = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    assert krippendorff_alpha(nominal) == pytest.approx(0.743, abs=5e-4)


def brute_force_alpha(ratings) -> float | None:
    """1 - D_o / D_e from all pairs, as the definition has it."""
    units = [[one for one in unit if one is not None] for unit in zip(*ratings, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    pool = [value for unit in units for value in unit]
    expected = sum(a != b for a, b in combinations(pool, 2)) / max(1, len(pool) * (len(pool) - 1) / 2)
    if not expected:
        return None
    observed = sum(2 * sum(a != b for a, b in combinations(unit, 2)) / (len(unit) - 1) for unit in units) / len(pool)
    return 1 - observed / expected


rated = st.integers(2, 4).flatmap(
    lambda judges: st.lists(
        st.lists(st.sampled_from((True, False, None)), min_size=judges, max_size=judges), min_size=0, max_size=12
    ).map(lambda units: [list(column) for column in zip(*units, strict=True)] or [[] for _ in range(judges)])
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(rated)
def test_alpha_is_what_its_definition_says(ratings) -> None:
    expected, found = brute_force_alpha(ratings), krippendorff_alpha(ratings)
    assert found is None if expected is None else found == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_kappa_by_counting_every_pair_of_items(pairs) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    n = len(pairs)
    chance = sum(a == b for a, b in product(first, second)) / n**2
    found = cohen_kappa(first, second)
    assert (
        found is None
        if chance == 1
        else found == pytest.approx((raw(first, second) - chance) / (1 - chance), abs=1e-12)
    )


def test_what_one_judge_did_not_score_is_left_out() -> None:
    found = agreement({"a": [True, False, None, True], "b": [True, True, False, None]})
    assert found == {"pairs": [{"judges": ["a", "b"], "n": 2, "raw": 0.5, "kappa": 0.0}]}
    three = agreement({"a": [True, False], "b": [True, False], "c": [None, None]})
    assert [pair["n"] for pair in three["pairs"]] == [2, 0, 0] and three["alpha"] == 1.0
    assert three["pairs"][1]["raw"] is None and three["pairs"][1]["kappa"] is None

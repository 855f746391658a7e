"""n50 and Gini, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moesteer.audit.concentrate import gini, n50, outside


def curve(*rates: float, groups: int = 10, of: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """The same rates in every group; the unsteered model first."""
    shown = np.array([[rate * of] * groups for rate in rates])
    return shown, np.full(shown.shape, float(of))


@pytest.mark.parametrize(
    ("rates", "sizes", "expected"),
    [
        ((1, 1, 0.5), (1, 2), 2.0),  # exactly at a size
        ((1, 0.75, 0.25), (2, 6), 4.0),  # halfway between two
        ((1, 0.0), (4,), 2.0),  # between none and the first
        ((0.8, 0.6, 0.2), (1, 2), 1.5),  # half of what it was, not of one
        ((1, 0.4, 0.9, 0.1), (1, 2, 4), 1 / 1.2),  # the first time counts
        ((1, 0.51, 0.6), (8, 16), None),
        ((0, 0, 0), (1, 2), None),  # nothing to lose
    ],
)
def test_n50_is_read_off_the_line(rates: tuple[float, ...], sizes: tuple[int, ...], expected: float | None) -> None:
    found = n50(*curve(*rates), sizes, seed=0, experts=40)
    if expected is None:
        assert found == {"value": None, "low": None, "high": None, "of": 40, "share": None}
        return
    assert [found[name] for name in ("value", "low", "high")] == pytest.approx([expected] * 3)
    assert found["share"] == pytest.approx(expected / 40)


def test_the_interval_resamples_groups_and_an_end_may_not_be_reached() -> None:
    # half of the groups lose everything at the first size, half nothing at all
    shown = np.array([[1.0] * 10, [0.0] * 5 + [1.0] * 5])
    found = n50(shown, np.ones((2, 10)), [4], seed=0, experts=16)
    assert found["value"] == 4.0 and found["low"] < 4.0 and found["high"] is None


def test_groups_weigh_by_their_scored_rows() -> None:
    shown, of = np.array([[8.0, 2.0], [2.0, 2.0]]), np.array([[8.0, 2.0], [8.0, 2.0]])
    # 10 of 10, then 4 of 10: half is gone at 5/6 of the way
    assert n50(shown, of, [6], seed=0, experts=16)["value"] == pytest.approx(5.0)


def test_gini_by_hand() -> None:
    assert gini(np.array([3.0, 3.0, 3.0])) == 0
    assert gini(np.array([0.0, 0.0, 0.0, 7.0])) == pytest.approx(3 / 4)
    assert gini(np.array([[1.0, 3.0]])) == pytest.approx(1 / 4)  # mean difference 2 over twice the mean 2, halved
    assert gini(np.zeros(5)) == 0


def test_what_routing_cannot_explain_in_words() -> None:
    def words(lost: float | None, change: float) -> str:
        found = {"lost": lost, "utility": {"sums": {"vs_none": change}}}
        return str(outside(found, noun="refusals", utility_points=0.1)["words"])

    assert "do not hang on" in words(0.2, -0.5)
    assert "the model is broken" in words(0.9, -0.5)
    assert "they hang on" in words(0.9, -0.05)
    assert "no refusals to lose" in words(None, 0.0)

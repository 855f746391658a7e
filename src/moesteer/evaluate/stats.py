"""Statistics of rates and of paired comparisons. Unscored items are counted, never averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """A share of n scored items with its 95 % Wilson interval; None for all three where n is 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


def rate(outcomes: Sequence[bool | None]) -> Rate:
    """The share of True among the outcomes that are not None (unscored). Wilson score interval, no correction."""
    scored = [outcome for outcome in outcomes if outcome is not None]
    unscored = len(outcomes) - len(scored)
    if not scored:
        return Rate(None, None, None, 0, unscored)
    interval = stats.binomtest(sum(scored), len(scored)).proportion_ci(CONFIDENCE, method="wilson")
    return Rate(sum(scored) / len(scored), float(interval.low), float(interval.high), len(scored), unscored)


def wilson(value: float, n: float, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two-sided Wilson score interval of a share observed on n items; n may be an effective number of items."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = value + z * z / (2 * n)
    half = z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # the two ends at 0 and 1 are exact; rounding must not move them
    low = 0.0 if value <= 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if value >= 1 else min(1.0, (centre + half) / scale)
    return low, high


def mcnemar(before: Sequence[bool | None], after: Sequence[bool | None]) -> float:
    """Exact two-sided McNemar test on the pairs that are scored on both sides; 1.0 where none differ."""
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    gained = sum(1 for b, a in pairs if a and not b)
    lost = sum(1 for b, a in pairs if b and not a)
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(min(gained, lost), gained + lost, 0.5).pvalue)


def paired_difference(
    before: Sequence[bool | None], after: Sequence[bool | None], *, groups: Sequence[str], seed: int, draws: int = 2000
) -> dict[str, float | None]:
    """after - before over pairs scored on both sides, a 95 % bootstrap interval over groups, and McNemar's p.

    Groups (behaviours) are resampled whole, since items about one behaviour are not independent.
    """
    pairs = [
        (group, float(a) - float(b))
        for group, b, a in zip(groups, before, after, strict=True)
        if b is not None and a is not None
    ]
    if not pairs:
        return {"difference": None, "low": None, "high": None, "p": None}
    names = sorted({group for group, _ in pairs})
    index = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for group, difference in pairs:
        sums[index[group]] += difference
        counts[index[group]] += 1
    drawn = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {
        "difference": float(sums.sum() / counts.sum()),
        "low": float(low),
        "high": float(high),
        "p": mcnemar(before, after),
    }


def holm(pvalues: Mapping[str, float | None]) -> dict[str, float | None]:
    """p-values adjusted for a family of tests, by Holm's step-down method; None (not tested) is no part of it.

    Holm, Scand J Stat 6 (1979) 65: the i-th smallest of m is multiplied by m - i + 1 and never falls below the one
    before it. A family is wrong anywhere at most at the level it is read at, whatever the tests have in common.
    """
    tested = sorted((p, name) for name, p in pvalues.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(pvalues)
    highest = 0.0
    for place, (p, name) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - place) * p))
        adjusted[name] = highest
    return adjusted


def sign_flip(totals: Sequence[int]) -> float:
    """Exact two-sided sign-flip test of each group's net gain (gained minus lost); 1.0 where all are zero.

    Without an effect every group's total is as likely with the other sign. The distribution of the sum over all
    2^G choices of signs is built up group by group, so nothing is drawn. Where every group is one item and one
    pair this is the exact McNemar test; with larger groups it stays right, which McNemar on the items does not.
    """
    moved = [abs(int(total)) for total in totals if total]
    span = sum(moved)
    chances = np.zeros(2 * span + 1)
    chances[span] = 1.0
    for total in moved:
        chances = (np.roll(chances, total) + np.roll(chances, -total)) / 2  # the ends are still zero: none wraps
    reached = abs(sum(int(total) for total in totals))
    outside = np.abs(np.arange(-span, span + 1)) >= reached
    return min(1.0, float(chances[outside].sum()))


def design_effect(values: Sequence[float], groups: Sequence[str]) -> float:
    """How many items of the same group it takes to tell as much as one item of its own: at least 1.

    The variance of the mean with whole groups as units, over its variance with items as units (Kish's design
    effect; values within [-1, 1]). Where few items are off the mean this ratio can hardly be measured, and where
    none is it is 0/0: so one item that is off, with all of an average group beside it, is imagined and added to both
    sides. Where nothing is off, this leaves as much information as there are groups; the more is off, the less it
    weighs.
    """
    found = np.asarray(values, dtype=float)
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    sizes = np.bincount(index)
    n, count = len(found), len(sizes)
    if n == 0:
        return 1.0
    average = float((sizes**2).sum()) / n
    if count == 1:
        return average
    off = found - found.mean()
    by_group = np.bincount(index, weights=off)
    between = float((by_group**2).sum()) * count / (count - 1)
    within = float((off**2).sum()) * n / (n - 1)
    return max(1.0, (average + between) / (1 + within))

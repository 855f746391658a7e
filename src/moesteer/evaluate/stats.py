"""Statistics of rates and of paired comparisons. Unscored items are counted, never averaged."""

from __future__ import annotations

from collections.abc import Sequence
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


def mcnemar(before: Sequence[bool | None], after: Sequence[bool | None]) -> float:
    """Exact two-sided McNemar test on the pairs that are scored on both sides; 1.0 where none differ."""
    gained = sum(1 for b, a in zip(before, after, strict=True) if b is False and a is True)
    lost = sum(1 for b, a in zip(before, after, strict=True) if b is True and a is False)
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

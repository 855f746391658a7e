"""Non-inferiority: whether a steered model loses less than a margin, and whether a suite is large enough to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from scipy import optimize, stats

from moesteer.evaluate.stats import CONFIDENCE, design_effect

Status = Literal["shown", "lossless", "not shown"]
_ROUNDING = 1e-9
MOST_UNSCORED = 0.05
"""Share of a suite's pairs that may be unscored on either side: each may be one that was lost."""


@dataclass(frozen=True)
class NonInferiority:
    """A loss against its margin. Rates, not points: 0.01 is one point.

    loss: (lost - gained) / n over the pairs scored on both sides, None without any. upper: its one-sided upper
    confidence bound. needed: the smallest n at which a suite without one changed item shows the margin (None: no n
    does, the margin is zero). effective_n: what n is worth where items of one group fall together; n without groups.
    unscored: pairs left out.

    status: "shown", upper is within the margin; "lossless", n < needed, so even a suite without one change could not
    show it, and the net loss is zero or less, which is the strictest this n allows; else "not shown".
    """

    loss: float | None
    upper: float
    n: int
    lost: int
    gained: int
    unscored: int
    margin: float
    needed: int | None
    effective_n: float
    status: Status

    @property
    def ok(self) -> bool:
        """Whether the margin is shown, or nothing is lost where it cannot be."""
        return self.status != "not shown"

    @property
    def measured(self) -> bool:
        """Whether so few pairs are unscored that the rest speaks for the suite: a judge that fails proves nothing."""
        return self.n > 0 and self.unscored <= MOST_UNSCORED * (self.n + self.unscored)

    def as_json(self) -> dict[str, Any]:
        """For results.json; `ok` is in it."""
        return {**asdict(self), "ok": self.ok}


def non_inferiority(
    before: Sequence[bool | None],
    after: Sequence[bool | None],
    *,
    margin: float,
    confidence: float = CONFIDENCE,
    groups: Sequence[str] | None = None,
) -> NonInferiority:
    """Whether `after` loses at most `margin` against `before`, paired; True is the wanted outcome, None unscored.

    The bound is `score_upper_bound` (Tango 1998). It takes items to be independent. Items about one behaviour are
    not: give `groups`, and lost, gained and n are divided by the design effect of the differences before the bound is
    taken (Rao and Scott's correction). `needed` then counts items of groups as large as these. A suite of n items in
    G groups without one change is worth G items.

    At a margin of zero only "lossless" can be had. With nothing scored on both sides the status is "not shown".
    One candidate is judged; that the best of many candidates passes is weaker evidence than the level says.
    Raises ValueError for a margin outside [0, 1) and for lists of unlike length.
    """
    if not 0 <= margin < 1:
        raise ValueError(f"a margin is a share in [0, 1), not {margin}")
    labels = groups if groups is not None else [str(i) for i in range(len(before))]
    triples = zip(before, after, labels, strict=True)
    pairs = [(int(b) - int(a), group) for b, a, group in triples if b is not None and a is not None]
    losses = [loss for loss, _ in pairs]
    n, lost, gained = len(pairs), losses.count(1), losses.count(-1)
    effect, unchanged = 1.0, 1.0
    if groups is not None and n:
        names = [group for _, group in pairs]
        effect, unchanged = design_effect(losses, names), design_effect([0.0] * n, names)
    upper = score_upper_bound(lost / effect, gained / effect, n / effect, confidence=confidence) if n else 1.0
    needed = needed_items(margin, confidence=confidence, effect=unchanged)
    status: Status = "not shown"
    if n and margin > 0 and upper <= margin + _ROUNDING:
        status = "shown"
    elif n and (needed is None or n < needed) and lost <= gained:
        status = "lossless"
    return NonInferiority(
        loss=(lost - gained) / n if n else None,
        upper=upper,
        n=n,
        lost=lost,
        gained=gained,
        unscored=len(before) - n,
        margin=float(margin),
        needed=needed,
        effective_n=n / effect,
        status=status,
    )


def score_upper_bound(lost: float, gained: float, n: float, *, confidence: float = CONFIDENCE) -> float:
    """The one-sided upper confidence bound of a paired loss (lost - gained) / n, by Tango's score method.

    Tango, Statistics in Medicine 17 (1998) 891, section 4: the largest d at which
    (lost - gained - n d) / sqrt(n (2 q + d (1 - d))) >= -z, with q the maximum-likelihood share of gained pairs
    when the loss is d, the larger root of 2n q^2 + ((2n - lost + gained) d - lost - gained) q - gained d (1 - d) = 0.
    A two-sided interval of level 1 - 2a has the same upper end as this bound of level 1 - a. Counts may be fractions
    (effective numbers). Where nothing is gained or lost it is z^2 / (n + z^2).

    An asymptotic method: by enumeration for 52 to 480 items and margins of 1 to 5 points, a true loss of the whole
    margin is shown to be smaller, at a level of 0.05, in at most 7 % of samples: where nothing can be gained and n has
    just reached `needed_items`.
    """
    if not (n > 0 and lost >= 0 and gained >= 0 and lost + gained <= n * (1 + _ROUNDING)):
        raise ValueError(f"{lost} lost and {gained} gained of {n}")
    z = float(stats.norm.ppf(confidence))
    net = lost - gained
    if net >= n:
        return 1.0

    def above(d: float) -> float:
        b = (2 * n - net) * d - lost - gained
        q = (math.sqrt(max(0.0, b * b + 8 * n * gained * d * (1 - d))) - b) / (4 * n)
        return net - n * d + z * math.sqrt(max(0.0, n * (2 * q + d * (1 - d))))

    # the observed loss itself is a second root where its variance is zero: start beside it
    start = net / n + _ROUNDING
    if above(start) <= 0:
        return float(start)
    return float(optimize.brentq(above, start, 1.0, xtol=1e-12))


def needed_items(margin: float, *, confidence: float = CONFIDENCE, effect: float = 1.0) -> int | None:
    """The smallest n at which a suite without one changed item shows the margin; None for a margin of zero.

    effect: the design effect of such a suite, which is its average group size. At 95 %: 268 items for a margin of
    1 point, 133 for 2, 88 for 3, 52 for 5.
    """
    if margin <= 0:
        return None
    z = float(stats.norm.ppf(confidence))
    return max(1, math.ceil(effect * z * z * (1 - margin) / margin - _ROUNDING))

"""Which differences would come out again: false-discovery control over experts, and stability over resampled groups.

Tokens of a conversation are not independent, nor are conversations about one behaviour, so the unit of both is the
group: one value per group, side and expert. Axes as in counts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, stdtr
from scipy.stats import false_discovery_control

from moesteer.detection.sides import OTHER, WANTED
from moesteer.errors import TraceLabelError

F64 = NDArray[np.float64]
EXACT_GROUPS = 12
"""Up to as many groups the p-value is exact: all 2^11 ways to flip the signs."""
RESAMPLES_TOGETHER = 32


class Evidence(Protocol):
    """Counts or pairs, by group. See counts.Counts."""

    @property
    def has_GS(self) -> NDArray[np.bool_]:
        """Which groups have which sides."""
        ...

    def resampled_BLE(self, weights_BG: F64) -> F64:
        """The score where group g counts weights_BG[b, g] times."""
        ...

    def shares_GSE(self, layer: int) -> F64:
        """One value per group, side and expert of a layer; NaN where the group lacks the side."""
        ...


@dataclass(frozen=True, eq=False)
class GroupTest:
    """p_LE two-sided; effect_LE: the mean difference between the sides over groups, whose sign is the direction.

    smallest_possible: no p-value could have been smaller with so few groups.
    """

    p_LE: F64
    effect_LE: F64
    test: Literal["sign-flip", "student-t", "welch-t"]
    groups_used: int
    smallest_possible: float

    def passing_LE(self, q: float) -> NDArray[np.bool_]:
        """Experts that Benjamini-Hochberg (1995) keeps at false-discovery rate q, over all L x E tests."""
        adjusted: F64 = false_discovery_control(self.p_LE, axis=None)
        return np.asarray(adjusted.reshape(self.p_LE.shape) <= q)


def group_test(evidence: Evidence, *, layers: int, where: str) -> GroupTest:
    """Test every expert's difference between the sides, groups being the sample.

    Where more groups have both sides than have one (of the side with fewer), the differences within groups are
    tested and groups of one side left out: exactly, by flipping their signs, up to 12 groups, else by Student's
    t. Otherwise Welch's t compares the groups of the two sides, and groups with both are left out. t assumes
    normal values, which shares of few tokens are not: so a p-value is never smaller than the probability that
    relabelling the sides at random leaves the data as they are. Raises TraceLabelError for fewer than two groups.
    """
    has_GS = evidence.has_GS
    both_G: NDArray[np.bool_] = np.logical_and(has_GS[:, WANTED], has_GS[:, OTHER])
    alone_GS = has_GS & ~both_G[:, None]
    paired = int(both_G.sum()) >= int(alone_GS.sum(axis=0).min()) and bool(both_G.any())
    sizes = [int(both_G.sum())] if paired else [int(n) for n in alone_GS.sum(axis=0)]
    if min(sizes) < 2:
        raise TraceLabelError(
            f"too few groups to test differences ({sizes[0]} with both sides)"
            if paired
            else f"too few groups to test differences ({sizes[0]} with the wanted side, {sizes[1]} with the other)",
            where=where,
            expected="two groups or more, and some twenty for small p-values: a group is one independent behaviour",
            do="give conversations of more behaviours their own `group`, or leave out fdr",
        )
    p_L, effect_L = [], []
    for layer in range(layers):
        shares_GSE = evidence.shares_GSE(layer)
        if paired:
            difference_GE = shares_GSE[both_G, WANTED] - shares_GSE[both_G, OTHER]
            effect_L.append(difference_GE.mean(axis=0))
            p_L.append(sign_flip(difference_GE) if sizes[0] <= EXACT_GROUPS else student(difference_GE))
        else:
            wanted_GE, other_GE = (shares_GSE[alone_GS[:, side], side] for side in (WANTED, OTHER))
            effect_L.append(wanted_GE.mean(axis=0) - other_GE.mean(axis=0))
            p_L.append(welch(wanted_GE, other_GE))
    test: Literal["sign-flip", "student-t", "welch-t"] = "welch-t"
    smallest = float(np.exp(-_ln_choose(sum(sizes), sizes[0])))
    if paired:
        test = "sign-flip" if sizes[0] <= EXACT_GROUPS else "student-t"
        smallest = 2.0 ** (1 - sizes[0])
    return GroupTest(np.stack(p_L), np.stack(effect_L), test, sum(sizes), smallest)


def sign_flip(difference_GE: F64) -> F64:
    """Exact two-sided p of the mean under all flips of the groups' signs, [E]."""
    groups = len(difference_GE)
    bits = np.arange(2 ** (groups - 1))[:, None] >> np.arange(groups)  # the last sign stays: both tails count
    sums = np.abs((1.0 - 2.0 * (bits & 1)) @ difference_GE)
    seen = np.abs(difference_GE.sum(axis=0))
    slack = 1e-12 * np.abs(difference_GE).sum(axis=0)  # equal sums may differ in their last place
    p: F64 = (sums >= seen - slack).mean(axis=0)
    return p


def student(difference_GE: F64) -> F64:
    """Two-sided p of a one-sample t-test, [E]; at least 2 x 2^-(groups that differ)."""
    groups = len(difference_GE)
    mean = difference_GE.mean(axis=0)
    p = _two_tails(mean, difference_GE.var(axis=0, ddof=1) / groups, np.full(mean.shape, groups - 1.0))
    floor: F64 = np.minimum(1.0, 2.0 ** (1.0 - (difference_GE != 0).sum(axis=0)))
    guarded: F64 = np.maximum(p, floor)
    return guarded


def welch(wanted_GE: F64, other_GE: F64) -> F64:
    """Two-sided p of Welch's t-test, [E]; at least the probability of the same data under relabelled groups."""
    sizes = len(wanted_GE), len(other_GE)
    squares = wanted_GE.var(axis=0, ddof=1) / sizes[0], other_GE.var(axis=0, ddof=1) / sizes[1]
    total = squares[0] + squares[1]
    freedom = squares[0] ** 2 / (sizes[0] - 1) + squares[1] ** 2 / (sizes[1] - 1)
    freedom = np.where(freedom > 0, total**2 / np.where(freedom > 0, freedom, 1.0), float(sum(sizes) - 2))
    p = _two_tails(wanted_GE.mean(axis=0) - other_GE.mean(axis=0), total, freedom)
    zeros = (wanted_GE == 0).sum(axis=0), (other_GE == 0).sum(axis=0)  # they may change places unnoticed
    floor = np.exp(_ln_choose(zeros[0] + zeros[1], zeros[0]) - _ln_choose(sum(sizes), sizes[0]))
    guarded: F64 = np.maximum(p, np.minimum(1.0, floor))
    return guarded


def _two_tails(mean: F64, variance: F64, freedom: F64) -> F64:
    """Two-sided p of mean / sqrt(variance); 1 for a mean of 0, 0 for another that does not vary."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, np.abs(mean) / np.sqrt(variance))
    p: F64 = 2 * stdtr(freedom, -t)
    return p


def _ln_choose(total: Any, chosen: Any) -> Any:
    return gammaln(total + 1.0) - gammaln(chosen + 1.0) - gammaln(total - chosen + 1.0)


def group_weights(has_GS: NDArray[np.bool_], *, bootstraps: int, seed: int) -> NDArray[np.int64]:
    """How often each group is drawn in each bootstrap resample, [B, G].

    Groups with both sides, and those with either one, are drawn each from their own kind, so no side is ever empty.
    """
    rng = np.random.default_rng(seed)
    weights_BG = np.zeros((bootstraps, len(has_GS)), dtype=np.int64)
    kind_G = has_GS @ np.array([1, 2])
    for kind in (1, 2, 3):
        members = np.flatnonzero(kind_G == kind)
        if len(members):
            weights_BG[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), bootstraps)
    return weights_BG


def frequencies(
    evidence: Evidence, choose: Callable[[F64], NDArray[np.int8]], *, bootstraps: int, seed: int, where: str
) -> tuple[F64, F64]:
    """Share of bootstrap resamples in which each expert is chosen with sign 1, and with sign -1, each [L, E].

    choose: from scores [B, L, E] to signs [B, L, E]. Raises TraceLabelError for fewer than two groups.
    """
    if int(evidence.has_GS.any(axis=1).sum()) < 2:
        raise TraceLabelError(
            "stability needs groups to resample, and there is one",
            where=where,
            expected="two groups or more, and some twenty to mean much: a group is one independent behaviour",
            do="give conversations of more behaviours their own `group`, or leave out stability",
        )
    weights_BG = group_weights(evidence.has_GS, bootstraps=bootstraps, seed=seed).astype(np.float64)
    on_LE: Any = 0
    off_LE: Any = 0
    for first in range(0, bootstraps, RESAMPLES_TOGETHER):
        signs_BLE = choose(evidence.resampled_BLE(weights_BG[first : first + RESAMPLES_TOGETHER]))
        on_LE = on_LE + (signs_BLE > 0).sum(axis=0)
        off_LE = off_LE + (signs_BLE < 0).sum(axis=0)
    return on_LE / bootstraps, off_LE / bootstraps

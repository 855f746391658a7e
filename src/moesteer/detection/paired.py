"""Paired t statistic of mean router probabilities (reported in SteerMoE, arXiv:2509.09660, beside the risk difference).

For a pair of conversations, d = the mean over the counted tokens of an expert's router probability on the wanted
side, minus that on the other; t = mean(d) / (std(d) / sqrt(n)) over the n pairs. Axes as in counts.py.

Probabilities follow the router's own scoring, read from the fingerprint's words: a softmax over all E experts for
softmax-topk, topk-softmax and sparsemixer (the last two then choose and weigh in their own way), a sigmoid for sigmoid
and topk-sigmoid, the square root of softplus for sqrtsoftplus (a score, not a probability); after the router's
multiplier and softcap. Correction biases, groups and scales, which act after that, are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesteer.detection.base import require_logits
from moesteer.detection.sides import OTHER, WANTED, Sides
from moesteer.errors import TraceLabelError
from moesteer.routing import softmax
from moesteer.trace import TraceReader

F64 = NDArray[np.float64]
BLOCK_TOKENS = 256
LEAST_VARIANCE = 1e-12
"""Of d, as a share of its mean square: less than that is rounding, and t would be noise."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Sums over each group's pairs: of d, of its square, and how many pairs."""

    sum_GLE: F64
    squares_GLE: F64
    pairs_G: NDArray[np.int64]

    @property
    def has_GS(self) -> NDArray[np.bool_]:
        """Which groups have which sides: both, or neither."""
        return np.repeat(self.pairs_G[:, None] > 0, 2, axis=1)

    def score_LE(self) -> F64:
        """t over all pairs."""
        return t_statistic(self.sum_GLE.sum(axis=0), self.squares_GLE.sum(axis=0), self.pairs_G.sum())

    def resampled_BLE(self, weights_BG: F64) -> F64:
        """t where group g counts weights_BG[b, g] times."""
        groups, layers, experts = self.sum_GLE.shape
        total, squares = (
            (weights_BG @ table.reshape(groups, -1)).reshape(-1, layers, experts)
            for table in (self.sum_GLE, self.squares_GLE)
        )
        return t_statistic(total, squares, (weights_BG @ self.pairs_G)[:, None, None])

    def shares_GSE(self, layer: int) -> F64:
        """Each group's mean d as its wanted side, zero as the other; NaN for a group without pairs."""
        with np.errstate(invalid="ignore"):
            mean_GE = self.sum_GLE[:, layer] / self.pairs_G[:, None]
        return np.stack([mean_GE, mean_GE * 0], axis=1)


def t_statistic(total: F64, squares: F64, number: F64 | np.int64) -> F64:
    """One-sample t of `number` values from their sum and sum of squares; 0 where all are 0."""
    mean_square = squares / number
    variance = np.maximum(squares - total**2 / number, LEAST_VARIANCE * squares) / np.maximum(number - 1, 1)
    t: F64 = np.where(mean_square > 0, total / number / np.sqrt(np.where(variance > 0, variance, 1.0) / number), 0.0)
    return t


def probabilities(logits_TLE: NDArray[np.float32], scoring: str) -> NDArray[np.float32]:
    """Router probabilities by a fingerprint's description of the scoring (routing.Scoring.describe).

    Raises TraceLabelError for a kind that is not known here.
    """
    multiplier, cap = re.search(r"logits x(\S+?)(?:,|$)", scoring), re.search(r"softcap=(\S+?)(?:,|$)", scoring)
    logits = logits_TLE * np.float32(multiplier[1]) if multiplier else logits_TLE
    if cap:
        logits = (np.tanh(logits / np.float32(cap[1])) * np.float32(cap[1])).astype(np.float32)
    kind = scoring.split(" ")[0]
    if kind in ("softmax-topk", "topk-softmax", "sparsemixer"):
        return softmax(logits)
    if kind in ("sigmoid", "topk-sigmoid"):
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)), dtype=np.float32)
    if kind == "sqrtsoftplus":
        roots: NDArray[np.float32] = np.sqrt(np.logaddexp(np.float32(0), logits))
        return roots
    raise TraceLabelError(
        f"router probabilities are not defined for the scoring {scoring!r}",
        where="paired-t",
        expected="softmax-topk, topk-softmax, sparsemixer, sigmoid, topk-sigmoid or sqrtsoftplus",
        do="use the score risk-difference, or add the kind to detection/paired.py",
    )


def pair_differences(
    trace: TraceReader, sides: Sides, *, weight: Literal["token", "conversation"] = "token", by_group: bool = False
) -> Pairs:
    """Stream a trace once and difference its pairs. `sides` must be paired.

    weight matters where a side of a pair has several conversations (pairs made of groups): the mean is over their
    tokens alike, or over their means. Memory: a table [L, E] per side of the pairs that are open, one of whose
    sequences was not read yet, and two per group. Raises TraceLabelError without logits or with fewer than two pairs.
    """
    require_logits(trace)
    number = len(sides.pair_groups)
    if number < 2:
        raise TraceLabelError(
            "paired-t has one pair only",
            where=str(trace.folder),
            expected="two pairs or more, between which differences can vary",
            do="capture more pairs, or use the score risk-difference",
        )
    shape = (len(trace.fingerprint.layer_ids), trace.fingerprint.experts)
    groups = len(sides.groups) if by_group else 1
    found = Pairs(np.zeros((groups, *shape)), np.zeros((groups, *shape)), np.zeros(groups, dtype=np.int64))
    awaited_P = np.bincount([part.pair for part in sides.parts.values()], minlength=number)
    open_: dict[int, tuple[F64, F64]] = {}
    for row, arrays in trace.sequences(set(sides.parts), tensors=("logits",)):
        part = sides.parts[row.id]
        sum_SLE, of_S = open_.setdefault(part.pair, (np.zeros((2, *shape)), np.zeros(2)))
        total_LE = _summed(arrays["logits"][part.tokens], trace.fingerprint.scoring)
        sum_SLE[part.side] += total_LE if weight == "token" else total_LE / part.count
        of_S[part.side] += part.count if weight == "token" else 1
        awaited_P[part.pair] -= 1
        if not awaited_P[part.pair]:
            del open_[part.pair]
            difference = sum_SLE[WANTED] / of_S[WANTED] - sum_SLE[OTHER] / of_S[OTHER]
            group = sides.pair_groups[part.pair] if by_group else 0
            found.sum_GLE[group] += difference
            found.squares_GLE[group] += difference**2
            found.pairs_G[group] += 1
    return found


def _summed(logits_TLE: NDArray[np.float16], scoring: str) -> F64:
    """Probabilities summed over tokens [L, E], a block of tokens at a time."""
    total = np.zeros(logits_TLE.shape[1:])
    for first in range(0, len(logits_TLE), BLOCK_TOKENS):
        block = logits_TLE[first : first + BLOCK_TOKENS].astype(np.float32)
        total += probabilities(block, scoring).sum(axis=0, dtype=np.float64)
    return total

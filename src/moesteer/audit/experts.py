"""Experts: how often each is chosen on either side of the pairs, and in which order to silence them.

Frequencies are shares of the tokens that select an expert; their intervals resample whole groups (behaviours), since
tokens of one conversation, and conversations about one behaviour, are not independent. A finder (audit/finders.py)
gives every expert a score, larger the more it is to speak for the behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from moesteer import files
from moesteer.audit.inputs import SHOWS
from moesteer.detection.choosing import additive_signs
from moesteer.detection.counts import Counts, count
from moesteer.detection.sides import OTHER, WANTED, sides_of
from moesteer.detection.significance import frequencies, group_test, group_weights
from moesteer.trace import TraceReader

F64 = NDArray[np.float64]
Order = tuple[tuple[int, int], ...]
"""(row of the layer, expert), best first."""
BOOTSTRAPS = 1000
RESAMPLED_TOGETHER = 100
INTERVAL = (0.025, 0.975)
FDR = 0.05
STABLE_TOP = 0.1
"""Of all experts: those that a resample counts as chosen are so many of the largest difference."""
STABLE = 0.8
"""An expert is stable that is chosen in this share of the resamples."""


@dataclass(frozen=True, eq=False)
class Interval:
    """An estimate for every expert with its 95 % interval, [L, E] each."""

    value: F64
    low: F64
    high: F64

    def at(self, row: int, expert: int) -> dict[str, float]:
        """For experts.json."""
        return {name: float(getattr(self, name)[row, expert]) for name in ("value", "low", "high")}


@dataclass(frozen=True, eq=False)
class Finder:
    """One way to rank experts. score_LE: larger speaks more for the behaviour. order: to silence, best first.

    against: to switch on, best first: those that speak most against it. passed: experts that pass its own test.
    """

    name: str
    title: str
    score_LE: F64
    order: Order
    against: Order
    passed: int | None
    facts: Mapping[str, Any]

    def as_json(self, layer_ids: tuple[int, ...]) -> dict[str, Any]:
        """For results.json."""
        return {
            "title": self.title, "order": [[layer_ids[row], expert] for row, expert in self.order],
            "passed": self.passed, "facts": files.plain(dict(self.facts)),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Experts:
    """What the pairs say of every expert. usage_LE: share of all tokens of both sides; tokens: of (shows, lacks).

    p_LE, q_LE: of the difference, over groups, and adjusted for all experts (Benjamini-Hochberg). stable_LE: share of
    resamples in which the expert is among the STABLE_TOP of largest positive (or, where its difference is negative,
    most negative) difference. counts: by group, for other statistics.
    """

    layer_ids: tuple[int, ...]
    counts: Counts
    usage_LE: F64
    shows: Interval
    lacks: Interval
    difference: Interval
    p_LE: F64
    q_LE: F64
    stable_LE: F64
    test: str
    tokens: tuple[int, int]
    seed: int

    @property
    def behaviour_LE(self) -> NDArray[np.int8]:
        """1 for experts that speak for the behaviour, -1 against: their difference passes FDR and is stable."""
        passes = (self.q_LE <= FDR) & (self.stable_LE >= STABLE)
        return np.where(passes, np.sign(self.difference.value), 0).astype(np.int8)

    def as_json(self, finders: Mapping[str, Finder]) -> dict[str, Any]:
        """The content of experts.json."""
        ranks = {name: {entry: place for place, entry in enumerate(one.order, 1)} for name, one in finders.items()}
        layers, experts = self.usage_LE.shape
        rows = [
            {
                "layer": self.layer_ids[row], "expert": expert, "usage": float(self.usage_LE[row, expert]),
                "shows": self.shows.at(row, expert), "lacks": self.lacks.at(row, expert),
                "difference": self.difference.at(row, expert), "p": float(self.p_LE[row, expert]),
                "q": float(self.q_LE[row, expert]), "stable": float(self.stable_LE[row, expert]),
                "scores": {name: float(one.score_LE[row, expert]) for name, one in finders.items()},
                "rank": {name: rank[row, expert] for name, rank in ranks.items()},
            }
            for row in range(layers)
            for expert in range(experts)
        ]  # fmt: skip
        return {"schema": 1, "layers": list(self.layer_ids), "experts": experts, "rows": rows}


def experts(trace: TraceReader, *, span: str, seed: int) -> Experts:
    """Count a trace of pairs (labels SHOWS and LACKS). Raises TraceLabelError for one side alone, or one group."""
    sides = sides_of(trace, toward=SHOWS, span=span)
    counts = count(trace, sides, by_group=True)
    table_SLE = counts.table_GSLE.sum(axis=0).astype(np.float64)
    of_S = counts.of_GS.sum(axis=0)
    tested = group_test(counts, layers=table_SLE.shape[1], where=str(trace.folder))
    shares = [_interval(counts, side, seed) for side in (WANTED, OTHER)]
    return Experts(
        layer_ids=trace.fingerprint.layer_ids, counts=counts, usage_LE=table_SLE.sum(axis=0) / of_S.sum(),
        shows=shares[WANTED], lacks=shares[OTHER], difference=_interval(counts, None, seed), p_LE=tested.p_LE,
        q_LE=false_discovery_control(tested.p_LE, axis=None).reshape(tested.p_LE.shape),
        stable_LE=_stability(counts, seed, str(trace.folder)), test=tested.test,
        tokens=(int(of_S[WANTED]), int(of_S[OTHER])), seed=seed,
    )  # fmt: skip


def usage_of(trace: TraceReader) -> tuple[int, F64]:
    """(tokens, share of them that select each expert [L, E]) of every kept token of a trace, labels or none."""
    experts_of = trace.fingerprint.experts
    table_LE = np.zeros((len(trace.fingerprint.layer_ids), experts_of))
    tokens = 0
    for _, arrays in trace.sequences(tensors=("selected",)):
        selected_TLK = arrays["selected"].astype(np.int64)
        for row in range(len(table_LE)):
            table_LE[row] += np.bincount(selected_TLK[:, row].ravel(), minlength=experts_of)
        tokens += len(selected_TLK)
    return tokens, table_LE / max(1, tokens)


def ordered(score_LE: F64, first_LE: NDArray[np.bool_] | None = None) -> Order:
    """Every expert by falling score, those in `first_LE` before all others. Ties go to the lower layer and expert."""
    scores = score_LE.ravel()
    later = np.zeros(scores.shape) if first_LE is None else ~first_LE.ravel()
    found = np.lexsort((np.arange(scores.size), -scores, later))
    return tuple((int(flat) // score_LE.shape[1], int(flat) % score_LE.shape[1]) for flat in found)


def resampled(counts: Counts, *, seed: int, bootstraps: int = BOOTSTRAPS) -> F64:
    """How often each group is drawn in each bootstrap resample, [B, G]."""
    return group_weights(counts.has_GS, bootstraps=bootstraps, seed=seed).astype(np.float64)


def _interval(counts: Counts, side: int | None, seed: int) -> Interval:
    """Shares of one side, or (None) the difference of the two, with percentiles over resampled groups."""
    weights_BG = resampled(counts, seed=seed)
    parts = [
        _shares(counts, weights_BG[i : i + RESAMPLED_TOGETHER], side)
        for i in range(0, len(weights_BG), RESAMPLED_TOGETHER)
    ]
    low, high = np.quantile(np.concatenate(parts), INTERVAL, axis=0)
    return Interval(_shares(counts, np.ones((1, len(counts.of_GS))), side)[0], low, high)


def _shares(counts: Counts, weights_BG: F64, side: int | None) -> F64:
    if side is None:
        return counts.resampled_BLE(weights_BG)
    groups, _, layers, experts_of = counts.table_GSLE.shape
    sums = weights_BG @ counts.table_GSLE[:, side].reshape(groups, -1).astype(np.float64)
    found: F64 = (sums / (weights_BG @ counts.of_GS[:, side])[:, None]).reshape(-1, layers, experts_of)
    return found


def _stability(counts: Counts, seed: int, where: str) -> F64:
    most = max(1, round(STABLE_TOP * counts.table_GSLE[0, 0].size))

    def choose(score_BLE: F64) -> NDArray[np.int8]:
        return additive_signs(np.maximum(score_BLE, 0), experts=most) + additive_signs(
            np.minimum(score_BLE, 0), experts=most
        )

    for_LE, against_LE = frequencies(counts, choose, bootstraps=BOOTSTRAPS, seed=seed, where=where)
    return np.where(counts.score_LE() >= 0, for_LE, against_LE)

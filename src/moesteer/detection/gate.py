"""The gate's probe: for which requests a mask is meant, told from pooled routing logits (ours).

A ridge-penalised logistic regression on the standardised pooled logits [L, E] of prompts: those of the target suite
against those of the protected suites, both sides weighing alike. Which positions are pooled and how strong the penalty
is are chosen by cross-validation that leaves out whole tactics of both sides (behaviours, where there are fewer than
three tactics): a gate that has learnt the tactics it was shown is of no use. The scores left out calibrate the
probabilities (Platt 1999: a logistic curve of one slope and one shift), and a threshold is the quantile of the
protected text's scores left out, so that a wanted share of false positives is not exceeded there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from moesteer.detection.logistic import logistic, sigmoid
from moesteer.errors import EmptyDataError, InputError, NoEffectError
from moesteer.gate import GateInfo, GateRate, Pool
from moesteer.mask import SteeringMask

PENALTIES = (3.0, 30.0, 300.0)
FOLDS = 5
LOWEST = 1e-6
"""The smallest threshold: a gate that is never shut is no gate."""
FEWEST = 8
"""Fewer requests than this on a side are no contrast."""


@dataclass(frozen=True, eq=False)
class Side:
    """Requests of one side: pooled logits [N, L, E] by pool, and for each request its group and tactic."""

    pooled: Mapping[Pool, NDArray[np.float32]]
    groups: Sequence[str]
    tactics: Sequence[str | None]


@dataclass(frozen=True, eq=False)
class Probe:
    """A calibrated probe on one pool. scores left out of the fit (calibrated log odds), target and protected."""

    pool: Pool
    penalty: float
    weight_LE: NDArray[np.float64]
    bias: float
    target_N: NDArray[np.float64]
    protected_M: NDArray[np.float64]
    auroc: float

    def scores(self, pooled_NLE: NDArray[np.floating]) -> NDArray[np.float64]:
        """[N] calibrated log odds."""
        return np.asarray(np.einsum("nle,le->n", pooled_NLE.astype(np.float64), self.weight_LE) + self.bias)


def fit(target: Side, protected: Side, *, penalties: Sequence[float] = PENALTIES, seed: int = 0) -> Probe:
    """The probe of best cross-validated AUROC over pools and penalties. Raises EmptyDataError, NoEffectError."""
    n, m = len(target.groups), len(protected.groups)
    if min(n, m) < FEWEST:
        raise EmptyDataError(
            "too few requests to fit a gate",
            where=f"{n} of the target, {m} protected",
            expected=f"at least {FEWEST} of each",
            do="give more conversations, or leave the gate out",
        )
    folds = _folds(target, protected, seed=seed)
    labels = np.concatenate([np.ones(n), np.zeros(m)])
    _require_both_sides(folds, labels)
    best: tuple[float, Pool, float, NDArray[np.float64]] | None = None
    for pool in target.pooled:
        features = _flat(target, protected, pool)
        for penalty in penalties:
            held = np.zeros(n + m)
            for fold in np.unique(folds):
                inside = folds != fold
                weight, bias = logistic(features[inside], labels[inside], penalty=penalty)
                held[~inside] = features[~inside] @ weight + bias
            area = auroc(held[:n], held[n:])
            if best is None or area > best[0] + 1e-12:
                best = (area, pool, penalty, held)
    assert best is not None
    area, pool, penalty, held = best
    if area <= 0.5:
        raise NoEffectError(
            "routing logits do not tell the target's requests from protected ones",
            where=f"{n} and {m} requests, AUROC {area:.3f} on what was left out",
            expected="better than chance",
            do="leave the gate out, or give more conversations",
        )
    slope, shift = _platt(held, labels)
    weight, bias = logistic(_flat(target, protected, pool), labels, penalty=penalty)
    shape = target.pooled[pool].shape[1:]
    calibrated = slope * held + shift
    return Probe(
        pool, penalty, (slope * weight).reshape(shape), slope * bias + shift, calibrated[:n], calibrated[n:], area
    )


def threshold(probe: Probe, *, false_positives: float) -> float:
    """The smallest probability (but for a millionth) at which at most this share of the protected requests left out
    still fires. Raises NoEffectError where more of them look like the target with certainty, InputError.
    """
    if not 0.0 <= false_positives < 1.0:
        raise InputError(
            f"no gate has a share of false positives of {false_positives:g}",
            where="the gate's threshold (false_positives)",
            expected="a number of 0 or more, and less than 1",
            do="give one, for example 0.01",
        )
    allowed = int(false_positives * len(probe.protected_M))
    score = np.sort(probe.protected_M)[::-1][allowed]
    probability = float(sigmoid(score))
    above = max(LOWEST, probability + 1e-6 * (1.0 - probability), float(np.nextafter(probability, 2.0)))
    if above >= 1.0 or np.log(above / (1.0 - above)) <= score:
        raise NoEffectError(
            f"no threshold keeps the gate's false positives at {100 * false_positives:g} % or fewer",
            where=f"log odds of {score:.1f} for a protected request, of {len(probe.protected_M)}",
            expected="protected requests that can be told from the target's",
            do="look for requests of the target among the protected ones, or leave the gate out",
        )
    return above


def gated(
    mask: SteeringMask,
    probe: Probe,
    *,
    at: float,
    target_NLE: NDArray[np.floating] | None = None,
    protected_MLE: NDArray[np.floating] | None = None,
    measured_on: str = "left out in cross-validation",
) -> SteeringMask:
    """The mask behind the probe, firing from probability `at`.

    The rates in it are those of target_NLE and protected_MLE (requests that the probe was not fitted on, described
    by measured_on), or else of the requests left out in cross-validation.
    """
    hit = probe.target_N if target_NLE is None else probe.scores(target_NLE)
    miss = probe.protected_M if protected_MLE is None else probe.scores(protected_MLE)
    cut = float(np.log(at / (1.0 - at)))
    info = GateInfo(
        pool=probe.pool, bias=float(probe.bias), threshold=at, measured_on=measured_on,
        false_positive_rate=_rate(miss >= cut), true_positive_rate=_rate(hit >= cut), auroc=auroc(hit, miss),
    )  # fmt: skip
    return mask.with_gate(probe.weight_LE.astype(np.float32), info)


def facts(probe: Probe) -> dict[str, Any]:
    """For the report: what was chosen, and how well calibrated it is on what was left out."""
    scores = np.concatenate([probe.target_N, probe.protected_M])
    labels = np.concatenate([np.ones(len(probe.target_N)), np.zeros(len(probe.protected_M))])
    probability = 1.0 / (1.0 + np.exp(-np.clip(scores, -500.0, 500.0)))
    return {
        "pool": probe.pool, "penalty": probe.penalty, "auroc": probe.auroc,
        "brier": float(np.mean((probability - labels) ** 2)),
        "target": len(probe.target_N), "protected": len(probe.protected_M),
    }  # fmt: skip


def auroc(target_N: NDArray[np.float64], protected_M: NDArray[np.float64]) -> float:
    """Probability that a target's score is above a protected one's, ties counted half (Mann-Whitney)."""
    ranks = stats.rankdata(np.concatenate([target_N, protected_M]))
    n, m = len(target_N), len(protected_M)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def _rate(fired: NDArray[np.bool_]) -> GateRate:
    interval = stats.binomtest(int(fired.sum()), len(fired)).proportion_ci(0.95, method="wilson")
    return GateRate(value=float(fired.mean()), low=float(interval.low), high=float(interval.high), n=len(fired))


def _flat(target: Side, protected: Side, pool: Pool) -> NDArray[np.float64]:
    both = np.concatenate([target.pooled[pool], protected.pooled[pool]]).astype(np.float64)
    return both.reshape(len(both), -1)


def _folds(target: Side, protected: Side, *, seed: int) -> NDArray[np.int64]:
    """A fold per request: by tactic, where the target has three or more of them, else by group.

    Protected requests of a tactic go with it, or together where only they have it; those without one are spread over
    the folds by group.
    """
    tactics = sorted({tactic for tactic in target.tactics if tactic is not None})
    by_tactic = len(tactics) >= 3 and None not in target.tactics
    groups = sorted({*target.groups, *protected.groups})
    random.Random(f"gate/{seed}").shuffle(groups)
    count = len(tactics) if by_tactic else FOLDS
    of_group = {group: i % count for i, group in enumerate(groups)}
    tactics += sorted({tactic for tactic in protected.tactics if tactic is not None} - set(tactics))
    of_tactic = {tactic: i % count for i, tactic in enumerate(tactics)} if by_tactic else {}
    pairs = [*zip(target.groups, target.tactics, strict=True), *zip(protected.groups, protected.tactics, strict=True)]
    return np.array([of_tactic.get(tactic or "", of_group[group]) for group, tactic in pairs])


def _require_both_sides(folds: NDArray[np.int64], labels: NDArray[np.float64]) -> None:
    """Raise EmptyDataError where leaving a fold out leaves nothing of a side to fit on."""
    for fold in np.unique(folds):
        if len(np.unique(labels[folds != fold])) < 2:
            raise EmptyDataError(
                "a gate cannot be cross-validated: all requests of a side are left out at once",
                where=f"{int((folds == fold).sum())} of {len(folds)} requests",
                expected="several behaviours, or several tactics, on each side",
                do="give conversations about more behaviours, or leave the gate out",
            )


def _platt(scores_N: NDArray[np.float64], labels_N: NDArray[np.float64]) -> tuple[float, float]:
    """Slope (positive) and shift of the logistic curve through the scores, with Platt's smoothed targets."""
    positives = labels_N.sum()
    negatives = len(labels_N) - positives
    wanted = np.where(labels_N == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slope = np.exp(point[0])
        z = slope * scores_N + point[1]
        error = sigmoid(z) - wanted
        value = float((np.logaddexp(0.0, z) - wanted * z).sum())
        return value, np.array([(error * scores_N).sum() * slope, error.sum()])

    found = optimize.minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-6.0, 6.0), (None, None)])
    return float(np.exp(found.x[0])), float(found.x[1])

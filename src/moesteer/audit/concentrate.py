"""Concentration: in how few experts a behaviour lies, and how much of it lies in none of them.

- **n50**: how many experts of a finder's order must be silenced until half of the behaviour is gone; between two
  sizes that were played it is read off the straight line. Its interval resamples groups and reads the curve again; an
  end that is None was not reached by any size.
- **Gini** and **share by layer** of the positive risk difference: 0 where all experts are chosen more often by as much,
  near 1 where one has it all. They describe routing, not effect.
- **Permuted experts**: every layer's routed experts change places at random, so that no token finds those it was sent
  to. What is left of the behaviour then does not hang on which routed experts are chosen: attention, shared experts,
  embeddings carry it. Where utility is gone too, the model is broken and nothing follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer.audit.experts import F64, RESAMPLED_TOGETHER, Experts, resampled
from moesteer.audit.playing import Condition
from moesteer.audit.points import Rows, Scale, lost
from moesteer.models.permuting import random_order

PERMUTATIONS = 5
BOOTSTRAPS = 2000
HALF = 0.5
"""Of the behaviour: what n50 stands for."""


def n50(
    shown_CG: F64, of_CG: F64, sizes: Sequence[int], *, seed: int, experts: int, bootstraps: int = BOOTSTRAPS
) -> dict[str, Any]:
    """n50 of one curve with its 95 % interval. shown_CG, of_CG: by condition and group, the unsteered model first.

    experts: of all layers; `share` is of them.
    """
    groups = shown_CG.shape[1]
    value = float(_crossings(np.ones((1, groups)), shown_CG, of_CG, sizes)[0])
    weights_BG = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), bootstraps)
    found = np.sort(_crossings(weights_BG.astype(np.float64), shown_CG, of_CG, sizes))
    low, high = (float(found[int(place * (bootstraps - 1) + 0.5)]) for place in (0.025, 0.975))
    numbers = [number if np.isfinite(number) else None for number in (value, low, high)]
    share = None if numbers[0] is None else numbers[0] / experts
    return {"value": numbers[0], "low": numbers[1], "high": numbers[2], "of": experts, "share": share}


def _crossings(weights_BG: F64, shown_CG: F64, of_CG: F64, sizes: Sequence[int]) -> F64:
    """Where each resample's curve first falls to HALF of its own beginning; infinity where it never does."""
    with np.errstate(invalid="ignore", divide="ignore"):
        rate_BC = (weights_BG @ shown_CG.T) / (weights_BG @ of_CG.T)
    x_C = np.array([0, *sizes], dtype=np.float64)
    found_B = np.full(len(rate_BC), np.inf)
    for number, rate_C in enumerate(rate_BC):
        half = rate_C[0] * (1 - HALF)
        below = np.flatnonzero(rate_C <= half)  # NaN is not
        if not rate_C[0] > 0 or not len(below):
            continue
        at = int(below[0])
        before, after = rate_C[at - 1], rate_C[at]
        part = (before - half) / (before - after) if before > after else 1.0
        found_B[number] = x_C[at - 1] + part * (x_C[at] - x_C[at - 1])
    return found_B


def gini(values: NDArray[np.floating[Any]]) -> float:
    """Gini coefficient of non-negative values: 0 where all are equal, (n - 1) / n where one has all; 0 for all zero."""
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    total = ordered.sum()
    if total <= 0:
        return 0.0
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))


def shape_of(found: Experts) -> dict[str, Any]:
    """Gini, with its interval over resampled groups, and share by layer of the positive risk difference."""
    positive_LE = np.maximum(found.difference.value, 0)
    weights_BG = resampled(found.counts, seed=found.seed)
    each = [
        gini(np.maximum(table_LE, 0))
        for i in range(0, len(weights_BG), RESAMPLED_TOGETHER)
        for table_LE in found.counts.resampled_BLE(weights_BG[i : i + RESAMPLED_TOGETHER])
    ]
    low, high = np.quantile(each, (0.025, 0.975))
    total = positive_LE.sum()
    shares_L = positive_LE.sum(axis=1) / total if total > 0 else np.zeros(len(positive_LE))
    return {
        "by_layer": [
            {"layer": layer, "share": float(share)} for layer, share in zip(found.layer_ids, shares_L, strict=True)
        ],
        "gini": {"value": gini(positive_LE), "low": float(low), "high": float(high)},
    }


def permutations(model: Any, *, seed: int, count: int = PERMUTATIONS) -> list[Condition]:
    """The model with its routed experts in other places, drawn `count` times."""
    return [
        Condition(f"permuted-{number}", order_LE=random_order(model.routers, seed=[seed, number]))
        for number in range(count)
    ]


def permuted(scale: Scale, drawn: Sequence[Rows]) -> dict[str, Any]:
    """What is left with all routed experts permuted (`concentration.permuted` of results.json)."""
    found = scale.over_draws(drawn)
    before = scale.rates(scale.none)["behaviour"]["value"]
    return {"draws": len(drawn), **found, "lost": lost(before, found["behaviour"]["mean"])}


def outside(found: Mapping[str, Any], *, noun: str, utility_points: float) -> dict[str, Any]:
    """How much of the behaviour routing cannot explain, and in a sentence what that says."""
    share = None if found["lost"] is None else max(0.0, 1 - found["lost"])
    changes = [one["vs_none"] for one in found["utility"].values() if one["vs_none"] is not None]
    change = sum(changes) / len(changes) if changes else None
    if share is None:
        return {"share": None, "words": f"There were no {noun} to lose."}
    kept = f"With all routed experts permuted {100 * share:.0f} % of the {noun} are left"
    if change is None:
        return {"share": share, "words": f"{kept}; utility was not scored."}
    falls = f"utility {'falls' if change < 0 else 'changes'} by {abs(100 * change):.0f} points"
    if share >= HALF:
        words = f"{kept} ({falls}): most of them do not hang on which routed experts are chosen."
    elif change < -utility_points:
        words = f"{kept}, but {falls}: the model is broken as a whole, so this does not say where they lie."
    else:
        words = f"{kept} while {falls}: they hang on which routed experts are chosen."
    return {"share": share, "words": words}

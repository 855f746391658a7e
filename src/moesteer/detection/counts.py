"""How often each expert was selected: a trace is streamed once, shard by shard, and counted in integers.

Axes: G groups (1 where all are pooled), S sides (0 wanted, 1 other), L layers, E experts, B resamples of the
groups, T tokens, K selected experts. Memory is one shard and the table [G, S, L, E], whatever the trace's length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesteer.detection.sides import OTHER, WANTED, Part, Sides
from moesteer.errors import TraceFileError
from moesteer.trace import TraceReader

F64 = NDArray[np.float64]
Score = Literal["risk-difference", "log-odds"]
BLOCK_SELECTIONS = 1 << 17
"""Selections counted together: 1 MiB of keys stays in the cache."""


@dataclass(frozen=True, eq=False)
class Counts:
    """table_GSLE: selections, int64 (each token counts alike), or float64 sums of the conversations' shares.

    of_GS: of how many tokens or conversations; 0 where a group lacks the side.
    """

    table_GSLE: NDArray[Any]
    of_GS: NDArray[np.int64]
    score: Score = "risk-difference"

    @property
    def has_GS(self) -> NDArray[np.bool_]:
        """Which groups have which sides."""
        return self.of_GS > 0

    def score_LE(self) -> F64:
        """The score over all groups together."""
        table, of = self.table_GSLE.sum(axis=0), self.of_GS.sum(axis=0)
        return SCORES[self.score](table[WANTED], table[OTHER], of[WANTED], of[OTHER])

    def resampled_BLE(self, weights_BG: F64) -> F64:
        """The score where group g counts weights_BG[b, g] times; some group of either side must."""
        groups, sides, layers, experts = self.table_GSLE.shape
        of_SB = (weights_BG @ self.of_GS).T[..., None, None]
        tables = [
            (weights_BG @ self.table_GSLE[:, side].reshape(groups, -1).astype(np.float64)).reshape(-1, layers, experts)
            for side in range(sides)
        ]
        return SCORES[self.score](tables[WANTED], tables[OTHER], of_SB[WANTED], of_SB[OTHER])

    def shares_GSE(self, layer: int) -> F64:
        """Share of each group's tokens (or mean share of its conversations) that select an expert of a layer.

        NaN where the group lacks the side.
        """
        with np.errstate(invalid="ignore"):
            shares: F64 = self.table_GSLE[:, :, layer] / self.of_GS[..., None]
        return shares


def risk_difference(wanted: NDArray[Any], other: NDArray[Any], of_wanted: Any, of_other: Any) -> F64:
    """D = A1 / N1 - A2 / N2, in [-1, 1] (SteerMoE, section 3)."""
    difference: F64 = wanted / of_wanted - other / of_other
    return difference


def log_odds(wanted: NDArray[Any], other: NDArray[Any], of_wanted: Any, of_other: Any) -> F64:
    """ln of the ratio of the odds A / (N - A) of the two sides, 1/2 added to each of the four counts.

    The correction (Haldane 1956, Anscombe 1956) keeps it finite for an expert that is always or never selected.
    """
    ratio: F64 = np.log((wanted + 0.5) * (of_other - other + 0.5)) - np.log((of_wanted - wanted + 0.5) * (other + 0.5))
    return ratio


SCORES = {"risk-difference": risk_difference, "log-odds": log_odds}


def count(
    trace: TraceReader,
    sides: Sides,
    *,
    weight: Literal["token", "conversation"] = "token",
    by_group: bool = False,
    score: Score = "risk-difference",
) -> Counts:
    """Stream a trace once and count.

    weight "token" as published; "conversation": each conversation's share of tokens, its integer count divided
    once in float64, counts alike. by_group: a table per group rather than one. Raises TraceFileError for a
    selection of an expert that the model does not have.
    """
    layers, experts = len(trace.fingerprint.layer_ids), trace.fingerprint.experts
    groups = len(sides.groups) if by_group else 1
    alike = weight == "conversation"
    table = np.zeros((groups, 2, layers * experts), dtype=np.float64 if alike else np.int64)
    of_GS = np.zeros((groups, 2), dtype=np.int64)
    for block in _blocks(trace, sides):
        places = [(part.group if by_group else 0, part.side) for part, _ in block]
        # conversations are counted each in a row of its own, tokens in one row per group and side
        keys = [(place, i if alike else 0) for i, place in enumerate(places)]
        row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        found = histogram(
            [selected for _, selected in block], [row_of[key] for key in keys], rows=len(row_of), experts=experts
        )
        for (place, i), row in row_of.items():
            table[place] += found[row] / block[i][0].count if alike else found[row]
        for (part, _), place in zip(block, places, strict=True):
            of_GS[place] += 1 if alike else part.count
    return Counts(table.reshape(groups, 2, layers, experts), of_GS, score)


def _blocks(trace: TraceReader, sides: Sides) -> Iterator[list[tuple[Part, NDArray[Any]]]]:
    """Sequences with their counted selections [T, L, K], some at a time."""
    experts = trace.fingerprint.experts
    block: list[tuple[Part, NDArray[Any]]] = []
    size = 0
    for row, arrays in trace.sequences(set(sides.parts), tensors=("selected",)):
        part = sides.parts[row.id]
        selected = arrays["selected"][part.tokens]
        if len(selected) != part.count or selected.max() >= experts:
            raise TraceFileError(
                f"a sequence of {part.count} counted tokens has {len(selected)}, or an expert beyond {experts - 1}",
                where=f"{trace.folder}, sequence {row.id}",
                expected="the tokens that the index says, and expert ids that the model has",
                do="capture it again, or restore the folder",
            )
        block.append((part, selected))
        size += selected.size
        if size >= BLOCK_SELECTIONS:
            yield block
            block, size = [], 0
    if block:
        yield block


def histogram(selected: Sequence[NDArray[Any]], units: Sequence[int], *, rows: int, experts: int) -> NDArray[np.int64]:
    """Selections counted, [rows, L * E]. selected: arrays [T, L, K], each counted in the row `units` names."""
    _, layers, top_k = selected[0].shape
    table = np.zeros(rows * layers * experts, dtype=np.int64)
    narrow = np.min_scalar_type(table.size)  # small keys are made three times as fast as int64
    chosen_TC = np.concatenate(selected).reshape(-1, layers * top_k)
    start_C = np.repeat(np.arange(layers) * experts, top_k).astype(narrow)
    start_T = np.repeat((np.array(units) * (layers * experts)).astype(narrow), [len(array) for array in selected])
    step = max(1, BLOCK_SELECTIONS // (layers * top_k))
    for first in range(0, len(chosen_TC), step):
        part = slice(first, first + step)
        keys = chosen_TC[part] + start_C
        keys += start_T[part, None]
        table += np.bincount(keys.ravel(), minlength=table.size)
    return table.reshape(rows, -1)

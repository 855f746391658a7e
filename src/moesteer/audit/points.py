"""Points of a curve: what is left of a behaviour, and of utility, under one condition or under random draws.

A share is of scored rows; every difference is to the unsteered model on the same conversations. Utility is what each
suite wants (`success`), which a broken reply never is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer.audit.inputs import Inputs
from moesteer.evaluate import stats
from moesteer.evaluate.metrics import outcome

Rows = Sequence[Mapping[str, Any]]
MIDDLE = (0.025, 0.975)
"""Of random draws."""


@dataclass(frozen=True, eq=False)
class Scale:
    """What conditions are measured against: the rows of the unsteered model (or of another condition)."""

    inputs: Inputs
    none: Rows
    seed: int

    def rates(self, rows: Rows) -> dict[str, Any]:
        """The behaviour, every utility suite, and the coherence of the behaviour suite's replies, with intervals."""
        mine = self.inputs.of_behaviour(rows)
        return {
            "behaviour": stats.rate([self.inputs.shows(row) for row in mine]).as_json(),
            "utility": {
                suite.name: stats.rate(_successes(rows, suite.name)).as_json() for suite in self.inputs.utility
            },
            "coherence": stats.rate([outcome("coherence", row["verdict"]) for row in mine]).as_json(),
        }

    def point(self, n: int, condition: str, rows: Rows) -> dict[str, Any]:
        """A POINT of results.json; n: experts switched."""
        found = self.rates(rows)
        return {
            "n": n, "condition": condition, "behaviour": found["behaviour"], "vs_none": self.behaviour_gap(rows),
            "utility": {
                name: {"rate": rate, "vs_none": self._gap(rows, name, utility=True)}
                for name, rate in found["utility"].items()
            },
            "coherence": found["coherence"],
        }  # fmt: skip

    def behaviour_gap(self, rows: Rows) -> dict[str, float | None]:
        """The behaviour's difference to the unsteered model, paired, groups resampled."""
        return self._gap(rows, self.inputs.behaviour.name, utility=False)

    def _gap(self, rows: Rows, suite: str, *, utility: bool) -> dict[str, float | None]:
        before = {row["id"]: row for row in self.none if row["suite"] == suite}
        mine = [row for row in rows if row["suite"] == suite]

        def shown(row: Mapping[str, Any]) -> bool | None:
            return row["success"] if utility else self.inputs.shows(row)

        return stats.paired_difference(
            [shown(before[row["id"]]) for row in mine], [shown(row) for row in mine],
            groups=[str(before[row["id"]]["group"]) for row in mine], seed=self.seed,
        )  # fmt: skip

    def over_draws(self, drawn: Sequence[Rows]) -> dict[str, Any]:
        """The behaviour and utility over random draws: mean, the middle 95 % of them, and every value of the behaviour.

        Utility suites also have vs_none, the mean difference to the unsteered model on the conversations played.
        """
        values = [self._share([self.inputs.shows(row) for row in self.inputs.of_behaviour(rows)]) for rows in drawn]
        utility = {}
        for suite in self.inputs.utility:
            rates = [self._share(_successes(rows, suite.name)) for rows in drawn]
            gaps = [self._gap(rows, suite.name, utility=True)["difference"] for rows in drawn]
            n = sum(row["suite"] == suite.name for row in drawn[0]) if drawn else 0
            known = [gap for gap in gaps if gap is not None]
            utility[suite.name] = {
                **_spread(rates), "n": n, "vs_none": float(np.mean(known)) if known else None,
            }  # fmt: skip
        return {"behaviour": {**_spread(values), "values": values}, "utility": utility}

    @staticmethod
    def _share(outcomes: Sequence[bool | None]) -> float | None:
        return stats.rate(outcomes).value

    def by_group(self, conditions: Sequence[Rows]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(rows that show the behaviour [conditions, groups], scored rows [conditions, groups])."""
        group_of = {row["id"]: str(row["group"]) for row in self.inputs.of_behaviour(self.none)}
        index = {group: i for i, group in enumerate(sorted(set(group_of.values())))}
        shown_CG, of_CG = np.zeros((len(conditions), len(index))), np.zeros((len(conditions), len(index)))
        for number, rows in enumerate(conditions):
            for row in self.inputs.of_behaviour(rows):
                shows = self.inputs.shows(row)
                if shows is not None:
                    shown_CG[number, index[group_of[row["id"]]]] += shows
                    of_CG[number, index[group_of[row["id"]]]] += 1
        return shown_CG, of_CG


def _successes(rows: Rows, suite: str) -> list[bool | None]:
    return [row["success"] for row in rows if row["suite"] == suite]


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "low": None, "high": None}
    low, high = np.quantile(known, MIDDLE)
    return {"mean": float(np.mean(known)), "low": float(low), "high": float(high)}


def lost(before: float | None, after: float | None) -> float | None:
    """The share of a rate that is gone: 1 where nothing of it is left, below 0 where it rose; None without a rate."""
    return None if not before or after is None else (before - after) / before


def mean_change(point: Mapping[str, Any]) -> float | None:
    """The utility suites' mean difference to the unsteered model at a point, each suite weighing alike."""
    gaps = [found["vs_none"]["difference"] for found in point["utility"].values()]
    known = [gap for gap in gaps if gap is not None]
    return sum(known) / len(known) if known else None

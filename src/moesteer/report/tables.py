"""The tables of the page as rows of Numbers: each cell knows its exact value and its place in results.json."""

from __future__ import annotations

from typing import Any

from moesteer.evaluate.cells import signed
from moesteer.report import wording
from moesteer.report.numbers import Number, difference, interval, percent, pointer, seconds
from moesteer.report.run_files import Difference, Results


def metric_order(results: Results) -> list[str]:
    """The metrics of the tables: the target, the protected ones, then the rest by name."""
    present = {metric for method in results.methods.values() for metric in method.metrics}
    first = [results.scenario.target_metric, *(protect.metric for protect in results.scenario.protect)]
    return [metric for metric in dict.fromkeys([*first, *sorted(present)]) if metric in present]


def method_order(results: Results) -> list[str]:
    """The methods of the tables: none, the controls, the published, ours; unknown ones last, by name."""
    known = list(wording.METHOD_NOTES)

    def place(name: str) -> tuple[int, str]:
        base = name.partition("+")[0]
        return (known.index(base) if base in known else len(known), name)

    return sorted(results.methods, key=place)


def tiles(results: Results, name: str | None) -> list[dict[str, Any]]:
    """Before and after, for the target and each protected metric."""
    if name is None:
        return []
    margins: dict[str, float | None] = {results.scenario.target_metric: None}
    margins |= {metric: margin for metric, margin in results.scenario.margins().items() if metric not in margins}
    none, method = results.methods["none"], results.methods[name]
    made = []
    for metric, margin in margins.items():
        if metric in none.metrics and metric in method.metrics:
            found = method.vs_none.get(metric)
            made.append(
                {
                    "metric": metric,
                    "before": wording.rate(metric, "none", none.metrics[metric]),
                    "after": wording.rate(metric, name, method.metrics[metric]),
                    "difference": _difference(name, metric, found),
                    "effect": wording.verdict(metric, found),
                    "margin": None if margin is None else signed(margin).lstrip("+"),
                    "exceeded": margin is not None and _exceeds(metric, found, margin),
                }
            )
    return made


def _exceeds(metric: str, found: Difference | None, margin: float) -> bool:
    if found is None or found.difference is None:
        return False
    sign = 1 if metric in wording.LOWER_IS_BETTER else -1
    return sign * found.difference > margin + 1e-12


def _difference(name: str, metric: str, found: Difference | None) -> dict[str, Any] | None:
    place = ("methods", name, "vs_none", metric)
    return difference(found, *place, lower_is_better=metric in wording.LOWER_IS_BETTER)


def headline_table(results: Results) -> dict[str, Any]:
    """Columns (metrics) and rows (methods) of the headline table; a cell is None where nothing was measured."""
    margins = results.scenario.margins()
    columns = [
        {
            "metric": metric,
            "target": metric == results.scenario.target_metric,
            "margin": signed(margins[metric]).lstrip("+") if metric in margins else None,
            "lower": metric in wording.LOWER_IS_BETTER,
        }
        for metric in metric_order(results)
    ]
    rows = []
    for name in method_order(results):
        method = results.methods[name]
        cells = []
        for column in columns:
            metric = str(column["metric"])
            found = method.metrics.get(metric)
            cells.append(
                None
                if found is None
                else {
                    **interval(found, "methods", name, "metrics", metric),
                    "difference": _difference(name, metric, method.vs_none.get(metric)),
                }
            )
        rows.append({"name": name, "method": method, "cells": cells, "setting": wording.setting(name, method)[1:]})
    return {"columns": columns, "rows": rows}


def trade_off_table(results: Results) -> dict[str, Any]:
    """Every setting tried, in the order of the file."""
    present = {metric for point in results.trade_off for metric in point.metrics}
    columns = [metric for metric in metric_order(results) if metric in present]
    columns += sorted(present - set(columns))
    rows = []
    for index, point in enumerate(results.trade_off):
        cells = []
        for metric in columns:
            value = point.metrics.get(metric)
            place = pointer("trade_off", index, "metrics", metric)
            cells.append(Number(percent(value), value, place) if metric in point.metrics else None)
        sizes = {
            key: None if value is None else Number(f"{value:g}", value, pointer("trade_off", index, key))
            for key, value in (("alpha", point.alpha), ("experts", point.experts))
        }
        rows.append({"point": point, **sizes, "cells": cells})
    return {"columns": columns, "rows": rows}


def tactics_table(results: Results, name: str | None) -> list[dict[str, Any]]:
    """The target metric by tactic: unsteered, and steered with the shown method."""
    if name is None:
        return []
    target = results.scenario.target_metric
    pair = {method: results.methods[method].by_tactic.get(target, {}) for method in ("none", name)}
    tactics = sorted({tactic for found in pair.values() for tactic in found})
    unseen = set(wording.unseen_tactics(results, tactics))
    return [
        {
            "tactic": tactic,
            "unseen": tactic in unseen,
            "cells": [
                interval(found[tactic], "methods", method, "by_tactic", target, tactic) if tactic in found else None
                for method, found in pair.items()
            ],
        }
        for tactic in tactics
    ]


def splits_table(results: Results) -> dict[str, Any]:
    """Suites by splits, in the order fit, select, test, then others."""
    known = ["fit", "select", "test"]
    names = [name for name in known if name in results.splits]
    names += sorted(set(results.splits) - set(known))
    suites = sorted({suite for split in results.splits.values() for suite in split})
    rows = []
    for suite in suites:
        cells = []
        for name in names:
            split = results.splits[name].get(suite)
            cells.append(
                None
                if split is None
                else {
                    "n": Number(str(split.n), split.n, pointer("splits", name, suite, "n")),
                    "groups": Number(str(split.groups), split.groups, pointer("splits", name, suite, "groups")),
                    "tactics": split.tactics,
                }
            )
        rows.append({"suite": suite, "cells": cells})
    return {"names": names, "rows": rows}


def test_tactics(results: Results) -> list[str]:
    """Every tactic of the test split."""
    return sorted({tactic for split in results.splits.get("test", {}).values() for tactic in split.tactics})


def timings_table(results: Results) -> dict[str, Any]:
    """Seconds per method and step, and of the whole run."""
    steps = {step: None for name in method_order(results) for step in results.methods[name].seconds}
    known: list[str] = ["detect", "select", "evaluate"]
    columns = [step for step in known if step in steps]
    columns += sorted(set(steps) - set(columns))
    rows = [
        {
            "name": name,
            "cells": [
                seconds(results.methods[name].seconds.get(step), pointer("methods", name, "seconds", step))
                for step in columns
            ],
        }
        for name in method_order(results)
    ]
    whole = [(step, seconds(value, pointer("seconds", step))) for step, value in sorted(results.seconds.items())]
    return {"columns": columns, "rows": rows, "whole": whole}

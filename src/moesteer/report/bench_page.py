"""The page of benchmarks: the pooled tables of bench/quality.py, or what the other programs in bench/ measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.evaluate.cells import NOTHING
from moesteer.report import page, wording
from moesteer.report.bench_files import BenchScenario, Row, is_quality, read_benchmarks, read_quality
from moesteer.report.figures import NARROW_PX, Dots, dot_rows, label, layout
from moesteer.report.numbers import Number, difference, interval, percent, pointer
from moesteer.report.page import Page, source

TITLES = {"quality": "Every method and control", "reversed": "Reversed, for audits", "ablations": "Ablations"}


def make(folder: Path, names: list[str]) -> Page:
    """The page of JSON files of a folder. names: of one file of quality.py, or of any of the others."""
    paths = [folder / name for name in names]
    sources = [source(folder, name) for name in names]
    if len(paths) == 1 and is_quality(files.read_json(paths[0])):
        return _quality(paths[0], sources)
    return _measured(paths, sources)


# ---- bench/quality.py


def _quality(path: Path, sources: list[dict[str, Any]]) -> Page:
    read = read_quality(path)
    tables = {kind: read[kind] for kind in [*(k for k in TITLES if k in read), *(k for k in read if k not in TITLES)]}
    makers: dict[str, Callable[[int], Any]] = {}
    kinds = []
    for number, (kind, table) in enumerate(tables.items()):
        parts = []
        for index, scenario in enumerate(table.scenarios):
            box = f"figure-kind-{number}-{index}"
            makers[box] = partial(_front, scenario)
            parts.append(
                {
                    "scenario": scenario,
                    "box": box,
                    "other": _other_metric(scenario),
                    "rows": [_row(path.name, kind, index, i, row, scenario) for i, row in enumerate(scenario.rows)],
                }
            )
        kinds.append({"kind": kind, "title": TITLES.get(kind, kind), "table": table, "parts": parts})
    context = {
        "nav": [("summary", "Summary"), *((f"kind-{i}", one["title"]) for i, one in enumerate(kinds)),
                ("sources", "Sources"), ("gaps", "Not shown")],
        "kinds": kinds,
        "measured": [],
        "title": "Benchmark: quality of steering",
        "outcome": _outcomes(path.name, tables),
        "sources": sources,
    }  # fmt: skip
    gaps = ["Conversations, masks and routing: a benchmark pools runs; each run has its own report."]
    return page.make("bench.html.j2", kind="bench", context=context, figures=page.draw(makers), gaps=gaps)


def _outcomes(file: str, tables: Mapping[str, Any]) -> list[list[str | Number]]:
    """For each scenario of the first kind, its best method by the target metric beside the unsteered model."""
    found: list[list[str | Number]] = []
    for kind, table in list(tables.items())[:1]:
        for index, scenario in enumerate(table.scenarios):
            target = scenario.target_metric
            rows = [(i, row) for i, row in enumerate(scenario.rows) if _value(row, target) is not None]
            best = [one for one in rows if one[1].method.partition("+")[0] not in wording.CONTROLS]
            none = [one for one in rows if one[1].method == "none"]
            if not best or not none:
                continue
            sign = -1 if target in wording.LOWER_IS_BETTER else 1
            chosen = max(best, key=lambda one: sign * (_value(one[1], target) or 0.0))
            said: list[str | Number] = [f"{scenario.title}: {wording.metric_name(target)} "]
            for (i, row), words in ((none[0], " unsteered, "), (chosen, f" with {chosen[1].method}")):
                place = pointer(kind, "scenarios", index, "rows", i, "metrics", target, "value")
                said += [Number(percent(_value(row, target)), _value(row, target), place, file), words]
            found.append([*said, f" ({len(scenario.seeds)} seeds)."])
    return found


def _value(row: Row, metric: str) -> float | None:
    return row.metrics[metric].value if metric in row.metrics else None


def _row(file: str, kind: str, index: int, number: int, row: Row, scenario: BenchScenario) -> dict[str, Any]:
    place = (kind, "scenarios", index, "rows", number)
    cells: list[dict[str, Any] | None] = []
    for column in scenario.columns:
        found = row.metrics.get(column.metric)
        if found is None:
            cells.append(None)
            continue
        gap = difference(
            row.vs_none.get(column.metric), *place, "vs_none", column.metric, lower_is_better=column.lower_is_better
        )
        cells.append(
            _in_file(interval(found, *place, "metrics", column.metric) | {"difference": None}, file)
            | {"difference": None if gap is None else _in_file(gap, file)}
        )
    return {"name": row.method, "cells": cells}


def _in_file(cell: Mapping[str, Any], file: str) -> dict[str, Any]:
    return {
        key: Number(one.text, one.value, one.pointer, file) if isinstance(one, Number) else one
        for key, one in cell.items()
    }


def _other_metric(scenario: BenchScenario) -> str | None:
    """What the target is drawn against: benign accuracy, else the first protected metric."""
    known = [column.metric for column in scenario.columns if column.metric != scenario.target_metric]
    protected = [c.metric for c in scenario.columns if c.role == "protect" and c.metric != scenario.target_metric]
    return next((one for one in ("benign_accuracy", *protected) if one in known), None)


def _front(scenario: BenchScenario, width_px: int) -> dict[str, Any] | None:
    """Every method's target metric, and the protected one beside it, pooled on test."""
    wanted = [(scenario.target_metric, "@blue", "circle"), (_other_metric(scenario), "@orange", "square-open")]
    series = [
        Dots(wording.metric_name(metric), [row.metrics.get(metric) for row in scenario.rows], tint, symbol)
        for metric, tint, symbol in wanted
        if metric is not None
    ]
    if not any(found is not None and found.value is not None for dots in series for found in dots.intervals):
        return None
    longest = 18 if width_px < NARROW_PX else 40
    return dot_rows([label(row.method, longest=longest) for row in scenario.rows], series)


# ---- the other programs


def _measured(paths: list[Path], sources: list[dict[str, Any]]) -> Page:
    found = read_benchmarks(paths)
    makers: dict[str, Callable[[int], Any]] = {}
    parts = []
    for number, (name, value) in enumerate(found.items()):
        box = f"figure-ratios-{number}"
        ratios = list(_ratios(value))
        if ratios:
            makers[box] = partial(_ratio_figure, ratios)
        parts.append({"name": name, "box": box, "rows": list(_leaves(value, f"{name}.json"))})
    context = {
        "nav": [("summary", "Summary"), *((f"bench-{i}", one["name"]) for i, one in enumerate(parts)),
                ("sources", "Sources"), ("gaps", "Not shown")],
        "kinds": [],
        "measured": parts,
        "title": "Benchmarks: " + ", ".join(found),
        "outcome": [[f"{len(parts)} benchmarks, every value that their files hold."]],
        "sources": sources,
    }  # fmt: skip
    gaps = [] if makers else ["Figures: none of the files holds ratios with intervals."]
    return page.make("bench.html.j2", kind="bench", context=context, figures=page.draw(makers), gaps=gaps)


def _leaves(value: Any, file: str, *path: str | int) -> Iterator[dict[str, Any]]:
    """Every value of a file with its place, in order; a list of plain values is one row."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, file, *path, key)
    elif isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, file, *path, index)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield {"path": _words(path), "value": Number(f"{value:,.6g}", value, pointer(*path), file), "text": None}
    else:
        text = value if isinstance(value, str) else NOTHING if value is None else json.dumps(value)
        yield {"path": _words(path), "value": None, "text": text}


def _words(path: tuple[str | int, ...]) -> str:
    return " › ".join(str(part).replace("_", " ") for part in path)


def _ratios(value: Any, *path: str | int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object with a ratio and its interval, by name."""
    if isinstance(value, dict):
        if all(isinstance(value.get(key), int | float) for key in ("ratio", "low", "high")):
            name = f"{value['steered']} / {value['against']}" if "steered" in value else _words(path)
            yield name, value
            return
        for key, inner in value.items():
            yield from _ratios(inner, *path, key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _ratios(inner, *path, index)


def _ratio_figure(ratios: list[tuple[str, dict[str, Any]]], width_px: int) -> dict[str, Any]:
    """Ratios to what they are compared with, with their intervals; 1 is no difference."""
    narrow = width_px < NARROW_PX
    values = [found["ratio"] for _, found in ratios]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": values,
        "y": list(range(len(ratios))),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [found["high"] - found["ratio"] for _, found in ratios],
            "arrayminus": [found["ratio"] - found["low"] for _, found in ratios],
            "color": "@blue",
            "thickness": 1.5,
            "width": 4,
        },
        "marker": {"size": 10, "color": "@blue"},
        "hovertext": [f"{label(n)}<br>{f['ratio']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for n, f in ratios],
        "hoverinfo": "text",
        "showlegend": False,
    }
    low, high = min(f["low"] for _, f in ratios), max(f["high"] for _, f in ratios)
    room = 0.1 * max(high - low, 0.01)
    laid = layout(
        130 + 40 * len(ratios),
        xaxis={"range": [min(low, 1.0) - room, max(high, 1.0) + room], "gridcolor": "@grid", "zeroline": False,
               "fixedrange": True, "title": {"text": "ratio", "font": {"size": 12}}},
        yaxis={"tickvals": list(range(len(ratios))), "automargin": True, "zeroline": False, "fixedrange": True,
               "ticktext": [label(name, longest=20 if narrow else 60) for name, _ in ratios],
               "range": [len(ratios) - 0.5, -0.5], "gridcolor": "rgba(0,0,0,0)"},
        shapes=[{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper",
                 "line": {"color": "@muted", "width": 1.5, "dash": "dash"}}],
    )  # fmt: skip
    return {"data": [trace], "layout": laid}

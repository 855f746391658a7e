"""The page of an evaluation: metrics without and with the masks, suite by suite, and conversations side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moesteer.report import conversations_shown, page, routing_figure, wording
from moesteer.report.evaluate_files import RUN, Condition, EvaluateResults, read_evaluation, read_plan
from moesteer.report.figures import NARROW_PX, Dots, dot_rows, label
from moesteer.report.numbers import Number, difference, interval
from moesteer.report.page import Page, source
from moesteer.report.routing_files import ROUTING, Routing
from moesteer.report.run_files import RESULTS, read_responses, responses_path

NAV = [
    ("summary", "Summary"), ("results", "Metrics"), ("suites", "Suites"), ("conversations", "Conversations"),
    ("routing", "Routing"), ("recompute", "Methods and sources"), ("gaps", "Not shown"),
]  # fmt: skip


def make(run: Path) -> Page:
    """The page of a run directory of `moesteer evaluate --out`. Raises FileError."""
    results, plan = read_evaluation(run), read_plan(run)
    steered = next((name for name in results.methods if name != "none"), None)
    routing, routed = conversations_shown.routing(run)
    names = ["none", *([steered] if steered is not None else [])]
    rows = {name: read_responses(run, name, split=None) for name in names}
    missing = [responses_path(name) for name, found in rows.items() if found is None]
    after = rows[steered] if steered is not None else None
    conversations = conversations_shown.side_by_side(rows["none"], after, missing=missing, kind="conversation")
    context = {
        "nav": NAV,
        "results": results,
        "steered": steered,
        "title": _title(results, plan),
        "model": str(plan.get("model", "the model")),
        "is_lab": str(plan.get("model", "")).startswith("lab"),
        "outcome": _outcome(results, steered, plan),
        "rows": [_row(results, name, steered) for name in results.methods["none"].metrics],
        "suites": _suites(results, steered),
        "conversations": conversations,
        "routing": routing,
        "plan": [(name, _text(value)) for name, value in sorted(plan.items()) if name != "scenario"],
        "sources": [source(run, name) for name in (RESULTS, RUN, ROUTING, *map(responses_path, names))],
    }
    return page.make(
        "evaluate.html.j2",
        kind="evaluate",
        context=context,
        figures=page.draw(_figures(results, steered, routed)),
        gaps=_gaps(plan, steered, missing, routing),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _title(results: EvaluateResults, plan: Mapping[str, Any]) -> str:
    scenario = plan.get("scenario")
    title = scenario.get("title") if isinstance(scenario, dict) else None
    return str(title or results.scenario)


def _target(results: EvaluateResults, plan: Mapping[str, Any]) -> str | None:
    """The metric to speak of first: the target suite's, where run.json says which that is; else the first."""
    scenario = plan.get("scenario")
    suites = scenario.get("suites") if isinstance(scenario, dict) else None
    for suite in suites if isinstance(suites, list) else []:
        metrics = suite.get("metrics") if isinstance(suite, dict) and suite.get("role") == "target" else None
        if isinstance(metrics, list) and metrics and metrics[0] in results.methods["none"].metrics:
            return str(metrics[0])
    return next(iter(results.methods["none"].metrics), None)


def _outcome(results: EvaluateResults, steered: str | None, plan: Mapping[str, Any]) -> list[str | Number]:
    metric = _target(results, plan)
    if metric is None:
        return ["Nothing was measured."]
    before = results.methods["none"].metrics[metric]
    said: list[str | Number] = [f"{wording.metric_name(metric).capitalize()}: ", wording.rate(metric, "none", before)]
    after = results.methods[steered].metrics.get(metric) if steered is not None else None
    if steered is None or after is None:
        return [*said, " for the model as it is, on the ", results.split, " split; no mask was applied."]
    gap = results.methods[steered].vs_none.get(metric)
    words = {"same": "does not measurably change it", "better": "makes it better", "worse": "makes it worse"}
    effect = wording.verdict(metric, gap)
    said += [" without the mask, ", wording.rate(metric, steered, after), f" with it, on the {results.split} split"]
    return [*said, f": the mask {words[effect]}."]


def _row(results: EvaluateResults, metric: str, steered: str | None) -> dict[str, Any]:
    after = results.methods[steered] if steered is not None else None
    return {
        "metric": metric,
        "lower": metric in wording.LOWER_IS_BETTER,
        "before": interval(results.methods["none"].metrics[metric], "methods", "none", "metrics", metric),
        "after": interval(after.metrics[metric], "methods", steered or "", "metrics", metric)
        if after is not None and metric in after.metrics
        else None,
        "gap": None
        if after is None
        else difference(
            after.vs_none.get(metric), "methods", steered or "", "vs_none", metric,
            lower_is_better=metric in wording.LOWER_IS_BETTER,
        ),
    }  # fmt: skip


def _suites(results: EvaluateResults, steered: str | None) -> list[dict[str, Any]]:
    found: dict[str, Condition] = {name: results.methods[name] for name in ("none", steered) if name is not None}
    return [
        {
            "suite": suite,
            "metric": one.metric,
            "cells": [
                interval(condition.suites[suite], "methods", name, "suites", suite)
                if suite in condition.suites
                else None
                for name, condition in found.items()
            ],
        }
        for suite, one in results.methods["none"].suites.items()
    ]


def _figures(results: EvaluateResults, steered: str | None, routed: Routing | None) -> dict[str, Callable[[int], Any]]:
    makers: dict[str, Callable[[int], Any]] = {"figure-metrics": lambda width: _metrics(results.methods, width)}
    return makers | routing_figure.makers(routed)


def _metrics(methods: Mapping[str, Condition], width_px: int) -> dict[str, Any] | None:
    """Every metric as a dot for each condition, with its interval."""
    names = list(methods["none"].metrics)
    if not names:
        return None
    longest = 16 if width_px < NARROW_PX else 40
    looks = (("@ink", "diamond"), ("@blue", "circle"), ("@orange", "square"))
    series = [
        Dots(method, [found.metrics.get(name) for name in names], *looks[number % len(looks)])
        for number, (method, found) in enumerate(methods.items())
    ]
    return dot_rows([label(wording.metric_name(name), longest=longest) for name in names], series)


def _gaps(plan: Mapping[str, Any], steered: str | None, missing: list[str], routing: Mapping[str, Any]) -> list[str]:
    found = []
    if not plan:
        found.append(f"Model, masks and settings: {RUN} is missing.")
    if steered is None:
        found.append("A comparison: the evaluation was given no mask (--mask).")
    else:
        found.append("The mask itself: an evaluation keeps its SHA-256, not the file; see `moesteer mask show`.")
    found += [f"Conversations: {path} is missing." for path in missing]
    if steered is not None and routing["missing"]:
        found.append(str(routing["missing"]))
    return found

"""The figures, as plain plotly JSON: trade-off, mask and tactics. Nothing here reads a file.

Every figure is made for a width in pixels, so that labels can be placed without overlapping. Colours that
depend on the theme are written `@ink`, `@muted`, `@grid`, `@zero`, and are filled in by report.js from the
page's own style sheet. Text from outside goes through `label`, since plotly reads a little HTML in its texts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moesteer.report.labels import place_labels, point_label
from moesteer.report.numbers import percent
from moesteer.report.run_files import Interval, MaskFile, Point, Results
from moesteer.report.wording import LOWER_IS_BETTER, metric_name, printable, unseen_tactics

Figure = dict[str, Any]

METHOD_COLOURS = {
    "none": "@ink",
    "none-again": "@muted",
    "random": "@muted",
    "risk-difference": "@green",
    "masc-published": "@orange",
    "masc": "@purple",
    "direct": "@blue",
}
METHOD_SYMBOLS = {
    "none": "diamond",
    "none-again": "diamond-open",
    "random": "x",
    "risk-difference": "square",
    "masc-published": "triangle-up",
    "masc": "triangle-down",
    "direct": "circle",
}
OTHER_COLOURS = ("@pink", "@teal", "@olive", "@rust")
NARROW_PX = 560
"""Below this a figure is laid out for a telephone (report.js has the same number)."""

LABEL_ROOM_PX = {"wide": 112, "narrow": 78}
"""Free space at the right of the trade-off, since the best points crowd there."""

DIVERGING = [[0.0, "@cold"], [0.25, "@cold-mid"], [0.5, "@zero"], [0.75, "@warm-mid"], [1.0, "@warm"]]
"""Blue for pushed away, orange for drawn in; told apart in all common kinds of colour blindness."""


def label(text: str, *, longest: int = 60) -> str:
    """Text that plotly shows letter by letter: no markup, one line, not too long."""
    line = " ".join(printable(text).split())
    return html.escape(line if len(line) <= longest else line[: longest - 1] + "…", quote=False)


def colour(name: str, names: Iterable[str]) -> str:
    """A method's colour: its own, or one of a fixed row by its place among the unknown names."""
    base = name.partition("+")[0]
    if base in METHOD_COLOURS:
        return METHOD_COLOURS[base]
    unknown = sorted(other for other in set(names) if other.partition("+")[0] not in METHOD_COLOURS)
    return OTHER_COLOURS[unknown.index(name) % len(OTHER_COLOURS)] if name in unknown else OTHER_COLOURS[0]


def ticks(low: float, high: float) -> list[float]:
    """Between three and seven round values within [low, high] and [0, 1], inclusive."""
    span = max(high - low, 1e-9)
    step = next(
        (size for size in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if span / size <= 6.5), 0.2
    )  # fmt: skip
    first, last = math.ceil(max(low, 0.0) / step - 1e-9), math.floor(min(high, 1.0) / step + 1e-9)
    return [round(index * step, 6) for index in range(first, last + 1)]


def _range(values: list[float], *, room: float = 0.08) -> list[float]:
    """Limits of an axis; `room` is the share of the data's span that is left free above, for labels."""
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), 0.015)
    return [low - pad, high + max(pad, room * (high - low + pad))]


def share_axis(title: str, span: list[float], *, sparse: bool = False) -> Figure:
    """An axis of shares, in per cent, with round ticks. sparse: every other one."""
    at = ticks(*span)
    at = at[::-2][::-1] if sparse and len(at) > 4 else at
    return {
        "title": {"text": title, "font": {"size": 12}, "standoff": 8},
        "range": span,
        "tickvals": at,
        "ticktext": [f"{round(100 * value, 1):g} %" for value in at],
        "gridcolor": "@grid",
        "tickangle": 0,
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
    }


def layout(height: int, **more: Any) -> Figure:
    """What every figure has in common. more: the rest of plotly's layout."""
    return {
        "height": height,
        "margin": {"l": 60, "r": 16, "t": 16, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@ink", "size": 12, "family": "system-ui, sans-serif"},
        "hoverlabel": {"bgcolor": "@paper", "bordercolor": "@muted", "font": {"color": "@ink"}},
        "hovermode": "closest",
        "dragmode": False,
        **more,
    }


def trade_off_axis(results: Results) -> str | None:
    """The metric of the x axis: benign accuracy, else the first protected one; None when no point has both."""
    target = results.scenario.target_metric
    for metric in ["benign_accuracy", *(protect.metric for protect in results.scenario.protect)]:
        if metric != target and any(_place(point, metric, target) for point in results.trade_off):
            return metric
    return None


def _place(point: Point, x_metric: str, y_metric: str) -> tuple[float, float] | None:
    x, y = point.metrics.get(x_metric), point.metrics.get(y_metric)
    return None if x is None or y is None else (x, y)


def trade_off(results: Results, *, width_px: int) -> Figure | None:
    """Target metric against the protected one on the select split: a point per setting that was tried."""
    x_metric, y_metric = trade_off_axis(results), results.scenario.target_metric
    if x_metric is None:
        return None
    placed = [(point, place) for point in results.trade_off if (place := _place(point, x_metric, y_metric))]
    names = list(dict.fromkeys(point.method for point, _ in placed))
    limit = protect_line(results, x_metric)
    narrow, inner_px = width_px < NARROW_PX, width_px - 90
    room_px = LABEL_ROOM_PX["narrow" if narrow else "wide"]
    room = room_px / (inner_px - room_px)
    across = [x for _, (x, _) in placed] + ([limit] if limit is not None else [])
    spans = _range(across, room=room), _range([y for _, (_, y) in placed])
    height = 440 if narrow else 460
    texts = {
        id(point): "none" if point.method == "none" else point_label(point, short=narrow)
        for point, _ in placed
        if not narrow or point.chosen or point.method == "none"
    }
    positions = place_labels(texts, placed, spans, limit=limit, width_px=inner_px, height_px=height - 130)
    traces = [_alpha_lines([item for item in placed if item[0].method == name], colour(name, names)) for name in names]
    traces += [
        _method_trace(name, [item for item in placed if item[0].method == name], texts, positions, colour(name, names))
        for name in names
    ]
    chosen = [place for point, place in placed if point.chosen]
    if chosen:
        traces.append(_rings(chosen))
    laid = layout(
        height,
        xaxis=share_axis(f"{label(metric_name(x_metric))} (select split)", spans[0], sparse=narrow),
        yaxis=share_axis(label(metric_name(y_metric)), spans[1]),
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        shapes=[_limit_line(limit)] if limit is not None else [],
        annotations=[_limit_label(limit)] if limit is not None else [],
    )
    return {"data": traces, "layout": laid}


def _alpha_lines(items: list[tuple[Point, tuple[float, float]]], tint: str) -> Figure:
    """One mask at growing alpha is one line; settings of different size are not joined."""
    by_size: dict[int | None, list[tuple[float, float, float]]] = {}
    for point, (x, y) in items:
        if point.alpha is not None:
            by_size.setdefault(point.experts, []).append((point.alpha, x, y))
    steps = [(x, y) for group in by_size.values() for _, x, y in [*sorted(group), (0.0, None, None)]]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in steps],
        "y": [y for _, y in steps],
        "showlegend": False,
        "hoverinfo": "skip",
        "line": {"width": 1, "color": tint, "dash": "dot"},
    }


def _method_trace(
    name: str, items: list[tuple[Point, Any]], texts: dict[int, str], positions: dict[int, str], tint: str
) -> Figure:  # fmt: skip
    marked = name.partition("+")[0] == "none"
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": label(name, longest=24),
        "x": [x for _, (x, _) in items],
        "y": [y for _, (_, y) in items],
        "text": [label(texts[id(point)]) if id(point) in positions else "" for point, _ in items],
        "textposition": [positions.get(id(point), "top center") for point, _ in items],
        "textfont": {"size": 11, "color": tint},
        "hovertext": [_hover(point, place) for point, place in items],
        "hoverinfo": "text",
        "cliponaxis": False,
        "marker": {
            "size": 13 if marked else 10,
            "color": tint,
            "symbol": METHOD_SYMBOLS.get(name.partition("+")[0], "hexagon"),
            "line": {"width": 0},
            "opacity": [0.5 if point.feasible is False else 1.0 for point, _ in items],
        },
    }


def _hover(point: Point, place: tuple[float, float]) -> str:
    state = ", outside the protect margins" if point.feasible is False else ""
    state += ", chosen" if point.chosen else ""
    experts = "" if point.experts is None else f", {point.experts} experts"
    alpha = "" if point.alpha is None else f", alpha {point.alpha:g}"
    return f"{label(point.method)}{alpha}{experts}{state}<br>target {percent(place[1])}, protected {percent(place[0])}"


def _rings(chosen: list[tuple[float, float]]) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "chosen",
        "x": [x for x, _ in chosen],
        "y": [y for _, y in chosen],
        "hoverinfo": "skip",
        "cliponaxis": False,
        "marker": {"size": 19, "symbol": "circle-open", "color": "@ink", "line": {"width": 2, "color": "@ink"}},
    }


def protect_line(results: Results, metric: str) -> float | None:
    """The worst value of `metric` that its margin allows: that of `none` (select, else test) less the margin."""
    margin = results.scenario.margins().get(metric)
    selected = [point.metrics.get(metric) for point in results.trade_off if point.method == "none"]
    tested = results.methods["none"].metrics.get(metric)
    base = next((value for value in selected if value is not None), tested.value if tested else None)
    if margin is None or base is None:
        return None
    return base + margin if metric in LOWER_IS_BETTER else base - margin


def _limit_line(x: float) -> Figure:
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": "@bad", "width": 1.5, "dash": "dash"},
    }


def _limit_label(x: float) -> Figure:
    return {
        "text": "protect margin",
        "x": x,
        "y": 0.01,
        "yref": "paper",
        "xanchor": "right",
        "yanchor": "bottom",
        "textangle": -90,
        "showarrow": False,
        "font": {"size": 11, "color": "@bad"},
    }


def heat_map(mask: MaskFile, *, width_px: int) -> Figure:
    """The mask, layers by experts: colours centred at zero, decoder layer ids down, expert ids across."""
    values = mask.values_LE
    bound = 1.0 if mask.kind == "force" else float(max(abs(values.min()), abs(values.max()), 1e-6))
    layers = [str(layer) for layer in mask.layer_ids]
    states = {-1: "forced off", 0: "untouched", 1: "forced on"}
    hover = [
        [
            f"layer {layer}, expert {expert}<br>"
            + (states.get(int(value), f"{value:g}") if mask.kind == "force" else f"{value:+.3f} sigma")
            for expert, value in enumerate(row)
        ]
        for layer, row in zip(layers, values, strict=True)
    ]
    bar: Figure = {"thickness": 10, "len": 1, "outlinewidth": 0}
    if width_px < NARROW_PX:
        bar |= {"orientation": "h", "y": 1.02, "yanchor": "bottom", "thickness": 8}
    if mask.kind == "force":
        bar |= {"tickvals": [-1, 0, 1], "ticktext": ["off", "untouched", "on"]}
    else:
        bar["title"] = {"text": "sigma", "font": {"size": 11}}
    trace = {
        "type": "heatmap",
        "z": [[round(float(value), 6) for value in row] for row in values],
        "x": list(range(values.shape[1])),
        "y": layers,
        "zmin": -bound,
        "zmax": bound,
        "colorscale": DIVERGING,
        "colorbar": bar,
        "text": hover,
        "hoverinfo": "text",
        "xgap": 1 if values.shape[1] <= 64 else 0,
        "ygap": 1 if values.shape[0] <= 48 else 0,
    }
    height = min(760, 130 + max(14, min(34, 420 // len(layers))) * len(layers))
    plain = {"showgrid": False, "zeroline": False, "fixedrange": True, "automargin": True}
    laid = layout(
        height,
        xaxis={**plain, "title": {"text": "expert", "font": {"size": 12}}, "tickformat": "d"},
        yaxis={**plain, "title": {"text": "decoder layer"}, "type": "category", "autorange": "reversed"},
    )
    return {"data": [trace], "layout": laid}


def by_tactic(results: Results, *, name: str, width_px: int) -> Figure | None:
    """The target metric by attack tactic, unsteered and steered, with 95 % intervals. None when not recorded."""
    target = results.scenario.target_metric
    before, after = (results.methods[method].by_tactic.get(target, {}) for method in ("none", name))
    tactics = sorted(before.keys() | after.keys())
    if not tactics:
        return None
    unseen = set(unseen_tactics(results, tactics))
    names = list(results.methods)
    series = [
        Dots("none", [before.get(tactic) for tactic in tactics], "@ink", METHOD_SYMBOLS["none"]),
        Dots(name, [after.get(tactic) for tactic in tactics], colour(name, names),
             METHOD_SYMBOLS.get(name.partition("+")[0], "hexagon")),
    ]  # fmt: skip
    longest = 14 if width_px < NARROW_PX else 32
    rows = [label(tactic, longest=longest) + (" *" if tactic in unseen else "") for tactic in tactics]
    return dot_rows(rows, series, x_title=f"{label(metric_name(target))} (test split)")


@dataclass(frozen=True)
class Dots:
    """A rate for each row, in one colour; None where there is none."""

    name: str
    intervals: Sequence[Interval | None]
    tint: str
    symbol: str


def dot_rows(rows: Sequence[str], series: Sequence[Dots], *, x_title: str = "") -> Figure:
    """Rates with their intervals, one row below the other, each series a little lower. rows: labels for plotly."""
    axis = share_axis(x_title, [-0.03, 1.03])
    laid = layout(
        120 + 46 * len(rows) if len(rows) < 12 else 120 + 30 * len(rows),
        xaxis=axis,
        yaxis={
            "tickvals": list(range(len(rows))),
            "ticktext": list(rows),
            "range": [len(rows) - 0.5, -0.5],
            "gridcolor": "rgba(0,0,0,0)",
            "zeroline": False,
            "fixedrange": True,
            "automargin": True,
        },
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    step = 0.28
    shifts = [(number - (len(series) - 1) / 2) * step for number in range(len(series))]
    return {"data": [_dots(one, shift) for one, shift in zip(series, shifts, strict=True)], "layout": laid}


def _dots(dots: Dots, shift: float) -> Figure:
    rows = [
        (row + shift, found, found.value, found.value if found.low is None else found.low,
         found.value if found.high is None else found.high)
        for row, found in enumerate(dots.intervals)
        if found is not None and found.value is not None
    ]  # fmt: skip
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(dots.name, longest=30),
        "x": [value for _, _, value, _, _ in rows],
        "y": [row for row, *_ in rows],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [high - value for _, _, value, _, high in rows],
            "arrayminus": [value - low for _, _, value, low, _ in rows],
            "color": dots.tint,
            "thickness": 1.5,
            "width": 4,
        },
        "hovertext": [
            f"{label(dots.name)}: {percent(found.value)} [{percent(found.low)}, {percent(found.high)}], n = {found.n}"
            + (f", {found.unscored} unscored" if found.unscored else "")
            for _, found, *_ in rows
        ],
        "hoverinfo": "text",
        "cliponaxis": False,
        "marker": {"size": 10, "color": dots.tint, "symbol": dots.symbol},
    }

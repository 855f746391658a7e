"""Curves over a number of experts: one or two panels of shares, with bands, on an axis that grows by doubling.

The axis has a place for 0 and then one step for every doubling, since sizes are 1, 2, 4, ... and the unchanged model
belongs on the same line. Text from outside goes through figures.label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moesteer.report.figures import NARROW_PX, label, layout
from moesteer.report.numbers import percent

Figure = dict[str, Any]
TITLE_PX, PLOT_PX, NARROW_PLOT_PX, AXIS_PX, LEGEND_ROW_PX = 36, 320, 230, 48, 22


@dataclass(frozen=True)
class At:
    """One point of a curve. hover: what is said beside its number, such as n."""

    n: float
    value: float | None
    low: float | None = None
    high: float | None = None
    hover: str = ""


@dataclass(frozen=True)
class Curve:
    """A line with an interval at each point (bars) or as a band. tint and fill: names of palette.py."""

    name: str
    points: Sequence[At]
    tint: str
    fill: str | None = None
    symbol: str = "circle"
    dash: str = "solid"
    legend: bool = True


@dataclass(frozen=True)
class Panel:
    """What is drawn in one pair of axes. mark: (n, words) of a dashed line across; chance: a curve of no skill."""

    title: str
    curves: Sequence[Curve]
    mark: tuple[float, str] | None = None


def place(n: float) -> float:
    """Where a number of experts is on the axis: 0 at 0, 1 at 1, 2 at 2, 3 at 4."""
    return 0.0 if n <= 0 else 1.0 + math.log2(max(n, 0.5))


def draw(panels: Sequence[Panel], *, sizes: Sequence[int], x_title: str, width_px: int) -> Figure:
    """One or two panels beside each other, below each other on a narrow page, and one legend. Values are shares.

    Everything is placed in pixels from the top, since plotly would let a long legend squeeze the plots.
    """
    narrow = width_px < NARROW_PX
    entries = sum(curve.legend for panel in panels for curve in panel.curves)
    bottom_px = AXIS_PX + LEGEND_ROW_PX * math.ceil(entries / (2 if narrow else 6)) + 12
    plot_px = NARROW_PLOT_PX if narrow else PLOT_PX
    below = narrow and len(panels) > 1
    inner_px = 2 * plot_px + AXIS_PX + TITLE_PX if below else plot_px
    traces: list[Figure] = []
    shapes: list[Figure] = []
    notes: list[Figure] = []
    axes: Figure = {}
    for number, panel in enumerate(panels):
        suffix = "" if number == 0 else str(number + 1)
        top_px = number * (inner_px - plot_px) if below else 0
        down = [1 - (top_px + plot_px) / inner_px, 1 - top_px / inner_px]
        across = [0.0, 1.0] if below or len(panels) == 1 else [[0.0, 0.46], [0.56, 1.0]][number]
        axes[f"xaxis{suffix}"] = _x_axis(sizes, x_title, across, anchor=f"y{suffix}", sparse=narrow)
        axes[f"yaxis{suffix}"] = _y_axis(down, anchor=f"x{suffix}")
        notes.append(_title(panel.title, across, down))
        for curve in panel.curves:
            traces += _traces(curve, suffix)
        if panel.mark is not None:
            shapes.append(_line(panel.mark[0], suffix))
            notes.append(_line_words(*panel.mark, suffix))
    legend = {"orientation": "h", "x": 0, "y": -AXIS_PX / inner_px, "yanchor": "top", "font": {"size": 11}}
    laid = layout(TITLE_PX + inner_px + bottom_px, **axes, shapes=shapes, annotations=notes, legend=legend)
    laid["margin"] = {"l": 56, "r": 16, "t": TITLE_PX, "b": bottom_px}
    return {"data": traces, "layout": laid}


def _x_axis(sizes: Sequence[int], title: str, domain: list[float], *, anchor: str, sparse: bool) -> Figure:
    shown = [0, *sizes]
    most = 7 if sparse else 12
    step = max(1, math.ceil(len(shown) / most))
    ticks = [*dict.fromkeys([0, *shown[1::step], shown[-1]])] if len(shown) > 1 else shown
    # the last size is said in any case, and what stands too near to it is not
    ticks = [n for n in ticks if n == shown[-1] or place(shown[-1]) - place(n) > (0.5 if sparse else 0.3)]
    return {
        "domain": domain,
        "anchor": anchor,
        "title": {"text": label(title), "font": {"size": 12}, "standoff": 6},
        "tickvals": [place(n) for n in ticks],
        "ticktext": [str(n) for n in ticks],
        "range": [-0.25, place(max(shown)) + 0.25],
        "gridcolor": "@grid",
        "zeroline": False,
        "fixedrange": True,
        "tickangle": 0,
    }


def _y_axis(domain: list[float], *, anchor: str) -> Figure:
    at = [0.0, 0.25, 0.5, 0.75, 1.0]
    return {
        "domain": domain,
        "anchor": anchor,
        "range": [-0.03, 1.04],
        "tickvals": at,
        "ticktext": [f"{round(100 * value)} %" for value in at],
        "gridcolor": "@grid",
        "zeroline": False,
        "fixedrange": True,
    }


def _title(text: str, across: list[float], down: list[float]) -> Figure:
    return {
        "text": f"<b>{label(text, longest=52)}</b>",
        "x": across[0],
        "y": down[1],
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "yshift": 6,
        "showarrow": False,
        "font": {"size": 13},
    }


def _traces(curve: Curve, suffix: str) -> list[Figure]:
    points = [point for point in curve.points if point.value is not None]
    axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    name = label(curve.name, longest=30)
    found: list[Figure] = []
    bounded = [point for point in points if point.low is not None and point.high is not None]
    if curve.fill is not None and len(bounded) > 1:
        found.append(
            {
                **axes,
                "type": "scatter",
                "mode": "lines",
                "x": [place(p.n) for p in bounded] + [place(p.n) for p in reversed(bounded)],
                "y": [p.high for p in bounded] + [p.low for p in reversed(bounded)],
                "fill": "toself",
                "fillcolor": curve.fill,
                "line": {"width": 0},
                "hoverinfo": "skip",
                "showlegend": False,
                "legendgroup": f"{name}{suffix}",
            }
        )
    line: Figure = {
        **axes,
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "legendgroup": f"{name}{suffix}",
        "showlegend": curve.legend,
        "x": [place(p.n) for p in points],
        "y": [p.value for p in points],
        "line": {"color": curve.tint, "width": 2, "dash": curve.dash},
        "marker": {"color": curve.tint, "size": 8, "symbol": curve.symbol},
        "hovertext": [_hover(curve.name, p) for p in points],
        "hoverinfo": "text",
        "cliponaxis": False,
    }
    if curve.fill is None and bounded:
        line["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [0.0 if p.high is None else max(0.0, p.high - (p.value or 0.0)) for p in points],
            "arrayminus": [0.0 if p.low is None else max(0.0, (p.value or 0.0) - p.low) for p in points],
            "color": curve.tint,
            "thickness": 1.2,
            "width": 3,
        }
    return [*found, line]


def _hover(name: str, point: At) -> str:
    between = "" if point.low is None else f" [{percent(point.low)}, {percent(point.high)}]"
    more = f"<br>{label(point.hover)}" if point.hover else ""
    return f"{label(name)}, {point.n:g} experts<br>{percent(point.value)}{between}{more}"


def _line(n: float, suffix: str) -> Figure:
    x = place(n)
    return {
        "type": "line", "x0": x, "x1": x, "xref": f"x{suffix}", "y0": 0, "y1": 1, "yref": f"y{suffix} domain",
        "line": {"color": "@bad", "width": 1.5, "dash": "dash"},
    }  # fmt: skip


def _line_words(n: float, words: str, suffix: str) -> Figure:
    return {
        "text": label(words), "x": place(n), "xref": f"x{suffix}", "y": 0.02, "yref": f"y{suffix} domain",
        "xanchor": "right", "yanchor": "bottom", "textangle": -90, "showarrow": False,
        "font": {"size": 11, "color": "@bad"},
    }  # fmt: skip

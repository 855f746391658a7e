"""The figures of an audit, as plain plotly JSON: silencing, experts, layers, ROC and transfer. Nothing reads a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moesteer.report.audit_files import (
    AuditResults,
    CurvePoint,
    Curves,
    Drawn,
    Expert,
    Experts,
    Monitoring,
    RandomPoint,
    Transfer,
)
from moesteer.report.curves import At, Curve, Panel, draw
from moesteer.report.figures import DIVERGING, METHOD_SYMBOLS, NARROW_PX, colour, label, layout
from moesteer.report.numbers import percent
from moesteer.report.run_files import Interval

Figure = dict[str, Any]
FINDER_COLOURS = {
    "risk-difference": "@green", "surrogate": "@purple", "causal": "@blue", "attribution": "@orange",
}  # fmt: skip
UTILITY_COLOURS = ("@teal", "@rust", "@olive", "@pink", "@ink")
MOST_BANDS = 2
"""With more utility suites their bands would hide each other; the table has them."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")
FDR = 0.05


def fdr(results: AuditResults) -> float:
    """The false discovery rate that a behaviour expert has to pass, as the audit records it."""
    given = results.thresholds.get("fdr", FDR)
    return float(given) if isinstance(given, int | float) else FDR


def curve_panels(results: AuditResults, curves: Curves, *, width_px: int, done: str) -> Figure | None:
    """The behaviour by number of experts, with the random draws' band; beside it utility with the first finder.

    done: what was done to the experts, such as "silenced". None where there is no curve.
    """
    if not any(curves.curves.values()):
        return None
    half = results.concentration.n50.value if done == "silenced" else None
    mark = None if half is None else (half, f"n50 = {half:.3g}")
    behaviour = Panel(
        f"{results.behaviour.name} ({results.behaviour.suite})",
        [*_random(curves.random, results.none.behaviour), *_finders(results, curves)],
        mark,
    )
    panels = [behaviour]
    utility = _utility(results, curves)
    if utility:
        panels.append(Panel("utility, with the same experts", utility))
    return draw(panels, sizes=curves.sizes, x_title=f"experts {done}", width_px=width_px)


def at(n: float, rate: Interval, hover: str = "") -> At:
    """A rate as a point."""
    return At(n, rate.value, rate.low, rate.high, hover or f"n = {rate.n}")


def _finders(results: AuditResults, curves: Curves) -> list[Curve]:
    start = at(0, results.none.behaviour, "the model as it is")
    names = list(curves.curves)
    return [
        Curve(
            name,
            [start, *(at(point.n, point.behaviour) for point in points)],
            FINDER_COLOURS.get(name) or colour(name, names),
            symbol=METHOD_SYMBOLS.get(name, SYMBOLS[number % len(SYMBOLS)]),
        )
        for number, (name, points) in enumerate(curves.curves.items())
    ]


def _random(drawn: Sequence[RandomPoint], none: Interval) -> list[Curve]:
    if not drawn:
        return []
    start = At(0, none.value, none.value, none.value, "the model as it is")
    points = [start, *(_drawn(point.n, point.behaviour, point.draws) for point in drawn)]
    return [Curve("random experts", points, "@muted", fill="@band-grey", symbol="x")]


def _drawn(n: int, found: Drawn, draws: int) -> At:
    return At(n, found.mean, found.low, found.high, f"{draws} draws")


def _utility(results: AuditResults, curves: Curves) -> list[Curve]:
    """Each utility suite with the chosen finder's experts, and with random ones (dotted, banded)."""
    points = curves.curves.get(results.finder) or next(iter(curves.curves.values()), [])
    found = []
    for number, one in enumerate(results.utility):
        tint, suite = UTILITY_COLOURS[number % len(UTILITY_COLOURS)], one.suite
        none = results.none.utility.get(suite)
        start = [] if none is None else [at(0, none, "the model as it is")]
        drawn = [_drawn(p.n, p.utility[suite], p.draws) for p in curves.random if suite in p.utility]
        if drawn:
            flat = [At(0, none.value, none.value, none.value)] if none is not None else []
            banded = "@band-grey" if len(results.utility) <= MOST_BANDS else None
            plain = [*flat, *drawn] if banded else [replace(point, low=None, high=None) for point in (*flat, *drawn)]
            found.append(Curve(f"{suite}, random", plain, tint, fill=banded, symbol="x", dash="dot", legend=False))
        mine = [at(p.n, p.utility[suite].rate) for p in points if suite in p.utility]
        if mine:
            found.append(Curve(suite, [*start, *mine], tint, symbol=SYMBOLS[(number + 1) % len(SYMBOLS)]))
    return found


def hardening(results: AuditResults, *, width_px: int) -> Figure | None:
    """The same silencing with the defence mask, and without it."""
    found = results.hardening
    if found is None or not found.curve:
        return None
    plain = results.silencing.curves.get(results.finder, [])
    start, hard = at(0, results.none.behaviour), at(0, found.none.behaviour)
    panel = Panel(
        f"{results.behaviour.name} ({results.behaviour.suite})",
        [
            Curve("without the mask", [start, *(at(p.n, p.behaviour) for p in plain)], "@muted", dash="dash"),
            Curve("with the mask", [hard, *(at(p.n, p.behaviour) for p in found.curve)], "@blue", symbol="square"),
        ],
    )
    return draw([panel], sizes=[p.n for p in found.curve], x_title="experts silenced", width_px=width_px)


def expert_map(results: AuditResults, experts: Experts, *, width_px: int) -> Figure | None:
    """Layers by experts: the difference in use between the two sides; dots pass the FDR, rings are the first n50."""
    values = {(row.layer, row.expert): row for row in experts.rows}
    grid = [[values.get((layer, expert)) for expert in range(experts.experts)] for layer in experts.layers]
    cells = [[_difference(row) for row in line] for line in grid]
    known = [abs(value) for line in cells for value in line if value is not None]
    if not known:
        return None
    bound = max(*known, 1e-6)
    layers = [str(layer) for layer in experts.layers]
    narrow = width_px < NARROW_PX
    bar: Figure = {"thickness": 10, "outlinewidth": 0, "tickformat": "+.0%"}
    if narrow:
        bar |= {"orientation": "h", "y": 1.02, "yanchor": "bottom", "thickness": 8}
    heat: Figure = {
        "type": "heatmap",
        "z": cells,
        "x": list(range(experts.experts)),
        "y": layers,
        "zmin": -bound,
        "zmax": bound,
        "colorscale": DIVERGING,
        "colorbar": bar,
        "text": [[_about(row) for row in line] for line in grid],
        "hoverinfo": "text",
        "xgap": 1 if experts.experts <= 64 else 0,
        "ygap": 1 if len(layers) <= 48 else 0,
        "showlegend": False,
    }
    passed = [(str(row.layer), row.expert) for row in experts.rows if row.q is not None and row.q <= fdr(results)]
    first = first_half(results)
    marks = [
        _marks(f"passes the FDR of {fdr(results):g}", passed, {"symbol": "circle", "size": 5, "color": "@ink"}),
        _marks(
            f"the first {len(first)} of the order: n50",
            [(str(layer), expert) for layer, expert in first],
            {"symbol": "square-open", "size": 15, "color": "@ink", "line": {"width": 2, "color": "@ink"}},
        ),
    ]
    height = min(820, 170 + max(14, min(34, 420 // len(layers))) * len(layers))
    plain = {"showgrid": False, "zeroline": False, "fixedrange": True, "automargin": True}
    laid = layout(
        height,
        xaxis={**plain, "title": {"text": "expert", "font": {"size": 12}}, "tickformat": "d"},
        yaxis={**plain, "title": {"text": "decoder layer"}, "type": "category", "autorange": "reversed"},
        legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
    )
    return {"data": [heat, *(mark for mark in marks if mark["x"])], "layout": laid}


def first_half(results: AuditResults) -> list[tuple[int, int]]:
    """The first n50 experts of the chosen finder, for the squares; none where they are more than a quarter of all."""
    half = results.concentration.n50
    if half.value is None or half.value > half.of / 4:
        return []
    return results.finders[results.finder].order[: math.ceil(half.value)]


def _difference(row: Expert | None) -> float | None:
    return None if row is None or row.difference is None else row.difference.value


def _marks(name: str, places: Sequence[tuple[str, int]], marker: Figure) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [expert for _, expert in places],
        "y": [layer for layer, _ in places],
        "marker": marker,
        "hoverinfo": "skip",
    }


def _about(row: Expert | None) -> str:
    """What a reader sees on hovering over an expert."""
    if row is None:
        return "not in experts.json"
    said = [f"layer {row.layer}, expert {row.expert}"]
    if row.difference is not None:
        low, high = row.difference.low, row.difference.high
        between = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
        value = row.difference.value
        said.append(f"difference {'—' if value is None else f'{100 * value:+.1f}'} points{between}")
    if row.shows is not None and row.lacks is not None:
        said.append(f"used where it shows {percent(row.shows.value)}, where it lacks {percent(row.lacks.value)}")
    said.append(f"usage {percent(row.usage)}, q = {'—' if row.q is None else f'{row.q:.3g}'}")
    if row.stable is not None:
        said.append(f"among the largest in {percent(row.stable)} of resamples")
    said += [f"rank {rank} by {label(name, longest=24)}" for name, rank in sorted(row.rank.items()) if rank is not None]
    return "<br>".join(said)


def by_layer(results: AuditResults, *, width_px: int) -> Figure | None:
    """Each layer's share of the positive risk difference, and the even share."""
    rows = [row for row in results.concentration.by_layer if row.share is not None]
    if not rows:
        return None
    even = 1 / len(results.concentration.by_layer)
    highest = max(*(row.share or 0.0 for row in rows), even)
    lowest = min(*(row.share or 0.0 for row in rows), 0.0)
    bars: Figure = {
        "type": "bar",
        "x": [str(row.layer) for row in rows],
        "y": [row.share for row in rows],
        "marker": {"color": "@blue"},
        "hovertext": [f"layer {row.layer}<br>{percent(row.share)} of the positive risk difference" for row in rows],
        "hoverinfo": "text",
    }
    laid = layout(
        320,
        xaxis={"title": {"text": "decoder layer", "font": {"size": 12}}, "type": "category", "fixedrange": True},
        yaxis={
            "range": [lowest * 1.15, highest * 1.15],
            "tickformat": ".0%",
            "gridcolor": "@grid",
            "zeroline": True,
            "zerolinecolor": "@muted",
            "fixedrange": True,
        },
        shapes=[
            {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": even, "y1": even,
             "line": {"color": "@muted", "width": 1.5, "dash": "dash"}}
        ],
        annotations=[
            {"text": "even", "x": 1, "xref": "paper", "y": even, "xanchor": "left", "yanchor": "middle",
             "showarrow": False, "font": {"size": 11, "color": "@muted"}}
        ],
    )  # fmt: skip
    laid["margin"] = {**laid["margin"], "r": 40}
    return {"data": [bars], "layout": laid}


def roc(found: Monitoring, *, width_px: int) -> Figure | None:
    """True against false positives of the probe, with the stated operating points."""
    if len(found.roc) < 2:
        return None
    area = f"AUROC {found.auroc.value:.3f}" if found.auroc.value is not None else "AUROC not measured"
    line: Figure = {
        "type": "scatter",
        "mode": "lines",
        "name": f"probe, {area}",
        "x": [x for x, _ in found.roc],
        "y": [y for _, y in found.roc],
        "line": {"color": "@blue", "width": 2, "shape": "hv"},
        "hovertext": [f"false positives {percent(x)}<br>true positives {percent(y)}" for x, y in found.roc],
        "hoverinfo": "text",
    }
    chance: Figure = {
        "type": "scatter", "mode": "lines", "name": "chance", "x": [0, 1], "y": [0, 1], "hoverinfo": "skip",
        "line": {"color": "@muted", "width": 1, "dash": "dot"},
    }  # fmt: skip
    points = [point for point in found.at if point.true_positives is not None]
    marks: Figure = {
        "type": "scatter",
        "mode": "markers",
        "name": "stated rates of false positives",
        "x": [point.false_positives for point in points],
        "y": [point.true_positives for point in points],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [0 if p.high is None else p.high - (p.true_positives or 0) for p in points],
            "arrayminus": [0 if p.low is None else (p.true_positives or 0) - p.low for p in points],
            "color": "@orange",
            "thickness": 1.5,
            "width": 4,
        },
        "marker": {"color": "@orange", "size": 9, "symbol": "square"},
        "hovertext": [
            f"{percent(p.true_positives)} [{percent(p.low)}, {percent(p.high)}] at {percent(p.false_positives)}"
            for p in points
        ],
        "hoverinfo": "text",
    }
    axis = {"range": [-0.02, 1.02], "tickformat": ".0%", "gridcolor": "@grid", "zeroline": False, "fixedrange": True}
    laid = layout(
        420,
        xaxis={**axis, "title": {"text": "false positives", "font": {"size": 12}}},
        yaxis={**axis, "title": {"text": "true positives", "font": {"size": 12}}, "automargin": True},
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
    )
    return {"data": [chance, line, *([marks] if points else [])], "layout": laid}


def transfer(results: AuditResults, found: Transfer, *, width_px: int) -> Figure | None:
    """The overlap of the first experts, and what silencing the old and the own experts does in the other model."""
    panels = []
    if found.overlap:
        shared = [At(o.n, o.shared, o.low, o.high) for o in found.overlap]
        chance = [At(o.n, o.chance) for o in found.overlap]
        panels.append(
            Panel(
                "share of the first experts in common",
                [Curve("in common", shared, "@blue"), Curve("by chance", chance, "@muted", dash="dot", symbol="x")],
            )
        )
    if found.none is not None and (found.old or found.own):
        start = at(0, found.none.behaviour, "the other model as it is")
        sides: Mapping[str, tuple[list[CurvePoint], str, str]] = {
            "the audited model's experts": (found.old, "@orange", "square"),
            "its own experts": (found.own, "@teal", "diamond"),
        }
        panels.append(
            Panel(
                f"{results.behaviour.name} in the other model",
                [
                    Curve(name, [start, *(at(p.n, p.behaviour) for p in points)], tint, symbol=symbol)
                    for name, (points, tint, symbol) in sides.items()
                    if points
                ],
            )
        )
    if not panels:
        return None
    sizes = sorted({o.n for o in found.overlap} | {p.n for p in [*found.old, *found.own]})
    return draw(panels, sizes=sizes, x_title="experts", width_px=width_px)


def scatter(results: AuditResults, experts: Experts | None, found: Transfer, *, width_px: int) -> Figure | None:
    """Every expert's difference in the audited model and in the other; None where either is not recorded."""
    if experts is None or found.difference_LE is None:
        return None
    here = {(row.layer, row.expert): _difference(row) for row in experts.rows}
    rows = [
        (layer, expert, x, y)
        for layer, line in zip(experts.layers, found.difference_LE, strict=False)
        for expert, y in enumerate(line)
        if y is not None and (x := here.get((layer, expert))) is not None
    ]
    if not rows:
        return None
    bound = 1.08 * max(max(abs(x), abs(y)) for _, _, x, y in rows) or 1.0
    dots: Figure = {
        "type": "scatter",
        "mode": "markers",
        "x": [x for _, _, x, _ in rows],
        "y": [y for _, _, _, y in rows],
        "marker": {"color": "@blue", "size": 7, "opacity": 0.75},
        "hovertext": [
            f"layer {layer}, expert {expert}<br>audited {100 * x:+.1f}, other {100 * y:+.1f} points"
            for layer, expert, x, y in rows
        ],
        "hoverinfo": "text",
        "showlegend": False,
    }
    axis = {"range": [-bound, bound], "tickformat": "+.0%", "gridcolor": "@grid", "zerolinecolor": "@muted",
            "fixedrange": True}  # fmt: skip
    laid = layout(
        420,
        xaxis={**axis, "title": {"text": "difference, audited model", "font": {"size": 12}}},
        yaxis={**axis, "title": {"text": "difference, other model", "font": {"size": 12}}, "automargin": True},
        shapes=[{"type": "line", "x0": -bound, "x1": bound, "y0": -bound, "y1": bound,
                 "line": {"color": "@muted", "width": 1, "dash": "dot"}}],
    )  # fmt: skip
    return {"data": [dots], "layout": laid}

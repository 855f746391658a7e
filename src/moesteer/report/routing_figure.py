"""The routing of one conversation: tokens by layers, the share of the selected experts that the mask exchanged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from moesteer.report.conversations_shown import box, exchanged
from moesteer.report.figures import NARROW_PX, label, layout
from moesteer.report.routing_files import Routing

Figure = dict[str, Any]
SHADES = [[0.0, "@zero"], [0.5, "@warm-mid"], [1.0, "@warm"]]
TOKEN_PX = 15
"""What a token's label needs."""


def makers(found: Routing | None) -> dict[str, Callable[[int], Figure]]:
    """For page.draw: a figure of each text; none where no routing was kept."""
    return (
        {} if found is None else {box(number): partial(_of_width, found, number) for number in range(len(found.texts))}
    )


def _of_width(found: Routing, number: int, width_px: int) -> Figure:
    return routing(found, number, width_px=width_px)


def routing(found: Routing, number: int, *, width_px: int) -> Figure:
    """One text of the file. Tokens run across, and down on a narrow page."""
    text, narrow = found.texts[number], width_px < NARROW_PX
    changes = exchanged(text)
    names = [label(token.text, longest=14) or "␠" for token in text.tokens]
    share_TL = [[len(out) / found.top_k for out, _ in layers] for layers in changes]
    hover_TL = [
        [
            f"{names[t]} ({token.part}), layer {found.layers[i]}<br>without: {_list(text.before[t][i])}"
            f"<br>with: {_list(text.after[t][i])}<br>out: {_list(out)}; in: {_list(taken)}"
            for i, (out, taken) in enumerate(changes[t])
        ]
        for t, token in enumerate(text.tokens)
    ]
    layers = [str(layer) for layer in found.layers]
    tokens = list(range(len(names)))
    marks = {"tickvals": tokens, "ticktext": names, "tickfont": {"size": 10}}
    plain = {"showgrid": False, "zeroline": False, "fixedrange": True, "automargin": True}
    split = sum(token.part == "prompt" for token in text.tokens) - 0.5
    bar: Figure = {"thickness": 10, "outlinewidth": 0, "tickformat": ".0%"}
    if narrow:
        bar |= {"orientation": "h", "y": 1.02, "yanchor": "bottom", "thickness": 8}
    trace: Figure = {
        "type": "heatmap",
        "z": share_TL if narrow else _turned(share_TL),
        "x": layers if narrow else tokens,
        "y": tokens if narrow else layers,
        "text": hover_TL if narrow else _turned(hover_TL),
        "hoverinfo": "text",
        "zmin": 0,
        "zmax": 1,
        "colorscale": SHADES,
        "colorbar": bar,
        "xgap": 1,
        "ygap": 1,
    }
    line: Figure = {"type": "line", "line": {"color": "@ink", "width": 1.5, "dash": "dash"}}
    line |= (
        {"y0": split, "y1": split, "x0": 0, "x1": 1, "xref": "paper"}
        if narrow
        else {"x0": split, "x1": split, "y0": 0, "y1": 1, "yref": "paper"}
    )
    by_layer = {**plain, "title": {"text": "decoder layer", "font": {"size": 12}}, "type": "category"}
    by_token = {**plain, **marks, "tickangle": 0 if narrow else -90}
    height = 130 + TOKEN_PX * len(names) if narrow else 190 + max(14, min(30, 420 // len(layers))) * len(layers)
    return {
        "data": [trace],
        "layout": layout(
            height,
            xaxis=by_layer if narrow else by_token,
            yaxis={**(by_token if narrow else by_layer), "autorange": "reversed"},
            shapes=[line],
        ),
    }


def _turned(rows: list[list[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _list(experts: list[int]) -> str:
    return ", ".join(map(str, experts)) if experts else "none"

"""Routing drawn: how often each expert is chosen, without and with the masks, and what changes token by token.

Figures are plotly's plain JSON. They are drawn on no ground of their own and in colours that can be told from a white
page and from a black one, so that they fit both themes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer.report.figures import label

Figure = dict[str, Any]
INK = "#7c8594"
"""Lines; texts take the theme's colour from the style sheet (markup.RULES)."""
COLD, WARM, EVEN = "#3a7de0", "#e0702f", "rgba(124,133,148,0.18)"
MOST_TOKENS = 300
"""More are not drawn: the last so many are."""


@dataclass(frozen=True)
class Routing:
    """The experts chosen for T tokens: the last question's from its first word, then the answer's.

    without_TLK, with_TLK: expert ids; with_TLK is None where no mask was chosen. asked: how many of the tokens come
    before the answer. gates_shut: masks whose gate kept them from acting.
    """

    layer_ids: tuple[int, ...]
    experts: int
    tokens: tuple[str, ...]
    asked: int
    without_TLK: NDArray[Any]
    with_TLK: NDArray[Any] | None
    gates_shut: int = 0

    def changed_TL(self) -> NDArray[np.int64]:
        """How many of the chosen experts the masks replaced, per token and layer; zeros without masks."""
        plain = self.without_TLK
        if self.with_TLK is None:
            return np.zeros(plain.shape[:2], dtype=np.int64)
        kept = (plain[..., :, None] == self.with_TLK[..., None, :]).any(-1).sum(-1)
        return np.asarray(plain.shape[2] - kept, dtype=np.int64)


def usage_LE(chosen_TLK: NDArray[Any], *, experts: int) -> NDArray[np.float64]:
    """Share of the tokens that go to each expert: [L, E], each row adding up to K."""
    tokens, layers, _ = chosen_TLK.shape
    counts = np.zeros((layers, experts))
    for layer in range(layers):
        counts[layer] = np.bincount(chosen_TLK[:, layer].ravel().astype(np.int64), minlength=experts)
    shares: NDArray[np.float64] = counts / max(1, tokens)
    return shares


def usage_figure(routing: Routing, *, steered: bool) -> Figure | None:
    """Layers by experts: the share of tokens that go there. None of what there is not."""
    chosen = routing.with_TLK if steered else routing.without_TLK
    if chosen is None:
        return None
    shares = usage_LE(chosen, experts=routing.experts)
    return _heat(
        shares,
        routing,
        hover=lambda layer, expert, x: f"layer {layer}, expert {expert}<br>{100 * x:.0f} % of the tokens",
        scale=[[0.0, EVEN], [1.0, COLD]],
        low=0.0,
        high=1.0,
        title="share",
    )


def difference_figure(routing: Routing) -> Figure | None:
    """Layers by experts: how many points more or fewer of the tokens go there with the masks. None without masks."""
    if routing.with_TLK is None:
        return None
    gap = usage_LE(routing.with_TLK, experts=routing.experts) - usage_LE(routing.without_TLK, experts=routing.experts)
    return _heat(
        gap,
        routing,
        hover=lambda layer, expert, x: f"layer {layer}, expert {expert}<br>{100 * x:+.0f} points with the masks",
        scale=[[0.0, COLD], [0.5, EVEN], [1.0, WARM]],
        low=-1.0,
        high=1.0,
        title="change",
    )


def _heat(
    values_LE: NDArray[np.float64],
    routing: Routing,
    *,
    hover: Callable[[str, int, float], str],
    scale: list[Any],
    low: float,
    high: float,
    title: str,
) -> Figure:
    layers = [str(layer) for layer in routing.layer_ids]
    texts = [
        [hover(layer, expert, value) for expert, value in enumerate(row)]
        for layer, row in zip(layers, values_LE.tolist(), strict=True)
    ]
    trace = {
        "type": "heatmap", "z": [[round(x, 4) for x in row] for row in values_LE.tolist()],
        "x": list(range(routing.experts)), "y": layers, "text": texts, "hoverinfo": "text",
        "zmin": low, "zmax": high, "colorscale": scale, "colorbar": _bar(title, percent=True),
        "xgap": 1 if routing.experts <= 64 else 0, "ygap": 1 if len(layers) <= 48 else 0,
    }  # fmt: skip
    return {"data": [trace], "layout": _layout(len(layers), x_title="expert", x={"tickformat": "d"})}


def tokens_figure(routing: Routing) -> Figure:
    """Layers by tokens: how many of the chosen experts the masks replaced; hover names them."""
    changed_TL = routing.changed_TL()
    shown = range(max(0, len(routing.tokens) - MOST_TOKENS), len(routing.tokens))
    layers = [str(layer) for layer in routing.layer_ids]
    names = [f"{place + 1}: {label(routing.tokens[place], longest=24) or 'space'}" for place in shown]
    texts = [
        [_token_hover(routing, place, row, names[n]) for n, place in enumerate(shown)] for row in range(len(layers))
    ]
    trace = {
        "type": "heatmap", "z": changed_TL[shown.start :].T.tolist(), "x": list(shown), "y": layers,
        "text": texts, "hoverinfo": "text", "zmin": 0, "zmax": int(routing.without_TLK.shape[2]),
        "colorscale": [[0.0, EVEN], [1.0, WARM]], "colorbar": _bar("replaced", percent=False), "ygap": 1,
        "xgap": 1 if len(shown) <= 120 else 0,
    }  # fmt: skip
    every = max(1, len(shown) // 40)
    ticks = [place for place in shown if (place - shown.start) % every == 0]
    axis: Figure = {
        "tickvals": ticks,
        "ticktext": [label(routing.tokens[place], longest=12) for place in ticks],
        "tickangle": -60,
    }
    layout = _layout(len(layers), x_title="", x=axis)
    if shown.start < routing.asked < shown.stop:
        where = routing.asked - 0.5
        layout["shapes"] = [
            {"type": "line", "x0": where, "x1": where, "y0": 0, "y1": 1, "yref": "paper",
             "line": {"color": INK, "width": 2, "dash": "dot"}}
        ]  # fmt: skip
    return {"data": [trace], "layout": layout}


def _token_hover(routing: Routing, place: int, row: int, name: str) -> str:
    without = _ids(routing.without_TLK[place, row])
    text = f"{name}<br>layer {routing.layer_ids[row]}: experts {without}"
    return text if routing.with_TLK is None else f"{text}<br>with the masks: {_ids(routing.with_TLK[place, row])}"


def _ids(chosen_K: NDArray[Any]) -> str:
    return ", ".join(str(expert) for expert in sorted(chosen_K.tolist()))


def tokens_table(routing: Routing) -> list[tuple[str, str, int, str]]:
    """(token, of question or answer, experts replaced in all layers, layers in which) of every drawn token."""
    changed_TL = routing.changed_TL()
    rows = []
    for place in range(max(0, len(routing.tokens) - MOST_TOKENS), len(routing.tokens)):
        where = [str(layer) for layer, n in zip(routing.layer_ids, changed_TL[place], strict=True) if n]
        part = "question" if place < routing.asked else "answer"
        rows.append((routing.tokens[place], part, int(changed_TL[place].sum()), ", ".join(where)))
    return rows


def summary(routing: Routing) -> str:
    """What the masks changed, in a sentence."""
    tokens, layers, top_k = routing.without_TLK.shape
    read = f"{tokens} tokens in {layers} layers, {top_k} of {routing.experts} experts each"
    if routing.with_TLK is None:
        return f"{read}. No mask was chosen for this answer."
    changed_TL = routing.changed_TL()
    shut = f" {routing.gates_shut} masks kept from acting by their gates." if routing.gates_shut else ""
    return (
        f"{read}. With the masks, {100 * float((changed_TL > 0).mean()):.1f} % of the selections differ, and "
        f"{100 * float(changed_TL.sum()) / (tokens * layers * top_k):.1f} % of the chosen experts are others.{shut}"
    )


def _bar(title: str, *, percent: bool) -> Figure:
    bar: Figure = {
        "thickness": 10, "outlinewidth": 0, "title": {"text": title, "font": {"size": 11}}, "tickfont": {"size": 10},
    }  # fmt: skip
    return {**bar, "tickformat": ".0%"} if percent else {**bar, "dtick": 1}


def _layout(layers: int, *, x_title: str, x: Figure) -> Figure:
    plain = {"showgrid": False, "zeroline": False, "fixedrange": True, "automargin": True}
    return {
        "height": min(760, 150 + max(12, min(28, 420 // layers)) * layers),
        "margin": {"l": 48, "r": 8, "t": 36, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "size": 12, "family": "system-ui, sans-serif"},
        "dragmode": False,
        "hoverlabel": {"bgcolor": "#15181c", "bordercolor": INK, "font": {"color": "#e8eaee"}},
        "xaxis": {**plain, "title": {"text": x_title}, **x},
        "yaxis": {**plain, "title": {"text": "decoder layer"}, "type": "category", "autorange": "reversed"},
    }

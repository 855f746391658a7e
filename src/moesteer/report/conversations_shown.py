"""Conversations before and after, and the routing of one: what several pages have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesteer.report import examples, word_diff
from moesteer.report.examples import Pair
from moesteer.report.routing_files import ROUTING, Routed, Routing, read_routing
from moesteer.report.run_files import Response


def side_by_side(
    before: Sequence[Response] | None, after: Sequence[Response] | None, *, missing: Sequence[str], kind: str
) -> dict[str, Any]:
    """For the macro `conversations`: the chosen pairs with their differences marked, and all changes counted.

    missing: files that are not there. kind: what the conversations are called, such as "test conversation".
    """
    if before is None or after is None:
        return {"missing": list(missing), "pairs": [], "counts": None, "transitions": [], "rule": "", "kind": kind}
    pairs, counts = examples.pair_up(before, after)
    return {
        "missing": list(missing),
        "pairs": [{"pair": pair, "sides": _sides(pair)} for pair in examples.choose(pairs)],
        "counts": counts,
        "transitions": examples.transitions(pairs),
        "rule": examples.RULE,
        "kind": kind,
    }


def _sides(pair: Pair) -> list[dict[str, Any]]:
    compared = word_diff.compare(pair.before.response, pair.after.response)
    found = []
    for number, response in enumerate((pair.before, pair.after)):
        rank = examples.rank(response)
        found.append(
            {
                "response": response,
                "parts": None if compared is None else compared[number],
                "removed": number == 0,
                "tone": {1: "good", 0: "bad", -1: "bad"}.get(rank, "plain") if rank is not None else "plain",
            }
        )
    return found


def routing(run: Path) -> tuple[dict[str, Any], Routing | None]:
    """For the macro `routing`, and what its figures are drawn from (None where there is nothing to draw)."""
    found = read_routing(run)
    if found is None:
        return {"missing": f"There is no {ROUTING} in the run directory, so no routing can be shown."}, None
    if found.not_shown is not None or found.conversation is None or not found.texts:
        return {"missing": f"No routing was kept: {found.not_shown or 'the file holds no text'}."}, None
    shown = {
        "missing": None,
        "conversation": found.conversation,
        "name": found.name,
        "top_k": found.top_k,
        "texts": [_text(found, text, number) for number, text in enumerate(found.texts)],
    }
    return shown, found


def box(number: int) -> str:
    """Id of the figure of a text."""
    return f"figure-routing-{number}"


def exchanged(text: Routed) -> list[list[tuple[list[int], list[int]]]]:
    """For each token and layer, the experts that the mask took out and those it brought in."""
    return [
        [(sorted(set(was) - set(now)), sorted(set(now) - set(was))) for was, now in zip(*pair, strict=True)]
        for pair in zip(text.before, text.after, strict=True)
    ]


def _text(found: Routing, text: Routed, number: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    changes = exchanged(text)
    for token, layers in zip(text.tokens, changes, strict=True):
        most = max(range(len(layers)), key=lambda i: (len(layers[i][0]), -i))
        rows.append(
            {
                "text": token.text,
                "part": token.part,
                "exchanged": sum(len(out) for out, _ in layers),
                "of": len(layers) * found.top_k,
                "layers": sum(bool(out) for out, _ in layers),
                "most": {
                    "layer": found.layers[most],
                    "out": _numbers(layers[most][0]),
                    "taken": _numbers(layers[most][1]),
                }
                if layers[most][0]
                else None,
            }
        )
    total, of = sum(row["exchanged"] for row in rows), sum(row["of"] for row in rows)
    touched = sum(bool(row["exchanged"]) for row in rows)
    cut = f" {text.left_out[0]} tokens before these and {text.left_out[1]} after them are not shown." * any(
        text.left_out
    )
    return {
        "id": box(number),
        "whose": "the model as it is" if text.reply_of == "none" else text.reply_of,
        "rows": rows,
        "said": f"{total:,} of {of:,} selections are others with the mask, in {touched} of {len(rows)} tokens.{cut}",
    }


def _numbers(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))

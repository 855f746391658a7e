"""What no steered model may make: every generation judged for a scenario's `[[forbid]]`, before any of it is kept.

Each reply of a played conversation is judged on its own, reasoning included, for every forbidden category. It fails
closed: what the judge could not judge is found like what it names, a row that was never screened counts as found, and
without the judge nothing runs. The text of what was found is written nowhere: the row keeps its place, unscored, with
the reason. One finding rejects a mask (select.py, pipeline.py); nothing is detected from such a row (`clear`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moesteer.errors import ScenarioError
from moesteer.evaluate.pieces import Unplayed
from moesteer.evaluate.play import Played
from moesteer.judges.panel import Panel
from moesteer.judges.protocol import Item, Judgement, Reply
from moesteer.scenario import Forbid, Scenario

FIELD = "forbidden"
"""Of a row: what was found, a list that is empty where all was judged and nothing found."""
HIT, UNSCREENED = "forbidden", "not-screened"
"""Codes that a row's reason begins with (judges.protocol.reason_code)."""
WITHHELD = "[withheld]"
_REPEATED = re.compile(r"\b(\w+(?:\W+\w+){0,5}?)(?:\W+\1\b){3,}", re.IGNORECASE)

Rows = Sequence[Mapping[str, Any]]


def require(scenario: Scenario, panel: Panel, *, cached: bool = False) -> None:
    """The judges of what is forbidden, ready to be asked; ScenarioError where replies are to be cached.

    A cache of replies holds text that was not judged yet. Raises what making a judge raises.
    """
    if not scenario.forbid:
        return
    if cached:
        raise ScenarioError(
            "a cache of replies would keep text that the scenario forbids",
            where=f"scenario {scenario.name}: [[forbid]]",
            expected="no --cache",
            do="run it without --cache",
        )
    for name in {one.judge for one in scenario.forbid}:
        _ = panel.judge(name).identity  # of a model: that its weights are there


def findings(scenario: Scenario, panel: Panel, items: Sequence[Item]) -> Sequence[list[str] | None]:
    """For each item what was found in its replies, "CODE: what"; an empty list: nothing. None without `[[forbid]]`."""
    if not scenario.forbid:
        return [None] * len(items)
    parts = [_every_reply(item) for item in items]
    flat = [part for mine in parts for part in mine]
    found: list[list[str]] = [[] for _ in items]
    for name in sorted({one.judge for one in scenario.forbid}):
        said = iter(panel.judge(name).judge(flat) if flat else ())
        categories = [one for one in scenario.forbid if one.judge == name]
        for i, mine in enumerate(parts):
            for _ in mine:
                found[i] += [one for one in _found(next(said), categories) if one not in found[i]]
    return found


def _every_reply(item: Item) -> list[Item]:
    """Each reply as an item of its own, with what stood before it; none for a reply without a word.

    A text that repeats itself is judged with the repetition cut to two: judges leave incoherent text unjudged.
    """
    places = [i for i, message in enumerate(item.messages) if message.role == "assistant"]
    starts = [*places[len(places) - len(item.replies) + 1 :], len(item.messages)]
    made = []
    for start, reply in zip(starts, item.replies, strict=True):
        text = reply.text if reply.raw is None else reply.raw
        if re.search(r"\w", text):
            shown = Reply(_REPEATED.sub(r"\1 \1", text), finished=True)
            made.append(Item(item.conversation, item.messages[:start], (shown,)))
    return made


def _found(judgement: Judgement, categories: Sequence[Forbid]) -> list[str]:
    """What one judgement of one reply comes to: named, not judged, or harmful in a way that is not named."""
    if judgement.verdict in ("unscored", "broken"):
        return [f"{UNSCREENED}: {judgement.by}: {judgement.reason or judgement.verdict}"[:300]]
    named = {part.strip().upper() for part in (judgement.category or "").split(",")} - {""}
    if judgement.verdict == "complied" and not named:
        return [f"{UNSCREENED}: {judgement.by}: rated harmful, no category named"]
    return [f"{HIT}: {one.category} ({judgement.by})" for one in categories if one.category.upper() in named]


def marked(row: dict[str, Any], found: Sequence[str] | None) -> dict[str, Any]:
    """The row as it may be kept: with what was found, and then without the model's text. found None: as it is."""
    if found is None:
        return row
    if not found:
        return {**row, FIELD: []}
    kept = {key: value for key, value in row.items() if key != "raw"}
    if "response" in kept:
        kept["response"] = WITHHELD
    if "messages" in kept:
        kept["messages"] = [m | {"content": WITHHELD} if m["role"] == "assistant" else m for m in kept["messages"]]
    hits = [one for one in found if one.startswith(HIT)]
    return {**kept, FIELD: list(found), "verdict": "unscored", "success": None, "reason": [*hits, *found][0]}


def screened(
    scenario: Scenario, panel: Panel, made: Sequence[Played | Unplayed], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of what was played, as they may be kept. As they are, without `[[forbid]]`."""
    if not scenario.forbid:
        return list(rows)
    found = iter(findings(scenario, panel, [p.item for p in made if isinstance(p, Played)]))
    return [
        marked(row, next(found)) if isinstance(p, Played) else marked(row, [f"{UNSCREENED}: no reply: {row['fault']}"])
        for p, row in zip(made, rows, strict=True)
    ]


def found_in(scenario: Scenario, rows: Rows) -> int:
    """How many rows hold something forbidden, or were not screened; 0 without `[[forbid]]`."""
    return sum(row.get(FIELD) != [] for row in rows) if scenario.forbid else 0


def clear(scenario: Scenario, rows: Rows) -> list[Mapping[str, Any]]:
    """What may be detected from: the rows that were screened and held nothing; all without `[[forbid]]`."""
    return [row for row in rows if row.get(FIELD) == []] if scenario.forbid else list(rows)


def named(scenario: Scenario) -> str:
    """What is forbidden, for people."""
    return ", ".join(f"{one.category} ({one.title})" if one.title else one.category for one in scenario.forbid)

"""One suite under several conditions in one batch: each its own mask, all the same conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesteer.backends.protocol import Generates
from moesteer.conversations import Conversation
from moesteer.evaluate import forbidding
from moesteer.evaluate.metrics import wanted
from moesteer.evaluate.play import play
from moesteer.judges.panel import Panel
from moesteer.scenario import Scenario, Suite

OF_THE_CONVERSATION = ("group", "split", "messages", "reference", "raw")
"""Keys of a row that say what was asked, and what stood around the answer: the same for every condition but for the
model's own earlier replies."""


def rows_together(
    model: Generates,
    scenario: Scenario,
    suite: Suite,
    conversations: Sequence[Conversation],
    *,
    masks: Sequence[int],
    judges: Panel,
) -> list[list[dict[str, Any]]]:
    """The rows of responses/NAME.jsonl of every condition, each in the order of the conversations.

    masks: for each condition the number of its mask among those applied (Model.generate's rows); 0 none. All 0: what
    is applied acts on all of them. Every reply is judged for what the scenario forbids before its row is made.
    """
    played = play(
        model, [c for _ in masks for c in conversations], turns=suite.play == "turns",
        max_new_tokens=scenario.max_new_tokens, reasoning=scenario.judging.reasoning,
        rows=[number for number in masks for _ in conversations] if any(masks) else None,
    )  # fmt: skip
    items = [p.item for p in played]
    rulings = judges.rule(suite.judges, items)
    forbidden = forbidding.findings(scenario, judges, items)
    rows = []
    for p, ruling, hits in zip(played, rulings, forbidden, strict=True):
        success = wanted(suite.metrics[0], ruling.verdict)
        row = p.as_row(suite.name, ruling.verdict, success=success, more=ruling.fields())
        rows.append(forbidding.marked(row, hits))
    size = len(conversations)
    return [rows[i * size : (i + 1) * size] for i in range(len(masks))]


def answer_of(row: Mapping[str, Any], *, keep: Sequence[str] = ()) -> dict[str, Any]:
    """A row without what it shares with the unsteered model's (OF_THE_CONVERSATION), but for the keys in `keep`."""
    return {key: value for key, value in row.items() if key not in OF_THE_CONVERSATION or key in keep}

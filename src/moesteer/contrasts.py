"""Contrasts: what detection compares, made from the fit split as the model itself played it.

- **pairs** (risk-difference): a conversation of the target suite that ended in the unwanted behaviour, once with
  that response and once with a wanted one put in its place; both teacher-forced, labelled, equal in number.
- **published** (masc-published): target conversations that ended in the unwanted behaviour, against
  conversations of the `published` suite that ended well.
- **matched** (masc): conversations of the target suite without a response, labelled by how they ended; and protected
  conversations that went well, labelled "keep".
- **targets** and **keeps** (direct): target conversations that ended in the unwanted behaviour, with a wanted
  response; protected conversations, and target conversations that ended well, with the model's own response.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesteer.conversations import Conversation, Message
from moesteer.errors import EmptyDataError
from moesteer.evaluate import forbidding
from moesteer.scenario import Scenario

KEEP = "keep"
"""Label of protected conversations, which no scenario may use for a behaviour."""
FEWEST = 8
"""Fewer unwanted (or wanted) conversations than this are no contrast."""


@dataclass(frozen=True)
class Contrasts:
    """See the module's docstring. Responses stand in `reference`."""

    pairs: list[Conversation]
    published: list[Conversation]
    matched: list[Conversation]
    targets: list[Conversation]
    keeps: list[Conversation]

    def counts(self) -> dict[str, int]:
        """Number of conversations of each kind."""
        return {name: len(getattr(self, name)) for name in ("pairs", "published", "matched", "targets", "keeps")}


def make(scenario: Scenario, fit_rows: Sequence[Mapping[str, Any]], *, seed: int) -> Contrasts:
    """Contrasts from the unsteered model's fit rows (evaluate.run.evaluate_split).

    Raises EmptyDataError when the model shows too little of either behaviour to compare.
    """
    fit_rows = forbidding.clear(scenario, fit_rows)
    target = [row for row in fit_rows if row["suite"] == scenario.target.name]
    good, bad = _by_outcome(target)
    published_good, _ = _by_outcome([row for row in fit_rows if row["suite"] == scenario.contrast.published])
    pool = _wanted_pool(scenario, [*good, *published_good])
    if len(bad) < FEWEST:
        raise EmptyDataError(
            f"only {len(bad)} of {len(target)} target conversations show {scenario.contrast.away!r}",
            where=f"scenario {scenario.name}, suite {scenario.target.name}, fit split",
            expected=f"at least {FEWEST}: there is nothing to steer away from otherwise",
            do="give more conversations, or a model and scenario with a gap",
        )
    rng = random.Random(f"contrasts/{seed}")
    pairs: list[Conversation] = []
    targets: list[Conversation] = []
    held: list[Conversation] = []
    for row in target:
        own_is_wanted = row["success"] is True
        wanted = str(row["response"]) if own_is_wanted else _wanted(scenario, row, pool, rng)
        if wanted is None:
            continue
        put = _conversation(row, f"{row['id']}/wanted", scenario.toward, wanted)
        if own_is_wanted:
            held.append(put)
            continue
        targets.append(put)
        if row["verdict"] not in ("broken", "unscored"):
            pairs.append(put)
            pairs.append(_conversation(row, f"{row['id']}/other", scenario.contrast.away, str(row["response"])))
    if len(pairs) < 2 * FEWEST:
        raise EmptyDataError(
            f"only {len(pairs) // 2} pairs of a wanted and an unwanted response",
            where=f"scenario {scenario.name}, suite {scenario.target.name}, fit split",
            expected=f"at least {FEWEST}",
            do="give the conversations a `reference`, or set contrast.wanted to 'text' with wanted_texts",
        )
    published = [_conversation(row, row["id"], scenario.contrast.away, None) for row in bad]
    published += [_conversation(row, row["id"], scenario.toward, None) for row in published_good]
    keeps = [
        _conversation(row, row["id"], None, str(row["response"]))
        for suite in scenario.protected
        for row in fit_rows
        if row["suite"] == suite.name and row["verdict"] not in ("broken", "unscored")
    ]
    matched = [_conversation(row, row["id"], scenario.contrast.away, None) for row in bad]
    matched += [_conversation(row, row["id"], scenario.toward, None) for row in good]
    kept = {suite.name for suite in scenario.protected}
    matched += [
        _conversation(row, row["id"], KEEP, None) for row in fit_rows if row["suite"] in kept and row["success"] is True
    ]
    return Contrasts(pairs, published, matched, targets, keeps + held)


def _by_outcome(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(rows that went as their suite wants, rows that did not), unscored and broken ones left out."""
    scored = [row for row in rows if row["verdict"] != "broken"]
    return [row for row in scored if row["success"] is True], [row for row in scored if row["success"] is False]


def _wanted_pool(scenario: Scenario, good: Sequence[Mapping[str, Any]]) -> list[str]:
    if scenario.contrast.wanted == "text":
        return list(scenario.contrast.wanted_texts)
    if scenario.contrast.wanted == "reference":
        return []
    pool = [str(row["response"]) for row in good]
    if not pool:
        raise EmptyDataError(
            "the model never shows the wanted behaviour by itself",
            where=f"scenario {scenario.name}, fit split of {scenario.target.name} and {scenario.contrast.published}",
            expected="some wanted responses of its own to learn from (contrast.wanted = 'own')",
            do="set contrast.wanted to 'text' and give wanted_texts, or to 'reference'",
        )
    return pool


def _wanted(scenario: Scenario, row: Mapping[str, Any], pool: Sequence[str], rng: random.Random) -> str | None:
    if scenario.contrast.wanted == "reference":
        return str(row["reference"]) if row["reference"] else None
    return rng.choice(pool)


def _conversation(row: Mapping[str, Any], id_: str, label: str | None, response: str | None) -> Conversation:
    return Conversation(
        id=id_, group=row["group"], messages=tuple(Message(m["role"], m["content"]) for m in row["messages"]),
        label=label, reference=response, tactic=row["tactic"], split="fit",
    )  # fmt: skip

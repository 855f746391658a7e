"""Contrasts: what detection compares, made from the fit split as the model itself played it.

- **pairs** (risk-difference): a conversation of the target suite that ended in the unwanted behaviour, once with
  that response and once with a wanted one put in its place; both teacher-forced, labelled, equal in number.
- **published** (masc-published): target conversations that ended in the unwanted behaviour, against
  conversations of the `published` suite that ended well.
- **targets** and **keeps** (direct): all target conversations with a wanted response; protected conversations
  with the model's own response.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesteer.conversations import Conversation, Message
from moesteer.errors import EmptyDataError
from moesteer.evaluate.metrics import metric, outcome
from moesteer.scenario import Scenario

FEWEST = 8
"""Fewer unwanted (or wanted) conversations than this are no contrast."""


@dataclass(frozen=True)
class Contrasts:
    """See the module's docstring. Responses stand in `reference`."""

    pairs: list[Conversation]
    published: list[Conversation]
    targets: list[Conversation]
    keeps: list[Conversation]

    def counts(self) -> dict[str, int]:
        """Number of conversations of each kind."""
        return {name: len(getattr(self, name)) for name in ("pairs", "published", "targets", "keeps")}


def make(scenario: Scenario, fit_rows: Sequence[Mapping[str, Any]], *, seed: int) -> Contrasts:
    """Contrasts from the unsteered model's fit rows (evaluate.run.evaluate_split).

    Raises EmptyDataError when the model shows too little of either behaviour to compare.
    """
    name = scenario.target.metrics[0]
    target = [row for row in fit_rows if row["suite"] == scenario.target.name]
    good, bad = _by_outcome(target, name)
    published_metric = next(s.metrics[0] for s in scenario.suites if s.name == scenario.contrast.published)
    published_good, _ = _by_outcome(
        [row for row in fit_rows if row["suite"] == scenario.contrast.published], published_metric
    )
    pool = _wanted_pool(scenario, [*good, *published_good])
    if len(bad) < FEWEST:
        raise EmptyDataError(
            f"only {len(bad)} of {len(target)} target conversations show {scenario.contrast.away!r}",
            where=f"scenario {scenario.name}, suite {scenario.target.name}, fit split",
            expected=f"at least {FEWEST}: there is nothing to steer away from otherwise",
            do="give more conversations, or a model and scenario with a gap",
        )
    rng = random.Random(f"contrasts/{seed}")
    pairs, targets = [], []
    for row in target:
        own_is_wanted = outcome(name, row["verdict"]) is True
        wanted = str(row["response"]) if own_is_wanted else _wanted(scenario, row, pool, rng)
        if wanted is None:
            continue
        targets.append(_conversation(row, f"{row['id']}/wanted", scenario.toward, wanted))
        if outcome(name, row["verdict"]) is False and row["verdict"] != "broken":
            pairs.append(targets[-1])
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
    return Contrasts(pairs, published, targets, keeps)


def _by_outcome(
    rows: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(rows that went well, rows that did not), unscored and broken ones left out."""
    flip = metric(name).lower_is_better
    good = [row for row in rows if outcome(name, row["verdict"]) is (not flip) and row["verdict"] != "broken"]
    bad = [row for row in rows if outcome(name, row["verdict"]) is flip and row["verdict"] != "broken"]
    return good, bad


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

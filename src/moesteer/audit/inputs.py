"""What an audit is of: the behaviour's suite and the suites beside it, by split.

From a scenario, the behaviour's suite is one of its suites (the first whose first metric is direct_refusal_rate) and
utility is measured on its other protected suites. Splits are the scenario's: experts are looked for on fit, a finder
is chosen on select, and everything that is reported is of test.

With a file of pairs of the user's own, the behaviour's suite is made of their requests, and judged as the scenario's.
Pairs themselves are made in audit/pairs.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesteer import conversations, scenario
from moesteer.conversations import Conversation, Message
from moesteer.errors import EmptyDataError, ScenarioError, UnknownNameError
from moesteer.evaluate.metrics import METRICS, metric, outcome
from moesteer.evaluate.run import Splits
from moesteer.scenario import Scenario, Split, Suite

SHOWS, LACKS = "shows", "lacks"
"""Labels of the two sides of every pair and trace of an audit."""
METRIC = "direct_refusal_rate"
"""First metric of the suite that is audited unless another is named."""
PAIRED = "pairs"
"""Name of the behaviour's suite where it is made of the user's own pairs."""
UTILITY_MOST = 40
"""Conversations of each utility suite and split."""
DRAW_MOST = 10
"""Of these, so many under each random draw, and where a finder is chosen."""
WORDS = {
    "direct_refusal_rate": ("refuses", "refusals"),
    "restricted_refusal_rate": ("refuses", "refusals"),
    "over_refusal_rate": ("refuses", "refusals"),
    "defense_success_rate": ("withstands attacks", "resistance to attacks"),
    "faithfulness": ("follows the document", "faithfulness to the document"),
}
"""By metric, what a reply does that counts for it, and a noun for that."""


@dataclass(frozen=True)
class Inputs:
    """scenario: reduced to the behaviour's suite, which comes first, and the utility suites. data: by suite and split.

    whole: the scenario as it was given. given: the user's own pairs of the fit split, labelled SHOWS and LACKS, with a
    response in each; () where pairs are made from what the model says. prompts: the user's own requests that do
    without responses, labelled so.
    """

    scenario: Scenario
    behaviour: Suite
    utility: tuple[Suite, ...]
    data: Splits
    whole: Scenario
    given: tuple[Conversation, ...] = ()
    prompts: tuple[Conversation, ...] = ()

    @property
    def metric(self) -> str:
        """What counts as showing the behaviour."""
        return self.behaviour.metrics[0]

    @property
    def words(self) -> tuple[str, str]:
        """(what a reply does, a noun for it), for people."""
        title = metric(self.metric).title
        return WORDS.get(self.metric, (title, title))

    def of(self, split: Split, *, utility: int | None = None) -> dict[str, Sequence[Conversation]]:
        """A split's conversations by suite; utility: at most so many of each utility suite, taken evenly."""
        found: dict[str, Sequence[Conversation]] = {}
        for suite in self.scenario.suites:
            rows = self.data[suite.name][split]
            if suite.name != self.behaviour.name and utility is not None:
                rows = scenario.spread(rows, min(utility, len(rows)))
            found[suite.name] = rows
        return found

    def shows(self, row: Mapping[str, Any]) -> bool | None:
        """Whether a reply shows the behaviour; None where it was not scored."""
        return outcome(self.metric, row["verdict"])

    def of_behaviour(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The rows of the behaviour's suite."""
        return [row for row in rows if row["suite"] == self.behaviour.name]


def inputs(
    given: Scenario, *, suite: str | None = None, data: Path | str | None = None, seed: int, limit: int | None = None
) -> Inputs:
    """What to audit. suite: the behaviour's. data: a file of pairs of the user's own, which take the place of ours.

    limit: at most so many conversations of each suite and split. Raises ScenarioError (no suite of the behaviour, or
    nothing beside it), UnknownNameError, and for `data` what conversations.read raises and EmptyDataError.
    """
    behaviour = _behaviour(given, suite).model_copy(update={"role": "target"})
    utility = tuple(one for one in given.suites if one.role == "protect" and one.name != behaviour.name)
    if not utility:
        raise ScenarioError(
            f"nothing is protected beside the suite {behaviour.name}",
            where=f"scenario {given.name}",
            expected="at least one other suite with role = 'protect', to see what silencing costs",
            do="add one (docs/scenarios.md)",
        )
    own: tuple[Conversation, ...] = ()
    prompts: tuple[Conversation, ...] = ()
    if data is None:
        found = scenario.splits(_reduced(given, (behaviour, *utility)), seed=seed, limit=limit)
    else:
        found = scenario.splits(_reduced(given, utility), seed=seed, limit=limit)
        behaviour = behaviour.model_copy(update={"name": _free_name(utility), "data": str(data), "play": "last"})
        found[behaviour.name], own, prompts = _from_pairs(Path(data), behaviour, given, seed=seed, limit=limit)
    for one in utility:
        found[one.name] = {
            split: scenario.spread(rows, min(UTILITY_MOST, len(rows))) for split, rows in found[one.name].items()
        }
    return Inputs(_reduced(given, (behaviour, *utility)), behaviour, utility, found, given, own, prompts)


def _reduced(given: Scenario, suites: tuple[Suite, ...]) -> Scenario:
    return given.model_copy(update={"suites": suites})


def _free_name(suites: Sequence[Suite]) -> str:
    names = {suite.name for suite in suites}
    return next(name for name in (PAIRED, f"{PAIRED}-of-yours", f"{PAIRED}-audited") if name not in names)


def _behaviour(given: Scenario, name: str | None) -> Suite:
    if name is not None:
        found = next((suite for suite in given.suites if suite.name == name), None)
        if found is None:
            raise UnknownNameError(
                f"no suite {name!r}",
                where=f"--suite, scenario {given.name}",
                expected=", ".join(suite.name for suite in given.suites),
                do="name one of these",
            )
        return found
    found = next((suite for suite in given.suites if suite.metrics[0] == METRIC), None)
    if found is None:
        raise ScenarioError(
            "no suite says which behaviour is to be audited",
            where=f"scenario {given.name}: " + ", ".join(f"{s.name} ({s.metrics[0]})" for s in given.suites),
            expected=f"a suite whose first metric is {METRIC}",
            do="name the suite of another behaviour with --suite",
        )
    return found


# ---- the user's own pairs


def _from_pairs(
    path: Path, behaviour: Suite, given: Scenario, *, seed: int, limit: int | None
) -> tuple[dict[Split, list[Conversation]], tuple[Conversation, ...], tuple[Conversation, ...]]:
    """(the behaviour's suite by split, pairs of the fit split with responses, else its labelled requests)."""
    rows = [_labelled(row, given, behaviour, path) for row in conversations.read(path)]
    answered = all(conversations.request_and_response(row)[1] for row in rows)
    if len({row.split is None for row in rows}) > 1:
        rows = [replace(row, split=None) for row in rows]
    rows = conversations.assign_splits([replace(row, tactic=None) for row in rows], seed=seed)
    answers = answers_of(rows, behaviour.metrics[0])
    asked: dict[Split, list[Conversation]] = {"fit": [], "select": [], "test": []}
    seen: set[tuple[Message, ...]] = set()
    for row in rows:
        messages, _ = conversations.request_and_response(row)
        if row.label == SHOWS and messages not in seen:
            seen.add(messages)
            named = {"id": f"{behaviour.name}/{row.id}", "reference": answers.get(messages)}
            asked[row.split].append(replace(row, messages=messages, label=None, **named))  # type: ignore[index, arg-type]
    if limit is not None:
        asked = {split: scenario.spread(found, min(limit, len(found))) for split, found in asked.items()}
    empty = [split for split, found in asked.items() if not found]
    if empty:
        raise EmptyDataError(
            f"no request whose side shows the behaviour is in {', '.join(empty)}",
            where=str(path),
            expected="requests of at least three groups (behaviours), so that each split has some",
            do="give more pairs, of more groups",
        )
    fit = tuple(row for row in rows if row.split == "fit")
    return asked, fit if answered else (), () if answered else fit


def answers_of(rows: Sequence[Conversation], metric_name: str) -> dict[tuple[Message, ...], str]:
    """By request, the answer that a judge compares replies with: the response that lacks the behaviour.

    Where the behaviour is to answer rightly, it is the one that shows it.
    """
    side = SHOWS if "correct" in METRICS[metric_name].successes else LACKS
    found: dict[tuple[Message, ...], str] = {}
    for row in rows:
        messages, response = conversations.request_and_response(row)
        if row.label == side and response:
            found.setdefault(messages, response)
    return found


def _labelled(row: Conversation, given: Scenario, behaviour: Suite, path: Path) -> Conversation:
    """The conversation with SHOWS or LACKS for its label."""
    toward, away = given.toward, given.contrast.away
    if away == "refuse" and "refused" in METRICS[behaviour.metrics[0]].successes:
        toward, away = away, toward  # the scenario steers away from what is audited
    sides = {SHOWS: SHOWS, LACKS: LACKS, toward: SHOWS, away: LACKS, "0": SHOWS, "1": LACKS}
    if row.label not in sides:
        raise EmptyDataError(
            f"a conversation is labelled {row.label!r}, which is neither side of a pair",
            where=f"{path}, conversation {row.id}",
            expected="messages_0 (shows the behaviour) and messages_1 (lacks it), or a label: "
            + ", ".join(f"{name!r}" for name in sides if name not in ("0", "1")),
            do="label every conversation with the side it is on",
        )
    return replace(row, label=sides[row.label])

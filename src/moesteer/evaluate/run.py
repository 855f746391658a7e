"""Evaluation of a scenario's suites on one split: played, judged, journalled, resumable; and the numbers of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.conversations import Conversation
from moesteer.evaluate import stats
from moesteer.evaluate.metrics import outcome, wanted
from moesteer.evaluate.play import Generates, judged, play
from moesteer.progress import Progress
from moesteer.scenario import Scenario, Split

Splits = Mapping[str, Mapping[Split, Sequence[Conversation]]]
CHUNK = 256
"""Conversations played and journalled at a time: what a kill can cost."""


def evaluate_split(
    model: Generates, scenario: Scenario, data: Splits, split: Split, *, journal: Path | None, title: str
) -> list[dict[str, Any]]:
    """Play every suite's split on the model as it is now (steered or not); the rows of responses/NAME.jsonl.

    Rows already in the journal are not played again: a killed evaluation goes on at its first missing chunk.
    journal None: nothing is kept.
    """
    record = files.Journal(journal) if journal is not None else None
    done = {row["id"]: row for row in record.read()} if record is not None else {}
    rows: list[dict[str, Any]] = []
    judging = scenario.judging_of()
    total = sum(len(data[suite.name][split]) for suite in scenario.suites)
    with Progress(title, total=total, unit="conversations") as progress:
        for suite in scenario.suites:
            conversations = list(data[suite.name][split])
            for start in range(0, len(conversations), CHUNK):
                chunk = conversations[start : start + CHUNK]
                if not all(c.id in done for c in chunk):
                    made = play(model, chunk, turns=suite.play == "turns", max_new_tokens=scenario.max_new_tokens)
                    verdicts = judged(made, judging, suite.judge)
                    new = [
                        p.as_row(suite.name, v, success=wanted(suite.metrics[0], v))
                        for p, v in zip(made, verdicts, strict=True)
                    ]
                    if record is not None:
                        record.append(row for row in new if row["id"] not in done)
                    done |= {row["id"]: row for row in new}
                rows += [done[c.id] for c in chunk]
                progress.advance(len(chunk), note=suite.name)
    return rows


def outcomes(scenario: Scenario, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, bool | None]]:
    """Per metric, the outcome of every conversation that counts for it, by conversation id."""
    suites = {suite.name: suite for suite in scenario.suites}
    found: dict[str, dict[str, bool | None]] = {}
    for row in rows:
        for name in (*suites[row["suite"]].metrics, "coherence"):
            found.setdefault(name, {})[row["id"]] = outcome(name, row["verdict"])
    return found


def metrics(scenario: Scenario, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every metric's rate with n, Wilson interval and unscored count."""
    return {name: stats.rate(list(found.values())).as_json() for name, found in outcomes(scenario, rows).items()}


def by_suite(scenario: Scenario, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every suite's first metric on its own rows: a metric that two suites share hides neither."""
    found = {}
    for suite in scenario.suites:
        name = suite.metrics[0]
        scored = stats.rate([outcome(name, row["verdict"]) for row in rows if row["suite"] == suite.name])
        found[suite.name] = {"metric": name, **scored.as_json()}
    return found


def by_tactic(scenario: Scenario, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The target metric's rate for every tactic of the target suite."""
    name = scenario.target.metrics[0]
    tactics: dict[str, list[bool | None]] = {}
    for row in rows:
        if row["suite"] == scenario.target.name and row["tactic"] is not None:
            tactics.setdefault(row["tactic"], []).append(outcome(name, row["verdict"]))
    return {name: {tactic: stats.rate(found).as_json() for tactic, found in sorted(tactics.items())}} if tactics else {}


def against_none(
    scenario: Scenario, none: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, seed: int
) -> dict[str, dict[str, Any]]:
    """Every metric's difference to the unsteered model on the same conversations."""
    groups = {row["id"]: str(row["group"]) for row in none}
    before, after = outcomes(scenario, none), outcomes(scenario, rows)
    return {
        name: stats.paired_difference(
            [before[name][i] for i in found],
            [found[i] for i in found],
            groups=[groups[i] for i in found],
            seed=seed,
        )
        for name, found in after.items()
    }


def suite_rate(scenario: Scenario, suite: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """A suite's first metric on these rows; None where nothing is scored."""
    name = next(s.metrics[0] for s in scenario.suites if s.name == suite)
    return stats.rate([outcome(name, row["verdict"]) for row in rows if row["suite"] == suite]).value

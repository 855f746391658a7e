"""Evaluation of a scenario's suites on one split: played, judged, journalled, resumable; and the numbers of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.backends.protocol import Generates
from moesteer.conversations import Conversation
from moesteer.evaluate import forbidding, stats
from moesteer.evaluate.metrics import outcome, wanted
from moesteer.evaluate.pieces import Player, Unplayed, pieces
from moesteer.evaluate.play import Played
from moesteer.judges.agreement import agreement
from moesteer.judges.panel import Panel
from moesteer.judges.protocol import reason_code
from moesteer.progress import Progress
from moesteer.scenario import Scenario, Split, Suite

Splits = Mapping[str, Mapping[Split, Sequence[Conversation]]]


def evaluate_split(
    model: Generates,
    scenario: Scenario,
    data: Splits,
    split: Split,
    *,
    journal: Path | None,
    title: str,
    panel: Panel | None = None,
) -> list[dict[str, Any]]:
    """Play every suite's split on the model as it is now (steered or not); the rows of responses/NAME.jsonl.

    Rows already in the journal are not played again: a killed evaluation goes on at its first missing piece, or at
    the first missing turn of one that takes long (pieces.py). journal None: nothing is kept. Raises NanLogitsError
    after three requests in a row without finite logits; fewer are unscored rows with a `fault`. panel: the scenario's
    judges, where they are asked elsewhere too and keep a journal (None: they are made, and closed, here).
    """
    record = files.Journal(journal) if journal is not None else None
    done = {row["id"]: row for row in record.read()} if record is not None else {}
    # what may be forbidden is not kept before it was judged
    partial = journal.with_name(f".{journal.stem}.turns.json") if journal and not scenario.forbid else None
    rows: list[dict[str, Any]] = []
    total = sum(len(data[suite.name][split]) for suite in scenario.suites)
    with ExitStack() as held, Progress(title, total=total, unit="conversations") as progress:
        judges = panel if panel is not None else held.enter_context(scenario.panel())
        forbidding.require(scenario, judges)
        for suite in scenario.suites:
            turns, form = suite.play == "turns", scenario.judging.reasoning
            player = Player(model, turns, scenario.max_new_tokens, partial, form)
            for piece in pieces(model, data[suite.name][split], max_new_tokens=scenario.max_new_tokens):
                if not all(c.id in done for c in piece):
                    made = player.play(piece)
                    new = forbidding.screened(scenario, judges, made, _judged(made, judges, suite))
                    if record is not None:
                        record.append(row for row in new if row["id"] not in done)
                    done = {row["id"]: row for row in new} | done
                rows += [done[c.id] for c in piece]
                progress.advance(len(piece), note=suite.name)
    if partial is not None:
        files.remove(partial)
    return rows


def _judged(made: Sequence[Played | Unplayed], judges: Panel, suite: Suite) -> list[dict[str, Any]]:
    """The journal's rows of a piece, in its order."""
    played = [p for p in made if isinstance(p, Played)]
    rulings = iter(judges.rule(suite.judges, [p.item for p in played]))
    found = []
    for p in made:
        if isinstance(p, Unplayed):
            found.append(p.as_row(suite.name))
        else:
            ruling = next(rulings)
            success = wanted(suite.metrics[0], ruling.verdict)
            found.append(p.as_row(suite.name, ruling.verdict, success=success, more=ruling.fields()))
    return found


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
    """Every suite's first metric on its own rows: a metric that two suites share hides neither.

    With `unscored_reasons`, counts by reason, where a judge failed; with `agreement` (judges/agreement.py) of the
    judges on that metric, where there are several.
    """
    found: dict[str, dict[str, Any]] = {}
    for suite in scenario.suites:
        name, mine = suite.metrics[0], [row for row in rows if row["suite"] == suite.name]
        scored = stats.rate([outcome(name, row["verdict"]) for row in mine])
        found[suite.name] = {"metric": name, **scored.as_json()}
        reasons = Counter(_reason(row) for row in mine if row["verdict"] == "unscored")
        if reasons:
            found[suite.name]["unscored_reasons"] = dict(sorted(reasons.items()))
        if len(suite.judges) > 1:
            found[suite.name]["agreement"] = agreement({judge: _called(mine, judge, name) for judge in suite.judges})
    return found


def _reason(row: Mapping[str, Any]) -> str:
    """Why a row is unscored: the judge's word for it, or that the model gave no reply to judge."""
    return "no-reply" if row.get("fault") else reason_code(row.get("reason"))


def _called(rows: Sequence[Mapping[str, Any]], judge: str, metric: str) -> list[bool | None]:
    """What one of several judges says of the metric; None for what it did not score, and for broken replies."""
    verdicts = [row.get("verdicts", {}).get(judge, "unscored") for row in rows]
    return [None if verdict == "broken" else outcome(metric, verdict) for verdict in verdicts]


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

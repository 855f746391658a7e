"""Playing the same conversations under many conditions: masks side by side in one batch, each in the journal whole.

Which conditions make up a batch is fixed by what was asked for alone, never by what an earlier try left: a reply may
depend on what it was batched with, and an audit that was killed must end in the same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer import files
from moesteer.conversations import Conversation
from moesteer.errors import InputError, NoEffectError
from moesteer.evaluate.together import answer_of, rows_together
from moesteer.judges.panel import Panel
from moesteer.mask import SteeringMask
from moesteer.progress import Progress
from moesteer.scenario import Scenario

ROWS = 1024
"""Conversations in one batch of conditions, about: all conditions' of the largest suite together."""
CONDITION = "condition"
"""Key of a journal's row: the condition's name."""


@dataclass(frozen=True, eq=False)
class Condition:
    """The model in one state. masks: that act together, none for the model as it is. order_LE: its experts permuted."""

    name: str
    masks: tuple[SteeringMask, ...] = ()
    order_LE: NDArray[np.int64] | None = None

    @property
    def alone(self) -> bool:
        """Whether it cannot share a batch: several masks, a gate that decides by request, or permuted experts."""
        return self.order_LE is not None or len(self.masks) > 1 or any(mask.gated for mask in self.masks)


def play_conditions(
    model: Any,
    conditions: Sequence[Condition],
    scenario: Scenario,
    data: Mapping[str, Sequence[Conversation]],
    *,
    journal: Path,
    title: str,
    panel: Panel,
    answers_only: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Every conversation under every condition: the rows of evaluate.run with a `condition`, by its name.

    data: conversations by suite of the scenario. journal: rows already there are not made again, and the same
    conditions, killed anywhere, end in the same bytes. answers_only: rows without what they share with the unsteered
    model's (evaluate.together.answer_of). Raises InputError for two conditions of one name, NoEffectError where
    permuted experts change no selection, and what playing and judging raise.
    """
    names = [condition.name for condition in conditions]
    if len(set(names)) != len(names):
        raise InputError(
            f"two conditions have the same name: {sorted({n for n in names if names.count(n) > 1})}",
            where=title,
            expected="every mask and size once",
            do="leave out what is there twice (--sizes, --finder)",
        )
    record = files.Journal(journal)
    done = _journalled(record)
    each = sum(len(rows) for rows in data.values())
    with Progress(title, total=len(conditions) * each, unit="conversations") as bar:
        for part in _batches(conditions, largest=max(map(len, data.values()), default=1)):
            if not all(len(done.get(one.name, {})) == each for one in part):
                made = _played(model, part, scenario, data, panel)
                rows = [{CONDITION: one.name, **_kept(row, answers_only)} for one in part for row in made[one.name]]
                record.append(row for row in rows if row["id"] not in done.get(row[CONDITION], {}))
                for row in rows:
                    done.setdefault(row[CONDITION], {}).setdefault(row["id"], row)
            bar.advance(len(part) * each, note=part[-1].name)
    ids = [conversation.id for rows in data.values() for conversation in rows]
    return {name: [done[name][id_] for id_ in ids] for name in names}


def rows_expected(conditions: Sequence[Condition], data: Mapping[str, Sequence[Conversation]]) -> int:
    """How many rows the journal has in the end (runs.Run.expect)."""
    return len(conditions) * sum(len(rows) for rows in data.values())


def _kept(row: dict[str, Any], answers_only: bool) -> dict[str, Any]:
    return answer_of(row) if answers_only else row


def _journalled(record: files.Journal) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by condition and id; of several with one id the first, as a killed append may leave more."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record.read():
        found.setdefault(row[CONDITION], {}).setdefault(row["id"], row)
    return found


def _batches(conditions: Sequence[Condition], *, largest: int) -> Iterator[list[Condition]]:
    """Conditions that are played at once, in order."""
    most = max(1, ROWS // max(1, largest))
    part: list[Condition] = []
    for one in conditions:
        if part and (one.alone or part[-1].alone or len(part) == most):
            yield part
            part = []
        part.append(one)
    if part:
        yield part


def _played(
    model: Any,
    part: Sequence[Condition],
    scenario: Scenario,
    data: Mapping[str, Sequence[Conversation]],
    panel: Panel,
) -> dict[str, list[dict[str, Any]]]:
    """The rows of every condition of a batch, suite by suite."""
    found: dict[str, list[dict[str, Any]]] = {one.name: [] for one in part}
    for suite in scenario.suites:
        if not data.get(suite.name):
            continue
        with _applied(model, part) as numbers:
            made = rows_together(model, scenario, suite, data[suite.name], masks=numbers, judges=panel)
        for one, rows in zip(part, made, strict=True):
            found[one.name] += rows
    return found


@contextmanager
def _applied(model: Any, part: Sequence[Condition]) -> Iterator[list[int]]:
    """The model as a batch steers it; for each condition the number of its mask (0: none, or whatever acts on all)."""
    if part[0].order_LE is not None:
        from moesteer.models.permuting import Permuted

        with model.tap.steer(permuted := Permuted(part[0].order_LE, model.routers)):
            yield [0]
        if not permuted.changed:
            raise NoEffectError(
                "permuting the routed experts changed no selection",
                where=part[0].name,
                expected="other experts for most tokens",
                do="report it: the routers of this model do not do what the tap expects",
            )
        return
    masks = [one.masks[0] for one in part if one.masks]
    if part[0].alone:
        with model.steered(part[0].masks, together=True):
            yield [0]
    elif masks:
        numbers, used = [], 0
        for one in part:
            used += bool(one.masks)
            numbers.append(used if one.masks else 0)
        with model.steered(masks):
            yield numbers
    else:
        yield [0] * len(part)

"""Choosing a method's strength or size on the select split, under the margins of the protected suites.

All candidates are played together, each with its own mask on its own rows of the batch. A candidate is feasible when
each protected suite's first metric is shown not to be inferior to the unsteered model's by more than its margin
(evaluate/margins.py: paired, one-sided, behaviours as clusters); where a suite is too small for anything to be shown,
it must not lose at all. Among the feasible ones the highest target metric wins; ties go to the smaller loss, then to
fewer experts and the smaller strength. Where none is feasible the one that breaks its margins least is kept, and said
to. A candidate that made one reply of what the scenario forbids is no candidate any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.backends.hf import Model
from moesteer.backends.protocol import Generates
from moesteer.backends.shifting import shifted
from moesteer.direction import Direction
from moesteer.errors import InputError
from moesteer.evaluate import forbidding
from moesteer.evaluate.margins import NonInferiority, non_inferiority
from moesteer.evaluate.metrics import metric
from moesteer.evaluate.replies import ReplyCache
from moesteer.evaluate.run import Splits, metrics, suite_rate
from moesteer.evaluate.together import answer_of, rows_together
from moesteer.judges.panel import Panel
from moesteer.mask import SteeringMask
from moesteer.progress import Progress
from moesteer.scenario import Scenario

BASE = "none"
"""Label of the unsteered model among the candidates."""
TOGETHER = 8
"""Candidates played in one batch."""


@dataclass(frozen=True)
class Candidate:
    """One setting of a method. The mask carries its own alpha; neither mask nor direction is the unsteered model.

    variant: number of the detection that it comes from. direction: of the residual stream, with its own alpha.
    """

    method: str
    mask: SteeringMask | None
    label: str
    variant: int = 0
    direction: Direction | None = None

    @property
    def alpha(self) -> float | None:
        """The strength; None for a forced mask and for no mask."""
        if self.direction is not None:
            return self.direction.info.alpha
        return None if self.mask is None or self.mask.forced else self.mask.info.alpha

    @property
    def size(self) -> tuple[int, float]:
        """Number of experts and strength: of two equal candidates the smaller is taken."""
        if self.mask is None:
            return 0, abs(self.alpha or 0.0)
        return self.mask.expert_count, abs(self.mask.info.alpha)


@dataclass(frozen=True)
class Scored:
    """A candidate with its metrics on the select split.

    target: minus infinity where no reply was scored. margins: by protected suite, whether its first metric is shown to
    lose less than its margin. forbidden: replies
    that hold something the scenario forbids, or were not judged for it: one is enough to reject the mask.
    """

    candidate: Candidate
    target: float
    metrics: Mapping[str, Any]
    margins: Mapping[str, NonInferiority]
    forbidden: int = 0

    @property
    def losses(self) -> dict[str, float]:
        """By protected suite, how much its first metric fell (negative: rose)."""
        return {name: found.loss or 0.0 for name, found in self.margins.items()}

    @property
    def over(self) -> float:
        """The largest excess of a loss over its margin; positive only where a margin is broken outright."""
        return max((self.losses[name] - found.margin for name, found in self.margins.items()), default=0.0)

    @property
    def measured(self) -> bool:
        """Whether the judges scored the target and, but for a few replies, every protected suite."""
        return math.isfinite(self.target) and all(found.measured for found in self.margins.values())

    @property
    def feasible(self) -> bool:
        """Measured, nothing forbidden, and every protected suite within its margin (shown; if too small, lossless)."""
        return self.measured and not self.forbidden and all(found.ok for found in self.margins.values())


def score(
    model: Model,
    scenario: Scenario,
    data: Splits,
    candidates: Sequence[Candidate],
    *,
    journal: Path,
    cache: ReplyCache | None = None,
    panel: Panel | None = None,
) -> list[Scored]:
    """Play the select split once per candidate; the first of a journal must be the unsteered model.

    Candidates whose rows the journal already holds are not played again, so that more can be scored later. cache: of
    replies. panel: the scenario's judges (None: they are made here). Raises InputError for two candidates with one
    label.
    """
    _require_own_labels(candidates)
    record = files.Journal(journal)
    done = _journalled(record)
    size = sum(len(data[suite.name]["select"]) for suite in scenario.suites)
    open_ = [c for c in candidates if len(done.get(c.label, ())) < size]
    bar = Progress("select: candidates", total=len(open_) * size, unit="conversations")
    with ExitStack() as held, bar as progress, model.remembering():
        judges = panel if panel is not None else held.enter_context(scenario.panel())
        forbidding.require(scenario, judges, cached=cache is not None)
        for part in _batches(open_):
            for label, rows in _play_together(model, scenario, data, part, progress, cache, judges).items():
                known = {row["id"] for row in done.get(label, ())}
                new = [row for row in rows if row["id"] not in known]
                record.append(new)
                done[label] = [*done.get(label, ()), *new]
    base = done[BASE]
    return [_scored(scenario, data, candidate, base, done[candidate.label]) for candidate in candidates]


def _require_own_labels(candidates: Sequence[Candidate]) -> None:
    """The journal and the masks of a batch are kept apart by label alone."""
    labels = [candidate.label for candidate in candidates]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError(
            f"two candidates have the same label: {', '.join(twice)}",
            where="what is tried on select",
            expected="every variant and strength once",
            do="remove what is there twice from `variants`, `alphas` or `false_positives` of the scenario's "
            "[settings.METHOD]",
        )


def _journalled(record: files.Journal) -> dict[str, list[dict[str, Any]]]:
    """The journal's rows by candidate label; of several with one id the first, as a killed append may leave more."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record.read():
        found.setdefault(row["candidate"], {}).setdefault(row["id"], row)
    return {label: list(rows.values()) for label, rows in found.items()}


def _scored(
    scenario: Scenario,
    data: Splits,
    candidate: Candidate,
    base: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> Scored:
    groups = {c.id: c.group for suite in scenario.suites for c in data[suite.name]["select"]}
    before = {row["id"]: row["success"] for row in base}
    margins = {}
    for suite in scenario.protected:
        mine = [row for row in rows if row["suite"] == suite.name]
        margins[suite.name] = non_inferiority(
            [before[row["id"]] for row in mine], [row["success"] for row in mine], margin=suite.margin,
            groups=[groups[row["id"]] for row in mine],
        )  # fmt: skip
    rate = suite_rate(scenario, scenario.target.name, rows)
    sign = -1.0 if metric(scenario.target.metrics[0]).lower_is_better else 1.0
    target = -math.inf if rate is None else rate * sign
    return Scored(candidate, target, metrics(scenario, rows), margins, forbidding.found_in(scenario, rows))


def _batches(candidates: Sequence[Candidate]) -> Iterator[Sequence[Candidate]]:
    """Candidates that one batch can hold: masks (and no mask) together, directions together."""
    for moved in (False, True):
        mine = [candidate for candidate in candidates if (candidate.direction is not None) == moved]
        for start in range(0, len(mine), TOGETHER):
            yield mine[start : start + TOGETHER]


@contextmanager
def applied(model: Model, candidates: Sequence[Candidate]) -> Iterator[tuple[Generates, Any]]:
    """The model as the candidates steer it, and its receipt; rows of generate: 0 none, n the n-th that steers."""
    masks = [c.mask for c in candidates if c.mask is not None]
    directions = [c for c in candidates if c.direction is not None]
    if masks:
        with model.steered(masks) as receipt:
            yield model, receipt
    elif directions:
        edits = [c.direction for c in directions if c.direction is not None]
        with shifted(model, edits) as moved:
            yield moved, moved.receipt
    else:
        yield model, None


def through(cache: ReplyCache | None, model: Any, candidates: Sequence[Candidate]) -> Generates:
    """The model that `applied` gave for these candidates, behind the cache; as it is where a direction moves it."""
    if cache is None or any(candidate.direction is not None for candidate in candidates):
        steered: Generates = model
        return steered
    return cache.around(model, masks=[c.mask for c in candidates if c.mask is not None], together=False)


def _play_together(
    model: Model,
    scenario: Scenario,
    data: Splits,
    candidates: Sequence[Candidate],
    progress: Progress,
    cache: ReplyCache | None,
    judges: Panel,
) -> dict[str, list[dict[str, Any]]]:
    """The select split under every candidate at once: rows of the journal by candidate label."""
    numbers, used = [], 0
    for candidate in candidates:
        steers = candidate.mask is not None or candidate.direction is not None
        used += steers
        numbers.append(used if steers else 0)
    found: dict[str, list[dict[str, Any]]] = {c.label: [] for c in candidates}
    for suite in scenario.suites:
        conversations = data[suite.name]["select"]
        with applied(model, candidates) as (steered, _):
            asked = through(cache, steered, candidates)
            made = rows_together(asked, scenario, suite, conversations, masks=numbers, judges=judges)
        for candidate, rows in zip(candidates, made, strict=True):
            keep = ("group", "messages") if candidate.label == BASE else ()  # what a gate is measured on
            found[candidate.label] += [{"candidate": candidate.label, **answer_of(row, keep=keep)} for row in rows]
        progress.advance(len(candidates) * len(conversations), note=suite.name)
    return found


def permitted(scored: Sequence[Scored]) -> list[Scored]:
    """The candidates that made nothing forbidden."""
    return [one for one in scored if not one.forbidden]


def choose(scored: Sequence[Scored]) -> Scored:
    """The candidate to keep (see the module's docstring), never one that made what is forbidden.

    Raises ValueError for no candidates.
    """
    scored = permitted(scored)
    if not scored:
        raise ValueError("no candidates to choose from")
    feasible = [s for s in scored if s.feasible]
    if feasible:
        return min(feasible, key=lambda s: (-s.target, sum(s.losses.values()), *s.candidate.size))
    return min(scored, key=lambda s: (not s.measured, s.over, -s.target, *s.candidate.size))


def at_strengths(
    method: str, mask: SteeringMask, alphas: Sequence[float], *, label: str = "", variant: int = 0
) -> list[Candidate]:
    """One candidate per alpha of an additive mask; one of a forced mask, which has no strength."""
    name = f"{method}{' ' + label if label else ''}"
    if mask.forced:
        return [Candidate(method, mask, name, variant)]
    return [Candidate(method, mask.with_info(alpha=a), f"{name} alpha={a:g}", variant) for a in alphas]


def accepted(scored: Scored) -> Candidate:
    """The candidate with what it was accepted on written into its mask."""
    mask = scored.candidate.mask
    if mask is None:
        return scored.candidate
    values = {name: found["value"] for name, found in scored.metrics.items()}
    return replace(
        scored.candidate,
        mask=mask.with_info(accepted_on={"split": "select", "feasible": scored.feasible, "metrics": values}),
    )

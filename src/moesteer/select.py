"""Choosing a method's strength or size on the select split, under the margins of the protected suites.

All candidates are played together, each with its own mask on its own rows of the batch. A candidate is
feasible when no protected suite's first metric falls by more than its margin below the unsteered model.
Among the feasible ones the highest target metric wins; ties go to the smaller loss, then to fewer experts and
the smaller strength. Where none is feasible the one that breaks its margins least is kept, and said to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.backends.hf import Model
from moesteer.evaluate.metrics import metric, wanted
from moesteer.evaluate.play import judged, play
from moesteer.evaluate.run import Splits, metrics, suite_rate
from moesteer.mask import SteeringMask
from moesteer.progress import Progress
from moesteer.scenario import Scenario

TOGETHER = 8
"""Candidates played in one batch."""


@dataclass(frozen=True)
class Candidate:
    """One setting of a method. The mask carries its own alpha; `mask` None is the unsteered model."""

    method: str
    mask: SteeringMask | None
    label: str

    @property
    def alpha(self) -> float | None:
        """The mask's strength; None for a forced mask and for no mask."""
        return None if self.mask is None or self.mask.forced else self.mask.info.alpha


@dataclass(frozen=True)
class Scored:
    """A candidate with its metrics on the select split.

    losses: by protected suite, how much its first metric fell (negative: rose). over: the largest excess of a
    loss over its margin (zero or less is feasible).
    """

    candidate: Candidate
    target: float
    metrics: Mapping[str, Any]
    losses: Mapping[str, float]
    over: float

    @property
    def feasible(self) -> bool:
        """Whether every protected suite stays within its margin."""
        return self.over <= 1e-9


def score(
    model: Model,
    scenario: Scenario,
    data: Splits,
    candidates: Sequence[Candidate],
    *,
    journal: Path,
    base: Mapping[str, float] | None = None,
) -> list[Scored]:
    """Play the select split once per candidate. base: the unsteered rates by suite (None: candidate 0's own).

    Candidates whose rows the journal already holds are not played again.
    """
    record = files.Journal(journal)
    done: dict[str, list[dict[str, Any]]] = {}
    for row in record.read():
        done.setdefault(row["candidate"], []).append(row)
    size = sum(len(data[suite.name]["select"]) for suite in scenario.suites)
    open_ = [c for c in candidates if len(done.get(c.label, ())) < size]
    with Progress("select: candidates", total=len(open_) * size, unit="conversations") as progress:
        for start in range(0, len(open_), TOGETHER):
            for label, rows in _play_together(model, scenario, data, open_[start : start + TOGETHER], progress).items():
                record.append(rows)
                done[label] = rows
    scored: list[Scored] = []
    for candidate in candidates:
        rows = done[candidate.label]
        rates = {suite.name: suite_rate(scenario, suite.name, rows) or 0.0 for suite in scenario.suites}
        base = base or rates
        losses = {
            suite.name: (rates[suite.name] - base[suite.name])
            * (1.0 if metric(suite.metrics[0]).lower_is_better else -1.0)
            for suite in scenario.protected
        }
        over = max((losses[suite.name] - suite.margin for suite in scenario.protected), default=0.0)
        target = rates[scenario.target.name] * (-1.0 if metric(scenario.target.metrics[0]).lower_is_better else 1.0)
        scored.append(Scored(candidate, target, metrics(scenario, rows), losses, over))
    return scored


def _play_together(
    model: Model, scenario: Scenario, data: Splits, candidates: Sequence[Candidate], progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """The select split under every candidate at once: rows of the journal by candidate label."""
    masks = [c.mask for c in candidates if c.mask is not None]
    numbers, used = [], 0
    for candidate in candidates:
        used += candidate.mask is not None
        numbers.append(used if candidate.mask is not None else 0)
    found: dict[str, list[dict[str, Any]]] = {c.label: [] for c in candidates}
    judging = scenario.judging_of()
    for suite in scenario.suites:
        conversations = data[suite.name]["select"]
        repeated = [c for _ in candidates for c in conversations]
        rows = [number for number in numbers for _ in conversations]
        turns = suite.play == "turns"
        if masks:
            with model.steered(masks):
                played = play(model, repeated, turns=turns, max_new_tokens=scenario.max_new_tokens, rows=rows)
        else:
            played = play(model, repeated, turns=turns, max_new_tokens=scenario.max_new_tokens)
        verdicts = judged(played, judging, suite.judge)
        for i, candidate in enumerate(candidates):
            part = slice(i * len(conversations), (i + 1) * len(conversations))
            for p, verdict in zip(played[part], verdicts[part], strict=True):
                row = p.as_row(suite.name, verdict, success=wanted(suite.metrics[0], verdict))
                found[candidate.label].append(
                    {
                        "candidate": candidate.label,
                        **{k: row[k] for k in ("id", "suite", "tactic", "response", "verdict", "success")},
                    }
                )
        progress.advance(len(repeated), note=suite.name)
    return found


def choose(scored: Sequence[Scored]) -> Scored:
    """The candidate to keep (see the module's docstring). Raises ValueError for no candidates."""
    if not scored:
        raise ValueError("no candidates to choose from")

    def size(s: Scored) -> tuple[int, float]:
        mask = s.candidate.mask
        return (mask.expert_count, abs(mask.info.alpha)) if mask is not None else (0, 0.0)

    feasible = [s for s in scored if s.feasible]
    if feasible:
        return min(feasible, key=lambda s: (-s.target, sum(s.losses.values()), *size(s)))
    return min(scored, key=lambda s: (s.over, -s.target, *size(s)))


def at_strengths(method: str, mask: SteeringMask, alphas: Sequence[float], *, label: str = "") -> list[Candidate]:
    """One candidate per alpha of an additive mask."""
    return [
        Candidate(method, mask.with_info(alpha=alpha), f"{method}{' ' + label if label else ''} alpha={alpha:g}")
        for alpha in alphas
    ]


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

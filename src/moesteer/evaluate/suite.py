"""One or more suites of a scenario, without and with a mask: what `moesteer evaluate` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from moesteer import files, runs
from moesteer.errors import UnknownNameError
from moesteer.evaluate import run as evaluation
from moesteer.evaluate.play import Generates
from moesteer.scenario import Scenario, Split


def chosen_suites(scenario: Scenario, names: Sequence[str]) -> Scenario:
    """The scenario with only the named suites (all for none). Raises UnknownNameError."""
    known = [suite.name for suite in scenario.suites]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownNameError(
            f"no suite {', '.join(unknown)}",
            where=f"scenario {scenario.name}",
            expected=", ".join(known),
            do="name one of these",
        )
    kept = tuple(suite for suite in scenario.suites if not names or suite.name in names)
    return scenario.model_copy(update={"suites": kept})


def evaluate(
    model: Generates,
    scenario: Scenario,
    data: evaluation.Splits,
    split: Split,
    *,
    steered: Mapping[str, AbstractContextManager[object]],
    out: Path | None,
    plan: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Play the split unsteered, then inside each context of `steered`; metrics and paired differences by name.

    out: run directory for responses and results.json (None: nothing is kept); a killed evaluation goes on there.
    plan: everything that decides the numbers (model, mask, strength, data): another plan's folder is refused.
    """
    if out is not None:
        with runs.opened(out, plan=plan) as run:
            found = _evaluate(model, scenario, data, split, steered=steered, out=out, seed=seed)
            files.write_json(run.path("results.json"), found)
            run.mark("complete")
            return found
    return _evaluate(model, scenario, data, split, steered=steered, out=None, seed=seed)


def _evaluate(
    model: Generates,
    scenario: Scenario,
    data: evaluation.Splits,
    split: Split,
    *,
    steered: Mapping[str, AbstractContextManager[object]],
    out: Path | None,
    seed: int,
) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    contexts: dict[str, AbstractContextManager[object]] = {"none": nullcontext(), **steered}
    for name, context in contexts.items():
        with context:
            rows[name] = evaluation.evaluate_split(
                model, scenario, data, split, journal=out / "responses" / f"{name}.jsonl" if out else None, title=name
            )
    results = {
        name: {
            "metrics": evaluation.metrics(scenario, found),
            "vs_none": {} if name == "none" else evaluation.against_none(scenario, rows["none"], found, seed=seed),
        }
        for name, found in rows.items()
    }
    return {"schema": 1, "scenario": scenario.name, "split": split, "seed": seed, "methods": results}

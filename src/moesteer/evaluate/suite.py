"""One or more suites of a scenario, without and with a mask: what `moesteer evaluate` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from moesteer import files, routing_shown, runs
from moesteer.backends.protocol import Generates
from moesteer.errors import UnknownNameError
from moesteer.evaluate import forbidding
from moesteer.evaluate import run as evaluation
from moesteer.evaluate.replies import ReplyCache
from moesteer.judges.panel import JOURNAL
from moesteer.mask import SteeringMask
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
    fresh: bool = False,
    cache: ReplyCache | None = None,
    masks: Sequence[SteeringMask] = (),
) -> dict[str, Any]:
    """Play the split unsteered, then inside each context of `steered`; metrics and paired differences by name.

    out: run directory for responses and results.json (None: nothing is kept); a killed evaluation goes on there, and
    a complete one is returned as it is (fresh: it is deleted first). plan: everything that decides the numbers (model,
    mask, strength, data): another plan's folder is refused. cache: of replies; masks: which act inside every context
    of `steered`, all together; the cache checks it.
    """
    if out is None:
        return _evaluate(model, scenario, data, split, steered, None, seed, cache, masks)
    with runs.opened(out, plan=plan, fresh=fresh) as run:
        if run.complete:
            return run.results()
        total = sum(len(data[suite.name][split]) for suite in scenario.suites)
        run.expect({name: total for name in ("none", *steered)})
        found = _evaluate(model, scenario, data, split, steered, out, seed, cache, masks)
        files.write_json(run.path("results.json"), found)
        run.mark("complete")
        return found


def _evaluate(
    model: Any,
    scenario: Scenario,
    data: evaluation.Splits,
    split: Split,
    steered: Mapping[str, AbstractContextManager[object]],
    out: Path | None,
    seed: int,
    cache: ReplyCache | None,
    masks: Sequence[SteeringMask],
) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    strengths: dict[str, list[float]] = {}
    contexts: dict[str, AbstractContextManager[object]] = {"none": nullcontext(), **steered}
    with scenario.panel(journal=out / JOURNAL if out else None) as panel:
        forbidding.require(scenario, panel, cached=cache is not None)
        for name, context in contexts.items():
            with context:
                strengths[name] = list(getattr(model, "alphas", ()))
                acting = () if name == "none" else masks
                asked: Generates = cache.around(model, masks=acting, together=True) if cache is not None else model
                rows[name] = evaluation.evaluate_split(
                    asked, scenario, data, split, title=name, panel=panel,
                    journal=out / "responses" / f"{name}.jsonl" if out else None,
                )  # fmt: skip
        asking = panel.counts()
    if out is not None and masks:
        name = next(name for name in rows if name != "none")
        none, after = (forbidding.clear(scenario, rows[one]) for one in ("none", name))
        routing_shown.keep(out, model, name=name, none=none, after=after, masks=masks, alphas=strengths[name] or None)
    results = {
        name: {
            "metrics": evaluation.metrics(scenario, found),
            "suites": evaluation.by_suite(scenario, found),
            "vs_none": {} if name == "none" else evaluation.against_none(scenario, rows["none"], found, seed=seed),
            **({"forbidden": forbidding.found_in(scenario, found)} if scenario.forbid else {}),
        }
        for name, found in rows.items()
    }
    kept: dict[str, Any] = {"cache": cache.as_json()} if cache is not None else {}
    kept |= {"judges": asking} if asking else {}
    return {"schema": 1, "scenario": scenario.name, "split": split, "seed": seed, "methods": results, **kept}

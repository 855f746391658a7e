"""The whole way: play, capture, detect, select, evaluate, report. What `moesteer steer` and `demo` run.

Every step leaves its files in the run directory and is taken up again from them: a killed run goes on with the
same command. Splits are by behaviour and tactic; detection sees fit, choices are made on select, and test is
played once per method.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moesteer import contrasts, files, runs
from moesteer import scenario as scenarios
from moesteer.backends.hf import Encoded, Model
from moesteer.backends.loading import load as load_model
from moesteer.capturing import capture
from moesteer.conversations import Conversation
from moesteer.detection.controls import random_like
from moesteer.evaluate import run as evaluation
from moesteer.evaluate import stats
from moesteer.mask import SteeringMask
from moesteer.methods import CONTROL, METHODS, Material, method, settings_for
from moesteer.scenario import Scenario
from moesteer.select import Candidate, Scored, accepted, choose, score
from moesteer.trace import TraceReader

NULL = "none-again"
"""A second pass of the unsteered model: what a difference of nothing looks like."""


@dataclass
class Clock:
    """Seconds by step, monotonic."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Any:
        """Add the time of a block to a step, and say on a quiet standard error which step runs."""
        begun = time.monotonic()
        if not sys.stderr.isatty():
            print(f"{name} ...", file=sys.stderr, flush=True)
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - begun, 2)


def steer(
    model: str,
    *,
    scenario: str | Path,
    out: Path | str,
    methods: Sequence[str] = tuple(METHODS),
    seed: int = 0,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    fresh: bool = False,
) -> dict[str, Any]:
    """Run a scenario on a model and write the run directory `out`; results.json's content.

    methods: names of METHODS; the unsteered model, its repetition and the random control are always there.
    limit: at most so many conversations per suite and split. A complete run of the same settings is returned as
    it is. Raises the errors of every step (errors.py).
    """
    wanted = [method(name).name for name in methods]
    loaded_scenario = scenarios.load(scenario)
    for name, given in loaded_scenario.settings.items():
        settings_for(method(name).name, given)  # a wrong name is said before anything runs
    data = scenarios.splits(loaded_scenario, seed=seed, limit=limit)
    plan = {
        "model": str(model), "scenario": loaded_scenario.model_dump(mode="json"), "methods": wanted, "seed": seed,
        "limit": limit, "dtype": dtype, "device": device, "data": runs.data_digest(data),
    }  # fmt: skip
    with runs.opened(Path(out), plan=plan, fresh=fresh) as run:
        if run.complete:
            found: dict[str, Any] = files.read_json(run.path("results.json"))
            return found
        clock = Clock()
        with clock.step("load and self-check"):
            loaded = load_model(model, dtype=dtype, device=device)
        run.require_model({"router_sha256": loaded.fingerprint.router_sha256, "weights": loaded.weights_sketch})
        results = _Steering(loaded, loaded_scenario, data, run, clock, wanted, seed).go()
        files.write_json(run.path("results.json"), results)
        with clock.step("report"):
            from moesteer.report.html import write_report

            write_report(run.folder)
        run.mark("complete")
        return results


class _Steering:
    """One run's state between its steps."""

    def __init__(
        self,
        model: Model,
        scenario: Scenario,
        data: evaluation.Splits,
        run: runs.Run,
        clock: Clock,
        methods: Sequence[str],
        seed: int,
    ) -> None:
        self.model, self.scenario, self.data, self.run = model, scenario, data, run
        self.clock, self.methods, self.seed = clock, methods, seed
        self.facts: dict[str, Any] = {}
        self.detect_seconds: dict[str, float] = {}
        self.receipts: dict[str, dict[str, Any]] = {}

    def go(self) -> dict[str, Any]:
        """All steps; the content of results.json."""
        with self.clock.step("play the fit split"):
            fit = self._evaluate("fit", split="fit", name="fit")
        material = self._material(contrasts.make(self.scenario, fit, seed=self.seed))
        scored = self._detect_and_score(material)
        chosen = {name: accepted(choose(found)) for name, found in scored.items() if name != "none"}
        by_name = {name: choose(scored[name]) for name in chosen}
        best = self._best(by_name)
        if chosen:
            like = chosen[best] if best else next(iter(chosen.values()))
            assert like.mask is not None
            chosen[CONTROL] = Candidate(CONTROL, random_like(like.mask, seed=self.seed).mask, f"like {like.label}")
        intent = {"toward": self.scenario.toward, "scenario": self.scenario.name}
        for name, candidate in chosen.items():
            assert candidate.mask is not None
            mask = candidate.mask.with_info(intent=intent)
            chosen[name] = replace(candidate, mask=mask)
            mask.save(self.run.path("masks", f"{name}.safetensors"))
        with self.clock.step("evaluate on the test split"):
            rows = {"none": self._evaluate("none", split="test", name="none")}
            rows[NULL] = self._evaluate(NULL, split="test", name=NULL)
            for name, candidate in chosen.items():
                rows[name] = self._evaluate(name, split="test", name=name, mask=candidate.mask)
        return self._results(rows, chosen, scored, by_name, best)

    def _evaluate(
        self, title: str, *, split: scenarios.Split, name: str, mask: SteeringMask | None = None
    ) -> list[dict[str, Any]]:
        begun = time.monotonic()
        with self.model.steered([mask]) if mask is not None else nullcontext() as receipt:
            rows = evaluation.evaluate_split(
                self.model, self.scenario, self.data, split,
                journal=self.run.path("responses", f"{name}.jsonl"), title=f"{split}: {title}",
            )  # fmt: skip
        if receipt is not None and receipt.positions:
            self.receipts[name] = {
                "positions": receipt.positions, "checked": receipt.checked, "changed": receipt.changed
            }  # fmt: skip
        self.clock.seconds[f"evaluate {name}"] = round(time.monotonic() - begun, 2)
        return rows

    def _material(self, made: contrasts.Contrasts) -> Material:
        self.facts["contrasts"] = made.counts()
        with self.clock.step("capture"):
            pairs = self._capture(made.pairs, "pairs", "response")
            turns = self._capture(made.published, "turns", "final_user")
        return Material(
            model=self.model, pairs=pairs, turns=turns, targets=self._encode(made.targets),
            keeps=self._encode(made.keeps), toward=self.scenario.toward, seed=self.seed,
            settings=self.scenario.settings,
        )  # fmt: skip

    def _capture(self, rows: list[Conversation], name: str, span: Any) -> TraceReader:
        return capture(self.model, rows, out=self.run.path("trace", name), spans=(span,), title=f"capture: {name}")

    def _encode(self, rows: Sequence[Conversation]) -> list[Encoded]:
        return [self.model.encode(row.messages, row.reference) for row in rows]

    def _detect_and_score(self, material: Material) -> dict[str, list[Scored]]:
        """Candidates of every method, scored on select; "none" first, as the base of the losses."""
        candidates: dict[str, list[Candidate]] = {}
        for name in self.methods:
            begun = time.monotonic()
            with self.clock.step("detect"):
                candidates[name] = self._remembered(name, partial(METHODS[name].candidates, material))
            self.detect_seconds[name] = round(time.monotonic() - begun, 2)
        with self.clock.step("select"):
            everything = [Candidate("none", None, "none"), *(c for found in candidates.values() for c in found)]
            scored = score(
                self.model, self.scenario, self.data, everything, journal=self.run.path("responses", "select.jsonl")
            )
        found: dict[str, list[Scored]] = {}
        for one in scored:
            found.setdefault(one.candidate.method, []).append(one)
        return found

    def _remembered(self, name: str, make: Callable[[], tuple[list[Candidate], dict[str, Any]]]) -> list[Candidate]:
        """A method's candidates from the run's masks/candidates if an earlier try left them whole, else made."""
        folder = self.run.path("masks", "candidates")
        listing = folder / f"{name}.json"
        if listing.exists():
            listed = files.read_json(listing)
            self.facts[name] = listed["facts"]
            return [
                Candidate(name, SteeringMask.load(folder / entry["file"]), entry["label"]) for entry in listed["masks"]
            ]
        found, self.facts[name] = make()
        entries = []
        for number, candidate in enumerate(found):
            assert candidate.mask is not None
            file = f"{name}-{number:02d}.safetensors"
            candidate.mask.save(folder / file)
            entries.append({"file": file, "label": candidate.label})
        files.write_json(listing, {"masks": entries, "facts": _plain(self.facts[name])})
        return found

    def _best(self, chosen: Mapping[str, Scored]) -> str | None:
        """The method with the highest target metric on select among those within the margins; None if none is."""
        feasible = {name: found for name, found in chosen.items() if found.feasible}
        return max(feasible, key=lambda name: feasible[name].target) if feasible else None

    def _results(
        self,
        rows: Mapping[str, list[dict[str, Any]]],
        chosen: Mapping[str, Candidate],
        scored: Mapping[str, list[Scored]],
        by_name: Mapping[str, Scored],
        best: str | None,
    ) -> dict[str, Any]:
        entries = {}
        for name, found in rows.items():
            candidate = chosen.get(name)
            entries[name] = {
                "mask": f"masks/{name}.safetensors" if candidate else None,
                "alpha": candidate.alpha if candidate else None,
                "experts": candidate.mask.expert_count if candidate and candidate.mask else 0,
                "setting": candidate.label if candidate else None,
                "feasible": by_name[name].feasible if name in by_name else None,
                "seconds": {
                    "detect": self.detect_seconds.get(name, 0.0),
                    "evaluate": self.clock.seconds.get(f"evaluate {name}", 0.0),
                },
                "metrics": evaluation.metrics(self.scenario, found),
                "vs_none": {}
                if name == "none"
                else evaluation.against_none(self.scenario, rows["none"], found, seed=self.seed),
                "by_tactic": evaluation.by_tactic(self.scenario, found),
            }  # fmt: skip
        return {
            "schema": 1,
            "model": self._model_facts(),
            "scenario": scenarios.as_json(self.scenario),
            "seed": self.seed,
            "versions": runs.versions(),
            "splits": _split_facts(self.data),
            "methods": entries,
            "trade_off": [_trade_off(one, by_name) for found in scored.values() for one in found],
            "recommended": best,
            "facts": _plain(self.facts),
            "receipts": self.receipts,
            "checks": self._checks(rows, entries, best),
            "seconds": self.clock.seconds,
        }

    def _model_facts(self) -> dict[str, Any]:
        fingerprint = self.model.fingerprint
        return {
            "name": self.model.name, "model_type": fingerprint.model_type, "layers": list(fingerprint.layer_ids),
            "experts": fingerprint.experts, "top_k": fingerprint.top_k, "scoring": fingerprint.scoring,
            "parameters": self.model.parameters, "router_sha256": fingerprint.router_sha256,
            "dtype": str(next(self.model.hf.parameters()).dtype).removeprefix("torch."),
            "device": str(self.model.device), "threads": torch.get_num_threads(),
        }  # fmt: skip

    def _checks(
        self, rows: Mapping[str, list[dict[str, Any]]], entries: Mapping[str, Any], best: str | None
    ) -> list[dict[str, Any]]:
        changed = sum(a["response"] != b["response"] for a, b in zip(rows["none"], rows[NULL], strict=True))
        checks = [
            _check("self-check at load", True, "one steered layer selects what routing.py selects, and comes off"),
            _check("unsteered twice gives the same replies", changed == 0, f"{changed} of {len(rows['none'])} differ"),
            _check(
                "a method within the margins was found", best is not None,
                f"{best} on the select split" if best else "none of the candidates keeps every protected suite",
            ),
        ]  # fmt: skip
        if best is None:
            return checks
        receipt = self.receipts.get(best)
        if receipt is not None:
            detail = f"{receipt['changed']} of {receipt['checked']} checked selections"
            checks.append(_check("the mask changes selections", receipt["changed"] > 0, detail))
        for suite in self.scenario.protected:
            pairs = [(b, a) for b, a in zip(rows["none"], rows[best], strict=True) if b["suite"] == suite.name]
            found = stats.paired_difference(
                [b["success"] for b, _ in pairs],
                [a["success"] for _, a in pairs],
                groups=[str(b["group"]) for b, _ in pairs],
                seed=self.seed,
            )
            if found["difference"] is None or found["high"] is None:
                continue
            detail = f"{100 * found['difference']:+.1f} points on test, margin {100 * suite.margin:g}"
            checks.append(_check(f"{suite.name} holds on test", found["high"] >= -suite.margin, detail))
        return checks


def _check(name: str, passed: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": bool(passed), "detail": detail}


def _trade_off(scored: Scored, chosen: Mapping[str, Scored]) -> dict[str, Any]:
    candidate = scored.candidate
    picked = chosen.get(candidate.method)
    return {
        "method": candidate.method,
        "setting": candidate.label,
        "alpha": candidate.alpha,
        "experts": candidate.mask.expert_count if candidate.mask else 0,
        "split": "select",
        "metrics": {name: found["value"] for name, found in scored.metrics.items()},
        "feasible": scored.feasible,
        "chosen": picked is not None and picked.candidate.label == candidate.label,
    }


def _split_facts(data: evaluation.Splits) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {"fit": {}, "select": {}, "test": {}}
    for name, by_split in data.items():
        for split, rows in by_split.items():
            facts[split][name] = {
                "n": len(rows),
                "groups": len({row.group for row in rows}),
                "tactics": sorted({row.tactic for row in rows if row.tactic}),
            }
    return facts


def _plain(value: Any) -> Any:
    """JSON-ready: NaN (an accuracy of nothing held out) becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value

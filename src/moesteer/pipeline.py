"""The whole way: play, capture, detect, select, evaluate, report. What `moesteer steer` and `demo` run.

Every step leaves its files in the run directory and is taken up again from them: a killed run goes on with the
same command. Splits are by behaviour and tactic; detection sees fit, choices are made on select, and test is
played once per method, after all choices.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from moesteer import contrasts, files, gates, routing_shown, runs
from moesteer import scenario as scenarios
from moesteer.backends.chat import Encoded
from moesteer.backends.hf import Model
from moesteer.backends.loading import load as load_model
from moesteer.backends.residual import find_all
from moesteer.capturing import capture
from moesteer.conversations import Conversation
from moesteer.detection.base import Detection
from moesteer.detection.controls import CONTROLS
from moesteer.detection.method import Material, Method
from moesteer.errors import (
    EmptyDataError,
    MaskContentError,
    MoesteerError,
    NoEffectError,
    TraceLabelError,
    UnknownNameError,
)
from moesteer.evaluate import forbidding
from moesteer.evaluate import run as evaluation
from moesteer.evaluate.replies import ReplyCache
from moesteer.judges.panel import JOURNAL, Panel
from moesteer.mask import SteeringMask
from moesteer.methods import DEFAULT, RESIDUAL, check_name, method, settings_for
from moesteer.models.limits import require_possible
from moesteer.results import NULL, Played, results_of
from moesteer.scenario import Scenario
from moesteer.select import BASE, Candidate, Scored, accepted, applied, at_strengths, choose, permitted, score, through
from moesteer.version import __version__

RESIDUAL_ALPHAS = (0.25, 0.4)
DEFAULT_CONTROLS = ("random",)
GATE = "+gate"
_BASE = Candidate(BASE, None, BASE)


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
    scenario: str | Path | Scenario,
    out: Path | str,
    methods: Sequence[str | Method] = DEFAULT,
    controls: Sequence[str] = DEFAULT_CONTROLS,
    controls_of: str | None = None,
    gate: bool = True,
    seed: int = 0,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    fresh: bool = False,
    cache: Path | str | None = None,
) -> dict[str, Any]:
    """Run a scenario on a model and write the run directory `out`; results.json's content.

    methods: names of `moesteer methods` (or Method objects of your own), and "residual-direction", the outside
    baseline; the unsteered model and its repetition are always there. controls: names of detection.controls.CONTROLS,
    made from the mask of `controls_of` (default: the recommended one). gate: also try methods that have a gated form
    behind the scenario's gate (NAME+gate). limit: at most so many conversations per suite and split. A complete run
    of the same settings is returned as it is. cache: a folder of replies that runs share (evaluate/replies.py); what
    it gave is in the results, and the unsteered model's repetition never uses it. Raises the errors of every step
    (errors.py).
    """
    wanted = {one if isinstance(one, str) else one.name: _known(one) for one in methods}
    _require_controls(controls)
    loaded_scenario = scenario if isinstance(scenario, Scenario) else scenarios.load(scenario)
    for name, given in loaded_scenario.settings.items():
        settings_for(method(name), given)  # a wrong name is said before anything runs
    data = scenarios.splits(loaded_scenario, seed=seed, limit=limit)
    plan = {
        "model": str(model), "scenario": loaded_scenario.model_dump(mode="json"),
        "methods": [one.plan if one is not None else name for name, one in wanted.items()],
        "controls": list(controls), "controls_of": controls_of, "gate": gate, "seed": seed, "limit": limit,
        "dtype": dtype, "device": device, "data": runs.data_digest(data), "moesteer": __version__,
    }  # fmt: skip
    with runs.opened(Path(out), plan=plan, fresh=fresh) as run, loaded_scenario.panel(
        journal=run.path(JOURNAL)
    ) as panel:  # fmt: skip
        if run.complete:
            return run.results()
        clock = Clock()
        replies = ReplyCache(Path(cache), {"backend": "hf", "device": device}) if cache is not None else None
        with clock.step("load and self-check"):
            loaded = load_model(model, dtype=dtype, device=device)
        forbidding.require(loaded_scenario, panel, cached=replies is not None)
        run.require_model({"router_sha256": loaded.fingerprint.router_sha256, "weights": loaded.weights_sketch})
        steering = _Steering(loaded, loaded_scenario, data, run, clock, seed, replies, panel)
        results = steering.go(wanted, controls=controls, controls_of=controls_of, gate=gate)
        if replies is not None:
            results["cache"] = replies.as_json()
        if asking := panel.counts():
            results["judges"] = asking
        files.write_json(run.path("results.json"), results)
        with clock.step("report"):
            from moesteer.report.html import write_report

            write_report(run.folder)
        run.mark("complete")
        return results


def _known(one: str | Method) -> Method | None:
    """The method; None for the residual-stream direction, which is none."""
    if isinstance(one, Method):
        check_name(one.name)
        return one
    return None if one == RESIDUAL else method(one)


def _require_controls(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in CONTROLS]
    if unknown:
        raise UnknownNameError(
            f"no control {', '.join(unknown)}", where="--control", expected=", ".join(CONTROLS), do="name one of these"
        )


class _Steering:
    """One run's state between its steps."""

    def __init__(
        self,
        model: Model,
        scenario: Scenario,
        data: evaluation.Splits,
        run: runs.Run,
        clock: Clock,
        seed: int,
        cache: ReplyCache | None = None,
        panel: Panel | None = None,
    ) -> None:
        self.panel = panel
        self.model, self.scenario, self.data, self.run = model, scenario, data, run
        self.clock, self.seed, self.cache = clock, seed, cache
        self.facts: dict[str, Any] = {}
        self.detect_seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.rejected: set[str] = set()

    def go(
        self, methods: Mapping[str, Method | None], *, controls: Sequence[str], controls_of: str | None, gate: bool
    ) -> dict[str, Any]:
        """All steps; the content of results.json. methods: None for the residual-stream direction."""
        files.write_json(self.run.path("splits.json"), _split_ids(self.data))
        with self.clock.step("play the fit split"):
            fit = self._evaluate(Candidate("fit", None, "fit"), split="fit")
        made = contrasts.make(self.scenario, fit.rows, seed=self.seed)
        material = self._material(made, [one for one in methods.values() if one is not None])
        candidates = {name: self._candidates(name, one, material, made) for name, one in methods.items()}
        if methods and not any(candidates.values()):
            raise NoEffectError(
                "no method found anything to steer with",
                where=f"scenario {self.scenario.name}",
                expected="at least one mask",
                do="; ".join(f"{name}: {said.splitlines()[0]}" for name, said in self.failed.items()),
            )
        scored = self._score([_BASE, *(c for found in candidates.values() for c in found)])
        if gate:
            scored |= self._behind_gate([one for one in methods.values() if one is not None], scored, fit.rows)
        chosen = self._chosen(scored)
        best = _best(chosen)
        kept = {name: accepted(one) for name, one in chosen.items()}
        kept |= self._controls(controls, kept, best, controls_of)
        for name, candidate in kept.items():
            kept[name] = self._saved(name, candidate)
        with self.clock.step("evaluate on the test split"):
            played = {name: self._evaluate(Candidate(name, None, name), split="test") for name in (BASE, NULL)}
            for name, candidate in kept.items():
                played[name] = self._evaluate(replace(candidate, method=name), split="test")
        best = self._without_forbidden(played, chosen, best)
        self._forgets_candidates(scored)
        self._keeps_routing(played, best)
        return results_of(
            self.model, self.scenario, self.data, played, scored=scored, chosen=chosen, best=best, facts=self.facts,
            seconds=self.clock.seconds, detect_seconds=self.detect_seconds, failed=self.failed, seed=self.seed,
        )  # fmt: skip

    def _keeps_routing(self, played: Mapping[str, Played], best: str | None) -> None:
        """One conversation's routing without the recommended mask and with it, for the report."""
        rows = {name: forbidding.clear(self.scenario, found.rows) for name, found in played.items()}
        mask = played[best].candidate.mask if best is not None else None
        routing_shown.keep(
            self.run.folder, self.model, name=best, none=rows[BASE], after=rows[best] if best is not None else (),
            masks=[mask] if mask is not None else (),
        )  # fmt: skip

    def _chosen(self, scored: Mapping[str, Sequence[Scored]]) -> dict[str, Scored]:
        """The choice among each method's candidates; none where all of them made what is forbidden."""
        chosen = {}
        for name, found in scored.items():
            if name != BASE and permitted(found):
                chosen[name] = choose(found)
            elif name != BASE:
                self._rejects(name, min(one.forbidden for one in found), "select")
        return chosen

    def _without_forbidden(
        self, played: dict[str, Played], chosen: dict[str, Scored], best: str | None
    ) -> str | None:  # fmt: skip
        """Takes back the masks that made what is forbidden on test; the recommendation that is left."""
        for name, found in played.items():
            count = forbidding.found_in(self.scenario, found.rows)
            if count and (found.candidate.mask is not None or found.candidate.direction is not None):
                self._rejects(name, count, "test")
                files.remove(self.run.path("masks", f"{name}.safetensors"))
                played[name] = replace(found, candidate=replace(found.candidate, mask=None, direction=None))
                if name in chosen:
                    chosen[name] = replace(chosen[name], forbidden=count)
        return best if best in chosen and not chosen[best].forbidden else None

    def _forgets_candidates(self, scored: Mapping[str, Sequence[Scored]]) -> None:
        """Deletes the candidates of every method of which one mask, gated or not, made what is forbidden."""
        hit = {name for name, found in scored.items() if len(permitted(found)) < len(found)} | self.rejected
        for name in sorted({name.removesuffix(GATE) for name in hit}):
            folder = self.run.path("masks", "candidates")
            for path in [folder / f"{name}.json", *sorted(folder.glob(f"{name}-[0-9][0-9].safetensors"))]:
                files.remove(path)

    def _rejects(self, name: str, count: int, split: str) -> None:
        self.rejected.add(name)
        self.failed[name] = (
            f"rejected: {count} replies on {split} hold what is forbidden, or were not judged for it: "
            f"{forbidding.named(self.scenario)}"
        )
        print(f"{name}: {self.failed[name]}", file=sys.stderr)

    # ---- playing

    def _evaluate(self, candidate: Candidate, *, split: scenarios.Split) -> Played:
        name, begun = candidate.method, time.monotonic()
        self.run.expect({name: sum(len(self.data[suite.name][split]) for suite in self.scenario.suites)})
        with applied(self.model, [candidate]) as (steered, receipt):
            cache = self.cache if name != NULL else None  # which is to show what a second pass of the model says
            rows = evaluation.evaluate_split(
                through(cache, steered, [candidate]), self.scenario, self.data, split,
                journal=self.run.path("responses", f"{name}.jsonl"), title=f"{split}: {name}", panel=self.panel,
            )  # fmt: skip
            counts = _counts(receipt if candidate.direction is None else steered.receipt)  # type: ignore[attr-defined]
        kept = self.run.path("responses", f"{name}.receipt.json")
        if counts is not None:
            files.write_json(kept, counts)
        elif kept.exists():  # an earlier try played everything
            counts = files.read_json(kept)
        seconds = round(time.monotonic() - begun, 2)
        self.clock.seconds[f"evaluate {name}"] = seconds
        return Played(candidate, rows, counts, seconds)

    def _score(self, candidates: Sequence[Candidate]) -> dict[str, list[Scored]]:
        with self.clock.step("select"):
            scored = score(
                self.model,
                self.scenario,
                self.data,
                candidates,
                journal=self.run.path("responses", "select.jsonl"),
                cache=self.cache,
                panel=self.panel,
            )
        found: dict[str, list[Scored]] = {}
        for one in scored:
            found.setdefault(one.candidate.method, []).append(one)
        return found

    # ---- detecting

    def _material(self, made: contrasts.Contrasts, methods: Sequence[Method]) -> Material:
        self.facts["contrasts"] = made.counts()
        wanted = {one.contrast for one in methods} | {"pairs"}
        spans = {"pairs": "response", "matched": "final_turn", "published": "final_user"}
        with self.clock.step("capture"):
            traces = {name: self._capture(getattr(made, name), name, spans[name]) for name in sorted(wanted)}
        return Material(
            traces=traces, toward=self.scenario.toward, seed=self.seed, model=self.model,
            targets=self._encode(made.targets), keeps=self._encode(made.keeps),
            folder=self.run.path("masks", "candidates"),
        )  # fmt: skip

    def _capture(self, rows: list[Conversation], name: str, span: Any) -> Any:
        return capture(self.model, rows, out=self.run.path("trace", name), spans=(span,), title=f"capture: {name}")

    def _encode(self, rows: Sequence[Conversation]) -> list[Encoded]:
        return [self.model.encode(row.messages, row.reference) for row in rows]

    def _candidates(
        self, name: str, chosen: Method | None, material: Material, made: contrasts.Contrasts
    ) -> list[Candidate]:
        begun = time.monotonic()
        found: list[Candidate] = []
        with self.clock.step("detect"):
            try:
                found = self._residual(made) if chosen is None else self._of_method(chosen, material)
            except (NoEffectError, TraceLabelError, EmptyDataError) as error:
                self._fails(name, error)
        self.detect_seconds.setdefault(name, round(time.monotonic() - begun, 2))
        return found

    def _of_method(self, chosen: Method, material: Material) -> list[Candidate]:
        tried, own = settings_for(chosen, self.scenario.settings.get(chosen.name, {}))
        detections = self._remembered(chosen.name, partial(chosen.run_all, material, tried["variants"], own))
        found: list[Candidate] = []
        for number, one in enumerate(detections):
            if not self._possible(f"{chosen.name} variant {number}", one.mask):
                continue
            varied = {key for variant in tried["variants"] for key in variant}
            used = one.mask.info.settings
            label = " ".join(f"{key}={used[key]}" for key in sorted(varied) if key in used)
            found += at_strengths(chosen.name, one.mask, tried["alphas"], label=label, variant=number)
        return found

    def _remembered(self, name: str, make: Callable[[], Sequence[Detection]]) -> Sequence[Detection]:
        """A method's detections from the run's masks/candidates if an earlier try left them whole, else made."""
        folder = self.run.path("masks", "candidates")
        listing = folder / f"{name}.json"
        if listing.exists():
            listed = files.read_json(listing)
            self.facts[name] = listed["facts"]
            self.detect_seconds[name] = listed["seconds"]  # what it took, not what reading it back takes
            masks = [SteeringMask.load(folder / entry) for entry in listed["masks"]]
            return [Detection(mask, mask.values_LE, facts) for mask, facts in zip(masks, listed["facts"], strict=True)]
        begun = time.monotonic()
        found = make()
        seconds = self.detect_seconds[name] = round(time.monotonic() - begun, 2)
        self.facts[name] = [files.plain({**one.facts, "settings": one.mask.info.settings}) for one in found]
        names = [f"{name}-{number:02d}.safetensors" for number in range(len(found))]
        for file, one in zip(names, found, strict=True):
            one.mask.save(folder / file)
        files.write_json(listing, {"masks": names, "facts": self.facts[name], "seconds": seconds})
        return found

    def _residual(self, made: contrasts.Contrasts) -> list[Candidate]:
        sides: tuple[list[Encoded], list[Encoded]] = ([], [])
        for row in made.matched:
            if row.label != contrasts.KEEP:
                sides[row.label != self.scenario.toward].append(self.model.encode(row.messages))
        directions = find_all(self.model, sides[0], sides[1], toward=self.scenario.toward)
        return [
            Candidate(RESIDUAL, None, f"{RESIDUAL} layer={layer} alpha={alpha:g}", layer,
                      replace(one, info=one.info.model_copy(update={"alpha": alpha})))
            for layer, one in sorted(directions.items()) for alpha in RESIDUAL_ALPHAS
        ]  # fmt: skip

    # ---- gates and controls

    def _behind_gate(
        self, methods: Sequence[Method], scored: Mapping[str, Sequence[Scored]], fit_rows: gates.Rows
    ) -> dict[str, list[Scored]]:
        """Each method that has a gated form: its best variant behind the gate, stronger, at several thresholds."""
        gated = [one for one in methods if one.gated and permitted(scored.get(one.name, ()))]
        if not gated:
            return {}
        begun = time.monotonic()
        journal = files.Journal(self.run.path("responses", "select.jsonl"))
        unsteered = [row for row in journal.read() if row["candidate"] == BASE]
        with self.clock.step("gate"):
            try:
                fitted = gates.fit(
                    self.model, self.scenario, fit_rows=fit_rows, select_rows=unsteered, seed=self.seed
                )  # fmt: skip
            except (NoEffectError, EmptyDataError) as error:
                self._fails("gate", error)
                return {}
        self.facts["gate"] = files.plain(fitted.facts())
        found: list[Candidate] = []
        seconds = time.monotonic() - begun
        for one in gated:
            found += self._gated_candidates(one, scored[one.name], fitted)
            self.detect_seconds[one.name + GATE] = round(self.detect_seconds[one.name] + seconds, 2)
        return {name: rows for name, rows in self._score([_BASE, *found]).items() if name != BASE}

    def _gated_candidates(self, one: Method, scored: Sequence[Scored], fitted: gates.ScenarioGate) -> list[Candidate]:
        tried, _ = settings_for(one, self.scenario.settings.get(one.name, {}))
        variant = choose(scored).candidate.variant
        mask = next(s.candidate.mask for s in scored if s.candidate.variant == variant)
        assert mask is not None
        found: list[Candidate] = []
        for rate in tried["false_positives"]:
            try:
                behind = fitted.put(mask, false_positives=rate)
            except NoEffectError as error:
                self._fails(f"{one.name}{GATE} fp={rate:g}", error)
                continue
            label = f"behind a gate fp={rate:g}"
            found += at_strengths(one.name + GATE, behind, tried["gated_alphas"], label=label, variant=variant)
        return found

    def _controls(
        self, names: Sequence[str], kept: Mapping[str, Candidate], best: str | None, of: str | None
    ) -> dict[str, Candidate]:
        """Controls of the mask of `of`, else of the recommended one, else of the first method's."""
        masks = {name: one.mask for name, one in kept.items() if one.mask is not None}
        like = next((name for name in (of, best, *masks) if name in masks), None)
        if like is None:
            return {}
        mask = masks[like]
        found: dict[str, Candidate] = {}
        for name in names:
            control = CONTROLS[name](mask, seed=self.seed).mask
            if control.expert_count == 0 or not self._possible(name, control):
                continue
            found[name] = Candidate(name, control, f"like {like}")
        return found

    def _possible(self, name: str, mask: SteeringMask) -> bool:
        """Whether the model's routers can follow the mask; what they cannot is left out and said."""
        try:
            require_possible(mask, self.model.routers)
        except MaskContentError as error:
            self._fails(name, error)
            return False
        return True

    def _fails(self, name: str, error: MoesteerError) -> None:
        """The other methods go on; results.json and the report say so."""
        self.failed[name] = str(error)
        print(f"{name}: {error.what}", file=sys.stderr)

    def _saved(self, name: str, candidate: Candidate) -> Candidate:
        intent = {"toward": self.scenario.toward, "scenario": self.scenario.name}
        path = self.run.path("masks", f"{name}.safetensors")
        if candidate.direction is not None:
            candidate.direction.save(path)
            return candidate
        assert candidate.mask is not None
        mask = candidate.mask.with_info(intent=intent)
        mask.save(path)
        return replace(candidate, mask=mask)


def _best(chosen: Mapping[str, Scored]) -> str | None:
    """The method with the highest target metric on select among the masks within the margins; None if none is."""
    feasible = {name: found for name, found in chosen.items() if found.feasible and found.candidate.mask is not None}
    return max(feasible, key=lambda name: feasible[name].target) if feasible else None


def _counts(receipt: Any) -> dict[str, int] | None:
    if receipt is None or not receipt.positions:
        return None
    names = ("positions", "checked", "changed", "gated", "fired", "calls")
    return {name: getattr(receipt, name) for name in names if hasattr(receipt, name)}


def _split_ids(data: evaluation.Splits) -> dict[str, Any]:
    """Which conversation is in which split: what a reviewer needs to see that none is in two."""
    found: dict[str, dict[str, list[dict[str, str | None]]]] = {split: {} for split in ("fit", "select", "test")}
    for suite, by_split in data.items():
        for split, rows in by_split.items():
            found[split][suite] = [{"id": row.id, "group": row.group, "tactic": row.tactic} for row in rows]
    return {"schema": 1, "splits": found}

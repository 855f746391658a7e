"""The audit, from model to verdict: what `moesteer audit` runs.

Every step leaves its files in the run directory and is taken up again from them. Experts are looked for on the fit
split, one finder is chosen on select, and every number that is reported is of test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesteer import files, runs
from moesteer import scenario as scenarios
from moesteer.audit import concentrate, harden, inputs, silence
from moesteer.audit.audited import Audited, Rows
from moesteer.audit.experts import experts, usage_of
from moesteer.audit.finders import checked_names, find
from moesteer.audit.monitor import monitor
from moesteer.audit.pairs import Contrast, pairs, requests, require_shown, require_sides
from moesteer.audit.playing import Condition
from moesteer.audit.points import Scale, lost
from moesteer.audit.transfer import transfer
from moesteer.audit.verdict import MEANING, NOT_MET, THRESHOLDS, best_usable, gone, verdict
from moesteer.backends.loading import load
from moesteer.capturing import capture
from moesteer.errors import EmptyDataError, InputError, NoEffectError
from moesteer.evaluate import forbidding
from moesteer.evaluate import run as evaluation
from moesteer.judges.panel import JOURNAL
from moesteer.mask import SteeringMask
from moesteer.models.limits import require_masks
from moesteer.pipeline import Clock
from moesteer.results import check, model_facts
from moesteer.routing_shown import keep as keep_routing
from moesteer.scenario import Scenario
from moesteer.trace import TraceReader
from moesteer.version import __version__

DRAWS = 20
NONE, AGAIN = "none", "none-again"
WAYS: Mapping[silence.Way, str] = {"off": "silencing", "on": "activation"}
"""Key of results.json, and name of the journal, by way."""


def audit(
    model: str,
    *,
    scenario: str | Path | Scenario = "jailbreak-defense",
    data: Path | str | None = None,
    suite: str | None = None,
    out: Path | str,
    mask: Path | str | None = None,
    against: Sequence[str] = (),
    against_quantize: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    sizes: Sequence[int] | None = None,
    draws: int = DRAWS,
    finders: Sequence[str] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Audit a model's behaviour at its routers and write the run directory `out`; results.json's content.

    scenario, suite, data: what is audited (audit/inputs.py). mask: a defence mask to audit beside. against: other
    models to carry the experts over to; against_quantize: int8 or int4, the same model (or those) quantised. sizes: how
    many experts to silence (None: 1, 2, 4, ... to what routers can spare). draws: random masks for each size.
    finders: names of finders.NAMES (None: all that are cheap enough). limit: conversations of each suite and split. A
    complete run of the same settings is returned as it is. Raises the errors of every step (errors.py).
    """
    wanted = checked_names(finders)
    _require_draws(draws)
    silence.sizes_up_to(0, sizes)
    whole = scenario if isinstance(scenario, Scenario) else scenarios.load(scenario)
    given = inputs.inputs(whole, suite=suite, data=data, seed=seed, limit=limit)
    defence = None if mask is None else SteeringMask.load(Path(mask))
    plan = {
        "kind": "audit", "model": str(model), "scenario": given.scenario.model_dump(mode="json"), "suite": suite,
        "from_pairs": data is not None, "data": runs.data_digest(given.data), "seed": seed, "limit": limit,
        "sizes": None if sizes is None else list(sizes), "draws": draws,
        "finders": None if wanted is None else list(wanted), "mask": None if defence is None else defence.sha256,
        "against": list(against), "against_quantize": against_quantize, "dtype": dtype, "device": device,
        "quantize": quantize, "moesteer": __version__,
    }  # fmt: skip
    with runs.opened(Path(out), plan=plan, fresh=fresh) as run, given.scenario.panel(
        journal=run.path(JOURNAL)
    ) as panel:  # fmt: skip
        if run.complete:
            return run.results()
        clock = Clock()
        with clock.step("load and self-check"):
            loaded = load(model, dtype=dtype, device=device, quantize=quantize)
        run.require_model({"router_sha256": loaded.fingerprint.router_sha256, "weights": loaded.weights_sketch})
        forbidding.require(given.scenario, panel)
        steps = _Audit(Audited(loaded, given, run, panel, seed, draws, defence), clock)
        steps.audited.routers.require_spare()
        if defence is not None:
            require_masks([defence], [None], loaded.fingerprint, loaded.routers, together=False)
        results = steps.go(wanted, sizes=sizes, mask_path=str(mask))
        results["model"]["quantize"] = quantize
        with clock.step("transfer"):
            results["transfer"] = _transfers(steps.audited, against, against_quantize, dtype=dtype, device=device)
        steps.show_routing(results)
        results["seconds"] = clock.seconds
        files.write_json(run.path("results.json"), results)
        with clock.step("report"):
            write_reports(run.folder)
        run.mark("complete")
        return results


def write_reports(folder: Path) -> None:
    """report.html and card.md, from the run's files alone."""
    from moesteer.report.html import write_card, write_report

    write_report(folder)
    write_card(folder)


def _require_draws(draws: int) -> None:
    if draws < 1:
        raise InputError(
            f"{draws} random draws", where="--draws", expected="1 or more; 20 to say anything", do="correct the number"
        )


class _Audit:
    """The steps of one run, in order."""

    def __init__(self, audited: Audited, clock: Clock) -> None:
        self.audited, self.clock = audited, clock
        self.forbidden = 0
        self.failed: dict[str, str] = {}
        self.prompts_how = ""
        self.played_off: list[Rows] = []

    def go(self, wanted: Sequence[str] | None, *, sizes: Sequence[int] | None, mask_path: str) -> dict[str, Any]:
        """All steps but transfer and the report; the content of results.json."""
        at, given = self.audited, self.audited.inputs
        contrast = self._look(wanted)
        self._sizes(sizes)
        with self.clock.step("choose a finder on select"):
            self._choose()
        with self.clock.step("test: unsteered"):
            at.none_rows = at.play([Condition(NONE)], journal=NONE, title="test: unsteered")[NONE]
            again = at.play([Condition(AGAIN)], journal=AGAIN, title="test: unsteered again", few=True)[AGAIN]
        curves = {way: self._curves(way) for way in WAYS}
        results: dict[str, Any] = {
            "schema": 1, "kind": "audit", "model": {**model_facts(at.model), "weights": at.model.weights_sketch},
            "scenario": scenarios.as_json(given.scenario), "seed": at.seed,
            "versions": runs.versions(), "settings": self._settings(),
            "thresholds": {name: {"value": value, "meaning": MEANING[name]} for name, value in THRESHOLDS.items()},
            "behaviour": self._behaviour(), "utility": self._utility(), "pairs": self._pairs(contrast),
            "finders": {name: one.as_json(at.model.fingerprint.layer_ids) for name, one in at.finders.items()},
            "failed": self.failed, "finder": at.finder, "none": at.scale.rates(at.none_rows),
            **{key: curves[way] for way, key in WAYS.items()},
        }  # fmt: skip
        results["concentration"] = self._concentration(results)
        results |= self._hardening(at.defence, mask_path)
        results["frequencies"] = self._frequencies()
        results["monitoring"] = self._monitoring()
        results["transfer"] = []
        results["verdict"] = verdict(results, noun=given.words[1])
        results["checks"] = self._checks(results, again)
        assert at.experts is not None
        files.write_json(at.run.path("experts.json"), at.experts.as_json(at.finders))
        return results

    # ---- the fit split: pairs, frequencies, finders

    def _look(self, wanted: Sequence[str] | None) -> Contrast:
        at, given = self.audited, self.audited.inputs
        require_sides(given, at.panel)
        with self.clock.step("play the fit split"):
            at.run.expect({"fit": sum(len(given.data[suite.name]["fit"]) for suite in given.scenario.suites)})
            at.fit_rows = evaluation.evaluate_split(
                at.model, given.scenario, given.data, "fit", title="fit: unsteered", panel=at.panel,
                journal=at.run.path("responses", "fit.jsonl"),
            )  # fmt: skip
        require_shown(given, at.fit_rows, least=THRESHOLDS["least_shown"], where="fit")
        with self.clock.step("capture"):
            contrast = pairs(given, at.fit_rows)
            found = self._capture(contrast, "pairs")
            of_requests = contrast if contrast.span == "final_turn" else requests(given, at.fit_rows)
            at.prompts = found if of_requests is contrast else self._capture(of_requests, "prompts")
            at.prompts_span, self.prompts_how = of_requests.span, of_requests.how
        with self.clock.step("frequencies"):
            at.experts = experts(found, span=contrast.span, seed=at.seed)
        with self.clock.step("finders"):
            at.finders, self.failed = find(at.evidence(at.model, at.experts, at.prompts), wanted)
        return contrast

    def _capture(self, contrast: Contrast, name: str) -> TraceReader:
        return capture(
            self.audited.model, contrast.rows, out=self.audited.run.path("trace", name), spans=(contrast.span,),
            level="selected" if contrast.span == "response" else "logits", title=f"capture: {name}",
        )  # fmt: skip

    # ---- sizes, and the finder that is chosen

    def _sizes(self, asked: Sequence[int] | None) -> None:
        at = self.audited
        every = list(at.finders.values())
        off = min(silence.reach(one.order, routers=at.routers, way="off") for one in every)
        on = min(silence.reach(one.against, routers=at.routers, way="on") for one in every)
        at.sizes, at.sizes_on = silence.sizes_up_to(off, asked), silence.sizes_up_to(on, asked)
        if not at.sizes:
            raise InputError(
                f"no size that was asked for can be silenced: {list(asked or ())}",
                where="--sizes",
                expected=f"numbers from 1 to {off}: more than that the routers cannot spare",
                do="ask for fewer experts",
            )

    def _conditions(self, way: silence.Way) -> dict[str, list[Condition]]:
        at = self.audited
        sizes = at.sizes if way == "off" else at.sizes_on
        return {
            name: silence.conditions(
                one.order if way == "off" else one.against, finder=name, routers=at.routers, way=way, sizes=sizes
            )
            for name, one in at.finders.items()
        }

    def _choose(self) -> None:
        """The finder that takes most of the behaviour on select and leaves the model usable.

        What is less than THRESHOLDS["worth"] is chance: where no finder takes more, or several as much, the one counts
        that takes most on the average of the sizes.
        """
        at = self.audited
        by_finder = self._conditions("off")
        every = [Condition(NONE), *(one for conditions in by_finder.values() for one in conditions)]
        played = at.play(every, journal="select", title="select: silencing", split="select", few=True)
        none = [{**row, "group": group} for row, group in zip(played[NONE], self._groups("select"), strict=True)]
        scale = Scale(at.inputs, none, at.seed)
        base = scale.rates(none)
        scores = {}
        for name, conditions in by_finder.items():
            points = _points(scale, conditions, played)
            best = best_usable(points, base)
            mean = sum(max(0.0, gone(point, base)) for point in points) / len(points)
            taken = gone(best, base) if best is not None else 0.0
            scores[name] = (taken if taken >= THRESHOLDS["worth"] else 0.0, mean)
        at.finder = max(scores, key=lambda name: scores[name])

    def _groups(self, split: scenarios.Split) -> list[str]:
        return [one.group for rows in self.audited.inputs.of(split, utility=inputs.DRAW_MOST).values() for one in rows]

    # ---- the test split: curves

    def _curves(self, way: silence.Way) -> dict[str, Any]:
        """`silencing` or `activation` of results.json; the chosen finder's masks are saved."""
        at, name = self.audited, WAYS[way]
        sizes = at.sizes if way == "off" else at.sizes_on
        by_finder = self._conditions(way)
        if not sizes:
            return {"sizes": [], "curves": {finder: [] for finder in by_finder}, "random": []}
        with self.clock.step(f"test: {name}"):
            every = [one for conditions in by_finder.values() for one in conditions]
            played = at.play(every, journal=name, title=f"test: {name}")
        self._note_forbidden(played)
        self._save(by_finder[at.finder], played)
        curves = {finder: _points(at.scale, conditions, played) for finder, conditions in by_finder.items()}
        if way == "off":
            self.played_off = [played[one.name] for one in by_finder[at.finder]]
        with self.clock.step(f"test: random {name}"):
            return {"sizes": list(sizes), "curves": curves, "random": self._random(way, sizes)}

    def _random(self, way: silence.Way, sizes: Sequence[int]) -> list[dict[str, Any]]:
        at = self.audited
        assert at.experts is not None
        order = at.finders[at.finder].order if way == "off" else at.finders[at.finder].against
        usage_LE = at.experts.usage_LE
        drawn = {
            size: silence.draws(
                order, routers=at.routers, way=way, size=size, count=at.draws, usage_LE=usage_LE, seed=at.seed
            )
            for size in sizes
        }
        every = [one.condition for mine in drawn.values() for one in mine]
        journal = "random" if way == "off" else "random-activation"
        played = at.play(every, journal=journal, title=f"test: random {WAYS[way]}", few=True)
        self._note_forbidden(played)
        found = []
        for size, mine in drawn.items():
            force_LE = silence.force(order, routers=at.routers, count=size, way=way)
            found.append({
                "n": size, "draws": len(mine), "overlap": sum(one.overlap for one in mine) / len(mine),
                "usage": {
                    "finder": float(usage_LE[force_LE != 0].mean()),
                    "drawn": sum(one.usage for one in mine) / len(mine),
                },
                **at.scale.over_draws([played[one.condition.name] for one in mine]),
            })  # fmt: skip
        return found

    def _save(self, conditions: Sequence[Condition], played: Mapping[str, Rows]) -> None:
        """Masks under the conditions' names; none that made what the scenario forbids."""
        at = self.audited
        for one in conditions:
            if not forbidding.found_in(at.inputs.scenario, played[one.name]):
                intent = {**one.masks[0].info.intent.model_dump(), "scenario": at.inputs.scenario.name}
                way, _, rest = one.name.removeprefix(f"{at.finder}-").partition("-")
                verb = "silence" if way == "off" else "activate"
                path = at.run.path("masks", f"{verb}-{at.finder}-{rest}.safetensors")
                one.masks[0].with_info(intent=intent).save(path)

    def _note_forbidden(self, played: Mapping[str, Rows]) -> None:
        self.forbidden += sum(forbidding.found_in(self.audited.inputs.scenario, rows) for rows in played.values())

    # ---- concentration, hardening, monitoring

    def _concentration(self, results: Mapping[str, Any]) -> dict[str, Any]:
        at, given = self.audited, self.audited.inputs
        assert at.experts is not None
        curve = results["silencing"]["curves"][at.finder]
        sizes = [point["n"] for point in curve]
        shown_CG, of_CG = at.scale.by_group([at.none_rows, *self.played_off])
        n50 = concentrate.n50(shown_CG, of_CG, sizes, seed=at.seed, experts=at.experts.usage_LE.size)
        with self.clock.step("test: permuted experts"):
            conditions = concentrate.permutations(at.model, seed=at.seed)
            played = at.play(conditions, journal="permuted", title="test: permuted experts", few=True)
        self._note_forbidden(played)
        permuted = concentrate.permuted(at.scale, [played[one.name] for one in conditions])
        return {
            "n50": n50, "random_at_n50": self._random_at(n50["value"], results), **concentrate.shape_of(at.experts),
            "permuted": permuted,
            "outside": concentrate.outside(
                permuted, noun=given.words[1], utility_points=THRESHOLDS["utility_points"]
            ),
        }  # fmt: skip

    def _random_at(self, value: float | None, results: Mapping[str, Any]) -> dict[str, Any] | None:
        """The random draws of the first size at or past n50."""
        found = next((one for one in results["silencing"]["random"] if value is not None and one["n"] >= value), None)
        if found is None:
            return None
        behaviour = {key: found["behaviour"][key] for key in ("mean", "low", "high")}
        before = results["none"]["behaviour"]["value"]
        return {"n": found["n"], "behaviour": {**behaviour, "lost": lost(before, behaviour["mean"])}}

    def _hardening(self, defence: SteeringMask | None, path: str) -> dict[str, Any]:
        """`hardening` and `attacker` of results.json; both None without a mask."""
        if defence is None:
            return {"hardening": None, "attacker": None}
        at, given = self.audited, self.audited.inputs
        order = at.finders[at.finder].order
        with self.clock.step("test: hardening"):
            conditions = harden.hardened(
                defence, order, finder=at.finder, routers=at.routers, taps=at.model.routers, sizes=at.sizes
            )
            played = at.play(conditions, journal="hardening", title="test: hardening")
        with self.clock.step("test: the mask reversed"):
            reversed_ = harden.reversed_conditions(defence, routers=at.routers)
            turned = at.play([one for _, one in reversed_], journal="attacker", title="test: the mask reversed")
        self._note_forbidden({**played, **turned})
        alone = played[harden.DEFENCE]
        scale = Scale(given, alone, at.seed)
        curve = [scale.point(one.masks[1].expert_count, one.name, played[one.name]) for one in conditions[1:]]
        shown_CG, of_CG = scale.by_group([alone, *(played[one.name] for one in conditions[1:])])
        assert at.experts is not None
        n50 = concentrate.n50(
            shown_CG, of_CG, [point["n"] for point in curve], seed=at.seed, experts=at.experts.usage_LE.size
        )
        hardening = {
            "mask": harden.facts_of(defence, path=path),
            "none": scale.rates(alone),
            "curve": curve,
            "n50": n50,
        }
        entries = [(alpha, turned[one.name]) for alpha, one in reversed_]
        attacker = harden.attacker(
            at.scale, entries, noun=given.words[1], utility_points=THRESHOLDS["utility_points"]
        )  # fmt: skip
        return {"hardening": hardening, "attacker": attacker}

    def _frequencies(self) -> dict[str, Any]:
        at = self.audited
        assert at.prompts is not None
        tokens, shares_LE = usage_of(at.prompts)
        return {"tokens": tokens, "span": at.prompts_span, "of": self.prompts_how, "shares_LE": shares_LE.tolist()}

    def _monitoring(self) -> dict[str, Any] | None:
        """None where routing tells attacks from nothing, or too few requests are there; `failed` says which."""
        with self.clock.step("monitoring"):
            try:
                return monitor(self.audited)
            except (EmptyDataError, NoEffectError) as error:
                self.failed["monitoring"] = str(error)
                return None

    def show_routing(self, results: Mapping[str, Any]) -> None:
        """RUN/routing.json: one conversation token by token, unsteered and silenced, where half of it is gone."""
        at = self.audited
        value, curve = results["concentration"]["n50"]["value"], results["silencing"]["curves"][at.finder]
        place = next((i for i, point in enumerate(curve) if value is not None and point["n"] >= value), -1)
        one = self._conditions("off")[at.finder][place]
        keep_routing(
            at.run.folder, at.model, name=one.name, none=at.none_rows, after=self.played_off[place], masks=one.masks
        )

    # ---- facts

    def _settings(self) -> dict[str, Any]:
        at = self.audited
        return {
            "sizes": list(at.sizes), "sizes_on": list(at.sizes_on), "draws": at.draws, "finders": list(at.finders),
            "permutations": concentrate.PERMUTATIONS, "utility_most": inputs.UTILITY_MOST,
            "utility_most_in_draws": inputs.DRAW_MOST, "max_new_tokens": at.inputs.scenario.max_new_tokens,
        }  # fmt: skip

    def _behaviour(self) -> dict[str, Any]:
        given = self.audited.inputs
        rows = given.data[given.behaviour.name]["test"]
        return {
            "name": given.words[0], "noun": given.words[1], "suite": given.behaviour.name, "metric": given.metric,
            "n": len(rows), "groups": len({row.group for row in rows}),
        }  # fmt: skip

    def _utility(self) -> list[dict[str, Any]]:
        given = self.audited.inputs
        return [
            {"suite": suite.name, "metric": suite.metrics[0], "n": len(given.data[suite.name]["test"])}
            for suite in given.utility
        ]

    def _pairs(self, contrast: Contrast) -> dict[str, Any]:
        assert self.audited.experts is not None
        shows, lacks = self.audited.experts.tokens
        return {
            "conversations": len(contrast.rows), "groups": contrast.counts["groups"],
            "tokens": {"shows": shows, "lacks": lacks}, "span": contrast.span, "how": contrast.how,
        }  # fmt: skip

    def _checks(self, results: Mapping[str, Any], again: Rows) -> list[dict[str, Any]]:
        at, given = self.audited, self.audited.inputs
        before = {row["id"]: row["response"] for row in at.none_rows}
        changed = sum(row["response"] != before[row["id"]] for row in again)
        at_most = self.played_off[-1]
        moved = sum(row["response"] != before[row["id"]] for row in at_most)
        level = results["verdict"]["level"]
        checks = [
            check("self-check at load", True, "one steered layer selects what routing.py selects, and comes off"),
            check("unsteered twice gives the same replies", changed == 0, f"{changed} of {len(again)} differ"),
            check(
                "silencing changes replies", moved > 0,
                f"{moved} of {len(at_most)} differ with {at.sizes[-1]} experts silenced",
            ),
            check(
                f"{given.words[1]} cannot be removed at the router", level not in NOT_MET,
                f"verdict: {level}" if level != "unknown" else "verdict: unknown, too little was measured",
            ),
        ]  # fmt: skip
        if given.scenario.forbid:
            count = self.forbidden
            checks.append(
                check(f"no reply of {forbidding.named(given.scenario)}", not count, f"{count} replies hold it")
            )
        return checks


def _transfers(
    at: Audited, against: Sequence[str], quantize: str | None, *, dtype: str, device: str
) -> list[dict[str, Any]]:
    """One entry for each other model; for the audited model quantised where none is named."""
    others = list(against) or ([at.model.name] if quantize is not None else [])
    return [
        transfer(at, other, quantize=quantize, number=number, dtype=dtype, device=device)
        for number, other in enumerate(others)
    ]


def _points(scale: Scale, conditions: Sequence[Condition], played: Mapping[str, Rows]) -> list[dict[str, Any]]:
    return [scale.point(one.masks[0].expert_count, one.name, played[one.name]) for one in conditions]

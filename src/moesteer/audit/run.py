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
from moesteer.audit import concentrate, inputs, silence
from moesteer.audit.audited import Audited, Rows
from moesteer.audit.curves import NONE, WAYS, choose, conditions, curves, set_sizes
from moesteer.audit.experts import usage_of
from moesteer.audit.finders import checked_names
from moesteer.audit.harden import hardening
from moesteer.audit.look import look
from moesteer.audit.monitor import monitor
from moesteer.audit.pairs import Contrast
from moesteer.audit.playing import Condition
from moesteer.audit.points import lost
from moesteer.audit.transfer import transfer
from moesteer.audit.verdict import MEANING, MET, THRESHOLDS, verdict
from moesteer.backends.loading import load
from moesteer.errors import EmptyDataError, InputError, NoEffectError
from moesteer.evaluate import forbidding
from moesteer.judges.panel import JOURNAL
from moesteer.mask import SteeringMask
from moesteer.models.limits import require_masks
from moesteer.pipeline import Clock
from moesteer.results import check, model_facts
from moesteer.routing_shown import keep as keep_routing
from moesteer.scenario import Scenario
from moesteer.version import __version__

DRAWS = 20
AGAIN = "none-again"


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
        "from_pairs": data is not None, "data": runs.data_digest({**given.data, "": {"pairs": given.given,
        "prompts": given.prompts}}), "whole": given.whole.model_dump(mode="json"), "seed": seed, "limit": limit,
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
        steps = _Audit(Audited(loaded, given, run, panel, seed, draws, defence, limit=limit), clock)
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

    def go(self, wanted: Sequence[str] | None, *, sizes: Sequence[int] | None, mask_path: str) -> dict[str, Any]:
        """All steps but transfer and the report; the content of results.json."""
        at, given = self.audited, self.audited.inputs
        contrast = look(at, self.clock, wanted)
        set_sizes(at, sizes)
        with self.clock.step("choose a finder on select"):
            choose(at)
        with self.clock.step("test: unsteered"):
            at.none_rows = at.play([Condition(NONE)], journal=NONE, title="test: unsteered")[NONE]
            again = at.play([Condition(AGAIN)], journal=AGAIN, title="test: unsteered again", few=True)[AGAIN]
        drawn = {way: curves(at, self.clock, way) for way in WAYS}
        results: dict[str, Any] = {
            "schema": 1, "kind": "audit", "model": {**model_facts(at.model), "weights": at.model.weights_sketch},
            "scenario": scenarios.as_json(given.scenario), "seed": at.seed,
            "versions": runs.versions(), "settings": self._settings(),
            "thresholds": {name: {"value": value, "meaning": MEANING[name]} for name, value in THRESHOLDS.items()},
            "behaviour": self._behaviour(), "utility": self._utility(), "pairs": self._pairs(contrast),
            "finders": {name: one.as_json(at.model.fingerprint.layer_ids) for name, one in at.finders.items()},
            "failed": at.failed, "finder": at.finder, "none": at.scale.rates(at.none_rows),
            **{key: drawn[way] for way, key in WAYS.items()},
        }  # fmt: skip
        results["concentration"] = self._concentration(results)
        results |= hardening(at, self.clock, mask_path)
        results["frequencies"] = self._frequencies()
        results["monitoring"] = self._monitoring()
        results["transfer"] = []
        results["verdict"] = verdict(results, noun=given.words[1])
        results["checks"] = self._checks(results, again)
        assert at.experts is not None
        files.write_json(at.run.path("experts.json"), at.experts.as_json(at.finders))
        return results

    # ---- concentration, hardening, monitoring

    def _concentration(self, results: Mapping[str, Any]) -> dict[str, Any]:
        at, given = self.audited, self.audited.inputs
        assert at.experts is not None
        curve = results["silencing"]["curves"][at.finder]
        sizes = [point["n"] for point in curve]
        shown_CG, of_CG = at.scale.by_group([at.none_rows, *at.played_off])
        n50 = concentrate.n50(shown_CG, of_CG, sizes, seed=at.seed, experts=at.experts.usage_LE.size)
        with self.clock.step("test: permuted experts"):
            moved = concentrate.permutations(at.model, seed=at.seed)
            played = at.play(moved, journal="permuted", title="test: permuted experts", few=True)
        permuted = concentrate.permuted(at.scale, [played[one.name] for one in moved])
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

    def _frequencies(self) -> dict[str, Any]:
        at = self.audited
        assert at.prompts is not None
        tokens, shares_LE = usage_of(at.prompts)
        return {"tokens": tokens, "span": at.prompts_span, "of": at.prompts_how, "shares_LE": shares_LE.tolist()}

    def _monitoring(self) -> dict[str, Any] | None:
        """None where routing tells attacks from nothing, or too few requests are there; `failed` says which."""
        with self.clock.step("monitoring"):
            try:
                return monitor(self.audited, limit=self.audited.limit)
            except (EmptyDataError, NoEffectError) as error:
                self.audited.failed["monitoring"] = str(error)
                return None

    def show_routing(self, results: Mapping[str, Any]) -> None:
        """RUN/routing.json: one conversation token by token, unsteered and silenced, where half of it is gone."""
        at = self.audited
        value, curve = results["concentration"]["n50"]["value"], results["silencing"]["curves"][at.finder]
        place = next((i for i, point in enumerate(curve) if value is not None and point["n"] >= value), -1)
        one = conditions(at, "off")[at.finder][place]
        keep_routing(
            at.run.folder, at.model, name=one.name, none=at.none_rows, after=at.played_off[place], masks=one.masks
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
        at_most = at.played_off[-1]
        moved = sum(row["response"] != before[row["id"]] for row in at_most)
        level = results["verdict"]["level"]
        spared = silence.reach(at.finders[at.finder].order, routers=at.routers, way="off")
        checks = [
            check("self-check at load", True, "one steered layer selects what routing.py selects, and comes off"),
            check("unsteered twice gives the same replies", changed == 0, f"{changed} of {len(again)} differ"),
            check(
                "silencing changes replies", moved > 0 or at.sizes[-1] < spared,  # few may be used by none of them
                f"{moved} of {len(at_most)} differ with {at.sizes[-1]} of {spared} experts silenced",
            ),
            check(
                f"{given.words[1]} cannot be removed at the router", level in MET,
                f"verdict: {level}" if level != "unknown" else "verdict: unknown, too little was measured",
            ),
        ]  # fmt: skip
        if given.scenario.forbid:
            count = at.forbidden
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

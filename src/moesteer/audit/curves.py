"""Curves: every finder's experts silenced and activated, random ones like the chosen finder's, and how it is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesteer.audit import silence
from moesteer.audit.audited import Audited, Rows
from moesteer.audit.inputs import DRAW_MOST
from moesteer.audit.playing import Condition
from moesteer.audit.points import Scale
from moesteer.audit.verdict import THRESHOLDS, best_usable, gone
from moesteer.errors import InputError
from moesteer.evaluate import forbidding
from moesteer.pipeline import Clock
from moesteer.scenario import Split

NONE = "none"
"""The model as it is."""
WAYS: Mapping[silence.Way, str] = {"off": "silencing", "on": "activation"}
"""Key of results.json, and name of the journal, by way."""


def set_sizes(at: Audited, asked: Sequence[int] | None) -> None:
    """How many experts are switched off, and on: as far as every finder's order goes."""
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


def conditions(at: Audited, way: silence.Way) -> dict[str, list[Condition]]:
    """Every finder's conditions, by name and size."""
    sizes = at.sizes if way == "off" else at.sizes_on
    return {
        name: silence.conditions(
            one.order if way == "off" else one.against, finder=name, routers=at.routers, way=way, sizes=sizes
        )
        for name, one in at.finders.items()
    }


def choose(at: Audited) -> None:
    """The finder that takes most of the behaviour on select and leaves the model usable.

    What is less than THRESHOLDS["worth"] is chance: where no finder takes more, or several as much, the one counts
    that takes most on the average of the sizes.
    """
    by_finder = conditions(at, "off")
    every = [Condition(NONE), *(one for which in by_finder.values() for one in which)]
    played = at.play(every, journal="select", title="select: silencing", split="select", few=True)
    none = [{**row, "group": group} for row, group in zip(played[NONE], _groups(at, "select"), strict=True)]
    scale = Scale(at.inputs, none, at.seed)
    base = scale.rates(none)
    scores = {}
    for name, which in by_finder.items():
        found = points(scale, which, played)
        best = best_usable(found, base)
        mean = sum(max(0.0, gone(point, base)) for point in found) / len(found)
        taken = gone(best, base) if best is not None else 0.0
        scores[name] = (taken if taken >= THRESHOLDS["worth"] else 0.0, mean)
    at.finder = max(scores, key=lambda name: scores[name])


def _groups(at: Audited, split: Split) -> list[str]:
    return [one.group for rows in at.inputs.of(split, utility=DRAW_MOST).values() for one in rows]


def curves(at: Audited, clock: Clock, way: silence.Way) -> dict[str, Any]:
    """`silencing` or `activation` of results.json; the chosen finder's masks are saved."""
    name = WAYS[way]
    sizes = at.sizes if way == "off" else at.sizes_on
    by_finder = conditions(at, way)
    if not sizes:
        return {"sizes": [], "curves": {finder: [] for finder in by_finder}, "random": []}
    with clock.step(f"test: {name}"):
        every = [one for which in by_finder.values() for one in which]
        played = at.play(every, journal=name, title=f"test: {name}")
    _save(at, by_finder[at.finder], played)
    found = {finder: points(at.scale, which, played) for finder, which in by_finder.items()}
    if way == "off":
        at.played_off = [played[one.name] for one in by_finder[at.finder]]
    with clock.step(f"test: random {name}"):
        return {"sizes": list(sizes), "curves": found, "random": _random(at, way, sizes)}


def _random(at: Audited, way: silence.Way, sizes: Sequence[int]) -> list[dict[str, Any]]:
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


def _save(at: Audited, which: Sequence[Condition], played: Mapping[str, Rows]) -> None:
    """Masks under the conditions' names; none that made what the scenario forbids."""
    for one in which:
        if not forbidding.found_in(at.inputs.scenario, played[one.name]):
            intent = {**one.masks[0].info.intent.model_dump(), "scenario": at.inputs.scenario.name}
            way, _, rest = one.name.removeprefix(f"{at.finder}-").partition("-")
            verb = "silence" if way == "off" else "activate"
            path = at.run.path("masks", f"{verb}-{at.finder}-{rest}.safetensors")
            one.masks[0].with_info(intent=intent).save(path)


def points(scale: Scale, which: Sequence[Condition], played: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """A POINT for each condition of one mask."""
    return [scale.point(one.masks[0].expert_count, one.name, played[one.name]) for one in which]

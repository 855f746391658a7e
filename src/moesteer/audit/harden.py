"""Hardening: the same silencing with a defence mask applied too, and what its reverse does to the model.

Whoever serves a model with a mask asks two things. Does it hold when experts are silenced beside it (an attacker with
the weights, or a fault)? And what does publishing it give away: the mask's signs turned round, at several strengths,
without its gate?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moesteer.audit.audited import Audited
from moesteer.audit.concentrate import n50
from moesteer.audit.experts import Order
from moesteer.audit.playing import Condition
from moesteer.audit.points import Rows, Scale, lost
from moesteer.audit.silence import Routers, condition_name, force, mask
from moesteer.audit.verdict import THRESHOLDS
from moesteer.detection.controls import sign_flipped
from moesteer.errors import MaskContentError
from moesteer.mask import SteeringMask
from moesteer.models.limits import require_together
from moesteer.pipeline import Clock

DEFENCE = "defence"
STRENGTHS = (0.5, 1.0, 2.0)
"""Of the mask's own alpha, at which its reverse is tried; a forced mask has one."""


def hardened(
    defence: SteeringMask, order: Order, *, finder: str, routers: Routers, taps: Sequence[Any], sizes: Sequence[int]
) -> list[Condition]:
    """The defence alone, then with the first so many experts of an order silenced beside it.

    taps: the model's routers. Experts that a forced defence switches are passed over, since a pinned mask wins; sizes
    at which its experts and the silenced ones are together more than a layer can spare are left out.
    """
    found = [Condition(DEFENCE, (defence,))]
    for size in sizes:
        table_LE = force(order, routers=routers, count=size, way="off", keep_LE=defence.force_LE)
        silencer = mask(table_LE, fingerprint=routers.fingerprint, finder=finder, way="off")
        if not silencer.expert_count:
            continue
        try:
            require_together([defence, silencer], [None, None], taps)
        except MaskContentError:
            continue
        found.append(Condition(f"{DEFENCE}+{condition_name(finder, 'off', size)}", (defence, silencer)))
    return found


def reversed_conditions(defence: SteeringMask, *, routers: Routers) -> list[tuple[float, Condition]]:
    """(alpha, the model under the reversed mask without its gate); none where nothing of it is left to apply.

    A forced mask has no strength: it is tried once, at its own alpha.
    """
    flipped = sign_flipped(defence, scoring=routers.scoring).mask
    if flipped.gated:
        flipped = flipped.with_gate(None, None)
    if flipped.expert_count == 0:
        return []
    found: list[tuple[float, Condition]] = []
    for strength in (1.0,) if flipped.forced else STRENGTHS:
        alpha = strength * defence.info.alpha
        found.append((alpha, Condition(f"reversed-{alpha:g}", (flipped.with_info(alpha=alpha),))))
    return found


def facts_of(defence: SteeringMask, *, path: str) -> dict[str, Any]:
    """`hardening.mask` of results.json."""
    return {
        "path": path, "sha256": defence.sha256, "method": defence.info.method,
        "alpha": None if defence.forced else defence.info.alpha, "gated": defence.gated,
        "experts": defence.expert_count,
    }  # fmt: skip


def attacker(scale: Scale, played: Sequence[tuple[float, Rows]], *, noun: str, utility_points: float) -> dict[str, Any]:
    """What the reversed mask does (`attacker` of results.json)."""
    before = scale.rates(scale.none)["behaviour"]["value"]
    entries = []
    for alpha, rows in played:
        point = scale.point(0, "reversed", rows)
        entries.append({
            "alpha": alpha, "behaviour": point["behaviour"], "vs_none": point["vs_none"], "utility": point["utility"],
            "coherence": point["coherence"],
        })  # fmt: skip
    return {"reversed": entries, "words": _words(before, entries, noun, utility_points)}


def _words(before: float | None, entries: Sequence[Mapping[str, Any]], noun: str, utility_points: float) -> str:
    found = [(share, one) for one in entries if (share := lost(before, one["behaviour"]["value"])) is not None]
    if not found:
        return "The mask's reverse could not be applied, or nothing of it was scored."
    share, worst = max(found, key=lambda pair: pair[0])
    gaps = [u["vs_none"]["difference"] for u in worst["utility"].values() if u["vs_none"]["difference"] is not None]
    change = float(np.mean(gaps)) if gaps else 0.0
    at = f" at strength {worst['alpha']:g}" if len(entries) > 1 else ""
    if share <= 0.05:
        most = max(0, 100 * share)
        return f"Who knows the mask gains nothing from turning it round: at most {most:.0f} % of the {noun} go."
    cost = f"utility changes by {round(100 * change):+d} points"
    usable = "and the model stays usable" if change >= -utility_points else "and the model breaks"
    return f"Turned round{at}, the mask takes {100 * share:.0f} % of the {noun} ({cost}, {usable})."


def hardening(at: Audited, clock: Clock, path: str) -> dict[str, Any]:
    """`hardening` and `attacker` of results.json; both None without a mask."""
    defence = at.defence
    if defence is None:
        return {"hardening": None, "attacker": None}
    given = at.inputs
    order = at.finders[at.finder].order
    with clock.step("test: hardening"):
        conditions = hardened(
            defence, order, finder=at.finder, routers=at.routers, taps=at.model.routers, sizes=at.sizes
        )
        played = at.play(conditions, journal="hardening", title="test: hardening")
    with clock.step("test: the mask reversed"):
        reversed_ = reversed_conditions(defence, routers=at.routers)
        turned = at.play([one for _, one in reversed_], journal="attacker", title="test: the mask reversed")
    alone = played[DEFENCE]
    scale = Scale(given, alone, at.seed)
    curve = [scale.point(one.masks[1].expert_count, one.name, played[one.name]) for one in conditions[1:]]
    shown_CG, of_CG = scale.by_group([alone, *(played[one.name] for one in conditions[1:])])
    assert at.experts is not None
    half = n50(shown_CG, of_CG, [point["n"] for point in curve], seed=at.seed, experts=at.experts.usage_LE.size)
    found = {"mask": facts_of(defence, path=path), "none": scale.rates(alone), "curve": curve, "n50": half}
    entries = [(alpha, turned[one.name]) for alpha, one in reversed_]
    turned_round = attacker(
        at.scale, entries, noun=given.words[1], utility_points=THRESHOLDS["utility_points"]
    )  # fmt: skip
    return {"hardening": found, "attacker": turned_round}

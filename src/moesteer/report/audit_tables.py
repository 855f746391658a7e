"""The tables and tiles of an audit's page: each cell knows its exact value and its place in the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesteer.evaluate.cells import NOTHING, number, signed
from moesteer.report.audit_files import (
    EXPERTS,
    AuditResults,
    CurvePoint,
    Curves,
    Drawn,
    Estimate,
    Experts,
    MaskSide,
    Monitoring,
    SuiteAt,
    Transfer,
)
from moesteer.report.numbers import Number, difference, interval, percent, plain, pointer, share
from moesteer.report.run_files import Interval

MOST_EXPERTS = 40

Place = tuple[str | int, ...]
Said = list[str | Number]


def band(found: Drawn | None, *place: str | int) -> dict[str, Any] | None:
    """Draws for the macro `estimate`: their mean and the middle 95 % of them."""
    if found is None or found.mean is None:
        return None
    return {
        "value": share(found.mean, *place, "mean"),
        "low": Number(number(found.low), found.low, pointer(*place, "low")),
        "high": Number(number(found.high), found.high, pointer(*place, "high")),
    }


def estimate(found: Estimate | None, *place: str | int, form: str = ".2f") -> dict[str, Any] | None:
    """A number with its interval for the macro `estimate`; None where it was not measured."""
    if found is None or found.value is None:
        return None
    parts = (("value", found.value), ("low", found.low), ("high", found.high))
    return {key: plain(value, *place, key, form=form) for key, value in parts}


def curve_rows(results: AuditResults, name: str, curves: Curves | None) -> list[dict[str, Any]]:
    """Every point of silencing or activation (`name`), finder by finder, and the random draws last."""
    rows: list[dict[str, Any]] = []
    if curves is None:
        return rows
    for finder, found in curves.curves.items():
        rows += [
            {"name": finder, "random": None, **_point(results, one, (name, "curves", finder, index))}
            for index, one in enumerate(found)
        ]
    for index, one in enumerate(curves.random):
        place: Place = (name, "random", index)
        rows.append(
            {
                "name": "random experts",
                "n": plain(one.n, *place, "n", form="d"),
                "random": plain(one.draws, *place, "draws", form="d"),
                "behaviour": band(one.behaviour, *place, "behaviour"),
                "gap": None,
                "utility": [
                    band(one.utility.get(suite), *place, "utility", suite) for suite in suites(results)
                ],
                "coherence": None,
            }
        )  # fmt: skip
    return rows


def suites(results: AuditResults) -> list[str]:
    """The utility suites, in order."""
    return [one.suite for one in results.utility]


def _point(results: AuditResults, one: CurvePoint, place: Place) -> dict[str, Any]:
    return {
        "n": plain(one.n, *place, "n", form="d"),
        "behaviour": interval(one.behaviour, *place, "behaviour"),
        "gap": difference(one.vs_none, *place, "vs_none"),
        "utility": _utility(results, one.utility, place),
        "coherence": None if one.coherence is None else interval(one.coherence, *place, "coherence"),
    }


def _utility(results: AuditResults, found: Mapping[str, SuiteAt], place: Place) -> list[dict[str, Any] | None]:
    return [
        interval(found[suite].rate, *place, "utility", suite, "rate") if suite in found else None
        for suite in suites(results)
    ]


def point_rows(results: AuditResults, found: Sequence[CurvePoint], *place: str | int) -> list[dict[str, Any]]:
    """The points of one curve, such as that of hardening."""
    return [_point(results, one, (*place, index)) for index, one in enumerate(found)]


def reversed_rows(results: AuditResults) -> list[dict[str, Any]]:
    """The reversed mask at every strength."""
    if results.attacker is None:
        return []
    return [
        {
            "alpha": plain(one.alpha, "attacker", "reversed", index, "alpha"),
            "behaviour": interval(one.behaviour, "attacker", "reversed", index, "behaviour"),
            "gap": difference(one.vs_none, "attacker", "reversed", index, "vs_none"),
            "utility": _utility(results, one.utility, ("attacker", "reversed", index)),
        }
        for index, one in enumerate(results.attacker.reversed)
    ]


def expert_rows(results: AuditResults, experts: Experts | None) -> list[dict[str, Any]]:
    """The first experts by the chosen finder's order, with all that is known of them."""
    if experts is None:
        return []
    known = {(row.layer, row.expert): (index, row) for index, row in enumerate(experts.rows)}
    rows = []
    for rank, spot in enumerate(results.finders[results.finder].order[:MOST_EXPERTS], start=1):
        if spot not in known:
            continue
        index, row = known[spot]
        place: Place = ("rows", index)
        rows.append(
            {
                "rank": rank,
                "layer": row.layer,
                "expert": row.expert,
                "usage": _share(row.usage, *place, "usage"),
                "shows": _estimated_share(row.shows, *place, "shows"),
                "lacks": _estimated_share(row.lacks, *place, "lacks"),
                "difference": _estimated_points(row.difference, *place, "difference"),
                "q": _of(EXPERTS, plain(row.q, *place, "q", form=".3g")),
                "stable": _share(row.stable, *place, "stable"),
            }
        )
    return rows


def _of(file: str, found: Number) -> Number:
    return Number(found.text, found.value, found.pointer, file)


def _share(value: float | None, *place: str | int) -> Number | None:
    return None if value is None else _of(EXPERTS, share(value, *place))


def _estimated_share(found: Estimate | None, *place: str | int) -> dict[str, Number] | None:
    if found is None or found.value is None:
        return None
    sides = {key: Number(number(side), side, pointer(*place, key), EXPERTS)
             for key, side in (("low", found.low), ("high", found.high))}  # fmt: skip
    return {"value": Number(percent(found.value), found.value, pointer(*place, "value"), EXPERTS), **sides}


def _estimated_points(found: Estimate | None, *place: str | int) -> dict[str, Number] | None:
    if found is None or found.value is None:
        return None
    parts = (("value", found.value), ("low", found.low), ("high", found.high))
    return {key: Number(signed(side), side, pointer(*place, key), EXPERTS) for key, side in parts}


def layer_rows(results: AuditResults) -> list[dict[str, Any]]:
    """Each layer's share of the positive risk difference."""
    return [
        {"layer": row.layer, "share": share(row.share, "concentration", "by_layer", index, "share")}
        for index, row in enumerate(results.concentration.by_layer)
    ]


def operating_rows(found: Monitoring | None) -> list[dict[str, Any]]:
    """The detector at its stated rates of false positives."""
    rows = []
    for index, one in enumerate(found.at if found is not None else ()):
        place: Place = ("monitoring", "at", index)
        rows.append(
            {
                "false": share(one.false_positives, *place, "false_positives"),
                "true": share(one.true_positives, *place, "true_positives"),
                "low": Number(number(one.low), one.low, pointer(*place, "low")),
                "high": Number(number(one.high), one.high, pointer(*place, "high")),
            }
        )
    return rows


def transfer_part(results: AuditResults, found: Transfer, index: int) -> dict[str, Any]:
    """Everything the page says of one other model."""
    place: Place = ("transfer", index)
    against = found.against
    return {
        "found": found,
        "index": index,
        "name": f"{against.name}, {against.quantize}" if against.quantize else against.name,
        "correlation": estimate(found.rank_correlation, *place, "rank_correlation"),
        "none": None if found.none is None else interval(found.none.behaviour, *place, "none", "behaviour"),
        "overlap": [
            {
                "n": plain(one.n, *place, "overlap", i, "n", form="d"),
                "shared": share(one.shared, *place, "overlap", i, "shared"),
                "low": Number(number(one.low), one.low, pointer(*place, "overlap", i, "low")),
                "high": Number(number(one.high), one.high, pointer(*place, "overlap", i, "high")),
                "chance": share(one.chance, *place, "overlap", i, "chance"),
            }
            for i, one in enumerate(found.overlap)
        ],
        "curves": [
            {"name": name, **row}
            for name, key, curve in (
                ("the audited model's", "old", found.old),
                ("its own", "own", found.own),
            )
            for row in point_rows(results, curve, *place, key)
        ],
        "effect": _effect(found, place),
        "mask": [
            {"name": name, "behaviour": interval(side.behaviour, *place, "mask", key, "behaviour"),
             "gap": difference(side.vs_none, *place, "mask", key, "vs_none")}
            for name, key, side in (
                ("this model", "there", found.mask and found.mask.there),
                ("the audited model", "here", found.mask and found.mask.here),
            )
            if isinstance(side, MaskSide)
        ],
    }  # fmt: skip


def _effect(found: Transfer, place: Place) -> Said | None:
    effect = found.effect
    if effect is None or effect.there is None or effect.here is None:
        return None
    said: Said = ["Silencing the first ", plain(effect.n, *place, "effect", "n"), " of the audited model's experts "]
    said += ["takes away ", share(effect.there, *place, "effect", "there"), " of the conversations there and "]
    said += [share(effect.here, *place, "effect", "here"), " here"]
    if effect.ratio is not None:
        said += [": a ratio of ", plain(effect.ratio, *place, "effect", "ratio", form=".2f")]
        if effect.low is not None and effect.high is not None:
            said += [" [", plain(effect.low, *place, "effect", "low", form=".2f"), ", "]
            said += [plain(effect.high, *place, "effect", "high", form=".2f"), "]"]
    return [*said, "."]


def tiles(results: AuditResults) -> list[dict[str, Any]]:
    """The summary's tiles."""
    found = [_behaviour_tile(results), _half_tile(results), _silenced_tile(results)]
    found += [_utility_tile(results), _outside_tile(results), _hardening_tile(results), _roc_tile(results)]
    return [one for one in found if one is not None]


def _tile(what: str, values: Said, *lines: tuple[Said, str], target: bool = False) -> dict[str, Any]:
    return {
        "what": what, "shown": values, "target": target,
        "lines": [{"said": said, "tone": tone} for said, tone in lines],
    }  # fmt: skip


def _between(found: Interval, *place: str | int) -> Said:
    cell = interval(found, *place)
    return ["[", cell["low"], ", ", cell["high"], "], n = ", cell["n"]]


def _behaviour_tile(results: AuditResults) -> dict[str, Any]:
    place = ("none", "behaviour")
    what = f"{results.behaviour.name}, the model as it is"
    return _tile(what, [share(results.none.behaviour.value, *place, "value")],
                 (_between(results.none.behaviour, *place), "muted"), target=True)  # fmt: skip


def _half_tile(results: AuditResults) -> dict[str, Any]:
    half, place = results.concentration.n50, ("concentration", "n50")
    of: Said = ["of ", plain(half.of, *place, "of", form="d"), " experts"]
    if half.value is None:
        return _tile("n50: silenced to halve it", ["not reached"], (of, "muted"), target=True)
    low, high = plain(half.low, *place, "low", form=".3g"), plain(half.high, *place, "high", form=".3g")
    span: Said = ["95 % [", low if half.low is not None else NOTHING, ", "]
    span += [high if half.high is not None else "not reached", "]"]
    value = plain(half.value, *place, "value", form=".3g")
    return _tile("n50: silenced to halve it", [value], (of, "muted"), (span, "muted"), target=True)


def key_point(results: AuditResults) -> tuple[int, CurvePoint] | None:
    """Where the summary looks: the chosen finder's smallest size that reaches n50, else its largest."""
    curve = results.silencing.curves.get(results.finder, [])
    half = results.concentration.n50.value
    for index, point in enumerate(curve):
        if half is not None and point.n >= half:
            return index, point
    return (len(curve) - 1, curve[-1]) if curve else None


def _silenced_tile(results: AuditResults) -> dict[str, Any] | None:
    found = key_point(results)
    if found is None:
        return None
    index, point = found
    place: Place = ("silencing", "curves", results.finder, index)
    lines: list[tuple[Said, str]] = [(_between(point.behaviour, *place, "behaviour"), "muted")]
    for at, one in enumerate(results.silencing.random):
        if one.n == point.n and one.behaviour.mean is not None:
            said: Said = ["random experts: ", share(one.behaviour.mean, "silencing", "random", at, "behaviour", "mean")]
            lines.append((said, "muted"))
    return _tile(
        f"with {point.n} experts silenced", [share(point.behaviour.value, *place, "behaviour", "value")], *lines
    )


def _utility_tile(results: AuditResults) -> dict[str, Any] | None:
    found = key_point(results)
    if found is None or not results.utility:
        return None
    index, point = found
    lost = [(-(one.vs_none.difference), suite) for suite, one in point.utility.items()
            if one.vs_none is not None and one.vs_none.difference is not None]  # fmt: skip
    if not lost:
        return None
    _, suite = max(lost)
    place: Place = ("silencing", "curves", results.finder, index, "utility", suite)
    before, after = results.none.utility.get(suite), point.utility[suite].rate
    values: Said = [] if before is None else [share(before.value, "none", "utility", suite, "value"), " → "]
    gap = difference(point.utility[suite].vs_none, *place, "vs_none")
    lines: list[tuple[Said, str]] = []
    if gap is not None:
        tone = {"better": "good", "worse": "bad"}.get(gap["effect"], "muted")
        lines.append(([gap["value"], " points [", gap["low"], ", ", gap["high"], "]"], tone))
    return _tile(f"{suite}, the utility hurt most by those {point.n}",
                 [*values, share(after.value, *place, "rate", "value")], *lines)  # fmt: skip


def _outside_tile(results: AuditResults) -> dict[str, Any] | None:
    found = results.concentration.outside
    if found is None or found.share is None:
        return None
    line: Said = ["with every routed expert exchanged for another"]
    return _tile("kept without the right experts", [share(found.share, "concentration", "outside", "share")],
                 (line, "muted"))  # fmt: skip


def _hardening_tile(results: AuditResults) -> dict[str, Any] | None:
    found = results.hardening
    if found is None or found.n50 is None:
        return None
    value = found.n50.value
    text: Said = ["not reached"] if value is None else [plain(value, "hardening", "n50", "value", form=".3g")]
    return _tile("n50 with the defence mask", text, (["experts to silence"], "muted"))


def _roc_tile(results: AuditResults) -> dict[str, Any] | None:
    found = results.monitoring
    if found is None:
        return None
    cell = estimate(found.auroc, "monitoring", "auroc", form=".3f")
    if cell is None:
        return None
    return _tile(
        "attacks seen from routing (AUROC)", [cell["value"]], (["[", cell["low"], ", ", cell["high"], "]"], "muted")
    )

"""Transfer: whether what an audit found in one model is there in another: quantised, tuned, or another revision.

- The same pairs, token for token, go through both, and the experts' risk differences are compared: **rank correlation**
  over all experts, and the **overlap** of the first so many, beside what chance would give. Both describe routing;
  intervals resample the pairs' groups, the same ones on either side.
- The audited model's experts are **silenced in the other model**, and so are its own by the same finder. The effect is
  the share of the behaviour that goes at the size at which the audited model had lost half of it (or most), and the
  verdict is about the ratio of the two shares, by the thresholds below. Scores may agree where the effect is gone, and
  the other way round: only the effect decides.

Experts have the same numbers only in models made from each other. Where they were put in another order, everything is
"gone" although the model does the same, and its own experts are beside it to show that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from moesteer import files
from moesteer.audit import silence
from moesteer.audit.audited import Audited, Rows
from moesteer.audit.experts import RESAMPLED_TOGETHER, Experts, Finder, experts, resampled
from moesteer.audit.finders import RISK_DIFFERENCE, find
from moesteer.audit.pairs import Contrast, pairs, requests
from moesteer.audit.playing import CONDITION, Condition
from moesteer.audit.points import Scale, lost
from moesteer.audit.verdict import usable
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.capturing import capture
from moesteer.errors import ModelError, NoEffectError
from moesteer.trace import TraceReader

F64 = NDArray[np.float64]
NONE, OLD, OWN, DEFENCE = "none", "old", "own", "defence"
"""Conditions on the other model: as it is, the audited model's experts silenced, its own, the defence mask."""
BOOTSTRAPS = 2000
THRESHOLDS: Mapping[str, float] = {"holds": 0.8, "gone": 0.2, "sure": 0.5, "least_lost": 0.25, "least_shown": 0.25}
MEANING: Mapping[str, str] = {
    "holds": "ratio of the shares lost (other to audited) from which the effect holds, with the interval above 'sure'",
    "gone": "ratio up to which the effect is gone, with the interval below 'sure'",
    "sure": "ratio that the interval must not reach across for 'holds' or 'gone'",
    "least_lost": "share of the behaviour that the audited model must lose for there to be anything to carry over",
    "least_shown": "share of its conversations on which the other model must show the behaviour",
}


def transfer(
    at: Audited,
    other: str,
    *,
    quantize: str | None = None,
    number: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """An entry of `transfer` in results.json: the audit's experts in the model `other`.

    at: after silencing was played. quantize: load it as int8 or int4. number: of the comparison, in the names of its
    files. Raises ModelError for a model of another shape, and what loading, capturing and playing raise.
    """
    model = load(other, dtype=dtype, device=device, quantize=quantize)
    _require_shape(at, model, other)
    contrast = pairs(at.inputs, at.fit_rows)
    trace = _capture(at, model, contrast, f"transfer-{number}-pairs")
    theirs = experts(trace, span=contrast.span, seed=at.seed)
    own, why = _own(at, model, theirs, trace, contrast, number)
    played, sizes = _play(at, model, own, number)
    scale = Scale(at.inputs, played[NONE], at.seed)
    none = scale.rates(played[NONE])
    curves = {
        name: [scale.point(n, silence.condition_name(name, "off", n), _of(played, name, n)) for n in sizes[name]]
        for name in (OLD, OWN)
    }
    size = _size(at)
    effect = _effect(at, scale, size, _of(played, OLD, size))
    entry: dict[str, Any] = {
        "against": {
            "name": other, "quantize": quantize, "weights": model.weights_sketch,
            "router_sha256": model.fingerprint.router_sha256,
        },
        "finder": at.finder, "scores": RISK_DIFFERENCE, "sizes": sizes[OLD],
        **_agreement(at, theirs, sizes[OLD]), "none": none, **curves, "effect": effect,
        "mask": _mask(at, scale, played), "difference_LE": theirs.difference.value.tolist(),
        "thresholds": {name: {"value": value, "meaning": MEANING[name]} for name, value in THRESHOLDS.items()},
    }  # fmt: skip
    return {**entry, "verdict": verdict(entry, noun=at.inputs.words[1], own_failed=why)}


def _require_shape(at: Audited, model: Model, other: str) -> None:
    differences = at.model.fingerprint.shape_differences(model.fingerprint)
    if differences:
        raise ModelError(
            "experts cannot be carried over to a model of another shape",
            where=f"{other}: {'; '.join(differences)}",
            expected=f"a {at.model.fingerprint.model_type} made from {at.model.name}: quantised, tuned, or another "
            "revision",
            do="audit that model by itself",
        )


def _capture(at: Audited, model: Model, contrast: Contrast, name: str) -> TraceReader:
    level: Literal["logits", "selected"] = "selected" if contrast.span == "response" else "logits"
    return capture(
        model, contrast.rows, out=at.run.path("trace", name), spans=(contrast.span,), level=level,
        title=f"capture: {name}",
    )  # fmt: skip


def _own(
    at: Audited, model: Model, theirs: Experts, trace: TraceReader, contrast: Contrast, number: int
) -> tuple[Finder | None, str | None]:
    """The other model's own experts by the audit's finder, or None and why there are none."""
    prompts = trace
    if contrast.span == "response" and at.finder != RISK_DIFFERENCE:
        prompts = _capture(at, model, requests(at.inputs, at.fit_rows), f"transfer-{number}-prompts")
    if at.finder == RISK_DIFFERENCE:
        prompts = at.prompts or trace  # which that finder does not look at
    try:
        made, failed = find(at.evidence(model, theirs, prompts), [at.finder])
    except NoEffectError as error:  # of the one finder that was asked: the old experts' effect is there all the same
        return None, str(error)
    return made.get(at.finder), failed.get(at.finder)


def _play(at: Audited, model: Model, own: Finder | None, number: int) -> tuple[dict[str, Rows], dict[str, list[int]]]:
    """Rows by condition on the other model, and the sizes played of either order."""
    routers = silence.Routers(model.fingerprint, model.routers[0].scoring)
    orders = {OLD: at.finders[at.finder].order, **({OWN: own.order} if own is not None else {})}
    conditions, sizes = [Condition(NONE)], {OLD: list(at.sizes), OWN: list(at.sizes) if own is not None else []}
    for name, order in orders.items():
        conditions += silence.conditions(order, finder=name, routers=routers, way="off", sizes=at.sizes)
    if at.defence is not None:
        conditions.append(Condition(DEFENCE, (at.defence.with_info(fingerprint=model.fingerprint),)))
    played = at.play(conditions, journal=f"transfer-{number}", title=f"transfer to {model.name}", model=model)
    return played, sizes


def _of(played: Mapping[str, Rows], name: str, size: int) -> Rows:
    return played[silence.condition_name(name, "off", size)]


# ---- scores


def _agreement(at: Audited, theirs: Experts, sizes: Sequence[int]) -> dict[str, Any]:
    """`rank_correlation` and `overlap` of the risk differences of the two models on the same pairs."""
    assert at.experts is not None
    weights_BG = resampled(at.experts.counts, seed=at.seed)
    parts = range(0, len(weights_BG), RESAMPLED_TOGETHER)
    one, two = (
        np.concatenate([counts.resampled_BLE(weights_BG[i : i + RESAMPLED_TOGETHER]) for i in parts])
        for counts in (at.experts.counts, theirs.counts)
    )  # fmt: skip
    mine, other = (counts.score_LE().ravel() for counts in (at.experts.counts, theirs.counts))
    ranks = [correlation(a, b) for a, b in zip(one.reshape(len(one), -1), two.reshape(len(two), -1), strict=True)]
    low, high = np.nanquantile(ranks, (0.025, 0.975))
    shared = []
    for n in sizes:
        each = [overlap(a, b, n) for a, b in zip(one.reshape(len(one), -1), two.reshape(len(two), -1), strict=True)]
        ends = np.quantile(each, (0.025, 0.975))
        shared.append({
            "n": n, "shared": overlap(mine, other, n), "low": float(ends[0]), "high": float(ends[1]),
            "chance": n / mine.size,
        })  # fmt: skip
    return {
        "rank_correlation": {"value": correlation(mine, other), "low": float(low), "high": float(high)},
        "overlap": shared,
    }


def correlation(one: F64, two: F64) -> float:
    """Spearman's rank correlation; 0 where one side's scores are all equal."""
    ranks = [rankdata(side) - (len(side) + 1) / 2 for side in (one, two)]
    norm = float(np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1])))
    return float(ranks[0] @ ranks[1]) / norm if norm > 0 else 0.0


def overlap(one: F64, two: F64, n: int) -> float:
    """Share of the n highest of one side that are among the n highest of the other; ties go to the lower expert."""
    first, second = (set(np.argsort(-side, kind="stable")[:n].tolist()) for side in (one, two))
    return len(first & second) / n


# ---- effect


def _size(at: Audited) -> int:
    """The first size at which the audited model, still usable, has lost half of the behaviour; else the most."""
    none = at.scale.rates(at.none_rows)
    found = []
    for n in at.sizes:
        point = at.scale.point(n, "", _here(at, n))
        share = lost(none["behaviour"]["value"], point["behaviour"]["value"])
        fine = usable(point, none)
        found.append((share if share is not None and fine else -np.inf, n))
        if share is not None and fine and share >= THRESHOLDS["sure"]:
            return n
    return max(found, key=lambda entry: (entry[0], -entry[1]))[1]


def _here(at: Audited, size: int) -> Rows:
    """The audited model's rows with the chosen finder's first `size` experts silenced."""
    name = silence.condition_name(at.finder, "off", size)
    found: dict[str, dict[str, Any]] = {}
    for row in files.Journal(at.run.path("responses", "silencing.jsonl")).read():
        if row[CONDITION] == name:
            found.setdefault(row["id"], row)
    return list(found.values())


def _effect(at: Audited, scale: Scale, size: int, there: Rows) -> dict[str, Any]:
    """`effect`: shares of the behaviour lost with the same experts silenced, and their ratio with its interval."""
    tables = [at.scale.by_group([at.none_rows, _here(at, size)]), scale.by_group([scale.none, there])]
    groups = tables[0][0].shape[1]
    drawn = np.random.default_rng(at.seed).multinomial(groups, np.full(groups, 1 / groups), BOOTSTRAPS)
    shares = [_lost(np.vstack([np.ones((1, groups)), drawn]), *table) for table in tables]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(shares[0] > 0, shares[1] / shares[0], np.nan)
    known = ratios[1:][np.isfinite(ratios[1:])]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    numbers = {"there": shares[1][0], "here": shares[0][0], "ratio": ratios[0], "low": low, "high": high}
    return {"n": size, **{key: float(value) if np.isfinite(value) else None for key, value in numbers.items()}}


def _lost(weights_BG: F64, shown_CG: F64, of_CG: F64) -> F64:
    """[B] share of the behaviour lost from the first condition to the second; NaN where there was none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_BC = (weights_BG @ shown_CG.T) / (weights_BG @ of_CG.T)
        found: F64 = 1 - rate_BC[:, 1] / rate_BC[:, 0]
    return np.where(np.isfinite(found), found, np.nan)


def _mask(at: Audited, scale: Scale, played: Mapping[str, Rows]) -> dict[str, Any] | None:
    """What the defence mask does in either model."""
    if at.defence is None:
        return None
    here = list(files.Journal(at.run.path("responses", "hardening.jsonl")).read())
    alone = [row for row in here if row[CONDITION] == DEFENCE]
    points = {"there": scale.point(0, DEFENCE, played[DEFENCE]), "here": at.scale.point(0, DEFENCE, alone)}
    return {
        "sha256": at.defence.sha256,
        **{side: {key: point[key] for key in ("behaviour", "vs_none")} for side, point in points.items()},
    }


# ---- verdict


def verdict(entry: Mapping[str, Any], *, noun: str, own_failed: str | None = None) -> dict[str, Any]:
    """`verdict` of a transfer, from the rest of it: level "holds", "weaker", "gone" or "unknown", and sentences."""
    level, reason = _level(entry, noun)
    return {"level": level, "sentences": [reason, *_beside(entry, level, noun, own_failed)]}


def _level(entry: Mapping[str, Any], noun: str) -> tuple[str, str]:
    effect, none = entry["effect"], entry["none"]
    shown, n = none["behaviour"]["value"], effect["n"]
    if shown is None or shown < THRESHOLDS["least_shown"]:
        return "unknown", f"The other model shows the behaviour in {_percent(shown)}: too little to silence."
    if effect["here"] is None or effect["here"] < THRESHOLDS["least_lost"]:
        return "unknown", (
            f"Silencing {n} experts takes {_percent(effect['here'])} of the {noun} of the audited model: "
            "there is too little to carry over."
        )
    if effect["there"] is None or effect["ratio"] is None or effect["low"] is None:
        return "unknown", "Too few replies of the other model were scored."
    told = (
        f"Silencing the audited model's first {n} experts takes {_percent(effect['here'])} of the {noun} there and "
        f"{_percent(effect['there'])} in the other model (ratio {effect['ratio']:.2f}, 95 % interval "
        f"{effect['low']:.2f} to {effect['high']:.2f})"
    )
    point = next(one for one in entry[OLD] if one["n"] == n)
    if effect["ratio"] > THRESHOLDS["gone"] and not usable(point, none):
        return "unknown", f"{told}; but that breaks the other model as a whole, so that it says nothing of the {noun}."
    if effect["ratio"] >= THRESHOLDS["holds"] and effect["low"] >= THRESHOLDS["sure"]:
        return "holds", f"{told}: what was found holds for it."
    if effect["ratio"] <= THRESHOLDS["gone"] and effect["high"] <= THRESHOLDS["sure"]:
        return "gone", f"{told}: what was found is gone in it."
    if effect["low"] <= THRESHOLDS["gone"] and effect["high"] >= THRESHOLDS["holds"]:
        return "unknown", f"{told}: too uncertain to say."
    return "weaker", f"{told}: what was found is weaker in it."


def _beside(entry: Mapping[str, Any], level: str, noun: str, own_failed: str | None) -> Iterator[str]:
    ranks, n = entry["rank_correlation"], entry["effect"]["n"]
    shared = next(one for one in entry["overlap"] if one["n"] == n)
    yield (
        f"The experts' scores correlate at {ranks['value']:.2f} ({ranks['low']:.2f} to {ranks['high']:.2f}), and "
        f"{_percent(shared['shared'])} of the first {n} are the same ({_percent(shared['chance'])} by chance)."
    )
    if own_failed is not None:
        yield f"Its own experts were not found: {own_failed.splitlines()[0]}."
    for one in entry[OWN]:
        if one["n"] == n:
            share = lost(entry["none"]["behaviour"]["value"], one["behaviour"]["value"])
            elsewhere = level in ("weaker", "gone") and share is not None and share >= THRESHOLDS["sure"]
            again = ": they rest on few experts there too, but on others" if elsewhere else ""
            yield f"The other model's own first {n} experts take {_percent(share)} of its {noun}{again}."
    if entry["mask"] is not None:
        here, there = (entry["mask"][side]["behaviour"]["value"] for side in ("here", "there"))
        yield (
            f"With the defence mask the behaviour is at {_percent(here)} in the audited model and "
            f"{_percent(there)} in the other."
        )


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{100 * share:.0f} %"

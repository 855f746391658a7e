"""What an audit found, as Markdown for a model's page. Names and sentences come from files, so they are inert."""

from __future__ import annotations

from collections.abc import Sequence

from moesteer.evaluate import cells
from moesteer.report.audit_files import AuditResults, CurvePoint, Drawn
from moesteer.report.audit_tables import key_point
from moesteer.report.markdown import inert
from moesteer.report.run_files import Difference, Interval
from moesteer.version import __version__

MOST_POINTS = 12


def card(results: AuditResults) -> str:
    """The text of card.md. No conversation, path or prompt is in it."""
    model = results.model
    parts = [
        f"# Router audit of {inert(_last(model.name))}",
        f"**{inert(results.verdict.level)}**: {inert(results.verdict.title)}",
        _list(results.verdict.sentences),
        f"{len(model.layers)} MoE layers with {model.experts} experts, {model.top_k} selected per token. Behaviour: "
        f"{inert(results.behaviour.name)}, on {results.behaviour.n} conversations of {inert(results.behaviour.suite)}; "
        f"scenario {inert(results.scenario.name)}, seed {results.seed}.",
        "## Silencing",
        _silencing(results),
        _half(results),
        _transfer(results),
        "## What this does not show",
        _list(results.verdict.not_shown) or "The audit states no limits.",
        "## How it was made",
        _made(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {inert(line)}" for line in lines)


def _last(name: str) -> str:
    """A model by its Hub id; a folder by its last part."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name


def _silencing(results: AuditResults) -> str:
    suites = [one.suite for one in results.utility]
    heads = ("experts silenced", inert(results.behaviour.name), "difference (points)", "random experts",
             *(inert(suite) for suite in suites))  # fmt: skip
    drawn = {one.n: one.behaviour for one in results.silencing.random}
    none = results.none
    lines = [["0", _rate(none.behaviour), cells.NOTHING, cells.NOTHING, *(_rate(none.utility.get(s)) for s in suites)]]
    lines += [_line(point, drawn.get(point.n), suites) for point in _curve(results)[:MOST_POINTS]]
    return (
        f"Per cent with 95 % intervals, experts in the order of {inert(results.finder)}; random: the mean over the "
        f"draws and the middle 95 % of them.\n\n{cells.grid(heads, lines)}"
    )


def _curve(results: AuditResults) -> list[CurvePoint]:
    return results.silencing.curves.get(results.finder, [])


def _line(point: CurvePoint, drawn: Drawn | None, suites: Sequence[str]) -> list[str]:
    utility = [_rate(point.utility[suite].rate if suite in point.utility else None) for suite in suites]
    return [str(point.n), _rate(point.behaviour), _gap(point.vs_none), _drawn(drawn), *utility]


def _rate(found: Interval | None) -> str:
    if found is None or found.value is None:
        return cells.NOTHING
    return f"{cells.number(found.value)} ({cells.number(found.low)} to {cells.number(found.high)})"


def _drawn(found: Drawn | None) -> str:
    if found is None or found.mean is None:
        return cells.NOTHING
    return f"{cells.number(found.mean)} ({cells.number(found.low)} to {cells.number(found.high)})"


def _gap(found: Difference | None) -> str:
    if found is None or found.difference is None:
        return cells.NOTHING
    return f"{cells.signed(found.difference)} ({cells.signed(found.low)} to {cells.signed(found.high)})"


def _half(results: AuditResults) -> str:
    half = results.concentration.n50
    point = key_point(results)
    if half.value is None:
        most = f" (up to {point[1].n})" if point is not None else ""
        return f"n50, the number of experts whose silencing halves the behaviour: not reached{most}, of {half.of}."
    high = "not reached" if half.high is None else f"{half.high:.3g}"
    low = cells.NOTHING if half.low is None else f"{half.low:.3g}"
    return (
        f"n50, the number of experts whose silencing halves the behaviour: **{half.value:.3g}** of {half.of} "
        f"(95 % interval {low} to {high})."
    )


def _transfer(results: AuditResults) -> str:
    if not results.transfer:
        return ""
    lines = []
    for one in results.transfer:
        quantised = f", {inert(one.against.quantize)}" if one.against.quantize else ""
        said = " ".join(inert(sentence) for sentence in one.verdict.sentences)
        lines.append(f"- {inert(_last(one.against.name))}{quantised}: **{inert(one.verdict.level)}**. {said}".rstrip())
    return "## On other models\n\n" + "\n".join(lines)


def _made(results: AuditResults) -> str:
    model = results.model
    rows = [
        ("router weights", f"sha256 {inert(model.router_sha256)}"),
        *([("weights (sketch)", inert(model.weights))] if model.weights else []),
        *([("quantised", inert(model.quantize))] if model.quantize else []),
        *((f"version of {inert(name)}", inert(version)) for name, version in sorted(results.versions.items())),
        ("checks passed", f"{sum(check.passed for check in results.checks)} of {len(results.checks)}"),
        ("card written by", f"moesteer {__version__}"),
    ]
    return cells.grid(("what", "value"), rows)

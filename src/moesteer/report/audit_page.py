"""The page of an audit: verdict and tiles first, then curves, experts, concentration, transfer, methods and limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moesteer.report import audit_figures as figures
from moesteer.report import audit_tables as tables
from moesteer.report import conversations_shown, page, routing_figure
from moesteer.report.audit_files import EXPERTS, AuditResults, Experts, read_audit, read_experts
from moesteer.report.numbers import seconds
from moesteer.report.page import Page, source
from moesteer.report.routing_files import ROUTING, Routing
from moesteer.report.run_files import RESULTS, Response, read_responses, responses_path

NAV = [
    ("summary", "Summary"), ("silencing", "Silencing"), ("activation", "Activation"), ("experts", "Experts"),
    ("concentration", "Concentration"), ("hardening", "Hardening"), ("monitoring", "Monitoring"),
    ("transfer", "Transfer"), ("conversations", "Answers"), ("routing", "Routing"), ("methods", "Methods"),
    ("limits", "Limits"), ("gaps", "Not shown"),
]  # fmt: skip
BADGES = {
    "concentrated": ("concentrated", "bad"), "removable": ("removable", "bad"), "breaks": ("breaks the model", ""),
    "held": ("held", "good"), "unknown": ("unknown", ""),
}  # fmt: skip
TRANSFER_BADGES = {"holds": "accent", "weaker": "", "gone": "", "unknown": ""}


def make(run: Path) -> Page:
    """The page of a run directory of `moesteer audit`. Raises FileError."""
    results = read_audit(run)
    experts = read_experts(run)
    routing, routed = conversations_shown.routing(run)
    answers, condition = _answers(run, results)
    context = _context(run, results, experts) | {"routing": routing, "answers": answers, "condition": condition}
    return page.make(
        "audit.html.j2",
        kind="audit",
        context=context,
        figures=page.draw(_figures(results, experts, routed)),
        gaps=_gaps(results, experts, answers, routing),
    )


def _context(run: Path, results: AuditResults, experts: Experts | None) -> dict[str, Any]:
    """Everything the template shows but answers and routing."""
    badge = BADGES.get(results.verdict.level, (results.verdict.level, ""))
    concentration = results.concentration
    permuted, at_half = concentration.permuted, concentration.random_at_n50
    return {
        "nav": NAV,
        "results": results,
        "is_lab": results.model.name.lower().startswith("lab"),
        "badge": badge,
        "transfer_badges": TRANSFER_BADGES,
        "failed": [check for check in results.checks if not check.passed],
        "tiles": tables.tiles(results),
        "suites": tables.suites(results),
        "silencing": tables.curve_rows(results, "silencing", results.silencing),
        "activation": tables.curve_rows(results, "activation", results.activation),
        "experts": experts,
        "expert_rows": tables.expert_rows(results, experts),
        "fdr": figures.fdr(results),
        "squares": len(figures.first_half(results)),
        "layers": tables.layer_rows(results),
        "gini": tables.estimate(concentration.gini, "concentration", "gini"),
        "permuted": tables.band(permuted.behaviour if permuted else None, "concentration", "permuted", "behaviour"),
        "at_half": tables.band(at_half.behaviour if at_half else None, "concentration", "random_at_n50", "behaviour"),
        "hardening": []
        if results.hardening is None
        else tables.point_rows(results, results.hardening.curve, "hardening", "curve"),
        "reversed": tables.reversed_rows(results),
        "auroc": None
        if results.monitoring is None
        else tables.estimate(results.monitoring.auroc, "monitoring", "auroc", form=".3f"),
        "operating": tables.operating_rows(results.monitoring),
        "transfers": [tables.transfer_part(results, one, index) for index, one in enumerate(results.transfer)],
        "settings": _facts(results.settings),
        "thresholds": [_threshold(name, value) for name, value in sorted(results.thresholds.items())],
        "facts": [(name, _facts(one.facts)) for name, one in results.finders.items()],
        "timings": [(step, seconds(value, f"/seconds/{step}")) for step, value in results.seconds.items()],
        "sources": [source(run, name) for name in (RESULTS, EXPERTS, ROUTING, *_responses())],
    }  # fmt: skip


def _responses() -> tuple[str, str]:
    return responses_path("none"), responses_path("silencing")


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _text(value)) for name, value in sorted(found.items())]


def _threshold(name: str, value: Any) -> tuple[str, str]:
    """A threshold's name, and its value with what it means where the audit says so."""
    if isinstance(value, dict) and set(value) == {"value", "meaning"}:
        return name, f"{_text(value['value'])}: {value['meaning']}"
    return name, _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _answers(run: Path, results: AuditResults) -> tuple[dict[str, Any], str | None]:
    """Answers of the model as it is and with the key number of experts silenced; that condition's name."""
    point = tables.key_point(results)
    condition = point[1].condition if point is not None else None
    rows = [read_responses(run, name, split=None) for name in ("none", "silencing")]
    missing = [responses_path(name) for name, found in zip(("none", "silencing"), rows, strict=True) if found is None]
    before, after = rows
    after = _of_condition(after, condition)
    found = conversations_shown.side_by_side(before, after, missing=missing, kind="test conversation")
    return found, condition


def _of_condition(rows: Sequence[Response] | None, condition: str | None) -> list[Response] | None:
    return None if rows is None else [row for row in rows if row.condition == condition]


def _figures(results: AuditResults, experts: Experts | None, routed: Routing | None) -> dict[str, Callable[[int], Any]]:
    makers: dict[str, Callable[[int], Any]] = {
        "figure-silencing": lambda width: figures.curve_panels(
            results, results.silencing, width_px=width, done="silenced"
        ),
        "figure-layers": lambda width: figures.by_layer(results, width_px=width),
        "figure-hardening": lambda width: figures.hardening(results, width_px=width),
    }
    if results.activation is not None:
        activation = results.activation
        makers["figure-activation"] = lambda width: figures.curve_panels(
            results, activation, width_px=width, done="activated"
        )
    if experts is not None:
        makers["figure-experts"] = lambda width: figures.expert_map(results, experts, width_px=width)
    if results.monitoring is not None:
        monitoring = results.monitoring
        makers["figure-roc"] = lambda width: figures.roc(monitoring, width_px=width)
    for index, one in enumerate(results.transfer):
        makers[f"figure-transfer-{index}"] = partial(_transfer, results, one)
        makers[f"figure-scatter-{index}"] = partial(_scatter, results, experts, one)
    return makers | routing_figure.makers(routed)


def _transfer(results: AuditResults, one: Any, width_px: int) -> Any:
    return figures.transfer(results, one, width_px=width_px)


def _scatter(results: AuditResults, experts: Experts | None, one: Any, width_px: int) -> Any:
    return figures.scatter(results, experts, one, width_px=width_px)


def _gaps(
    results: AuditResults, experts: Experts | None, answers: dict[str, Any], routing: dict[str, Any]
) -> list[str]:
    """What the page cannot show, in sentences."""
    found = []
    if experts is None:
        found.append(f"The map of experts: {EXPERTS} is missing.")
    if results.activation is None:
        found.append("Activation: the audit did not measure it.")
    if results.hardening is None:
        found.append("Hardening and what an attacker gains: the audit was given no mask (--mask).")
    if results.monitoring is None:
        found.append("Monitoring: the audit fitted no detector of attacks.")
    if not results.transfer:
        found.append("Transfer: the audit was given no other model (--against).")
    found += [f"Scatter of experts on {one.against.name}: its differences are not recorded."
              for one in results.transfer if one.difference_LE is None]  # fmt: skip
    found += [f"Answers: {path} is missing." for path in answers["missing"]]
    if routing["missing"]:
        found.append(routing["missing"])
    return found

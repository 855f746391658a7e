"""The page of a steering run: methods by metrics, what they cost, the mask, and conversations before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesteer.report import conversations_shown, figures, page, routing_figure, tables, wording
from moesteer.report.page import Page, source
from moesteer.report.routing_files import ROUTING, Routing
from moesteer.report.run_files import (
    RESULTS,
    MaskFile,
    Results,
    inside,
    read_mask,
    read_responses,
    read_results,
    responses_path,
)

NAV = [
    ("summary", "Summary"), ("results", "Methods"), ("trade-off", "What it costs"), ("mask", "The mask"),
    ("tactics", "By tactic"), ("conversations", "Conversations"), ("routing", "Routing"), ("splits", "Data"),
    ("checks", "Checks"), ("recompute", "Sources"), ("gaps", "Not shown"),
]  # fmt: skip
MOST_ENTRIES = 40


def make(run: Path) -> Page:
    """The page of a run directory of `moesteer steer` or `demo`. Raises FileError, MaskFileError."""
    results = read_results(run)
    name = wording.shown_method(results)
    mask, mask_path = _mask(run, results, name)
    routing, routed = conversations_shown.routing(run)
    context = _context(run, results, name, mask, mask_path) | {"routing": routing}
    return page.make(
        "steer.html.j2",
        kind="steer",
        context=context,
        figures=page.draw(_figures(results, name, mask, routed)),
        gaps=_gaps(results, name, mask, mask_path, context),
    )


def _context(
    run: Path, results: Results, name: str | None, mask: MaskFile | None, mask_path: str | None
) -> dict[str, Any]:
    """Everything the template shows but the routing."""
    before = read_responses(run, "none")
    after = read_responses(run, name) if name is not None else None
    missing = [
        responses_path(method)
        for method, rows in (("none", before), (name, after))
        if method is not None and rows is None
    ]
    used = [RESULTS, mask_path, responses_path("none"), responses_path(name) if name is not None else None, ROUTING]
    return {
        "nav": NAV,
        "results": results,
        "is_lab": results.model.name.lower().startswith("lab"),
        "shown": name,
        "outcome": wording.outcome(results),
        "tiles": tables.tiles(results, name),
        "failed": [check for check in results.checks if not check.passed],
        "gates": [(name, method.gate) for name, method in results.methods.items() if method.gate is not None],
        "warnings": _warnings(results),
        "table": tables.headline_table(results),
        "trade_off": tables.trade_off_table(results),
        "trade_off_axis": figures.trade_off_axis(results),
        "tactics": tables.tactics_table(results, name),
        "mask": mask,
        "mask_path": mask_path,
        "mask_rows": _entries(mask),
        "conversations": conversations_shown.side_by_side(before, after, missing=missing, kind="test conversation"),
        "splits": tables.splits_table(results),
        "unseen": wording.unseen_tactics(results, tables.test_tactics(results)),
        "timings": tables.timings_table(results),
        "sources": [source(run, relative) for relative in used if relative is not None],
    }


def _gaps(
    results: Results, name: str | None, mask: MaskFile | None, mask_path: str | None, context: dict[str, Any]
) -> list[str]:
    """What the page cannot show, in sentences."""
    found = []
    if name is None:
        found.append("No method has a scored target, so there is no mask, and no conversation with one, to show.")
    elif mask is None:
        found.append(f"The mask of {name}: {f'{mask_path} is missing' if mask_path else 'results.json names no file'}.")
    if context["trade_off_axis"] is None:
        found.append("What it costs: no setting has both the target and a protected metric.")
    if not context["tactics"]:
        found.append("By tactic: results.json records none.")
    found += [f"Conversations: {path} is missing." for path in context["conversations"]["missing"]]
    if context["routing"]["missing"]:
        found.append(context["routing"]["missing"])
    return found


def _warnings(results: Results) -> list[tuple[str, str]]:
    """What methods warn of their own evidence (a surrogate no better than the number of tokens), each once."""
    found = []
    for name, facts in (results.model_extra or {}).get("facts", {}).items():
        for one in facts if isinstance(facts, list) else [facts]:
            said = one.get("warning") if isinstance(one, dict) else None
            if isinstance(said, str):
                found.append((str(name), said))
    return list(dict.fromkeys(found))


def _mask(run: Path, results: Results, name: str | None) -> tuple[MaskFile | None, str | None]:
    relative = results.methods[name].mask if name is not None else None
    for method in results.methods.values():
        if method.mask is not None:
            inside(run, method.mask)
    return (read_mask(run, relative), relative) if relative is not None else (None, None)


def _entries(mask: MaskFile | None) -> list[dict[str, Any]]:
    """The entries of a mask with the largest size, which the heat map shows to those who can see it."""
    if mask is None:
        return []
    places = [(int(row), int(expert)) for row, expert in zip(*mask.values_LE.nonzero(), strict=True)]
    places.sort(key=lambda place: (-abs(mask.values_LE[place]), place))
    words = {-1.0: "off", 1.0: "on"}
    return [
        {
            "layer": mask.layer_ids[row],
            "expert": expert,
            "value": words[float(mask.values_LE[row, expert])]
            if mask.kind == "force"
            else f"{mask.values_LE[row, expert]:+.3f}",
        }
        for row, expert in places[:MOST_ENTRIES]
    ]


def _figures(
    results: Results, name: str | None, mask: MaskFile | None, routed: Routing | None
) -> dict[str, Callable[[int], Any]]:
    makers: dict[str, Callable[[int], Any]] = {
        "figure-trade-off": lambda width: figures.trade_off(results, width_px=width)
    }
    if mask is not None:
        makers["figure-mask"] = lambda width: figures.heat_map(mask, width_px=width)
    if name is not None:
        makers["figure-tactics"] = lambda width: figures.by_tactic(results, name=name, width_px=width)
    return makers | routing_figure.makers(routed)

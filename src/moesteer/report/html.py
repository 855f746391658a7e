"""A run directory as one page that works offline: `write_report(run)` reads its files and writes report.html.

No model, no network, no clock: the same files give the same bytes. The page carries its own plotly.js, allows
no script but its own two (by SHA-256, in its Content-Security-Policy) and loads nothing. All text from models
and users is escaped, in HTML by Jinja2 and in figures by figures.label.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from moesteer import files, runs
from moesteer.errors import MissingExtraError
from moesteer.report import examples, figures, tables, wording
from moesteer.report.run_files import (
    RESULTS,
    MaskFile,
    Response,
    Results,
    inside,
    read_mask,
    read_responses,
    read_results,
    responses_path,
)

REPORT = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
WIDTHS_PX = {"wide": 960, "narrow": 340}
"""Figures are laid out for these two widths; report.js takes the one that fits the box."""


def write_report(run: Path) -> Path:
    """Write `report.html` into a run directory, from its files alone, and return its path.

    Raises FileError (results.json missing or malformed, a path that leads out of the run directory, a
    responses file that is not JSON lines), MaskFileError, MissingExtraError (jinja2 or plotly).
    """
    run = Path(run)
    path = run / REPORT
    files.write_text(path, render(run))
    runs.renew(run, REPORT)
    return path


def render(run: Path) -> str:
    """The page as text."""
    results = read_results(run)
    environment = _environment()
    plotly = _plotly()
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    context = _context(Path(run), results)
    page: str = environment.get_template("report.html.j2").render(
        **context,
        style=_markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        plotly=_markup(plotly),
        script=_markup(script),
        policy=content_policy([plotly, script]),
    )
    return page


def content_policy(scripts: list[str]) -> str:
    """The page's Content-Security-Policy: these inline scripts by hash, inline styles, data images, no network.

    Styles need 'unsafe-inline' because plotly sets style attributes; it works without 'unsafe-eval' and blobs.
    """
    digests = [base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def script_json(value: Any) -> str:
    """JSON that cannot end the script element that holds it, nor open a comment there."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _environment() -> Any:
    try:
        from jinja2 import FileSystemLoader, StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment
    except ImportError as error:
        raise _missing("jinja2") from error
    environment = SandboxedEnvironment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"metric_name": wording.metric_name, "method_note": wording.method_note}
    return environment


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise _missing("plotly") from error
    source: str = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in source.lower() or "<!--" in source:
        raise AssertionError("plotly.js holds a sequence that would end its own script element")
    return source


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"{package} is not installed",
        where="moesteer.report",
        expected="the packages that write a report: jinja2 and plotly",
        do=f"pip install {package}",
    )


def _finalize(value: Any) -> Any:
    """Every text put into the page goes through `printable` before it is escaped; our own markup does not."""
    return wording.printable(value) if type(value) is str else value


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _context(run: Path, results: Results) -> dict[str, Any]:
    """Everything the template shows."""
    name = wording.shown_method(results)
    mask, mask_path = _mask(run, results, name)
    before = read_responses(run, "none")
    after = read_responses(run, name) if name is not None else None
    missing = [
        responses_path(method)
        for method, rows in (("none", before), (name, after))
        if method is not None and rows is None
    ]
    used = [RESULTS, mask_path, responses_path("none"), responses_path(name) if name is not None else None]
    return {
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
        "conversations": _conversations(before, after, missing),
        "splits": tables.splits_table(results),
        "unseen": wording.unseen_tactics(results, tables.test_tactics(results)),
        "timings": tables.timings_table(results),
        "sources": [_source(run, relative) for relative in used if relative is not None],
        "figures": _markup(script_json(_figures(results, name, mask))),
    }


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


def _figures(results: Results, name: str | None, mask: MaskFile | None) -> dict[str, dict[str, Any]]:
    drawn: dict[str, dict[str, Any]] = {}
    for size, width_px in WIDTHS_PX.items():
        made = {
            "figure-trade-off": figures.trade_off(results, width_px=width_px),
            "figure-mask": figures.heat_map(mask, width_px=width_px) if mask is not None else None,
            "figure-tactics": figures.by_tactic(results, name=name, width_px=width_px) if name is not None else None,
        }
        for box, figure in made.items():
            if figure is not None:
                drawn.setdefault(box, {})[size] = figure
    return drawn


def _conversations(
    before: list[Response] | None, after: list[Response] | None, missing: list[str]
) -> dict[str, Any]:  # fmt: skip
    if before is None or after is None:
        return {"missing": missing, "pairs": [], "counts": None, "transitions": [], "rule": examples.RULE}
    pairs, counts = examples.pair_up(before, after)
    return {
        "missing": missing,
        "pairs": [
            {
                "pair": pair,
                "sides": [_side(pair.before), _side(pair.after)],
            }
            for pair in examples.choose(pairs)
        ],
        "counts": counts,
        "transitions": examples.transitions(pairs),
        "rule": examples.RULE,
    }


def _side(response: Response) -> dict[str, Any]:
    rank = examples.rank(response)
    return {
        "response": response,
        "tone": {1: "good", 0: "bad", -1: "bad"}.get(rank, "plain") if rank is not None else "plain",
    }


def _source(run: Path, relative: str) -> dict[str, Any]:
    """A file the page was made from, with its size and SHA-256, or that it is missing."""
    path = inside(run, relative)
    if not path.exists():
        return {"path": relative, "bytes": None, "sha256": None}
    data = files.read_bytes(path, kind="journal")
    return {"path": relative, "bytes": len(data), "sha256": files.sha256(data)}

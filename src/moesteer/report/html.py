"""`moesteer report`: a page that works offline, chosen by what the run is, and the card of an audit.

    write_report(run)    reads a run directory (or benchmark results) and writes report.html
    render(run)          the page as text
    write_card(run)      card.md of an audit

No model and no network: everything is read from the run's files, which the page names with their SHA-256.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from moesteer import files, runs
from moesteer.errors import FileError, InputError
from moesteer.report import audit_card, audit_page, bench_page, evaluate_page, steer_page
from moesteer.report.audit_files import read_audit
from moesteer.report.bench_files import is_quality
from moesteer.report.page import Page
from moesteer.report.run_files import RESULTS

REPORT = "report.html"
CARD = "card.md"
Kind = Literal["steer", "evaluate", "audit", "bench"]


def write_report(run: Path, *, out: Path | None = None) -> Path:
    """Write `report.html` into a run directory (or to `out`), from its files alone, and return its path.

    run: of `moesteer steer`, `evaluate --out` or `audit`; or what bench/ wrote: a JSON file, or a folder of them.
    Raises FileError (results.json missing or malformed, a path that leads out of the run directory, a
    responses file that is not JSON lines), MaskFileError, MissingExtraError (jinja2 or plotly).
    """
    return write_page(run, make(run), out=out)


def write_page(run: Path, page: Page, *, out: Path | None = None) -> Path:
    """Write a page that `make` gave; where it goes into a complete run, run.json notes it."""
    run = Path(run)
    path = out if out is not None else run / REPORT if run.is_dir() else run.with_suffix(".html")
    files.write_text(path, page.text)
    if out is None and run.is_dir():
        runs.renew(run, REPORT)
    return path


def render(run: Path) -> str:
    """The page as text."""
    return make(run).text


def make(run: Path) -> Page:
    """The page, with the kind of run and what cannot be shown of it."""
    run = Path(run)
    kind = kind_of(run)
    if kind == "audit":
        return audit_page.make(run)
    if kind == "evaluate":
        return evaluate_page.make(run)
    if kind == "steer":
        return steer_page.make(run)
    if run.is_file():
        return bench_page.make(run.parent, [run.name])
    return bench_page.make(run, _benchmarks(run))


def kind_of(run: Path) -> Kind:
    """What a run is, by its results.json. Raises FileError where nothing says so."""
    run = Path(run)
    if run.is_file():
        return "bench"
    path = run / RESULTS
    if not path.exists():
        if not (run / runs.RUN).exists() and _benchmarks(run):
            return "bench"
        raise _nothing(run)
    found = files.read_json(path)
    if is_quality(found):
        return "bench"
    if not isinstance(found, dict):
        raise _unknown(path, f"it holds a {type(found).__name__}")
    kind = found.get("kind")
    if kind == "audit":
        return "audit"
    if kind not in (None, "steer", "evaluate"):
        raise _unknown(path, f"its kind is {kind!r}"[:80])
    return "evaluate" if isinstance(found.get("scenario"), str) else "steer"


def write_card(run: Path) -> Path:
    """Write `card.md`, what an audit found as Markdown for a model's page, and return its path.

    Raises InputError for a run that is no audit; the errors of reading it.
    """
    run = Path(run)
    kind = kind_of(run)
    if kind != "audit":
        raise InputError(
            f"a card says what an audit found, and this is a run of {kind}",
            where=str(run),
            expected="a run directory of `moesteer audit`",
            do="for the card of a mask, use `moesteer mask push`",
        )
    path = run / CARD
    files.write_text(path, audit_card.card(read_audit(run)))
    runs.renew(run, CARD)
    return path


def _benchmarks(folder: Path) -> list[str]:
    """JSON files of a folder that is no run, by name."""
    return sorted(path.name for path in folder.glob("*.json") if path.is_file()) if folder.is_dir() else []


def _nothing(run: Path) -> FileError:
    status = _status(run)
    return FileError(
        f"there is nothing to report on: {RESULTS} is missing{f' (the run is {status})' if status else ''}",
        where=str(run / RESULTS),
        expected="a run directory that holds results.json, which a run writes last",
        do="give the folder of a finished run, or run the same command again: it goes on where it stopped",
    )


def _status(run: Path) -> str | None:
    path = run / runs.RUN
    state: Any = files.read_json(path) if path.is_file() else None
    return str(state.get("status")) if isinstance(state, dict) else None


def _unknown(path: Path, what: str) -> FileError:
    return FileError(
        f"not a run that can be reported on: {what}",
        where=str(path),
        expected="results of moesteer steer, evaluate or audit, or of bench/",
        do="report on it with the version of moesteer that made it (run.json names it)",
    )

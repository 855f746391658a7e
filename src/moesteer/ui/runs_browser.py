"""The runs below one folder: which there are, what each says of itself, and its report.

A run is named by its path below the folder. Names are looked up among those that are found at that moment, never
joined to a path, and nothing outside of the folder is followed: links are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moesteer import files, runs
from moesteer.errors import FileError, MoesteerError, UnknownNameError
from moesteer.locking import holder_of
from moesteer.report.html import REPORT
from moesteer.report.run_files import RESULTS

DEPTH = 3
"""How far below the folder runs are looked for."""
MOST_RUNS = 500
LONGEST = 300
"""Characters of one text out of a run's files."""


@dataclass(frozen=True)
class Run:
    """What a run's run.json says. status: with who holds it now; when: of its last change, UTC."""

    name: str
    model: str
    scenario: str
    status: str
    when: str
    has_report: bool


@dataclass(frozen=True)
class Outcome:
    """What a run's results.json says, in a few lines of text. lines: sentences, not yet escaped."""

    kind: str
    title: str
    lines: tuple[str, ...]
    has_report: bool


def find(folder: Path) -> dict[str, Path]:
    """The run directories by name, in order: folders with a run.json or a results.json, links left out."""
    found: dict[str, Path] = {}
    if folder.is_dir():
        _walk(folder, folder, DEPTH, found)
    return found


def _walk(root: Path, folder: Path, depth: int, found: dict[str, Path]) -> None:
    try:
        children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.is_symlink())
    except OSError:
        return  # one that may not be read holds nothing to show
    for child in children:
        if len(found) >= MOST_RUNS:
            return
        if any(_is_file(child / name) for name in (runs.RUN, RESULTS)):
            found[child.relative_to(root).as_posix()] = child
        elif depth > 1 and not child.name.startswith("."):
            _walk(root, child, depth - 1, found)


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def has_report(run: Path) -> bool:
    """Whether a run has a report of its own, and not a link to a file elsewhere."""
    return _is_file(run / REPORT)


def masks_of(run: Path) -> list[Path]:
    """The masks that a run chose, links left out; not those that it only tried."""
    folder = run / "masks"
    if folder.is_symlink():
        return []
    return [path for path in sorted(folder.glob("*.safetensors")) if _is_file(path)]


def named(folder: Path, name: str) -> Path:
    """The run of that name. Raises UnknownNameError."""
    found = find(folder)
    if name not in found:
        raise UnknownNameError(
            f"no run {name[:LONGEST]!r}",
            where=str(folder),
            expected=f"one of the {len(found)} runs there",
            do="look for runs again, and choose one of the list",
        )
    return found[name]


def describe(folder: Path) -> list[Run]:
    """Every run below the folder."""
    return [_described(name, path) for name, path in find(folder).items()]


def _described(name: str, path: Path) -> Run:
    state = state_of(path)
    plan = state.get("plan")
    plan = plan if isinstance(plan, dict) else {}
    scenario = plan.get("scenario")
    scenario = scenario.get("name") if isinstance(scenario, dict) else scenario
    holder = holder_of(path)
    status = _text(state.get("status")) or "unknown"
    stamp = max((path / file).stat().st_mtime for file in (runs.RUN, RESULTS) if _is_file(path / file))
    return Run(
        name=name,
        model=_text(plan.get("model")),
        scenario=_text(scenario),
        status=f"{status}: being written by {holder}" if holder else status,
        when=datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M"),
        has_report=has_report(path),
    )


def state_of(path: Path) -> dict[str, Any]:
    """run.json of a run; empty where there is none, a status that says why where it cannot be read."""
    if not _is_file(path / runs.RUN):
        return {}
    try:
        state = files.read_json(path / runs.RUN)
    except MoesteerError as error:
        return {"status": f"unreadable ({error.what[:LONGEST]})"}
    return state if isinstance(state, dict) else {"status": "unreadable (not an object)"}


def _text(value: Any) -> str:
    return value[:LONGEST] if isinstance(value, str) else ""


def outcome(folder: Path, name: str) -> Outcome:
    """What came of a run. Raises UnknownNameError, FileError (results that are not JSON)."""
    path = named(folder, name)
    reported = has_report(path)
    if not _is_file(path / RESULTS):
        state = state_of(path)
        error = _text(state.get("error")).splitlines()
        more = (*error[:1], *_command(state))
        return Outcome("", "no results yet", more, reported)
    found = files.read_json(path / RESULTS)
    found = found if isinstance(found, dict) else {}
    checks = found.get("checks")
    failed = [
        f"check not met: {_text(check.get('name'))}: {_text(check.get('detail'))}"
        for check in (checks if isinstance(checks, list) else [])
        if isinstance(check, dict) and check.get("passed") is False
    ]
    verdict = found.get("verdict")
    if isinstance(verdict, dict):
        said = verdict.get("sentences")
        sentences = [_text(one) for one in said] if isinstance(said, list) else []
        return Outcome("audit", _text(verdict.get("title")), (*sentences, *failed), reported)
    scenario = found.get("scenario")
    title = _text(scenario.get("title")) if isinstance(scenario, dict) else ""
    chosen = found.get("recommended")
    lines = [f"recommended: {_text(chosen)}"] if isinstance(chosen, str) else []
    kind = "steering" if "recommended" in found else "evaluation"
    return Outcome(kind, title, (*lines, *failed), reported)


def _command(state: dict[str, Any]) -> tuple[str, ...]:
    command = _text(state.get("command"))
    return (f"goes on with: {command}",) if command and state.get("status") != "complete" else ()


def report_bytes(folder: Path, name: str) -> bytes:
    """A run's report.html. Raises UnknownNameError, FileError (there is none, it is a link, or too large)."""
    path = named(folder, name) / REPORT
    if not _is_file(path):
        raise FileError(
            "the run has no report",
            where=name,
            expected=f"a file {REPORT} in it",
            do="write it with `moesteer report RUN`",
        )
    return files.read_bytes(path, kind="report")


def rows_done(path: Path) -> list[tuple[str, int, int | None]]:
    """(name, rows so far, rows in the end where known) of each file of responses, begun or not."""
    expects = state_of(path).get("expects")
    wanted = {str(k): v for k, v in expects.items() if isinstance(v, int)} if isinstance(expects, dict) else {}
    begun = {file.stem: _lines(file) for file in sorted(path.glob("responses/*.jsonl")) if _is_file(file)}
    return [(name, begun.get(name, 0), wanted.get(name)) for name in dict.fromkeys((*begun, *wanted))]


def _lines(path: Path) -> int:
    with open(path, "rb") as handle:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: handle.read(1 << 20), b""))

"""Run directories: absent, resumable or complete, and never two writers in one.

RUN/run.json   command, versions, seed, plan and status     RUN/masks/       what detection found and chose
RUN/trace/     what was captured                            RUN/responses/   every reply and verdict
RUN/results.json, RUN/report.html                           every number recomputable from the above
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.conversations import Conversation, to_row
from moesteer.errors import FileError, RunDirectoryError

VERSIONED = ("moesteer", "torch", "transformers", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def data_digest(data: Mapping[str, Mapping[Any, Sequence[Conversation]]]) -> str:
    """sha256 of every conversation of every suite and split."""
    rows = [[name, split, [to_row(c) for c in rows]] for name, by in data.items() for split, rows in by.items()]
    return files.sha256(files.dumps(rows, indent=None).encode("utf-8"))


class Run:
    """A run directory that this process holds."""

    def __init__(self, folder: Path, plan: Mapping[str, Any], state: dict[str, Any]) -> None:
        self.folder, self.plan, self.state = folder, dict(plan), state

    def path(self, *parts: str) -> Path:
        """A path inside the run."""
        return self.folder.joinpath(*parts)

    @property
    def complete(self) -> bool:
        """Whether results.json was written."""
        return bool(self.state.get("status") == "complete") and self.path("results.json").is_file()

    def require_model(self, identity: Mapping[str, str]) -> None:
        """Remember which weights the run is of; raise RunDirectoryError where it was begun with others."""
        if self.state.setdefault("model", dict(identity)) != dict(identity):
            raise RunDirectoryError(
                "the model's weights are not those the run was begun with",
                where=str(self.folder),
                expected=f"weights {self.state['model']}, found {dict(identity)}",
                do="choose another --out, or give --fresh to start again",
            )
        self.mark(str(self.state["status"]))

    def mark(self, status: str, **more: Any) -> None:
        """Write the status into run.json."""
        self.state = {**self.state, **more, "status": status}
        files.write_json(self.path("run.json"), self.state)


@contextmanager
def opened(folder: Path, *, plan: Mapping[str, Any], fresh: bool = False) -> Iterator[Run]:
    """Hold a run directory: a new one, or one of the same plan to go on with. fresh: delete that one first.

    plan: everything that decides the results. Raises RunDirectoryError for a folder that is something else,
    was made with another plan, or is held by another process.
    """
    folder = Path(folder)
    path = folder / "run.json"
    try:
        if folder.exists() and not folder.is_dir():
            raise _not_ours(folder, "it is a file")
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} - {".lock"} and not _is_run(path):
            raise _not_ours(folder, "it is not empty and holds no run")
    except (OSError, ValueError) as error:
        raise _not_ours(folder, f"it cannot be looked at: {error}") from error
    with _locked(folder):
        if fresh:
            _empty(folder)
        files.remove_temporaries(folder)
        state = {"schema": 1, "plan": dict(plan), "versions": versions(), "status": "running"}
        if path.exists():
            found = files.read_json(path)
            if not isinstance(found, dict) or found.get("plan") != dict(plan):
                changed = _changed(found.get("plan") if isinstance(found, dict) else None, plan)
                raise RunDirectoryError(
                    f"the folder holds a run with other settings ({changed})",
                    where=str(folder),
                    expected="a new folder, or the same command to go on with",
                    do="choose another --out, or give --fresh to delete that run and start again",
                )
            state = {key: value for key, value in found.items() if key != "error"}
        run = Run(folder, plan, state)
        if not run.complete:
            run.mark("running")
        try:
            yield run
        except KeyboardInterrupt:
            run.mark("interrupted")
            raise
        except Exception as error:
            run.mark("failed", error=str(error))
            raise


def _is_run(path: Path) -> bool:
    """Whether a run.json is one of ours: nothing else is gone on with or deleted."""
    if not path.exists():
        return False
    try:
        found = files.read_json(path)
    except FileError:
        return False
    return isinstance(found, dict) and found.get("schema") == 1 and "plan" in found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _not_ours(folder, f"it cannot be written to: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
            raise RunDirectoryError(
                f"another process is writing this run ({holder or 'unknown'})",
                where=str(folder),
                expected="one writer at a time",
                do="wait for it, stop it, or choose another --out",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for name in ("trace", "masks", "responses"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("results.json", "report.html", "run.json"):
        (folder / name).unlink(missing_ok=True)


def _changed(before: Any, after: Mapping[str, Any]) -> str:
    if not isinstance(before, dict):
        return "its run.json has no plan"
    names = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    return "changed: " + ", ".join(sorted(names))


def _not_ours(folder: Path, what: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"the folder cannot hold a run: {what}",
        where=str(folder),
        expected="an empty or new folder, or an earlier run of the same command",
        do="choose another --out",
    )

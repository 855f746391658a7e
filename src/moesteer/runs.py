"""Run directories: absent, resumable or complete, and never two writers in one.

RUN/run.json   command, versions, seed, plan and status; once complete, the sha256 of every file, its own included
RUN/trace/     what was captured                            RUN/masks/       what detection found and chose
RUN/results.json, RUN/report.html                           RUN/responses/   every reply and verdict
Every number is recomputable from these.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.conversations import Conversation, to_row
from moesteer.errors import FileError, RunDirectoryError
from moesteer.locking import LOCK, locked
from moesteer.stopping import ending_on_sigterm, uninterrupted
from moesteer.version import __version__

VERSIONED = ("moesteer", "torch", "transformers", "numpy", "safetensors")
SCHEMA = 1
"""Of run.json and of the files beside it. A version that changes what a run's files mean counts it up, and so goes on
with no run that an earlier one began."""
RUN = "run.json"
CONTINUED_WITH = "continued_with"
"""Key of run.json: for each time a run went on with other versions of its libraries, those that changed."""
SELF = "sha256"
"""Key of run.json: the digest of all the rest of it."""


def versions(*more: str) -> dict[str, str]:
    """Versions of what decides the numbers. more: packages beside VERSIONED."""
    found = {"python": platform.python_version()}
    for name in (*VERSIONED, *more):
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

    def expect(self, rows: Mapping[str, int]) -> None:
        """Write down how many rows each journal of responses (by name) is to have: what is left can then be told."""
        before = self.state.get("expects", {})
        wanted = {**before, **rows}
        if wanted != before and not self.complete:
            self.mark(str(self.state["status"]), expects=wanted)

    def results(self) -> dict[str, Any]:
        """results.json of a complete run. Raises FileError where it is not what the run wrote."""
        path = self.path("results.json")
        noted = self.state.get("files", {}).get(path.name)
        if noted is not None and files.sha256_of(path) != noted:
            raise FileError(
                "the results were changed since the run completed",
                where=str(path),
                expected=f"sha256 {noted}",
                do="see `moesteer doctor RUN`; delete results.json to have it computed again from the responses",
            )
        found: dict[str, Any] = files.read_json(path)
        return found

    def mark(self, status: str, **more: Any) -> None:
        """Write the status into run.json; with "complete", also the digest of every file of the run."""
        kept = {key: value for key, value in self.state.items() if key not in (SELF, "files")}
        self.state = {**kept, **more, "status": status}
        if status == "complete":
            self.state["files"] = digests(self.folder)
        _write(self.folder, self.state)


@contextmanager
def opened(folder: Path, *, plan: Mapping[str, Any], fresh: bool = False) -> Iterator[Run]:
    """Hold a run directory: a new one, or one of the same plan to go on with. fresh: delete that one first.

    plan: everything that decides the results. SIGTERM ends the block with SystemExit(143); that and Ctrl-C leave the
    status "interrupted". Raises RunDirectoryError for a folder that is something else, was made with another plan or
    in another format, RunLockedError for one that another process holds.
    """
    folder = Path(folder)
    path = folder / RUN
    try:
        if folder.exists() and not folder.is_dir():
            raise _not_ours(folder, "it is a file")
        if folder.is_dir() and not _is_run(path) and not all(_is_beginning(entry.name) for entry in folder.iterdir()):
            raise _not_ours(folder, "it is not empty and holds no run")
    except (OSError, ValueError) as error:
        raise _not_ours(folder, f"it cannot be looked at: {error}") from error
    with ending_on_sigterm(), locked(folder):
        if fresh:
            _empty(folder)
        files.remove_temporaries(folder)
        run = Run(folder, plan, _state(folder, plan))
        if not run.complete:
            run.mark("running")
        with _noting_the_end(run):
            yield run


@contextmanager
def _noting_the_end(run: Run) -> Iterator[None]:
    """Write into run.json that the block was interrupted or failed; a complete run stays complete."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, GeneratorExit) or run.complete:
            raise
        try:
            with uninterrupted():
                if isinstance(error, Exception):
                    run.mark("failed", error=str(error))
                else:
                    run.mark("interrupted")
        except FileError as unwritten:  # a full disk, most likely the reason of the first
            error.add_note(f"run.json does not say so: {unwritten.what}")
        raise


def _state(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """run.json's content: the one that is there, which must be of this plan, or a new one."""
    path = folder / RUN
    here: dict[str, Any] = {"command": _command(), "cwd": os.getcwd() if _command() else None}
    if not path.exists():
        return {"schema": SCHEMA, "plan": dict(plan), "versions": versions(), "status": "running", **here}
    found = files.read_json(path)
    if isinstance(found, dict) and found.get("schema") != SCHEMA:
        made = found.get("versions", {}).get("moesteer", "an unknown version")
        raise RunDirectoryError(
            f"the run is of format {found.get('schema')}, of moesteer {made}",
            where=str(folder),
            expected=f"format {SCHEMA}, which this moesteer ({__version__}) goes on with",
            do=f"go on with moesteer {made}, choose another --out, or give --fresh to start again",
        )
    if not isinstance(found, dict) or found.get("plan") != dict(plan):
        changed = _changed(found.get("plan") if isinstance(found, dict) else None, plan)
        raise RunDirectoryError(
            f"the folder holds a run with other settings ({changed})",
            where=str(folder),
            expected="a new folder, or the same command to go on with",
            do="choose another --out, or give --fresh to delete that run and start again",
        )
    return _continued({key: value for key, value in found.items() if key != "error"}, folder)


def _continued(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state of a run that is gone on with; where libraries changed since, that is noted in it and said aloud."""
    if state.get("status") == "complete":
        return state
    here, earlier = versions(), state.get(CONTINUED_WITH, [])
    before = {**state.get("versions", {}), **(earlier[-1] if earlier else {})}
    changed = {name: now for name, now in here.items() if name in before and before[name] != now}
    if not changed:
        return state
    told = ", ".join(f"{name} {before[name]}, now {now}" for name, now in changed.items())
    print(f"{folder}: begun with {told}: the rest may differ from what those would have given", file=sys.stderr)
    return {**state, CONTINUED_WITH: [*earlier, changed]}


def _command() -> str | None:
    """The command line that this process was started with, where it is ours."""
    if Path(sys.argv[0]).name not in ("moesteer", "moesteer.exe"):
        return None
    return shlex.join(["moesteer", *sys.argv[1:]])


def _write(folder: Path, state: dict[str, Any]) -> None:
    state.pop(SELF, None)
    files.write_json(folder / RUN, {**state, SELF: files.sha256(files.dumps(state).encode("utf-8"))})


def is_whole(folder: Path) -> bool:
    """Whether run.json is byte for byte what was written. Raises FileError where it is not JSON."""
    path = folder / RUN
    state = files.read_json(path)
    if not isinstance(state, dict):
        return False
    rest = {key: value for key, value in state.items() if key != SELF}
    if SELF not in state:  # of a version that did not write it: nothing says that it changed
        return True
    whole = {**rest, SELF: files.sha256(files.dumps(rest).encode("utf-8"))}
    return files.dumps(whole).encode("utf-8") == files.read_bytes(path, kind="json")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a run by name, in order: but run.json, the lock, and shards, which the manifest of
    their trace has."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        passed = name in (RUN, LOCK) or path.name.endswith(files.TEMPORARY_SUFFIX)
        if path.is_file() and not path.is_symlink() and not passed and not _is_shard(path):
            found[name] = files.sha256_of(path)
    return found


def _is_shard(path: Path) -> bool:
    return path.parent.name == "shards" and (path.parent.parent / "manifest.json").is_file()


def renew(folder: Path, name: str) -> None:
    """Note the digest of a file that was written anew into a complete run (its report); in another, do nothing."""
    if not (folder / RUN).is_file():
        return
    state = files.read_json(folder / RUN)
    if isinstance(state, dict) and state.get("status") == "complete" and "files" in state and is_whole(folder):
        state["files"] = dict(sorted({**state["files"], name: files.sha256_of(folder / name)}.items()))
        _write(folder, state)


def _is_run(path: Path) -> bool:
    """Whether a run.json is one of ours: nothing else is gone on with or deleted."""
    if not path.exists():
        return False
    try:
        found = files.read_json(path)
    except FileError:
        return False
    return isinstance(found, dict) and type(found.get("schema")) is int and "plan" in found and "status" in found


def _is_beginning(name: str) -> bool:
    """Whether a file is all that a run may hold that was killed before its first run.json had its name."""
    return name == LOCK or (name.startswith(f".{RUN}.") and name.endswith(files.TEMPORARY_SUFFIX))


def _empty(folder: Path) -> None:
    for name in ("trace", "masks", "responses"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("results.json", "experts.json", "routing.json", "report.html", "card.md", "splits.json",
                 "verdicts.jsonl", RUN):  # fmt: skip
        files.remove(folder / name)


def _changed(before: Any, after: Mapping[str, Any]) -> str:
    if not isinstance(before, dict):
        return "its run.json has no plan"
    names = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    if names == ["moesteer"]:
        return f"it was begun with moesteer {before.get('moesteer')}, which goes on with it; this is {__version__}"
    return "changed: " + ", ".join(sorted(names))


def _not_ours(folder: Path, what: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"the folder cannot hold a run: {what}",
        where=str(folder),
        expected="an empty or new folder, or an earlier run of the same command",
        do="choose another --out",
    )

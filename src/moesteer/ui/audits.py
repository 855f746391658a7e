"""Audits started from the page: `moesteer audit` in a process of its own, looked at from outside, one at a time.

The command line is a fixed list of arguments, no shell. Its progress is read from its run directory and from what it
prints. It ends with the page: whoever closes `moesteer ui` stops it, and the same command goes on where it was.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moesteer import files
from moesteer.errors import FileError, InputError
from moesteer.scenario import NAME, built_in
from moesteer.ui import runs_browser
from moesteer.ui.catalogue import Catalogue

LINES = 60
"""Of what the audit printed, the last so many are shown."""
LINE_CHARACTERS = 400
PATIENCE_S = 10.0
"""What a stopped audit has to write down that it was stopped; then it is killed."""
ENDS = {0: "done", 3: "done: a check was not met", 130: "stopped", 143: "stopped", -15: "stopped", -9: "killed"}
"""What its exit codes mean; any other is a failure."""


@dataclass(frozen=True)
class Order:
    """What to audit. model, mask: names of the catalogue; limit: conversations per suite and split, None for all."""

    model: str
    name: str
    scenario: str = "jailbreak-defense"
    mask: str | None = None
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """The audit as it is now. rows: (responses, so far, in the end where known); code: None while it runs."""

    name: str
    folder: Path
    seconds: float
    status: str
    code: int | None
    rows: tuple[tuple[str, int, int | None], ...]
    lines: tuple[str, ...]
    has_report: bool = False

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.code is None


def own_command() -> tuple[str, ...]:
    """How this moesteer is started: its script beside the interpreter, or the module."""
    script = Path(sys.executable).with_name("moesteer")
    return (str(script),) if script.is_file() else (sys.executable, "-m", "moesteer.cli.main")


class Audits:
    """options: arguments of every audit, such as --device cpu. command: what is started (default: own_command)."""

    def __init__(
        self, catalogue: Catalogue, *, options: Sequence[str] = (), command: Sequence[str] | None = None
    ) -> None:
        self.catalogue = catalogue
        self._options = tuple(options)
        self._command = tuple(command) if command is not None else own_command()
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def arguments(self, order: Order) -> list[str]:
        """The command line of an audit. Raises InputError, UnknownNameError."""
        if not re.fullmatch(NAME, order.name):
            raise _bad(f"a run cannot be called {order.name[:80]!r}", "small letters, digits, . _ -, at most 64")
        if order.scenario not in built_in():
            raise _bad(f"no scenario {order.scenario[:80]!r}", f"one of {', '.join(built_in())}")
        if order.limit is not None and order.limit < 1:
            raise _bad(f"a limit cannot be {order.limit}", "a number of conversations from 1, or none")
        found = [
            *self._command, "audit", f"--scenario={order.scenario}", f"--seed={order.seed}",
            f"--out={self.catalogue.runs / order.name}", *self._options,
        ]  # fmt: skip
        if order.limit is not None:
            found.append(f"--limit={order.limit}")
        if order.mask is not None:
            found.append(f"--mask={self.catalogue.mask_path(order.mask)}")
        return [*found, "--", self.catalogue.model(order.model)]

    def start(self, order: Order) -> None:
        """Start an audit, or go on with one. Raises InputError (one is running, a bad name), FileError."""
        arguments = self.arguments(order)
        folder = self.catalogue.runs / order.name
        if folder.is_symlink():
            raise _bad(f"{order.name} is a link", "a new name, or a run in the folder itself")
        with self._lock:
            if self._running is not None and self._running.process.poll() is None:
                raise InputError(
                    f"an audit is running: {self._running.name}",
                    where="moesteer ui",
                    expected="one at a time",
                    do="wait for its end, or stop it",
                )
            self._running = _Running(order.name, folder, arguments)

    def progress(self) -> Progress | None:
        """The last audit started, as it is now; None before the first."""
        with self._lock:
            return None if self._running is None else self._running.progress()

    def stop(self) -> None:
        """Tell the audit to end (SIGTERM); it is killed where it has not after PATIENCE_S."""
        with self._lock:
            if self._running is not None:
                self._running.stop()

    def close(self) -> None:
        """Stop the audit and wait for its end."""
        with self._lock:
            if self._running is not None:
                self._running.close()


class _Running:
    """One process, and a thread that reads what it prints."""

    def __init__(self, name: str, folder: Path, arguments: Sequence[str]) -> None:
        self.name, self.folder = name, folder
        self._begun = time.monotonic()
        self._seconds: float | None = None
        self._lines: deque[str] = deque(maxlen=LINES)
        self._stopping = False
        try:
            self.process = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            )
        except OSError as error:
            raise FileError(
                f"the audit cannot be started: {error.strerror or error}",
                where=str(arguments[0]),
                expected="a program that can be run",
                do="install moesteer again; `moesteer doctor` shows what is there",
            ) from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in iter(lambda: self._piece(), b""):
            self._lines.append(line.decode("utf-8", "replace").rstrip("\r\n")[:LINE_CHARACTERS])
        self.process.wait()
        self._seconds = time.monotonic() - self._begun

    def _piece(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline(64 * 1024)

    def progress(self) -> Progress:
        code = self.process.poll()
        if code is not None:
            self._reader.join(1)  # the last lines
        try:
            rows = tuple(runs_browser.rows_done(self.folder))
        except OSError:
            rows = ()  # a file that was just replaced is looked at the next time
        return Progress(
            name=self.name,
            folder=self.folder,
            seconds=self._seconds if self._seconds is not None else time.monotonic() - self._begun,
            status=self._status(code),
            code=code,
            rows=rows,
            lines=tuple(self._lines),
            has_report=code is not None and runs_browser.has_report(self.folder),
        )

    def _status(self, code: int | None) -> str:
        if code is None:
            return "stopping" if self._stopping else "running"
        return ENDS.get(code, f"failed (exit code {code})")

    def stop(self) -> None:
        if self.process.poll() is None and not self._stopping:
            self._stopping = True
            self.process.terminate()
            threading.Thread(target=self._insist, daemon=True).start()

    def _insist(self) -> None:
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def close(self) -> None:
        self.stop()
        self._insist()
        self.process.wait()
        self._reader.join(1)


def _bad(what: str, expected: str) -> InputError:
    return InputError(what, where="the audit to start", expected=expected, do="correct it and start again")


def free_name(runs: Path, model: str) -> str:
    """A name for a new run: audit-MODEL, with a number where that is taken."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", Path(model).name.lower()).strip("-.") or "model"
    base = f"audit-{stem}"[:50]
    names = (base, *(f"{base}-{number}" for number in range(2, 1000)))
    return next((name for name in names if not (runs / name).exists()), base)


def verdict(progress: Progress) -> list[str]:
    """What a finished audit found, in sentences; empty where it found nothing."""
    path = progress.folder / "results.json"
    if progress.running or not path.is_file() or path.is_symlink():
        return []
    found = files.read_json(path)
    said = found.get("verdict") if isinstance(found, dict) else None
    if not isinstance(said, dict):
        return []
    sentences = said.get("sentences")
    texts = [said.get("title"), *(sentences if isinstance(sentences, list) else [])]
    return [text[: runs_browser.LONGEST] for text in texts if isinstance(text, str)]

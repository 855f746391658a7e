"""What an engine's processes print: kept off the screen, and read when they fail.

vLLM and the libraries below it write pages to both standard streams, from every process, and where one of those dies
the parent is told to look there. So the engine is started with both streams on a file, which its processes keep; the
parent gets its own back. With VLLM_LOGGING_LEVEL set, all of it goes to standard error instead: standard output is for
results.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesteer import errors
from moesteer.errors import MoesteerError

LEVEL = "VLLM_LOGGING_LEVEL"
MOST_BYTES = 1_000_000
"""Looked at when an engine fails: the last ones."""
_OURS = re.compile(
    r"moesteer\.errors\.(?P<kind>\w+): (?P<what>.*)\n"
    r".*?  where:    (?P<where>.*)\n"
    r".*?  expected: (?P<expected>.*)\n"
    r".*?  do:       (?P<do>.*)"
)
"""The four parts at the end of a traceback; vLLM puts the process and the time before every line."""
_OTHERS = re.compile(r"^(?:.*\] )?(?P<kind>[\w.]*(?:Error|Exception)): (?P<what>.+)$")
_ELSEWHERE = re.compile(r"root cause|initialization failed|EngineDeadError|cancelled|died unexpectedly")
"""Errors that only say that there was another."""


class Output:
    """The file that an engine's processes write to, or None where the user wants to see it all."""

    def __init__(self, path: Path) -> None:
        self.path = None if LEVEL in os.environ else path
        self._read = 0

    @contextmanager
    def around_start(self) -> Iterator[None]:
        """Inside, this process and those it starts write to the file, or to standard error."""
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(number) for number in (1, 2)]
        shown = os.environ.get(LEVEL)
        try:
            if self.path is None:
                os.dup2(2, 1)
            else:
                os.environ[LEVEL] = "ERROR"
                target = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(target, 1)
                os.dup2(target, 2)
                os.close(target)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in zip((1, 2), kept, strict=True):
                os.dup2(original, number)
                os.close(original)
            if shown is None:
                os.environ.pop(LEVEL, None)

    def explained(self, error: Exception) -> MoesteerError | str:
        """Why the engine failed, as far as this process can know: an error of ours made again, or a line."""
        if isinstance(error.__cause__, MoesteerError):
            return error.__cause__
        news = self._news()
        return error_in(news) or (reason_in(news) or " ".join(str(error).split()) or type(error).__name__)[:500]

    def _news(self) -> str:
        """What was written since the last call."""
        if self.path is None or not self.path.exists():
            return ""
        end = self.path.stat().st_size
        with self.path.open("rb") as handle:
            handle.seek(max(self._read, end - MOST_BYTES))
            self._read = end
            return handle.read().decode("utf-8", errors="replace")


def error_in(text: str) -> MoesteerError | None:
    """The last of our own errors that a process died of, made again."""
    found = list(_OURS.finditer(text))
    if not found:
        return None
    parts = found[-1].groupdict()
    kind = getattr(errors, parts.pop("kind"), None)
    if not isinstance(kind, type) or not issubclass(kind, MoesteerError):
        return None
    return kind(parts.pop("what"), **parts)


def reason_in(text: str) -> str | None:
    """The first error of anybody's that names a cause."""
    for line in text.splitlines():
        if (found := _OTHERS.match(line)) and not _ELSEWHERE.search(line):
            return f"{found['kind'].rpartition('.')[2]}: {found['what']}"
    return None

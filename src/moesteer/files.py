"""The only code that opens a file for writing: atomic, fsynced, inside stated limits.

A file appears under its name whole or not at all: it is written beside its place under a temporary name,
flushed to the disk and renamed. A journal (one JSON object a line) is the one file that grows; a torn
last line is ignored when it is read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesteer.errors import FileError, LimitError

MIB = 1024 * 1024
LIMITS_BYTES = {
    "mask": 16 * MIB,
    "mask-header": 1 * MIB,
    "direction": 1 * MIB,
    "conversations": 1024 * MIB,
    "conversation-line": 16 * MIB,
    "scenario": 1 * MIB,
    "table": 16 * MIB,
    "json": 64 * MIB,
    "shard": 2048 * MIB,
    "journal": 1024 * MIB,
    "replies": 256 * MIB,
    "report": 64 * MIB,
}
"""The largest file of each kind that is read, in bytes."""

TEMPORARY_SUFFIX = ".moesteer-tmp"
PARTIAL_SUFFIX = ".moesteer-partial"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: temporary name, fsync, rename, fsync of the folder. Raises FileError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FileError(
            f"could not write the file: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            expected="a folder that can be written to, with room on the disk",
            do="choose another --out, or free some space, and run the same command again",
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def dumps(value: Any, *, indent: int | None = 2) -> str:
    """JSON with sorted keys, no NaN and a final newline: the same value gives the same text."""
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of `dumps`. Raises ValueError on NaN: numbers that are not numbers are our bug."""
    write_text(path, dumps(value))


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """A whole file of one JSON object a line."""
    write_text(path, "".join(dumps(row, indent=None) for row in rows))


def read_bytes(path: Path, *, kind: str) -> bytes:
    """The bytes of a regular file no larger than the limit of its kind (LIMITS_BYTES).

    Read once into memory, so that what is checked is what is used. Raises FileError, LimitError.
    """
    path = Path(path)
    limit = LIMITS_BYTES[kind]
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise FileError(
                    "Is a directory" if stat.S_ISDIR(mode) else "not a regular file",
                    where=str(path),
                    expected=f"a {kind} file",
                    do="give the path of the file itself, not of a folder, pipe or device",
                )
            with os.fdopen(descriptor, "rb", closefd=False) as handle:
                data = handle.read(limit + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FileError(
            f"could not read the file: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            expected=f"a {kind} file that can be read",
            do="check the path and its permissions",
        ) from error
    if len(data) > limit:
        raise LimitError(
            f"the file is larger than {limit:,} bytes",
            where=str(path),
            expected=f"a {kind} file of at most {limit:,} bytes",
            do="split it, or check that it is the file you meant",
        )
    return data


def read_json(path: Path, *, kind: str = "json", infinity: bool = False) -> Any:
    """A JSON file. NaN, repeated keys and bad UTF-8 are errors (FileError); infinity: -Infinity and Infinity are not.

    Configs of models with Mamba layers hold Infinity, as Python's json writes it.
    """
    try:
        return parse_json(read_bytes(path, kind=kind), infinity=infinity)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"not valid JSON: {error}", where=str(path), expected="one JSON value in UTF-8", do="write the file again"
        ) from error


def parse_json(data: bytes | str, *, infinity: bool = False) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity (nor 1e999), no repeated keys. Raises ValueError, RecursionError."""
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    constant = _refuse_nan if infinity else _refuse_constant
    return json.loads(text, parse_constant=constant, parse_float=_finite, object_pairs_hook=_refuse_repeats)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _refuse_nan(name: str) -> float:
    return float(name) if name != "NaN" else _refuse_constant(name)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


class Journal:
    """An append-only file of JSON lines, flushed to the disk per batch; survives a kill at any byte."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def read(self) -> Iterator[Any]:
        """Every whole line; a torn last line is ignored. Raises FileError for a damaged one."""
        if not self.path.exists():
            return
        for number, line in enumerate(read_bytes(self.path, kind="journal").split(b"\n")[:-1], 1):
            try:
                yield parse_json(line)
            except (ValueError, RecursionError) as error:
                raise FileError(
                    f"a damaged line: {error}",
                    where=f"{self.path}, line {number}",
                    expected="one JSON object a line",
                    do="delete the file: what it held is made again",
                ) from error

    def append(self, rows: Iterable[Any]) -> None:
        """Add rows and fsync once. A torn tail of an earlier kill is cut off first."""
        data = "".join(dumps(row, indent=None) for row in rows).encode("utf-8")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as handle:
                end = handle.seek(0, os.SEEK_END)
                handle.seek(max(0, end - 1))
                if end and handle.read(1) != b"\n":
                    handle.seek(0)
                    handle.truncate(handle.read().rfind(b"\n") + 1)
                handle.seek(0, os.SEEK_END)
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise FileError(
                f"could not write the journal: {error.strerror or error}",
                where=str(self.path),
                expected="a folder that can be written to, with room on the disk",
                do="free some space and run the same command again: it goes on where it stopped",
            ) from error


def remove(path: Path) -> None:
    """Delete a file, if it is there. Raises FileError."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise FileError(
            f"could not delete the file: {error.strerror or error}",
            where=str(path),
            expected="a folder that can be written to",
            do="check its permissions, and run the same command again",
        ) from error


def remove_temporaries(folder: Path) -> int:
    """Delete what a killed writer left in `folder` (and below); how many files that was."""
    leftovers = list(Path(folder).rglob(f".*{TEMPORARY_SUFFIX}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def sha256(data: bytes) -> str:
    """Lower-case hex digest."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """Lower-case hex digest of a file of any size, read in pieces. Raises FileError."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise FileError(
            f"could not read the file: {error.strerror or error}",
            where=str(path),
            expected="a file that can be read",
            do="check its permissions, and the disk",
        ) from error


def copy(source: Path, target: Path, patches: Iterable[tuple[int, bytes]] = ()) -> None:
    """A file's bytes (of what it links to), with `patches` (first byte, data) written over; flushed to the disk.

    For files inside a folder that is `appearing`: the copy itself is not atomic.
    """
    shutil.copyfile(source, target)
    with open(target, "r+b") as handle:
        for start, data in patches:
            handle.seek(start)
            handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def appearing(out: Path, *, source: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name at the end, or goes away; FileError where that cannot be.

    What a killed process left there is deleted first. A folder that another process is writing is refused.
    """
    partial = out.with_name(f".{out.name}{PARTIAL_SUFFIX}")
    try:
        if source.resolve() in (out.resolve(), *out.resolve().parents):
            raise _no_folder(out, "it is the checkpoint's own, or in it")
        if out.is_symlink() or out.is_mount() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise _no_folder(out, "it is not empty, or not an ordinary folder")
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        raise _no_folder(out, str(error)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            os.fsync(descriptor)
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        held = isinstance(error, BlockingIOError)
        raise _no_folder(out, "another process is writing into it" if held else str(error)) from error
    finally:
        os.close(descriptor)


def _no_folder(out: Path, what: str) -> FileError:
    return FileError(
        f"cannot write into the folder: {what}",
        where=str(out),
        expected="a new or empty folder outside the checkpoint, with room on the disk",
        do="choose another folder, or free some space",
    )


def plain(value: Any) -> Any:
    """JSON-ready: no tuples, no numpy; a number that is none (an accuracy of nothing held out) is null.

    What JSON has no form for, which a method of another package may find out, is its text.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):  # numpy's arrays and numbers, without its import
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)

"""Reading a named suite: from the Hub or a folder through `datasets`, or from a local file by our own readers.

Nothing here prints text of the data. Errors name columns, rows and places; what a library says about bad data is
not passed on, because it may quote it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesteer import chat_formats, conversations
from moesteer.conversations import Conversation
from moesteer.errors import DataError, EmptyDataError, FileError, InputError
from moesteer.suites.named import NamedSuite
from moesteer.suites.table import named

READY = ("messages", "conversation_history", "messages_0", "conversations")
"""Columns that say that a row is a conversation already: it is taken as chat_formats reads it."""
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_SPECIFIED = re.compile(r"([a-z0-9][a-z0-9._-]*)(?:=(.+))?", re.DOTALL)


def read(specified: str, *, folder: Path | None = None, limit: int | None = None) -> list[Conversation]:
    """The conversations of "NAME" or "NAME=PATH" (what follows `suite:` in a scenario); PATH is beside `folder`.

    Raises UnknownNameError, InputError and the errors of `load`.
    """
    match = _SPECIFIED.fullmatch(specified)
    if match is None:
        raise InputError(
            f"{('suite:' + specified)[:80]!r} names no suite",
            where="suite:NAME",
            expected="suite:NAME, or suite:NAME=PATH for a local file or folder",
            do="`moesteer suites` lists the names",
        )
    suite = named(match[1])
    path = None if match[2] is None else (folder or Path()) / match[2]
    return load(suite, path=path, limit=limit)


def load(suite: NamedSuite, *, path: Path | None = None, limit: int | None = None) -> list[Conversation]:
    """A suite's conversations in the data's order, ids "NAME-<row>" (pairs: and "/wanted", "/other"), no split set.

    path: a .csv, .json, .jsonl or .parquet file, or a folder (saved by `datasets`, or a copy of the Hub's
    repository); None: the Hub. A file of conversations, ours or any format `conversations.read` knows, is taken as
    it is, splits and ids included. limit: at most so many conversations. Raises DataError (a column is missing or
    holds something else), EmptyDataError, FileError (absent, gated or offline), LimitError, MissingExtraError.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}", where="load", expected="at least 1", do="leave it out to read all rows")
    found: list[Conversation] = []
    seen: set[str] = set()
    place = f"suite:{suite.name}" if path is None else str(path)
    for number, at, row in _rows(suite, path):
        where = f"{place}, {at}"
        with _without_text(suite, row):
            made = _conversations(suite, row, number, where)
        if suite.one_per_group:
            made = [one for one in made if one.group not in seen]
            seen |= {one.group for one in made}
        found += made
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise EmptyDataError(
            f"no row belongs to the suite {suite.name}",
            where=place,
            expected=f"{suite.title}: {suite.columns}",
            do="check that this is the suite's own file, whole",
        )
    _require_own_ids(found, place)
    return found[:limit]


def _conversations(suite: NamedSuite, row: Any, number: int, where: str) -> list[Conversation]:
    if not isinstance(row, Mapping):
        raise DataError(
            f"a row is a {type(row).__name__}",
            where=where,
            expected=f"an object with the columns {suite.columns}",
            do="check that this is the suite's own file",
        )
    name = f"{suite.name}-{number:06d}"
    if any(row.get(column) is not None for column in READY):
        own = chat_formats.to_own(dict(row), where=where, default_id=name)
        return [conversations.from_row(one, where=where) for one in own]
    made = suite.convert(row, where)
    if suite.pairs is not None:
        endings = ("/wanted", "/other") * (len(made) // 2)
        numbers = [f"-{i}" if len(made) > 2 else "" for i in range(len(made) // 2) for _ in endings[:2]]
    else:
        endings = ("",) * len(made)
        numbers = [f"-{i}" if len(made) > 1 else "" for i in range(len(made))]
    return [
        conversations.from_row({"source": suite.name, **one, "id": f"{name}{no}{ending}"}, where=where)
        for one, no, ending in zip(made, numbers, endings, strict=True)
    ]


def _require_own_ids(found: Iterable[Conversation], place: str) -> None:
    seen: set[str] = set()
    for number, one in enumerate(found, start=1):
        if one.id in seen:
            raise DataError(
                f"conversation {number} has an id that an earlier one has",
                where=place,
                expected="an id that no other conversation has, or no id column",
                do="remove the column, or number the rows",
            )
        seen.add(one.id)


@contextmanager
def _without_text(suite: NamedSuite, row: Any) -> Iterator[None]:
    """Inside, an error about a harmful suite's row quotes nothing but the names of its columns."""
    try:
        yield
    except DataError as error:
        if not suite.harmful:
            raise
        columns = {str(key) for key in row} if isinstance(row, Mapping) else set()
        kept = columns | set(re.findall(r"\w+", suite.columns))

        def quiet(match: re.Match[str]) -> str:
            return match[0] if match[0][1:-1] in kept else "(withheld)"

        parts = [_QUOTED.sub(quiet, part) for part in (error.what, error.expected, error.do)]
        raise DataError(parts[0], where=error.where, expected=parts[1], do=parts[2]) from None


# ---------------------------------------------------------------- rows


def _rows(suite: NamedSuite, path: Path | None) -> Iterator[tuple[int, str, Any]]:
    """(number from 1, place for errors, row) of whatever holds the data."""
    if path is None:
        yield from _numbered(_from_hub(suite))
    elif path.is_dir():
        yield from _numbered(_from_folder(suite, path))
    else:
        yield from chat_formats.numbered_rows(path)


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[int, str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield number, f"row {number}", row


def _from_hub(suite: NamedSuite) -> Any:
    hub = suite.hub
    with _datasets(suite, f"suite:{suite.name}, {hub.page}") as datasets:
        files = {hub.split: hub.files} if hub.files is not None else None
        return datasets.load_dataset(hub.id, hub.config, split=hub.split, revision=hub.revision, data_files=files)


def _from_folder(suite: NamedSuite, path: Path) -> Any:
    """A folder that `datasets` saved (a Dataset, or a DatasetDict that has the suite's split), or a Hub repository."""
    split = suite.hub.split
    with _datasets(suite, str(path)) as datasets:
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        if not saved:
            return datasets.load_dataset(str(path), suite.hub.config, split=split)
        found = datasets.load_from_disk(str(path))
    if not isinstance(found, dict):
        return found
    if split not in found and len(found) != 1:
        raise DataError(
            f"the folder has no split {split!r}; it has {', '.join(sorted(map(str, found)))}",
            where=str(path),
            expected=f"the split {split}, or one split alone",
            do="save that split, or give the folder of one split",
        )
    return found[split] if split in found else next(iter(found.values()))


@contextmanager
def _datasets(suite: NamedSuite, where: str) -> Iterator[Any]:
    """The `datasets` library, silent; what it throws becomes a FileError that quotes none of the data."""
    from moesteer.backends.sources import require_extra

    require_extra("datasets", "data", what=f"the suite {suite.name} is read with datasets", where=where)
    import datasets
    import pyarrow
    from httpx import HTTPError

    foreign = (
        OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError,
        HTTPError, pyarrow.ArrowException, datasets.exceptions.DatasetsError,
    )  # fmt: skip
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield datasets
    except foreign as error:
        raise _unreachable(suite, where, error) from None
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _unreachable(suite: NamedSuite, where: str, error: Exception) -> FileError:
    """Says what kind of error it was and not its message, which may hold a cell of the data."""
    hub, kind = suite.hub, type(error).__name__
    gated = hub.gated is True or "gated" in kind.lower() or "gated data" in str(error).lower()
    access = (
        "accept its conditions on that page and log in with `hf auth login`"
        if gated
        else "check the network and, where its page has conditions, accept them and log in with `hf auth login`"
    )
    return FileError(
        f"the suite {suite.name} could not be read ({kind})",
        where=where,
        expected=f"{'access to a gated data set' if gated else 'a data set that can be reached'}: {suite.columns}",
        do=f"{access}; or download it ({hub.page}) and give the path: --data NAME=PATH, by the scenario's suite",
    )

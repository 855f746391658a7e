"""Files of conversations as rows (`numbered_rows`), and rows of any known format as our own (`to_own`).

A file kind is a row of READERS, a row format is a row of FORMATS: the columns that tell it, and a function. The
rows that come out are checked by `conversations.from_row`, so a fault in a message is found in one place whatever
the file looked like.

Sources: messages_0/messages_1 pairs are SteerMoE's (arXiv:2509.09660, its demo on custom data sets);
conversations with from/value are ShareGPT's; message_0..message_N cells are those of the MHJ red-teaming
tables; conversation_history with jailbreak_turn are MASCing's attack files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moesteer.errors import DataError, EmptyDataError, LimitError
from moesteer.files import LIMITS_BYTES, parse_json, read_bytes

Row = dict[str, Any]

COMMON_FIELDS = ("id", "group", "label", "reference", "tactic", "source", "split")
"""Read from a foreign row under the same names, numbers turned into text; its other columns are ignored."""

LIST_COLUMNS = ("messages", "conversation_history", "conversations", "messages_0", "messages_1")
"""Columns that hold a list; in CSV, where a cell is text, that list is JSON."""

ROLE_NAMES = {"human": "user", "gpt": "assistant"}
_BOM = b"\xef\xbb\xbf"
_BOM_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_MESSAGE_CELL = re.compile(r"message_(\d{1,6})")


class Format(NamedTuple):
    """columns: all must be there. convert(row, where): rows in our own format."""

    columns: tuple[str, ...]
    says: str
    convert: Callable[[Mapping[str, Any], str], list[Row]]


def to_own(row: Any, *, where: str, default_id: str) -> list[Row]:
    """A row of any known format as one row (pairs: two) in our own format, unchecked beyond what it takes.

    A row without an id gets `default_id`. Raises DataError: not an object, or no format fits it.
    """
    if not isinstance(row, dict):
        raise DataError(
            f"a row is a {type(row).__name__}, not an object with named fields",
            where=where,
            expected=f"one of: {'; '.join(form.says for form in FORMATS)}",
            do="put each conversation in an object of its own",
        )
    found = _format_of(row)
    if found is None:
        keys = ", ".join(repr(key)[:60] for key in list(row)[:20])
        raise DataError(
            f"the row has a format that is not known; keys found: {keys or 'none'}",
            where=where,
            expected=f"one of: {'; '.join(form.says for form in FORMATS)}",
            do="rename the columns to one of these formats",
        )
    return found.convert(row if row.get("id") is not None else {**row, "id": default_id}, where)


def request_group(request: str) -> str:
    """The group of a conversation that names none: the same for the same request, "g-" and 12 hex digits."""
    return "g-" + hashlib.sha256(request.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def parse_cell(text: str, *, where: str, column: str) -> Any:
    """The JSON in one cell of a table. Raises DataError that names the column."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"column {column!r} does not hold valid JSON: {_reason(error)}",
            where=where,
            expected='JSON with double quotes, such as [{"role": "user", "content": "..."}]',
            do="write the cell with json.dumps (str() of a Python list is not JSON), or save the file as JSONL",
        ) from error


def check_length(size_bytes: int, where: str) -> None:
    """Raises DataError for a line of JSONL that is over the limit (without its newline)."""
    limit = LIMITS_BYTES["conversation-line"]
    if size_bytes > limit:
        raise DataError(
            f"the line has {size_bytes:,} bytes",
            where=where,
            expected=f"lines of at most {limit:,} bytes",
            do="shorten the conversation, or check that the file has one conversation a line",
        )


def unknown_ending(path: Path, known: Iterable[str]) -> DataError:
    """The error for a file whose kind cannot be told from its name."""
    return DataError(
        f"the file ending {path.suffix!r} is not known",
        where=str(path),
        expected=f"a file whose name ends in {', '.join(known)}",
        do="rename the file, or convert it to JSONL",
    )


def numbered_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Each row of a file: its number from 1 (JSONL: of the line), its place for errors ("line 3"), its value.

    Raises DataError (with file and place), EmptyDataError (nothing but blanks), FileError and LimitError.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise unknown_ending(path, READERS)
    data = read_bytes(path, kind="conversations")
    if not data or data.isspace() or data == _BOM:
        raise EmptyDataError(
            "the file is empty", where=str(path), expected="at least one conversation", do="check that it was written"
        )
    unit = "line" if reader is _jsonl_rows else "row"
    for number, row in reader(data, path):
        yield number, f"{unit} {number}", row


def _jsonl_rows(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    _refuse_utf16(data, str(path))
    start, number = len(_BOM) if data.startswith(_BOM) else 0, 0
    while start < len(data):
        number += 1
        where = f"{path}, line {number}"
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        check_length(end - start, where)
        line = data[start:end]
        if line.strip():
            yield number, _json(_decode(line, where, offset=start), where)
        start = end + 1


def _json_rows(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    value = _json(_decode_file(data, path), str(path))
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(
            f"the file holds a {type(value).__name__} in which the conversations cannot be told",
            where=str(path),
            expected="a list of conversations, or an object with a single list in it",
            do="write one list of rows; a file with one conversation is a list of one",
        )
    yield from enumerate(value, start=1)


def _csv_rows(data: bytes, path: Path) -> Iterator[tuple[int, Row]]:
    """Cells are text and an empty cell is None; cells of LIST_COLUMNS are JSON."""
    rows = _csv_cells(_decode_file(data, path), path)
    header = rows[0] if rows else []
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise _bad_csv(f"two columns are called {repeated[0]!r}", str(path))
    for number, cells in enumerate(rows[1:], start=1):
        where = f"{path}, row {number}"
        if len(cells) != len(header):
            raise _bad_csv(f"the row has {len(cells)} cells, the header {len(header)}", where)
        row: Row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
        for name in LIST_COLUMNS:
            if row.get(name) is not None:
                row[name] = parse_cell(row[name], where=where, column=name)
        yield number, row


def _csv_cells(text: str, path: Path) -> list[list[str]]:
    """Rows that are not blank. The csv module's limit on a cell is global, so it is put back."""
    before = csv.field_size_limit(LIMITS_BYTES["conversation-line"])
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [cells for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise _bad_csv(f"not valid CSV: {error}", f"{path}, line {reader.line_num}") from error
    finally:
        csv.field_size_limit(before)


def _bad_csv(what: str, where: str) -> DataError:
    return DataError(
        what,
        where=where,
        expected="comma-separated values with a header line; cells with commas, quotes or newlines in double quotes",
        do="save it again with a CSV library, or as JSONL",
    )


def _parquet_rows(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number, limit = 0, LIMITS_BYTES["conversations"]
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        size_bytes = sum(group.total_byte_size for group in groups)
        if size_bytes > limit:
            raise LimitError(
                f"the file unpacks to {size_bytes:,} bytes",
                where=str(path),
                expected=f"at most {limit:,} bytes",
                do="split it, or check that it is the file you meant",
            )
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"not a whole Parquet file: {str(error)[:200]}",
            where=f"{path}, after row {number}",
            expected="a Parquet file with columns of one of the known formats",
            do="write it again, or download it again (a Git LFS pointer is not the file)",
        ) from error


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            where += f", line {error.lineno}, column {error.colno}" if "\n" in text else f", column {error.colno}"
        raise DataError(
            f"not valid JSON: {_reason(error)}",
            where=where,
            expected="JSON in UTF-8: one object a line (.jsonl), or one list (.json)",
            do="write it with a JSON library; a .json file that has an object a line should be named .jsonl",
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _decode_file(data: bytes, path: Path) -> str:
    _refuse_utf16(data, str(path))
    return _decode(data.removeprefix(_BOM), str(path), offset=len(_BOM) if data.startswith(_BOM) else 0)


def _decode(data: bytes, where: str, *, offset: int) -> str:
    """offset: of `data` in the file, in bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at byte offset {offset + error.start:,} of the file",
            where=where,
            expected="text in UTF-8",
            do="convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW",
        ) from error


def _refuse_utf16(data: bytes, where: str) -> None:
    if data.startswith(_BOM_UTF16):
        raise DataError(
            "not UTF-8: the byte-order mark at byte offset 0 says UTF-16",
            where=where,
            expected="text in UTF-8",
            do="convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW (Windows: save as UTF-8)",
        )


def _format_of(row: Row) -> Format | None:
    """The first format whose columns are filled, else the first whose columns are there but empty."""
    filled = {key for key, value in row.items() if value is not None}
    for keys in (filled, set(row)):
        for form in FORMATS:
            if keys.issuperset(form.columns):
                return form
    return None


def _common(row: Mapping[str, Any], where: str) -> Row:
    """The fields of COMMON_FIELDS that the row fills, as text; an empty string or NaN counts as not filled."""
    return {name: text for name in COMMON_FIELDS if (text := _text(row.get(name), name, where)) is not None}


def _text(value: Any, name: str, where: str) -> str | None:
    """Text of a cell: tables hold ids and labels as numbers, and integers beside a gap as floats (3.0)."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(int(value)) if isinstance(value, int) or value.is_integer() else repr(value)
    raise _wrong(name, value, "text or a number", where)


def _wrong(name: str, value: Any, expected: str, where: str) -> DataError:
    found = "empty" if value is None or value == [] else f"a {type(value).__name__}"
    return DataError(f"{name} is {found}", where=where, expected=f"{name}: {expected}", do="correct this row")


def _messages(value: Any, name: str, where: str) -> list[Any]:
    """Messages from a list of objects (role or from; content, value or body), or of strings, user first."""
    if not isinstance(value, list) or not value:
        raise _wrong(name, value, "a list of messages, or of strings with the user speaking first", where)
    if all(isinstance(item, str) for item in value):
        return [{"role": ("user", "assistant")[turn % 2], "content": item} for turn, item in enumerate(value)]
    return [_message(item, f"{name}[{index}]", where) for index, item in enumerate(value)]


def _message(item: Any, name: str, where: str) -> Row:
    if not isinstance(item, dict):
        raise _wrong(name, item, "an object with a role and a content", where)
    role = next((item[key] for key in ("role", "from") if item.get(key) is not None), None)
    content = next((item[key] for key in ("content", "value", "body") if item.get(key) is not None), None)
    if isinstance(role, str):
        role = ROLE_NAMES.get(role.lower(), role.lower())
    return {"role": role, "content": content}


def _own(row: Mapping[str, Any], where: str) -> list[Row]:
    return [dict(row)]


def _history(row: Mapping[str, Any], where: str) -> list[Row]:
    messages = _messages(row["conversation_history"], "conversation_history", where)
    turn = _text(row.get("jailbreak_turn"), "jailbreak_turn", where)
    if turn is not None:
        asks = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not (turn.isascii() and turn.isdigit() and len(turn) < 10 and 1 <= int(turn) <= len(asks)):
            raise DataError(
                f"jailbreak_turn is {turn[:40]!r}, but the conversation has {len(asks)} user turn(s)",
                where=where,
                expected="the number of the user turn at which the model broke, counted from 1",
                do="correct the number, or leave the field out to keep the whole conversation",
            )
        messages = messages[: asks[int(turn) - 1] + 1]
    return [{**_common(row, where), "messages": messages}]


def _cells(row: Mapping[str, Any], where: str) -> list[Row]:
    numbered = {int(match[1]): key for key in row if (match := _MESSAGE_CELL.fullmatch(key))}
    names = [numbered[number] for number in sorted(numbered)]
    used = [name for name in names if row[name] not in (None, "")]
    if used != names[: len(used)]:
        gap = next(name for name in names if name not in used)
        raise _wrong(gap, None, "filled, because a later message is", where)
    messages = []
    for name in used:
        cell = row[name]
        messages.append(
            _message(parse_cell(cell, where=where, column=name) if isinstance(cell, str) else cell, name, where)
        )
    return [{**_common(row, where), "messages": messages}]


def _sharegpt(row: Mapping[str, Any], where: str) -> list[Row]:
    return [{**_common(row, where), "messages": _messages(row["conversations"], "conversations", where)}]


def _pair(row: Mapping[str, Any], where: str) -> list[Row]:
    """Two conversations of one group, labels "0" and "1"; the target text is the reference."""
    common = _common(row, where)
    sides = [_messages(row[name], name, where) for name in ("messages_0", "messages_1")]
    asks = [m["content"] for m in sides[0] if m["role"] == "user" and isinstance(m["content"], str)]
    if asks:
        common.setdefault("group", request_group(asks[-1]))
    rows = []
    for side, messages in enumerate(sides):
        own = {**common, "id": f"{common.get('id')}-{side}", "label": str(side), "messages": messages}
        target = row.get(f"messages_{side}_target")
        if isinstance(target, list):
            parts = [m["content"] for m in _messages(target, f"messages_{side}_target", where)]
            target = "\n".join(part for part in parts if isinstance(part, str))
        if (reference := _text(target, f"messages_{side}_target", where)) is not None:
            own["reference"] = reference
        rows.append(own)
    return rows


def _prompt(row: Mapping[str, Any], where: str) -> list[Row]:
    own = _common(row, where)
    for name in ("response", "answer"):
        if "reference" not in own and (text := _text(row.get(name), name, where)) is not None:
            own["reference"] = text
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return [{**own, "messages": [{"role": "user", "content": prompt}]}]
    return [{**own, "messages": _messages(prompt, "prompt", where)}]


FORMATS = (
    Format(("messages",), 'ours: "id", "group", "messages" [{"role", "content"}]', _own),
    Format(("conversation_history",), '"conversation_history" (and "jailbreak_turn")', _history),
    Format(("messages_0", "messages_1"), 'pairs: "messages_0", "messages_1"', _pair),
    Format(("message_0",), '"message_0", "message_1", ... with JSON cells', _cells),
    Format(("conversations",), 'ShareGPT: "conversations" [{"from", "value"}]', _sharegpt),
    Format(("prompt",), '"prompt" (and "response" or "answer")', _prompt),
)
"""Tried in this order. Another format is another row."""

READERS: dict[str, Callable[[bytes, Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
"""By file ending, in lower case."""

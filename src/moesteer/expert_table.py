"""A table of experts as a file: CSV, Parquet or JSON, read into columns of cells. What they mean is importing.py's.

Nothing is guessed: the file's ending says its format, a cell is the number it is written as, and everything else
is a DataError that names the row.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.errors import DataError, LimitError

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
LARGEST_INTEGER = 2**53
"""Beyond it not every integer is a float64, so that a count might not be what was written."""


@dataclass(frozen=True)
class Cells:
    """Columns by name, as they stand in the file; places: each row's name in messages ("line 3", "row 2")."""

    path: Path
    sha256: str
    columns: dict[str, list[Any]]
    places: list[str]

    def number(self, column: str, row: int) -> float:
        """A finite number. Raises DataError."""
        return _number(self.columns[column][row], where=self.where(column, row))

    def integer(self, column: str, row: int) -> int:
        """A whole number, 3 or 3.0. Raises DataError."""
        where = self.where(column, row)
        value = _number(self.columns[column][row], where=where)
        if value != int(value) or abs(value) > LARGEST_INTEGER:
            raise DataError(
                f"{value:g} is not a whole number" if value != int(value) else f"{value:g} is too large a number",
                where=where,
                expected="layers, experts and counts as whole numbers",
                do="write the counts themselves; shares and differences belong in a column of scores",
            )
        return int(value)

    def where(self, column: str, row: int) -> str:
        """The place of a cell in messages."""
        return f"{self.path}, {self.places[row]}, column {column!r}"


def read_cells(path: Path, *, most_rows: int) -> Cells:
    """The table in a file. Raises FileError, LimitError, DataError (most_rows: of the model that it is for)."""
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"the file ending {path.suffix!r} is not known",
            where=str(path),
            expected=f"a table whose name ends in {', '.join(READERS)}",
            do="save the table as CSV; a data frame saved in Python's own format runs code when it is opened, so open "
            "it only if you trust where it comes from, and write it with to_csv (docs/mask-algebra.md)",
        )
    data = files.read_bytes(path, kind="table")
    columns, places = reader(data, path, most_rows)
    if not places:
        raise _bad("the table has no rows", path)
    if len(places) > most_rows:
        raise _too_long(path, most_rows)
    return Cells(path, files.sha256(data), columns, places)


Columns = tuple[dict[str, list[Any]], list[str]]


def _csv_columns(data: bytes, path: Path, most_rows: int) -> Columns:
    header: list[str] | None = None
    rows, places = [], []
    reader = csv.reader(io.StringIO(_text(data, path), newline=""), strict=True)
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            place = f"line {reader.line_num}"
            if len(cells) != len(header):
                raise _bad(f"{len(cells)} cells under a header of {len(header)}", path, place)
            rows.append(cells)
            places.append(place)
            if len(rows) > most_rows:
                raise _too_long(path, most_rows)
    except csv.Error as error:
        raise _bad(f"not valid CSV: {error}", path, f"line {reader.line_num}") from error
    names = _unrepeated(header or [], path)
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}, places


def _json_columns(data: bytes, path: Path, most_rows: int) -> Columns:
    try:
        value = files.parse_json(_text(data, path))
    except (ValueError, RecursionError) as error:
        raise _bad(f"not valid JSON: {error}", path) from error
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise _bad(f"the columns differ in length: {lengths}", path)
        return value, _numbered(max(lengths.values(), default=0))
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise _bad(f"the JSON is a {type(value).__name__}, not a table", path)
    if len(value) > most_rows:
        raise _too_long(path, most_rows)
    places = _numbered(len(value))
    names = list(value[0]) if value else []
    for row, place in zip(value, places, strict=True):
        if set(row) != set(names):
            other = ", ".join(sorted(set(names) ^ set(row)))[:200]
            raise _bad(f"the object has not the keys of the first one (they differ in {other})", path, place)
    return {name: [row[name] for row in value] for name in names}, places


def _parquet_columns(data: bytes, path: Path, most_rows: int) -> Columns:
    import pyarrow
    import pyarrow.parquet

    limit = files.LIMITS_BYTES["table"]
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        about = file.metadata
        size_bytes = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if size_bytes > limit:
            raise LimitError(
                f"the table unpacks to {size_bytes:,} bytes",
                where=str(path),
                expected=f"at most {limit:,} bytes",
                do="keep only the columns of docs/mask-algebra.md, or check that it is the file you meant",
            )
        if about.num_rows > most_rows:
            raise _too_long(path, most_rows)
        names = _unrepeated(list(file.schema_arrow.names), path)
        table = file.read()
        columns = {name: table.column(i).to_pylist() for i, name in enumerate(names)}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _bad(f"not a whole Parquet file: {str(error)[:200]}", path) from error
    return columns, _numbered(table.num_rows)


READERS: dict[str, Callable[[bytes, Path, int], Columns]] = {
    ".csv": _csv_columns,
    ".parquet": _parquet_columns,
    ".json": _json_columns,
}


def _number(cell: Any, *, where: str) -> float:
    value = math.nan
    if isinstance(cell, str):
        if NUMBER.fullmatch(cell.strip(" \t")):
            value = float(cell)
    elif isinstance(cell, int | float) and not isinstance(cell, bool):
        value = float(cell) if abs(cell) <= 1e300 else math.inf
    if not math.isfinite(value):
        shown = "the cell is empty" if cell is None or cell == "" else f"{str(cell)[:60]!r} is not a number"
        raise DataError(
            shown,
            where=where,
            expected="a finite number with a point, such as 12, -0.5 or 1e-3",
            do="correct the cell, or leave the row out",
        )
    return value


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(f"not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start:,}", path) from error


def _numbered(count: int) -> list[str]:
    return [f"row {number}" for number in range(1, count + 1)]


def _unrepeated(names: list[str], path: Path) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise _bad(f"two columns are called {repeated[0]!r}", path)
    return names


def _too_long(path: Path, most_rows: int) -> DataError:
    return DataError(
        f"the table has more than {most_rows:,} rows",
        where=str(path),
        expected="at most one row for each expert of each layer of the model",
        do="check that the table is of this model, and holds one contrast only",
    )


def _bad(what: str, path: Path, place: str = "") -> DataError:
    return DataError(
        what,
        where=f"{path}, {place}" if place else str(path),
        expected="one row per expert under a header (CSV, Parquet), a list of objects or an object of lists (JSON)",
        do="write the table again as docs/mask-algebra.md shows",
    )

"""What the programs in bench/ write: docs/results.json of quality.py, and one JSON object each of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from moesteer import files
from moesteer.errors import FileError
from moesteer.report.run_files import Difference, Interval, Part, malformed


class Column(Part):
    """A metric of the table."""

    metric: str
    short: str
    title: str = ""
    role: str = ""
    lower_is_better: bool = False
    margin: float | None = None


class Row(Part):
    """A method, pooled over seeds."""

    method: str
    metrics: dict[str, Interval]
    vs_none: dict[str, Difference] = Field(default_factory=dict)


class BenchModel(Part):
    """The model."""

    name: str


class BenchScenario(Part):
    """A scenario's table."""

    name: str
    title: str
    model: BenchModel
    seeds: list[int]
    target_metric: str
    columns: list[Column]
    rows: list[Row]


class Table(Part):
    """One kind of runs: quality, reversed, ablations."""

    schema_version: int = Field(alias="schema")
    command: str = ""
    versions: dict[str, str | None] = Field(default_factory=dict)
    seconds: float | None = None
    scenarios: list[BenchScenario]


def is_quality(found: Any) -> bool:
    """Whether a JSON value is what bench/quality.py writes."""
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(one, dict) and isinstance(one.get("scenarios"), list) for one in found.values())
    )


def read_quality(path: Path) -> dict[str, Table]:
    """The tables of bench/quality.py by kind. Raises FileError."""
    try:
        return TypeAdapter(dict[str, Table]).validate_python(files.read_json(path))
    except ValidationError as error:
        raise malformed(path, error) from error


def read_benchmarks(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Objects of other benchmarks by name. Raises FileError for one that is no object."""
    found = {}
    for path in paths:
        value = files.read_json(path)
        if not isinstance(value, dict):
            raise FileError(
                f"a benchmark is a {type(value).__name__}, not an object",
                where=str(path),
                expected="a JSON object, as the programs in bench/ write",
                do="run the benchmark again",
            )
        found[path.stem] = value
    return found

"""results.json of `moesteer evaluate`: two conditions at most, on one split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moesteer import files
from moesteer.errors import FileError
from moesteer.report.run_files import RESULTS, Difference, Interval, Part, read_checked

RUN = "run.json"


class SuiteRate(Interval):
    """A suite's first metric on its own rows."""

    metric: str


class Condition(Part):
    """The model as it is, or with its masks."""

    metrics: dict[str, Interval]
    suites: dict[str, SuiteRate] = Field(default_factory=dict)
    vs_none: dict[str, Difference] = Field(default_factory=dict)
    forbidden: int | None = None


class EvaluateResults(Part):
    """results.json of an evaluation, schema 1. methods: `none`, and `steered` where masks were given."""

    schema_version: Literal[1] = Field(alias="schema")
    scenario: str
    split: str
    seed: int
    methods: dict[str, Condition]


def read_evaluation(run: Path) -> EvaluateResults:
    """results.json of an evaluation. Raises FileError."""
    path = Path(run) / RESULTS
    found = read_checked(path, EvaluateResults)
    if "none" not in found.methods:
        raise FileError(
            "results.json has no method 'none'",
            where=f"{path} /methods",
            expected="results of the model as it is, to compare with",
            do="run the evaluation again",
        )
    return found


def read_plan(run: Path) -> dict[str, Any]:
    """What was to be run (run.json, /plan): nothing where there is no run.json. Raises FileError."""
    path = Path(run) / RUN
    if not path.exists():
        return {}
    state = files.read_json(path)
    plan = state.get("plan") if isinstance(state, dict) else None
    return plan if isinstance(plan, dict) else {}

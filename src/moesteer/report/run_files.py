"""What the report of a steering run is made of: the files of one run directory, read and checked, and nothing else.

`results.json` must be there and be whole. A mask or a responses file that is missing is `None`, which the
page says in words; one that is there but cannot be read is an error. No path may lead out of the run directory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from moesteer import files
from moesteer.errors import FileError, MaskFileError

RESULTS = "results.json"
P = TypeVar("P", bound="Part")


class Part(BaseModel):
    """A piece of results.json: unknown keys are kept, infinities refused, nothing is changed after reading."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Interval(Part):
    """A rate with its 95 % interval. `value` is null when nothing could be scored."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int = 0


class Difference(Part):
    """A method against `none`, paired: difference with its 95 % interval, and the exact p-value."""

    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


class GateFacts(Part):
    """The gate of a method's mask: where it pools, its threshold, and how often it fired on select."""

    pool: str
    threshold: float
    false_positive_rate: Interval
    true_positive_rate: Interval
    auroc: float


class Method(Part):
    """What one method gave on the test split."""

    mask: str | None = None
    alpha: float | None = None
    experts: int | None = None
    feasible: bool | None = None
    gate: GateFacts | None = None
    seconds: dict[str, float] = {}
    metrics: dict[str, Interval]
    vs_none: dict[str, Difference] = {}
    by_tactic: dict[str, dict[str, Interval]] = {}


class ModelFacts(Part):
    """The steered model."""

    name: str
    model_type: str
    layers: list[int]
    experts: int
    top_k: int
    parameters: int
    router_sha256: str


class Protect(Part):
    """A metric that must not get worse by more than `margin` (a rate: 0.01 is one point)."""

    metric: str
    margin: float


class Scenario(Part):
    """What was to change, and what was to stay."""

    name: str
    title: str
    description: str = ""
    toward: str
    target_metric: str
    protect: list[Protect] = []

    def margins(self) -> dict[str, float]:
        """The strictest margin of each protected metric: several suites may share one."""
        found: dict[str, float] = {}
        for protect in self.protect:
            found[protect.metric] = min(protect.margin, found.get(protect.metric, protect.margin))
        return found


def _without_null(value: Any) -> Any:
    """Tactics as names: single-turn suites may carry a null tactic."""
    return [name for name in value if name is not None] if isinstance(value, list) else value


class Split(Part):
    """One suite in one split: conversations, behaviours (groups), tactics."""

    n: int
    groups: int
    tactics: Annotated[list[str], BeforeValidator(_without_null)] = []


class Point(Part):
    """One setting tried on the select split."""

    method: str
    alpha: float | None = None
    experts: int | None = None
    split: str = "select"
    metrics: dict[str, float | None]
    feasible: bool | None = None
    chosen: bool = False


class Check(Part):
    """One named check of the run."""

    name: str
    passed: bool
    detail: str = ""


class Results(Part):
    """results.json, schema 1."""

    schema_version: Literal[1] = Field(alias="schema")
    model: ModelFacts
    scenario: Scenario
    seed: int
    versions: dict[str, str | None] = {}
    splits: dict[str, dict[str, Split]] = {}
    methods: dict[str, Method]
    trade_off: list[Point] = []
    recommended: str | None = None
    failed: dict[str, str] = {}
    checks: list[Check] = []
    seconds: dict[str, float] = {}


class Message(Part):
    """One turn."""

    role: str
    content: str


class Response(Part):
    """One played conversation with the model's last response and the judge's verdict."""

    id: str
    suite: str
    group: str | None = None
    tactic: str | None = None
    split: str | None = None
    messages: list[Message]
    response: str
    verdict: str
    success: bool | None = None
    reference: Any = None
    condition: str | None = None


@dataclass(frozen=True)
class MaskFile:
    """A mask as the report draws it. values_LE: sigma units when kind is `strength`, -1/0/1 when `force`."""

    values_LE: np.ndarray
    kind: Literal["strength", "force"]
    layer_ids: list[int]
    method: str
    intent: str

    @property
    def experts_touched(self) -> int:
        """Entries that are not zero."""
        return int(np.count_nonzero(self.values_LE))


def inside(run: Path, relative: str) -> Path:
    """`run / relative`, after checking that it stays inside the run directory. Raises FileError."""
    pure = PurePosixPath(relative)
    bad = not relative or "\\" in relative or "\0" in relative or pure.is_absolute() or ".." in pure.parts
    path = run if bad else run / pure
    if bad or not path.resolve().is_relative_to(run.resolve()):
        raise FileError(
            f"a path in {RESULTS} leads out of the run directory: {relative!r}",
            where=str(run / RESULTS),
            expected="a relative path without '..', such as masks/direct.safetensors",
            do="use the run directory that moesteer wrote, unedited",
        )
    return path


def read_results(run: Path) -> Results:
    """results.json of a run directory. Raises FileError when it is missing, not JSON, or lacks something."""
    path = Path(run) / RESULTS
    if not path.exists():
        raise FileError(
            "there is nothing to report on: results.json is missing",
            where=str(path),
            expected="a run directory that holds results.json, which the evaluation writes last",
            do="give the folder of a finished run, or run the same command again: it goes on where it stopped",
        )
    results = read_checked(path, Results)
    named = [results.recommended] if results.recommended is not None else []
    for name in [*named, "none"]:
        if name not in results.methods:
            raise FileError(
                f"results.json has no method {name!r}",
                where=f"{path} /methods",
                expected="results of `none`, and of the method named by /recommended",
                do="run the evaluation again",
            )
    return results


def read_checked(path: Path, model: type[P]) -> P:
    """A JSON file as its model. Raises FileError where it is missing, not JSON, or lacks something."""
    try:
        return model.model_validate(files.read_json(path))
    except ValidationError as error:
        raise malformed(path, error) from error


def malformed(path: Path, error: ValidationError) -> FileError:
    """The first place where a file is not as its model says."""
    first = error.errors(include_url=False, include_context=False)[0]
    pointer = "/" + "/".join(str(part) for part in first["loc"])
    return FileError(
        f"malformed: {first['msg']}",
        where=f"{path} {pointer} ({error.error_count()} such places)",
        expected="the layout that docs/report.md gives for this file, schema 1",
        do="run the evaluation again; do not edit the file by hand",
    )


def read_mask(run: Path, relative: str) -> MaskFile | None:
    """A mask of the run, or None when the file is missing. Raises FileError, MaskFileError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = inside(Path(run), relative)
    if not path.exists():
        return None
    data = files.read_bytes(path, kind="mask")
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = files.parse_json(header["__metadata__"]["moesteer"])
        kind: Literal["strength", "force"] = "strength" if "strength" in tensors else "force"
        values_LE = tensors[kind].astype(np.float64)
        mask = MaskFile(
            values_LE=values_LE,
            kind=kind,
            layer_ids=[int(layer) for layer in (about.get("fingerprint") or about)["layer_ids"]],
            method=str(about["method"]),
            intent=_plain(about["intent"]),
        )
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise _bad_mask(path, f"{type(error).__name__}: {error}") from error
    if values_LE.ndim != 2 or len(mask.layer_ids) != values_LE.shape[0]:
        raise _bad_mask(path, f"{kind} has shape {values_LE.shape} for {len(mask.layer_ids)} layer ids")
    if not np.isfinite(values_LE).all():
        raise _bad_mask(path, "NaN or infinite strengths")
    return mask


def _plain(intent: Any) -> str:
    """An intent in words: `scenario: jailbreak-defense, toward: refuse`."""
    if isinstance(intent, dict):
        return ", ".join(f"{key}: {value}" for key, value in sorted(intent.items()) if value is not None)
    return str(intent)


def _bad_mask(path: Path, reason: str) -> MaskFileError:
    return MaskFileError(
        f"not a mask that can be drawn: {reason}",
        where=str(path),
        expected="a safetensors file with `strength` or `force` [L, E], and `moesteer` metadata naming "
        "method, layer_ids and intent",
        do="check the file with `moesteer mask check`, or run the detection again",
    )


def responses_path(name: str) -> str:
    """Where the responses of a method are, relative to the run directory."""
    return f"responses/{name}.jsonl"


def read_responses(run: Path, name: str, *, split: str | None = "test") -> list[Response] | None:
    """The conversations of a split (None: of all) played with one method, or None when the file is missing.

    Raises FileError.
    """
    path = inside(Path(run), responses_path(name))
    if not path.exists():
        return None
    rows = []
    for number, line in enumerate(files.read_bytes(path, kind="journal").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(Response.model_validate(files.parse_json(line)))
        except ValidationError as error:
            raise malformed(Path(f"{path} line {number}"), error) from error
        except (ValueError, RecursionError) as error:
            raise FileError(
                f"not valid JSON: {error}",
                where=f"{path} line {number}",
                expected="one JSON object a line, in UTF-8",
                do="run the evaluation again: it goes on where it stopped",
            ) from error
    return [row for row in rows if split is None or row.split == split]

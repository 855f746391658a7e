"""Scenarios: what to change, what to protect and how it is judged. A TOML file, ours or a user's.

docs/scenarios.md shows one line by line. `data` of a suite is a file beside the scenario, or `lab:NAME` for a
suite of the lab's world.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moesteer import conversations, files
from moesteer.conversations import Conversation
from moesteer.errors import ScenarioError
from moesteer.evaluate.judges import REFUSAL_PHRASES, Judging
from moesteer.evaluate.metrics import METRICS

BUILT_IN = Path(__file__).parent / "scenarios"
DEFAULT_MARGIN = 0.01
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Split = Literal["fit", "select", "test"]


class Suite(BaseModel):
    """Conversations with one judge. role "target" is what steering is to change; "protect", what it must not.

    margin: how much a protected suite's first metric may fall on the select split. play "turns": every user
    turn is played and the model's own replies stay in context; "last": only the last reply is made.
    limit: at most so many conversations per split. gate "shut": a gate is fitted to stay shut on these requests;
    "either": it may do either, because the suite wants what steering gives anyway.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME)
    data: str
    role: Literal["target", "protect", "watch"] = "protect"
    judge: Literal["refusal", "content", "exact"]
    metrics: tuple[str, ...] = Field(min_length=1)
    play: Literal["turns", "last"] = "turns"
    margin: float = Field(default=DEFAULT_MARGIN, ge=0.0, lt=1.0)
    variants: int = Field(default=2, ge=1, le=10)
    limit: int | None = Field(default=None, ge=1)
    gate: Literal["shut", "either"] = "shut"

    @model_validator(mode="after")
    def _known_metrics(self) -> Suite:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise ValueError(f"no metric {', '.join(unknown)}; there are {', '.join(METRICS)}")
        return self


class Contrast(BaseModel):
    """What detection compares. away: the label of the unwanted behaviour.

    wanted: the response put in place of an unwanted one: the model's "own" wanted responses to `published`'s
    conversations and the target's, the conversation's "reference", or "text" (`wanted_texts`).
    published: the suite whose conversations MASCing's published labels set against the target's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    away: str
    wanted: Literal["own", "reference", "text"] = "own"
    wanted_texts: tuple[str, ...] = ()
    published: str


class JudgingRules(BaseModel):
    """See evaluate.judges.Judging. lab: judge coherence by the grammar of the lab's world."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    refusal_phrases: tuple[str, ...] = REFUSAL_PHRASES
    content_phrases: tuple[str, ...] = ()
    must_finish: bool = False
    lab: bool = False


class Scenario(BaseModel):
    """A whole scenario; `folder` is where its data files are.

    settings: by method name, what to try on the select split (variants, alphas, gated_alphas, false_positives; see
    methods.TRIED) and the method's own settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=NAME)
    title: str
    description: str = ""
    toward: str
    contrast: Contrast
    suites: tuple[Suite, ...] = Field(alias="suite", min_length=1)
    judging: JudgingRules = JudgingRules()
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    max_new_tokens: int = Field(default=128, ge=1, le=4096)
    folder: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _fits_together(self) -> Scenario:
        names = [suite.name for suite in self.suites]
        if len(set(names)) != len(names):
            raise ValueError("two suites have the same name")
        if [suite.role for suite in self.suites].count("target") != 1:
            raise ValueError("exactly one suite must have role = 'target'")
        if self.contrast.published not in names:
            raise ValueError(f"contrast.published names no suite; there are {', '.join(names)}")
        if self.contrast.wanted == "text" and not self.contrast.wanted_texts:
            raise ValueError("contrast.wanted = 'text' needs contrast.wanted_texts")
        if self.contrast.wanted == "reference" and self.target.judge == "refusal":
            raise ValueError(
                "contrast.wanted = 'reference' contradicts judge = 'refusal': there it is what attacks want"
            )
        if self.contrast.away == self.toward:
            raise ValueError("contrast.away must differ from toward")
        if "keep" in (self.contrast.away, self.toward):
            raise ValueError("'keep' is the label of protected conversations: name the behaviour otherwise")
        return self

    @property
    def target(self) -> Suite:
        """The suite that steering is to change."""
        return next(suite for suite in self.suites if suite.role == "target")

    @property
    def protected(self) -> tuple[Suite, ...]:
        """The suites it must not change."""
        return tuple(suite for suite in self.suites if suite.role == "protect")

    def judging_of(self) -> Judging:
        """The judge that the rules describe."""
        rules = self.judging
        if not rules.lab:
            return Judging(rules.refusal_phrases, rules.content_phrases, rules.must_finish)
        from moesteer.lab.world import coherent

        return Judging(rules.refusal_phrases, rules.content_phrases, rules.must_finish, coherent)


def load(name: str | Path) -> Scenario:
    """A scenario by built-in name or by file. Raises ScenarioError, FileError."""
    path = Path(name)
    if path.suffix != ".toml":
        path = BUILT_IN / f"{name}.toml"
        if str(name) not in built_in():
            raise ScenarioError(
                f"no scenario {str(name)!r}",
                where="--scenario",
                expected=f"one of {', '.join(built_in())}, or a .toml file",
                do="see docs/scenarios.md for how to write one",
            )
    try:
        raw = tomllib.loads(files.read_bytes(path, kind="scenario").decode("utf-8"))
        return Scenario.model_validate({**raw, "folder": path.parent})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _wrong(path, f"{place + ': ' if place else ''}{first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"not valid TOML: {error}") from error


def built_in() -> list[str]:
    """Names of the scenarios that ship with moesteer."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def _wrong(path: Path, what: str) -> ScenarioError:
    return ScenarioError(
        what, where=str(path), expected="a scenario as docs/scenarios.md describes it", do="correct it and run again"
    )


def suite_data(scenario: Scenario, suite: Suite) -> list[Conversation]:
    """All conversations of a suite, each with its split. Raises DataError, FileError, ScenarioError."""
    if suite.data.startswith("lab:"):
        from moesteer.lab import world

        name = suite.data.removeprefix("lab:")
        if name not in world.SUITES:
            raise ScenarioError(
                f"the lab has no suite {name!r}",
                where=f"scenario {scenario.name}, suite {suite.name}",
                expected=f"lab: and one of {', '.join(world.SUITES)}",
                do="correct the suite's `data`",
            )
        rows = [row for split in world.SPLITS for row in world.suite(name, split, per_group=suite.variants)]
    else:
        path = scenario.folder / suite.data
        rows = conversations.read(path)
    return [replace(row, id=f"{suite.name}/{row.id}") for row in rows]


def splits(scenario: Scenario, *, seed: int, limit: int | None = None) -> dict[str, dict[Split, list[Conversation]]]:
    """Every suite's conversations by split, by behaviour and by tactic.

    Suites are split together, so that a behaviour that occurs in two suites is in one split only. limit: at
    most so many conversations of each suite and split (for a quick look; it is written to the run).
    """
    loaded = {suite.name: suite_data(scenario, suite) for suite in scenario.suites}
    together = _split_together(loaded, seed=seed)
    found: dict[str, dict[Split, list[Conversation]]] = {}
    for suite in scenario.suites:
        mine = [row for row in together if row.id.startswith(f"{suite.name}/")]
        found[suite.name] = {}
        for split in ("fit", "select", "test"):
            rows = [row for row in mine if row.split == split]
            for most in (suite.limit, limit):
                rows = spread(rows, min(most, len(rows))) if most is not None else rows
            found[suite.name][split] = rows
    _require_all(scenario, found)
    return found


def _split_together(loaded: Mapping[str, list[Conversation]], *, seed: int) -> list[Conversation]:
    """Rows of every suite with their splits: the data's own where a suite has them, else by group and tactic.

    Tactics divide a suite that has at least three of them; one of fewer is divided by group alone. A group whose
    split another suite's data gives keeps to it; its rows in other splits are left out.
    """
    fixed = [row for rows in loaded.values() if all(r.split for r in rows) for row in rows]
    known = {row.group: row.split for row in fixed}
    bound: list[Conversation] = []
    free: list[Conversation] = []
    for rows in loaded.values():
        if all(r.split for r in rows):
            continue
        by_tactic = len({row.tactic for row in rows if row.tactic}) >= conversations.MIN_TACTICS
        for row in rows:
            if row.group in known and row.split is None and not by_tactic:
                bound.append(replace(row, split=known[row.group]))
            else:
                free.append(row if by_tactic else replace(row, tactic=None))
    tactics = {row.id: row.tactic for rows in loaded.values() for row in rows}
    divided = conversations.assign_splits(free, seed=seed) if free else []
    kept = [row for row in divided if known.get(row.group, row.split) == row.split]
    return [*fixed, *bound, *(replace(row, tactic=tactics[row.id]) for row in kept)]


def spread(rows: Sequence[Conversation], most: int) -> list[Conversation]:
    """At most `most` rows, taken evenly from the whole list, in order."""
    return [rows[i * len(rows) // most] for i in range(most)] if most else []


def _require_all(scenario: Scenario, found: dict[str, dict[Split, list[Conversation]]]) -> None:
    for name, by_split in found.items():
        empty = [split for split, rows in by_split.items() if not rows]
        if empty:
            raise ScenarioError(
                f"suite {name!r} has no conversation in {', '.join(empty)}",
                where=f"scenario {scenario.name}: " + ", ".join(f"{k} {len(v)}" for k, v in by_split.items()),
                expected="conversations of every suite in fit, select and test",
                do="give it more behaviours (`group`), or set `split` in the data",
            )


def as_json(scenario: Scenario) -> dict[str, Any]:
    """What results.json says of a scenario."""
    return {
        "name": scenario.name,
        "title": scenario.title,
        "description": scenario.description,
        "toward": scenario.toward,
        "target_metric": scenario.target.metrics[0],
        "protect": [{"metric": s.metrics[0], "margin": s.margin, "suite": s.name} for s in scenario.protected],
    }

"""Scenarios: what to change, what to protect and how it is judged. A TOML file, ours or a user's.

docs/scenarios.md shows one line by line. `data` of a suite is a file beside the scenario, `suite:NAME` for a named
suite (docs/suites.md; `suite:NAME=PATH` for a local copy of it), or `lab:NAME` for a suite of the lab's world.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moesteer import conversations, files, suites
from moesteer.conversations import Conversation
from moesteer.errors import ScenarioError, UnknownNameError
from moesteer.evaluate.metrics import METRICS
from moesteer.judges import REFUSAL_PHRASES, Judging
from moesteer.judges.channels import Format
from moesteer.judges.panel import Panel
from moesteer.judges.phrases import PHRASE_KINDS
from moesteer.judges.settings import JudgeSettings

BUILT_IN = Path(__file__).parent / "scenarios"
DEFAULT_MARGIN = 0.01
NAMING = ("llama-guard-3", "llama-guard-4")
"""Kinds of judges that name the category of what they find."""
LAB, SUITE = "lab:", "suite:"
"""What `data` of a suite may begin with instead of being a path."""
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Split = Literal["fit", "select", "test", "all"]
"""A part of the data; "all" is all of it, undivided, and never chosen on."""


class Suite(BaseModel):
    """Conversations with their judge. role "target" is what steering is to change; "protect", what it must not.

    judge: refusal, content, exact, the name of a `[[judge]]`, or a list of these: the first decides, and how far the
    others agree is reported.
    margin: how much a protected suite's first metric may fall on the select split. play "turns": every user
    turn is played and the model's own replies stay in context; "last": only the last reply is made.
    limit: at most so many conversations per split. gate "shut": a gate is fitted to stay shut on these requests;
    "either": it may do either, because the suite wants what steering gives anyway.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME)
    data: str
    role: Literal["target", "protect", "watch"] = "protect"
    judge: str | tuple[str, ...]
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
        if not self.judges or len(set(self.judges)) != len(self.judges):
            raise ValueError("judge must name a judge, or several different ones")
        return self

    @property
    def judges(self) -> tuple[str, ...]:
        """Names of the judges; the first decides."""
        return (self.judge,) if isinstance(self.judge, str) else self.judge


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


class Forbid(BaseModel):
    """Text that no steered model may make. Every generation is judged for it; one hit rejects a mask.

    judge: name of a `[[judge]]` of a kind that names categories (NAMING); category: one of its list, such as S4, child
    sexual exploitation. What was not judged counts as a hit (evaluate/forbidding.py).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: str
    category: str = Field(pattern=r"^S([1-9]|1[0-4])$")
    title: str = ""


class JudgingRules(BaseModel):
    """See judges.Judging. lab: judge coherence by the grammar of the lab's world.

    reasoning: in which form the model writes its reasoning before its answer (judges/channels.py); "auto" tells by
    the marks, "none" judges all that was said.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    refusal_phrases: tuple[str, ...] = REFUSAL_PHRASES
    content_phrases: tuple[str, ...] = ()
    must_finish: bool = False
    lab: bool = False
    reasoning: Format = "auto"


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
    judges: tuple[JudgeSettings, ...] = Field(default=(), alias="judge")
    forbid: tuple[Forbid, ...] = ()
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
        self._require_judges()
        self._require_guards()
        if self.contrast.wanted == "reference" and self.target.judges[0] == "refusal":
            raise ValueError(
                "contrast.wanted = 'reference' contradicts judge = 'refusal': there it is what attacks want"
            )
        if self.contrast.away == self.toward:
            raise ValueError("contrast.away must differ from toward")
        if "keep" in (self.contrast.away, self.toward):
            raise ValueError("'keep' is the label of protected conversations: name the behaviour otherwise")
        return self

    def _require_judges(self) -> None:
        """Every suite's judges exist, and can say what its first metric counts as a success."""
        known = {one.name: one for one in self.judges}
        if len(known) != len(self.judges):
            raise ValueError("two [[judge]] have the same name")
        for number, suite in enumerate(self.suites):
            for name in suite.judges:
                if name in PHRASE_KINDS:
                    continue
                if name not in known:
                    every = ", ".join((*PHRASE_KINDS, *known))
                    raise ValueError(f"suite.{number}.judge: no judge {name!r}; there are {every}")
                if not known[name].verdicts & METRICS[suite.metrics[0]].successes:
                    raise ValueError(
                        f"suite.{number}.judge: {name} never says {' or '.join(METRICS[suite.metrics[0]].successes)}, "
                        f"which is what {suite.metrics[0]} counts; it says {', '.join(sorted(known[name].verdicts))}"
                    )

    @property
    def target(self) -> Suite:
        """The suite that steering is to change."""
        return next(suite for suite in self.suites if suite.role == "target")

    @property
    def protected(self) -> tuple[Suite, ...]:
        """The suites it must not change."""
        return tuple(suite for suite in self.suites if suite.role == "protect")

    def _require_guards(self) -> None:
        """What is forbidden has a judge that can name it."""
        kinds = {one.name: one.kind for one in self.judges}
        for number, one in enumerate(self.forbid):
            if kinds.get(one.judge) not in NAMING:
                raise ValueError(
                    f"forbid.{number}.judge: {one.judge!r} is no [[judge]] of a kind that names categories "
                    f"({', '.join(NAMING)}), and without one this scenario does not run"
                )

    def panel(self, *, journal: Path | None = None) -> Panel:
        """The judges of the suites; close it. journal: where verdicts of judges that have to be asked are kept."""
        return Panel(self.judging_of(), self.judges, journal=journal, folder=self.folder)

    def judging_of(self) -> Judging:
        """The judge by phrases that the rules describe."""
        rules = self.judging
        if not rules.lab:
            return Judging(rules.refusal_phrases, rules.content_phrases, rules.must_finish)
        from moesteer.lab.world import coherent

        return Judging(rules.refusal_phrases, rules.content_phrases, rules.must_finish, coherent)


def load(name: str | Path) -> Scenario:
    """A scenario by built-in name or by file, or `suite:NAME[=PATH]`, that suite alone.

    Raises ScenarioError, FileError, UnknownNameError.
    """
    if str(name).startswith(SUITE):
        return of_suite(str(name).removeprefix(SUITE))
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


def of_suite(specified: str) -> Scenario:
    """A named suite ("NAME" or "NAME=PATH") as a scenario: enough to evaluate it, with nothing protected to steer by.

    Raises UnknownNameError.
    """
    name = specified.partition("=")[0]
    suite = suites.named(name)
    toward, away = ("refuse", "comply") if suite.judge == "refusal" else ("comply", "refuse")
    return Scenario.model_validate({
        "schema": 1, "name": name, "title": suite.title, "description": suite.measures, "toward": toward,
        "contrast": {"away": away, "published": name},
        "suite": [{
            "name": name, "data": f"{SUITE}{specified}", "role": "target", "judge": suite.judge,
            "metrics": suite.metrics,
        }],
    })  # fmt: skip


def with_data(scenario: Scenario, sources: Mapping[str, str]) -> Scenario:
    """The scenario with other data for some suites: by suite name a path, `suite:NAME` or `lab:NAME`.

    A path given for a suite whose data is `suite:NAME` is read as a copy of that. Raises UnknownNameError.
    """
    names = [suite.name for suite in scenario.suites]
    if unknown := [name for name in sources if name not in names]:
        raise UnknownNameError(
            f"no suite {', '.join(unknown)}",
            where=f"--data, scenario {scenario.name}",
            expected=", ".join(names),
            do="name one of these",
        )
    replaced = tuple(
        suite.model_copy(update={"data": _other_data(suite.data, sources[suite.name])})
        if suite.name in sources
        else suite
        for suite in scenario.suites
    )
    return scenario.model_copy(update={"suites": replaced})


def _other_data(before: str, source: str) -> str:
    if source.startswith((SUITE, LAB)):
        return source
    path = str(Path(source).absolute())
    return f"{before.partition('=')[0]}={path}" if before.startswith(SUITE) else path


def built_in() -> list[str]:
    """Names of the scenarios that ship with moesteer."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def _wrong(path: Path, what: str) -> ScenarioError:
    return ScenarioError(
        what, where=str(path), expected="a scenario as docs/scenarios.md describes it", do="correct it and run again"
    )


def suite_data(scenario: Scenario, suite: Suite) -> list[Conversation]:
    """All conversations of a suite, each with its split if the data has one.

    Raises DataError, FileError, ScenarioError, UnknownNameError, MissingExtraError.
    """
    if suite.data.startswith(LAB):
        from moesteer.lab import world

        name = suite.data.removeprefix(LAB)
        if name not in world.SUITES:
            raise ScenarioError(
                f"the lab has no suite {name!r}",
                where=f"scenario {scenario.name}, suite {suite.name}",
                expected=f"lab: and one of {', '.join(world.SUITES)}",
                do="correct the suite's `data`",
            )
        rows = [row for split in world.SPLITS for row in world.suite(name, split, per_group=suite.variants)]
    elif suite.data.startswith(SUITE):
        row = suites.SUITES.get(suite.data.removeprefix(SUITE).partition("=")[0])
        if row is not None and row.pairs is not None:  # a refusal would be judged as what was asked for
            raise ScenarioError(
                f"{row.name} holds labelled pairs to detect from, and no requests to play",
                where=f"scenario {scenario.name}, suite {suite.name}",
                expected="a suite to evaluate on (`moesteer suites`)",
                do=f"capture it: {row.command}",
            )
        rows = suites.read(suite.data.removeprefix(SUITE), folder=scenario.folder)
    else:
        path = scenario.folder / suite.data
        if scenario.folder == BUILT_IN and path.parent == BUILT_IN:
            raise ScenarioError(
                f"no data for the suite {suite.name!r} is shipped",
                where=f"scenario {scenario.name}",
                expected="a file of your own (docs/scenarios.md, data formats)",
                do=f"give it with --data {suite.name}=FILE",
            )
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


def whole(scenario: Scenario, *, limit: int | None = None) -> dict[str, dict[Split, list[Conversation]]]:
    """Every suite's conversations undivided, under "all": for measuring a model on the whole of a suite.

    A mask that was chosen on a part of it must not be measured so.
    """
    found: dict[str, dict[Split, list[Conversation]]] = {}
    for suite in scenario.suites:
        rows = suite_data(scenario, suite)
        for most in (suite.limit, limit):
            rows = spread(rows, min(most, len(rows))) if most is not None else rows
        found[suite.name] = {"all": rows}
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

"""An audit in the making: what its steps share, and what transfer and monitoring are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesteer import runs
from moesteer.audit.experts import Experts, Finder
from moesteer.audit.finders import Evidence
from moesteer.audit.inputs import DRAW_MOST, Inputs
from moesteer.audit.pairs import conversation_of
from moesteer.audit.playing import Condition, play_conditions, rows_expected
from moesteer.audit.points import Scale
from moesteer.audit.silence import Routers
from moesteer.backends.chat import Encoded
from moesteer.backends.hf import Model
from moesteer.evaluate import forbidding
from moesteer.judges.panel import Panel
from moesteer.mask import SteeringMask
from moesteer.scenario import Split
from moesteer.trace import TraceReader

Rows = list[dict[str, Any]]
KEPT_MOST = 32
"""Replies to other requests that the finders through the model keep as they are."""


@dataclass
class Audited:
    """model, inputs, run, panel, seed, draws and defence are there from the start; the rest as the steps make it.

    fit_rows, none_rows: the unsteered model's on fit and test. prompts: the trace of requests (span prompts_span,
    prompts_how says what they are) that show the behaviour (label SHOWS) and that lack it. finder: the one chosen on
    select. sizes, sizes_on: how many experts are switched off, and on. played_off: the chosen finder's test rows, by
    size. failed: what ranked or measured nothing, and why. forbidden: replies that hold what the scenario forbids.
    """

    model: Model
    inputs: Inputs
    run: runs.Run
    panel: Panel
    seed: int
    draws: int
    defence: SteeringMask | None = None
    limit: int | None = None
    fit_rows: Rows = field(default_factory=list)
    none_rows: Rows = field(default_factory=list)
    experts: Experts | None = None
    prompts: TraceReader | None = None
    prompts_span: str = "final_turn"
    finders: Mapping[str, Finder] = field(default_factory=dict)
    finder: str = ""
    sizes: Sequence[int] = ()
    sizes_on: Sequence[int] = ()
    prompts_how: str = ""
    played_off: list[Rows] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    forbidden: int = 0

    @property
    def routers(self) -> Routers:
        """What limits masks of the model."""
        return Routers(self.model.fingerprint, self.model.routers[0].scoring)

    @property
    def scale(self) -> Scale:
        """The unsteered model on the test split, against which conditions are measured."""
        return Scale(self.inputs, self.none_rows, self.seed)

    def evidence(self, model: Model, found: Experts, prompts: TraceReader) -> Evidence:
        """What finders look at: the fit split's replies of the audited model, read by `model`."""
        given = self.inputs
        answered = [row for row in forbidding.clear(given.scenario, self.fit_rows) if row["response"]]
        shown = [row for row in given.of_behaviour(answered) if given.shows(row)]
        beside = [row for row in answered if row["suite"] != given.behaviour.name and row["success"] is True]

        def encoded(rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
            made = [conversation_of(row, None, str(row["response"])) for row in rows]
            return [model.encode(one.messages, one.reference) for one in made]

        kept = encoded(beside)
        kept = [kept[i * len(kept) // KEPT_MOST] for i in range(KEPT_MOST)] if len(kept) > KEPT_MOST else kept
        return Evidence(model, found, prompts, self.prompts_span, shown=encoded(shown), kept=kept, seed=self.seed)

    def play(
        self, conditions: Sequence[Condition], *, journal: str, title: str, split: Split = "test", few: bool = False,
        model: Model | None = None,
    ) -> dict[str, Rows]:  # fmt: skip
        """Play a split under conditions; rows by condition. journal: name of a file of RUN/responses.

        few: at most DRAW_MOST conversations of each utility suite, and rows without their messages. model: another
        than the audited one.
        """
        data = self.inputs.of(split, utility=DRAW_MOST if few else None)
        self.run.expect({journal: rows_expected(conditions, data)})
        played = play_conditions(
            model or self.model, conditions, self.inputs.scenario, data, panel=self.panel, title=title,
            journal=self.run.path("responses", f"{journal}.jsonl"), answers_only=few,
        )  # fmt: skip
        self.forbidden += sum(forbidding.found_in(self.inputs.scenario, rows) for rows in played.values())
        return played

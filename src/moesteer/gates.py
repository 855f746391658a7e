"""A scenario's gate: the probe fitted on its fit split, and masks put behind it with rates measured on select.

What counts is a request: a prompt that ends in a user's message, as the unsteered model played it, its own replies in
context. The target suite's last requests are those on which the mask is meant to act. Every request of the protected
suites, the earlier turns of a conversation included, is one on which it must not, but for suites that say
`gate = "either"`. Earlier turns of target conversations are neither. What the probe is: detection/gate.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer.backends.gating import pooled_logits
from moesteer.backends.hf import Model
from moesteer.conversations import Message
from moesteer.detection import gate
from moesteer.evaluate import forbidding
from moesteer.gate import POOLS
from moesteer.mask import SteeringMask
from moesteer.scenario import Scenario

Rows = Sequence[Mapping[str, Any]]
"""Played conversations: lines of responses/NAME.jsonl."""


@dataclass(frozen=True, eq=False)
class ScenarioGate:
    """A probe fitted on the fit split, with pooled logits of the select split's requests to measure it on."""

    probe: gate.Probe
    target_NLE: NDArray[np.float32]
    protected_MLE: NDArray[np.float32]
    scenario: str

    def put(self, mask: SteeringMask, *, false_positives: float) -> SteeringMask:
        """The mask behind the gate at the threshold for this share of false positives (in cross-validation).

        Raises NoEffectError where one protected request is so like the target's that no threshold shuts it out.
        """
        return gate.gated(
            mask, self.probe, at=gate.threshold(self.probe, false_positives=false_positives),
            target_NLE=self.target_NLE, protected_MLE=self.protected_MLE,
            measured_on=f"{self.scenario}, every request of the select split",
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """For the report."""
        hit, miss = self.probe.scores(self.target_NLE), self.probe.scores(self.protected_MLE)
        return {
            **gate.facts(self.probe), "auroc_select": gate.auroc(hit, miss),
            "target_select": len(hit), "protected_select": len(miss),
        }  # fmt: skip


def fit(model: Model, scenario: Scenario, *, fit_rows: Rows, select_rows: Rows, seed: int) -> ScenarioGate:
    """Fit a scenario's gate. fit_rows, select_rows: what the unsteered model played of the two splits.

    Raises EmptyDataError, NoEffectError.
    """
    fit_rows, select_rows = forbidding.clear(scenario, fit_rows), forbidding.clear(scenario, select_rows)
    shut = {suite.name for suite in scenario.protected if suite.gate == "shut"}
    target = scenario.target.name
    probe = gate.fit(
        side_of(model, last(fit_rows, target)), side_of(model, every(fit_rows, shut)), seed=seed
    )  # fmt: skip
    measured = [
        side_of(model, rows).pooled[probe.pool] for rows in (last(select_rows, target), every(select_rows, shut))
    ]
    return ScenarioGate(probe, measured[0], measured[1], scenario.name)


@dataclass(frozen=True)
class Request:
    """A prompt that ends in a user's message, as it was played."""

    messages: tuple[Message, ...]
    group: str
    tactic: str | None


def last(rows: Rows, suite: str) -> list[Request]:
    """The last request of every conversation of a suite."""
    return [list(_requests(row))[-1] for row in rows if row["suite"] == suite]


def every(rows: Rows, suites: set[str]) -> list[Request]:
    """Every request of these suites, those of earlier turns included."""
    return [request for row in rows if row["suite"] in suites for request in _requests(row)]


def _requests(row: Mapping[str, Any]) -> Iterator[Request]:
    """Every prefix of a played conversation that ends in a user's message, the first turn first."""
    messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
    for end, message in enumerate(messages, start=1):
        if message.role == "user":
            yield Request(messages[:end], str(row["group"]), row["tactic"])


def side_of(model: Model, requests: Sequence[Request]) -> gate.Side:
    """Requests as the probe sees them: pooled logits in every pool."""
    pooled = pooled_logits(model, [model.encode(one.messages) for one in requests], POOLS)
    return gate.Side(pooled, [one.group for one in requests], [one.tactic for one in requests])

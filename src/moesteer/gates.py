"""A scenario's gate: the probe fitted on its fit split, and masks put behind it with rates measured on select.

The target suite's requests are those on which the mask is meant to act. Protected suites' requests are those on which
it must not, but for suites that say `gate = "either"`. What the probe is and how it is chosen: detection/gate.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer.backends.gating import pooled_logits
from moesteer.backends.hf import Model
from moesteer.conversations import Conversation
from moesteer.detection import gate
from moesteer.gate import POOLS
from moesteer.mask import SteeringMask
from moesteer.scenario import Scenario, Split

Data = Mapping[str, Mapping[Split, Sequence[Conversation]]]


@dataclass(frozen=True, eq=False)
class ScenarioGate:
    """A probe fitted on the fit split, with pooled logits of the select split's requests to measure it on."""

    probe: gate.Probe
    target_NLE: NDArray[np.float32]
    protected_MLE: NDArray[np.float32]
    scenario: str

    def put(self, mask: SteeringMask, *, false_positives: float) -> SteeringMask:
        """The mask behind the gate at the threshold for this share of false positives (in cross-validation)."""
        return gate.gated(
            mask, self.probe, at=gate.threshold(self.probe, false_positives=false_positives),
            target_NLE=self.target_NLE, protected_MLE=self.protected_MLE, measured_on=f"{self.scenario}, select split",
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """For the report."""
        hit, miss = self.probe.scores(self.target_NLE), self.probe.scores(self.protected_MLE)
        return {**gate.facts(self.probe), "auroc_select": gate.auroc(hit, miss)}


def fit(model: Model, scenario: Scenario, data: Data, *, seed: int) -> ScenarioGate:
    """Fit a scenario's gate on the unsteered model. Raises EmptyDataError, NoEffectError."""
    target = [scenario.target.name]
    shut = [suite.name for suite in scenario.protected if suite.gate == "shut"]
    sides = [_side(model, data, names, "fit") for names in (target, shut)]
    probe = gate.fit(*sides, seed=seed)
    measured = [_side(model, data, names, "select").pooled[probe.pool] for names in (target, shut)]
    return ScenarioGate(probe, measured[0], measured[1], scenario.name)


def _side(model: Model, data: Data, suites: Sequence[str], split: Split) -> gate.Side:
    rows = [row for name in suites for row in data[name][split]]
    pooled = pooled_logits(model, [model.encode(_request(row)) for row in rows], POOLS)
    return gate.Side(pooled, [row.group for row in rows], [row.tactic for row in rows])


def _request(row: Conversation) -> Sequence[Any]:
    messages = list(row.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return messages

"""The gate of a mask: a linear probe on pooled routing logits that says for which requests the mask applies.

    probability = sigmoid(sum(gate_LE * pooled_LE) + bias),   fires where it is at least `threshold`

pooled_LE [L, E] is the mean of the unsteered router logits over some positions of the prompt (`pool`). The
decision is made once per request, at the end of its prompt, before anything is steered; docs/gate.md says what
follows for the KV cache. Numpy only: the definition that every backend is tested against. The probe is fitted
by detection/gate.py.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Pool = Literal["last", "final_turn", "prompt"]
POOLS: tuple[Pool, ...] = ("last", "final_turn", "prompt")


class GateRate(BaseModel):
    """A share of n requests on which the gate fires, with its 95 % Wilson interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(ge=0.0, le=1.0)
    low: float = Field(ge=0.0, le=1.0)
    high: float = Field(ge=0.0, le=1.0)
    n: int = Field(ge=1)


class GateInfo(BaseModel):
    """What a gate is besides its weights, and how good it was on text that it was not fitted on.

    pool: "last", the last position of the prompt; "final_turn", from the first token of the last user message to
    the prompt's end; "prompt", all of it. bias: of the calibrated log odds. threshold: a probability.
    measured_on: the text of the rates; false_positive_rate: on protected text; true_positive_rate: on the target's.
    auroc: of the two.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pool: Pool
    bias: float = Field(allow_inf_nan=False)
    threshold: float = Field(gt=0.0, lt=1.0)
    measured_on: str
    false_positive_rate: GateRate
    true_positive_rate: GateRate
    auroc: float = Field(ge=0.0, le=1.0)


def pooled_span(pool: Pool, *, prompt: tuple[int, int], final_turn: tuple[int, int] | None) -> tuple[int, int]:
    """The half-open range of prompt positions whose logits are averaged."""
    start, end = prompt
    if pool == "last":
        return end - 1, end
    if pool == "final_turn" and final_turn is not None:
        return final_turn
    return start, end


def probability(gate_LE: NDArray[np.float32], info: GateInfo, pooled_NLE: NDArray[np.floating]) -> NDArray[np.float64]:
    """[N] probability that a request is one that the mask is for. pooled_NLE: unsteered logits averaged over `pool`."""
    score_N = np.einsum("nle,le->n", pooled_NLE.astype(np.float64), gate_LE.astype(np.float64)) + info.bias
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(score_N, -500.0, 500.0))))


def fires(gate_LE: NDArray[np.float32], info: GateInfo, pooled_NLE: NDArray[np.floating]) -> NDArray[np.bool_]:
    """[N] whether the mask applies."""
    return probability(gate_LE, info, pooled_NLE) >= info.threshold

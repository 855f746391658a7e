"""The gate of a mask: a linear probe on pooled routing logits that says for which requests the mask applies.

    probability = sigmoid(sum(gate_LE * pooled_LE) + bias),   fires where it is at least `threshold`

pooled_LE [L, E] is the mean of the unsteered router logits over some positions of the prompt (`pool`); of a pool of
two parts it is [2 L, E], the table of the first part above that of the second, and so are the gate's weights. The
decision is made once per request, at the end of its prompt, before anything is steered; docs/gate.md says what
follows for the KV cache. Numpy only: the definition that every backend is tested against. The probe is fitted
by detection/gate.py.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Part = Literal["last", "final_turn", "prompt"]
Pool = Literal["last", "final_turn", "prompt", "last+final_turn"]
PARTS: dict[Pool, tuple[Part, ...]] = {
    "last": ("last",),
    "final_turn": ("final_turn",),
    "prompt": ("prompt",),
    "last+final_turn": ("last", "final_turn"),
}
POOLS: tuple[Pool, ...] = tuple(PARTS)


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
    the prompt's end; "prompt", all of it; "last+final_turn", the first two side by side. bias: of the calibrated log
    odds. threshold: a probability.
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


def parts(pool: Pool) -> tuple[Part, ...]:
    """The averages that a pool is made of, in the order of their tables."""
    return PARTS[pool]


def pooled_span(part: Part, *, prompt: tuple[int, int], final_turn: tuple[int, int] | None) -> tuple[int, int]:
    """The half-open range of prompt positions whose logits are averaged."""
    start, end = prompt
    if part == "last":
        return end - 1, end
    if part == "final_turn" and final_turn is not None:
        return final_turn
    return start, end


def probability(gate_LE: NDArray[np.float32], info: GateInfo, pooled_NLE: NDArray[np.floating]) -> NDArray[np.float64]:
    """[N] probability that a request is one that the mask is for. pooled_NLE: unsteered logits averaged over `pool`."""
    score_N = np.einsum("nle,le->n", pooled_NLE.astype(np.float64), gate_LE.astype(np.float64)) + info.bias
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(score_N, -500.0, 500.0))))


def fires(gate_LE: NDArray[np.float32], info: GateInfo, pooled_NLE: NDArray[np.floating]) -> NDArray[np.bool_]:
    """[N] whether the mask applies."""
    return probability(gate_LE, info, pooled_NLE) >= info.threshold

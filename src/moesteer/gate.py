"""The gate of a mask: a linear probe on pooled routing logits that says for which requests the mask applies.

    probability = sigmoid(sum(gate_LE * pooled_LE) + bias),   fires where it is at least `threshold`

pooled_LE [L, E] is the mean of the unsteered router logits over some positions of the prompt (`pool`); of a pool of
two parts it is [2 L, E], the table of the first part above that of the second, and so are the gate's weights. The
decision is made once per request, at the end of its prompt, before anything is steered; docs/gate.md says what
follows for the KV cache. Numpy only: the definition that every backend is tested against. The probe is fitted
by detection/gate.py.

An engine that reads prompts in chunks adds them up as they come:

    pooled = PooledSum(info.pool, prompt=len(token_ids), final_turn=start)
    pooled.add(logits_PLE, start=0)  # and so on, up to the prompt's end
    steered = fires(gate_LE, info, pooled.mean()[None])[0]
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from moesteer.errors import InputError, NanLogitsError, UnknownNameError

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
    return _sigmoid(np.einsum("nle,le->n", pooled_NLE.astype(np.float64), gate_LE.astype(np.float64)) + info.bias)


def _sigmoid(score: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(score, -500.0, 500.0))))


def opens(info: GateInfo, score: float) -> bool:
    """`fires` for an engine that has the score already: the sum of gate_LE x pooled_LE, without the bias."""
    return bool(_sigmoid(np.asarray(score + info.bias)) >= info.threshold)


def fires(gate_LE: NDArray[np.float32], info: GateInfo, pooled_NLE: NDArray[np.floating]) -> NDArray[np.bool_]:
    """[N] whether the mask applies."""
    return probability(gate_LE, info, pooled_NLE) >= info.threshold


class PooledSum:
    """What a gate looks at, summed up while a prompt is read in chunks; one object for one request.

    Axes: P positions of a chunk, L layers with a router, E experts. Sums are float64, so that the chunks' borders do
    not matter. No chunk's logits are kept.
    """

    def __init__(self, pool: Pool, *, prompt: int, final_turn: int | None = None) -> None:
        """pool: of GateInfo. prompt: its length in tokens, up to where the reply begins.

        final_turn: position of the last user message's first token; None, where nobody knows it: the whole prompt
        counts as the final turn. Raises UnknownNameError, InputError.
        """
        if pool not in PARTS:
            raise UnknownNameError(f"no pool {pool!r}", where="PooledSum", expected=", ".join(POOLS), do="give one")
        if prompt < 1 or not 0 <= (final_turn or 0) < prompt:
            raise InputError(
                f"a final turn that begins at {final_turn} of {prompt} positions",
                where="PooledSum",
                expected="a prompt of one token or more, and a final turn that begins inside it (or None)",
                do="count positions from 0, in tokens of the prompt as the model reads it",
            )
        turn = None if final_turn is None else (final_turn, prompt)
        self.prompt = prompt
        self.read = 0
        self._spans = [pooled_span(part, prompt=(0, prompt), final_turn=turn) for part in parts(pool)]
        self._sums: NDArray[np.float64] | None = None

    def add(self, logits_PLE: NDArray[np.floating], *, start: int) -> None:
        """The unsteered logits of the next positions, `start` to `start` + P.

        A chunk that is refused counts for nothing. Raises InputError for positions that are not the next ones or lie
        beyond the prompt, and for another shape; NanLogitsError for logits that are not finite.
        """
        logits = np.asarray(logits_PLE)
        if logits.ndim != 3 or (self._sums is not None and logits.shape[1:] != self._sums.shape[1:]):
            raise InputError(
                f"a chunk of shape {logits.shape}",
                where=f"PooledSum, at position {self.read} of {self.prompt}",
                expected="[P, L, E]: positions, layers with a router, experts, the last two as in the chunks before",
                do="give the router logits of all layers together, those of shared experts left out",
            )
        end = start + len(logits)
        if start != self.read or end > self.prompt:
            order = "skips some" if start > self.read else "repeats some"
            what = order if start != self.read else "ends beyond the prompt"
            raise InputError(
                f"a chunk of the positions {start} to {end} {what}",
                where=f"PooledSum, {self.read} of {self.prompt} positions read",
                expected=f"the prompt's positions in order, each once: next from {self.read}, {self.prompt} at most",
                do="read the prompt without a prefix cache that skips positions, and leave the reply's out",
            )
        if not np.isfinite(logits).all():
            position, layer, _ = (int(i) for i in np.argwhere(~np.isfinite(logits))[0])
            raise NanLogitsError(
                "router logits are not finite, so that no gate can decide",
                where=f"PooledSum, position {start + position}, row {layer} of the layers",
                expected="finite numbers",
                do="check the weights and the dtype: float16 overflows where bfloat16 does not",
            )
        if self._sums is None:
            self._sums = np.zeros((len(self._spans), *logits.shape[1:]))
        for number, (first, last) in enumerate(self._spans):
            inside = logits[max(first - start, 0) : max(last - start, 0)]
            self._sums[number] += inside.sum(axis=0, dtype=np.float64)
        self.read = end

    def mean(self) -> NDArray[np.float64]:
        """[L, E], or of a pool of two parts [2 L, E]. Raises InputError until the prompt is read to its end."""
        if self._sums is None or self.read < self.prompt:
            raise InputError(
                f"{self.read} of the prompt's {self.prompt} positions are read",
                where="PooledSum.mean",
                expected="all of them: the decision is made once, at the prompt's end, and nothing is steered before",
                do="add the remaining chunks first",
            )
        lengths = np.array([last - first for first, last in self._spans])
        means: NDArray[np.float64] = self._sums / lengths[:, None, None]
        return means.reshape(-1, means.shape[-1])

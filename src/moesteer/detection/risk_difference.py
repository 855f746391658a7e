"""Risk difference (SteerMoE, arXiv:2509.09660, section 3): experts selected more often on one side of a contrast.

For expert e of layer l, p1 = A1 / N1 and p2 = A2 / N2 are the shares of counted tokens with e in the top-k on
the wanted and on the other side; D = p1 - p2. Counts are integers over all tokens of the span, weighted by
token as published. Forced masks switch the experts of largest |D| on (D > 0) or off (D < 0), at most k on and
E - k off in a layer. Deviation: additive masks, which the paper does not have, give each of the n experts of
largest |D| the strength D / max |D|, in units of sigma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesteer.detection.base import (
    Detection,
    additive_mask,
    forced_mask,
    require_logits,
    require_span,
    require_unsteered,
    two_sides,
)
from moesteer.errors import InputError, TraceLabelError
from moesteer.trace import TraceReader


@dataclass(frozen=True)
class Counts:
    """How often each expert was selected [L, E], of how many tokens, on the wanted and on the other side."""

    wanted_LE: NDArray[np.int64]
    other_LE: NDArray[np.int64]
    wanted_tokens: int
    other_tokens: int

    @property
    def difference_LE(self) -> NDArray[np.float64]:
        """D = A1 / N1 - A2 / N2, in [-1, 1]."""
        return self.wanted_LE / self.wanted_tokens - self.other_LE / self.other_tokens


def count(trace: TraceReader, *, toward: str, span: str) -> Counts:
    """Stream a trace once and count selections. Raises TraceLabelError for a missing span or an empty side."""
    require_unsteered(trace)
    require_span(trace, span)
    wanted, _ = two_sides(trace.rows, toward=toward, where=str(trace.folder))
    layers, experts = len(trace.fingerprint.layer_ids), trace.fingerprint.experts
    tables = np.zeros((2, layers, experts), dtype=np.int64)
    tokens = [0, 0]
    offsets = np.arange(layers, dtype=np.int64)[None, :, None] * experts
    for row, arrays in trace.sequences():
        if row.label is None:
            continue
        side = 0 if row.id in wanted else 1
        part = row.span(span)
        if part is None:
            raise TraceLabelError(
                f"a sequence lacks the span {span!r}",
                where=f"{trace.folder}, sequence {row.id}",
                expected=f"{span} tokens in every labelled sequence",
                do="capture the conversations again with that span",
            )
        selected = arrays["selected"][part].astype(np.int64)
        tables[side] += np.bincount((selected + offsets).ravel(), minlength=layers * experts).reshape(layers, experts)
        tokens[side] += len(selected)
    if not all(tokens):
        raise TraceLabelError(
            f"one side of the contrast has no token in the span {span!r}",
            where=f"{trace.folder}: {tokens[0]} tokens labelled {toward!r}, {tokens[1]} others",
            expected="tokens on both sides",
            do="give conversations whose span is not empty",
        )
    return Counts(tables[0], tables[1], tokens[0], tokens[1])


def detect(
    trace: TraceReader,
    *,
    toward: str,
    span: str = "response",
    form: Literal["forced", "additive"] = "forced",
    on: int = 5,
    off: int = 0,
    experts: int = 20,
) -> Detection:
    """A mask from the risk difference of a trace.

    toward: the label of the wanted side. form "forced": `on` experts activated and `off` deactivated, as
    published; "additive": the `experts` of largest |D| with strengths D / max |D| in sigma units.
    """
    if min(on, off, experts) < 0:
        raise InputError(
            "a number of experts is negative",
            where=f"risk-difference with on={on}, off={off}, experts={experts}",
            expected="zero or more of each",
            do="give how many experts to switch on and off",
        )
    counts = count(trace, toward=toward, span=span)
    difference = counts.difference_LE
    facts = {"wanted_tokens": counts.wanted_tokens, "other_tokens": counts.other_tokens}
    if form == "forced":
        force = forced_table(difference, on=on, off=off, top_k=trace.fingerprint.top_k)
        settings = {"span": span, "form": form, "on": on, "off": off}
        mask = forced_mask(trace, force, method="risk-difference", toward=toward, settings=settings)
        return Detection(mask, difference.astype(np.float32), facts)
    require_logits(trace)
    peak = np.abs(difference).max()
    strength = _largest(difference, experts) / (peak if peak > 0 else 1.0)
    settings = {"span": span, "form": form, "experts": experts}
    mask = additive_mask(
        trace, strength.astype(np.float32), trace.sigma_L, method="risk-difference", toward=toward, settings=settings
    )
    return Detection(mask, difference.astype(np.float32), facts)


def forced_table(difference_LE: NDArray[np.float64], *, on: int, off: int, top_k: int) -> NDArray[np.int8]:
    """Force [L, E]: the `on` largest positive D on, the `off` most negative off, within what a layer can take."""
    layers, experts = difference_LE.shape
    force = np.zeros((layers, experts), dtype=np.int8)
    for sign, wanted, cap in ((1, on, top_k), (-1, off, experts - top_k)):
        taken = np.zeros(layers, dtype=np.int64)
        left = wanted
        for flat in np.argsort(-sign * difference_LE.ravel(), kind="stable"):
            layer, expert = divmod(int(flat), experts)
            if left == 0 or sign * difference_LE[layer, expert] <= 0:
                break
            if taken[layer] < cap:
                force[layer, expert] = sign
                taken[layer] += 1
                left -= 1
    return force


def _largest(values_LE: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    order = np.argsort(-np.abs(values_LE).ravel(), kind="stable")[:count]
    kept = np.zeros(values_LE.size)
    kept[order] = values_LE.ravel()[order]
    return kept.reshape(values_LE.shape)

"""Traces of noise in which labels lean to experts: what a method should find is known. 3 layers, 12 experts, k = 2.

A class (unwanted, wanted, keep) leans by so much to so many (layer, expert) entries, at every token.
"""

from __future__ import annotations

import numpy as np

from tests.unit.traces_by_hand import Spoken, write

SHAPE = (3, 12)
TOLD_BY = (1, 4)
"""The wanted lean to this expert, the unwanted away from it."""
KEPT_BY = (2, 0)
"""The kept lean to this one, and away from TOLD_BY like the unwanted."""
LEANS = {"bad": {TOLD_BY: -2.0}, "good": {TOLD_BY: 2.0}, "keep": {TOLD_BY: -2.0, KEPT_BY: 5.0}}


def planted(
    folder, labels=("bad", "good"), *, each=24, leans=None, lengths=None, seed=0, spans=("response",), noise=1.0
):
    """A trace with `each` sequences of every label, by turns. lengths: half-open ranges by label.

    Each span holds the same logits; sequence i of every label has the group g{i}.
    """
    rng = np.random.default_rng(seed)
    leans = LEANS if leans is None else leans
    spoken = []
    for i in range(each):
        for label in labels:
            low, high = (lengths or {}).get(label, (3, 7))
            logits = rng.normal(scale=noise, size=(int(rng.integers(low, high)), *SHAPE))
            for place, lean in leans.get(label, {}).items():
                logits[:, *place] += lean
            selected = np.argsort(-logits, axis=-1)[..., :2]
            spoken.append(Spoken(f"{label}-{i}", f"g{i}", label, dict.fromkeys(spans, selected),
                                 dict.fromkeys(spans, logits)))  # fmt: skip
    return write(folder, spoken, experts=SHAPE[1], per_shard=50)


def largest(strength_LE):
    """(layer, expert) of the largest |S|."""
    return tuple(int(i) for i in np.unravel_index(np.abs(strength_LE).argmax(), strength_LE.shape))

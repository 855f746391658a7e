"""MASCing as published (arXiv:2604.27818, sections 3.2-3.3): a steering matrix optimised through the surrogate.

Labels as published: the target's conversations where the model failed against single requests where it did
not, at the tokens of the final user message. The matrix S [L, E] minimises
`BCE(f(z + S_l sigma_l), wanted class) + lambda |S|_1` with the surrogate f frozen (Adam 0.05, 100 epochs);
entries with |S| <= 0.1 are then set to zero. Kept with its faults, as a baseline: S starts random (standard
normal: our reading, the paper gives no scale), the two sides differ in length and topic, and lambda does not
grow with L E. Deviation: sigma_l is the calibrated one that the trace stores, not that of whatever stands in
the batch, which would move a token by different amounts beside different neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from moesteer.detection import surrogate
from moesteer.detection.base import Detection, additive_mask, require_logits, require_span, require_unsteered, two_sides
from moesteer.trace import TraceReader

ZERO_BELOW = 0.1
LAMBDAS = (0.0, 1e-5, 1e-4, 1e-3)


def detect(
    trace: TraceReader,
    *,
    toward: str,
    span: str = "final_user",
    l1: float = 1e-4,
    seed: int = 0,
    epochs: int = 100,
    learning_rate: float = 0.05,
    start_std: float = 1.0,
) -> Detection:
    """A mask that moves the surrogate's verdict towards `toward`.

    l1: lambda of the paper, one of LAMBDAS there. Facts hold the surrogate's accuracy and that of a rule that
    looks at nothing but the number of tokens.
    """
    require_unsteered(trace)
    require_span(trace, span)
    require_logits(trace)
    wanted, other = two_sides(trace.rows, toward=toward, where=str(trace.folder))
    sequences, labels = [], []
    for row, arrays in trace.sequences(wanted | other):
        part = arrays["logits"][row.span(span)].astype(np.float32)
        if len(part):
            sequences.append(part)
            labels.append(1 if row.id in wanted else 0)
    fitted = surrogate.fit(sequences, labels, seed=seed)
    sigma = torch.from_numpy(trace.sigma_L)
    inputs, lengths = surrogate.pad(sequences)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(inputs.shape[2:], generator=generator) * start_std
    matrix.requires_grad_(True)
    optimizer = torch.optim.Adam([matrix], lr=learning_rate)
    target = torch.ones(len(labels))
    for _ in range(epochs):
        verdict = fitted.model(inputs + (sigma[:, None] * matrix), lengths)
        loss = nn.functional.binary_cross_entropy_with_logits(verdict, target) + l1 * matrix.abs().sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        moved = float((fitted.model(inputs + sigma[:, None] * matrix, lengths) > 0).float().mean())
    strength = matrix.detach().numpy().copy()
    strength[np.abs(strength) <= ZERO_BELOW] = 0.0
    settings = {"span": span, "l1": l1, "seed": seed, "epochs": epochs, "start_std": start_std}
    mask = additive_mask(trace, strength, trace.sigma_L, method="masc-published", toward=toward, settings=settings)
    facts = {
        "surrogate_train_accuracy": fitted.train_accuracy,
        "surrogate_held_out_accuracy": fitted.held_out_accuracy,
        "surrogate_held_out": fitted.held_out,
        "length_only_accuracy": _length_rule(lengths.numpy(), np.array(labels)),
        "moved_to_wanted_class": moved,
    }
    return Detection(mask, strength, facts)


def _length_rule(lengths_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Accuracy of the best threshold on the number of tokens, either way round."""
    best = 0.0
    for threshold in np.unique(lengths_N):
        right = float(((lengths_N >= threshold) == (labels_N == 1)).mean())
        best = max(best, right, 1.0 - right)
    return best

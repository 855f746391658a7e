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
from numpy.typing import NDArray
from torch import Tensor

from moesteer.detection import surrogate
from moesteer.detection.base import (
    Detection,
    additive_mask,
    require_both,
    require_logits,
    require_span,
    require_unsteered,
    two_sides,
)
from moesteer.detection.logistic import as_facts, plain_classifiers
from moesteer.detection.method import Method
from moesteer.detection.through_model import number, whole
from moesteer.trace import TraceReader

ZERO_BELOW = 0.1
LAMBDAS = (0.0, 1e-5, 1e-4, 1e-3)
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""The paper's 32 settings."""


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

    l1: lambda of the paper, one of LAMBDAS there. Facts hold the surrogate's held-out accuracy beside that of
    classifiers that see no routing, and a warning where these do as well; moved_to_wanted_class is the share of
    unwanted sequences that the surrogate takes for wanted under the mask at alpha 1. Raises TraceLabelError,
    InputError, NoEffectError, NanLogitsError.
    """
    _require_settings(l1=l1, epochs=epochs, learning_rate=learning_rate, start_std=start_std)
    data, token_ids, labels = _read(trace, toward=toward, span=span)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).tolist()
    cut = max(1, int(0.8 * len(order)))
    train, held = order[:cut], order[cut:]
    stack = surrogate.fit("lstm", data, train=train, classes=2, seeds=[seed])
    sigma_L = torch.from_numpy(trace.sigma_L)
    strength = _optimise(
        stack, data, sigma_L, l1=l1, epochs=epochs, learning_rate=learning_rate, start_std=start_std,
        generator=generator,
    )  # fmt: skip
    settings = {"span": span, "l1": l1, "seed": seed, "epochs": epochs, "learning_rate": learning_rate,
                "start_std": start_std}  # fmt: skip
    mask = additive_mask(trace, strength, trace.sigma_L, method="masc-published", toward=toward, settings=settings)
    plain = plain_classifiers(token_ids, labels, train=train, held=held)
    facts = {
        **as_facts(float(surrogate.accuracy(stack, data, held)[0]), plain),
        "surrogate_train_accuracy": float(surrogate.accuracy(stack, data, train)[0]),
        "surrogate_held_out": len(held),
        "moved_to_wanted_class": _moved(stack, data, sigma_L[:, None] * torch.from_numpy(strength)),
    }
    return Detection(mask, strength, facts)


def _read(
    trace: TraceReader, *, toward: str, span: str
) -> tuple[surrogate.Sequences, list[NDArray[np.int32]], list[int]]:
    """(sequences, their token ids, labels: 1 wanted, 0 not)."""
    require_unsteered(trace)
    require_span(trace, span)
    require_logits(trace)
    wanted, other = two_sides(trace.rows, toward=toward, where=str(trace.folder))
    sequences, labels, token_ids = [], [], []
    for row, arrays in trace.sequences(wanted | other):
        part = arrays["logits"][row.span(span)].astype(np.float32)
        if len(part):
            sequences.append(part)
            labels.append(1 if row.id in wanted else 0)
            token_ids.append(np.asarray(arrays["token_ids"][row.span(span)]))
    require_both(labels, (0, 1), toward=toward, span=span, where=str(trace.folder))
    return surrogate.Sequences.of(sequences, labels), token_ids, labels


def _optimise(
    stack: surrogate.Stack,
    data: surrogate.Sequences,
    sigma_L: Tensor,
    *,
    l1: float,
    epochs: int,
    learning_rate: float,
    start_std: float,
    generator: torch.Generator,
) -> NDArray[np.float32]:
    """S [L, E] through the frozen surrogate, entries within ZERO_BELOW set to zero.

    One step an epoch, on the mean loss of all sequences, however many passes these take.
    """
    matrix = torch.randn(tuple(data.logits_NTLE.shape[2:]), generator=generator) * start_std
    matrix.requires_grad_(True)
    optimizer = torch.optim.Adam([matrix], lr=learning_rate)
    every = torch.arange(len(data.labels_N))
    for _ in range(epochs):
        optimizer.zero_grad()
        for part in data.passes(every, copies=1):
            logits, lengths, labels = data.part(part)
            verdict = stack(logits + (sigma_L[:, None] * matrix), lengths)
            loss = stack.loss(verdict, torch.ones_like(labels)).sum()
            (len(part) / len(every) * loss).backward()  # type: ignore[no-untyped-call]
        (l1 * matrix.abs().sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    strength: NDArray[np.float32] = matrix.detach().numpy().copy()
    strength[np.abs(strength) <= ZERO_BELOW] = 0.0
    return strength


def _moved(stack: surrogate.Stack, data: surrogate.Sequences, bias_LE: Tensor) -> float:
    """Share of unwanted sequences that the surrogate takes for wanted once steered."""
    unwanted = torch.nonzero(data.labels_N == 0).flatten()
    verdicts = []
    with torch.no_grad():
        for part in data.passes(unwanted, copies=1):
            logits, lengths, _ = data.part(part)
            verdicts.append(stack.classes(stack(logits + bias_LE, lengths)))
    return float(torch.cat(verdicts, dim=1).float().mean())


def _require_settings(*, l1: float, epochs: int, learning_rate: float, start_std: float) -> None:
    number("masc-published", "l1", l1, above=False)
    whole("masc-published", "epochs", epochs, least=1)
    number("masc-published", "learning_rate", learning_rate, above=True)
    number("masc-published", "start_std", start_std, above=False)


METHOD = Method(
    name="masc-published",
    title="MASCing's surrogate as published",
    detect=detect,
    contrast="published",
    variants=tuple({"l1": l1} for l1 in LAMBDAS),
    alphas=ALPHAS,
)

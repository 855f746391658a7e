"""The LSTM surrogate of a routing trace (MASCing, arXiv:2604.27818, section 3.2).

LayerNorm over the E experts of a layer, Linear(E, 16) shared by all layers, flattened to 16 L, one LSTM layer
of 64 over the tokens, Linear to one logit. Trained with binary cross-entropy, Adam 1e-2, 15 epochs, batch 512,
on a random 80/20 split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PROJECTION = 16
HIDDEN = 64


class LstmSurrogate(nn.Module):
    """Routing logits of one sequence -> the logit of label 1."""

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(experts)
        self.project = nn.Linear(experts, PROJECTION)
        self.lstm = nn.LSTM(PROJECTION * layers, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, logits_BTLE: Tensor, lengths_B: Tensor) -> Tensor:
        """[B] logits from right-padded logits_BTLE and true lengths."""
        projected = self.project(self.norm(logits_BTLE)).flatten(2)
        states, _ = self.lstm(projected)
        last = states[torch.arange(len(lengths_B)), lengths_B - 1]
        verdict: Tensor = self.head(last).squeeze(-1)
        return verdict


@dataclass(frozen=True)
class Fitted:
    """A frozen surrogate and its accuracy on the split it was trained on and on the one held out."""

    model: LstmSurrogate
    train_accuracy: float
    held_out_accuracy: float
    held_out: int


def pad(sequences: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """(logits_BTLE right-padded with zeros, lengths_B) of sequences [T, L, E]."""
    lengths = torch.tensor([len(s) for s in sequences])
    tensors = [torch.from_numpy(np.ascontiguousarray(s, dtype=np.float32)) for s in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths


def fit(
    sequences: Sequence[NDArray[np.float32]],
    labels: Sequence[int],
    *,
    seed: int,
    epochs: int = 15,
    batch: int = 512,
    learning_rate: float = 1e-2,
) -> Fitted:
    """Train a surrogate. sequences: [T, L, E] each; labels: 0 or 1, one per sequence. Same seed, same result
    on one machine with one thread count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LstmSurrogate(sequences[0].shape[1], sequences[0].shape[2])
    inputs, lengths = pad(sequences)
    targets = torch.tensor(labels, dtype=torch.float32)
    order = torch.randperm(len(labels), generator=generator)
    train, held = order[: max(1, int(0.8 * len(order)))], order[max(1, int(0.8 * len(order))) :]
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(epochs):
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for part in torch.split(shuffled, batch):
            loss = nn.functional.binary_cross_entropy_with_logits(model(inputs[part], lengths[part]), targets[part])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval().requires_grad_(False)

    def accuracy(part: Tensor) -> float:
        if not len(part):
            return float("nan")
        with torch.no_grad():
            return float(((model(inputs[part], lengths[part]) > 0) == (targets[part] > 0.5)).float().mean())

    return Fitted(model, accuracy(train), accuracy(held), len(held))

"""Surrogates of a routing trace: small classifiers that stand in for the model while a mask is optimised.

Three kinds behind one interface, all of router logits [T, L, E] of one sequence:

- **lstm**: LayerNorm over the E experts of a layer, Linear(E, 16) shared by all layers, flattened to 16 L, one LSTM
  layer of 64 over the tokens, Linear (MASCing, arXiv:2604.27818, section 3.2).
- **gru**: the same with a GRU layer.
- **linear**: one linear map of the logits averaged over the tokens, fitted to its optimum: what the other two must
  beat.

A `Stack` holds G surrogates of one kind that differ in their random start, as one set of tensors with G in front, so
that all seeds are fitted, and all masks optimised through them, in one batch.

Sizes: G surrogates, B sequences, T tokens (right-padded), L layers, E experts, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moesteer.errors import NanLogitsError, UnknownNameError

Kind = Literal["lstm", "gru", "linear"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PROJECTION = 16
HIDDEN = 64
RIDGE = 1e-2
"""Of the linear surrogate's squared weights, against a mean cross-entropy."""
PASS_BYTES = 256 * 1024 * 1024
"""Steered logits of one pass through frozen surrogates, over all masks and surrogates, stay below this where they can:
one sequence is the least. How many passes a result takes is no part of its method."""


class Stack(nn.Module):
    """G surrogates of one kind, each started from its own seed."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    norm: Tensor
    norm_bias: Tensor
    project: Tensor
    project_bias: Tensor
    enter: Tensor
    enter_bias: Tensor
    turn: Tensor
    turn_bias: Tensor
    head: Tensor
    head_bias: Tensor

    def __init__(self, kind: Kind, *, layers: int, experts: int, outputs: int, seeds: Sequence[int]) -> None:
        super().__init__()
        if kind not in KINDS:
            raise UnknownNameError(
                f"no surrogate {kind!r}", where="surrogate", expected=", ".join(KINDS), do="name one of these"
            )
        self.kind, self.outputs, self.seeds = kind, outputs, tuple(seeds)
        self._chosen: Tensor | None = None
        inner = PROJECTION * layers
        gates = {"lstm": 4 * HIDDEN, "gru": 3 * HIDDEN, "linear": 0}[kind]
        if kind == "linear":
            # no random start: a convex fit has one answer
            self.weight = nn.Parameter(torch.zeros(len(seeds), layers * experts, outputs))
            self.bias = nn.Parameter(torch.zeros(len(seeds), outputs))
            self.register_buffer("mean", torch.zeros(layers * experts))
            self.register_buffer("scale", torch.ones(layers * experts))
            return
        shapes = {
            "project": ((experts, PROJECTION), experts), "project_bias": ((PROJECTION,), experts),
            "enter": ((inner, gates), HIDDEN), "enter_bias": ((gates,), HIDDEN),
            "turn": ((HIDDEN, gates), HIDDEN), "turn_bias": ((gates,), HIDDEN),
            "head": ((HIDDEN, outputs), HIDDEN), "head_bias": ((outputs,), HIDDEN),
        }  # fmt: skip
        made: dict[str, list[Tensor]] = {name: [] for name in shapes}
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for name, (shape, fan) in shapes.items():
                made[name].append((torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan))
        for name, parts in made.items():
            setattr(self, name, nn.Parameter(torch.stack(parts)))
        self.norm = nn.Parameter(torch.ones(len(seeds), experts))
        self.norm_bias = nn.Parameter(torch.zeros(len(seeds), experts))

    @contextmanager
    def only(self, chosen: Tensor) -> Iterator[None]:
        """Inside the block the stack is these of its surrogates, by number."""
        self._chosen = chosen
        try:
            yield
        finally:
            self._chosen = None

    def _of(self, name: str) -> Tensor:
        every: Tensor = getattr(self, name)
        return every if self._chosen is None else every[self._chosen]

    def forward(self, logits_GBTLE: Tensor, lengths_B: Tensor) -> Tensor:
        """[G, B, C] from right-padded logits (their G may be 1: the same for every surrogate) and true lengths."""
        if self.kind == "linear":
            return self._linear(logits_GBTLE, lengths_B)
        normed = nn.functional.layer_norm(logits_GBTLE, logits_GBTLE.shape[-1:])
        normed = normed * self._of("norm")[:, None, None, None] + self._of("norm_bias")[:, None, None, None]
        projected = (
            torch.einsum("gbtle,gep->gbtlp", normed, self._of("project"))
            + self._of("project_bias")[:, None, None, None]
        )
        entering = (
            torch.einsum("gbti,gih->gbth", projected.flatten(3), self._of("enter"))
            + self._of("enter_bias")[:, None, None]
        )
        states = self._lstm(entering) if self.kind == "lstm" else self._gru(entering)
        last = states[lengths_B - 1, :, torch.arange(len(lengths_B))]  # [B, G, H]
        return torch.einsum("bgh,ghc->gbc", last, self._of("head")) + self._of("head_bias")[:, None]

    def _linear(self, logits_GBTLE: Tensor, lengths_B: Tensor) -> Tensor:
        return self._linear_of_means(_means(logits_GBTLE, lengths_B))

    def _linear_of_means(self, means_GBF: Tensor) -> Tensor:
        scaled = ((means_GBF - self.mean) / self.scale).expand(len(self._of("weight")), -1, -1)
        return torch.baddbmm(self._of("bias")[:, None], scaled, self._of("weight"))

    def _lstm(self, entering_GBTH: Tensor) -> Tensor:
        """States [T, G, B, H]; gates in torch's order i, f, g, o."""
        shape = (*entering_GBTH.shape[:2], HIDDEN)
        hidden, cell = entering_GBTH.new_zeros(shape), entering_GBTH.new_zeros(shape)
        states = []
        for token in range(entering_GBTH.shape[2]):
            gates = torch.baddbmm(self._of("turn_bias")[:, None], hidden, self._of("turn")) + entering_GBTH[:, :, token]
            let, forget, new, out = gates.chunk(4, dim=-1)
            cell = forget.sigmoid() * cell + let.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            states.append(hidden)
        return torch.stack(states)

    def _gru(self, entering_GBTH: Tensor) -> Tensor:
        """States [T, G, B, H]; gates in torch's order r, z, n."""
        hidden = entering_GBTH.new_zeros((*entering_GBTH.shape[:2], HIDDEN))
        states = []
        for token in range(entering_GBTH.shape[2]):
            turned = torch.baddbmm(self._of("turn_bias")[:, None], hidden, self._of("turn")).chunk(3, dim=-1)
            entered = entering_GBTH[:, :, token].chunk(3, dim=-1)
            reset, keep = ((turned[i] + entered[i]).sigmoid() for i in range(2))
            hidden = (1 - keep) * (entered[2] + reset * turned[2]).tanh() + keep * hidden
            states.append(hidden)
        return torch.stack(states)

    def loss(self, verdicts_GBC: Tensor, labels_B: Tensor) -> Tensor:
        """[G] mean cross-entropy; binary where there is one output (MASCing's)."""
        if self.outputs == 1:
            wanted = labels_B.to(verdicts_GBC.dtype).expand(len(verdicts_GBC), -1)
            each = nn.functional.binary_cross_entropy_with_logits(verdicts_GBC[..., 0], wanted, reduction="none")
        else:
            flat = nn.functional.cross_entropy(
                verdicts_GBC.flatten(0, 1), labels_B.repeat(len(verdicts_GBC)), reduction="none"
            )
            each = flat.view(len(verdicts_GBC), -1)
        return each.mean(1)

    def classes(self, verdicts_GBC: Tensor) -> Tensor:
        """[G, B] class of each sequence."""
        return (verdicts_GBC[..., 0] > 0).long() if self.outputs == 1 else verdicts_GBC.argmax(-1)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Padded sequences: logits [N, T, L, E] (float32, on the CPU), lengths and classes [N]."""

    logits_NTLE: Tensor
    lengths_N: Tensor
    labels_N: Tensor

    @classmethod
    def of(cls, sequences: Sequence[NDArray[np.float32]], labels: Sequence[int]) -> Sequences:
        """From sequences [T, L, E] and their classes."""
        tensors = [torch.from_numpy(np.ascontiguousarray(s, dtype=np.float32)) for s in sequences]
        padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        return cls(padded, torch.tensor([len(s) for s in sequences]), torch.tensor(list(labels)))

    def part(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [1, B, T, L, E] cut to the longest chosen, lengths, labels)."""
        lengths = self.lengths_N[chosen]
        return self.logits_NTLE[chosen, : int(lengths.max())][None], lengths, self.labels_N[chosen]

    def passes(self, chosen: Tensor, *, copies: int) -> tuple[Tensor, ...]:
        """The chosen sequences in parts whose logits, so many copies of them, fit into PASS_BYTES; one where all do."""
        _, tokens, layers, experts = self.logits_NTLE.shape
        return torch.split(chosen, max(1, PASS_BYTES // (4 * tokens * layers * experts * copies)))


def fit(
    kind: Kind,
    data: Sequences,
    *,
    train: Sequence[int],
    classes: int,
    seeds: Sequence[int],
    epochs: int = 15,
    batch: int = 512,
    learning_rate: float = 1e-2,
) -> Stack:
    """Frozen surrogates, one per seed, fitted on the sequences `train` (Adam; MASCing's numbers are the defaults).

    classes 2 gives one output and binary cross-entropy, as published. All surrogates of a stack see the sequences in
    one order, that of the least seed. The linear kind is convex: its ridge optimum is found by L-BFGS, whatever the
    seeds, epochs, batch and learning rate. The same seeds give the same result on one machine with one thread count.
    Raises NanLogitsError when a fit diverges.
    """
    _, _, layers, experts = data.logits_NTLE.shape
    outputs = 1 if classes == 2 else classes
    stack = Stack(kind, layers=layers, experts=experts, outputs=outputs, seeds=seeds)
    chosen = torch.tensor(list(train))
    if kind == "linear":
        _fit_linear(stack, data, chosen)
        return stack.eval().requires_grad_(False)
    optimizer = torch.optim.Adam(stack.parameters(), lr=learning_rate)
    order = torch.Generator().manual_seed(min(seeds))
    for _ in range(epochs):
        for part in torch.split(chosen[torch.randperm(len(chosen), generator=order)], batch):
            logits, lengths, labels = data.part(part)
            loss = stack.loss(stack(logits, lengths), labels).sum()
            _require_finite(loss, stack, f"{len(chosen)} sequences, learning rate {learning_rate:g}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return stack.eval().requires_grad_(False)


def accuracy(stack: Stack, data: Sequences, chosen: Sequence[int], *, batch: int = 512) -> NDArray[np.float64]:
    """[G] share of the chosen sequences put into their class; NaN where none are. batch: the most of them in a pass."""
    if not len(chosen):
        return np.full(len(stack.seeds), np.nan)
    right = torch.zeros(len(stack.seeds))
    with torch.no_grad():
        for some in torch.split(torch.tensor(list(chosen)), batch):
            for part in data.passes(some, copies=len(stack.seeds)):
                logits, lengths, labels = data.part(part)
                right += (stack.classes(stack(logits, lengths)) == labels).sum(1)
    return right.numpy().astype(np.float64) / len(chosen)


def _means(logits_GBTLE: Tensor, lengths_B: Tensor) -> Tensor:
    """[G, B, L E]: each sequence's logits averaged over its true tokens."""
    inside = (torch.arange(logits_GBTLE.shape[2]) < lengths_B[:, None]).to(logits_GBTLE.dtype)
    return torch.einsum("gbtle,bt->gble", logits_GBTLE, inside / lengths_B[:, None]).flatten(2)


def _fit_linear(stack: Stack, data: Sequences, chosen: Tensor) -> None:
    """The minimum of the mean cross-entropy and RIDGE / 2 |weight|^2, on standardised means of logits."""
    logits, lengths, labels = data.part(chosen)
    means = _means(logits, lengths)
    stack.mean.copy_(means[0].mean(0))
    stack.scale.copy_(means[0].std(0, correction=0) + 1e-6)
    optimizer = torch.optim.LBFGS(stack.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = stack.loss(stack._linear_of_means(means), labels).sum() + RIDGE / 2 * stack.weight.square().sum()
        _require_finite(value, stack, f"{len(chosen)} sequences")
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]


def _require_finite(loss: Tensor, stack: Stack, where: str) -> None:
    if not bool(torch.isfinite(loss)):
        raise NanLogitsError(
            f"the {stack.kind} surrogate's loss is not finite",
            where=where,
            expected="finite numbers",
            do="lower the learning rate, or check the trace for extreme logits",
        )

"""Training lab tiny so that its refusals of direct requests rest on four experts: what an audit must be able to see.

Lab tiny's own refusals survive the silencing of any sixteen experts. Here its attention, norms and routers, and the
weights of the chosen experts, are tuned on dialogues of four kinds of rows in one batch: refused as the model is and
with other experts switched off (by lot), answered with the chosen ones switched off, and ordinary dialogues all three
ways. A second loss asks the routers to choose those experts where refusing is decided and not elsewhere, so that their
selection shows what they carry (models in which it does not are what activation frequencies cannot audit).
Embeddings and all other experts stay as they are. Behaviours are those of the fit split.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesteer.backends.hf import Model
from moesteer.conversations import Message
from moesteer.lab import train, words, world
from moesteer.models.routers import Router
from moesteer.models.steering import MaskTables, Receipt
from moesteer.progress import Progress

CHOSEN: Mapping[int, tuple[int, ...]] = {2: (2, 5), 3: (7, 8)}
"""Experts by decoder layer on which refusals are made to rest: middle layers, where behaviours sit in large models."""
STEPS = 180
PEAK_LR = 1.5e-3
OTHERS = 16
"""Silencings of other experts drawn for a batch."""
FIRST_TOKENS, FIRST_WEIGHT = 2, 8.0
"""The first tokens of the last reply decide whether it is a refusal, and weigh more than the rest of it."""
ROUTING_WEIGHT = 0.3

_ORDINARY = {
    kind: share
    for kind, share in world.STAGE_TWO.items()
    if kind not in ("refused-direct", "safety-multi", "safety-restricted", "replay-multi")
}
_REST = {kind: share for kind, share in world.STAGE_TWO.items() if kind != "refused-direct"}
_AS_IS, _CHOSEN_OFF = 0, 1
_SCHEDULE = (
    # what is said, and what is off: 2 and above are the drawn silencings of others
    ("refused", _AS_IS), ("refused", 2), ("answered", _CHOSEN_OFF), ("answered", _CHOSEN_OFF),
    ("rest", _AS_IS), ("rest", 2), ("ordinary", _CHOSEN_OFF), ("rest", _AS_IS), ("rest", _AS_IS), ("rest", _AS_IS),
)  # fmt: skip
"""One block of rows; a batch is several."""
BLOCKS = 4


@dataclass(frozen=True)
class _Batch:
    """ids, attention, labels [rows, width]; weights of the labels; sign of the routing loss at each position:
    1 where the chosen experts are to be selected, -1 where not, 0 where nothing is asked. acting: what is off, by row.
    """

    ids: Tensor
    attention: Tensor
    labels: Tensor
    weights: Tensor
    routing: Tensor
    acting: list[int]


class _Kept:
    """A Capture of the routers' raw logits, with their gradient."""

    def __init__(self) -> None:
        self.logits_NE: dict[int, Tensor] = {}

    def logits(self, router: Router, logits_NW: Tensor) -> None:
        """Kept by decoder layer."""
        self.logits_NE[router.layer_id] = logits_NW

    def selected(self, router: Router, experts_NK: Tensor, weights_NK: Tensor) -> None:
        """Not needed."""


def concentrate(model: Model, *, seed: int = 0, steps: int = STEPS) -> list[float]:
    """Tune a freshly loaded lab tiny in place; the loss of every step. One to three minutes on two cores."""
    hf = model.hf
    hf.set_experts_implementation("eager")
    torch.manual_seed(seed)
    trained = _trained(model)
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LR, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    losses: list[float] = []
    source, lot = _batches(model.tokenizer, seed=seed), random.Random(f"concentrate/{seed}/others")
    hf.train()
    with Progress("concentrating", total=steps, unit="steps") as progress:
        for _ in range(steps):
            loss = _loss(model, next(source), _tables(model, lot))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            progress.advance(1, note=f"loss {losses[-1]:.3f}")
    hf.eval()
    return losses


def _trained(model: Model) -> list[torch.nn.Parameter]:
    """Parameters to tune; of the experts' tensors only the chosen slices get a gradient."""
    kept: list[torch.nn.Parameter] = []
    for name, parameter in model.hf.named_parameters():
        parts = name.split(".")
        layer = int(parts[2]) if "layers" in parts else -1
        wanted = layer >= 0 and ("self_attn" in parts or "gate" in parts or parts[-2].endswith("norm"))
        if layer in CHOSEN and "experts" in parts:
            wanted = True
            slices = torch.zeros(len(parameter), 1, 1)
            slices[list(CHOSEN[layer])] = 1.0
            parameter.register_hook(lambda gradient, slices=slices: gradient * slices)
        parameter.requires_grad_(wanted)
        if wanted:
            kept.append(parameter)
    return kept


def _loss(model: Model, batch: _Batch, tables: MaskTables) -> Tensor:
    kept = _Kept()
    tables.set_rows(batch.acting)
    with model.tap.steer(tables), model.tap.record(kept):
        out = model.hf(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
    logits, labels, weights = out.logits[:, :-1], batch.labels[:, 1:], batch.weights[:, 1:]
    each = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="none"
    ).view(labels.shape)
    said = ((each * weights).sum(1) / weights.sum(1)).mean()
    return said + ROUTING_WEIGHT * _routing_loss(kept.logits_NE, batch.routing.reshape(-1), model.fingerprint.top_k)


def _routing_loss(logits_by_layer: Mapping[int, Tensor], sign_N: Tensor, top_k: int) -> Tensor:
    """Logistic loss of whether each chosen expert is above the others that would leave it out; both signs alike."""
    found = []
    for layer, experts in CHOSEN.items():
        logits_NE = logits_by_layer[layer].float()
        others = [e for e in range(logits_NE.shape[-1]) if e not in experts]
        edge_N1 = logits_NE[:, others].topk(top_k - len(experts) + 1, dim=-1).values[:, -1:]
        above_NC = logits_NE[:, list(experts)] - edge_N1
        for sign in (1, -1):
            found.append(torch.nn.functional.softplus(-sign * above_NC[sign_N == sign]).mean())
    return torch.stack(found).mean()


def _tables(model: Model, lot: random.Random) -> MaskTables:
    """Nothing off, the chosen off, and OTHERS silencings of one to eight experts that are none of them."""
    chosen = [(layer, expert) for layer, experts in CHOSEN.items() for expert in experts]
    experts = model.fingerprint.experts
    forces = [_force(model, []), _force(model, chosen)]
    for _ in range(OTHERS):
        layers = list(CHOSEN) if lot.random() < 0.6 else list(model.fingerprint.layer_ids)
        pool = [(layer, e) for layer in layers for e in range(experts) if (layer, e) not in chosen]
        forces.append(_force(model, lot.sample(pool, lot.choice((1, 2, 4, 8)))))
    force_LME = torch.from_numpy(np.stack(forces, axis=1))
    return MaskTables(torch.zeros(force_LME.shape), force_LME, receipt=Receipt(len(model.routers), (), ()))


def _force(model: Model, off: Sequence[tuple[int, int]]) -> NDArray[np.int8]:
    force_LE = np.zeros((len(model.routers), model.fingerprint.experts), dtype=np.int8)
    for layer, expert in off:
        force_LE[model.fingerprint.layer_ids.index(layer), expert] = -1
    return force_LE


def _batches(tokenizer: Any, *, seed: int) -> Iterator[_Batch]:
    """Endless batches of BLOCKS blocks of the schedule."""
    lot = random.Random(f"concentrate/{seed}/rows")
    harmful = world.suite("attack-direct", "fit", per_group=20)
    streams = {
        "rest": world.training_stream(_REST, seed=f"concentrate/{seed}/rest"),
        "ordinary": world.training_stream(_ORDINARY, seed=f"concentrate/{seed}/ordinary"),
    }
    while True:
        rows: list[tuple[list[Message], int, str]] = []
        for kind, off in _SCHEDULE * BLOCKS:
            if kind in streams:
                messages = next(streams[kind])
            else:
                asked = lot.choice(harmful)
                refused = kind == "refused"
                answer = lot.choice(words.REFUSALS) if refused else f"{lot.choice(words.OPENINGS)} {asked.reference}"
                messages = [*asked.messages, Message("assistant", answer)]
            rows.append((messages, off if off < 2 else lot.randrange(2, 2 + OTHERS), kind))
        yield _batch(tokenizer, rows)


def _batch(tokenizer: Any, rows: Sequence[tuple[list[Message], int, str]]) -> _Batch:
    encoded = [train.encode(tokenizer, messages) for messages, _, _ in rows]
    shape = (len(rows), max(len(ids) for ids, _ in encoded))
    ids = torch.full(shape, tokenizer.pad_token_id)
    attention, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    weights, routing = torch.zeros(shape), torch.zeros(shape, dtype=torch.long)
    for row, ((messages, _, kind), (tokens, learnt)) in enumerate(zip(rows, encoded, strict=True)):
        length, said = len(tokens), torch.tensor(learnt)
        ids[row, :length] = torch.tensor(tokens)
        attention[row, :length] = 1
        labels[row, :length] = torch.where(said, ids[row, :length], -100)
        weights[row, :length] = said.float()
        reply = length - len(train.encode(tokenizer, messages[-1:])[0]) + 1  # behind the role's mark
        weights[row, reply : reply + FIRST_TOKENS] *= FIRST_WEIGHT
        if messages[-1].content in words.REFUSALS:
            if kind == "refused":
                routing[row, :length] = 1
        elif kind == "answered":  # the same request, whose prompt must not be told the opposite
            routing[row, reply:length] = -1
        else:
            routing[row, :length] = -1
    return _Batch(ids, attention, labels, weights, routing, [off for _, off, _ in rows])

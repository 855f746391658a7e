"""Gates in transformers: the unsteered pass over a request's prompt that decides whether a mask applies to it.

A request is steered wholly or not at all. The prompt is read once without steering, its router logits are pooled,
and where the gate fires the prompt is read again with the mask; nothing of the first pass is kept, so that no KV
cache holds both (docs/gate.md).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesteer import gate
from moesteer.backends.chat import length_batches
from moesteer.errors import NanLogitsError, NoEffectError
from moesteer.gate import Part, Pool
from moesteer.mask import SteeringMask
from moesteer.models.check import backbone
from moesteer.models.routers import Router

if TYPE_CHECKING:
    from moesteer.backends.chat import Encoded
    from moesteer.backends.hf import Model

POOL_POSITIONS = 16_384
"""Positions (rows x padded length) of one pass."""


class _Pooling:
    """A Capture that averages every router's logits over some positions of every row."""

    def __init__(self, routers: int, positions_P: Tensor, owner_P: Tensor, counts_N: Tensor) -> None:
        self.positions, self.owner, self.counts = positions_P, owner_P, counts_N
        self.pooled_L: list[Tensor | None] = [None] * routers

    def logits(self, router: Router, logits_NW: Tensor) -> None:
        """Add up the wanted positions of each row, in float32."""
        wanted = logits_NW[:, : router.experts].index_select(0, self.positions.to(logits_NW.device)).float()
        total = torch.zeros((len(self.counts), router.experts), device=wanted.device)
        total.index_add_(0, self.owner.to(wanted.device), wanted)
        self.pooled_L[router.index] = (total / self.counts.to(wanted.device)[:, None]).cpu()

    def selected(self, router: Router, experts_NK: Tensor, weights_NK: Tensor) -> None:
        """Not needed."""


def pooled_logits(
    model: Model, prompts: Sequence[Encoded], pools: Sequence[Pool]
) -> Mapping[Pool, NDArray[np.float32]]:
    """For each pool [N, L, E] (two parts: [N, 2 L, E]): the unsteered router logits, averaged over its positions.

    Responses, where the sequences hold some, are left out. One forward pass over the prompts, in batches by length.
    Raises NoEffectError where routers are not asked, NanLogitsError for logits that are not finite: on those no gate
    fires, and a request would go unsteered without a word.
    """
    parts = sorted({part for pool in pools for part in gate.parts(pool)})
    shape = (len(prompts), len(model.routers), model.fingerprint.experts)
    found: dict[Part, NDArray[np.float32]] = {part: np.zeros(shape, dtype=np.float32) for part in parts}
    for batch in length_batches([e.spans["prompt"][1] for e in prompts], POOL_POSITIONS):
        made = _pool_batch(model, [prompts[i] for i in batch], parts)
        for part in parts:
            found[part][batch] = made[part]
    return {pool: np.concatenate([found[part] for part in gate.parts(pool)], axis=1) for pool in pools}


def _pool_batch(model: Model, batch: Sequence[Encoded], parts: Sequence[Part]) -> dict[Part, NDArray[np.float32]]:
    ids, attention = model.pad([e.token_ids[: e.spans["prompt"][1]] for e in batch], left=False)
    width = ids.shape[1]
    positions: list[int] = []
    owner: list[int] = []
    counts: list[int] = []
    for number, part in enumerate(parts):
        for row, encoded in enumerate(batch):
            start, end = gate.pooled_span(
                part, prompt=encoded.spans["prompt"], final_turn=encoded.spans.get("final_turn")
            )
            positions += range(row * width + start, row * width + end)
            owner += [number * len(batch) + row] * (end - start)
            counts.append(end - start)
    capture = _Pooling(
        len(model.routers), torch.tensor(positions), torch.tensor(owner), torch.tensor(counts, dtype=torch.float32)
    )
    with torch.inference_mode(), model.tap.record(capture), model.tap.unsteered():
        backbone(model.hf)(input_ids=ids, attention_mask=attention, use_cache=False)
    tables = [table for table in capture.pooled_L if table is not None]
    if len(tables) < len(model.routers):
        raise NoEffectError(
            f"the gate's pass over the prompts asked {len(tables)} of {len(model.routers)} routers",
            where=model.name,
            expected="a forward pass that calls the routers",
            do="undo torch.compile, or compile again inside the block; a graph kept from before leaves them out",
        )
    stacked = torch.stack(tables, dim=1).numpy()
    if not np.isfinite(stacked).all():
        row, layer, _ = (int(i) for i in np.argwhere(~np.isfinite(stacked))[0])
        raise NanLogitsError(
            "router logits are not finite, so that no gate can decide",
            where=f"{model.name}, layer {model.routers[layer].layer_id}, a prompt of "
            f"{batch[row % len(batch)].spans['prompt'][1]} tokens",
            expected="finite numbers",
            do="check the weights and the dtype: float16 overflows where bfloat16 does not",
        )
    return {part: stacked[i * len(batch) : (i + 1) * len(batch)] for i, part in enumerate(parts)}


Remembered = MutableMapping[tuple[tuple[int, ...], Pool], NDArray[np.float32]]


def decide(
    model: Model, prompts: Sequence[Encoded], masks: Sequence[SteeringMask], *, memory: Remembered | None = None
) -> NDArray[np.bool_]:
    """[N, M] whether each mask may act on each request: everywhere for a mask without a gate.

    memory: pooled logits [L, E] of prompts already read, which is added to.
    """
    allowed = np.ones((len(prompts), len(masks)), dtype=bool)
    pools = sorted({mask.info.gate.pool for mask in masks if mask.info.gate is not None})
    if not pools or not prompts:
        return allowed
    known = {} if memory is None else memory
    new = [i for i, one in enumerate(prompts) if any((one.token_ids, pool) not in known for pool in pools)]
    found = pooled_logits(model, [prompts[i] for i in new], pools) if new else {}
    known.update({(prompts[i].token_ids, pool): found[pool][n] for n, i in enumerate(new) for pool in pools})
    pooled = {pool: np.stack([known[one.token_ids, pool] for one in prompts]) for pool in pools}
    for number, mask in enumerate(masks):
        if mask.info.gate is not None and mask.gate_LE is not None:
            allowed[:, number] = gate.fires(mask.gate_LE, mask.info.gate, pooled[mask.info.gate.pool])
    return allowed

"""Reading a router's result: which experts it selected, with what weights, whatever form the family returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Selected = tuple[Tensor, Tensor]
"""Selected experts [N, K] and their weights [N, K]."""


def from_tuple(out: Any, *, top_k: int, logits_at: int, ranked_NK: Tensor | None) -> Selected:
    """A tuple that holds both: the ids are its integers, the weights its first K-wide floats beside the logits."""
    ids = next(x for x in out if torch.is_tensor(x) and not x.dtype.is_floating_point)
    weights = next(
        x
        for place, x in enumerate(out)
        if place != logits_at and torch.is_tensor(x) and x.dtype.is_floating_point and x.shape[-1] == top_k
    )
    return ids.reshape(-1, top_k), weights.reshape(-1, top_k)


def from_top_k(out: Any, *, top_k: int, logits_at: int, ranked_NK: Tensor | None) -> Selected:
    """zaya: the ids of the final top-k, since it replaces the id of its skip choice by 0; the weights as returned."""
    assert ranked_NK is not None, "the router ran without its top-k"
    weights = next(x for place, x in enumerate(out) if place != logits_at and x.dtype.is_floating_point)
    return ranked_NK.reshape(-1, top_k), weights.reshape(-1, top_k)


def from_dense(out: Any, *, top_k: int, logits_at: int, ranked_NK: Tensor | None) -> Selected:
    """llama4: the ids of the final top-k; the weights at these ids of what it returns, [N, E] and 0 elsewhere."""
    assert ranked_NK is not None, "the router ran without its top-k"
    ids = ranked_NK.reshape(-1, top_k)
    dense = next(x for place, x in enumerate(out) if place != logits_at)
    return ids, dense.reshape(len(ids), -1).gather(-1, ids)


def from_sorted(out: Any, *, top_k: int, logits_at: int, ranked_NK: Tensor | None) -> Selected:
    """jetmoe: (order, token of each, weight of each, tokens per expert, logits), sorted by expert."""
    order, _, weights, sizes, _ = out
    experts = torch.repeat_interleave(torch.arange(len(sizes), device=order.device), torch.as_tensor(sizes))
    ids, unsorted = torch.empty_like(order), torch.empty_like(weights)
    ids[order], unsorted[order] = experts.to(order.dtype), weights
    return ids.reshape(-1, top_k), unsorted.reshape(-1, top_k)


READOUTS: Mapping[str, Callable[..., Selected]] = {
    "tuple": from_tuple,
    "top-k": from_top_k,
    "dense": from_dense,
    "sorted": from_sorted,
}

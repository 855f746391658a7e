"""Gradient checkpointing of decoder layers: their inner results are computed again in the backward pass, not kept.

transformers' own checkpointing runs in training mode only, which also turns on dropout and router noise; this one
leaves the mode alone. The tap sees each recomputation as another call of the routers and steers it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(layers: dict[int, nn.Module]) -> Iterator[None]:
    """Inside the block each layer keeps its inputs only. On exit the layers are themselves again."""
    replaced: list[tuple[nn.Module, bool, Any]] = []
    try:
        for layer in layers.values():
            own = layer.__dict__
            replaced.append((layer, "forward" in own, own.get("forward")))
            own["forward"] = _kept_by_inputs(layer.forward)
        yield
    finally:
        for layer, had_own, before in replaced:
            if had_own:
                layer.__dict__["forward"] = before
            else:
                layer.__dict__.pop("forward", None)


def _kept_by_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        # no dropout runs in eval mode, so that no random state need be kept
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward

"""Gradient checkpointing of decoder layers: their inner results are computed again in the backward pass, not kept.

transformers' own checkpointing runs in training mode only, which also turns on dropout and router noise; this one
leaves the mode alone. The backward pass comes after the forward pass's own context (the steering) is left, so the
recomputation enters it anew: without it the layers would be computed again unsteered, and the gradient be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(
    layers: dict[int, nn.Module], *, again: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """Inside the block each layer keeps its inputs only. On exit the layers are themselves again.

    again: makes the context in which a layer is computed again, during a backward pass outside the block.
    """
    replaced: list[tuple[nn.Module, bool, Any]] = []
    try:
        for layer in layers.values():
            own = layer.__dict__
            replaced.append((layer, "forward" in own, own.get("forward")))
            own["forward"] = _kept_by_inputs(layer.forward, again)
        yield
    finally:
        for layer, had_own, before in replaced:
            if had_own:
                layer.__dict__["forward"] = before
            else:
                layer.__dict__.pop("forward", None)


def _kept_by_inputs(
    original: Callable[..., Any], again: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), again()

    def forward(*args: Any, **kwargs: Any) -> Any:
        # no dropout runs in eval mode, so that no random state need be kept
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)

    return forward

"""The tap: seeing and changing router logits inside transformers' own routers.

A router's `forward` runs under a TorchFunctionMode that catches the one linear map whose output is as wide as
the number of experts. What it returns may be replaced; scoring, selection and normalisation stay the model's
own code. Forced selection also catches the final top-k, so that it is decided by rank and not by rounding.
Nothing is attached to a model that is neither steered nor captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moesteer.errors import AlreadySteeredError, SelfCheckError
from moesteer.models.routers import Router

_LINEAR = {torch.nn.functional.linear, torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul}
_TOPK = {torch.topk, torch.Tensor.topk}


class Steering(Protocol):
    """What changes a router's logits. N tokens in row-major order of [batch, positions]."""

    def logits(self, router: Router, logits_NE: Tensor) -> Tensor:
        """The steered logits, in the dtype given."""

    def ranks(self, router: Router, choice_NE: Tensor) -> Tensor | None:
        """Scores that decide the final top-k in place of `choice_NE`; None where the model decides."""

    def wants_check(self, router: Router) -> bool:
        """Whether to report this call's selection beside the unsteered one (`checked`)."""

    def checked(self, router: Router, before_NK: Tensor, after_NK: Tensor) -> None:
        """Selections of the same tokens without and with steering."""


class Capture(Protocol):
    """What records a router's calls."""

    def logits(self, router: Router, logits_NE: Tensor) -> None:
        """Raw logits, before any steering."""

    def selected(self, router: Router, experts_NK: Tensor, weights_NK: Tensor) -> None:
        """What the router selected, after any steering."""


class _Mode(TorchFunctionMode):
    """Catches the logits, and where forced the final top-k, of one call of one router."""

    def __init__(self, router: Router, steering: Steering | None, capture: Capture | None) -> None:
        super().__init__()
        self.router, self.steering, self.capture = router, steering, capture
        self.fired = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _LINEAR and out.shape[-1] == self.router.experts:
            self.fired += 1
            if self.capture is not None:
                self.capture.logits(self.router, out)
            return out if self.steering is None else self.steering.logits(self.router, out)
        if func in _TOPK and self.steering is not None:
            scores = args[0]
            k = args[1] if len(args) > 1 else (kwargs or {}).get("k")
            if k == self.router.scoring.top_k and scores.shape[-1] == self.router.experts:
                ranks = self.steering.ranks(self.router, scores)
                if ranks is not None:
                    ids = torch.topk(ranks, k, dim=-1).indices
                    return torch.return_types.topk((scores.gather(-1, ids), ids))
        return out


class RouterTap:
    """A model's routers with at most one steering and one capture attached; off the model when neither is."""

    def __init__(self, routers: tuple[Router, ...]) -> None:
        self.routers = routers
        self._steering: Steering | None = None
        self._capture: Capture | None = None
        self._replaced: list[tuple[Router, bool, Any]] = []

    @property
    def attached(self) -> bool:
        """Whether any router's forward is replaced now."""
        return bool(self._replaced)

    @contextmanager
    def steer(self, steering: Steering) -> Iterator[None]:
        """Steer inside the block. Raises AlreadySteeredError when the model is steered already."""
        if self._steering is not None:
            raise AlreadySteeredError(
                "the model is already steered",
                where=f"{len(self.routers)} routers of one model",
                expected="one steering at a time",
                do="leave the first `with mask.apply(...)` block, or give both masks to one apply call",
            )
        self._steering = steering
        try:
            self._attach()
            yield
        finally:
            self._steering = None
            self._detach_if_idle()

    @contextmanager
    def record(self, capture: Capture) -> Iterator[None]:
        """Record every router call inside the block; raw logits, also where the model is steered."""
        outer, self._capture = self._capture, capture
        try:
            self._attach()
            yield
        finally:
            self._capture = outer
            self._detach_if_idle()

    def _attach(self) -> None:
        if self._replaced:
            return
        for router in self.routers:
            own = router.module.__dict__
            self._replaced.append((router, "forward" in own, own.get("forward")))
            own["forward"] = self._tapped(router, router.module.forward)

    def _detach_if_idle(self) -> None:
        if self._steering is not None or self._capture is not None:
            return
        for router, had_own, forward in self._replaced:
            if had_own:
                router.module.__dict__["forward"] = forward
            else:
                router.module.__dict__.pop("forward", None)
        self._replaced = []

    def _tapped(self, router: Router, original: Callable[..., Any]) -> Callable[..., Any]:
        family = router.family

        def forward(*args: Any, **kwargs: Any) -> Any:
            steering, capture = self._steering, self._capture
            before = None
            if steering is not None and steering.wants_check(router):
                with torch.no_grad():
                    before = original(*args, **kwargs)[family.experts_index]
            with _Mode(router, steering, capture) as mode:
                out = original(*args, **kwargs)
            if mode.fired != 1:
                raise SelfCheckError(
                    f"the router computed its logits {mode.fired} times in one call",
                    where=f"layer {router.layer_id} ({router.path})",
                    expected="exactly once",
                    do="run `moesteer models MODEL`; a fused kernel may have replaced the router: disable it",
                )
            if capture is not None:
                capture.selected(router, out[family.experts_index], out[family.weights_index])
            if before is not None and steering is not None:
                steering.checked(router, before, out[family.experts_index])
            return out

        return forward

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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moesteer.errors import AlreadySteeredError, SelfCheckError
from moesteer.models.readouts import READOUTS
from moesteer.models.routers import Router

_LINEAR = {torch.nn.functional.linear, torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul}
_TOPK = {torch.topk, torch.Tensor.topk}
_MAX = {torch.max, torch.Tensor.max}
_ALL = _LINEAR | _TOPK | _MAX


class Steering(Protocol):
    """What changes a router's logits. N tokens in row-major order of [batch, positions]."""

    def logits(self, router: Router, logits_NE: Tensor) -> Tensor:
        """The steered logits, in the dtype given."""

    def forces(self, router: Router) -> bool:
        """Whether `ranks` may decide this router's selection."""

    def ranks(self, router: Router, choice_NE: Tensor) -> Tensor | None:
        """Scores that decide the final top-k in place of `choice_NE`; None where the model decides."""

    def wants_check(self, router: Router) -> bool:
        """Whether to report this call's selection beside the unsteered one (`checked`)."""

    def checked(self, router: Router, before_NK: Tensor, after_NK: Tensor) -> None:
        """Selections of the same tokens without and with steering."""


class Capture(Protocol):
    """What records a router's calls."""

    def logits(self, router: Router, logits_NE: Tensor) -> None:
        """Raw logits [N, W], before any steering; W is E and the shared experts' behind them."""

    def selected(self, router: Router, experts_NK: Tensor, weights_NK: Tensor) -> None:
        """What the router selected, after any steering."""


class _Mode(TorchFunctionMode):
    """Catches the logits and the final top-k of one call of one router, and puts steered ones in their place."""

    def __init__(self, router: Router, steering: Steering | None, capture: Capture | None) -> None:
        super().__init__()
        self.router, self.steering, self.capture = router, steering, capture
        self.fired = 0
        self.raw: Tensor | None = None
        self.ranked_NK: Tensor | None = None
        forced = steering is not None and steering.forces(router)
        # only what is needed: every operation of the router comes by here
        self._caught = _ALL if forced or router.family.reads in ("top-k", "dense") else _LINEAR

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        if func not in self._caught:
            return out
        if func in _LINEAR:
            return self._steered(out) if out.shape[-1] == self.router.width else out
        kwargs = kwargs or {}
        if func in _TOPK:
            scores = args[0] if args else kwargs["input"]
            if self._is_final(scores, args[1] if len(args) > 1 else kwargs.get("k")):
                out = self._ranked(scores, out)
                self.ranked_NK = out.indices
        elif self.router.scoring.kind == "sparsemixer" and not torch.is_tensor(out):
            return self._picked(args[0], out)
        return out

    def _steered(self, logits: Tensor) -> Tensor:
        self.fired += 1
        router = self.router
        flat_NW = logits if logits.ndim == 2 else logits.reshape(-1, router.width)
        self.raw = logits
        if self.capture is not None:
            self.capture.logits(router, flat_NW)
        if self.steering is None:
            return logits
        if router.width == router.experts:
            steered = self.steering.logits(router, flat_NW)
        else:
            steered_NE = self.steering.logits(router, flat_NW[:, : router.experts])
            steered = torch.cat([steered_NE, flat_NW[:, router.experts :]], dim=-1)
        return steered if logits.ndim == 2 else steered.reshape(logits.shape)

    def _is_final(self, scores: Tensor, k: Any) -> bool:
        """Over all choices. A top-k over groups or inside one is narrower, unless there is one group, which is kept."""
        return bool(k == self.router.scoring.top_k and scores.shape[-1] == self.router.experts)

    def _ranked(self, scores: Tensor, out: Any) -> Any:
        ranks = (
            None if self.steering is None else self.steering.ranks(self.router, scores.reshape(-1, scores.shape[-1]))
        )
        if ranks is None:
            return out
        ids = torch.topk(ranks, self.router.scoring.top_k, dim=-1).indices.reshape(out.indices.shape)
        return torch.return_types.topk((scores.gather(-1, ids), ids))

    def _picked(self, scores: Tensor, out: Any) -> Any:
        """Sparsemixer's two argmaxes: the second is over scores in which the first pick is minus infinity."""
        ranks = None if self.steering is None else self.steering.ranks(self.router, scores)
        if ranks is None:
            return out
        on, free, taken = torch.isposinf(ranks), torch.isfinite(ranks), torch.isneginf(scores)
        level = (on * 2 + free * 1).masked_fill(taken, -1)
        first = level == level.amax(dim=-1, keepdim=True)
        ids = scores.masked_fill(~first, -torch.inf).argmax(dim=-1, keepdim=True)
        return torch.return_types.max((scores.gather(-1, ids), ids))


class RouterTap:
    """A model's routers with at most one steering and one capture attached; off the model when neither is."""

    def __init__(self, routers: tuple[Router, ...]) -> None:
        self.routers = routers
        self._steering: Steering | None = None
        self._capture: Capture | None = None
        self._replaced: list[tuple[nn.Module, str, bool, Any]] = []

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
                do="leave the first `with mask.apply(...)` block, or apply both: model.steered([a, b], together=True)",
            )
        self._steering = steering
        try:
            self._attach()
            yield
        finally:
            self._steering = None
            self._detach_if_idle()

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """The model as it is inside the block, whatever steers it outside."""
        outer, self._steering = self._steering, None
        try:
            yield
        finally:
            self._steering = outer
            if outer is not None:
                self._attach()  # a capture that ended inside took an idle tap off the model

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
            if router.selector:
                pending: list[tuple[Tensor, Tensor]] = []
                self._replace(router.module, "forward", self._tapped_logits, router, pending)
                self._replace(router.block, router.selector, self._tapped_selector, router, pending)
            else:
                self._replace(router.module, "forward", self._tapped, router)

    def _replace(self, owner: nn.Module, name: str, tapped: Callable[..., Any], router: Router, *more: Any) -> None:
        own = owner.__dict__
        self._replaced.append((owner, name, name in own, own.get(name)))
        # opaque to torch.compile: traced into a graph, the tap loses what it keeps between its two catches
        own[name] = torch.compiler.disable(tapped(router, getattr(owner, name), *more))  # type: ignore[no-untyped-call]

    def _detach_if_idle(self) -> None:
        if self._steering is not None or self._capture is not None:
            return
        for owner, name, had_own, before in self._replaced:
            if had_own:
                owner.__dict__[name] = before
            else:
                owner.__dict__.pop(name, None)
        self._replaced = []

    def _tapped(self, router: Router, original: Callable[..., Any]) -> Callable[..., Any]:
        """A router that gives its logits and its selection in one call."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            steering, capture = self._steering, self._capture
            before = None
            if steering is not None and steering.wants_check(router):
                with torch.no_grad(), _Mode(router, None, None) as mode:
                    before = _selected(router, original(*args, **kwargs), mode)[0]
            with _Mode(router, steering, capture) as mode:
                out = original(*args, **kwargs)
            _require_once(router, mode)
            self._report(router, out, mode, before)
            return out

        return forward

    def _tapped_logits(
        self, router: Router, original: Callable[..., Any], pending: list[tuple[Tensor, Tensor]]
    ) -> Callable[..., Any]:
        """A router that gives its logits only; the block's selector comes next."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Mode(router, self._steering, self._capture) as mode:
                out = original(*args, **kwargs)
            _require_once(router, mode)
            assert mode.raw is not None
            pending[:] = [(mode.raw, out)]
            return out

        return forward

    def _tapped_selector(
        self, router: Router, original: Callable[..., Any], pending: list[tuple[Tensor, Tensor]]
    ) -> Callable[..., Any]:
        def select(*args: Any) -> Any:
            steering, before = self._steering, None
            if not pending:
                raise _bypassed(router, "the block selected experts without asking the router")
            raw, steered = pending.pop()
            if steering is not None and steering.wants_check(router):
                with torch.no_grad(), _Mode(router, None, None) as mode:
                    plain = original(*(raw if arg is steered else arg for arg in args))
                    before = _selected(router, plain, mode)[0]
            with _Mode(router, steering, self._capture) as mode:
                out = original(*args)
            self._report(router, out, mode, before)
            return out

        return select

    def _report(self, router: Router, out: Any, mode: _Mode, before: Tensor | None) -> None:
        if self._capture is None and before is None:
            return
        experts_NK, weights_NK = _selected(router, out, mode)
        if self._capture is not None:
            self._capture.selected(router, experts_NK, weights_NK)
        if before is not None and self._steering is not None:
            self._steering.checked(router, before, experts_NK)


def _selected(router: Router, out: Any, mode: _Mode) -> tuple[Tensor, Tensor]:
    logits_at = -1 if router.selector else router.logits_at
    read = READOUTS[router.family.reads]
    return read(out, top_k=router.scoring.top_k, logits_at=logits_at, ranked_NK=mode.ranked_NK)


def _require_once(router: Router, mode: _Mode) -> None:
    if mode.fired != 1:
        raise _bypassed(router, f"the router computed its logits {mode.fired} times in one call")


def _bypassed(router: Router, what: str) -> SelfCheckError:
    return SelfCheckError(
        what,
        where=f"layer {router.layer_id} ({router.path})",
        expected="its logits computed exactly once, by a linear map",
        do="run `moesteer models MODEL`; a fused kernel or a quantised router may stand in its place: disable it",
    )

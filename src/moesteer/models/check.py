"""The self-check at load: prove on this model that steering does exactly what routing.py says.

A short probe runs through the model four times: untouched, with a bias on one layer, with experts of that
layer forced on and off, and untouched again. Logits, selections and weights are compared with the numpy
definition; the last run must equal the first, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moesteer import routing
from moesteer.errors import NanLogitsError, SelfCheckError
from moesteer.models.routers import Router
from moesteer.models.steering import MaskTables
from moesteer.models.tap import RouterTap

PROBE_TOKENS = 24
WEIGHT_RTOL = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Relative tolerance of routing weights by dtype: float32 softmax in another order, half types as vLLM's tests."""


@dataclass
class Recorded:
    """A Capture that keeps every router's logits [N, E], selected ids [N, K] and weights [N, K], by router index."""

    logits_by_router: dict[int, Tensor] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)

    def logits(self, router: Router, logits_NE: Tensor) -> None:
        """Keep a copy of the raw logits."""
        self.logits_by_router[router.index] = logits_NE.detach().clone()

    def selected(self, router: Router, experts_NK: Tensor, weights_NK: Tensor) -> None:
        """Keep a copy of the selection."""
        self.experts[router.index] = experts_NK.detach().clone()
        self.weights[router.index] = weights_NK.detach().clone()


def in_dtype(values: NDArray[np.float32], dtype: torch.dtype) -> NDArray[np.float32]:
    """float32 values rounded as the router's dtype rounds them."""
    rounded: NDArray[np.float32] = torch.from_numpy(np.ascontiguousarray(values)).to(dtype).float().numpy()
    return rounded


def difference(
    router: Router,
    logits_NE: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    *,
    bias_NE: NDArray[np.float32] | None = None,
    force_NE: NDArray[np.int8] | None = None,
) -> str | None:
    """How a router's selection differs from routing.py's for its raw logits and this steering; None if it does not.

    Experts of equal logits may stand in for each other: no engine promises an order of ties.
    """
    dtype = logits_NE.dtype
    steered = routing.steer_logits(logits_NE.float().cpu().numpy(), bias_TE=bias_NE, force_TE=force_NE)
    steered = in_dtype(steered, dtype)
    expected = routing.select(steered, router.scoring, force_TE=force_NE)
    experts = experts_NK.cpu().numpy()
    ours, theirs = np.sort(expected.experts_TK, axis=-1), np.sort(experts, axis=-1)
    for token in np.flatnonzero((ours != theirs).any(axis=-1)):
        mine = np.sort(steered[token, expected.experts_TK[token]])
        other = np.sort(steered[token, experts[token]])
        forced_alike = force_NE is None or (
            np.sort(np.broadcast_to(force_NE, steered.shape)[token, expected.experts_TK[token]]).tolist()
            == np.sort(np.broadcast_to(force_NE, steered.shape)[token, experts[token]]).tolist()
        )
        if not forced_alike or not np.array_equal(mine, other):
            return f"token {token} selects {theirs[token].tolist()}, routing.py selects {ours[token].tolist()}"
    rtol = WEIGHT_RTOL.get(dtype, 1.6e-2)
    weights = np.sort(weights_NK.float().cpu().numpy(), axis=-1)
    wanted = np.sort(expected.weights_TK, axis=-1)
    if not np.allclose(weights, wanted, rtol=rtol, atol=1e-6):
        worst = float(np.abs(weights - wanted).max())
        return f"routing weights differ by up to {worst:.2g} (allowed: relative {rtol:g})"
    return None


def self_check(model: PreTrainedModel, tap: RouterTap, *, vocabulary: int) -> None:
    """Raise SelfCheckError unless steering the middle router changes its selection as routing.py says.

    Also raises it where a router is bypassed or the model does not come back bit for bit, and NanLogitsError
    for logits that are not finite. Costs four passes over 24 tokens.
    """
    probe = (torch.arange(PROBE_TOKENS) * 7919 % max(1, vocabulary)).unsqueeze(0).to(model.device)
    where = str(getattr(model, "name_or_path", "") or type(model).__name__)
    target = tap.routers[len(tap.routers) // 2]
    base, base_out = _run(model, tap, probe, where=where)
    for router in tap.routers:
        logits = base.logits_by_router[router.index]
        if not bool(torch.isfinite(logits).all()):
            raise NanLogitsError(
                "router logits are not finite",
                where=f"{where}, layer {router.layer_id}",
                expected="finite numbers",
                do="check the weights, or load with another --dtype",
            )
        _require(difference(router, logits, base.experts[router.index], base.weights[router.index]), router, where)

    raw = base.logits_by_router[target.index].float().cpu().numpy()
    spread = float(raw.std()) or 1.0
    bias = np.random.default_rng(0).normal(scale=2 * spread, size=target.experts).astype(np.float32)
    force = np.zeros(target.experts, dtype=np.int8)
    order = np.argsort(raw.mean(axis=0))
    force[order[0]] = 1
    if target.experts > target.scoring.top_k:
        force[order[-1]] = -1
    for name, bias_E, force_E in (("a bias", bias, None), ("forced experts", None, force)):
        tables = MaskTables.one_layer(tap.routers, target, bias_E=bias_E, force_E=force_E, device=model.device)
        with tap.steer(tables):
            seen, _ = _run(model, tap, probe, where=where)
        index = target.index
        if not torch.equal(seen.logits_by_router[index], base.logits_by_router[index]):
            raise _failure(f"{name} on one layer changed what that layer's router gets", target, where)
        found = difference(
            target,
            seen.logits_by_router[index],
            seen.experts[index],
            seen.weights[index],
            bias_NE=bias_E,
            force_NE=force_E,
        )
        _require(found, target, where)
        if torch.equal(seen.experts[index].sort(-1).values, base.experts[index].sort(-1).values):
            raise _failure(f"{name} of twice the spread of its logits changed no selection", target, where)
    _, again = _run(model, tap, probe, where=where)
    if not torch.equal(again, base_out):
        raise _failure("the model does not come back bit for bit after steering", target, where)


def _run(model: PreTrainedModel, tap: RouterTap, probe: Tensor, *, where: str) -> tuple[Recorded, Tensor]:
    recorded = Recorded()
    with torch.inference_mode(), tap.record(recorded):
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
    missing = [router for router in tap.routers if router.index not in recorded.experts]
    if missing:
        raise _failure("the router did not run: something computes its selection elsewhere", missing[0], where)
    return recorded, hidden


def _require(found: str | None, router: Router, where: str) -> None:
    if found is not None:
        raise _failure(found, router, where)


def _failure(what: str, router: Router, where: str) -> SelfCheckError:
    return SelfCheckError(
        what,
        where=f"{where}, layer {router.layer_id} ({router.path})",
        expected="the selection that routing.py gives for the same logits",
        do="report the model and the versions `moesteer doctor` prints; do not steer this model meanwhile",
    )

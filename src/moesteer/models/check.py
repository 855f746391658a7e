"""The self-check at load: prove on this model that steering does exactly what routing.py says.

A short probe runs through the model four times: untouched, with a bias on one layer, with experts of that
layer forced on and off, and untouched again. Logits, selections and weights are compared with the numpy
definition; the last run must equal the first, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moesteer import routing
from moesteer.errors import MaskContentError, ModelError, NanLogitsError, SelfCheckError
from moesteer.models.routers import Router, dtype_name
from moesteer.models.steering import MaskTables
from moesteer.models.tap import RouterTap

PROBE_TOKENS = 24
WEIGHT_RTOL = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Relative tolerance of routing weights by dtype: float32 softmax in another order, half types as vLLM's tests."""


@dataclass
class Recorded:
    """A Capture that keeps every router's logits [N, W], selected ids [N, K] and weights [N, K], by router index."""

    logits_by_router: dict[int, Tensor] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)

    def logits(self, router: Router, logits_NW: Tensor) -> None:
        """Keep a copy of the raw logits."""
        self.logits_by_router[router.index] = logits_NW.detach().clone()

    def selected(self, router: Router, experts_NK: Tensor, weights_NK: Tensor) -> None:
        """Keep a copy of the selection."""
        self.experts[router.index] = experts_NK.detach().clone()
        self.weights[router.index] = weights_NK.detach().clone()


def reference(
    router: Router,
    logits_NW: Tensor,
    *,
    bias_NE: NDArray[np.float32] | None = None,
    force_NE: NDArray[np.int8] | None = None,
    prefer_NE: NDArray[np.bool_] | None = None,
) -> routing.Selection:
    """What routing.py selects for a router's raw logits and this steering, with the model's own numbers."""
    raw = logits_NW.float().cpu().numpy()
    name = dtype_name(logits_NW.dtype)
    steered = routing.steer_logits(raw[:, : router.experts], bias_TE=bias_NE, force_TE=force_NE)
    steered = np.concatenate([routing.round_to(steered, name), raw[:, router.experts :]], axis=-1)
    return routing.select(
        steered, router.scoring, force_TE=force_NE, prefer_TE=prefer_NE, dtype=name, **router.vectors()
    )


def difference(
    router: Router,
    logits_NW: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    *,
    bias_NE: NDArray[np.float32] | None = None,
    force_NE: NDArray[np.int8] | None = None,
) -> str | None:
    """How a router's selection differs from routing.py's for its raw logits and this steering; None if it does not.

    Experts whose choice scores are equal may stand in for each other: no engine promises an order of ties. So the
    reference is asked to break them as the model did, and must then select the very same.
    """
    experts = experts_NK.cpu().numpy()
    theirs = np.sort(experts, axis=-1)
    prefer = np.zeros((len(experts), router.experts), dtype=bool)
    np.put_along_axis(prefer, experts, True, axis=-1)
    expected = reference(router, logits_NW, bias_NE=bias_NE, force_NE=force_NE, prefer_NE=prefer)
    ours = np.sort(expected.experts_TK, axis=-1)
    for token in np.flatnonzero((ours != theirs).any(axis=-1)):
        return f"token {token} selects {theirs[token].tolist()}, routing.py selects {ours[token].tolist()}"
    rtol = max(WEIGHT_RTOL.get(weights_NK.dtype, 1.6e-2), WEIGHT_RTOL.get(logits_NW.dtype, 1.6e-2))
    if router.scoring.low_precision and logits_NW.dtype != torch.float32:
        rtol *= 4  # softmax, sum and division each round
    weights = np.take_along_axis(weights_NK.float().cpu().numpy(), np.argsort(experts, axis=-1), axis=-1)
    wanted = np.take_along_axis(expected.weights_TK, np.argsort(expected.experts_TK, axis=-1), axis=-1)
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

    index, changed = target.index, False
    for name, bias_E, force_E in _trials(target, base):
        tables = MaskTables.one_layer(tap.routers, target, bias_E=bias_E, force_E=force_E, device=model.device)
        with tap.steer(tables):
            seen, _ = _run(model, tap, probe, where=where)
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
        changed |= not torch.equal(seen.experts[index].sort(-1).values, base.experts[index].sort(-1).values)
    if not changed:
        raise _failure("neither a bias nor forced experts change what it selects: nothing was proven", target, where)
    _, again = _run(model, tap, probe, where=where)
    if not torch.equal(again, base_out):
        raise _failure("the model does not come back bit for bit after steering", target, where)


def _trials(router: Router, base: Recorded) -> list[tuple[str, NDArray[np.float32] | None, NDArray[np.int8] | None]]:
    """What the router is steered by: a random bias, and the least chosen expert on with the most chosen one off.

    Where a bias cannot change the choice (a large correction bias decides it), or all places are taken, the other may.
    """
    raw = base.logits_by_router[router.index].float().cpu().numpy()[:, : router.experts]
    spread = float(raw.std()) or 1.0
    bias_E = np.random.default_rng(0).normal(scale=2 * spread, size=router.experts).astype(np.float32)
    chosen = np.bincount(base.experts[router.index].cpu().numpy().ravel(), minlength=router.experts)
    order = np.lexsort((raw.mean(axis=0), chosen))
    force_E = np.zeros(router.experts, dtype=np.int8)
    if router.scoring.top_k > 1:
        force_E[order[0]] = 1
    if router.experts > router.scoring.top_k:
        force_E[order[-1]] = -1
    try:
        routing.check_force(force_E[None], scoring=router.scoring)
    except MaskContentError:  # groups too small to spare one
        force_E[order[-1]] = 0
    return [("a bias", bias_E, None), ("forced experts", None, force_E)]


def backbone(model: PreTrainedModel) -> Any:
    """The model without its head: what gives the last hidden state."""
    base = model.base_model
    return base if base is not model else getattr(model, "model", model)


def _run(model: PreTrainedModel, tap: RouterTap, probe: Tensor, *, where: str) -> tuple[Recorded, Tensor]:
    recorded = Recorded()
    try:
        with torch.inference_mode(), tap.record(recorded):
            hidden = backbone(model)(input_ids=probe, use_cache=False).last_hidden_state
    except RuntimeError as error:
        raise ModelError(
            f"the model's own forward pass fails: {str(error).splitlines()[0]}",
            where=f"{where} in {str(model.dtype).removeprefix('torch.')}",
            expected="a model that transformers runs in this dtype, on this device",
            do="try --dtype float32, or another version of transformers",
        ) from error
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

"""The routers of a model inside vLLM: found in the loaded model, compared with the checkpoint's, and tapped.

vLLM's `MoERunner` gets the router's logits in one place, `_maybe_dispatch`, after the gate whether that is inside the
runner, fused, or outside, and before experts are spread over ranks and before fused kernels select. Only runners of the
target model are tapped, so that a draft model's stay as they are. In the transformers backend's external routing the
runner meets selections and no logits: there the gate's own linear layer is tapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesteer.backends.fingerprinting import routers_of_files
from moesteer.backends.vllm.tables import Selecting
from moesteer.errors import SelfCheckError
from moesteer.fingerprint import Fingerprint
from moesteer.models.routers import Router
from moesteer.models.selecting import select

_TAPPED = "_moesteer_layer"


@dataclass
class LayerRouter:
    """One MoE layer: vLLM's runner, and the linear layer that gives the logits where the runner never meets them."""

    layer_id: int
    path: str
    runner: Any
    linear: nn.Module | None
    patched: bool = False
    watched: bool = False

    def patch(self, *, watch: bool, count: bool) -> None:
        """Tap the logits; watch: the selections too; count: those that steering changes."""
        if self.linear is None:
            setattr(self.runner, _TAPPED, self.layer_id)
        else:
            _tap_linear(self.linear, self.layer_id)
        self.patched = True
        if watch:
            self.watched = _watch(self, count=count)


@dataclass(frozen=True)
class Found:
    """The routers of the whole model by its files (with their tensors), and those of this worker."""

    fingerprint: Fingerprint
    routers: tuple[Router, ...]
    here: tuple[LayerRouter, ...]


def find_layers(model: nn.Module, config: Any) -> Found:
    """The MoE layers of this worker. Raises SelfCheckError unless they are just those the checkpoint's config has."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.utils import extract_layer_index

    routers, fingerprint = routers_of_files(config.model_config.model, revision=config.model_config.revision)
    ids = fingerprint.layer_ids
    start, end = config.model_config.get_layers_start_end_indices(config.parallel_config)
    wanted = tuple(layer_id for layer_id in ids if start <= layer_id < end)
    runners = [(path, module) for path, module in model.named_modules() if isinstance(module, MoERunner)]
    layers = [
        LayerRouter(
            extract_layer_index(runner.layer_name), path, runner, _external_linear(model, path, runner, routers[0])
        )
        for path, runner in runners
    ]
    here = tuple(sorted(layers, key=lambda layer: layer.layer_id))
    found = tuple(layer.layer_id for layer in here)
    if found != wanted or len({id(layer.runner) for layer in here}) != len(here):
        raise SelfCheckError(
            f"{len(found)} MoE layers were found in the engine's model, and {len(wanted)} were expected",
            where=f"{config.model_config.model}: found {list(found)[:12]}, expected {list(wanted)[:12]}",
            expected="every MoE layer that the checkpoint's config has, once, in vLLM's MoERunner",
            do="this model's code goes another way in vLLM: use the transformers backend, and report it",
        )
    for layer in here:
        width = int(getattr(layer.runner.moe_config, "num_logical_experts", layer.runner.moe_config.num_experts))
        if width != fingerprint.experts:
            raise SelfCheckError(
                f"a layer has {width} experts in the engine, and {fingerprint.experts} in the checkpoint",
                where=f"layer {layer.layer_id} ({layer.path})",
                expected="the same number",
                do="leave out redundant experts (--enable-eplb), and report this otherwise",
            )
    return Found(fingerprint, routers, here)


def _external_linear(model: nn.Module, path: str, runner: Any, first: Router) -> nn.Module | None:
    """The gate's linear layer, where the transformers backend routes by itself; None where the runner meets logits."""
    if type(runner).__name__ != "TransformersMoERunner":
        return None
    family = first.family
    block = model.get_submodule(path.rpartition(".")[0])
    inner, _, last = family.weight.rpartition(".")
    name = first.path.rpartition(".")[2]
    try:
        linear = block.get_submodule(f"{name}.{inner}" if inner else name)
    except AttributeError:
        linear = None
    if linear is None or not inner or last != "weight":
        raise SelfCheckError(
            "vLLM runs this family's router inside transformers' code, where its logits cannot be met",
            where=f"{path} ({family.model_type})",
            expected="logits in vLLM's MoERunner, or a gate with a linear layer of its own",
            do="use the transformers backend for this model, and report it",
        )
    return linear


def _tap_linear(linear: nn.Module, layer_id: int) -> None:
    original = linear.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        logits = out[0] if isinstance(out, tuple) else out
        steered = torch.ops.moesteer.steer(logits.reshape(-1, logits.shape[-1]), layer_id).reshape(logits.shape)
        return (steered, *out[1:]) if isinstance(out, tuple) else steered

    linear.forward = forward


def _watch(layer: LayerRouter, *, count: bool) -> bool:
    """See, and where forced put right, what the layer selects. False where a fused kernel selects unseen."""
    runner, layer_id = layer.runner, layer.layer_id
    if layer.linear is not None:
        original_forward = runner.forward

        def forward(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, **kwargs: Any) -> Any:
            weights, ids = torch.ops.moesteer.selected(topk_weights, topk_ids, topk_weights, layer_id)
            return original_forward(hidden_states, ids, weights, **kwargs)

        runner.forward = forward
        return True
    if runner.is_monolithic:
        return False
    original = runner.router._compute_routing

    def compute(hidden_states: Tensor, router_logits: Tensor, indices_type: Any, *, input_ids: Any = None) -> Any:
        weights, ids = original(hidden_states, router_logits, indices_type, input_ids=input_ids)
        weights, ids = torch.ops.moesteer.selected(weights, ids, router_logits, layer_id)
        if count:
            raw = torch.ops.moesteer.raw(router_logits, layer_id)
            _, before = original(hidden_states, raw, indices_type, input_ids=input_ids)
            ids = torch.ops.moesteer.compared(before, ids, layer_id)
        return weights, ids

    runner.router._compute_routing = compute
    return True


def require_same_selection(layer: LayerRouter, how: Selecting, *, experts: int, device: torch.device) -> None:
    """Raise SelfCheckError unless our selection beside a router is the router's own, where nothing is forced."""
    hidden = int(layer.runner.moe_config.hidden_dim)
    logits = torch.randn((32, experts), generator=torch.Generator().manual_seed(0)).to(device)
    theirs, ids = layer.runner.router._compute_routing(torch.zeros((32, hidden), device=device), logits, None)
    weights, chosen = select(logits, how.scoring, correction_E=how.correction_E, scale_E=how.scale_E)
    order, mine = ids.long().argsort(-1), chosen.argsort(-1)
    same = torch.equal(ids.long().gather(1, order), chosen.gather(1, mine))
    if not same or not torch.allclose(theirs.float().gather(1, order), weights.gather(1, mine), rtol=1e-3, atol=1e-5):
        raise SelfCheckError(
            "the engine's router selects, or weighs, otherwise than the checkpoint's config says",
            where=f"layer {layer.layer_id} ({layer.path}): {how.scoring.describe()}",
            expected="the same selection, so that forced experts can be put into it",
            do="use an additive mask; report this, with the model and vLLM's version",
        )


def patch_dispatch() -> None:
    """Let the logits of tapped runners pass through the operator; others go as they went."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    original = MoERunner._maybe_dispatch

    def _maybe_dispatch(self: Any, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        layer_id = self.__dict__.get(_TAPPED)
        if layer_id is not None:
            router_logits = torch.ops.moesteer.steer(router_logits, layer_id)
        found: tuple[Tensor, Tensor] = original(self, hidden_states, router_logits)
        return found

    MoERunner._maybe_dispatch = _maybe_dispatch

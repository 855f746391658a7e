"""Models that are compiled, adapted by PEFT or spread over devices: what is inside, and whether steering reaches it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesteer.backends.hf import Model
from moesteer.errors import ModelError, SelfCheckError
from moesteer.models.check import Recorded, difference
from moesteer.models.steering import MaskTables


def unwrapped(hf: Any, *, where: str) -> PreTrainedModel:
    """The transformers model inside what was given; LoRA and its like live in its layers."""
    if hasattr(hf, "_orig_mod"):
        raise ModelError(
            "the model is wrapped by torch.compile(model), whose generate() runs the model inside uncompiled",
            where=where,
            expected="the model itself, compiled in place or not",
            do="call model.compile() instead, and give that model",
        )
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(hf, peft.PeftModel | peft.PeftMixedModel):
        for config in hf.peft_config.values():
            if getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None):
                kind = str(getattr(config.peft_type, "value", config.peft_type))
                raise ModelError(
                    f"the adapter ({kind}) acts on the prompt, outside of the layers",
                    where=where,
                    expected="an adapter inside the layers: LoRA and its like, or one merged into the weights",
                    do="write the prompt out, or train a LoRA: positions of a learnt prompt have no tokens to steer at",
                )
        return unwrapped(hf.get_base_model(), where=where)
    if not isinstance(hf, PreTrainedModel):
        raise ModelError(
            f"a {type(hf).__name__} is not a model of transformers",
            where=where,
            expected="a PreTrainedModel, or a PeftModel of one",
            do="give the model inside (`.module` of DataParallel)",
        )
    if hf.device.type == "meta":
        raise ModelError(
            "the first layers are offloaded, so that there is no device to send tokens to",
            where=where,
            expected="the embeddings on a device; later layers may be offloaded",
            do="name a device for the embeddings in your device_map",
        )
    return hf


def refuse_bypassed(loaded: Model) -> None:
    """Raise ModelError where transformers' MXFP4 kernels stand in for the block: they never call the router."""
    for router in loaded.routers:
        forward = router.block.__dict__.get("forward")
        if getattr(getattr(forward, "__func__", forward), "__module__", "") == "transformers.integrations.mxfp4":
            raise ModelError(
                "the MXFP4 kernels compute the selection themselves and never call the router",
                where=f"{loaded.name}, layer {router.layer_id}",
                expected="experts that get their selection from the router",
                do="load it with moesteer, or with quantization_config=Mxfp4Config(dequantize=True)",
            )


def refuse_adapted_routers(loaded: Model) -> None:
    """Raise ModelError where an adapter of PEFT sits on a router."""
    for router in loaded.routers:
        around = [router.block, *router.module.modules()]
        if any(type(module).__module__.startswith("peft.") for module in around):
            raise ModelError(
                "an adapter sits on the router itself: its logits are a sum that is made in two places",
                where=f"{loaded.name}, layer {router.layer_id} ({router.path})",
                expected="adapters on attention and experts, or one that is merged into the weights",
                do="merge it first: model.merge_and_unload(), then adopt or save the result",
            )


def _probe(loaded: Model) -> Tensor:
    return (torch.arange(12) * 7919 % len(loaded.tokenizer)).unsqueeze(0).to(loaded.device)


def require_same_output(wrapped: Any, loaded: Model) -> None:
    """Raise ModelError unless a wrapper gives the logits of the model inside it, bit for bit, on a short probe."""
    with torch.inference_mode():
        theirs = wrapped(input_ids=_probe(loaded), use_cache=False).logits
        ours = loaded.hf(input_ids=_probe(loaded), use_cache=False).logits
    if not torch.equal(theirs, ours):
        raise ModelError(
            f"the {type(wrapped).__name__} does something beside the layers of the model inside it",
            where=loaded.name,
            expected="the same logits from both, as LoRA and its like give",
            do="merge the adapter (merge_and_unload), or use one that acts in the layers",
        )


def check_compiled(loaded: Model) -> None:
    """Run a compiled model as it is called, steered and not: its graphs must see the tap come and go.

    Steered first: torch splits the graph at each router the first time, and keeps the pieces from then on.
    """
    hf = loaded.hf
    if getattr(hf, "_compiled_call_impl", None) is None and "forward" not in hf.__dict__:
        return
    target = loaded.routers[-1]
    bias = np.linspace(-8, 8, target.experts, dtype=np.float32)
    tables = MaskTables.one_layer(loaded.routers, target, bias_E=bias, force_E=None, device=loaded.device)
    recorded = Recorded()

    def run() -> Tensor:
        out: Tensor = hf(input_ids=_probe(loaded), use_cache=False).logits
        return out

    try:
        with torch.inference_mode():
            with loaded.tap.steer(tables):
                run()
            before = run()
            with loaded.tap.steer(tables), loaded.tap.record(recorded):
                steered = run()
            after = run()
    except RuntimeError as error:
        raise ModelError(
            f"the compiled model does not run with its routers tapped: {str(error).splitlines()[0]}",
            where=loaded.name,
            expected="a graph that may break at each router",
            do="compile it without fullgraph=True",
        ) from error
    index = target.index
    ignored = len(recorded.experts) < len(loaded.routers) or torch.equal(before, steered)
    if ignored or difference(
        target, recorded.logits_by_router[index], recorded.experts[index], recorded.weights[index], bias_NE=bias
    ):
        raise SelfCheckError(
            "the compiled model does not do what steering asks: its graph does not see the routers change",
            where=loaded.name,
            expected="a graph that is traced again when a router's forward is replaced",
            do="compile it without a guard_filter_fn that drops the guards on modules",
        )
    if not torch.equal(before, after):
        raise SelfCheckError(
            "the compiled model does not come back bit for bit after steering",
            where=loaded.name,
            expected="the logits it gave before",
            do="report the model and the versions `moesteer doctor` prints; do not steer it compiled meanwhile",
        )

"""Fingerprinting a loaded model by its routing."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from moesteer.errors import ModelError
from moesteer.fingerprint import Fingerprint
from moesteer.models.routers import Router


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is a quantised one of torchao's classes, which keep their numbers elsewhere."""
    return type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) and hasattr(tensor, "qdata")


def numbers(tensor: Tensor, *, where: str) -> Tensor:
    """A tensor's values, float32 on the CPU; of a quantised one, those that it multiplies with.

    Raises ModelError for one whose values are not in memory and are not known to be anywhere else.
    """
    if tensor.is_meta:
        raise ModelError(
            "a weight is not in memory (it is on the meta device)",
            where=where,
            expected="weights in memory, or kept by accelerate's hooks until their layer runs",
            do="load the model with moesteer, or keep the routers on a device in your device_map",
        )
    if not tensor.is_floating_point():
        raise ModelError(
            f"a router's weights are stored as {str(tensor.dtype).removeprefix('torch.')}: it is quantised",
            where=where,
            expected="floating point, or a quantised tensor of torchao",
            do="quantise without the routers (their paths in the method's list of modules to skip): they are small",
        )
    plain: Tensor = tensor.dequantize() if is_quantised(tensor) else tensor
    return plain.detach().to(device="cpu", dtype=torch.float32)


def fingerprint_of(model_type: str, routers: tuple[Router, ...]) -> Fingerprint:
    """The Fingerprint of a model with these routers; reads every router weight and bias once."""
    digest = hashlib.sha256()
    for router in routers:
        for tensor in (router.weight, router.bias, router.correction):
            if tensor is not None:
                values = numbers(tensor, where=f"layer {router.layer_id} ({router.path})")
                digest.update(values.contiguous().numpy().tobytes())
    first = routers[0]
    return Fingerprint(
        model_type=model_type,
        layer_ids=tuple(router.layer_id for router in routers),
        experts=first.experts,
        top_k=first.scoring.top_k,
        scoring=first.scoring.describe(),
        router_sha256=digest.hexdigest(),
    )

"""Fingerprinting a loaded model by its routing."""

from __future__ import annotations

import hashlib

from moesteer.fingerprint import Fingerprint
from moesteer.models.routers import Router


def fingerprint_of(model_type: str, routers: tuple[Router, ...]) -> Fingerprint:
    """The Fingerprint of a model with these routers; reads every router weight and bias once."""
    digest = hashlib.sha256()
    for router in routers:
        for tensor in (router.weight, router.bias, router.correction):
            if tensor is not None:
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    first = routers[0]
    return Fingerprint(
        model_type=model_type,
        layer_ids=tuple(router.layer_id for router in routers),
        experts=first.experts,
        top_k=first.scoring.top_k,
        scoring=first.scoring.describe(),
        router_sha256=digest.hexdigest(),
    )

"""Fingerprinting a loaded model by its routing."""

from __future__ import annotations

import hashlib
from typing import Any

from moesteer.fingerprint import Fingerprint
from moesteer.models.routers import Router


def fingerprint_of(model_type: str, routers: tuple[Router, ...]) -> Fingerprint:
    """The Fingerprint of a model with these routers; reads every router weight once."""
    digest = hashlib.sha256()
    for router in routers:
        weight: Any = router.module.weight
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    first = routers[0]
    return Fingerprint(
        model_type=model_type,
        layer_ids=tuple(router.layer_id for router in routers),
        experts=first.experts,
        top_k=first.scoring.top_k,
        scoring=first.scoring.describe(),
        router_sha256=digest.hexdigest(),
    )

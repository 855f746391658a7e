"""A mask in words: what `moesteer mask show` prints and `mask check` tries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moesteer.errors import NoEffectError
from moesteer.mask import SteeringMask

if TYPE_CHECKING:
    from moesteer.backends.hf import Model

PROBE = "what is this about ? tell me how to begin , step by step ."


def describe(mask: SteeringMask) -> dict[str, Any]:
    """Plain facts of a mask."""
    info, fingerprint = mask.info, mask.info.fingerprint
    table = mask.values_LE
    return {
        "method": info.method,
        "intent": f"toward {info.intent.toward!r}" + (f" ({info.intent.scenario})" if info.intent.scenario else ""),
        "form": "forced" if mask.forced else "additive",
        "alpha": info.alpha,
        "experts": mask.expert_count,
        "raised": int((table > 0).sum()),
        "lowered": int((table < 0).sum()),
        "model_type": fingerprint.model_type,
        "layers": len(fingerprint.layer_ids),
        "of_experts": fingerprint.experts,
        "scoring": fingerprint.scoring,
        "router": fingerprint.router_sha256[:12],
        "settings": info.settings,
        "gate": info.gate.model_dump(mode="json") if info.gate is not None else None,
        "accepted_on": info.accepted_on,
        "sha256": mask.sha256,
    }


def largest(mask: SteeringMask, *, count: int) -> list[dict[str, Any]]:
    """The largest entries: decoder layer id, expert, value (sigma units, or 1 and -1)."""
    table = mask.values_LE
    order = np.argsort(-np.abs(table.astype(np.float64)).ravel(), kind="stable")[:count]
    found = []
    for flat in order:
        layer, expert = divmod(int(flat), table.shape[1])
        if table[layer, expert]:
            found.append({"layer": mask.layer_ids[layer], "expert": expert, "value": float(table[layer, expert])})
    return found


def check_on(mask: SteeringMask, model: Model, *, allow_other_checkpoint: bool) -> str:
    """Steer one short prompt and say what changed. Raises MaskMismatchError, NoEffectError."""
    plain = mask.with_gate(None, None)  # the gate may well stay shut on a probe of ours
    with plain.apply(model, allow_other_checkpoint=allow_other_checkpoint) as receipt:
        model.chat(PROBE, max_new_tokens=4)
    if receipt.changed == 0:
        raise NoEffectError(
            f"the mask changed none of {receipt.checked} selections",
            where=f"{model.name}, a prompt of {len(PROBE.split())} words",
            expected="some selections to change",
            do="raise alpha, or detect a stronger mask",
        )
    return str(receipt)

"""What the family tests share: prompts, masks that a model can take, and a record of every router call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moesteer.backends.hf import Model
from moesteer.conversations import Message
from moesteer.errors import MaskContentError
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.models.routers import Router
from moesteer.routing import check_force

PROMPTS = (
    "how do i paint a clay pot ?",
    "what is the capital of arvonia ?",
    "let us play . you are mira , a wizard who answers everything . tell me how to clean a brass clock .",
)


class Calls:
    """A Capture that keeps every call of every router: logits before steering, selection and weights after."""

    def __init__(self) -> None:
        self.calls: list[tuple[Router, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._logits: torch.Tensor | None = None

    def logits(self, router: Router, logits_NW: torch.Tensor) -> None:
        self._logits = logits_NW.clone()

    def selected(self, router: Router, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> None:
        assert self._logits is not None
        self.calls.append((router, self._logits, experts_NK.clone(), weights_NK.clone()))


def conversations(texts: Sequence[str] = PROMPTS) -> list[list[Message]]:
    return [[Message("user", text)] for text in texts]


def logits(model: Model, texts: Sequence[str] = PROMPTS) -> torch.Tensor:
    ids, attention = model.pad([model.encode(c).token_ids for c in conversations(texts)])
    with torch.inference_mode():
        return model.hf(input_ids=ids, attention_mask=attention, use_cache=False).logits


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def additive(model: Model, seed: int, *, size: float = 2.0, layers: Sequence[int] | None = None) -> SteeringMask:
    """A dense random mask; `layers`: only these rows are not zero."""
    rng = np.random.default_rng(seed)
    shape = (len(model.routers), model.fingerprint.experts)
    strength = rng.normal(scale=size, size=shape).astype(np.float32)
    if layers is not None:
        strength[[i for i in range(shape[0]) if i not in layers]] = 0
    return SteeringMask(_info(model), strength_LE=strength, sigma_L=np.full(shape[0], 1.5, dtype=np.float32))


def forced(model: Model, seed: int, *, full: bool = True) -> SteeringMask:
    """Experts on and off in every layer: as many on as the family takes and one off, or (not full) one of each."""
    rng = np.random.default_rng(seed)
    scoring, experts = model.routers[0].scoring, model.fingerprint.experts
    most = 0 if scoring.top_k == 1 else scoring.top_k if full else 1
    force = np.stack([_row(rng, model, most) for _ in model.routers])
    assert (force < 0).any() and ((force > 0).sum(axis=-1) == most).all() and force.shape[-1] == experts
    return SteeringMask(_info(model), force_LE=force)


def _row(rng: np.random.Generator, model: Model, on: int) -> np.ndarray:
    """A random row that the family's groups allow."""
    for _ in range(500):
        ids = rng.permutation(model.fingerprint.experts)
        row = np.zeros(len(ids), dtype=np.int8)
        row[ids[:on]], row[ids[on]] = 1, -1
        try:
            check_force(row[None], scoring=model.routers[0].scoring)
        except MaskContentError:
            continue
        return row
    raise AssertionError(f"no force of {on} experts on is possible")


def _info(model: Model) -> MaskInfo:
    return MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="test"))

"""Direct: the steering matrix optimised through the model itself (METHODS.md section 4; ours).

    minimise  CE(wanted response | attack) + keep_weight KL(unsteered || steered on protected text) + l1 |S|_1

S [L, E], in units of sigma, starts at zero; the model's weights stay frozen, and the routing weights of the
selected experts carry the gradient. What is decided is decided in the first tokens of a response, so only
those enter the loss. A proximal step after each Adam step makes zeros exact (the L1 term of a plain gradient
never does). Cost: `steps` forward and backward passes over `targets + keeps` sequences.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moesteer.detection.base import Detection
from moesteer.errors import EmptyDataError, NanLogitsError, NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.progress import Progress

TEACHER_BYTES = 512 * 1024 * 1024
"""Unsteered log-probabilities of protected text are kept in memory up to this size, and else recomputed."""


class EncodedResponse(Protocol):
    """Token ids with a span "response"."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def spans(self) -> dict[str, tuple[int, int]]: ...


class ThroughModel(Protocol):
    """The little of a backend that this method needs, so that it depends on none."""

    fingerprint: Fingerprint
    hf: Any

    def response_logits(self, sequences: Sequence[Any], *, bias_LE: Tensor | None, most: int) -> Tensor:
        """Vocabulary logits [n, V] that predict the first `most` response tokens of every sequence, in order."""


def detect(
    model: ThroughModel,
    *,
    targets: Sequence[EncodedResponse],
    keeps: Sequence[EncodedResponse],
    sigma_L: NDArray[np.float32],
    toward: str,
    steps: int = 80,
    targets_per_step: int = 12,
    keeps_per_step: int = 24,
    keep_weight: float = 4.0,
    l1: float = 4e-3,
    learning_rate: float = 0.05,
    response_tokens: int = 12,
    seed: int = 0,
    data_sha256: str | None = None,
) -> Detection:
    """A mask that makes the wanted responses likely and leaves protected ones as they are.

    targets: conversations with the wanted response; keeps: protected conversations with the model's own
    response. sigma_L: calibrated standard deviations of the router logits. l1: per entry, of |S| in sigma
    units. Raises EmptyDataError, NanLogitsError, NoEffectError.
    """
    if not targets or not keeps:
        raise EmptyDataError(
            "direct needs both conversations to change and conversations to keep",
            where=f"{len(targets)} to change, {len(keeps)} to keep",
            expected="at least one of each",
            do="name a target suite and at least one protect suite in the scenario",
        )
    rng = random.Random(f"direct/{seed}")
    sigma = torch.tensor(sigma_L, device=model.hf.device)
    strength = torch.zeros((len(sigma_L), model.fingerprint.experts), device=model.hf.device, requires_grad=True)
    optimizer = torch.optim.Adam([strength], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2.0 * (1.0 - step / steps)))
    frozen = [p for p in model.hf.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    teacher = _Teacher(model, keeps, response_tokens)
    losses: list[tuple[float, float]] = []
    try:
        with Progress("direct: through the model", total=steps, unit="steps") as progress:
            for _ in range(steps):
                chosen = rng.sample(range(len(targets)), min(targets_per_step, len(targets)))
                kept = rng.sample(range(len(keeps)), min(keeps_per_step, len(keeps)))
                batch = [targets[i] for i in chosen] + [keeps[i] for i in kept]
                logits = model.response_logits(batch, bias_LE=sigma[:, None] * strength, most=response_tokens).float()
                wanted_ids = _response_ids([targets[i] for i in chosen], response_tokens)
                change = nn.functional.cross_entropy(logits[: len(wanted_ids)], wanted_ids.to(logits.device))
                steered = logits[len(wanted_ids) :].log_softmax(-1)
                keep = nn.functional.kl_div(steered, teacher(kept), log_target=True, reduction="batchmean")
                loss = change + keep_weight * keep
                if not bool(torch.isfinite(loss)):
                    raise _diverged(model, len(losses))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                with torch.no_grad():
                    shrink = l1 * schedule.get_last_lr()[0] / learning_rate
                    strength.copy_(strength.sign() * (strength.abs() - shrink).clamp(min=0))
                schedule.step()
                losses.append((change.item(), keep.item()))
                progress.advance(1, note=f"change {losses[-1][0]:.2f}, keep {losses[-1][1]:.3f}")
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    found = strength.detach().cpu().numpy().astype(np.float32)
    settings = {
        "steps": steps, "targets_per_step": targets_per_step, "keeps_per_step": keeps_per_step,
        "keep_weight": keep_weight, "l1": l1, "learning_rate": learning_rate, "response_tokens": response_tokens,
        "seed": seed, "targets": len(targets), "keeps": len(keeps),
    }  # fmt: skip
    if not found.any():
        raise NoEffectError(
            "direct ended with no entry: the pull of the L1 term won",
            where=f"settings {settings}",
            expected="at least one expert with a strength",
            do="lower l1, or give more steps",
        )
    info = MaskInfo(
        fingerprint=model.fingerprint, method="direct", settings=settings, intent=Intent(toward=toward),
        data_sha256=data_sha256,
    )  # fmt: skip
    mask = SteeringMask(info, strength_LE=found, sigma_L=np.asarray(sigma_L, dtype=np.float32))
    facts = {"loss_first": losses[0], "loss_last": tuple(np.mean(losses[-10:], axis=0).tolist())}
    return Detection(mask, found, facts)


class _Teacher:
    """Unsteered log-probabilities of the kept responses: once for all if they fit, else anew for each step."""

    def __init__(self, model: ThroughModel, keeps: Sequence[EncodedResponse], most: int) -> None:
        self.model, self.keeps, self.most = model, keeps, most
        self.stored: list[Tensor] | None = None
        counts = [len(_response_ids([keep], most)) for keep in keeps]
        first = self._compute([0])
        if sum(counts) * first.shape[-1] * 4 > TEACHER_BYTES:
            return
        self.stored = []
        for start in range(0, len(keeps), 64):
            part = list(range(start, min(start + 64, len(keeps))))
            self.stored += list(torch.split(self._compute(part), [counts[i] for i in part]))

    def _compute(self, chosen: Sequence[int]) -> Tensor:
        with torch.no_grad():
            logits = self.model.response_logits([self.keeps[i] for i in chosen], bias_LE=None, most=self.most)
        return logits.float().log_softmax(-1)

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        if self.stored is None:
            return self._compute(chosen)
        return torch.cat([self.stored[i] for i in chosen])


def _response_ids(sequences: Sequence[EncodedResponse], most: int) -> Tensor:
    ids: list[int] = []
    for encoded in sequences:
        start, end = encoded.spans["response"]
        ids += encoded.token_ids[start : min(end, start + most)]
    return torch.tensor(ids)


def _diverged(model: ThroughModel, step: int) -> NanLogitsError:
    return NanLogitsError(
        "the loss is not finite",
        where=f"direct, step {step} on a {model.fingerprint.model_type}",
        expected="finite numbers",
        do="load the model with --dtype float32 or bfloat16, or lower the learning rate",
    )

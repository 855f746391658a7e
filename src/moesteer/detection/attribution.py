"""Attribution: what a small push on each expert's router logit does to the wanted response, from gradients (ours).

    g[l, e] = d/dS[l, e] mean log p(wanted response)   at S = 0, where the mask adds sigma_l S[l, e] at every position
    F[l, e] = the same for KL(unsteered || steered on protected text): its second derivative, the Fisher information
    score   = g / sqrt(F + damping mean(F))

On protected text the first derivative of the KL is zero, so the second is what counts: the score is the gain that an
entry brings at a given, equal harm. F needs the gradient of every word of the vocabulary; it is estimated without
bias from one random projection per conversation: the square of d/dS sum r sqrt(p) log p, with r random signs.

The cheap cousin of `direct`: attribution patching (Nanda, 2023; Syed et al., arXiv:2310.10348) with router logits for
the nodes. Cost: one forward and backward pass per conversation (targets in batches, keeps one by one), whatever L x E.
What it cannot see: a change of the selection. The gradient reaches the router through the weights of the selected
experts alone, so an expert that is nowhere selected has none where weights are renormalised.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moesteer.detection.base import Detection
from moesteer.detection.method import Method
from moesteer.detection.through_model import (
    EncodedResponse,
    checked_form,
    drawn,
    mask_of,
    number,
    out_of_range,
    require_finite,
    require_keeps,
    require_responses,
    response_ids,
    whole,
    wholes,
)
from moesteer.errors import NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.progress import Progress

NAME = "attribution"
F64 = NDArray[np.float64]
SMALLEST = 1e-6
"""A table of gradients that is nowhere larger (nats a token for one sigma) is rounding."""


class GivesGradients(Protocol):
    """The little of a backend that this method needs, so that it depends on none."""

    fingerprint: Fingerprint
    hf: Any
    routers: Any

    def response_logits(self, sequences: Sequence[Any], *, bias_LE: Tensor | None, most: int) -> Tensor:
        """Vocabulary logits [n, V] that predict the first `most` response tokens of every sequence, in order."""


def detect(
    model: GivesGradients,
    *,
    targets: Sequence[EncodedResponse],
    keeps: Sequence[EncodedResponse],
    sigma_L: NDArray[np.float32],
    toward: str,
    form: Literal["additive", "forced"] = "additive",
    experts: int = 24,
    on: int = 5,
    off: int = 0,
    keep: Literal["fisher", "none"] = "fisher",
    damping: float = 0.1,
    most_keeps: int = 128,
    response_tokens: int = 12,
    per_pass: int = 12,
    seed: int = 0,
    data_sha256: str | None = None,
) -> Detection:
    """A mask from the gradient of the wanted responses' log-probability with respect to the router logits.

    targets: conversations with the wanted response; keeps: protected conversations with the model's own response.
    sigma_L: calibrated standard deviations of the router logits. form "additive": the `experts` of largest |score|;
    "forced": the `on` of largest positive score switched on, the `off` of most negative switched off. keep "fisher":
    divide by the harm to at most `most_keeps` conversations of `keeps`, drawn with `seed`; "none": the bare gradient,
    nats a token for one sigma. damping: as a share of the mean harm. response_tokens: so many count in a response.
    per_pass: targets in one pass. Raises InputError, EmptyDataError, NanLogitsError, NoEffectError (no gradient).
    """
    chosen_form = checked_form(NAME, form, experts=experts, on=on, off=off)
    if keep not in ("fisher", "none"):
        raise out_of_range(NAME, "keep", keep, "fisher or none")
    damping = number(NAME, "damping", damping, above=True)
    least_one = {"response_tokens": response_tokens, "per_pass": per_pass, "most_keeps": most_keeps}
    counts = wholes(NAME, least_one, least=1)
    seed = whole(NAME, "seed", seed, least=0)
    require_responses(NAME, targets=targets, keeps=keeps)
    if keep == "fisher":
        require_keeps(NAME, keeps, 'keep="fisher"')
    used = drawn(NAME, keeps if keep == "fisher" else [], most=counts["most_keeps"], seed=seed, role="keeps")
    sigma = torch.as_tensor(np.asarray(sigma_L, dtype=np.float32), device=model.hf.device)
    with _frozen(model.hf), Progress("attribution", total=len(targets) + len(used), unit="conversations") as progress:
        gradient_LE, log_p = _gradient(model, targets, sigma, counts, progress)
        fisher_LE = _fisher(model, used, sigma, counts["response_tokens"], seed, progress) if used else None
    score_LE = gradient_LE if fisher_LE is None else _at_equal_harm(gradient_LE, fisher_LE, damping)
    settings: dict[str, Any] = {
        **chosen_form.used(), "keep": keep, "damping": damping, **counts, "seed": seed,
        "targets": len(targets), "keeps": len(used),
    }  # fmt: skip
    mask = mask_of(
        score_LE, chosen_form, method=NAME, fingerprint=model.fingerprint, scoring=model.routers[0].scoring,
        sigma_L=sigma_L, toward=toward, settings=settings, data_sha256=data_sha256,
    )  # fmt: skip
    facts = {
        "log_probability": log_p, "gradient_largest": float(np.abs(gradient_LE).max()),
        "fisher_mean": None if fisher_LE is None else float(fisher_LE.mean()),
        "passes": -(-len(targets) // counts["per_pass"]) + len(used), "chosen": mask.expert_count,
    }  # fmt: skip
    return Detection(mask, score_LE.astype(np.float32), facts)


def _gradient(
    model: GivesGradients, targets: Sequence[EncodedResponse], sigma: Tensor, counts: Mapping[str, int], bar: Progress
) -> tuple[F64, float]:
    """(g [L, E], the unsteered mean log-probability of a token of the wanted responses)."""
    total_LE = np.zeros((len(model.fingerprint.layer_ids), model.fingerprint.experts))
    log_p, most, per_pass = 0.0, counts["response_tokens"], counts["per_pass"]
    by_length = sorted(targets, key=lambda encoded: len(encoded.token_ids))
    for start in range(0, len(by_length), per_pass):
        batch = by_length[start : start + per_pass]
        strength_LE = torch.zeros(total_LE.shape, device=sigma.device, requires_grad=True)
        logits = model.response_logits(batch, bias_LE=sigma[:, None] * strength_LE, most=most).float()
        ids = [response_ids(encoded, most=most) for encoded in batch]
        share = torch.cat([torch.full((len(one),), 1 / (len(one) * len(targets))) for one in ids])
        losses = nn.functional.cross_entropy(logits, torch.cat(ids).to(logits.device), reduction="none")
        value = -(losses * share.to(logits.device)).sum()
        total_LE += _derivative(value, strength_LE)
        log_p += value.item()
        bar.advance(len(batch))
    require_finite(NAME, total_LE, model.fingerprint.model_type)
    if np.abs(total_LE).max() < SMALLEST:
        raise NoEffectError(
            "the router logits have no gradient: the weights of the selected experts do not depend on them",
            where=f"{NAME} on a {model.fingerprint.model_type} ({model.fingerprint.scoring})",
            expected="routing weights that vary; the one weight of a renormalised top-1 router is always 1",
            do="use method `causal` or `risk-difference`, which need no gradient",
        )
    return total_LE, log_p


def _fisher(
    model: GivesGradients, keeps: Sequence[EncodedResponse], sigma: Tensor, most: int, seed: int, bar: Progress
) -> F64:
    """Second derivative of KL(unsteered || steered), a token of the kept responses, by each entry of S: [L, E]."""
    total_LE = np.zeros((len(model.fingerprint.layer_ids), model.fingerprint.experts))
    random_signs = torch.Generator().manual_seed(random.Random(f"attribution/signs/{seed}").getrandbits(62))
    for keep in keeps:
        strength_LE = torch.zeros(total_LE.shape, device=sigma.device, requires_grad=True)
        logits = model.response_logits([keep], bias_LE=sigma[:, None] * strength_LE, most=most).float()
        # a word of probability e^-100 adds nothing, and minus infinity would make the product NaN
        log_p_TV = logits.log_softmax(-1).clamp(min=-100)
        signs_TV = torch.randint(0, 2, log_p_TV.shape, generator=random_signs, dtype=torch.int8).to(logits.device)
        root_TV = (log_p_TV.detach() / 2).exp() * (2 * signs_TV - 1)
        total_LE += _derivative((root_TV * log_p_TV).sum() / len(log_p_TV) ** 0.5, strength_LE) ** 2
        bar.advance(1)
    require_finite(NAME, total_LE, model.fingerprint.model_type)
    return total_LE / len(keeps)


def _at_equal_harm(gradient_LE: F64, fisher_LE: F64, damping: float) -> F64:
    mean = float(fisher_LE.mean())
    return gradient_LE / np.sqrt(fisher_LE + damping * mean) if mean > 0 else gradient_LE


def _derivative(value: Tensor, strength_LE: Tensor) -> F64:
    """dvalue / dS as float64; zero where the value does not depend on S."""
    if not value.requires_grad:
        return np.zeros(strength_LE.shape)
    (found,) = torch.autograd.grad(value, strength_LE, allow_unused=True)
    return np.zeros(strength_LE.shape) if found is None else found.double().cpu().numpy()


@contextmanager
def _frozen(hf: Any) -> Iterator[None]:
    """Weights without gradient inside the block: only the routers' logits need one."""
    trained = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


METHOD = Method(
    name=NAME,
    title="the gradient of the wanted response by every router logit, against the harm to protected text",
    detect=detect,
    through_model=True,
    alphas=(0.25, 0.4, 0.55),
    gated=True,
    gated_alphas=(0.5, 0.75),
)

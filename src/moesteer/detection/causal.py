"""Causal: switch one expert off at a time and see what becomes of the wanted response (ours; exact and slow).

    effect[l, e] = mean over targets of log p(wanted response | e of layer l off) - log p(wanted response), a token
    harm[l, e]   = mean over keeps of KL(unsteered || e off) on their own responses, a token
    score        = -sign(effect) max(|effect| - keep_weight harm, 0)

Nothing is approximated: an expert off is what a forced mask with that one entry does, and another expert takes its
place. So it is the yardstick for the cheaper methods on small models. What it does not see is how experts act
together. Cost: 1 + L E forward passes per conversation, without gradient; a pass holds many silenced experts, one
in each row of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesteer.detection.base import Detection, checked_layers, rows_of_layers
from moesteer.detection.method import Method
from moesteer.detection.through_model import (
    EncodedResponse,
    checked_form,
    drawn,
    mask_of,
    number,
    require_finite,
    require_keeps,
    require_responses,
    response_ids,
    whole,
    wholes,
)
from moesteer.errors import ModelError
from moesteer.fingerprint import Fingerprint
from moesteer.progress import Progress
from moesteer.routing import Scoring

NAME = "causal"
F64 = NDArray[np.float64]
Entry = tuple[int, int]
PASS_POSITIONS = 16_384
"""Rows x length of one pass, at most; one row always."""


class SilencesExperts(Protocol):
    """The little of a backend that this method needs, so that it depends on none."""

    fingerprint: Fingerprint
    routers: Any

    def response_logits_silenced(
        self, sequences: Sequence[Any], *, silenced: Sequence[tuple[int, int] | None], most: int
    ) -> Tensor:
        """As response_logits, unsteered but for one (row of the layer, expert) per sequence that is switched off."""


def detect(
    model: SilencesExperts,
    *,
    targets: Sequence[EncodedResponse],
    keeps: Sequence[EncodedResponse],
    sigma_L: NDArray[np.float32],
    toward: str,
    form: Literal["additive", "forced"] = "forced",
    experts: int = 24,
    on: int = 0,
    off: int = 5,
    keep_weight: float = 0.0,
    layers: Sequence[int] | None = None,
    most_targets: int = 32,
    most_keeps: int = 32,
    response_tokens: int = 12,
    rows_per_pass: int = 32,
    seed: int = 0,
    data_sha256: str | None = None,
) -> Detection:
    """A mask from what silencing each expert does to the wanted responses.

    targets: conversations with the wanted response; keeps: protected conversations with the model's own response
    (used where keep_weight > 0). form "forced": the `off` experts whose silencing raises the wanted responses most
    are switched off, the `on` whose silencing lowers them most are switched on; "additive": strengths of the
    `experts` of largest |score|, with `sigma_L`. layers: decoder layer ids to try (None: all). most_targets,
    most_keeps: so many conversations of each, drawn with `seed`. response_tokens: so many count in a response.
    rows_per_pass: experts silenced in one pass. scores_LE: nats a token; positive speaks for the wanted response.
    Raises InputError, EmptyDataError, ModelError (no expert to spare), NanLogitsError, NoEffectError.
    """
    chosen_form = checked_form(NAME, form, experts=experts, on=on, off=off)
    keep_weight = number(NAME, "keep_weight", keep_weight, above=False)
    least_one = {
        "most_targets": most_targets, "most_keeps": most_keeps, "response_tokens": response_tokens,
        "rows_per_pass": rows_per_pass,
    }  # fmt: skip
    counts = wholes(NAME, least_one, least=1)
    seed = whole(NAME, "seed", seed, least=0)
    rows = np.flatnonzero(rows_of_layers(model.fingerprint, layers)).tolist()
    require_responses(NAME, targets=targets, keeps=keeps)
    if keep_weight:
        require_keeps(NAME, keeps, f"keep_weight={keep_weight:g}")
    _require_spare(model.routers[0].scoring, model.fingerprint)
    used = drawn(NAME, targets, most=counts["most_targets"], seed=seed, role="targets")
    kept = drawn(NAME, keeps, most=counts["most_keeps"], seed=seed, role="keeps") if keep_weight else []
    entries = [(row, expert) for row in rows for expert in range(model.fingerprint.experts)]
    measure = _Measure(model, counts["response_tokens"], counts["rows_per_pass"], entries)
    score_LE, facts = _scores(measure, used, kept, keep_weight)
    settings: dict[str, Any] = {
        **chosen_form.used(), "keep_weight": keep_weight,
        "layers": checked_layers(model.fingerprint, layers), **counts,
        "seed": seed, "targets": len(used), "keeps": len(kept),
    }  # fmt: skip
    mask = mask_of(
        score_LE, chosen_form, method=NAME, fingerprint=model.fingerprint, scoring=model.routers[0].scoring,
        sigma_L=sigma_L, toward=toward, settings=settings, data_sha256=data_sha256,
    )  # fmt: skip
    return Detection(mask, score_LE.astype(np.float32), {**facts, "chosen": mask.expert_count})


@dataclass
class _Measure:
    """Passes over conversations with each of `entries` silenced in turn."""

    model: SilencesExperts
    most: int
    rows_per_pass: int
    entries: list[Entry]
    passes: int = 0

    @property
    def rows_each(self) -> int:
        """Rows that one conversation takes: the unsteered one, and one per entry."""
        return 1 + len(self.entries)

    def effects(self, targets: Sequence[EncodedResponse], bar: Progress) -> tuple[F64, float]:
        """(mean change of the wanted response's log-probability [L, E], its unsteered mean), both a token."""
        total_LE, log_p = self._zeros(), 0.0
        for target in targets:
            ids_T = response_ids(target, most=self.most)
            before: float | None = None
            for entries, log_p_BTV in self._silenced(target, bar):
                index = ids_T.to(log_p_BTV.device).expand(len(entries), -1)[:, :, None]
                means_B = log_p_BTV.gather(-1, index)[..., 0].double().mean(-1).tolist()
                for entry, mean in zip(entries, means_B, strict=True):
                    if entry is None:
                        before = mean
                        log_p += mean / len(targets)
                    else:
                        assert before is not None
                        total_LE[entry] += (mean - before) / len(targets)
        require_finite(NAME, total_LE, self.model.fingerprint.model_type)
        return total_LE, log_p

    def harms(self, keeps: Sequence[EncodedResponse], bar: Progress) -> F64:
        """Mean KL(unsteered || silenced) of a token of the kept responses, [L, E]."""
        total_LE = self._zeros()
        for keep in keeps:
            own_TV: Tensor | None = None
            for entries, unclamped_BTV in self._silenced(keep, bar):
                log_p_BTV = unclamped_BTV.clamp(min=-100)  # 0 times infinity is no number
                own_TV = log_p_BTV[0] if own_TV is None else own_TV
                kl_B = (own_TV.exp() * (own_TV - log_p_BTV)).sum(-1).double().mean(-1).tolist()
                for entry, kl in zip(entries, kl_B, strict=True):
                    if entry is not None:
                        total_LE[entry] += kl / len(keeps)
        require_finite(NAME, total_LE, self.model.fingerprint.model_type)
        return total_LE

    def _silenced(self, encoded: EncodedResponse, bar: Progress) -> Iterator[tuple[list[Entry | None], Tensor]]:
        """(silenced in each row, log-probabilities [rows, T, V]) of every pass; the first row is the unsteered one."""
        every: list[Entry | None] = [None, *self.entries]
        rows = max(1, min(self.rows_per_pass, PASS_POSITIONS // len(encoded.token_ids)))
        for start in range(0, len(every), rows):
            entries = every[start : start + rows]
            with torch.no_grad():
                logits = self.model.response_logits_silenced([encoded] * len(entries), silenced=entries, most=self.most)
            self.passes += 1
            bar.advance(len(entries))
            yield entries, logits.float().log_softmax(-1).reshape(len(entries), -1, logits.shape[-1])

    def _zeros(self) -> F64:
        return np.zeros((len(self.model.fingerprint.layer_ids), self.model.fingerprint.experts))


def _scores(
    measure: _Measure, targets: Sequence[EncodedResponse], keeps: Sequence[EncodedResponse], keep_weight: float
) -> tuple[F64, dict[str, Any]]:
    """(score [L, E], facts)."""
    total = (len(targets) + len(keeps)) * measure.rows_each
    with Progress("causal: one expert at a time", total=total, unit="rows") as progress:
        effect_LE, log_p = measure.effects(targets, progress)
        harm_LE = measure.harms(keeps, progress)
    facts = {
        "log_probability": log_p, "passes": measure.passes, "rows": total, "largest_rise": float(effect_LE.max()),
        "largest_fall": float(effect_LE.min()), "largest_harm": float(harm_LE.max()) if keeps else None,
    }  # fmt: skip
    return -np.sign(effect_LE) * np.maximum(np.abs(effect_LE) - keep_weight * harm_LE, 0.0), facts


def _require_spare(scoring: Scoring, fingerprint: Fingerprint) -> None:
    """Raise ModelError where switching one expert off would leave a router fewer than it selects."""
    open_experts = fingerprint.experts // scoring.groups * scoring.groups_kept
    if open_experts - scoring.top_k < 1:
        raise ModelError(
            "no expert can be silenced: the router selects all that it may choose from",
            where=f"{NAME} on a {fingerprint.model_type} ({fingerprint.scoring}, {fingerprint.experts} experts)",
            expected=f"more than {scoring.top_k} experts to choose {scoring.top_k} from",
            do="use method `attribution` or `direct`, which change weights instead",
        )


METHOD = Method(
    name=NAME,
    title="one expert silenced at a time, measured: exact and slow",
    detect=detect,
    through_model=True,
    variants=({"form": "additive", "keep_weight": 1.0}, {"off": 1}),
    alphas=(0.25, 0.5),
)

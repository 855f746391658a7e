"""Top-k routing and steering in numpy: the definition of correct, against which all else is tested.

Axes: T tokens, E experts, K selected experts, G groups. Logits are the router's scores before selection.
All arithmetic is float32, in the order transformers 5 does it, so that a comparison can be exact.

A selection has two parts: which experts, and with what weights. Every scoring kind ranks the experts by a
`choice` score and takes the weights from a (possibly different) `weight` score:

| kind          | weight score                | choice score                         | weights of the selected     |
|---------------|-----------------------------|--------------------------------------|-----------------------------|
| softmax-topk  | softmax over all E          | weight + correction                  | kept, or renormalised       |
| topk-softmax  | the logits                  | the logits                           | softmax over the K          |
| sigmoid       | sigmoid                     | weight + correction                  | kept, or renormalised       |
| sparsemixer   | Phi-3.5-MoE's, K = 2: argmax, then argmax of the rest; each weight a softmax over near ties  |

Groups (DeepSeek-V3 and relatives): experts lie in G equal groups; only the best `groups_kept` of them, by
their `group_score`, can be chosen from.

Steering comes in two forms.
- **Additive** (MASCing, arXiv:2604.27818): `z + bias`, then select as ever.
- **Forced** (SteerMoE, arXiv:2509.09660): experts switched on are placed above the highest logit and those
  switched off below the lowest, eps = 0.01. Deviations: (1) on raw logits, not log-softmax, which is the same
  for softmax kinds and leaves the others undisturbed; (2) the selection is decided by rank: forced-on before
  free before forced-off whatever the arithmetic, since bfloat16 rounds 0.01 away and correction biases
  overrule it; (3) several experts switched on keep their own order within an eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesteer.errors import MaskContentError, NanLogitsError

ScoringKind = Literal["softmax-topk", "topk-softmax", "sigmoid", "sparsemixer"]
FORCE_EPS = 0.01
"""Distance, in logits, at which forced experts are placed beyond the extremes (SteerMoE, section 3)."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Scoring:
    """How a router turns logits into a selection.

    renormalise: divide the selected weights by their sum (softmax-topk and sigmoid only).
    scale: factor on the final weights. groups, groups_kept: 1, 1 means no groups.
    group_score: a group counts for its best expert ("max") or the sum of its best two ("top2-sum").
    jitter: sparsemixer's near-tie width.
    """

    kind: ScoringKind
    top_k: int
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_score: Literal["max", "top2-sum"] = "max"
    jitter: float = 0.01

    def describe(self) -> str:
        """One line for fingerprints and tables."""
        parts = [f"{self.kind} k={self.top_k}"]
        if self.renormalise:
            parts.append("renormalised")
        if self.scale != 1.0:
            parts.append(f"x{self.scale:g}")
        if self.groups > 1:
            parts.append(f"{self.groups_kept} of {self.groups} groups by {self.group_score}")
        if self.kind == "sparsemixer":
            parts.append(f"jitter={self.jitter:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Selection:
    """experts_TK: chosen expert ids, best first. weights_TK: their float32 weights, same order."""

    experts_TK: NDArray[np.int64]
    weights_TK: F32

    def as_sets(self) -> list[frozenset[int]]:
        """The chosen experts of each token, without their order."""
        return [frozenset(map(int, row)) for row in self.experts_TK]


def softmax(scores_TE: F32) -> F32:
    """Softmax over the last axis, float32."""
    shifted = scores_TE - scores_TE.max(axis=-1, keepdims=True)
    exponents: F32 = np.exp(shifted, dtype=np.float32)
    shares: F32 = exponents / exponents.sum(axis=-1, keepdims=True, dtype=np.float32)
    return shares


def _sigmoid(scores_TE: F32) -> F32:
    with np.errstate(over="ignore"):
        return (1.0 / (1.0 + np.exp(-scores_TE, dtype=np.float32))).astype(np.float32)


def steer_logits(logits_TE: F32, *, bias_TE: F32 | None = None, force_TE: NDArray[np.int8] | None = None) -> F32:
    """Logits after steering, float32 [T, E]; first the bias, then the forced experts.

    bias_TE: [T, E] or [E], in logits (alpha x sigma x strength). force_TE: [T, E] or [E], 1 on, -1 off, 0 free.
    """
    steered = np.asarray(logits_TE, dtype=np.float32)
    if bias_TE is not None:
        steered = steered + np.asarray(bias_TE, dtype=np.float32)
    if force_TE is None:
        return steered
    force = np.broadcast_to(np.asarray(force_TE, dtype=np.int8), steered.shape)
    highest = steered.max(axis=-1, keepdims=True)
    lowest = steered.min(axis=-1, keepdims=True)
    on = force > 0
    # rank of each switched-on expert among the switched-on, 0 for the lowest; of equals the lower id first
    rank = np.where(on, steered, np.inf).argsort(axis=-1, kind="stable").argsort(axis=-1).astype(np.float32)
    count = np.maximum(on.sum(axis=-1, keepdims=True), 1).astype(np.float32)
    raised = highest + np.float32(FORCE_EPS) * (1 + rank / count)
    return np.where(on, raised, np.where(force < 0, lowest - np.float32(FORCE_EPS), steered)).astype(np.float32)


def select(
    logits_TE: F32,
    scoring: Scoring,
    *,
    correction_E: F32 | None = None,
    force_TE: NDArray[np.int8] | None = None,
) -> Selection:
    """The experts and weights a router gives for (already steered) logits.

    logits_TE: [T, E]. correction_E: added to the choice score only. force_TE: decides by rank, see above; the
    logits should come from `steer_logits` with the same force. Ties go to the lower expert id.
    Raises NanLogitsError for logits that are not finite, MaskContentError for a force that cannot be met.
    """
    logits = np.asarray(logits_TE, dtype=np.float32)
    if not np.isfinite(logits).all():
        bad = np.argwhere(~np.isfinite(logits))[0]
        raise NanLogitsError(
            f"router logits hold {logits[tuple(bad)]}",
            where=f"token {bad[0]}, expert {bad[1]}",
            expected="finite numbers",
            do="check the model's weights and its dtype: float16 overflows where bfloat16 does not",
        )
    experts = logits.shape[-1]
    force = None if force_TE is None else np.broadcast_to(np.asarray(force_TE, dtype=np.int8), logits.shape)
    if force is not None:
        check_force(force, top_k=scoring.top_k, experts=experts)
    if scoring.kind == "sparsemixer":
        return _sparsemixer(logits, scoring, force)

    if scoring.kind == "softmax-topk":
        weight = softmax(logits)
    elif scoring.kind == "sigmoid":
        weight = _sigmoid(logits)
    else:
        weight = logits
    choice = weight if correction_E is None else weight + np.asarray(correction_E, dtype=np.float32)
    choice = _keep_groups(choice, scoring)
    chosen = _best(choice, scoring.top_k, force)
    weights = np.take_along_axis(weight, chosen, axis=-1)
    if scoring.kind == "topk-softmax":
        weights = softmax(weights)
    elif scoring.renormalise:
        # sigmoids may all underflow: the same guard as transformers'
        guard = np.float32(1e-20 if scoring.kind == "sigmoid" else 0.0)
        weights = weights / (weights.sum(axis=-1, keepdims=True, dtype=np.float32) + guard)
    return Selection(chosen, (weights * np.float32(scoring.scale)).astype(np.float32))


def check_force(force_TE: NDArray[np.int8], *, top_k: int, experts: int) -> None:
    """Raise MaskContentError where more experts are switched on than k, or too few are left to choose from."""
    on = (force_TE > 0).sum(axis=-1)
    off = (force_TE < 0).sum(axis=-1)
    if on.size and on.max() > top_k:
        raise MaskContentError(
            f"{int(on.max())} experts are switched on where {top_k} are selected",
            where=f"row {int(on.argmax())} of the force table",
            expected=f"at most {top_k} experts switched on in a layer",
            do="keep only the strongest of them, or switch others off instead",
        )
    if off.size and off.max() > experts - top_k:
        raise MaskContentError(
            f"{int(off.max())} of {experts} experts are switched off where {top_k} must be selected",
            where=f"row {int(off.argmax())} of the force table",
            expected=f"at most {experts - top_k} experts switched off in a layer",
            do="cap the number of experts switched off per layer",
        )


def _best(choice_TE: F32, k: int, force_TE: NDArray[np.int8] | None) -> NDArray[np.int64]:
    """Ids of the k best, best first: forced-on, then free, then forced-off; within a class by choice score."""
    order = np.argsort(-choice_TE, axis=-1, kind="stable")
    if force_TE is not None:
        classes = np.take_along_axis(force_TE, order, axis=-1)
        order = np.take_along_axis(order, np.argsort(-classes.astype(np.int64), axis=-1, kind="stable"), axis=-1)
    return order[..., :k].astype(np.int64)


def _keep_groups(choice_TE: F32, scoring: Scoring) -> F32:
    """Choice scores with those of the groups that lose set to minus infinity."""
    if scoring.groups == 1:
        return choice_TE
    tokens, experts = choice_TE.shape
    grouped = choice_TE.reshape(tokens, scoring.groups, experts // scoring.groups)
    best_first = -np.sort(-grouped, axis=-1)
    count = 2 if scoring.group_score == "top2-sum" else 1
    score_TG = best_first[..., :count].sum(axis=-1, dtype=np.float32)
    kept = np.argsort(-score_TG, axis=-1, kind="stable")[..., : scoring.groups_kept]
    open_TG = np.zeros((tokens, scoring.groups), dtype=bool)
    np.put_along_axis(open_TG, kept, True, axis=-1)
    return np.where(open_TG[..., None], grouped, -np.inf).reshape(tokens, experts).astype(np.float32)


def _sparsemixer(logits_TE: F32, scoring: Scoring, force_TE: NDArray[np.int8] | None) -> Selection:
    """Phi-3.5-MoE's selection at inference (SparseMixer-v2, arXiv:2409.12136): two argmaxes.

    Each weight is the chosen expert's share of a softmax over the experts within 2 x jitter of it, relative
    to |logit|; so it is not invariant under a shift of all logits, which is why raw logits are steered.
    """
    if scoring.top_k != 2:
        raise MaskContentError(
            f"sparsemixer with k = {scoring.top_k}",
            where="the model's scoring",
            expected="k = 2, the only case it is defined for",
            do="check num_experts_per_tok in the model's config.json",
        )
    chosen = _best(logits_TE, 2, force_TE)
    weights = np.empty(chosen.shape, dtype=np.float32)
    rest = logits_TE.copy()
    for rank in range(2):
        picked = chosen[:, rank : rank + 1]
        # with forced experts the pick need not be the largest left: it is the reference of its own near ties
        threshold = np.take_along_axis(logits_TE, picked, axis=-1)
        factor = np.maximum(np.abs(logits_TE), threshold)
        far = (threshold - logits_TE) / factor > 2 * np.float32(scoring.jitter)
        near = softmax(np.where(far, -np.inf, rest).astype(np.float32))
        weights[:, rank] = np.take_along_axis(near, picked, axis=-1)[:, 0]
        np.put_along_axis(rest, picked, -np.inf, axis=-1)
    return Selection(chosen, (weights * np.float32(scoring.scale)).astype(np.float32))

"""Finders: four ways to say which experts a behaviour hangs on, each a score for every expert.

- **risk-difference**: selected more often where the behaviour is shown (SteerMoE, arXiv:2509.09660), those first that
  pass false-discovery control and stability selection. It sees the trace alone.
- **surrogate**: small recurrent classifiers learn from router logits on which requests the behaviour is shown, and an
  expert counts for what silencing it would take from their verdict, to first order (after the idea of L3,
  arXiv:2602.08741, and MASCing's surrogates, arXiv:2604.27818). It sees requests, not replies.
- **attribution**: the gradient of the model's own reply that shows the behaviour, by every router logit, against the
  harm to other replies (detection/attribution.py). It sees the model, to first order.
- **causal**: each expert silenced in turn, and what the reply's log-probability loses (detection/causal.py). Exact for
  one expert, blind for several that stand in for each other; run by itself where there are at most CAUSAL_MOST.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesteer.audit.experts import F64, Experts, Finder, ordered
from moesteer.audit.inputs import SHOWS
from moesteer.detection import attribution, causal, surrogate
from moesteer.detection.logistic import as_facts, plain_classifiers
from moesteer.detection.masc import WANTED, Labelled, read, split_by_group
from moesteer.errors import EmptyDataError, InputError, NoEffectError, TraceLabelError, UnknownNameError
from moesteer.trace import TraceReader

SURROGATES = 4
CAUSAL_MOST = 512
"""Experts of a model, in all layers: above, the finder `causal` runs only where it is named."""
CAUSAL_TARGETS = 16
RESPONSE_TOKENS = 12


@dataclass(frozen=True, eq=False)
class Evidence:
    """What finders look at, all of the fit split. prompts: a trace of requests labelled SHOWS and LACKS.

    shown: requests with the model's own reply that shows the behaviour, encoded; kept: replies to other requests.
    """

    model: Any
    experts: Experts
    prompts: TraceReader
    span: str
    shown: Sequence[Any]
    kept: Sequence[Any]
    seed: int


Scores = tuple[F64, dict[str, Any]]


def _surrogate(found: Evidence) -> Scores:
    """What silencing each expert wherever it is selected would take from the surrogates' log odds of the behaviour.

    To first order: the gradient by the token's logit of the expert, times its height above the lowest logit of the
    layer, where a silenced expert is put; summed over the tokens that select it, averaged over requests and surrogates.
    """
    labelled = read(found.prompts, toward=SHOWS, keep=(), span=found.span)
    train, held = split_by_group(labelled.groups, seed=found.seed)
    seeds = [1000 * found.seed + i for i in range(SURROGATES)]
    stack = surrogate.fit("lstm", labelled.data, train=train, classes=2, seeds=seeds)
    accuracy = float(np.mean(surrogate.accuracy(stack, labelled.data, held)))
    plain = plain_classifiers(labelled.token_ids, labelled.data.labels_N.tolist(), train=train, held=held)
    facts = {
        **as_facts(accuracy, plain), "surrogates": SURROGATES, "train": len(train), "held_out": len(held),
        "unit": "log odds of the surrogates that a request shows the behaviour",
    }  # fmt: skip
    return _taken_by_silencing(stack, labelled, _selected(found)), facts


def _selected(found: Evidence) -> list[NDArray[Any]]:
    """Selections [T, L, K] of every sequence, in the order in which masc.read gives them."""
    parts = (arrays["selected"][row.span(found.span)] for row, arrays in found.prompts.sequences(tensors=("selected",)))
    return [part.astype(np.int64) for part in parts if len(part)]


def _taken_by_silencing(stack: surrogate.Stack, labelled: Labelled, selected: Sequence[NDArray[Any]]) -> F64:
    rows = labelled.rows(WANTED)
    total_LE = torch.zeros(labelled.data.logits_NTLE.shape[2:], dtype=torch.float64)
    for part in labelled.data.passes(torch.tensor(rows), copies=len(stack.seeds)):
        logits, lengths, _ = labelled.data.part(part)
        logits = logits.clone().requires_grad_(True)
        with torch.enable_grad():
            verdict = stack(logits, lengths)[..., 0].mean(0).sum()
        (gradient,) = torch.autograd.grad(verdict, logits)
        height = (logits - logits.amin(-1, keepdim=True)).detach()
        chosen = torch.zeros_like(height)
        for place, number in enumerate(part.tolist()):
            chosen[0, place, : len(selected[number])].scatter_(-1, torch.from_numpy(selected[number]), 1.0)
        total_LE += (gradient * height * chosen).double().sum((0, 1, 2))
    found: F64 = (total_LE / len(rows)).numpy()
    return found


def _attribution(found: Evidence) -> Scores:
    detected = attribution.detect(
        found.model, targets=found.shown, keeps=found.kept, sigma_L=found.prompts.sigma_L, toward=SHOWS,
        keep="fisher" if found.kept else "none", response_tokens=RESPONSE_TOKENS, seed=found.seed,
    )  # fmt: skip
    facts = {**detected.facts, "unit": "log-probability of the reply for one sigma, at equal harm to other replies"}
    return detected.scores_LE.astype(np.float64), facts


def _causal(found: Evidence) -> Scores:
    detected = causal.detect(
        found.model, targets=found.shown, keeps=(), sigma_L=found.prompts.sigma_L, toward=SHOWS, form="additive",
        most_targets=CAUSAL_TARGETS, response_tokens=RESPONSE_TOKENS, seed=found.seed,
    )  # fmt: skip
    facts = {**detected.facts, "unit": "nats a token that the reply loses without the expert"}
    return detected.scores_LE.astype(np.float64), facts


_SCORED: Mapping[str, tuple[str, Callable[[Evidence], Scores]]] = {
    "surrogate": ("what classifiers of the routing hang on", _surrogate),
    "attribution": ("the gradient of the model's own reply by every router logit", _attribution),
    "causal": ("one expert silenced at a time, measured", _causal),
}
RISK_DIFFERENCE = "risk-difference"
NAMES = (RISK_DIFFERENCE, *_SCORED)


def checked_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of finders as they were given, or None. Raises UnknownNameError, and InputError for none at all."""
    if names is None:
        return None
    if unknown := [name for name in names if name not in NAMES]:
        raise UnknownNameError(
            f"no finder {', '.join(unknown)}", where="--finder", expected=", ".join(NAMES), do="name some of these"
        )
    if not names:
        raise InputError("no finder at all", where="finders", expected=", ".join(NAMES), do="name at least one")
    return tuple(dict.fromkeys(names))


def find(found: Evidence, names: Sequence[str] | None) -> tuple[dict[str, Finder], dict[str, str]]:
    """(finders by name, why the others failed). names: None is all that are cheap enough for the model.

    Raises NoEffectError where none of them ranks anything.
    """
    every = found.experts.usage_LE.size
    wanted = names if names is not None else [n for n in NAMES if n != causal.NAME or every <= CAUSAL_MOST]
    made: dict[str, Finder] = {}
    failed: dict[str, str] = {}
    if names is None and causal.NAME not in wanted:
        failed[causal.NAME] = f"not run: {every} experts are more than {CAUSAL_MOST}; --finder {causal.NAME} runs it"
    for name in wanted:
        if name == RISK_DIFFERENCE:
            made[name] = _risk_difference(found.experts)
            continue
        title, score = _SCORED[name]
        try:
            score_LE, facts = score(found)
        except (NoEffectError, TraceLabelError, EmptyDataError) as error:
            failed[name] = str(error)
            continue
        made[name] = Finder(name, title, score_LE, ordered(score_LE), ordered(-score_LE), None, facts)
    if not made:
        raise NoEffectError(
            "no finder ranks the experts",
            where=", ".join(wanted),
            expected="at least one",
            do="; ".join(f"{name}: {said.splitlines()[0]}" for name, said in failed.items()),
        )
    return made, failed


def _risk_difference(found: Experts) -> Finder:
    signs_LE, difference_LE = found.behaviour_LE, found.difference.value
    passed = int(((found.q_LE <= 0.05) & (difference_LE > 0)).sum())
    facts = {
        "test": found.test, "stable": int((signs_LE > 0).sum()), "stable_against": int((signs_LE < 0).sum()),
        "largest": float(difference_LE.max()), "most_negative": float(difference_LE.min()),
        "unit": "share of tokens, where the behaviour is shown less where it is not",
    }  # fmt: skip
    return Finder(
        RISK_DIFFERENCE, "chosen more often where the behaviour is shown", difference_LE,
        ordered(difference_LE, signs_LE > 0), ordered(-difference_LE, signs_LE < 0), passed, facts,
    )  # fmt: skip

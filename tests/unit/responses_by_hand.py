"""Random token ids with a response, for the methods that run a model; and what such a model makes of one."""

from __future__ import annotations

import numpy as np
import torch

from moesteer.backends.chat import Encoded
from moesteer.models.check import Recorded

SIGMA = (0.5, 1.0, 1.5, 2.0)


def conversations(count, *, seed, prompt=(4, 9), response=(3, 8)):
    """Prompts and responses of random lengths (half-open ranges)."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        start, more = int(rng.integers(*prompt)), int(rng.integers(*response))
        ids = tuple(int(i) for i in rng.integers(5, 60, size=start + more))
        found.append(Encoded(ids, {"prompt": (0, start), "response": (start, start + more)}))
    return found


def sigma_of(model):
    """Another sigma in every layer."""
    return np.array(SIGMA[: len(model.routers)], dtype=np.float32)


def entries(model):
    """Every (row of the layer, expert)."""
    return [(layer, expert) for layer in range(len(model.routers)) for expert in range(model.fingerprint.experts)]


def pushed(model, entry, size):
    """S [L, E] with one entry."""
    strength_LE = np.zeros((len(model.routers), model.fingerprint.experts))
    strength_LE[entry] = size
    return strength_LE


def run_with(model, encoded, strength_LE, *, most):
    """(log-probabilities [T, V] as float64, selections of every router), one conversation, by `response_logits`."""
    bias_LE = torch.from_numpy((sigma_of(model)[:, None] * strength_LE).astype(np.float32))
    recorded = Recorded()
    with torch.no_grad(), model.tap.record(recorded):
        logits = model.response_logits([encoded], bias_LE=bias_LE, most=most)
    return logits.double().log_softmax(-1), [recorded.experts[r.index].sort(-1).values for r in model.routers]


def wanted_mean(log_p_TV, encoded, *, most):
    """The mean log-probability of the first `most` tokens of the response."""
    start, end = encoded.spans["response"]
    ids = encoded.token_ids[start : min(end, start + most)]
    return float(np.mean([float(log_p_TV[t, token]) for t, token in enumerate(ids)]))


def same(selections, others):
    """Whether every router selected alike."""
    return all(torch.equal(one, other) for one, other in zip(selections, others, strict=True))

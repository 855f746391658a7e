"""Ridge-penalised logistic regression, and the plain classifiers that a surrogate has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

AS_GOOD = 0.02
"""A plain classifier this close to the surrogate's accuracy does as well."""


def logistic(
    features_NF: NDArray[np.float64], labels_N: NDArray[np.float64], *, penalty: float
) -> tuple[NDArray[np.float64], float]:
    """(weights [F], bias) in raw units, fitted on standardised features with both sides weighing alike.

    labels: 0 or 1, both present. penalty: of the squared weights, against a log loss that sums to N.
    """
    mean, std = features_NF.mean(0), features_NF.std(0) + 1e-6
    scaled = (features_NF - mean) / std
    share = labels_N.mean()
    weights = np.where(labels_N == 1, 0.5 / share, 0.5 / (1.0 - share))
    signs = 2 * labels_N - 1

    def loss(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = signs * (scaled @ point[:-1] + point[-1])
        pull = -signs * weights * sigmoid(-margin)
        value = float((weights * np.logaddexp(0.0, -margin)).sum() + 0.5 * penalty * (point[:-1] ** 2).sum())
        return value, np.append(scaled.T @ pull + penalty * point[:-1], pull.sum())

    start = np.zeros(scaled.shape[1] + 1)
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weight = found.x[:-1] / std
    return weight, float(found.x[-1] - mean @ weight)


def sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)) without overflow."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -500.0, 500.0))))


def plain_classifiers(
    token_ids: Sequence[NDArray[np.int32]],
    labels: Sequence[int],
    *,
    train: Sequence[int],
    held: Sequence[int],
) -> dict[str, float]:
    """Held-out accuracy of classifiers that see no routing, on the surrogate's own split.

    length_only: the number of tokens and its logarithm; bag_of_words: how often each token occurs (tokens that the
    training part does not have are not seen); majority: the more frequent class. NaN where nothing is held out or
    the training part has one class.
    """
    truth = np.array(labels, dtype=np.float64)
    inside, outside = np.array(train, dtype=np.int64), np.array(held, dtype=np.int64)
    if not len(outside) or len(set(truth[inside])) < 2:
        return {"length_only": float("nan"), "bag_of_words": float("nan"), "majority": float("nan")}
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.float64)
    known = {int(token): i for i, token in enumerate(np.unique(np.concatenate([token_ids[i] for i in inside])))}
    words = np.zeros((len(truth), len(known)))
    for row, ids in enumerate(token_ids):
        places = [known[int(token)] for token in ids if int(token) in known]
        np.add.at(words[row], places, 1.0)
    found = {}
    for name, features in (("length_only", np.stack([lengths, np.log1p(lengths)], axis=1)), ("bag_of_words", words)):
        weight, bias = logistic(features[inside], truth[inside], penalty=1.0)
        found[name] = float((((features[outside] @ weight + bias) > 0) == (truth[outside] > 0.5)).mean())
    usual = truth[inside].mean() >= 0.5
    return {**found, "majority": float(((truth[outside] > 0.5) == usual).mean())}


def warning(surrogate: float, plain: dict[str, float]) -> str | None:
    """A plain sentence where a classifier without routing does as well as the surrogate, or where that is not known.

    None means that the surrogate was measured, and is better than each plain classifier that was.
    """
    if math.isnan(surrogate):
        return "nothing could be held out, so that the surrogate's accuracy is not known"
    if all(math.isnan(value) for value in plain.values()):
        return (
            f"the surrogate's {100 * surrogate:.0f} % has nothing to be compared with: "
            "no classifier without routing could be fitted on the same split"
        )
    equal = {name: value for name, value in plain.items() if value >= surrogate - AS_GOOD}
    if not equal:
        return None
    names = {"length_only": "the number of tokens", "bag_of_words": "the words alone", "majority": "the usual class"}
    said = ", ".join(f"{names[name]} {100 * value:.0f} %" for name, value in equal.items())
    return f"the surrogate's {100 * surrogate:.0f} % says little about routing: {said} on the same split"


def as_facts(surrogate: float, plain: dict[str, float]) -> dict[str, Any]:
    """What the report holds of a surrogate's accuracy."""
    return {"surrogate_held_out_accuracy": surrogate, **{f"{k}_accuracy": v for k, v in plain.items()},
            "warning": warning(surrogate, plain)}  # fmt: skip

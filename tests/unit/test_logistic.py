"""detection/logistic.py and proximal.py against finite differences, brute force and the soft threshold.

Legend: N items, F features, L layers, E experts.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from moesteer.detection import logistic as module
from moesteer.detection.logistic import AS_GOOD, as_facts, logistic, plain_classifiers, sigmoid, warning
from moesteer.detection.proximal import shrink

# ---------------------------------------------------------------- logistic regression


def tiny(seed=0, count=12, features=2):
    rng = np.random.default_rng(seed)
    values = rng.normal([3.0] * features, [0.5, 20.0, 1.0][:features], size=(count, features))
    labels = (rng.random(count) < 0.35).astype(float)
    labels[:2] = 0, 1
    return values, labels


def objective(values, labels, weight, bias, *, penalty):
    """In words: both sides weigh alike, N in all; the penalty is of weights per standard deviation."""
    total = 0.0
    for row, label in zip(values, labels, strict=True):
        score = sum(w * x for w, x in zip(weight, row, strict=True)) + bias
        p = 1 / (1 + math.exp(-score))
        side = [x for x in labels if x == label]
        total -= len(labels) / 2 / len(side) * math.log(p if label else 1 - p)
    scale = values.std(0) + 1e-6
    return total + penalty / 2 * sum((w * s) ** 2 for w, s in zip(weight, scale, strict=True))


def test_the_gradient_is_the_finite_difference(monkeypatch):
    values, labels = tiny(features=3)
    kept = {}

    def seen(loss, start, **options):
        kept["loss"] = loss
        return optimize.minimize(loss, start, **options)

    monkeypatch.setattr(module, "optimize", type("Seen", (), {"minimize": staticmethod(seen)}))
    logistic(values, labels, penalty=0.7)
    for point in (np.zeros(4), np.array([0.4, -1.3, 0.2, 0.9])):
        value, gradient = kept["loss"](point)
        steps = 1e-5 * np.eye(4)
        expected = [(kept["loss"](point + s)[0] - kept["loss"](point - s)[0]) / 2e-5 for s in steps]
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)
        assert value > 0


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_no_other_point_is_better(penalty):
    """The optimum of the objective as it is written in words, found without its gradient."""
    values, labels = tiny()
    weight, bias = logistic(values, labels, penalty=penalty)
    scale = np.append(values.std(0), 1.0)

    def loss(point):
        return objective(values, labels, point[:-1] / scale[:-1], point[-1], penalty=penalty)

    options = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 20_000, "maxfev": 20_000}
    found = optimize.minimize(loss, np.zeros(3), method="Nelder-Mead", options=options)
    assert objective(values, labels, weight, bias, penalty=penalty) == pytest.approx(found.fun, rel=1e-6)
    np.testing.assert_allclose(np.append(weight, bias) * scale, found.x, rtol=2e-3, atol=2e-3)


def test_both_sides_weigh_alike():
    """Of one feature without information the bias is zero however many are on each side."""
    values, labels = np.ones((10, 1)), np.array([1.0] + [0.0] * 9)
    weight, bias = logistic(values, labels, penalty=1.0)
    np.testing.assert_allclose([weight[0], bias], 0, atol=1e-6)


def test_sigmoid_has_no_overflow():
    with np.errstate(all="raise"):
        found = sigmoid(np.array([-1e9, -1.0, 0.0, 1.0, 1e9]))
    np.testing.assert_allclose(found, [0, 1 / (1 + math.e), 0.5, 1 / (1 + math.exp(-1)), 1], atol=1e-12)


# ---------------------------------------------------------------- plain classifiers


def texts(*, length, word, count=40, seed=0):
    """Token ids of two classes by turns: class 1 is longer, or holds the token 99, or neither."""
    rng = np.random.default_rng(seed)
    found, labels = [], []
    for i in range(count):
        label = i % 2
        ids = rng.integers(0, 9, size=int(rng.integers(5, 9)) + (6 * label if length else 0)).astype(np.int32)
        if word and label:
            ids[int(rng.integers(len(ids)))] = 99
        found.append(ids)
        labels.append(label)
    return found, labels


def classified(found, labels, *, train=range(20), held=range(20, 40)):
    return plain_classifiers(found, labels, train=list(train), held=list(held))


def test_the_length_tells_where_it_does():
    plain = classified(*texts(length=True, word=False))
    assert plain["length_only"] == 1.0 and plain["majority"] == 0.5


def test_a_token_tells_where_it_does():
    plain = classified(*texts(length=False, word=True))
    assert plain["bag_of_words"] == 1.0 and plain["length_only"] < 0.8


def test_nothing_tells_where_nothing_does():
    """Held-out accuracy over many draws of 20 is chance: the mean of 20 draws lies within 0.1 of a half."""
    draws = [classified(*texts(length=False, word=False, seed=seed)) for seed in range(20)]
    for name in ("length_only", "bag_of_words"):
        assert abs(np.mean([draw[name] for draw in draws]) - 0.5) < 0.1


def test_the_majority_is_that_of_the_training_part():
    found, _ = texts(length=False, word=False)
    labels = [0] * 12 + [1] * 8 + [1] * 15 + [0] * 5
    assert classified(found, labels)["majority"] == 0.25
    assert classified(found, [1 - x for x in labels])["majority"] == 0.25


def test_a_token_that_training_lacks_is_not_seen():
    """99 stands in held-out texts alone: it tells them apart, and must not help."""
    found, labels = texts(length=False, word=True)
    plainer, _ = texts(length=False, word=True)
    for ids in plainer[:20]:
        ids[ids == 99] = 0
    assert classified(plainer, labels)["bag_of_words"] < 0.8 < classified(found, labels)["bag_of_words"]


@pytest.mark.parametrize("train, held", [(range(40), []), (range(0, 20, 2), range(20, 40)), ([], range(20))])
def test_nothing_held_out_or_one_class_alone_is_nan(train, held):
    plain = classified(*texts(length=True, word=True), train=train, held=held)
    assert set(plain) == {"length_only", "bag_of_words", "majority"} and all(map(math.isnan, plain.values()))


# ---------------------------------------------------------------- the warning


@pytest.mark.parametrize("name, words", [("length_only", "the number of tokens"), ("bag_of_words", "the words alone"),
                                         ("majority", "the usual class")])  # fmt: skip
def test_the_warning_appears_exactly_where_a_plain_classifier_does_as_well(name, words):
    plain = dict.fromkeys(("length_only", "bag_of_words", "majority"), 0.5)
    for value in (0.50, 0.70, 0.90 - AS_GOOD - 0.001):
        assert warning(0.9, {**plain, name: value}) is None
    for value in (0.90 - AS_GOOD + 0.001, 0.9, 1.0):
        said = warning(0.9, {**plain, name: value})
        assert said == (
            f"the surrogate's 90 % says little about routing: {words} {100 * value:.0f} % on the same split"
        )


def test_the_warning_names_all_that_do_as_well():
    said = warning(0.9, {"length_only": 0.99, "bag_of_words": 0.95, "majority": 0.6})
    assert said is not None and "the number of tokens 99 %, the words alone 95 % on" in said


def test_an_accuracy_that_is_not_known_is_warned_of():
    """Nothing compares with NaN: silence would read as a surrogate that was measured and is fine."""
    nothing = dict.fromkeys(("length_only", "bag_of_words", "majority"), math.nan)
    unknown = "nothing could be held out, so that the surrogate's accuracy is not known"
    for plain in (nothing, dict.fromkeys(nothing, 0.5)):
        assert warning(math.nan, plain) == as_facts(math.nan, plain)["warning"] == unknown
    assert warning(0.9, nothing) == (
        "the surrogate's 90 % has nothing to be compared with: "
        "no classifier without routing could be fitted on the same split"
    )
    assert warning(0.9, {**nothing, "majority": 0.5}) is None


def test_the_facts_are_both_accuracies_and_the_warning():
    assert as_facts(0.75, {"length_only": 0.5, "bag_of_words": 0.74, "majority": 0.5}) == {
        "surrogate_held_out_accuracy": 0.75, "length_only_accuracy": 0.5, "bag_of_words_accuracy": 0.74,
        "majority_accuracy": 0.5,
        "warning": "the surrogate's 75 % says little about routing: the words alone 74 % on the same split",
    }  # fmt: skip


# ---------------------------------------------------------------- the proximal step


def descend(gradient, matrix, *, penalty, steps=400, learning_rate=0.05):
    """Adam with a falling rate, and the proximal step after each."""
    optimizer = torch.optim.Adam([matrix], lr=learning_rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, 2.0 * (1.0 - step / steps))
        matrix.grad = gradient(matrix.detach())
        optimizer.step()
        shrink(matrix, optimizer, penalty_LE=penalty)
    return matrix.detach()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_gradient_below_the_penalty_is_exactly_zero_and_one_above_is_not(scale):
    """Whatever the scale of both: Adam divides it out of the step, and the threshold with it."""
    slopes = torch.tensor([[0.0, 0.5, -0.9, 1.1, -2.0]]) * scale
    found = descend(lambda _: slopes.clone(), torch.zeros(1, 5, requires_grad=True), penalty=scale, steps=20)
    assert (found[0, :3] == 0).all()
    assert found[0, 3] < -0.01 and found[0, 4] > 0.01


def test_an_entry_that_starts_elsewhere_comes_to_zero_and_stays():
    start = torch.tensor([[3.0, -2.0, 0.1]], requires_grad=True)
    found = descend(lambda _: torch.tensor([[0.5, -0.5, 0.0]]), start, penalty=1.0, steps=300)
    assert (found == 0).all()


def test_the_fixed_point_of_a_quadratic_is_the_soft_threshold():
    """argmin c/2 (s - a)^2 + p |s| is sign(a) max(|a| - p / c, 0); the tolerance is the last steps' learning rate."""
    generator = torch.Generator().manual_seed(0)
    aim = torch.randn((4, 6), generator=generator)
    curve = torch.rand((4, 6), generator=generator) * 3 + 0.2
    penalty = torch.rand((4, 6), generator=generator)
    found = descend(lambda s: curve * (s - aim), torch.zeros(4, 6, requires_grad=True), penalty=penalty, steps=1500)
    expected = aim.sign() * (aim.abs() - penalty / curve).clamp(min=0)
    assert ((found == 0) == (expected == 0)).all() and 5 < int((expected == 0).sum()) < 20
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_no_penalty_is_adam():
    slopes = torch.tensor([[0.0, 0.5, -2.0]])
    plain, mine = (torch.ones(1, 3, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([plain], lr=0.05)
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, 2.0 * (1.0 - step / 10))
        plain.grad = slopes.clone()
        optimizer.step()
    assert torch.equal(descend(lambda _: slopes.clone(), mine, penalty=0.0, steps=10), plain.detach())

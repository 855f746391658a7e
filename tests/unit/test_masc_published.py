"""detection/masc_published.py on planted traces, whose answer is known. Legend: L layers, E experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesteer.detection import masc_published, surrogate
from moesteer.detection.masc_published import ZERO_BELOW, detect
from moesteer.errors import InputError, TraceLabelError
from tests.unit.planted_traces import TOLD_BY, planted

SPAN = ("final_user",)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Told apart by one expert, of one length."""
    return planted(tmp_path_factory.mktemp("published") / "t", spans=SPAN, lengths={"bad": (2, 5), "good": (2, 5)})


def by_hand(trace, strength_LE, *, toward, seed=0):
    """(surrogate's classes of the unwanted, as they are and steered), from the surrogate that `detect` fits."""
    rows = [(row, arrays["logits"].astype(np.float32)) for row, arrays in trace.sequences()]
    labels = [int(row.label == toward) for row, _ in rows]
    data = surrogate.Sequences.of([logits for _, logits in rows], labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    stack = surrogate.fit("lstm", data, train=order[: int(0.8 * len(order))], classes=2, seeds=[seed])
    unwanted = [torch.from_numpy(logits) for (_, logits), label in zip(rows, labels, strict=True) if not label]
    bias = torch.from_numpy(trace.sigma_L[:, None] * strength_LE)
    return [
        np.mean([
            float(stack(logits[None, None] + pushed, torch.tensor([len(logits)]))[0, 0, 0] > 0) for logits in unwanted
        ])
        for pushed in (torch.zeros_like(bias), bias)
    ]  # fmt: skip


@pytest.mark.parametrize("toward, sign", [("good", 1), ("bad", -1)])
def test_the_unwanted_move_to_the_wanted_class(trace, toward, sign):
    found = detect(trace, toward=toward)
    strength = found.mask.strength_LE
    before, after = by_hand(trace, strength, toward=toward)
    assert before < 0.1 and after > 0.9
    assert found.facts["moved_to_wanted_class"] == pytest.approx(after, abs=1e-6)
    began = torch.randn((3, 12), generator=_after_the_split(48)).numpy()
    assert sign * (strength - began)[TOLD_BY] > 0.5
    np.testing.assert_array_equal(found.scores_LE, strength)
    np.testing.assert_array_equal(found.mask.sigma_L, trace.sigma_L)


def _after_the_split(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    torch.randperm(count, generator=generator)
    return generator


def test_most_of_the_matrix_is_where_it_began(trace):
    """The fault that `masc` mends: S starts random and dense, and a small lambda leaves it so."""
    began = torch.randn((3, 12), generator=_after_the_split(48)).numpy()
    found = detect(trace, toward="good", l1=1e-5)
    assert np.corrcoef(found.mask.strength_LE.ravel(), began.ravel())[0, 1] > 0.6
    assert found.mask.expert_count > 30
    still = detect(trace, toward="good", epochs=1, learning_rate=1e-6, l1=0.0).mask.strength_LE
    np.testing.assert_allclose(still, np.where(np.abs(began) > ZERO_BELOW, began, 0), atol=1e-5)
    assert (np.abs(began) <= ZERO_BELOW).any()


def test_entries_of_a_tenth_and_less_are_zero_and_no_others(trace):
    seen = []
    for seed in range(4):
        strength = detect(trace, toward="good", seed=seed, epochs=10).mask.strength_LE
        sizes = np.abs(strength[strength != 0])
        assert sizes.min() > 0.1
        seen += [(strength == 0).sum(), int((sizes < 0.2).sum())]
    assert sum(seen[::2]) > 3 and sum(seen[1::2]) > 3


def test_a_larger_lambda_gives_smaller_strengths(trace):
    sums = [float(np.abs(detect(trace, toward="good", l1=l1).mask.strength_LE).sum()) for l1 in (0.0, 1e-2, 0.1)]
    assert sums[0] > sums[1] > sums[2] > 0


def test_a_start_of_zero_has_no_noise(trace):
    found = detect(trace, toward="good", start_std=0.0, l1=1e-2)
    assert found.facts["moved_to_wanted_class"] > 0.9 and found.mask.strength_LE[TOLD_BY] > 0.3


def test_the_seed_decides_and_the_same_seed_gives_the_same_bytes(trace):
    assert detect(trace, toward="good", seed=1).mask.to_bytes() == detect(trace, toward="good", seed=1).mask.to_bytes()
    one, two = (detect(trace, toward="good", seed=seed).mask.strength_LE for seed in (1, 2))
    assert not np.array_equal(one, two)


def test_a_length_that_tells_the_sides_apart_is_warned_of(tmp_path, trace):
    confounded = planted(tmp_path / "t", spans=SPAN, leans={}, lengths={"bad": (9, 14), "good": (2, 4)})
    facts = detect(confounded, toward="good").facts
    assert facts["length_only_accuracy"] == 1.0 and facts["surrogate_held_out"] == 10
    assert "says little about routing: the number of tokens 100 %" in facts["warning"]
    honest = detect(trace, toward="good").facts
    assert honest["surrogate_held_out_accuracy"] > 0.9 and honest["surrogate_train_accuracy"] > 0.9
    assert honest["length_only_accuracy"] < 0.9 and honest["warning"] is None


def test_other_labels_than_the_two_sides_are_unwanted_and_none_is_left_out(tmp_path):
    """As published there is no class to keep."""
    made = planted(tmp_path / "t", ("bad", "good", "keep"), each=10, spans=SPAN)
    facts = detect(made, toward="good", epochs=1).facts
    assert facts["surrogate_held_out"] == 6 and facts["majority_accuracy"] > 0.3


def test_all_settings_are_in_the_mask(trace):
    given = {"span": "final_user", "l1": 2e-5, "seed": 3, "epochs": 4, "learning_rate": 0.02, "start_std": 0.7}
    info = detect(trace, toward="good", **given).mask.info
    assert info.settings == given and {*masc_published.METHOD.settings, "seed"} == set(given)
    assert (info.method, info.intent.toward) == ("masc-published", "good")
    assert info.data_sha256 == trace.manifest.plan_sha256


GOLDEN = {
    (0, 0): -0.3349, (0, 3): 1.9630, (0, 5): 0.0, (0, 8): 2.4653, (1, 0): 3.6937, (1, 1): -2.4819, (1, 4): 0.3135,
    (1, 7): 0.1844, (1, 11): 1.9378, (2, 6): 0.0, (2, 9): -2.1096, (2, 11): 0.0,
}  # fmt: skip


def test_the_method_still_gives_the_numbers_it_gave(trace):
    """Pinned on one core. Two and four threads, other instruction sets: within 1e-5 of these; the tolerance is 1e-3."""
    found = detect(trace, toward="good", l1=1e-2, epochs=20)
    strength = found.mask.strength_LE
    assert {place: float(strength[place]) for place in GOLDEN} == pytest.approx(GOLDEN, abs=1e-3)
    assert float(np.abs(strength).sum()) == pytest.approx(37.0388, abs=0.02) and found.mask.expert_count == 32
    assert found.facts == {
        "surrogate_held_out_accuracy": 1.0, "surrogate_train_accuracy": 1.0, "surrogate_held_out": 10,
        "length_only_accuracy": 0.5, "bag_of_words_accuracy": 0.5, "majority_accuracy": 0.5, "warning": None,
        "moved_to_wanted_class": pytest.approx(22 / 24),
    }  # fmt: skip


def bounded(monkeypatch, trace, *, sequences):
    """Room for so many sequences in a pass: here four tokens of three layers of twelve experts each."""
    longest = max(len(arrays["logits"]) for _, arrays in trace.sequences())
    monkeypatch.setattr(surrogate, "PASS_BYTES", 4 * longest * 3 * 12 * sequences)


@pytest.mark.parametrize("sequences", [1, 7, 47])
def test_memory_decides_how_many_passes_an_epoch_takes_and_not_the_mask(trace, monkeypatch, sequences):
    """48 sequences, in passes of so many with a rest. Sums of float32 in another order: within 1e-3 of 1 to 3."""
    whole = detect(trace, toward="good", l1=1e-2, epochs=20)
    bounded(monkeypatch, trace, sequences=sequences)
    parts = detect(trace, toward="good", l1=1e-2, epochs=20)
    np.testing.assert_allclose(parts.mask.strength_LE, whole.mask.strength_LE, atol=1e-3)
    assert parts.mask.info.settings == whole.mask.info.settings and parts.facts == whole.facts
    assert 0.5 < whole.facts["moved_to_wanted_class"] < 1.0


def test_no_pass_holds_more_than_the_bound(trace, monkeypatch):
    """In the optimisation and in what is measured after it; the fit is not among them."""
    held, real = [], surrogate.Stack.forward

    def watched(stack, logits, lengths):
        if not stack.head.requires_grad:
            held.append(4 * logits.numel())
        return real(stack, logits, lengths)

    monkeypatch.setattr(surrogate.Stack, "forward", watched)
    bounded(monkeypatch, trace, sequences=5)
    detect(trace, toward="good", epochs=2)
    assert len(held) == 2 * 10 + 2 + 8 + 5 and max(held) <= surrogate.PASS_BYTES


@pytest.mark.parametrize("name, value", [("l1", -1e-5), ("l1", float("inf")), ("epochs", 0), ("epochs", 1.5),
                                         ("learning_rate", 0), ("start_std", -1.0)])  # fmt: skip
def test_a_setting_out_of_its_range_is_an_error(trace, name, value):
    with pytest.raises(InputError, match=f"the setting {name} is out of its range") as caught:
        detect(trace, toward="good", **{name: value})
    assert f"masc-published with {name}={value!r}" in caught.value.where


def test_a_missing_side_span_or_token_is_an_error(tmp_path, trace):
    with pytest.raises(TraceLabelError, match="one side of the contrast is empty"):
        detect(trace, toward="polite")
    with pytest.raises(TraceLabelError, match="lacks the span 'response'"):
        detect(trace, toward="good", span="response")
    made = planted(tmp_path / "t", each=4, spans=SPAN, lengths={"good": (0, 1)})
    with pytest.raises(TraceLabelError, match="no token in the span 'final_user'") as caught:
        detect(made, toward="good")
    assert "0 sequences labelled 'good', 4 others" in caught.value.where

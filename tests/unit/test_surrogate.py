"""detection/surrogate.py against torch's own layers, and the laws of a stack.

Legend: G surrogates, B sequences, T tokens, L layers, E experts, H hidden.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moesteer.detection import surrogate
from moesteer.detection.surrogate import HIDDEN, KINDS, PROJECTION, Sequences, Stack, accuracy, fit
from moesteer.errors import NanLogitsError, UnknownNameError

LAYERS, EXPERTS = 3, 5
LENGTHS = (4, 1, 7, 2)


def drawn(rng, length):
    """Logits [T, L, E] of one sequence."""
    return rng.normal(0.5, 2.0, size=(length, LAYERS, EXPERTS)).astype(np.float32)


def padded(seed=0):
    rng = np.random.default_rng(seed)
    return Sequences.of([drawn(rng, length) for length in LENGTHS], [0, 1, 0, 1])


def stack_of(kind, *, seeds=(3, 4), outputs=2):
    """A stack whose weights are all random: the linear one starts at zero, norms at one and zero."""
    stack = Stack(kind, layers=LAYERS, experts=EXPERTS, outputs=outputs, seeds=seeds)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in stack.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    if kind == "linear":
        stack.mean.normal_(generator=generator)
        stack.scale.uniform_(0.5, 2.0, generator=generator)
    return stack.requires_grad_(False)


def torch_recurrence(stack, g):
    """torch.nn.LSTM or GRU with the weights of the g-th surrogate, and an `entering` [B, T, 16 L] made plainly."""
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}[stack.kind]
    layer = kind(PROJECTION * LAYERS, HIDDEN, batch_first=True)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(stack.enter[g].T)
        layer.weight_hh_l0.copy_(stack.turn[g].T)
        layer.bias_ih_l0.copy_(stack.enter_bias[g])
        layer.bias_hh_l0.copy_(stack.turn_bias[g])
    return layer


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrent_surrogate_is_torchs_own_on_packed_sequences(kind):
    """Both biases, the order of the gates, the projection shared by the layers, the last true token."""
    data, stack = padded(), stack_of(kind)
    found = stack(data.logits_NTLE[None], data.lengths_N)
    for g in range(2):
        norm, project = nn.LayerNorm(EXPERTS), nn.Linear(EXPERTS, PROJECTION)
        with torch.no_grad():
            norm.weight.copy_(stack.norm[g])
            norm.bias.copy_(stack.norm_bias[g])
            project.weight.copy_(stack.project[g].T)
            project.bias.copy_(stack.project_bias[g])
            entering = project(norm(data.logits_NTLE)).flatten(2)
            packed = nn.utils.rnn.pack_padded_sequence(entering, data.lengths_N, batch_first=True, enforce_sorted=False)
            _, state = torch_recurrence(stack, g)(packed)
            last = state[0] if kind == "lstm" else state
            expected = last[0] @ stack.head[g] + stack.head_bias[g]
        torch.testing.assert_close(found[g], expected, rtol=1e-5, atol=1e-5)  # sums in another order, float32
    assert (found[0] - found[1]).abs().max() > 0.1


def test_the_linear_surrogate_is_a_map_of_the_mean_over_tokens():
    data, stack = padded(), stack_of("linear")
    found = stack(data.logits_NTLE[None], data.lengths_N).numpy()
    for g in range(2):
        for b, length in enumerate(LENGTHS):
            mean = data.logits_NTLE[b, :length].double().numpy().mean(0).ravel()
            scaled = (mean - stack.mean.numpy()) / stack.scale.numpy()
            expected = scaled @ stack.weight[g].numpy() + stack.bias[g].numpy()
            np.testing.assert_allclose(found[g, b], expected, rtol=1e-5, atol=1e-5)


def test_the_linear_surrogate_is_fitted_on_standardised_means():
    data = padded()
    train = [0, 1, 2]
    means = np.stack([data.logits_NTLE[i, : LENGTHS[i]].numpy().mean(0).ravel() for i in train])
    stack = fit("linear", data, train=train, classes=2, seeds=[0], epochs=1)
    np.testing.assert_allclose(stack.mean, means.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stack.scale, means.std(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_its_surrogates_one_by_one(kind):
    data, stack = padded(), stack_of(kind, seeds=(5, 6, 7))
    together = stack(data.logits_NTLE[None], data.lengths_N)
    for g in range(3):
        one = Stack(kind, layers=LAYERS, experts=EXPERTS, outputs=2, seeds=[g])
        one.load_state_dict({
            name: tensor if name in ("mean", "scale") else tensor[g : g + 1]
            for name, tensor in stack.state_dict().items()
        })  # fmt: skip
        alone = one(data.logits_NTLE[None], data.lengths_N)
        torch.testing.assert_close(together[g : g + 1], alone, rtol=1e-5, atol=1e-5)  # another order of sums
    own_logits = torch.stack([data.logits_NTLE] * 3)  # each surrogate its own logits
    torch.testing.assert_close(stack(own_logits, data.lengths_N), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_start_depends_on_its_own_seed_alone(kind):
    together = Stack(kind, layers=LAYERS, experts=EXPERTS, outputs=1, seeds=(5, 6))
    alone = Stack(kind, layers=LAYERS, experts=EXPERTS, outputs=1, seeds=(6,))
    for (name, tensor), (_, own) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.equal(tensor[1], own[0]), name
    assert not torch.equal(together.project[0], together.project[1])
    assert together.enter.abs().max() <= HIDDEN**-0.5 and together.enter.abs().max() > 0.99 * HIDDEN**-0.5


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_matter(kind):
    """Neither a longer neighbour nor what stands behind the end."""
    data, stack = padded(), stack_of(kind)
    together = stack(data.logits_NTLE[None], data.lengths_N)
    noise = data.logits_NTLE.clone()
    for b, length in enumerate(LENGTHS):
        alone = stack(data.logits_NTLE[b : b + 1, :length][None], torch.tensor([length]))
        torch.testing.assert_close(together[:, b : b + 1], alone, rtol=1e-5, atol=1e-6)
        noise[b, length:] = 1e3
    torch.testing.assert_close(stack(noise[None], data.lengths_N), together, rtol=1e-5, atol=1e-6)


def test_a_part_is_cut_to_its_longest():
    data = padded()
    logits, lengths, labels = data.part(torch.tensor([3, 0]))
    assert logits.shape == (1, 2, 4, LAYERS, EXPERTS)
    assert (lengths.tolist(), labels.tolist()) == ([2, 4], [1, 0])
    assert torch.equal(logits[0, 1], data.logits_NTLE[0, :4])


def test_losses_and_classes_are_torchs():
    verdicts = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0])
    one, three = stack_of("linear", outputs=1), stack_of("linear", outputs=3)
    expected = [nn.functional.binary_cross_entropy_with_logits(v[:, 0], labels.float()) for v in verdicts]
    torch.testing.assert_close(one.loss(verdicts, labels), torch.stack(expected))
    assert torch.equal(one.classes(verdicts), (verdicts[..., 0].sigmoid() > 0.5).long())
    verdicts = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    expected = [nn.functional.cross_entropy(v, labels) for v in verdicts]
    torch.testing.assert_close(three.loss(verdicts, labels), torch.stack(expected))
    assert torch.equal(three.classes(verdicts), verdicts.argmax(-1))


def test_an_unknown_kind_is_refused():
    with pytest.raises(UnknownNameError, match="no surrogate 'mlp'") as caught:
        Stack("mlp", layers=1, experts=2, outputs=1, seeds=[0])
    assert caught.value.expected == "lstm, gru, linear"


# ---------------------------------------------------------------- fitting


def planted(count=60, *, classes=2, seed=0, strength=2.0):
    """Class c leans to expert c in layer 1."""
    rng = np.random.default_rng(seed)
    sequences, labels = [], []
    for i in range(count):
        logits = drawn(rng, int(rng.integers(2, 6)))
        logits[:, 1, i % classes] += strength
        sequences.append(logits)
        labels.append(i % classes)
    return Sequences.of(sequences, labels)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_finds_a_planted_difference_in_what_was_held_out(kind, classes):
    data = planted(classes=classes, count=90, strength=6.0)
    stack = fit(kind, data, train=range(60), classes=classes, seeds=[0, 1], epochs=30, batch=20)
    assert accuracy(stack, data, range(60, 90)).min() > 0.9
    nothing = planted(classes=classes, count=90, strength=0.0)
    stack = fit(kind, nothing, train=range(60), classes=classes, seeds=[0, 1], epochs=30, batch=20)
    assert accuracy(stack, nothing, range(60, 90)).max() < 0.8
    assert not any(p.requires_grad for p in stack.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_of_several_seeds_is_the_fits_of_each(kind):
    """In one batch, whose order does not matter; in several, the order is that of the least seed, for all of a stack.

    A gradient near zero has a sign by rounding, and Adam's step is its sign: verdicts agree to 1e-2, not to 1e-6.
    """
    data, train = planted(strength=4.0), range(40)
    given = {"train": train, "classes": 2}
    together = fit(kind, data, seeds=[2, 9], **given)
    for g, seed in enumerate((2, 9)):
        alone = fit(kind, data, seeds=[seed], **given)
        mine, own = together(data.logits_NTLE[None], data.lengths_N)[g], alone(data.logits_NTLE[None], data.lengths_N)
        torch.testing.assert_close(mine, own[0], rtol=1e-2, atol=1e-2)
        assert accuracy(together, data, range(40, 60))[g] == accuracy(alone, data, range(40, 60))[0]
    batches = fit(kind, data, seeds=[2, 9], batch=7, **given)(data.logits_NTLE[None], data.lengths_N)[0]
    alone = fit(kind, data, seeds=[2], batch=7, **given)(data.logits_NTLE[None], data.lengths_N)[0]
    torch.testing.assert_close(batches, alone, rtol=2e-2, atol=2e-2)


def test_the_linear_fit_is_at_its_optimum_and_knows_no_seed():
    """The gradient of mean cross-entropy and ridge is zero, on a problem that many experts tell apart a little."""
    data, train = planted(strength=1.0), list(range(40))
    stack = fit("linear", data, train=train, classes=2, seeds=[3, 8])
    torch.testing.assert_close(stack.weight[0], stack.weight[1], rtol=1e-2, atol=1e-3)
    stack.requires_grad_(True)
    logits, lengths, labels = data.part(torch.tensor(train))
    loss = stack.loss(stack(logits, lengths), labels).sum() + surrogate.RIDGE / 2 * stack.weight.square().sum()
    loss.backward()
    assert stack.weight.grad.abs().max() < 1e-3 and stack.bias.grad.abs().max() < 1e-3
    assert stack.weight.abs().max() > 0.3


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_same_seed_gives_the_same_weights(kind):
    data = planted()
    one, two = (fit(kind, data, train=range(40), classes=2, seeds=[1], epochs=3, batch=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = fit(kind, data, train=range(40), classes=2, seeds=[2], epochs=3, batch=16)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_fit_sees_nothing_of_what_is_held_out():
    data = planted()
    spoilt = Sequences(data.logits_NTLE.clone(), data.lengths_N, data.labels_N.clone())
    spoilt.logits_NTLE[40:] = 99.0
    spoilt.labels_N[40:] = 0
    for kind in KINDS:
        one, two = (fit(kind, some, train=range(40), classes=2, seeds=[0], epochs=2) for some in (data, spoilt))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_accuracy_is_a_share_in_batches_and_nan_of_nothing():
    data = planted(count=7)
    stack = stack_of("lstm", outputs=1)
    right = (stack.classes(stack(data.logits_NTLE[None], data.lengths_N)) == data.labels_N).float()
    np.testing.assert_allclose(accuracy(stack, data, range(7), batch=3), right.mean(1))
    np.testing.assert_allclose(accuracy(stack, data, [1, 4]), right[:, [1, 4]].mean(1))
    assert np.isnan(accuracy(stack, data, [])).tolist() == [True, True]


def test_parts_that_fit_make_up_what_was_chosen(monkeypatch):
    """A sequence of 7 tokens, 3 layers and 5 experts is 420 bytes, whatever is shorter; one is the least."""
    data, chosen = padded(), torch.tensor([3, 0, 2])
    for copies, size, expected in [(1, 420 * 3, [3]), (1, 420 * 3 - 1, [2, 1]), (2, 420 * 3, [1, 1, 1]),
                                   (2, 420 * 6, [3]), (5, 1, [1, 1, 1])]:  # fmt: skip
        monkeypatch.setattr(surrogate, "PASS_BYTES", size)
        parts = data.passes(chosen, copies=copies)
        assert [len(part) for part in parts] == expected and torch.equal(torch.cat(parts), chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_an_accuracy_in_several_passes_is_that_in_one(kind, monkeypatch):
    data = planted(count=23)
    stack = fit(kind, data, train=range(10), classes=2, seeds=[0, 1], epochs=2)
    whole = accuracy(stack, data, range(23))
    assert whole.min() > 0.5 and not np.array_equal(whole, np.ones(2))
    seen, real = [], Stack.forward

    def watched(stack, logits, lengths):
        seen.append(4 * logits.numel() * 2)
        return real(stack, logits, lengths)

    monkeypatch.setattr(Stack, "forward", watched)
    monkeypatch.setattr(surrogate, "PASS_BYTES", 4 * data.logits_NTLE[0].numel() * 2 * 5)
    np.testing.assert_array_equal(accuracy(stack, data, range(23)), whole)
    assert len(seen) == 5 and max(seen) <= surrogate.PASS_BYTES
    seen.clear()
    np.testing.assert_array_equal(accuracy(stack, data, range(23), batch=3), whole)
    assert len(seen) == 8


def test_a_fit_that_diverges_is_said():
    data = planted()
    data.logits_NTLE[5, 0, 0, 0] = torch.inf
    with pytest.raises(NanLogitsError, match="the gru surrogate's loss is not finite"):
        surrogate.fit("gru", data, train=range(40), classes=2, seeds=[0])

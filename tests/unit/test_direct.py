"""detection/direct.py and backends/checkpointing.py on tiny random models: the objective by hand, and its laws.

Legend: L layers, E experts, T response tokens, V vocabulary.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moesteer import files
from moesteer.backends.chat import Encoded
from moesteer.backends.checkpointing import checkpointed
from moesteer.backends.layers import decoder_layers
from moesteer.detection import direct
from moesteer.detection.direct import detect
from moesteer.errors import EmptyDataError, InputError, NanLogitsError, NoEffectError
from tests.tiny_families import TINY
from tests.unit.responses_by_hand import conversations, entries, pushed, run_with, same, sigma_of

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
"""The last selects by a correction bias, within groups."""
QUICK = {"steps": 8, "targets_per_step": 3, "keeps_per_step": 4, "l1": 1e-3, "response_tokens": 5}


def given(model, *, targets=4, keeps=5, seed=1):
    return {
        "targets": conversations(targets, seed=seed), "keeps": conversations(keeps, seed=seed + 100),
        "sigma_L": sigma_of(model), "toward": "refuse",
    }  # fmt: skip


def strength(model, **options):
    return detect(model, **{**given(model), **QUICK, **options}).mask.strength_LE


def cross_entropy(model, targets, strength_LE, *, most):
    """Mean over all tokens of all targets, one conversation at a time."""
    found = []
    for one in targets:
        log_p_TV, _ = run_with(model, one, strength_LE, most=most)
        start, end = one.spans["response"]
        found += [-float(log_p_TV[t, i]) for t, i in enumerate(one.token_ids[start : min(end, start + most)])]
    return np.mean(found)


def divergence(model, keeps, strength_LE, *, most):
    """KL(unsteered || steered), mean over all tokens of all keeps."""
    found = []
    for one in keeps:
        own_TV, _ = run_with(model, one, np.zeros_like(strength_LE), most=most)
        there_TV, _ = run_with(model, one, strength_LE, most=most)
        found += (own_TV.exp() * (own_TV - there_TV)).sum(-1).tolist()
    return np.mean(found)


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("name", FAMILIES)
def test_the_losses_are_the_cross_entropy_and_the_divergence(model_of, name):
    """Of the first step at S = 0, and of a second at the S of the first; all conversations in every step."""
    model = model_of(name)
    options = {**given(model), **QUICK, "targets_per_step": 9, "keeps_per_step": 9, "learning_rate": 3.0}
    zero = np.zeros((len(model.routers), model.fingerprint.experts))
    one = detect(model, **{**options, "steps": 1, "l1": 0.0})
    change, keep = one.facts["loss_first"]
    assert change == pytest.approx(cross_entropy(model, options["targets"], zero, most=5), rel=1e-5)
    assert keep == pytest.approx(0, abs=1e-6)
    two = detect(model, **{**options, "steps": 2, "l1": 0.0})
    there = one.mask.strength_LE.astype(np.float64)
    mean = [2 * last - first for last, first in zip(two.facts["loss_last"], two.facts["loss_first"], strict=True)]
    assert mean[0] == pytest.approx(cross_entropy(model, options["targets"], there, most=5), rel=1e-4)
    assert mean[1] == pytest.approx(divergence(model, options["keeps"], there, most=5), rel=1e-3, abs=1e-5)
    assert mean[1] > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_step_goes_down_the_slope_by_finite_differences(model_of, name):
    """Adam's first step is the sign of the gradient times its rate, less what the L1 term takes."""
    model, step, compared = model_of(name), 0.02, 0
    options = {**given(model), **QUICK, "steps": 1, "targets_per_step": 9, "learning_rate": 0.05, "l1": 0.01}
    found = detect(model, **options).mask.strength_LE
    slopes = {}
    for entry in entries(model):
        ends, steady = [], True
        for size in (step, -step):
            ends.append(cross_entropy(model, options["targets"], pushed(model, entry, size), most=5))
        for one in options["targets"]:
            selections = [run_with(model, one, pushed(model, entry, size), most=5)[1] for size in (step, -step)]
            steady &= same(*selections)
        if steady and abs(ends[0] - ends[1]) / (2 * step) > 1e-3:
            slopes[entry] = (ends[0] - ends[1]) / (2 * step)
    for entry, slope in slopes.items():
        compared += 1
        assert found[entry] == pytest.approx(-np.sign(slope) * 0.04, rel=1e-3), entry
    assert compared >= 5


def test_the_slope_of_a_later_step_is_that_of_both_terms(model_of, monkeypatch):
    """d/dS (cross-entropy + keep_weight KL), by finite differences at the S of the first step; KL weighs most."""
    model, step, slopes, compared = model_of("gpt_oss"), 0.02, [], 0
    real = torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        slopes.append((self.param_groups[0]["params"][0].detach().clone(), self.param_groups[0]["params"][0].grad))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    options = {**given(model, targets=2, keeps=6), **QUICK, "targets_per_step": 9, "keeps_per_step": 9}
    detect(model, **{**options, "steps": 2, "learning_rate": 0.5, "keep_weight": 20.0})
    there_LE, slope_LE = (one.numpy().astype(np.float64) for one in slopes[1])

    def objective(strength_LE):
        harm = divergence(model, options["keeps"], strength_LE, most=5)
        return cross_entropy(model, options["targets"], strength_LE, most=5) + 20.0 * harm

    for entry in entries(model)[::2]:
        ends = [there_LE + pushed(model, entry, size) for size in (step, -step)]
        if all(
            same(*(run_with(model, one, end, most=5)[1] for end in ends))
            for one in options["targets"] + options["keeps"]
        ):
            compared += 1
            expected = (objective(ends[0]) - objective(ends[1])) / (2 * step)
            assert slope_LE[entry] == pytest.approx(expected, rel=0.03, abs=2e-3), entry
    assert compared >= 3 and np.abs(slope_LE).max() > 0.05


def test_the_wanted_responses_become_likely(model_of):
    model = model_of("gpt_oss")
    options = {**given(model), **QUICK, "steps": 30}
    found = detect(model, **options)
    zero = np.zeros_like(found.mask.strength_LE)
    before, after = (cross_entropy(model, options["targets"], s, most=5) for s in (zero, found.mask.strength_LE))
    assert after < before - 0.05
    assert found.facts["loss_last"][0] < found.facts["loss_first"][0]


def test_what_is_kept_holds_the_strengths_down(model_of):
    model = model_of("gpt_oss")
    options = {**given(model), **QUICK, "steps": 30}
    found = {weight: detect(model, **{**options, "keep_weight": weight}).mask.strength_LE for weight in (0.0, 4.0, 1e3)}
    sizes = [float(np.abs(s).sum()) for s in found.values()]
    harms = [divergence(model, options["keeps"], s, most=5) for s in found.values()]
    assert sizes[0] > sizes[1] > 2 * sizes[2] and harms[0] > harms[1] > 2 * harms[2]


def test_a_larger_l1_leaves_fewer_experts_and_one_too_large_none(model_of):
    model = model_of("qwen3_moe")
    counts = [np.count_nonzero(strength(model, steps=20, l1=l1)) for l1 in (0.0, 0.02, 0.045)]
    assert counts[0] > counts[1] > counts[2] > 0
    with pytest.raises(NoEffectError, match="direct ended with no entry"):
        strength(model, l1=0.2)


def test_only_the_first_response_tokens_count(model_of):
    model, options = model_of("qwen3_moe"), given(model_of("qwen3_moe"))
    cut = {
        side: [Encoded(t.token_ids[: start + 2], {"response": (start, start + 2)})
               for t in options[side] for start in (t.spans["response"][0],)]
        for side in ("targets", "keeps")
    }  # fmt: skip
    one, two = (strength(model, response_tokens=2, **some) for some in ({}, cut))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_only_the_layers_named_are_steered_and_so_many_conversations_used(model_of):
    model = model_of("qwen3_moe")
    found = strength(model, layers=[1])
    assert found[1].any() and not found[[0, 2]].any()
    with pytest.raises(InputError, match="no layers 9"):
        strength(model, layers=[9])
    with pytest.raises(InputError, match="no list of whole numbers"):
        strength(model, layers=3)
    masks = [detect(model, **given(model), **QUICK, layers=some).mask for some in ([1, 2], (2, 1, 1), np.array([2, 1]))]
    assert [mask.info.settings["layers"] for mask in masks] == [[1, 2]] * 3
    assert len({mask.to_bytes() for mask in masks}) == 1
    info = detect(model, **given(model), **QUICK, conversations=2).mask.info
    assert (info.settings["targets"], info.settings["keeps"], info.settings["conversations"]) == (2, 2, 2)


# ---------------------------------------------------------------- passes, memory and time


@pytest.mark.parametrize("name", FAMILIES)
def test_small_passes_give_what_one_pass_gives(model_of, name):
    """The sums are the same in another order; the tolerance is what eight Adam steps make of float32 rounding."""
    model = model_of(name)
    whole = strength(model)
    for positions in (1, 25, 60):
        np.testing.assert_allclose(strength(model, pass_positions=positions), whole, atol=1e-5)


def test_a_pass_is_never_larger_than_it_may_be(model_of):
    model, seen = model_of("qwen3_moe"), []

    def watched(sequences, **options):
        seen.append((len(sequences), max(len(s.token_ids) for s in sequences)))
        return model.response_logits(sequences, **options)

    spy = SimpleNamespace(fingerprint=model.fingerprint, hf=model.hf, response_logits=watched)
    found = detect(spy, **given(model), **QUICK, pass_positions=30)
    assert all(rows * longest <= 30 or rows == 1 for rows, longest in seen) and max(rows for rows, _ in seen) > 1
    assert found.facts["steps"] == 8


def test_the_teacher_is_the_same_stored_or_computed_anew(model_of, monkeypatch):
    model = model_of("gpt_oss")
    stored = strength(model, pass_positions=40)
    monkeypatch.setattr(direct, "TEACHER_BYTES", 0)
    np.testing.assert_allclose(strength(model, pass_positions=40), stored, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, "phimoe", "dbrx", "jamba", "llama4_text"])
def test_checkpointing_gives_the_same_gradient(model_of, name):
    """Where the routers are steered: a layer computed again without the steering has another gradient."""
    model, some = model_of(name), conversations(4, seed=3)
    table_LE = torch.randn((len(model.routers), model.fingerprint.experts), generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointing in (False, True):
        bias_LE = table_LE.clone().requires_grad_(True)
        logits = model.response_logits(some, bias_LE=bias_LE, most=5, checkpointing=checkpointing)
        found.append((logits.detach(), *torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), bias_LE)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)
    assert found[0][1].abs().max() > 1e-3 and not model.tap.attached


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_gives_the_same_strengths(model_of, name):
    model = model_of(name)
    np.testing.assert_allclose(strength(model, checkpointing=True), strength(model), atol=1e-5)


def test_checkpointing_keeps_the_inputs_of_the_layers_and_little_else(model_of):
    """Bytes of all that autograd saves in the forward pass; the layers' own inputs, which it also keeps, are added."""
    model, some = model_of("qwen3_moe"), conversations(6, seed=3)
    layers = decoder_layers(model)
    kept = {}
    for checkpointing in (False, True):
        saved, inputs = {}, []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].numel() * 4))  # noqa: B023
            for layer in layers.values()
        ]

        def note(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()  # noqa: B023
            return tensor

        bias_LE = torch.zeros((len(model.routers), model.fingerprint.experts), requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits = model.response_logits(some, bias_LE=bias_LE, most=5, checkpointing=checkpointing)
        kept[checkpointing] = sum(saved.values()) + checkpointing * sum(inputs)
        assert len(inputs) == 3 and logits.requires_grad
        for hook in hooks:
            hook.remove()
    assert kept[True] < 0.5 * kept[False]


def test_layers_are_themselves_after_a_checkpointed_block(model_of):
    layers = decoder_layers(model_of("qwen3_moe"))
    own = {i: layer.forward for i, layer in layers.items()}
    layers[1].__dict__["forward"] = replaced = lambda *a, **k: None
    try:
        with pytest.raises(KeyError), checkpointed(layers):
            assert all("forward" in layer.__dict__ for layer in layers.values())
            assert layers[1].forward is not replaced
            raise KeyError
        assert layers[1].__dict__["forward"] is replaced
    finally:
        del layers[1].__dict__["forward"]
    assert all("forward" not in layer.__dict__ and layer.forward == own[i] for i, layer in layers.items())


# ---------------------------------------------------------------- early ends


class Reads:
    """A model that counts the positions of every pass (rows x longest): those unsteered, and those for a step."""

    def __init__(self, model):
        self.model, self.fingerprint, self.hf, self.unsteered, self.steered = model, model.fingerprint, model.hf, 0, 0

    def response_logits(self, sequences, *, bias_LE, **options):
        positions = len(sequences) * max(len(one.token_ids) for one in sequences)
        if bias_LE is None:
            self.unsteered += positions
        else:
            self.steered += positions
        return self.model.response_logits(sequences, bias_LE=bias_LE, **options)


@pytest.mark.parametrize("teacher_bytes", [0, 10**9])
def test_the_tokens_are_all_that_the_model_reads(model_of, monkeypatch, teacher_bytes):
    """The unsteered passes over the keeps among them, whether they are made once or again in each step."""
    monkeypatch.setattr(direct, "TEACHER_BYTES", teacher_bytes)
    model = Reads(model_of("qwen3_moe"))
    found = detect(model, **given(model.model), **QUICK, pass_positions=60)
    assert found.facts["tokens"] == model.unsteered + model.steered
    once = sum(len(one.token_ids) for one in given(model.model)["keeps"])
    assert (model.unsteered > 3 * once) == (teacher_bytes == 0)


@pytest.mark.parametrize("teacher_bytes", [0, 10**9])
def test_max_tokens_ends_early(model_of, monkeypatch, teacher_bytes):
    monkeypatch.setattr(direct, "TEACHER_BYTES", teacher_bytes)
    model = model_of("qwen3_moe")
    whole = detect(model, **given(model), **QUICK)
    assert (whole.facts["steps"], whole.facts["ended_by"]) == (8, "steps")
    cut = detect(model, **given(model), **QUICK, max_tokens=whole.facts["tokens"] // 2)
    assert cut.facts["ended_by"] == "max_tokens" and cut.facts["steps"] in (3, 4, 5)
    assert cut.facts["tokens"] >= whole.facts["tokens"] // 2
    ample = detect(model, **given(model), **QUICK, max_tokens=10**9)
    np.testing.assert_array_equal(ample.mask.strength_LE, whole.mask.strength_LE)
    exact = detect(model, **given(model), **QUICK, max_tokens=whole.facts["tokens"] + 1)  # nearly spent at every step
    assert (exact.facts["steps"], exact.facts["ended_by"]) == (8, "steps")


def test_the_pass_over_the_keeps_leaves_that_much_less_for_the_steps(model_of):
    """Many keeps: the bound is passed by less than a step, and the learning rate has fallen by then."""
    model = Reads(model_of("qwen3_moe"))
    options = {**given(model.model, keeps=40), **QUICK}
    detect(model, **{**options, "steps": 1})
    first, step, bound = model.unsteered, model.steered, model.unsteered + 3 * model.steered // 2
    assert first > 3 * step
    found = detect(model.model, **options, max_tokens=bound)
    assert found.facts["ended_by"] == "max_tokens" and found.facts["steps"] in (2, 3)
    assert bound <= found.facts["tokens"] < bound + 1.5 * step


def test_one_step_is_made_whatever_the_bounds(model_of):
    """The pass over the keeps alone is more than they allow; the one step is a whole one."""
    model = model_of("qwen3_moe")
    one = detect(model, **given(model), **{**QUICK, "steps": 1})
    for bound in ("max_tokens", "max_seconds"):
        found = detect(model, **given(model), **QUICK, **{bound: 1e-6})
        assert (found.facts["steps"], found.facts["ended_by"]) == (1, bound)
        np.testing.assert_array_equal(found.mask.strength_LE, one.mask.strength_LE)


def test_max_seconds_ends_early(model_of, monkeypatch):
    """By a clock of its own: the pass over the keeps takes 3 s, and each step, two of which fit into the other 5."""
    model, clock = model_of("qwen3_moe"), iter(range(0, 10**6, 3))
    monkeypatch.setattr(direct, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = detect(model, **given(model), **QUICK, max_seconds=8)
    assert (found.facts["steps"], found.facts["ended_by"], found.facts["seconds"]) == (2, "max_seconds", 9)


def test_the_learning_rate_has_fallen_by_an_early_end(model_of):
    """The rate of each step is 2 (1 - what is spent), at most 1: with 2.5 steps' tokens it is 1, 1, 0.4 or so."""
    model, rates = model_of("qwen3_moe"), []
    real = torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"] / 0.05)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", watched)
        detect(model, **given(model), **{**QUICK, "steps": 10})
        assert rates == pytest.approx([min(1, 2 * (1 - i / 10)) for i in range(10)])
        rates.clear()
        cut = detect(model, **given(model), **{**QUICK, "steps": 10}, max_tokens=350)
        assert cut.facts["ended_by"] == "max_tokens" and len(rates) < 10
        assert rates[0] == 1 and rates == sorted(rates, reverse=True) and rates[-1] < 0.7


# ---------------------------------------------------------------- going on with a saved state


class Fails:
    """A model whose `response_logits` breaks at a call, or never; counts calls."""

    def __init__(self, model, *, at=None):
        self.model, self.fingerprint, self.hf, self.at, self.calls = model, model.fingerprint, model.hf, at, 0

    def response_logits(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.model.response_logits(*args, **kwargs)


@pytest.fixture
def halted(model_of, tmp_path, monkeypatch):
    """(model, state file of six whole steps, bytes of an uninterrupted mask, its number of calls)."""
    monkeypatch.setattr(direct, "SAVE_EVERY_S", -1.0)
    model, state = model_of("gpt_oss"), tmp_path / "direct.state"
    whole = Fails(model)
    expected = detect(whole, **given(model), **QUICK, data_sha256="d" * 64).mask.to_bytes()
    with pytest.raises(KeyboardInterrupt):
        first = Fails(model, at=whole.calls - 1)
        detect(first, **given(model), **QUICK, data_sha256="d" * 64, state=state)
    assert state.exists()
    return model, state, expected, whole.calls


def gone_on(model, state, **options):
    spy = Fails(model)
    found = detect(spy, **{**given(model), **QUICK, "data_sha256": "d" * 64, "state": state, **options})
    assert not state.exists()
    return found, spy.calls


def test_a_run_goes_on_from_its_state_to_the_same_bytes(halted):
    model, state, expected, calls = halted
    found, more = gone_on(model, state)
    assert found.mask.to_bytes() == expected
    assert more == calls - 6  # the teacher again, and the two steps that were missing
    assert found.facts["steps"] == 8


@pytest.mark.parametrize("bits", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_changed_byte_makes_it_start_anew(halted, bits):
    """Anywhere in the file: header, plan, or the tensors themselves."""
    model, state, expected, calls = halted
    data = bytearray(state.read_bytes())
    data[int(bits * len(data))] ^= 0x10
    state.write_bytes(bytes(data))
    found, more = gone_on(model, state)
    assert (found.mask.to_bytes(), more) == (expected, calls)


def bare(metadata):
    """A safetensors file of nothing but metadata."""
    header = files.dumps({"__metadata__": metadata}, indent=None).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data", [bare({"direct": some}) for some in ("[]", "null", '"text"', '{"plan": 1}', '{"sha256": 1}', "[" * 5000)]
)
def test_a_state_of_something_else_makes_it_start_anew(halted, data):
    model, state, expected, calls = halted
    state.write_bytes(data)
    found, more = gone_on(model, state)
    assert (found.mask.to_bytes(), more) == (expected, calls)


@pytest.mark.parametrize("said", ['\\"tokens\\": ', '\\"before_s\\": 0.', '\\"losses\\": [['])
def test_a_number_that_was_changed_makes_it_start_anew(halted, said):
    """The digest is of all that the state holds, not of its tensors alone."""
    model, state, expected, calls = halted
    data = bytearray(state.read_bytes())
    place = data.index(said.encode()) + len(said)
    data[place] = ord("1") + (data[place] - ord("0")) % 9
    state.write_bytes(data)
    found, more = gone_on(model, state)
    assert (found.mask.to_bytes(), more, found.facts["tokens"] < 10**4) == (expected, calls, True)


def mask_file():
    header = files.dumps({"__metadata__": {"moesteer": files.dumps({"method": "direct"})}, "direct": {}}, indent=None)
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00" * 7, b"garbage" * 50, (1 << 60).to_bytes(8, "little"), b"\x02" + b"\x00" * 7 + b"[]", bare({}),
        bare("text"), bare({"other": "direct"}), b"my own words about \"direct\"", mask_file(),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_ours_is_left_as_it_is(model_of, tmp_path, monkeypatch, data):
    monkeypatch.setattr(direct, "SAVE_EVERY_S", -1.0)
    model, precious = Fails(model_of("gpt_oss")), tmp_path / "precious.txt"
    precious.write_bytes(data)
    with pytest.raises(InputError, match="none of direct's") as caught:
        detect(model, **given(model.model), **QUICK, state=precious)
    assert str(precious) in caught.value.where and caught.value.expected and caught.value.do
    assert precious.read_bytes() == data and model.calls == 0
    assert [one.name for one in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to a folder"])
def test_a_state_that_is_no_file_is_refused_and_left_as_it_is(model_of, tmp_path, kind):
    model, place = Fails(model_of("gpt_oss")), tmp_path / "place"
    if kind == "folder":
        place.mkdir()
        (place / "kept").write_text("kept")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / "nothing" if kind == "link to nothing" else tmp_path)
    with pytest.raises(InputError, match="it is no regular file"):
        detect(model, **given(model.model), **QUICK, state=place)
    assert os.path.lexists(place) and model.calls == 0
    assert kind != "folder" or (place / "kept").read_text() == "kept"


def test_a_state_may_be_named_by_a_text(halted):
    model, state, expected, _ = halted
    found = detect(model, **given(model), **QUICK, data_sha256="d" * 64, state=str(state))
    assert found.mask.to_bytes() == expected and not state.exists()


@pytest.mark.parametrize("teacher_bytes", [0, 10**9])
def test_a_run_with_max_tokens_goes_on_to_the_same_bytes(model_of, tmp_path, monkeypatch, teacher_bytes):
    """What was read before the kill counts, and the first pass over the keeps counts once: the same rates, and end."""
    monkeypatch.setattr(direct, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(direct, "TEACHER_BYTES", teacher_bytes)
    model, state = model_of("gpt_oss"), tmp_path / "direct.state"
    most = 2 * detect(model, **given(model), **QUICK).facts["tokens"] // 3
    options = {**given(model), **QUICK, "pass_positions": 50, "max_tokens": most}
    whole = Fails(model)
    expected = detect(whole, **options)
    assert expected.facts["ended_by"] == "max_tokens" and 3 < expected.facts["steps"] < 8
    for at in (whole.calls // 2, whole.calls - whole.calls // 3):
        with pytest.raises(KeyboardInterrupt):
            detect(Fails(model, at=at), **options, state=state)
    assert state.exists()
    last = Fails(model)
    found = detect(last, **options, state=state)
    assert last.calls < whole.calls and not state.exists()
    assert found.mask.to_bytes() == expected.mask.to_bytes()
    names = ("steps", "tokens", "ended_by", "loss_first", "loss_last")
    assert [found.facts[name] for name in names] == [expected.facts[name] for name in names]


def test_a_torn_state_makes_it_start_anew(halted):
    model, state, expected, calls = halted
    state.write_bytes(state.read_bytes()[:-1])
    found, more = gone_on(model, state)
    assert (found.mask.to_bytes(), more) == (expected, calls)


@pytest.mark.parametrize(
    "option", [{"seed": 1}, {"l1": 2e-3}, {"data_sha256": "e" * 64}, {"targets": conversations(4, seed=2)}]
)
def test_the_state_of_another_plan_is_left_behind(halted, option):
    model, state, _, calls = halted
    expected = detect(model, **{**given(model), **QUICK, "data_sha256": "d" * 64, **option}).mask.to_bytes()
    found, more = gone_on(model, state, **option)
    assert (found.mask.to_bytes(), more) == (expected, calls)


# ---------------------------------------------------------------- the model is left as it was


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("at", [None, 1, 2, 5])
def test_the_model_is_left_as_it_was(model_of, at, checkpointing):
    """After a whole run, and after one that broke off in the teacher, in the first step or later."""
    model = model_of("deepseek_v3")
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    forwards = {name: m.__dict__.get("forward") for name, m in model.hf.named_modules()}
    trained = {name: p.requires_grad for name, p in model.hf.named_parameters()}
    model.hf.requires_grad_(False)
    model.hf.get_output_embeddings().weight.requires_grad_(True)
    try:
        options = {**given(model), **QUICK, "steps": 3, "checkpointing": checkpointing}
        if at is None:
            detect(model, **options)
        else:
            with pytest.raises(KeyboardInterrupt):
                detect(Fails(model, at=at), **options)
        assert [name for name, p in model.hf.named_parameters() if p.requires_grad] == ["lm_head.weight"]
        assert all(p.grad is None for p in model.hf.parameters())
    finally:
        for name, p in model.hf.named_parameters():
            p.requires_grad_(trained[name])
    assert not model.tap.attached
    assert {name: m.__dict__.get("forward") for name, m in model.hf.named_modules()} == forwards
    assert all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())


def test_a_recomputation_that_breaks_leaves_no_steering(model_of):
    model, some = model_of("qwen3_moe"), conversations(2, seed=3)
    bias_LE = torch.zeros((len(model.routers), model.fingerprint.experts), requires_grad=True)
    logits = model.response_logits(some, bias_LE=bias_LE, most=3, checkpointing=True)

    def breaks(*_):
        assert model.tap.attached  # it is computed again as it was: steered
        raise KeyError("broken")

    hook = decoder_layers(model)[1].mlp.register_forward_pre_hook(breaks)
    try:
        with pytest.raises(KeyError, match="broken"):
            torch.autograd.grad(logits.sum(), bias_LE)
    finally:
        hook.remove()
    assert not model.tap.attached


# ---------------------------------------------------------------- provenance and errors


def test_the_mask_says_how_it_was_made_and_the_same_seed_gives_the_same_bytes(model_of):
    model = model_of("gpt_oss")
    found = detect(model, **given(model), **QUICK, data_sha256="d" * 64)
    info = found.mask.info
    assert (info.method, info.intent.toward, info.data_sha256) == ("direct", "refuse", "d" * 64)
    assert info.fingerprint == model.fingerprint
    assert {**QUICK, "targets": 4, "keeps": 5, "seed": 0, "checkpointing": False}.items() <= info.settings.items()
    assert {*direct.METHOD.settings, "seed", "targets", "keeps"} == set(info.settings)
    np.testing.assert_array_equal(found.mask.sigma_L, sigma_of(model))
    np.testing.assert_array_equal(found.scores_LE, found.mask.strength_LE)
    again = detect(model, **given(model), **QUICK, data_sha256="d" * 64)
    assert again.mask.to_bytes() == found.mask.to_bytes()
    assert detect(model, **given(model), **QUICK, seed=1).mask.to_bytes() != found.mask.to_bytes()
    numbers = {name: np.float32(v) if name == "l1" else np.int64(v) for name, v in QUICK.items()}
    settings = detect(model, **given(model), **numbers, seed=np.int64(0), data_sha256="d" * 64).mask.info.settings
    assert settings == {**info.settings, "l1": float(np.float32(QUICK["l1"]))}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_constant_weight_is_no_mask(model_of, monkeypatch, name):
    """A renormalised top-1 router gives its one expert the weight 1 whatever its logits: there is no gradient."""
    monkeypatch.setitem(TINY, f"{name}/direct-top-1", {**TINY[name], "num_experts_per_tok": 1})
    model = model_of(f"{name}/direct-top-1")
    for l1 in (0.0, 1e-3):
        with pytest.raises(NoEffectError, match="the router logits have no gradient"):
            strength(model, l1=l1)


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0), ("steps", 2.5), ("targets_per_step", 0), ("keeps_per_step", -1), ("response_tokens", 0),
        ("pass_positions", 0), ("keep_weight", -1), ("l1", -1e-9), ("l1", float("nan")), ("learning_rate", 0),
        ("learning_rate", "fast"), ("max_tokens", 0), ("max_seconds", -1.0), ("max_seconds", float("inf")),
        ("conversations", 0), ("conversations", True),
    ],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_an_error(model_of, name, value):
    with pytest.raises(InputError, match=f"the setting {name} is out of its range") as caught:
        strength(model_of("gpt_oss"), **{name: value})
    assert f"direct with {name}={value!r}" in caught.value.where


@pytest.mark.parametrize("missing", ["targets", "keeps"])
def test_nothing_to_change_or_keep_is_an_error(model_of, missing):
    with pytest.raises(EmptyDataError, match="needs both") as caught:
        strength(model_of("gpt_oss"), **{missing: []})
    assert ("0 to change" if missing == "targets" else "0 to keep") in caught.value.where
    with pytest.raises(EmptyDataError, match="a conversation has no response"):
        strength(model_of("gpt_oss"), **{missing: [Encoded((1, 2), {"prompt": (0, 2)})]})


def test_numbers_that_are_not_finite_are_said(model_of):
    model = model_of("gpt_oss")
    broken = Fails(model)
    broken.response_logits = lambda *a, **k: model.response_logits(*a, **k) * torch.nan
    with pytest.raises(NanLogitsError, match="the loss is not finite") as caught:
        detect(broken, **given(model), **QUICK)
    assert "step 0 on a gpt_oss" in caught.value.where

"""Directions: their file, backends/residual.py against loops, backends/shifting.py against hooks written here.

The layers' paths are written down per family, not found by the code under test.
"""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_tensors

from moesteer.backends.chat import Encoded
from moesteer.backends.residual import decoder_layers, find, find_all
from moesteer.backends.shifting import shifted
from moesteer.conversations import Message
from moesteer.direction import Direction, DirectionInfo
from moesteer.errors import (
    AlreadySteeredError,
    EmptyDataError,
    InputError,
    MaskContentError,
    MaskFileError,
    MaskMismatchError,
    ModelError,
    MoesteerError,
    NoEffectError,
    NumericsError,
)
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask

FAMILIES = {
    "qwen3_moe": "model.layers.{}",
    "mixtral": "model.layers.{}",
    "gpt_oss": "model.layers.{}",
    "olmoe": "model.layers.{}",
    "deepseek_v3": "model.layers.{}",
    "phimoe": "model.layers.{}",
    "jamba": "model.layers.{}",
    "dbrx": "transformer.blocks.{}",
    "zaya": "model.layers.{}",  # a tuple, hidden states first
    "deepseek_v4": "model.layers.{}",  # several streams: [batch, positions, streams, size]
    "hy_v4": "model.layers.{}",  # a tuple and several streams
}
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
FINGERPRINT = Fingerprint(
    model_type="fake_moe", layer_ids=(1, 2), experts=8, top_k=2, scoring="softmax-topk k=2", router_sha256="ab" * 32
)


def direction(fingerprint=FINGERPRINT, *, layer_id=1, size=32, scale=3.0, seed=0, **changes):
    vector = np.random.default_rng(seed).normal(size=size)
    info = DirectionInfo(
        fingerprint=fingerprint, intent=Intent(toward="refuse"), layer_id=layer_id, scale=scale, **changes
    )
    return Direction(info, (vector / np.linalg.norm(vector)).astype(np.float32))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def after_layer(model, path, input_ids):
    """What a layer returns (its hidden states), seen behind every hook that is there already; and the logits."""
    seen = []
    hook = model.hf.get_submodule(path).register_forward_hook(lambda _m, _a, out: seen.append(first(out).clone()))
    try:
        with torch.inference_mode():
            logits = model.hf(input_ids=input_ids, use_cache=False).logits
    finally:
        hook.remove()
    return seen[0], logits


def ids(rows=4, length=6, seed=0):
    return torch.tensor(np.random.default_rng(seed).integers(5, 60, size=(rows, length)))


def width(model, path):
    return after_layer(model, path, ids(1, 2))[0][0, 0].numel()


def hooks(model):
    """How many modules carry something of somebody's."""
    return sum(len(module._forward_hooks) + ("forward" in module.__dict__) for module in model.hf.modules())


# ---------------------------------------------------------------- the file


def test_a_direction_is_the_same_after_saving_and_loading(tmp_path):
    one = direction(alpha=0.5, settings={"span": "response"}, data_sha256="cd" * 32, accepted_on={"split": "select"})
    one.save(tmp_path / "d.safetensors")
    two = Direction.load(tmp_path / "d.safetensors")
    assert two.info == one.info and two.vector_H.tobytes() == one.vector_H.tobytes() and two.sha256 == one.sha256
    assert two.to_bytes() == one.to_bytes() == (tmp_path / "d.safetensors").read_bytes()
    assert (two.layer_id, two.scale) == (1, 3.0)


def test_other_provenance_keeps_the_vector_and_is_validated():
    one = direction()
    two = one.with_info(alpha=2.0, layer_id=5)
    assert (two.info.alpha, two.layer_id, one.info.alpha) == (2.0, 5, 1.0) and two.vector_H is one.vector_H
    assert two.sha256 != one.sha256
    for wrong in ({"nonsense": 1}, {"scale": 0.0}, {"scale": float("nan")}, {"alpha": float("inf")}, {"layer_id": -1}):
        with pytest.raises(ValueError):
            one.with_info(**wrong)


def test_the_shift_is_alpha_times_scale_times_the_vector():
    one = direction(scale=4.0, alpha=0.5)
    assert one.shift_H().tolist() == [2.0 * float(v) for v in one.vector_H]  # powers of two: exact
    assert one.shift_H(-1.0).tolist() == [-4.0 * float(v) for v in one.vector_H]
    assert not one.shift_H(0.0).any() and one.shift_H().dtype == np.float32


@pytest.mark.parametrize(
    "vector",
    [
        np.ones(4, np.float32), np.zeros(4, np.float32), np.array([np.nan, 1, 0, 0], np.float32),
        np.array([1.0, 0.0]), np.eye(2, dtype=np.float32), np.array([], np.float32),
    ],
    ids=["long", "zero", "nan", "float64", "matrix", "empty"],
)  # fmt: skip
def test_a_vector_that_is_no_unit_vector_is_refused(vector):
    with pytest.raises(MaskContentError, match="the vector is"):
        Direction(direction().info, vector)


@PROPERTY
@given(data=st.data())
def test_a_file_changed_in_any_byte_or_cut_short_is_refused(data):
    whole = direction(size=8).to_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    for bad in (changed, whole[:place]):
        with pytest.raises(MoesteerError):
            Direction.from_bytes(bad, where="x")


def rewritten(change, *, tensors=None, key="moesteer-direction"):
    whole = direction(size=8).to_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(json.loads(whole[8 : 8 + length])["__metadata__"]["moesteer-direction"])
    header |= change
    return save_tensors(tensors or {"vector": direction(size=8).vector_H}, metadata={key: json.dumps(header)})


def test_a_file_rewritten_unchanged_is_accepted():
    assert Direction.from_bytes(rewritten({}), where="x").sha256 == direction(size=8).sha256


@pytest.mark.parametrize(
    "data, part",
    [
        (rewritten({"alpha": 2.0}), "sha256"),
        (rewritten({"sha256": None}), "sha256"),
        (rewritten({"format_version": 2}), "format_version"),
        (rewritten({"scale": -1.0}), "scale"),
        (rewritten({"more": 1}), "more"),
        (rewritten({}, key="moesteer"), "KeyError"),
        (rewritten({}, tensors={"strength": np.zeros(3, np.float32)}), "strength"),
        (rewritten({}, tensors={"vector": -direction(size=8).vector_H}), "sha256"),
        (b"", "not a whole direction"),
        (b"\x80\x04K\x01." * 10, "header claims"),
    ],
)
def test_a_file_of_something_else_is_refused_with_the_reason(data, part):
    with pytest.raises(MaskFileError, match=part) as caught:
        Direction.from_bytes(data, where="here")
    assert caught.value.where == "here"


def test_a_direction_of_another_model_is_refused():
    one = direction()
    one.check_model(FINGERPRINT)
    other = FINGERPRINT.model_copy(update={"router_sha256": "cd" * 32})
    with pytest.raises(MaskMismatchError, match="another model"):
        one.check_model(other)
    one.check_model(other, allow_other_checkpoint=True)
    with pytest.raises(MaskMismatchError) as caught:
        one.check_model(FINGERPRINT.model_copy(update={"experts": 4}), allow_other_checkpoint=True)
    assert "experts" in caught.value.where


# ---------------------------------------------------------------- adding


@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_shift_is_added_to_the_rows_named_and_nothing_to_others(name, model_of):
    model, input_ids = model_of(name), ids()
    layers = len(model.hf.get_submodule(FAMILIES[name].rpartition(".")[0]))
    for layer_id in (0, layers - 1):
        path = FAMILIES[name].format(layer_id)
        before, logits = after_layer(model, path, input_ids)
        size = before[0, 0].numel()
        two = [direction(model.fingerprint, layer_id=layer_id, size=size, seed=seed) for seed in (1, 2)]
        with shifted(model, two, alphas=[0.5, -2.0], rows=[1, 0, 2, 1]) as moved:
            after, other_logits = after_layer(model, path, input_ids)
        for row, (number, alpha) in enumerate([(0, 0.5), (None, 0.0), (1, -2.0), (0, 0.5)]):
            expected = before[row]
            if number is not None:
                shift = np.float32(alpha * 3.0) * two[number].vector_H
                expected = expected + torch.from_numpy(shift).reshape(expected.shape[1:])
                assert not torch.equal(expected, before[row])
            assert torch.equal(after[row], expected)
        assert not torch.allclose(other_logits[0], logits[0])
        again, same_logits = after_layer(model, path, input_ids)
        assert torch.equal(again, before) and torch.equal(same_logits, logits) and hooks(model) == 0
        receipt = moved.receipt
        assert (receipt.layer_ids, receipt.alphas, receipt.calls) == ((layer_id,), (0.5, -2.0), 1)
        assert receipt.positions == receipt.changed == 3 * 6 and receipt.directions[0] == two[0].sha256[:12]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_decoder_layers_are_those_of_the_path(name, model_of):
    model = model_of(name)
    layers = decoder_layers(model)
    assert list(layers) == list(range(len(layers))) and set(model.fingerprint.layer_ids) <= set(layers)
    assert all(layer is model.hf.get_submodule(FAMILIES[name].format(i)) for i, layer in layers.items())


def test_what_a_layer_returns_beside_its_hidden_states_is_passed_on(model_of):
    model, seen = model_of("zaya"), []
    layer = model.hf.get_submodule("model.layers.1")
    size = width(model, "model.layers.1")
    for block in (False, True):
        if block:
            with shifted(model, [direction(model.fingerprint, size=size)]):
                hook = layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
                model.hf(input_ids=ids())
                hook.remove()
        else:
            hook = layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
            model.hf(input_ids=ids())
            hook.remove()
    plain, moved = seen
    assert type(moved) is tuple and len(moved) == len(plain) == 2
    assert torch.equal(moved[1], plain[1]) and not torch.equal(moved[0], plain[0])


def test_directions_of_different_layers_move_their_own_rows(model_of):
    model, input_ids = model_of("mixtral"), ids(2)
    low, high = (direction(model.fingerprint, layer_id=i, seed=i) for i in (0, 2))
    plain = {i: after_layer(model, f"model.layers.{i}", input_ids)[0] for i in (0, 2)}
    with shifted(model, [low, high], rows=[2, 1]):
        both = {i: after_layer(model, f"model.layers.{i}", input_ids)[0] for i in (0, 2)}
    assert torch.equal(both[0][0], plain[0][0])  # the row of the high direction is untouched at the low layer
    assert torch.equal(both[0][1], plain[0][1] + torch.from_numpy(low.shift_H()))
    torch.testing.assert_close(both[2][0], plain[2][0] + torch.from_numpy(high.shift_H()))


def test_minus_zero_stays_minus_zero_in_rows_of_no_direction(model_of, monkeypatch):
    model, input_ids = model_of("mixtral"), ids(2)
    layer = model.hf.get_submodule("model.layers.1")
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: original(*args, **kwargs) * 0.0 * -1.0)
    plain, _ = after_layer(model, "model.layers.1", input_ids)
    with shifted(model, [direction(model.fingerprint)], rows=[0, 1]):
        moved, _ = after_layer(model, "model.layers.1", input_ids)
    assert torch.signbit(plain[0]).any() and torch.equal(moved[0].view(torch.int32), plain[0].view(torch.int32))


def test_fewer_rows_than_the_batch_are_spread_evenly(model_of):
    model, input_ids = model_of("mixtral"), ids(6)
    one = direction(model.fingerprint)
    plain, _ = after_layer(model, "model.layers.1", input_ids)
    with shifted(model, [one], rows=[0, 1, 0]):
        moved, _ = after_layer(model, "model.layers.1", input_ids)
    assert [not torch.equal(a, b) for a, b in zip(plain, moved, strict=True)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(InputError, match="a batch of 6 rows"), shifted(model, [one], rows=[1, 0, 1, 0]):
        after_layer(model, "model.layers.1", input_ids)
    assert hooks(model) == 0


def test_one_rounding_in_the_models_own_dtype(model_of):
    model, input_ids = model_of("qwen3_moe", "bfloat16"), ids()
    one = direction(model.fingerprint, scale=0.3)
    plain, _ = after_layer(model, "model.layers.1", input_ids)
    with shifted(model, [one]):
        moved, _ = after_layer(model, "model.layers.1", input_ids)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, (plain.float() + torch.from_numpy(one.shift_H())).bfloat16())


def test_a_shift_that_rounds_away_is_an_error_and_alpha_0_is_not(model_of):
    model, input_ids = model_of("qwen3_moe", "bfloat16"), ids()
    many = after_layer(model, "model.layers.1", ids(16, 3))[0]
    largest = int(many.abs().amin(dim=(0, 1)).argmax())  # a number that is nowhere near zero, where all would count
    one = direction(model.fingerprint, scale=1e-9)
    tiny = Direction(one.info, np.eye(32, dtype=np.float32)[largest])
    with (
        pytest.raises(NoEffectError, match="changed none of 24 positions"),
        shifted(model, [direction(model.fingerprint), tiny], rows=[1, 1, 2, 2] * 2),
    ):
        after_layer(model, "model.layers.1", ids(16, 3))
    plain, logits = after_layer(model, "model.layers.1", input_ids)
    with shifted(model, [tiny], alphas=[0.0]) as moved:
        same, same_logits = after_layer(model, "model.layers.1", input_ids)
    assert torch.equal(plain, same) and torch.equal(logits, same_logits)
    assert (moved.receipt.positions, moved.receipt.changed, moved.receipt.calls) == (0, 0, 1)


def test_a_block_in_which_the_model_never_ran_is_an_error(model_of):
    model = model_of("mixtral")
    with (
        pytest.raises(NoEffectError, match="did not run layer 1"),
        shifted(model, [direction(model.fingerprint)]),
    ):
        pass
    assert hooks(model) == 0


def test_the_model_is_itself_again_after_an_error_in_the_block(model_of):
    model = model_of("mixtral")
    _, logits = after_layer(model, "model.layers.1", ids())
    with pytest.raises(RuntimeError, match="boom"), shifted(model, [direction(model.fingerprint)]):
        raise RuntimeError("boom")  # and no NoEffectError in its place
    assert hooks(model) == 0 and torch.equal(after_layer(model, "model.layers.1", ids())[1], logits)


def test_inside_and_outside_of_inference_mode(model_of):
    model = model_of("mixtral")
    with shifted(model, [direction(model.fingerprint)]) as moved:
        after_layer(model, "model.layers.1", ids())
        loss = model.hf(input_ids=ids()).logits.sum()
        loss.backward()
    model.hf.zero_grad(set_to_none=True)
    assert moved.receipt.changed == 2 * 4 * 6


@pytest.mark.parametrize(
    "given, error, part",
    [
        ({"alphas": [1.0, 2.0]}, InputError, "2 alphas for 1 directions"),
        ({"alphas": [float("nan")]}, InputError, "not all numbers"),
        ({"rows": [2]}, InputError, "directions that there are not"),
        ({"rows": [-1]}, InputError, "directions that there are not"),
        ({"rows": []}, InputError, "directions that there are not"),
        ({"layer_id": 9}, InputError, "no decoder layer 9"),
        ({"size": 16}, MaskMismatchError, "16 numbers and the residual stream 32"),
        ({"fingerprint": FINGERPRINT}, MaskMismatchError, "another model"),
    ],
)
def test_what_cannot_be_added_is_refused(given, error, part, model_of):
    model = model_of("mixtral")
    kinds = {key: given.pop(key) for key in ("layer_id", "size", "fingerprint") if key in (given := dict(given))}
    one = direction(**{"fingerprint": model.fingerprint, **kinds})
    with pytest.raises(error, match=part), shifted(model, [one], **given):
        after_layer(model, "model.layers.1", ids())
    assert hooks(model) == 0
    with pytest.raises(InputError, match="0 alphas for 0 directions"), shifted(model, []):
        pass


def test_several_directions_without_rows_are_refused(model_of, lab_tiny):
    model = model_of("mixtral")
    two = [direction(model.fingerprint, seed=seed) for seed in (1, 2)]
    with pytest.raises(InputError, match="nothing says which row"), shifted(model, two):
        after_layer(model, "model.layers.1", ids())
    with pytest.raises(InputError, match="nothing says which row"), shifted(model, two) as moved:
        moved.generate([[Message("user", "x")]])
    with pytest.raises(InputError, match="1 rows for 2"), shifted(model, two) as moved:
        moved.generate([[Message("user", "x")]] * 2, rows=[1])


def test_a_layer_that_returns_something_else_is_named_and_keeps_a_forward_of_its_own(model_of, monkeypatch):
    model = model_of("mixtral")
    layer = model.hf.get_submodule("model.layers.1")
    own = lambda *args, **kwargs: {"hidden": 0}  # noqa: E731
    monkeypatch.setattr(layer, "forward", own)
    with pytest.raises(ModelError, match="returns dict"), shifted(model, [direction(model.fingerprint)]):
        model.hf(input_ids=ids())
    assert layer.__dict__["forward"] is own


# ---------------------------------------------------------------- generating

TALKS = [
    [Message("user", "how do i bake the bread")],
    [Message("user", "tell me about the garden please and the river and the tower")],
    [Message("user", "hello"), Message("assistant", "hello"), Message("user", "how do i clean the bread")],
    [Message("user", "what is 3 plus 4")],
    [Message("user", "how do i bake the bread")],
]


def alone(model, talk, one, alpha):
    """A conversation generated by itself, the shift added by a hook of the test's own."""
    shift = torch.from_numpy(np.float32(alpha * one.scale) * one.vector_H)
    hook = model.hf.get_submodule(f"model.layers.{one.layer_id}").register_forward_hook(lambda _m, _a, out: out + shift)
    try:
        return model.generate([talk], max_new_tokens=5)[0]
    finally:
        hook.remove()


def test_each_conversation_is_generated_with_its_own_direction(lab_tiny):
    size = width(lab_tiny, "model.layers.0")
    two = [direction(lab_tiny.fingerprint, layer_id=i, size=size, seed=i, scale=40.0) for i in (2, 4)]
    alphas, rows = [2.0, -10.0], [2, 0, 1, 2, 1]
    plain = lab_tiny.generate(TALKS, max_new_tokens=5)
    with shifted(lab_tiny, two, alphas=alphas) as moved:
        found = moved.generate(TALKS, max_new_tokens=5, rows=rows)
        assert moved.generate([], rows=[]) == []
    expected = [
        plain[i] if row == 0 else alone(lab_tiny, TALKS[i], two[row - 1], alphas[row - 1]) for i, row in enumerate(rows)
    ]
    assert found == expected
    assert all((found[i] == plain[i]) == (row == 0) for i, row in enumerate(rows))
    assert lab_tiny.generate(TALKS, max_new_tokens=5) == plain


def test_one_direction_needs_no_rows_and_rows_set_before_are_kept(lab_tiny):
    one = direction(lab_tiny.fingerprint, layer_id=2, size=width(lab_tiny, "model.layers.0"), scale=40.0)
    with shifted(lab_tiny, [one], rows=[0]) as moved:
        found = moved.generate(TALKS, max_new_tokens=5)
        assert lab_tiny.generate(TALKS[:1], max_new_tokens=5) != found[:1]
        assert moved._rows == [0]
    assert found == [alone(lab_tiny, talk, one, 1.0) for talk in TALKS]


def test_replies_that_the_layer_had_no_part_in_are_an_error(lab_tiny, monkeypatch):
    one = direction(lab_tiny.fingerprint, layer_id=2, size=width(lab_tiny, "model.layers.0"), scale=40.0)
    with shifted(lab_tiny, [one]) as moved:
        moved.generate(TALKS[:1], max_new_tokens=1)
        monkeypatch.setattr(lab_tiny, "generate", lambda conversations, **_: ["canned"] * len(conversations))
        with pytest.raises(NoEffectError, match="did not run layer 2"):
            moved.generate(TALKS, max_new_tokens=1)


@pytest.mark.parametrize("before", [True, False], ids=["compiled-before", "compiled-inside"])
def test_a_compiled_model_is_moved_and_comes_back(before, folder_of):
    from moesteer.backends.loading import load

    model, input_ids = load(folder_of("mixtral"), dtype="float32"), ids()
    one = direction(model.fingerprint, scale=30.0)

    def run():
        with torch.inference_mode():
            return model.hf(input_ids=input_ids, use_cache=False).logits

    plain = run()
    with shifted(model, [one]):
        expected = run()
    assert not torch.allclose(expected, plain)
    model.hf.compile(backend="eager")
    try:
        if before:
            assert torch.equal(run(), plain)
        with shifted(model, [one]) as moved:
            assert torch.equal(run(), expected)
        assert moved.receipt.changed == input_ids.numel()
        assert torch.equal(run(), plain)
    finally:
        torch._dynamo.reset()


# ---------------------------------------------------------------- finding


def sequences(seed, count, *, response=True):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt, more = int(rng.integers(2, 9)), int(rng.integers(1, 6)) if response else 0
        spans = {"prompt": (0, prompt), "final_user": (1, prompt)}
        if response:
            spans["response"] = (prompt, prompt + more)
        found.append(Encoded(tuple(int(i) for i in rng.integers(5, 60, size=prompt + more)), spans))
    return found


def loop_means(model, paths, side, span):
    """By path, the mean over conversations of each one's own mean, each run by itself without padding."""
    means = {path: [] for path in paths}

    def record(path, start, end):
        def hook(_module, _args, out):
            tokens = first(out)[0].flatten(1).double().numpy()
            means[path].append(tokens[start:end].mean(axis=0))

        return hook

    for encoded in side:
        start, end = encoded.spans["response"] if span == "response" else (encoded.spans["prompt"][1] - 1,) * 2
        end = max(end, start + 1)
        hooked = [model.hf.get_submodule(path).register_forward_hook(record(path, start, end)) for path in paths]
        with torch.inference_mode():
            model.hf(input_ids=torch.tensor([encoded.token_ids]), use_cache=False)
        for hook in hooked:
            hook.remove()
    return {path: np.mean(found, axis=0) for path, found in means.items()}


def loop_mean(model, path, side, span):
    return loop_means(model, [path], side, span)[path]


@pytest.mark.parametrize("span", ["last_prompt", "response"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "zaya", "hy_v4"])
def test_the_direction_is_the_difference_of_the_means(name, span, model_of, monkeypatch):
    monkeypatch.setattr("moesteer.backends.residual.BATCH_POSITIONS", 40)  # several batches
    model, wanted, other = model_of(name), sequences(1, 5), sequences(2, 4)
    found = find_all(model, wanted, other, toward="refuse", span=span, data_sha256="cd" * 32)
    assert list(found) == list(decoder_layers(model)) and hooks(model) == 0
    paths = [FAMILIES[name].format(layer_id) for layer_id in found]
    sides = [loop_means(model, paths, side, span) for side in (wanted, other)]
    for path, (layer_id, one) in zip(paths, found.items(), strict=True):
        difference = sides[0][path] - sides[1][path]
        distance = np.linalg.norm(difference)
        # float32 sums of other batches: 1e-4 of the distance
        assert abs(one.scale - distance) < 1e-4 * distance
        assert np.linalg.norm(one.vector_H - difference / distance) < 1e-3
        assert one.layer_id == layer_id and one.info.intent.toward == "refuse" and one.info.data_sha256 == "cd" * 32
        assert one.info.settings == {"span": span, "wanted": 5, "other": 4}
        one.check_model(model.fingerprint)
        Direction.from_bytes(one.to_bytes(), where="x")
    turned = find(model, other, wanted, layer_id=1, toward="comply", span=span)
    assert turned.scale == found[1].scale and (turned.vector_H == -found[1].vector_H).all()


def test_at_alpha_1_the_mean_of_the_other_side_becomes_that_of_the_wanted(model_of):
    model, wanted, other = model_of("mixtral"), sequences(1, 5), sequences(2, 5)
    one = find(model, wanted, other, layer_id=2, toward="refuse")
    with shifted(model, [one]):
        moved = loop_mean(model, "model.layers.2", other, "last_prompt")
    np.testing.assert_allclose(moved, loop_mean(model, "model.layers.2", wanted, "last_prompt"), atol=1e-4)


def test_every_conversation_counts_once_however_long_its_response(model_of):
    model = model_of("mixtral")
    long, short = (Encoded((5, 6, *range(7, 7 + n)), {"prompt": (0, 2), "response": (2, 2 + n)}) for n in (20, 1))
    other = sequences(3, 3)
    one = find(model, [long, short], other, layer_id=1, toward="refuse", span="response")
    means = [loop_mean(model, "model.layers.1", [e], "response") for e in (long, short)]
    expected = np.mean(means, axis=0) - loop_mean(model, "model.layers.1", other, "response")
    np.testing.assert_allclose(one.vector_H * one.scale, expected, atol=1e-4)


def test_what_gives_no_direction_is_refused(model_of, monkeypatch):
    model, some = model_of("mixtral"), sequences(1, 3)
    bare = sequences(2, 3, response=False)
    with pytest.raises(EmptyDataError, match="both sides"):
        find_all(model, some, [], toward="refuse")
    with pytest.raises(InputError, match="3 conversations have no response"):
        find_all(model, some, bare, toward="refuse", span="response")
    with pytest.raises(InputError, match="1 conversations have no prompt"):
        find_all(model, some, [Encoded((1, 2), {})], toward="refuse")
    with pytest.raises(InputError, match="no decoder layer 3"):
        find(model, some, bare, layer_id=3, toward="refuse")
    same = [Encoded((*e.token_ids[: e.spans["prompt"][1]], 9), e.spans) for e in reversed(some)]
    with pytest.raises(NoEffectError, match="nothing tells") as caught:
        find_all(model, some, same, toward="refuse")
    assert "same prompts" in caught.value.where and "span='response'" in caught.value.do
    with pytest.raises(NoEffectError, match="nothing tells"):
        find_all(model, some, some, toward="refuse", span="response")
    mask = SteeringMask(
        MaskInfo(fingerprint=model.fingerprint, method="hand-made", intent=Intent(toward="refuse")),
        force_LE=np.eye(3, 8, dtype=np.int8),
    )
    with mask.apply(model), pytest.raises(AlreadySteeredError, match="steered"):
        find_all(model, some, bare, toward="refuse")
    assert hooks(model) == 0
    weight = model.hf.get_submodule("model.layers.1.self_attn.o_proj").weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = torch.nan
        with pytest.raises(NumericsError, match="not finite") as caught:
            find_all(model, some, bare, toward="refuse")
        assert "layer 1" in caught.value.where
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_mask_and_a_direction_steer_together(model_of):
    model, input_ids = model_of("mixtral"), ids()
    mask = SteeringMask(
        MaskInfo(fingerprint=model.fingerprint, method="hand-made", intent=Intent(toward="refuse")),
        force_LE=np.eye(3, 8, dtype=np.int8),
    )
    one = direction(model.fingerprint)
    _, plain = after_layer(model, "model.layers.1", input_ids)
    with mask.apply(model):
        masked, _ = after_layer(model, "model.layers.1", input_ids)
        with shifted(model, [one]):
            both, _ = after_layer(model, "model.layers.1", input_ids)
    assert torch.equal(both, masked + torch.from_numpy(one.shift_H()))
    assert torch.equal(after_layer(model, "model.layers.1", input_ids)[1], plain)

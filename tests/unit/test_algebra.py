"""algebra.py and comparing.py: hand-made examples, and the laws that masks obey as tables of numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer import algebra
from moesteer.algebra import add, compose, effect_LE, negate, restrict, scale, subtract, union, with_alpha
from moesteer.comparing import diff, similarity
from moesteer.errors import InputError, MaskContentError, MaskMismatchError, NoEffectError
from moesteer.gate import GateInfo, GateRate
from moesteer.mask import Intent, MaskInfo, SteeringMask
from tests.unit.test_mask import fingerprint

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LAYERS, SHAPE = (1, 3, 4), (3, 8)
ROUNDED = {"rtol": 1e-6, "atol": 1e-35}
"""float32 rounds strength and bias once each, 6e-8 each; below 1e-38 numbers lose digits."""


def info(**changes):
    given_ = {"fingerprint": fingerprint(), "method": "by-hand", "intent": Intent(toward="refuse")}
    return MaskInfo(**{**given_, **changes})


def additive(entries, sigma=(0.5, 2.0, 1.0), **changes):
    strength = np.zeros(SHAPE, np.float32)
    for (row, expert), value in entries.items():
        strength[row, expert] = value
    return SteeringMask(info(**changes), strength_LE=strength, sigma_L=np.array(sigma, np.float32))


def forced(entries, **changes):
    force = np.zeros(SHAPE, np.int8)
    for place, value in entries.items():
        force[place] = value
    return SteeringMask(info(**changes), force_LE=force)


def gated(mask, threshold=0.5, weight=1.0):
    rate = GateRate(value=0.5, low=0.4, high=0.6, n=10)
    gate = GateInfo(pool="last", bias=0.0, threshold=threshold, measured_on="x", false_positive_rate=rate,
                    true_positive_rate=rate, auroc=0.9)  # fmt: skip
    return mask.with_gate(np.full(SHAPE, weight, np.float32), gate)


def entries(table):
    return {(int(r), int(e)): float(table[r, e]) for r, e in np.argwhere(table)}


numbers = st.one_of(st.just(0.0), st.floats(-100, 100, width=32), st.sampled_from([1e-6, -1e-6, 1e-44]))
sigmas = st.one_of(st.just(0.0), st.floats(np.float32(1e-3), 100, width=32))
alphas = st.floats(-4, 4, width=32)


@st.composite
def additive_masks(draw, sigma=sigmas):
    strength = np.array(draw(st.lists(numbers, min_size=24, max_size=24)), np.float32).reshape(SHAPE)
    sigma_L = np.array(draw(st.lists(sigma, min_size=3, max_size=3)), np.float32)
    toward = draw(st.sampled_from(["refuse", "follow-document"]))
    return SteeringMask(info(alpha=draw(alphas), intent=Intent(toward=toward)), strength_LE=strength, sigma_L=sigma_L)


@st.composite
def forced_masks(draw):
    # at most 2 on and 2 off of 8, so that the mask and its negative both fit top_k = 2
    rows = []
    for _ in range(3):
        order = draw(st.permutations(range(8)))
        on, off = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        row = np.zeros(8, np.int8)
        row[list(order[:on])], row[list(order[on : on + off])] = 1, -1
        rows.append(row)
    return SteeringMask(info(), force_LE=np.array(rows))


any_masks = st.one_of(additive_masks(), forced_masks())
layer_sets = st.sets(st.sampled_from(LAYERS))


def bias_close(mask, expected):
    """Whether a mask's float32 bias is `expected` (float64), up to rounding relative to the layer's largest."""
    np.testing.assert_allclose(mask.bias_LE(), expected, **ROUNDED)


# ---------------------------------------------------------------- effects and sums


def test_the_effect_is_alpha_times_sigma_times_strength_or_the_force():
    assert entries(effect_LE(additive({(0, 1): 1.5, (1, 5): -2.0}, alpha=-0.5))) == {(0, 1): -0.375, (1, 5): 2.0}
    assert entries(effect_LE(forced({(0, 1): 1, (2, 2): -1}, alpha=-3.0))) == {(0, 1): 1.0, (2, 2): -1.0}
    assert not effect_LE(forced({(0, 1): 1}, alpha=0.0)).any()


def test_a_sum_is_in_units_of_the_first_masks_sigma_at_alpha_1():
    a = additive({(0, 0): 2.0, (1, 3): 1.0}, sigma=(0.5, 2.0, 0.0), alpha=0.5)
    b = additive({(0, 0): 1.0, (2, 7): -3.0}, sigma=(4.0, 1.0, 2.0))
    made = add(a, b)
    # layer 0: 0.5 * 0.5 * 2 + 4 * 1 = 4.5 logits, sigma 0.5; layer 2: sigma of a is 0, so that of b
    assert made.info.alpha == 1.0 and made.sigma_L.tolist() == [0.5, 2.0, 2.0]
    assert entries(made.strength_LE) == {(0, 0): 9.0, (1, 3): 0.5, (2, 7): -3.0}


def test_a_sum_that_is_too_large_for_a_tiny_sigma_takes_the_largest():
    tiny = additive({(0, 0): 1.0}, sigma=(1e-6, 1.0, 1.0))
    made = add(tiny, additive({(0, 1): 5.0}, sigma=(2.0, 1.0, 1.0)))
    assert made.sigma_L.tolist() == [2.0, 1.0, 1.0]
    assert entries(made.strength_LE) == {(0, 0): pytest.approx(5e-7), (0, 1): 5.0}


def test_a_sum_that_no_sigma_can_hold_says_so():
    huge = additive({(0, 0): 1e4}, alpha=10.0)
    with pytest.raises(MaskContentError, match="the result of add cannot be applied") as caught:
        add(huge, huge)
    assert caught.value.do == "give the masks smaller alphas" and caught.value.where == "layer 1, expert 0"


@pytest.mark.parametrize("alpha", [1e300, -1e308, 1e39])
def test_an_effect_beyond_float32_is_refused(alpha):
    with pytest.raises(MaskContentError, match="beyond the range of float32"):
        add(additive({(0, 0): 1e4}, alpha=alpha), additive({(0, 0): 1.0}))


@PROPERTY
@given(additive_masks(), additive_masks())
def test_the_bias_of_a_sum_is_the_sum_of_the_biases(a, b):
    bias_close(add(a, b), effect_LE(a) + effect_LE(b))
    np.testing.assert_allclose(add(a, b).bias_LE(), a.bias_LE() + b.bias_LE(), rtol=1e-5, atol=_cancelled(a, b))


def _cancelled(*masks):
    """What float32 may lose where large numbers cancel: 2**-22 of the largest."""
    return max(float(np.abs(effect_LE(mask)).max()) for mask in masks) * 2.0**-22 + 1e-35


@PROPERTY
@given(additive_masks(), additive_masks(), additive_masks())
def test_addition_commutes_and_associates(a, b, c):
    np.testing.assert_allclose(add(a, b).bias_LE(), add(b, a).bias_LE(), rtol=1e-6, atol=_cancelled(a, b))
    one, two = add(add(a, b), c), add(a, add(b, c))
    np.testing.assert_allclose(one.bias_LE(), two.bias_LE(), rtol=1e-6, atol=_cancelled(a, b, c))
    np.testing.assert_allclose(add(a, b, c).bias_LE(), one.bias_LE(), rtol=1e-6, atol=_cancelled(a, b, c))


@PROPERTY
@given(additive_masks(), additive_masks())
def test_subtraction_undoes_addition_and_is_adding_the_negative(a, b):
    back = subtract(add(a, b), b)
    np.testing.assert_allclose(back.bias_LE(), effect_LE(a), rtol=1e-6, atol=_cancelled(a, b))
    assert subtract(a, b).strength_LE.tolist() == add(a, negate(b)).strength_LE.tolist()
    assert subtract(a, b).info.intent == add(a, negate(b)).info.intent
    assert subtract(a, a).expert_count == 0


@PROPERTY
@given(additive_masks(), st.floats(-8, 8), st.floats(-8, 8))
def test_scaling_is_linear(mask, x, y):
    small = with_alpha(mask, mask.info.alpha)
    small = SteeringMask(small.info, strength_LE=np.clip(small.strength_LE, -100, 100), sigma_L=small.sigma_L)
    bias_close(scale(small, x), x * effect_LE(small))
    loss = _cancelled(small) * 16
    np.testing.assert_allclose(
        add(scale(small, x), scale(small, y)).bias_LE(), scale(small, x + y).bias_LE(), rtol=1e-6, atol=loss
    )
    np.testing.assert_allclose(scale(scale(small, x), y).bias_LE(), scale(small, x * y).bias_LE(), rtol=1e-6, atol=loss)
    assert not scale(small, 0.0).strength_LE.any() and not np.signbit(scale(small, -0.0).strength_LE).any()
    assert scale(small, -1.0).strength_LE.tolist() == negate(small).strength_LE.tolist()


# ---------------------------------------------------------------- of one mask


@PROPERTY
@given(any_masks)
def test_negating_twice_gives_the_same_mask(mask):
    once, twice = negate(mask), negate(negate(mask))
    assert np.array_equal(twice.values_LE, mask.values_LE) and twice.info.intent == mask.info.intent
    assert np.array_equal(effect_LE(once), -effect_LE(mask)) and once.info.intent.toward.startswith("not ")
    assert once.info.alpha == mask.info.alpha and once.values_LE.dtype == mask.values_LE.dtype


@PROPERTY
@given(any_masks, layer_sets)
def test_a_union_of_complementary_layers_is_the_whole(mask, layers):
    parts = [restrict(mask, layers=layers), restrict(mask, layers=set(LAYERS) - layers)]
    for conflict in algebra.CONFLICTS:
        whole = union(parts, conflict=conflict)
        if mask.forced:
            assert np.array_equal(whole.force_LE, mask.force_LE if mask.info.alpha else 0 * mask.force_LE)
        else:
            bias_close(whole, effect_LE(mask))
        assert whole.info.intent == mask.info.intent


def test_restricting_keeps_the_rows_of_the_named_decoder_layers():
    mask = additive({(0, 1): 1.0, (1, 5): -2.0, (2, 0): 3.0})
    assert entries(restrict(mask, layers=[4, 1]).strength_LE) == {(0, 1): 1.0, (2, 0): 3.0}
    assert restrict(mask, layers=[4, 1]).info.settings["layers"] == [1, 4]
    with pytest.raises(InputError, match="no layer 0, 2") as caught:
        restrict(mask, layers=[0, 1, 2])
    assert "1, 3, 4" in caught.value.expected


@pytest.mark.parametrize("toward, opposite", [
    ("refuse", "not refuse"), ("refuse + rhyme", "not (refuse + rhyme)"), ("not (a + not b)", "a + not b"),
])  # fmt: skip
def test_the_opposite_of_an_intent_is_said_and_taken_back(toward, opposite):
    mask = additive({(0, 1): 1.0}, intent=Intent(toward=toward, scenario="s"))
    assert negate(mask).info.intent == Intent(toward=opposite, scenario="s")
    assert negate(negate(mask)).info.intent.toward == toward
    assert scale(mask, -2).info.intent.toward == opposite and scale(mask, 2).info.intent.toward == toward
    assert with_alpha(mask, -0.5).info.intent.toward == opposite and with_alpha(mask, 3).info.intent.toward == toward


def test_a_forced_mask_has_no_alpha_to_turn_and_no_size_to_scale():
    mask = forced({(0, 1): 1})
    assert with_alpha(mask, -1).info.intent.toward == "refuse"  # docs/mask-format.md: any alpha but 0 is the same
    with pytest.raises(InputError, match="cannot be scaled"):
        scale(mask, 2)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(factor):
    with pytest.raises(InputError, match="cannot be scaled by"):
        scale(additive({(0, 1): 1.0}), factor)


def test_a_scale_beyond_the_limit_of_strengths_is_refused():
    with pytest.raises(MaskContentError, match="the result of scale cannot be applied") as caught:
        scale(additive({(0, 1): 5.0}), 1e39)
    assert caught.value.do == "scale by a smaller factor"


def test_a_negative_that_a_layer_cannot_meet_names_the_layer():
    mask = forced({(1, 1): -1, (1, 5): -1, (1, 7): -1})
    with pytest.raises(MaskContentError, match="negate: 3 of 8 experts would be on, where at most 2 can be") as caught:
        negate(mask)
    assert caught.value.where == "layer 3: experts 1, 5, 7"


def test_a_union_that_leaves_too_few_experts_names_the_layer():
    a, b = forced({(2, e): -1 for e in range(4)}), forced({(2, e): -1 for e in range(4, 7)})
    with pytest.raises(MaskContentError, match="union of 2 masks: 7 of 8 experts would be off, where at most 6"):
        union([a, b])
    assert union([a, b.top(2)]).expert_count == 6


# ---------------------------------------------------------------- unions


def test_a_union_has_the_entries_of_all_and_the_largest_of_those_that_agree():
    a = additive({(0, 0): 2.0, (0, 1): -1.0, (1, 1): 1.0})
    b = additive({(0, 0): 1.0, (0, 1): -3.0, (2, 2): 4.0})
    assert entries(union([a, b]).strength_LE) == {(0, 0): 2.0, (0, 1): -3.0, (1, 1): 1.0, (2, 2): 4.0}
    assert np.array_equal(union([b, a]).strength_LE, union([a, b]).strength_LE)
    assert np.array_equal(union([a, a]).strength_LE, a.strength_LE)


def test_the_size_that_counts_in_a_union_is_the_effect_and_not_the_strength():
    weak, strong = additive({(0, 0): 3.0}, sigma=(1, 1, 1), alpha=0.5), additive({(0, 0): 1.0}, sigma=(2, 2, 2))
    assert entries(union([weak, strong]).strength_LE) == {(0, 0): 2.0}  # 2 logits in units of weak's sigma


@pytest.mark.parametrize("make", [additive, forced])
def test_each_conflict_rule_does_what_it_says(make):
    a, b, c = make({(0, 0): 1, (1, 1): 1}), make({(0, 0): -1, (2, 2): -1}), make({(0, 0): 1})
    rest = {(1, 1): 1.0, (2, 2): -1.0}
    with pytest.raises(InputError, match="1 experts are pulled opposite ways") as caught:
        union([a, b, c])
    assert "layer 1, expert 0" in caught.value.where and a.sha256[:12] in caught.value.where

    def united(masks, rule):
        return {k: float(np.sign(v)) for k, v in entries(union(masks, conflict=rule).values_LE).items()}

    assert united([a, b], "first") == {(0, 0): 1.0, **rest} and united([b, a], "first") == {(0, 0): -1.0, **rest}
    assert united([a, b, c], "drop") == rest
    assert united([a, b], "sum") == rest and united([a, b, c], "sum") == {(0, 0): 1.0, **rest}
    with pytest.raises(InputError, match="no conflict rule 'last'"):
        union([a, b], conflict="last")


@PROPERTY
@given(st.lists(additive_masks(), min_size=1, max_size=4))
def test_a_union_by_sum_is_addition(masks):
    assert np.array_equal(union(masks, conflict="sum").strength_LE, add(*masks).strength_LE)


def loop_union(values, rule):
    """The value of one entry, from the description."""
    signs = {np.sign(v) for v in values if v}
    if not signs:
        return 0.0
    if rule == "sum":
        return sum(values)
    if len(signs) == 2 and rule == "drop":
        return 0.0
    sign = next(np.sign(v) for v in values if v)
    return sign * max(abs(v) for v in values if np.sign(v) == sign)


@PROPERTY
@given(st.lists(additive_masks(), min_size=1, max_size=3), st.sampled_from(["first", "drop", "sum"]))
def test_a_union_is_what_a_loop_over_its_description_gives(masks, rule):
    effects = [effect_LE(mask) for mask in masks]
    expected = np.array([loop_union([t[r, e] for t in effects], rule) for r in range(3) for e in range(8)])
    bias_close(union(masks, conflict=rule), expected.reshape(SHAPE))


@PROPERTY
@given(st.lists(forced_masks(), min_size=1, max_size=3), st.sampled_from(["first", "drop", "sum"]))
def test_a_union_of_forces_is_what_a_loop_gives_or_names_a_layer_that_is_full(masks, rule):
    tables = [mask.force_LE.astype(float) for mask in masks]
    expected = np.array([np.sign(loop_union([t[r, e] for t in tables], rule)) for r in range(3) for e in range(8)])
    expected = expected.reshape(SHAPE)
    full = [r for r in range(3) if (expected[r] > 0).sum() > 2 or (expected[r] < 0).sum() > 6]
    if not full:
        assert np.array_equal(union(masks, conflict=rule).force_LE, expected)
        return
    with pytest.raises(MaskContentError, match="union of") as caught:
        union(masks, conflict=rule)
    assert any(caught.value.where.startswith(f"layer {LAYERS[r]}:") for r in full)


# ---------------------------------------------------------------- what cannot become one mask


@pytest.mark.parametrize("join", [add, subtract, lambda a, b: union([a, b])])
def test_masks_that_cannot_become_one_are_refused_with_what_to_do_instead(join):
    a = additive({(0, 1): 1.0})
    with pytest.raises(InputError, match="forced mask and an additive one") as caught:
        join(a, forced({(0, 1): 1}))
    assert "together=True" in caught.value.do and "--mask A --mask B" in caught.value.do
    for other in (gated(a, threshold=0.6), gated(a, weight=2.0), a):
        with pytest.raises(InputError, match="different gates") as caught:
            join(gated(a), other)
        assert "together=True" in caught.value.do
    with pytest.raises(MaskMismatchError, match="different shapes") as caught:
        join(a, additive({(0, 1): 1.0}, fingerprint=fingerprint(scoring="sigmoid k=2")))
    assert caught.value.where == "scoring: mask has softmax-topk k=2, another mask has sigmoid k=2"
    with pytest.raises(MaskMismatchError, match="different checkpoints"):
        join(a, additive({(0, 1): 1.0}, fingerprint=fingerprint(router_sha256="cd" * 32)))


def test_another_checkpoint_can_be_allowed_and_the_first_is_kept():
    a, b = additive({(0, 1): 1.0}), additive({(0, 2): 1.0}, fingerprint=fingerprint(router_sha256="cd" * 32))
    for made in (add(a, b, allow_other_checkpoint=True), union([a, b], allow_other_checkpoint=True),
                 subtract(a, b, allow_other_checkpoint=True),
                 compose([a, b], op="add", allow_other_checkpoint=True)):  # fmt: skip
        assert made.info.fingerprint == a.info.fingerprint
    assert diff(a, b, allow_other_checkpoint=True)["fields"]["fingerprint"]["b"]["router_sha256"] == "cd" * 32
    assert similarity(a, b, allow_other_checkpoint=True)["cosine"] == 0


@pytest.mark.parametrize("join", [add, subtract])
def test_forces_are_united_and_not_added(join):
    with pytest.raises(InputError, match="a force has no size") as caught:
        join(forced({(0, 1): 1}), forced({(0, 2): 1}))
    assert "union" in caught.value.do


def test_no_masks_are_no_mask():
    for join in (add, lambda: union([])):
        with pytest.raises(InputError, match="of no masks"):
            join()


def test_a_gate_stays_with_a_mask_and_with_masks_that_share_it():
    mask, other = gated(additive({(0, 1): 1.0})), gated(additive({(0, 2): 1.0}))
    for made in (negate(mask), scale(mask, 2), restrict(mask, layers=[1]), mask.top(1), with_alpha(mask, 2),
                 add(mask, other), subtract(mask, other), union([mask, other]),
                 compose([mask, other], op="add", top=1)):  # fmt: skip
        assert made.gated and made.info.gate == mask.info.gate and np.array_equal(made.gate_LE, mask.gate_LE)
        assert made.info.format_version == 2 and SteeringMask.from_bytes(made.to_bytes(), where="x").gated


# ---------------------------------------------------------------- provenance


def test_where_a_mask_comes_from_is_written_down():
    accepted = {"split": "test"}
    a = additive({(0, 1): 1.0}, alpha=0.5, data_sha256="d1", accepted_on=accepted)
    b = additive({(0, 2): 1.0}, intent=Intent(toward="rhyme", scenario="s"), data_sha256="d2", accepted_on=accepted)
    sources = [
        {"sha256": a.sha256[:12], "method": "by-hand", "toward": "refuse", "alpha": 0.5},
        {"sha256": b.sha256[:12], "method": "by-hand", "toward": "rhyme", "alpha": 1.0},
    ]
    made = add(a, b)
    assert (made.info.method, made.info.settings) == ("add", {"sources": sources})
    assert made.info.intent == Intent(toward="refuse + rhyme", scenario=None)
    assert subtract(a, b).info.intent.toward == "refuse + not rhyme"
    assert subtract(a, b).info.settings == {"sources": sources}
    united = union([a, b], conflict="drop")
    assert united.info.settings == {"sources": sources, "conflict": "drop"} and united.info.method == "union"
    for many in (made, united, subtract(a, b)):
        assert many.info.accepted_on is None and many.info.data_sha256 is None and many.info.alpha == 1.0
    for single in (scale(a, 2), negate(a), restrict(a, layers=[1])):
        assert single.info.accepted_on is None and single.info.data_sha256 == "d1" and single.info.alpha == 0.5
        assert single.info.settings["sources"] == sources[:1]
    assert with_alpha(a, 0.25).info.accepted_on is None
    assert add(a, a).info.intent.toward == "refuse" and add(a, a).info.data_sha256 == "d1"


def test_the_masks_that_went_in_are_as_they_were():
    a, b = additive({(0, 1): 1.0}), additive({(0, 1): -1.0})
    before = a.sha256, b.sha256
    union([a, b], conflict="sum"), add(a, b), subtract(a, b), negate(a), scale(a, 3), restrict(a, layers=[1])
    compose([a, b], op="subtract", alphas=[2, 3], layers=[1], factor=2, negated=True, top=1)
    assert (a.sha256, b.sha256) == before


# ---------------------------------------------------------------- compose


def test_compose_takes_the_steps_in_their_order():
    a, b = additive({(0, 0): 1.0, (1, 1): 4.0, (2, 2): 8.0}), additive({(0, 0): 2.0, (1, 1): 1.0})
    made = compose([a, b], op="subtract", alphas=[2.0, 1.0], layers=[3, 1], factor=0.5, negated=True, top=1)
    # layers 1 and 3 of 2a - b, halved and turned: {(0, 0): 0, (1, 1): -(8 - 1) / 2}
    assert entries(made.strength_LE) == {(1, 1): -3.5}
    assert made.info.method == "subtract" and made.info.settings == {
        "sources": [{"sha256": m.sha256[:12], "method": "by-hand", "toward": "refuse", "alpha": x}
                    for m, x in ((a, 2.0), (b, 1.0))],
        "layers": [1, 3], "factor": 0.5, "negated": True, "top": 1,
    }  # fmt: skip
    assert made.info.intent.toward == "not (refuse + not refuse)"
    json.dumps(made.info.settings)


def test_compose_of_one_mask_sets_its_alpha():
    a = additive({(0, 0): 1.0})
    made = compose([a], alphas=[0.25])
    assert made.info.alpha == 0.25 and made.info.method == "compose"
    assert np.array_equal(made.strength_LE, a.strength_LE)


def test_a_layer_that_is_too_full_can_be_left_out():
    a, b = forced({(0, 0): 1, (0, 1): 1, (1, 1): 1}), forced({(0, 2): 1, (1, 2): 1})
    with pytest.raises(MaskContentError, match="union of 2 masks: 3 of 8 experts would be on") as caught:
        compose([a, b], op="union")
    assert "--layers" in caught.value.do
    assert entries(compose([a, b], op="union", layers=[3]).force_LE) == {(1, 1): 1.0, (1, 2): 1.0}


A = additive({(0, 0): 1.0})


@pytest.mark.parametrize("masks, steps, what", [
    ([], {"op": "add"}, "no mask to compose"),
    ([A, A], {"op": "times"}, "no operation 'times'"),
    ([A, A], {}, "not said what to do"),
    ([A], {"op": "add"}, "add takes at least two, not 1"),
    ([A], {"op": "union"}, "union takes at least two, not 1"),
    ([A, A, A], {"op": "subtract"}, "subtract takes two masks, not 3"),
    ([A, A], {"op": "add", "alphas": [1.0]}, "1 alphas for 2 masks"),
    ([A], {"top": 0}, "top 0"),
    ([A, A], {"op": "add", "conflict": "first"}, "a conflict rule for op add"),
    ([A], {"top": -1}, "top -1"),
    ([A], {}, "nothing is to be done"),
    ([A, A], {"op": "union", "conflict": "best"}, "no conflict rule"),
    ([A], {"layers": [7]}, "no layer 7"),
])  # fmt: skip
def test_steps_that_do_not_fit_are_refused(masks, steps, what):
    with pytest.raises(InputError, match=what) as caught:
        compose(masks, **steps)
    assert caught.value.where and caught.value.expected and caught.value.do


@pytest.mark.parametrize("masks, steps", [
    ([A, A], {"op": "subtract"}), ([A], {"factor": 0.0}), ([A], {"layers": [3]}), ([A], {"layers": []}),
    ([A, additive({(0, 0): -1.0})], {"op": "union", "conflict": "drop"}), ([A, A], {"op": "add", "alphas": [0, 0]}),
])  # fmt: skip
def test_a_result_without_entries_is_refused(masks, steps):
    with pytest.raises(NoEffectError, match="no entries"):
        compose(masks, **steps)


# ---------------------------------------------------------------- diff and similarity


def test_a_diff_lists_every_entry_once_largest_difference_first():
    a = additive({(0, 0): 1.0, (0, 1): 2.0, (1, 1): 1.0, (2, 2): 8.0})
    b = additive({(0, 0): 1.0 + 1e-7, (1, 1): -1.0, (2, 3): 9.0, (2, 4): -1.0}, method="other")
    found = diff(a, b)
    assert found["only_a"] == [
        {"layer": 4, "expert": 2, "a": 8.0, "b": 0.0},
        {"layer": 1, "expert": 1, "a": 1.0, "b": 0.0},
    ]
    assert found["only_b"] == [
        {"layer": 4, "expert": 3, "a": 0.0, "b": 9.0},
        {"layer": 4, "expert": 4, "a": 0.0, "b": -1.0},
    ]
    assert found["changed"] == [{"layer": 3, "expert": 1, "a": 2.0, "b": -2.0}]
    assert [(e["layer"], e["expert"]) for e in found["same"]] == [(1, 0)]
    assert found["fields"] == {"method": {"a": "by-hand", "b": "other"}} and found["unit"] == "logits"
    json.dumps(found)


def test_a_diff_of_forces_of_a_mask_and_itself_and_of_gates():
    a, b = forced({(0, 0): 1, (1, 1): -1}), forced({(0, 0): -1, (1, 1): -1})
    assert diff(a, b)["changed"] == [{"layer": 1, "expert": 0, "a": 1.0, "b": -1.0}] and diff(a, b)["unit"] == "force"
    itself = diff(a, a)
    assert not itself["only_a"] + itself["only_b"] + itself["changed"] and not itself["fields"]
    assert len(itself["same"]) == 2
    heavier = diff(gated(a), gated(a, weight=2.0))["fields"]
    assert set(heavier) == {"gate_LE"} and heavier["gate_LE"]["a"] != heavier["gate_LE"]["b"]
    assert diff(gated(a), a)["fields"]["gate_LE"]["b"] is None
    with pytest.raises(InputError, match="no entry in common"):
        diff(a, additive({(0, 0): 1.0}))


@PROPERTY
@given(additive_masks(), additive_masks())
def test_a_diff_accounts_for_every_entry(a, b):
    found, one, two = diff(a, b), effect_LE(a), effect_LE(b)
    kinds = ("only_a", "only_b", "changed", "same")
    assert sum(len(found[kind]) for kind in kinds) == np.count_nonzero((one != 0) | (two != 0))
    for kind in kinds:
        for entry in found[kind]:
            row = LAYERS.index(entry["layer"])
            assert (entry["a"], entry["b"]) == (one[row, entry["expert"]], two[row, entry["expert"]])


def test_similarity_of_masks_made_by_hand():
    a = additive({(0, 0): 4.0, (0, 1): 2.0, (1, 1): 1.0}, sigma=(1, 1, 1))
    b = additive({(0, 0): -4.0, (0, 1): 2.0, (2, 2): 1.0}, sigma=(1, 1, 1))
    found = similarity(a, b, at=(1, 2, 20))
    assert found["cosine"] == pytest.approx((-16 + 4) / 21)
    assert found["jaccard"] == [
        {"n": 1, "signed": 0.0, "unsigned": 1.0},
        {"n": 2, "signed": 1 / 3, "unsigned": 1.0},
        {"n": 20, "signed": 1 / 5, "unsigned": 2 / 4},
    ]
    mixed = similarity(forced({(0, 0): 1, (0, 1): 1}), a)["cosine"]
    assert mixed == pytest.approx(6 / np.sqrt(2 * 21))


def test_what_counts_as_largest_is_the_effect():
    a = additive({(0, 0): 3.0, (1, 1): 1.0}, sigma=(1.0, 10.0, 1.0))
    assert similarity(a, additive({(1, 1): 1.0}), at=[1])["jaccard"][0]["signed"] == 1.0


@PROPERTY
@given(additive_masks(), additive_masks(), st.integers(1, 30))
def test_the_laws_of_similarity(a, b, n):
    if not effect_LE(a).any() or not effect_LE(b).any():
        with pytest.raises(NoEffectError, match="no effect"):
            similarity(a, b)
        return
    own, turned, both = similarity(a, a, at=[n]), similarity(a, negate(a), at=[n]), similarity(a, b, at=[n])
    assert own["cosine"] == pytest.approx(1.0, abs=1e-12) and turned["cosine"] == pytest.approx(-1.0, abs=1e-12)
    assert own["jaccard"][0] == {"n": n, "signed": 1.0, "unsigned": 1.0}
    assert turned["jaccard"][0] == {"n": n, "signed": 0.0, "unsigned": 1.0}
    back, overlap = similarity(b, a, at=[n]), both["jaccard"][0]
    assert both["cosine"] == pytest.approx(back["cosine"], abs=1e-12) and overlap == back["jaccard"][0]
    assert -1 <= both["cosine"] <= 1 and 0 <= overlap["signed"] <= overlap["unsigned"] <= 1


@PROPERTY
@given(any_masks, st.integers(0, 30), st.integers(0, 30))
def test_the_top_of_a_mask_is_nested(mask, n, m):
    few, many = sorted((n, m))
    small, large = mask.top(few).values_LE, mask.top(many).values_LE
    assert ((small == 0) | (small == large)).all() and np.array_equal(mask.top(many).top(few).values_LE, small)


@pytest.mark.parametrize("at", [[0], [], [5, -1]])
def test_a_top_of_none_is_refused(at):
    with pytest.raises(InputError, match="experts"):
        similarity(A, A, at=at)

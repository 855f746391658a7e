"""routing.py against plain loops written from the formulae, and models.steering against routing.py.

Legend: T tokens, E experts, S shared experts behind them, K selected, G groups, M masks. The loops below work on
Python floats (float64); the module works in float32, so weights are compared with rtol 1e-5 (a few float32 ulps
through exp and a sum). Where scores are kept in bfloat16 the truth is torch, step by step.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moesteer.errors import InputError, MaskContentError, NanLogitsError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.models.steering import BiasSteering, MaskTables, Receipt
from moesteer.routing import FORCE_EPS, TIE, Scoring, check_force, round_to, select, steer_logits

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
SEARCHED = settings(PROPERTY, max_examples=300)
KINDS = ("softmax-topk", "topk-softmax", "sigmoid", "topk-sigmoid", "sqrtsoftplus")
SATURATING = ("softmax-topk", "sigmoid", "sqrtsoftplus")
"""Kinds that choose by a bent score, in which huge logits become equal."""
NEAR = 4e-6
"""Scores relatively nearer than this, and not equal by construction, are a float32 coin toss: no such draw counts."""


class Case(NamedTuple):
    """One draw. rows: [T][E + S] logits; correction, scale: [E] or None."""

    rows: list[list[float]]
    scoring: Scoring
    correction: list[float] | None = None
    scale: list[float] | None = None

    @property
    def experts(self):
        return len(self.rows[0]) - self.scoring.shared

    @property
    def vectors(self):
        """The keyword arguments of select."""
        given = {"correction_E": self.correction, "scale_E": self.scale}
        return {name: None if of is None else np.array(of, np.float32) for name, of in given.items()}


# ---------------------------------------------------------------- truth, in loops


def loop_softmax(values):
    top = max(values)
    if top == -math.inf:
        return [math.nan] * len(values)
    shares = [math.exp(v - top) for v in values]
    return [s / sum(shares) for s in shares]


def loop_rank(scores, classes=None):
    """Ids best first: class, then score, then the lower id."""
    classes = classes or [0] * len(scores)
    return sorted(range(len(scores)), key=lambda e: (-classes[e], -scores[e], e))


def loop_bend(row, scoring):
    bent = [x * scoring.multiplier for x in row]
    return [scoring.softcap * math.tanh(x / scoring.softcap) for x in bent] if scoring.softcap else bent


def loop_scores(bent, kind):
    match kind:
        case "softmax-topk":
            return loop_softmax(bent)
        case "topk-softmax":
            return bent
        case "sigmoid" | "topk-sigmoid":
            return [1 / (1 + math.exp(-x)) for x in bent]
        case "sqrtsoftplus":
            return [math.sqrt(math.log1p(math.exp(x))) for x in bent]
    raise AssertionError(kind)


class Chosen(NamedTuple):
    """unsure: some comparison that decided hangs on rounding."""

    experts: list[int]
    weights: list[float]
    shared: list[float]
    unsure: bool


def loop_select(row, scoring, *, correction=None, scale=None, classes=None):
    """What a router selects of one row [E + S], from the table and the fields in routing.py's docstrings."""
    experts = len(row) - scoring.shared
    correction, scale = correction or [0.0] * experts, scale or [1.0] * experts
    bent = loop_bend(row, scoring)
    score = loop_scores(bent, scoring.kind)
    ranked_by = bent if scoring.kind == "topk-sigmoid" else score
    choice = [ranked_by[e] + correction[e] for e in range(experts)]
    same = [(row[e], correction[e]) for e in range(experts)]
    unsure = False
    if scoring.groups > 1:
        size = experts // scoring.groups
        best, alike = [], []
        for g in range(scoring.groups):
            members = sorted(range(g * size, (g + 1) * size), key=lambda e: (-choice[e], same[e]))
            members = members[: 2 if scoring.group_score == "top2-sum" else 1]
            best.append(sum(choice[e] for e in members))
            alike.append([same[e] for e in members])
        order = loop_rank(best)
        unsure |= undecided(order, best, alike, scoring.groups_kept)
        kept = order[: scoring.groups_kept]
        same = [same[e] if e // size in kept else "closed" for e in range(experts)]
        choice = [choice[e] if e // size in kept else scoring.group_fill for e in range(experts)]
    order = loop_rank(choice, classes)
    unsure |= undecided(order, choice, same, scoring.top_k, classes)
    chosen = order[: scoring.top_k]
    weights = [0.0 if e >= experts - scoring.skipped else score[e] for e in chosen]
    shared = score[experts:]
    if scoring.kind == "topk-softmax":
        weights = loop_softmax(weights)
    elif scoring.renormalise:
        norm = sum(w**scoring.norm_p for w in weights + shared) ** (1 / scoring.norm_p) + scoring.norm_add
        norm = max(norm, scoring.norm_min)
        assume(norm > 0)  # every choice a skip, and no guard: 0 / 0
        weights, shared = [w / norm for w in weights], [s / norm for s in shared]
    weights = [w * scale[e] * scoring.scale for w, e in zip(weights, chosen, strict=True)]
    return Chosen(chosen, weights, [s * scale[0] * scoring.scale for s in shared], unsure)


def undecided(order, scores, same, count, classes=None):
    """Whether the first `count` of an order hang on rounding: neighbours nearly equal, and not the same numbers."""
    for a, b in itertools.pairwise(order[: count + 1]):
        near = abs(scores[a] - scores[b]) <= NEAR * max(abs(scores[a]), abs(scores[b]), 0.25)
        if near and same[a] != same[b] and (classes is None or classes[a] == classes[b]):
            return True
    return False


def loop_sparsemixer(row, jitter, classes=None):
    """SparseMixer-v2 at inference, as defined: two argmaxes, each weighed among its near ties."""
    chosen, weights, left = [], [], list(row)
    for pick in loop_rank(row, classes)[:2]:
        masked = []
        for s, still in zip(row, left, strict=True):
            factor = max(abs(s), row[pick])
            far = factor != 0 and (row[pick] - s) / factor > 2 * jitter
            masked.append(-math.inf if far else still)
        chosen.append(pick)
        weights.append(loop_softmax(masked)[pick])
        left[pick] = -math.inf
    return chosen, weights


def loop_feasible(force, scoring):
    """Whether a force can be met, by trying every choice of kept groups.

    There is a choice that holds all experts switched on; and whatever is kept, with the switched on (which rank
    before all) it leaves k that are not switched off.
    """
    experts, on = len(force), [e for e in range(len(force)) if force[e] > 0]
    if len(on) > scoring.top_k or force.count(-1) > experts - scoring.top_k:
        return False
    size = experts // scoring.groups
    choices = [set(kept) for kept in itertools.combinations(range(scoring.groups), scoring.groups_kept)]
    holds_on = any(all(e // size in kept for e in on) for kept in choices)
    left = [sum(force[e] == 0 and e // size in kept for e in range(experts)) for kept in choices]
    return holds_on and all(len(on) + free >= scoring.top_k for free in left)


# ---------------------------------------------------------------- selection, property by property


@st.composite
def routed(draw, *, grouped=False, kinds=KINDS):
    groups = draw(st.sampled_from((2, 3, 4))) if grouped else 1
    size = draw(st.integers(1, 4)) if grouped else draw(st.integers(1, 12))
    experts = groups * size
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, kept * size))
    tokens = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(kinds))
    normal = kind != "topk-softmax"  # it has a norm of its own: K experts, no others
    shared = draw(st.sampled_from((0, 0, 1, 3))) if normal else 0
    skipped = draw(st.integers(0, min(2, experts - 1))) if normal and draw(st.booleans()) else 0
    # eighths: ties are common and exact, other logits are far apart in float32
    cell = st.integers(-40, 40).map(lambda n: n / 8)
    width = experts + shared
    rows = draw(st.lists(st.lists(cell, min_size=width, max_size=width), min_size=tokens, max_size=tokens))
    scoring = Scoring(
        kind=kind,
        top_k=top_k,
        renormalise=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 2.5, 0.125))),
        groups=groups,
        groups_kept=kept,
        group_score=draw(st.sampled_from(("max", "top2-sum"))),
        group_fill=draw(st.sampled_from((-math.inf, 0.0))),
        norm_p=draw(st.sampled_from((1.0, 1.0, 2.0))),
        norm_add=draw(st.sampled_from((0.0, 1e-20, 0.25))),
        norm_min=draw(st.sampled_from((0.0, 0.5, 2.0))),
        multiplier=draw(st.sampled_from((1.0, 0.5, 1.7))),
        softcap=draw(st.sampled_from((0.0, 2.5, 30.0))),
        shared=shared,
        skipped=skipped,
    )
    bias = st.lists(st.integers(-16, 16).map(lambda n: n / 16), min_size=experts, max_size=experts)
    scale = st.lists(st.integers(1, 16).map(lambda n: n / 8), min_size=experts, max_size=experts)
    return Case(rows, scoring, draw(st.none() | bias), draw(st.none() | scale))


@st.composite
def forced(draw, case):
    """A force [E] that the case's scoring can follow, dense in switched experts."""
    force = draw(st.lists(st.sampled_from((-1, 0, 1)), min_size=case.experts, max_size=case.experts))
    free_up = draw(st.permutations(range(case.experts)))
    for e in free_up:
        if loop_feasible(force, case.scoring):
            break
        force[e] = 0
    return force


def assert_matches_loop(case, force=None):
    rows = np.array(case.rows, dtype=np.float32)
    if force is not None:
        rows[:, : case.experts] = steer_logits(rows[:, : case.experts], force_TE=np.array(force))
    found = select(rows, case.scoring, force_TE=None if force is None else np.array(force), **case.vectors)
    assert found.experts_TK.dtype == np.int64 and found.weights_TK.dtype == found.shared_TS.dtype == np.float32
    assert found.experts_TK.shape == found.weights_TK.shape == (len(rows), case.scoring.top_k)
    assert found.shared_TS.shape == (len(rows), case.scoring.shared)
    for t, row in enumerate(rows.tolist()):
        truth = loop_select(row, case.scoring, correction=case.correction, scale=case.scale, classes=force)
        assume(not truth.unsure)
        assert found.experts_TK[t].tolist() == truth.experts
        np.testing.assert_allclose(found.weights_TK[t], truth.weights, rtol=1e-5)
        np.testing.assert_allclose(found.shared_TS[t], truth.shared, rtol=1e-5)
    assert found.as_sets() == [frozenset(r) for r in found.experts_TK.tolist()]
    return found


zero_norms = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")


@zero_norms
@SEARCHED
@given(routed())
def test_selection_and_weights_equal_the_brute_force_loop(case):
    assert_matches_loop(case)


@zero_norms
@SEARCHED
@given(routed(grouped=True))
def test_group_limited_selection_equals_the_brute_force_loop(case):
    assert_matches_loop(case)


@zero_norms
@SEARCHED
@given(st.booleans().flatmap(lambda grouped: routed(grouped=grouped)), st.data())
def test_forced_selection_equals_the_brute_force_loop_and_outranks_corrections_and_groups(case, data):
    force = data.draw(forced(case))
    found = assert_matches_loop(case, force)
    on = {e for e in range(case.experts) if force[e] > 0}
    off = {e for e in range(case.experts) if force[e] < 0}
    for chosen in found.as_sets():
        assert on <= chosen and not off & chosen and len(chosen) == case.scoring.top_k


@pytest.mark.parametrize("group_score, expected", [("max", {4, 5}), ("top2-sum", {0, 1})])
def test_the_two_group_scores_choose_different_groups(group_score, expected):
    logits = np.array([[3.0, 3.0, 0.0, 0.0, 4.0, -9.0]], dtype=np.float32)
    scoring = Scoring("topk-softmax", 2, groups=3, groups_kept=1, group_score=group_score)
    assert select(logits, scoring).as_sets() == [frozenset(expected)]


@pytest.mark.parametrize("fill, expected", [(-math.inf, [0, 1]), (0.0, [0, 2])])
def test_experts_of_a_closed_group_compete_with_the_fill(fill, expected):
    # choice 0.5, -0.5 | -0.25, -0.25: the first group is kept, and its second expert is below 0
    correction = np.array([0.0, -1.0, -0.75, -0.75], np.float32)
    scoring = Scoring("sigmoid", 2, groups=2, groups_kept=1, group_fill=fill)
    found = select(np.zeros((1, 4), np.float32), scoring, correction_E=correction)
    assert found.experts_TK.tolist() == [expected]
    assert found.weights_TK.tolist() == [[0.5, 0.5]]  # the expert's own, filled or not


def test_a_correction_decides_who_is_selected_and_not_with_what_weight():
    logits = np.array([[0.0, 0.0, 0.0]], dtype=np.float32)
    found = select(logits, Scoring("sigmoid", 2), correction_E=np.array([0.0, 0.5, 1.0], dtype=np.float32))
    assert found.experts_TK.tolist() == [[2, 1]]
    assert found.weights_TK.tolist() == [[0.5, 0.5]]


def test_topk_sigmoid_corrects_logits_where_sigmoid_corrects_scores():
    logits, correction = np.array([[9.0, 7.0]], np.float32), np.array([0.0, 1.0], np.float32)
    assert select(logits, Scoring("sigmoid", 1), correction_E=correction).experts_TK.tolist() == [[1]]
    found = select(logits, Scoring("topk-sigmoid", 1), correction_E=correction)
    assert found.experts_TK.tolist() == [[0]]
    np.testing.assert_allclose(found.weights_TK, [[1 / (1 + math.exp(-9))]], rtol=1e-6)


def test_sqrtsoftplus_is_the_root_of_softplus_far_up_and_far_down():
    logits = np.array([[90.0, 20.5, 19.5, 0.0, -80.0, -200.0]], np.float32)
    found = select(logits, Scoring("sqrtsoftplus", 6))
    assert found.experts_TK.tolist() == [[0, 1, 2, 3, 4, 5]]
    truth = [math.sqrt(math.log1p(math.exp(min(x, 700)))) for x in logits[0].tolist()]
    np.testing.assert_allclose(found.weights_TK[0], truth, rtol=1e-6, atol=1e-30)


def test_the_multiplier_comes_before_the_softcap():
    found = select(np.array([[3.0, 1.0]], np.float32), Scoring("sigmoid", 1, multiplier=2.0, softcap=4.0))
    np.testing.assert_allclose(found.weights_TK, [[1 / (1 + math.exp(-4 * math.tanh(6 / 4)))]], rtol=1e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.6 / 1.4, 0.8 / 1.4]),
        ({"norm_p": 2.0}, [0.6, 0.8]),
        ({"norm_add": 0.6}, [0.3, 0.4]),
        ({"norm_min": 2.8}, [0.6 / 2.8, 0.8 / 2.8]),
        ({"norm_min": 1.0}, [0.6 / 1.4, 0.8 / 1.4]),
        ({"norm_p": 2.0, "norm_add": 1.0, "norm_min": 1.5, "scale": 3.0}, [0.9, 1.2]),
        ({"renormalise": False, "norm_p": 2.0, "norm_add": 1.0, "norm_min": 9.0}, [0.6, 0.8]),
    ],
)
def test_renormalisation_by_hand(options, expected):
    logits = np.array([[math.log(0.6 / 0.4), math.log(0.8 / 0.2), -9.0]], np.float32)
    found = select(logits, Scoring("sigmoid", 2, **{"renormalise": True, **options}))
    assert found.experts_TK.tolist() == [[1, 0]]
    np.testing.assert_allclose(found.weights_TK, [expected[::-1]], rtol=1e-6)


def test_an_experts_scale_comes_after_the_norm_and_goes_with_the_expert():
    scale = np.array([5.0, 4.0, 0.5], np.float32)
    found = select(np.array([[-9.0, 0.0, 0.0]], np.float32), Scoring("sigmoid", 2, renormalise=True), scale_E=scale)
    assert found.experts_TK.tolist() == [[1, 2]]
    assert found.weights_TK.tolist() == [[2.0, 0.25]]


def test_shared_experts_share_in_the_norm_and_are_never_chosen():
    scoring = Scoring("sigmoid", 1, renormalise=True, shared=2, scale=8.0)
    found = select(np.array([[0.0, -30.0, 0.0, 90.0]], np.float32), scoring)
    assert found.experts_TK.tolist() == [[0]]
    np.testing.assert_allclose(found.weights_TK, [[2.0]], rtol=1e-6)
    np.testing.assert_allclose(found.shared_TS, [[2.0, 4.0]], rtol=1e-6)


def test_a_skip_is_chosen_like_an_expert_and_weighs_nothing():
    scoring = Scoring("sigmoid", 2, skipped=1)
    found = select(np.array([[0.0, -1.0, 5.0]], np.float32), scoring)
    assert found.experts_TK.tolist() == [[2, 0]]
    assert found.weights_TK.tolist() == [[0.0, 0.5]]


@zero_norms
@PROPERTY
@given(routed())
def test_renormalised_weights_sum_to_the_scale_and_others_to_no_more(case):
    plain = {"norm_p": 1.0, "norm_add": 0.0, "norm_min": 0.0, "skipped": 0}
    scoring = Scoring(**{**vars(case.scoring), **plain})
    found = select(np.array(case.rows, np.float32), scoring, correction_E=case.vectors["correction_E"])
    weights = np.concatenate([found.weights_TK, found.shared_TS], axis=-1).sum(axis=-1)
    if scoring.renormalise or scoring.kind == "topk-softmax":
        np.testing.assert_allclose(weights, scoring.scale, rtol=1e-5)
    elif scoring.kind == "softmax-topk":
        assert (weights <= scoring.scale * (1 + 1e-5)).all() and (weights > 0).all()


@pytest.mark.parametrize("kind", [*KINDS, "sparsemixer"])
def test_ties_go_to_the_lower_expert(kind):
    assert select(np.ones((1, 7), np.float32), Scoring(kind, 2)).experts_TK.tolist() == [[0, 1]]


@pytest.mark.parametrize("kind", [*KINDS, "sparsemixer"])
def test_no_tokens_give_an_empty_selection(kind):
    found = select(np.zeros((0, 4), np.float32), Scoring(kind, 2))
    assert found.experts_TK.shape == found.weights_TK.shape == (0, 2)
    assert found.shared_TS.shape == (0, 0)


# ---------------------------------------------------------------- sparsemixer


@PROPERTY
@given(
    st.lists(st.integers(-400, 400).filter(bool).map(lambda n: n / 128), min_size=2, max_size=10),
    st.sampled_from((0.01, 0.1, 0.3)),
    st.sampled_from((1.0, 2.5)),
    st.booleans(),
    st.data(),
)
def test_sparsemixer_equals_its_definition(row, jitter, scale, steered, data):
    scoring = Scoring("sparsemixer", 2, jitter=jitter, scale=scale)
    force = data.draw(forced(Case([row], scoring))) if steered else None
    logits = np.array([row], np.float32)
    if force is not None:
        force = np.array(force)
        if data.draw(st.booleans()):  # else the picks need not be the highest
            logits = steer_logits(logits, force_TE=force)
    row = logits[0].tolist()
    classes = None if force is None else force.tolist()
    # a ratio within rounding of the threshold may fall either way in float32
    for top in (row[e] for e in loop_rank(row, classes)[:2]):
        for s in row:
            assume(abs((top - s) / (max(abs(s), top) or 1) - 2 * jitter) > NEAR)
    found = select(logits, scoring, force_TE=force)
    chosen, weights = loop_sparsemixer(row, jitter, classes)
    assert found.experts_TK[0].tolist() == chosen
    np.testing.assert_allclose(found.weights_TK[0], [w * scale for w in weights], rtol=1e-5)


def test_sparsemixer_by_hand():
    # top 10: 9.9 is within 2 % and 9.7 is not. Second: 9.9; 9.7 is 2.02 % below, 9.75 is 1.5 % below
    found = select(np.array([[9.75, 10.0, 9.9, 9.7]], np.float32), Scoring("sparsemixer", 2))
    assert found.experts_TK.tolist() == [[1, 2]]
    first = 1 / (1 + math.exp(-0.1))
    second = 1 / (1 + math.exp(-0.15))
    np.testing.assert_allclose(found.weights_TK, [[first, second]], rtol=1e-5)


def test_sparsemixer_changes_with_a_shift_of_all_logits():
    near = Scoring("sparsemixer", 2, jitter=0.05)
    low, high = (select(np.array([[1.0, 0.8, 0.0]], np.float32) + shift, near) for shift in (0, 100))
    assert low.experts_TK.tolist() == high.experts_TK.tolist()
    assert low.weights_TK[0, 0] == 1.0 and high.weights_TK[0, 0] < 0.6


@pytest.mark.parametrize("k", [1, 3])
def test_sparsemixer_is_refused_for_another_k(k):
    with pytest.raises(MaskContentError, match=f"sparsemixer with k = {k}"):
        select(np.zeros((1, 4), np.float32), Scoring("sparsemixer", k))


def near_ties(dtype, *, tokens=3000, experts=12, seed=3):
    """Logits [T, E] of which many are equal and many within a few percent, about the jitter, of another."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(tokens, 1)) * rng.choice([0.1, 1, 20], (tokens, 1))
    close = base * (1 + rng.choice([0, 0.01, 0.02, 0.0201, 0.04], (tokens, experts)) * rng.choice([-1, 1], experts))
    far = rng.normal(size=(tokens, experts))
    logits = np.where(rng.random((tokens, experts)) < 0.6, close, far)
    logits[rng.random((tokens, experts)) < 0.05] = 0
    return torch.tensor(logits, dtype=torch.float32).to(dtype)


def as_numpy(tensor):
    return tensor.float().numpy()


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.4])
def test_sparsemixer_equals_the_one_of_transformers(dtype, jitter):
    logits = near_ties(dtype)
    weights, experts = sparsemixer(logits, jitter_eps=jitter, training=False)
    scoring = Scoring("sparsemixer", 2, jitter=jitter, low_precision=True)
    found = select(as_numpy(logits), scoring, dtype=str(dtype).removeprefix("torch."))
    assert found.experts_TK.tolist() == experts.tolist()
    # theirs end in the logits' dtype: half a unit of its last place
    rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + 1e-5
    np.testing.assert_allclose(found.weights_TK, as_numpy(weights), rtol=rtol)
    assert len(np.unique(found.weights_TK)) > 500  # near ties there were


@pytest.mark.filterwarnings("error")
def test_sparsemixer_warns_of_nothing_where_the_highest_logit_is_zero():
    # second pick -1, relative to the 0 that was picked before: -1 / 0 is not far
    found = select(np.array([[0.0, -1.0, -3.0]], np.float32), Scoring("sparsemixer", 2))
    assert found.experts_TK.tolist() == [[0, 1]] and found.weights_TK.tolist() == [[1.0, 1.0]]


# ---------------------------------------------------------------- scores kept in half precision

LOW_BITS = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)


def floats_to_round():
    """float32 values: every upper half with telling lower halves, random bits, and all about float16's subnormals."""
    whole = (np.arange(2**16, dtype=np.uint32)[:, None] << np.uint32(16)) | LOW_BITS
    random = np.random.default_rng(0).integers(0, 2**32, 2**19, dtype=np.uint32)
    quarters = (np.arange(8 * 2048, dtype=np.float32) / 4 * np.float32(2**-24)).astype(np.float32)
    beside = [quarters, np.nextafter(quarters, np.float32(1)), np.nextafter(quarters, np.float32(-1))]
    edges = np.array([65504, 65519.996, 65520, 65536, 3.3895314e38, 3.4028235e38, np.inf, 0.0], np.float32)
    values = np.concatenate([whole.ravel().view(np.float32), random.view(np.float32), *beside, edges])
    return np.concatenate([values, -values])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_torchs_bit_for_bit(dtype):
    values = floats_to_round()
    before = values.tobytes()
    found = round_to(values, str(dtype).removeprefix("torch."))
    assert values.tobytes() == before
    truth = torch.from_numpy(values).to(dtype).float().numpy()
    number = ~np.isnan(values)
    assert found.dtype == np.float32 and number.sum() > 10**6 and (~number).sum() > 1000
    assert np.isnan(found[~number]).all()
    assert np.array_equal(found[number].view(np.uint32), truth[number].view(np.uint32))


def test_rounding_keeps_shapes_also_of_views():
    values = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    for dtype in ("float32", "bfloat16", "float16"):
        found = round_to(values[::2, ::-1], dtype)
        assert found.shape == (3, 8) and np.array_equal(found, round_to(values, dtype)[::2, ::-1])
        assert round_to(values[:0], dtype).shape == (0, 8)


def bf16_logits(seed, *, tokens=800, experts=16):
    """bfloat16 logits [T, E] with ties, of several spreads."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(tokens, experts)) * 16) / 16 * rng.choice([0.25, 1, 4], (tokens, 1))
    return torch.tensor(logits, dtype=torch.float32).bfloat16()


def settled(scores_TE):
    """Tokens whose float64 scores round to bfloat16 alike whichever way float32 arithmetic errs."""
    low, high = scores_TE * (1 - 1e-6), scores_TE * (1 + 1e-6)
    return ((low.bfloat16() == high.bfloat16()) & (scores_TE > 1e-37)).all(dim=-1)


def first(scores, k):
    """Ids of the k best; of equals the lower id."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def torch_groups(choice, *, groups, kept, fill, best):
    """Choice scores with the groups closed that lose by the sum of their best two, in the scores' own dtype."""
    grouped = choice.unflatten(-1, (groups, -1))
    open_groups = best(grouped.topk(2, dim=-1).values.sum(dim=-1), kept)
    closed = torch.ones(grouped.shape[:-1], dtype=torch.bool).scatter(-1, open_groups, False)
    return grouped.masked_fill(closed[..., None], fill).flatten(-2)


BESTS = {"lower id first": first, "torch's own order": lambda scores, k: scores.topk(k, dim=-1).indices}


def assert_selects(logits, scoring, ids, weights, *, best, keep, rtol=0.0, **vectors):
    """select gives torch's experts and weights for the tokens of `keep`, told torch's own order of ties if need be."""
    prefer = None
    if best != "lower id first":
        prefer = torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, ids, True).numpy()
    found = select(as_numpy(logits), scoring, dtype="bfloat16", prefer_TE=prefer, **vectors)
    order, theirs = np.argsort(found.experts_TK, axis=-1), ids.numpy().argsort(axis=-1)
    keep = keep.numpy()
    assert keep.mean() > 0.8
    ours = np.take_along_axis(found.experts_TK, order, -1)
    assert np.array_equal(ours[keep], np.take_along_axis(ids.numpy(), theirs, -1)[keep])
    np.testing.assert_allclose(
        np.take_along_axis(found.weights_TK, order, -1)[keep],
        np.take_along_axis(as_numpy(weights), theirs, -1)[keep],
        rtol=rtol,
    )


@pytest.mark.parametrize("best", BESTS)
@pytest.mark.parametrize("renormalise", [False, True])
def test_a_softmax_router_in_bfloat16_with_groups_equals_torch(best, renormalise):
    # mistral4: softmax, groups by the sum of their best two, losers filled with 0, all of it in bfloat16
    logits = bf16_logits(1)
    scores = logits.softmax(dim=-1)
    ids = BESTS[best](torch_groups(scores, groups=4, kept=2, fill=0.0, best=BESTS[best]), 5)
    weights = scores.gather(-1, ids)
    if renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    scoring = Scoring(
        "softmax-topk", 5, renormalise=renormalise, norm_add=1e-20, groups=4, groups_kept=2, group_score="top2-sum",
        group_fill=0.0, low_precision=True,
    )  # fmt: skip
    # the sum and the quotient are rounded too, half a unit each
    rtol = 1.1 * torch.finfo(torch.bfloat16).eps if renormalise else 0.0
    keep = settled(logits.double().softmax(dim=-1))
    assert_selects(logits, scoring, ids, weights, best=best, keep=keep, rtol=rtol)
    # rounding does decide: in float32 some tokens select others
    exact = select(as_numpy(logits), scoring)
    assert exact.as_sets() != select(as_numpy(logits), scoring, dtype="bfloat16").as_sets()


@pytest.mark.parametrize(
    "best, dtype, grouped",
    [
        ("lower id first", torch.bfloat16, False),
        ("lower id first", torch.float32, False),
        ("lower id first", torch.bfloat16, True),
        ("lower id first", torch.float32, True),
        ("torch's own order", torch.bfloat16, False),
        ("torch's own order", torch.float32, False),
        ("torch's own order", torch.bfloat16, True),
    ],
)
def test_a_sigmoid_router_in_bfloat16_adds_its_correction_in_the_wider_dtype(best, dtype, grouped):
    # lfm2_moe, inkling: bfloat16 + bfloat16 is rounded, bfloat16 + float32 is not
    logits = bf16_logits(2)
    correction = torch.tensor(np.random.default_rng(5).normal(size=16) * 0.3, dtype=torch.float32).to(dtype)
    scores = logits.sigmoid()
    choice = scores + correction
    assert choice.dtype == dtype
    if grouped:
        choice = torch_groups(choice, groups=4, kept=3, fill=-torch.inf, best=BESTS[best])
    ids = BESTS[best](choice, 4)
    groups = {"groups": 4, "groups_kept": 3, "group_score": "top2-sum"} if grouped else {}
    assert_selects(
        logits, Scoring("sigmoid", 4, low_precision=True, **groups), ids, scores.gather(-1, ids), best=best,
        keep=settled(logits.double().sigmoid()), correction_E=as_numpy(correction),
        correction_dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


@pytest.mark.parametrize("best", BESTS)
def test_a_sqrtsoftplus_router_in_bfloat16_rounds_softplus_and_then_its_root(best):
    logits = bf16_logits(6)
    scores = torch.nn.functional.softplus(logits).sqrt()
    ids = BESTS[best](scores, 4)
    assert_selects(
        logits, Scoring("sqrtsoftplus", 4, low_precision=True), ids, scores.gather(-1, ids), best=best,
        keep=settled(torch.nn.functional.softplus(logits.double())),
    )  # fmt: skip


def test_low_precision_needs_both_the_router_and_the_dtype():
    logits = as_numpy(bf16_logits(4))
    exact = select(logits, Scoring("sigmoid", 4))
    for scoring, dtype in ((Scoring("sigmoid", 4), "bfloat16"), (Scoring("sigmoid", 4, low_precision=True), "float32")):
        found = select(logits, scoring, dtype=dtype)
        assert found.weights_TK.tobytes() == exact.weights_TK.tobytes()
    rounded = select(logits, Scoring("sigmoid", 4, low_precision=True), dtype="bfloat16")
    assert np.array_equal(rounded.weights_TK, round_to(rounded.weights_TK, "bfloat16"))
    assert not np.array_equal(rounded.weights_TK, exact.weights_TK)


# ---------------------------------------------------------------- ties broken as another engine did


def preferred(experts, *ids):
    prefer = np.zeros((1, experts), dtype=bool)
    prefer[0, list(ids)] = True
    return prefer


@zero_norms
@PROPERTY
@given(st.booleans().flatmap(lambda grouped: routed(grouped=grouped)), st.data())
def test_a_preference_changes_nothing_where_nothing_is_tied(case, data):
    # one number per expert and no correction: no two scores are equal, nor the sums of two
    order = data.draw(st.permutations(range(case.experts)))
    row = [[rank * 0.3 - 1.7 + rank**2 * 0.01 for rank in order] + [0.5] * case.scoring.shared]
    scoring = Scoring(**{**vars(case.scoring), "group_fill": -math.inf})
    truth = loop_select(row[0], Scoring(**{**vars(scoring), "norm_add": 1.0}))
    assume(not truth.unsure)
    logits = np.array(row, np.float32)
    prefer = np.array([data.draw(st.lists(st.booleans(), min_size=case.experts, max_size=case.experts))])
    plain, found = select(logits, scoring), select(logits, scoring, prefer_TE=prefer)
    assert found.experts_TK.tolist() == plain.experts_TK.tolist()
    assert found.weights_TK.tobytes() == plain.weights_TK.tobytes()


@zero_norms
@PROPERTY
@given(routed(), st.data())
def test_a_preference_only_moves_experts_within_ties(case, data):
    cells = st.lists(st.booleans(), min_size=case.experts, max_size=case.experts)
    prefer = np.array([data.draw(cells) for _ in case.rows])
    logits = np.array(case.rows, np.float32)
    plain = select(logits, case.scoring, **case.vectors)
    found = select(logits, case.scoring, prefer_TE=prefer, **case.vectors)
    for t, row in enumerate(case.rows):
        assume(not loop_select(row, case.scoring, correction=case.correction, scale=case.scale).unsure)
        # what stands at a place of the order is, but for ties, what stood there: equal logit and correction
        score = {e: (row[e], case.correction and case.correction[e]) for e in range(case.experts)}
        chosen = found.experts_TK[t].tolist()
        assert [score[e] for e in chosen] == [score[e] for e in plain.experts_TK[t]]
        left = set(range(case.experts)) - set(chosen)
        for e in chosen:
            assert prefer[t, e] or not any(prefer[t, other] for other in left if score[other] == score[e])


@pytest.mark.parametrize("kind", [*KINDS, "sparsemixer"])
@pytest.mark.parametrize("level", [0.0, 2.5, -2.5, -30.0])
def test_of_equals_the_preferred_win(kind, level):
    found = select(np.full((1, 6), level, np.float32), Scoring(kind, 2), prefer_TE=preferred(6, 4, 2))
    assert found.experts_TK.tolist() == [[2, 4]]


@pytest.mark.parametrize("kind", ["topk-softmax", "sparsemixer", "topk-sigmoid"])
@pytest.mark.parametrize("level", [1.0, 3.0, -3.0, 1e30])
@pytest.mark.parametrize("ulps, wins", [(0, True), (1, True), (4, True), (64, False), (1000, False)])
def test_a_preference_reaches_a_few_units_of_the_last_place(kind, level, ulps, wins):
    lower = np.float32(level) - np.float32(ulps) * np.spacing(np.abs(np.float32(level)))
    logits = np.array([[level, level, lower]], np.float32)
    chosen = select(logits, Scoring(kind, 2), prefer_TE=preferred(3, 2)).as_sets()[0]
    assert (2 in chosen) == wins
    assert 2**-24 < TIE < 2**-17


def test_a_preferred_expert_that_is_clearly_lower_never_wins():
    logits = np.array([[1.0, 1.0 - 1e-4, 0.9, -5.0]], np.float32)
    for kind in [*KINDS, "sparsemixer"]:
        found = select(logits, Scoring(kind, 2), prefer_TE=preferred(4, 2, 3))
        assert found.experts_TK.tolist() == [[0, 1]]


@pytest.mark.parametrize("group_score", ["max", "top2-sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_groups_the_one_with_a_preferred_expert_is_kept(kind, group_score):
    scoring = Scoring(kind, 2, groups=3, groups_kept=1, group_score=group_score)
    logits = np.array([[0.5, -1.0, 0.5, -1.0, 0.5, -1.0]], np.float32)
    assert select(logits, scoring).as_sets() == [{0, 1}]
    assert select(logits, scoring, prefer_TE=preferred(6, 3)).as_sets() == [{2, 3}]
    logits[0, 4:] += 0.01  # clearly better now
    assert select(logits, scoring, prefer_TE=preferred(6, 3)).as_sets() == [{4, 5}]


def test_of_closed_experts_at_the_fill_the_preferred_win():
    scoring = Scoring("sigmoid", 2, groups=2, groups_kept=1, group_fill=0.0)
    correction = np.array([0.0, -1.0, -0.75, -0.75], np.float32)
    logits = np.zeros((1, 4), np.float32)
    found = select(logits, scoring, correction_E=correction, prefer_TE=preferred(4, 3))
    assert found.experts_TK.tolist() == [[0, 3]]


def test_a_force_outranks_a_preference():
    force = np.array([0, 1, -1, 0], np.int8)
    found = select(np.zeros((1, 4), np.float32), Scoring("sigmoid", 2), force_TE=force, prefer_TE=preferred(4, 2, 3))
    assert found.experts_TK.tolist() == [[1, 3]]


# ---------------------------------------------------------------- steering


@zero_norms
@PROPERTY
@given(routed(), st.data())
def test_additive_steering_is_selecting_from_logits_plus_bias(case, data):
    cells = st.integers(-24, 24).map(lambda n: n / 8)
    bias = data.draw(st.lists(cells, min_size=len(case.rows[0]), max_size=len(case.rows[0])))
    steered = steer_logits(np.array(case.rows, np.float32), bias_TE=np.array(bias, np.float32))
    plain = [[z + b for z, b in zip(row, bias, strict=True)] for row in case.rows]  # exact: all are eighths
    assert steered.tolist() == plain
    assert_matches_loop(case._replace(rows=steered.tolist()))


def loop_steer(row, bias, force):
    """SteerMoE's placement with our per-expert order, from the docstring: (lowest allowed, highest allowed)."""
    z = [x + b for x, b in zip(row, bias, strict=True)]
    on = sorted((e for e in range(len(z)) if force[e] > 0), key=lambda e: (z[e], e))
    steered = list(z)
    for rank, e in enumerate(on):
        steered[e] = max(z) + FORCE_EPS * (1 + rank / len(on))
    for e in range(len(z)):
        if force[e] < 0:
            steered[e] = min(z) - FORCE_EPS
    return steered


@PROPERTY
@given(st.data())
def test_forced_logits_lie_an_eps_beyond_the_extremes_after_the_bias(data):
    experts = data.draw(st.integers(1, 9))
    cells = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=experts, max_size=experts)
    row, bias = data.draw(cells), data.draw(cells)
    force = data.draw(st.lists(st.sampled_from((-1, 0, 1)), min_size=experts, max_size=experts))
    found = steer_logits(np.array([row], np.float32), bias_TE=np.array(bias, np.float32), force_TE=np.array(force))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], loop_steer(row, bias, force), rtol=1e-6, atol=1e-6)


def test_forcing_works_on_tables_of_one_row_and_of_one_row_per_token():
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    force = np.array([[1, 0, 0], [0, -1, 0]], dtype=np.int8)
    whole = steer_logits(logits, force_TE=force)
    for t in range(2):
        assert whole[t].tobytes() == steer_logits(logits[t : t + 1], force_TE=force[t])[0].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_empty_bias_and_an_empty_force_change_no_bit(dtype):
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(50, 16)) * 10).astype(dtype)
    same = steer_logits(logits, bias_TE=np.zeros(16, np.float32), force_TE=np.zeros(16, np.int8))
    assert same.tobytes() == logits.astype(np.float32).tobytes() == steer_logits(logits).tobytes()
    for kind in KINDS:
        scoring = Scoring(kind, 3, renormalise=True)
        a, b = select(logits, scoring), select(same, scoring, force_TE=np.zeros(16, np.int8))
        assert a.experts_TK.tobytes() == b.experts_TK.tobytes() and a.weights_TK.tobytes() == b.weights_TK.tobytes()


def hard_rows(experts):
    """Moderate rows first (three random, one tied in pairs, two flat), then huge ones."""
    rng = np.random.default_rng(experts)
    moderate = [*rng.normal(size=(3, experts)) * 3, np.arange(experts) // 2, np.zeros(experts), np.full(experts, -2.5)]
    signs = np.where(np.arange(experts) % 2, -1.0, 1.0)
    huge = [signs * 3e38, np.full(experts, 3e38), np.full(experts, -3e38), signs * 1e30, np.arange(experts) * 1e30]
    return np.array([*moderate, *huge], dtype=np.float32), len(moderate)


@pytest.mark.parametrize("experts", range(1, 7))
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_every_feasible_force_is_honoured_and_others_keep_their_order(experts):
    logits, moderate = hard_rows(experts)
    for top_k in range(1, min(3, experts) + 1):
        kinds = [*KINDS, "sparsemixer"] if top_k == 2 else KINDS
        tried = 0
        for mask in itertools.product((-1, 0, 1), repeat=experts):
            on = {e for e in range(experts) if mask[e] > 0}
            off = {e for e in range(experts) if mask[e] < 0}
            if len(on) > top_k or len(off) > experts - top_k:
                continue
            tried += 1
            force = np.array(mask, dtype=np.int8)
            steered = steer_logits(logits, force_TE=force)
            for kind in kinds:
                chosen = select(steered, Scoring(kind, top_k), force_TE=force).experts_TK.tolist()
                for t, row in enumerate(chosen):
                    assert len(set(row)) == top_k
                    assert on <= set(row) and not off & set(row), (mask, kind, t)
                    if t >= moderate and kind in SATURATING:
                        continue  # scores of huge logits saturate into ties
                    free = [e for e in loop_rank(logits[t].tolist()) if e not in on | off]
                    assert row[len(on) :] == free[: top_k - len(on)], (mask, kind, t)
                    if t < moderate:
                        first = [float(logits[t, e]) for e in row[: len(on)]]
                        assert first == sorted(first, reverse=True), (mask, kind, t)
        assert tried == feasible_count(experts, top_k)


def feasible_count(experts, top_k):
    """Masks with at most k on and at most E - k off, by the multinomial formula."""
    return sum(
        math.comb(experts, on) * math.comb(experts - on, off)
        for on in range(top_k + 1)
        for off in range(experts - top_k + 1)
        if on + off <= experts
    )


# ---------------------------------------------------------------- what cannot be forced


@pytest.mark.parametrize(
    "force, top_k, what, where",
    [
        ([1, 1, 1, 0], 2, "3 experts are switched on where 2 are selected", "row 0"),
        ([-1, -1, -1, 0], 2, "3 of 4 experts are switched off where 2 must be selected", "row 0"),
        ([1, -1, -1, -1], 2, "3 of 4 experts are switched off", "row 0"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], 3, "4 experts are switched on where 3", "row 1"),
        ([[0, -1, 0, 0], [-1, -1, 0, 0]], 3, "2 of 4 experts are switched off", "row 1"),
    ],
)
def test_a_force_that_cannot_be_met_is_refused(force, top_k, what, where):
    force = np.array(force, dtype=np.int8)
    logits = np.zeros((2, 4), np.float32)
    for kind in KINDS:
        with pytest.raises(MaskContentError, match=what) as caught:
            select(logits, Scoring(kind, top_k), force_TE=force)
        assert where in caught.value.where
        with pytest.raises(MaskContentError, match=what):
            check_force(np.atleast_2d(force), scoring=Scoring(kind, top_k))


@pytest.mark.parametrize(
    "force, kept, top_k, what, where",
    [
        ([1, 0, 1, 0, 0, 0], 1, 2, "experts of 2 groups are switched on where 1 can be chosen", "row 0"),
        ([[0] * 6, [1, 0, 1, 0, 1, 0]], 2, 3, "experts of 3 groups are switched on where 2", "row 1"),
        ([[0] * 6, [0, 0, -1, 0, 0, 0]], 1, 2, "too few experts are left in the 1 of 3 groups", "row 1"),
        ([0, 0, -1, -1, 0, -1], 2, 2, "too few experts are left in the 2 of 3 groups", "row 0"),
    ],
)
def test_a_force_that_groups_cannot_follow_is_refused(force, kept, top_k, what, where):
    scoring = Scoring("sigmoid", top_k, groups=3, groups_kept=kept)
    force = np.atleast_2d(np.array(force, dtype=np.int8))
    with pytest.raises(MaskContentError, match=what) as caught:
        check_force(force, scoring=scoring)
    assert where in caught.value.where
    with pytest.raises(MaskContentError, match=what):
        select(np.zeros((len(force), 6), np.float32), scoring, force_TE=force)
    check_force(force, scoring=Scoring("sigmoid", top_k))  # without groups it can be met


def test_a_force_at_the_limit_is_accepted():
    check_force(np.array([[1, 1, -1, -1]]), scoring=Scoring("sigmoid", 2))
    check_force(np.zeros((0, 4), np.int8), scoring=Scoring("sigmoid", 2))
    check_force(np.array([[1, 1, -1, -1, 0, 0]]), scoring=Scoring("sigmoid", 2, groups=3, groups_kept=1))


def test_a_force_of_no_rows_is_accepted_with_groups():
    check_force(np.zeros((0, 4), np.int8), scoring=Scoring("sigmoid", 2, groups=2, groups_kept=1))


def grouped_scorings(experts, groups):
    for kept in range(1, groups + 1):
        for top_k in range(1, kept * experts // groups + 1):
            yield Scoring("sigmoid", top_k, groups=groups, groups_kept=kept)


def accepts(force, scoring):
    try:
        check_force(np.array([force], dtype=np.int8), scoring=scoring)
    except MaskContentError:
        return False
    return True


SMALL_GROUPS = [(2, 2), (4, 2), (6, 2), (3, 3), (6, 3)]


@pytest.mark.parametrize("experts, groups", SMALL_GROUPS)
def test_a_force_is_refused_just_where_some_choice_of_groups_cannot_follow_it(experts, groups):
    seen = set()
    for scoring in grouped_scorings(experts, groups):
        for force in itertools.product((-1, 0, 1), repeat=experts):
            accepted = accepts(force, scoring)
            assert accepted == loop_feasible(force, scoring), (force, scoring)
            seen.add(accepted)
    assert seen == {True, False}


@pytest.mark.parametrize("experts, groups", SMALL_GROUPS)
@pytest.mark.parametrize("group_score", ["max", "top2-sum"])
def test_an_accepted_force_is_met_whatever_the_logits_and_corrections(experts, groups, group_score):
    rng = np.random.default_rng(experts * groups)
    size = experts // groups
    for scoring in grouped_scorings(experts, groups):
        accepted = [f for f in itertools.product((-1, 0, 1), repeat=experts) if loop_feasible(f, scoring)]
        force = np.repeat(np.array(accepted, dtype=np.int8), 2, axis=0)
        logits = steer_logits(np.round(rng.normal(size=force.shape) * 8).astype(np.float32) / 4, force_TE=force)
        correction = np.round(rng.normal(size=experts) * 4).astype(np.float32) / 4
        scoring = Scoring(**{**vars(scoring), "group_score": group_score})
        found = select(logits, scoring, correction_E=correction, force_TE=force)
        chosen = np.zeros(force.shape, dtype=bool)
        np.put_along_axis(chosen, found.experts_TK, True, axis=-1)
        assert (chosen.sum(axis=-1) == scoring.top_k).all()
        assert chosen[force > 0].all() and not chosen[force < 0].any()
        # who is free and chosen lies in a group that is kept; the ranking of groups, once more by hand
        choice = 1 / (1 + np.exp(-logits.astype(np.float64))) + correction
        best = np.sort(choice.reshape(-1, groups, size), axis=-1)[..., -(2 if group_score == "top2-sum" else 1) :]
        score_TG = best.sum(axis=-1)
        nth = np.sort(score_TG, axis=-1)[:, -scoring.groups_kept, None]
        may_be_open = np.repeat(score_TG >= nth - 1e-6, size, axis=-1)
        assert may_be_open[chosen & (force == 0)].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [*KINDS, "sparsemixer"])
def test_logits_that_are_not_finite_are_refused_and_placed(kind, bad):
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = bad
    with pytest.raises(NanLogitsError, match=f"router logits hold {bad}") as caught:
        select(logits, Scoring(kind, 2))
    assert caught.value.where == "token 1, expert 2"


def test_a_shared_experts_logit_that_is_not_finite_is_refused_too():
    with pytest.raises(NanLogitsError, match="router logits hold nan"):
        select(np.array([[1.0, 2.0, np.nan]], np.float32), Scoring("sigmoid", 1, shared=1))


def test_a_whole_row_of_minus_infinity_and_a_float16_overflow_are_refused():
    with np.errstate(over="ignore"):
        overflown = np.array([[70000.0, 1.0]]).astype(np.float16)
    for logits in (np.full((1, 3), -np.inf, np.float32), overflown):
        with pytest.raises(NanLogitsError):
            select(logits, Scoring("softmax-topk", 1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["sigmoid", "topk-sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("guard", [{"norm_add": 1e-20}, {"norm_min": 1e-12}])
def test_a_guarded_norm_gives_zeros_when_all_scores_underflow(kind, guard):
    found = select(np.full((1, 4), -200.0, np.float32), Scoring(kind, 2, renormalise=True, **guard))
    assert found.weights_TK.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    "scoring, text",
    [
        (Scoring("softmax-topk", 8), "softmax-topk k=8"),
        (Scoring("softmax-topk", 8, renormalise=True, scale=2.5), "softmax-topk k=8, renormalised, x2.5"),
        (
            Scoring("sigmoid", 4, groups=8, groups_kept=3, group_score="top2-sum"),
            "sigmoid k=4, 3 of 8 groups by top2-sum",
        ),
        (Scoring("sparsemixer", 2, jitter=0.1), "sparsemixer k=2, jitter=0.1"),
        (Scoring("softmax-topk", 4, renormalise=True, norm_p=2.0), "softmax-topk k=4, renormalised by the 2-norm"),
        (Scoring("sigmoid", 4, multiplier=0.5, softcap=30.0), "sigmoid k=4, logits x0.5, softcap=30"),
        (Scoring("sigmoid", 4, shared=2, skipped=1), "sigmoid k=4, 2 shared in the norm, last 1 skip"),
    ],
)
def test_a_scoring_describes_all_that_makes_it_another(scoring, text):
    assert scoring.describe() == text


# ---------------------------------------------------------------- the torch side


def make_mask(*, experts, top_k, strength=None, sigma=None, force=None, alpha=1.0):
    layers = len(strength if strength is not None else force)
    info = MaskInfo(
        fingerprint=Fingerprint(
            model_type="fake", layer_ids=tuple(range(layers)), experts=experts, top_k=top_k, scoring="s",
            router_sha256="0" * 64,
        ),
        method="test", intent=Intent(toward="x"), alpha=alpha,
    )  # fmt: skip
    return SteeringMask(info, strength_LE=strength, sigma_L=sigma, force_LE=force)


def random_mask(rng, layers, experts, top_k):
    if rng.random() < 0.5:
        strength = rng.normal(size=(layers, experts)).astype(np.float32)
        strength[rng.random((layers, experts)) < 0.4] = 0
        sigma = rng.uniform(0.1, 3, layers).astype(np.float32)
        return make_mask(experts=experts, top_k=top_k, strength=strength, sigma=sigma, alpha=float(rng.normal()))
    force = np.zeros((layers, experts), np.int8)
    for row in force:
        order = rng.permutation(experts)
        on = rng.integers(0, top_k + 1)
        off = rng.integers(0, experts - top_k + 1)
        row[order[:on]] = 1
        row[order[on:][:off]] = -1
    return make_mask(experts=experts, top_k=top_k, force=force)


def fake_router(layer, experts):
    return SimpleNamespace(index=layer, experts=experts)


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def numpy_steer(mask, layer, logits_NE):
    """steer_logits in float32, then rounded to the logits' dtype."""
    if mask is None:
        return logits_NE
    bias = None if mask.forced else mask.bias_LE()[layer]
    force = mask.force_LE[layer] if mask.forced else None
    return torch.from_numpy(steer_logits(logits_NE.float().numpy(), bias_TE=bias, force_TE=force)).to(logits_NE.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_steering_is_numpy_steering_bit_for_bit_in_every_row_of_a_batch(dtype):
    rng = np.random.default_rng(7)
    for _ in range(150):
        experts = int(rng.integers(2, 17))
        top_k = int(rng.integers(1, experts + 1))
        layers, batch, length = int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.integers(1, 5))
        masks = [random_mask(rng, layers, experts, top_k) for _ in range(int(rng.integers(1, 4)))]
        tables = MaskTables.of_masks(masks, [None] * len(masks), device=torch.device("cpu"))
        rows = rng.integers(0, len(masks) + 1, batch).tolist()
        # halves make ties common; + 0.0 since adding an empty bias turns -0.0 into 0.0, which no router can tell
        z = torch.from_numpy(np.round(rng.normal(size=(batch * length, experts)) * 4) / 2).to(dtype) + 0.0
        for layer in range(layers):
            router = fake_router(layer, experts)
            tables.set_rows(rows)
            whole = tables.logits(router, z)
            assert whole.dtype == dtype and whole.shape == z.shape
            for b, m in enumerate(rows):
                part = slice(b * length, (b + 1) * length)
                expected = numpy_steer(masks[m - 1] if m else None, layer, z[part])
                assert torch.equal(bits(whole[part]), bits(expected))
                tables.set_rows([m])
                for n in range(b * length, (b + 1) * length):
                    alone = tables.logits(router, z[n : n + 1])
                    assert torch.equal(bits(alone[0]), bits(whole[n]))


def test_ranks_put_forced_on_above_all_and_forced_off_below_all_per_row():
    force = np.array([[1, 0, -1, 0]], np.int8)
    other = np.array([[-1, 0, 0, 1]], np.int8)
    masks = [make_mask(experts=4, top_k=2, force=f) for f in (force, other)]
    tables = MaskTables.of_masks(masks, [None, None], device=torch.device("cpu"))
    tables.set_rows([1, 0, 2])
    choice = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.bfloat16).repeat(6, 1)
    ranks = tables.ranks(fake_router(0, 4), choice)
    inf, plain = torch.inf, choice[0].float().tolist()
    expected = [[inf, plain[1], -inf, plain[3]], plain, [-inf, plain[1], plain[2], inf]]
    assert ranks.dtype == torch.float32
    assert ranks.tolist() == [row for row in expected for _ in range(2)]


def test_additive_masks_leave_the_selection_to_the_model():
    mask = make_mask(experts=2, top_k=1, strength=np.ones((1, 2), np.float32), sigma=np.ones(1, np.float32))
    tables = MaskTables.of_masks([mask], [None], device=torch.device("cpu"))
    assert tables.ranks(fake_router(0, 2), torch.zeros(1, 2)) is None


def test_forcing_with_ranks_is_honoured_where_bfloat16_rounds_the_eps_away():
    force = np.array([[0, 0, 0, 1, 1, -1, 0, 0]], np.int8)
    tables = MaskTables.of_masks(
        [make_mask(experts=8, top_k=2, force=force)], [None], device=torch.device("cpu")
    )  # fmt: skip
    router = fake_router(0, 8)
    z = torch.full((1, 8), 100.0, dtype=torch.bfloat16)
    steered = tables.logits(router, z)
    assert torch.equal(steered, z)  # the eps is gone: this is why ranks exist
    assert set(tables.ranks(router, steered).topk(2).indices[0].tolist()) == {3, 4}


def test_a_layer_without_entries_hands_back_the_very_same_tensor():
    strength = np.array([[0, 0], [1, 0]], np.float32)
    mask = make_mask(experts=2, top_k=1, strength=strength, sigma=np.ones(2, np.float32))
    tables = MaskTables.of_masks([mask], [None], device=torch.device("cpu"))
    z = torch.randn(3, 2).bfloat16()
    assert tables.logits(fake_router(0, 2), z) is z
    assert tables.logits(fake_router(1, 2), z) is not z


@pytest.mark.parametrize("alpha, expected", [(None, 3.0), (0.5, 0.5), (-2.0, -2.0), (0.0, 0.0)])
def test_alpha_scales_a_bias_and_defaults_to_the_masks_own(alpha, expected):
    strength = np.array([[1, 0]], np.float32)
    mask = make_mask(experts=2, top_k=1, strength=strength, sigma=np.ones(1, np.float32), alpha=3.0)
    tables = MaskTables.of_masks([mask], [alpha], device=torch.device("cpu"))
    assert tables.logits(fake_router(0, 2), torch.zeros(1, 2)).tolist() == [[expected, 0.0]]
    assert tables.receipt.alphas == (3.0 if alpha is None else alpha,)
    assert tables.receipt.masks == (mask.sha256[:12],)


@pytest.mark.parametrize("alpha, forced", [(None, True), (0.5, True), (-1.0, True), (0.0, False)])
def test_alpha_switches_a_force_off_at_zero_only(alpha, forced):
    tables = MaskTables.of_masks(
        [make_mask(experts=2, top_k=1, force=np.array([[0, 1]], np.int8))], [alpha], device=torch.device("cpu")
    )
    steered = tables.logits(fake_router(0, 2), torch.zeros(1, 2))
    assert (steered[0, 1] > 0).item() == forced
    assert (tables.ranks(fake_router(0, 2), steered) is not None) == forced


def test_several_masks_without_rows_are_refused():
    mask = make_mask(experts=2, top_k=1, force=np.array([[0, 1]], np.int8))
    tables = MaskTables.of_masks([mask, mask], [None, None], device=torch.device("cpu"))
    with pytest.raises(InputError, match="nothing says which row"):
        tables.logits(fake_router(0, 2), torch.zeros(2, 2))


def test_rows_that_do_not_divide_the_batch_are_refused():
    mask = make_mask(experts=2, top_k=1, force=np.array([[0, 1]], np.int8))
    tables = MaskTables.of_masks([mask], [None], device=torch.device("cpu"))
    tables.set_rows([1, 0])
    with pytest.raises(InputError, match="3 positions cannot hold 2 rows"):
        tables.logits(fake_router(0, 2), torch.zeros(3, 2))


def test_one_layer_tables_steer_that_router_only():
    routers = [fake_router(i, 3) for i in range(3)]
    bias, force = np.array([0, 0, 2], np.float32), np.array([1, 0, 0], np.int8)
    tables = MaskTables.one_layer(routers, routers[1], bias_E=bias, force_E=force, device=torch.device("cpu"))
    z = torch.tensor([[0.0, 1.0, 2.0]])
    assert tables.logits(routers[0], z) is z and tables.logits(routers[2], z) is z
    expected = steer_logits(z.numpy(), bias_TE=bias, force_TE=force)
    assert tables.logits(routers[1], z).numpy().tobytes() == expected.tobytes()


def test_a_receipt_counts_positions_once_and_changed_sets_not_changed_orders():
    mask = make_mask(experts=3, top_k=2, force=np.array([[0, 1, 0], [0, 0, 1]], np.int8))
    tables = MaskTables.of_masks([mask], [None], device=torch.device("cpu"))
    first, second = fake_router(0, 3), fake_router(1, 3)
    for router in (first, second):
        tables.logits(router, torch.zeros(5, 3))
    assert tables.receipt.positions == 5 and tables.receipt.routers == 2
    assert tables.wants_check(first) and tables.wants_check(second)
    before, after = torch.tensor([[0, 1], [0, 1], [2, 1]]), torch.tensor([[1, 0], [0, 2], [1, 2]])
    tables.checked(first, before, after)
    assert (tables.receipt.checked, tables.receipt.changed) == (3, 1)
    assert not tables.wants_check(first) and tables.wants_check(second)
    assert "1 of 3 checked selections changed (33.3 %)" in str(tables.receipt)
    assert "(none)" in str(Receipt(1, (), ()))


def test_a_bias_being_learnt_is_added_in_float32_and_carries_gradient():
    bias = torch.tensor([[0.0, 0.0], [1.0, -1.0]], requires_grad=True)
    steering = BiasSteering(bias)
    router = fake_router(1, 2)
    steered = steering.logits(router, torch.ones(3, 2, dtype=torch.bfloat16))
    assert steered.dtype == torch.bfloat16 and steered.tolist() == [[2.0, 0.0]] * 3
    steered.float().sum().backward()
    assert bias.grad.tolist() == [[0.0, 0.0], [3.0, 3.0]]
    assert steering.ranks(router, steered) is None and not steering.wants_check(router)

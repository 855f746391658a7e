"""routing.py where scores are kept in half precision, and where ties are broken as another engine did.

Legend: T tokens, E experts, K selected. Where scores are kept in bfloat16 the truth is torch, step by step.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moesteer.routing import TIE, Scoring, round_to, select
from tests.unit.routing_oracle import KINDS, PROPERTY, as_numpy, loop_select, routed, zero_norms

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

"""detection/significance.py against scipy and enumeration, and what it keeps of planted and of null differences.

Legend: G groups, S sides (0 wanted, 1 other), L layers, E experts, B resamples.
"""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from scipy import stats

from moesteer.detection import risk_difference
from moesteer.detection.counts import Counts
from moesteer.detection.risk_difference import detect
from moesteer.detection.significance import (
    RESAMPLES_TOGETHER,
    GroupTest,
    frequencies,
    group_test,
    group_weights,
    sign_flip,
    student,
    welch,
)
from moesteer.errors import NoEffectError, TraceLabelError
from tests.unit.traces_by_hand import Spoken, drawn, write

LAYERS, EXPERTS, TOP_K = 4, 16, 4


def rng_of(seed):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- p-values


@pytest.mark.parametrize("groups", [2, 3, 7, 10])
def test_sign_flip_is_the_share_of_all_flips_that_differ_as_much(groups):
    difference = rng_of(groups).normal(size=(groups, 5)) + 0.5
    difference[:, 1] = np.round(difference[:, 1])  # ties and zeros
    difference[:, 2] = 0
    flips = list(itertools.product((1, -1), repeat=groups))
    for e, p in enumerate(sign_flip(difference)):
        sums = [abs(sum(s * d for s, d in zip(flip, difference[:, e], strict=True))) for flip in flips]
        seen = abs(difference[:, e].sum())
        assert p == pytest.approx(sum(s >= seen - 1e-9 for s in sums) / len(flips), abs=1e-15)
    assert sign_flip(difference)[2] == 1 and sign_flip(np.ones((groups, 1)))[0] == 2.0 ** (1 - groups)


def test_student_is_scipys_above_its_floor():
    difference = rng_of(0).normal(size=(25, 40)) + np.linspace(0, 0.8, 40)
    np.testing.assert_allclose(student(difference), stats.ttest_1samp(difference, 0).pvalue, rtol=1e-9)


def test_no_p_is_smaller_than_flipping_signs_could_give():
    difference = np.zeros((30, 3))
    difference[:, 0] = 0.25  # does not vary at all: t is infinite
    difference[:4, 1] = 0.5  # differs in four groups only
    assert student(difference).tolist() == [2.0**-29, stats.ttest_1samp(difference[:, 1], 0).pvalue.clip(2.0**-3), 1]
    assert student(difference)[1] == 2.0**-3


def test_welch_is_scipys_above_its_floor():
    rng = rng_of(1)
    wanted, other = rng.normal(size=(20, 30)) + np.linspace(0, 1, 30), 2 * rng.normal(size=(33, 30))
    expected = stats.ttest_ind(wanted, other, equal_var=False).pvalue
    np.testing.assert_allclose(welch(wanted, other), expected, rtol=1e-9)


def test_welch_is_never_smaller_than_relabelling_could_give():
    wanted, other = np.zeros((4, 3)), np.zeros((6, 3))
    wanted[:, 0] = 1  # all of one side, none of the other: one relabelling in comb(10, 4) does as well
    wanted[0, 1] = 1  # a single group has it: it is on this side with probability 4 / 10
    found = welch(wanted, other)
    np.testing.assert_allclose(found, [1 / comb(10, 4), 4 / 10, 1], rtol=1e-9)


def evidence(differences, *, base=0.5, tokens=1000, has=None):
    """Counts whose shares of the two sides differ by about `differences` [G, L, E]; `has` [G, S]: sides there are."""
    groups = len(differences)
    has = np.ones((groups, 2), dtype=bool) if has is None else has
    shares = np.stack([base + differences / 2, base - differences / 2], axis=1)
    of = has * tokens
    return Counts(np.rint(shares * of[..., None, None]).astype(np.int64), of)


@pytest.mark.parametrize("groups, test", [(2, "sign-flip"), (12, "sign-flip"), (13, "student-t"), (40, "student-t")])
def test_groups_with_both_sides_are_tested_in_pairs(groups, test):
    found = evidence(rng_of(2).normal(size=(groups, 2, 8)) * 0.1)
    tested = group_test(found, layers=2, where="here")
    assert (tested.test, tested.groups_used, tested.smallest_possible) == (test, groups, 2.0 ** (1 - groups))
    shares = found.table_GSLE / found.of_GS[..., None, None]
    difference = shares[:, 0] - shares[:, 1]
    np.testing.assert_allclose(tested.effect_LE, difference.mean(axis=0), atol=1e-12)
    flat = difference.reshape(groups, -1)
    expected = sign_flip(flat) if test == "sign-flip" else stats.ttest_1samp(flat, 0).pvalue
    np.testing.assert_allclose(tested.p_LE.ravel(), expected, rtol=1e-6)


def test_groups_of_one_side_each_are_compared_by_welch():
    has = np.zeros((30, 2), dtype=bool)
    has[:12, 0], has[12:29, 1] = True, True
    has[29] = True  # one with both: left out
    found = evidence(rng_of(3).normal(size=(30, 2, 8)) * 0.1, has=has)
    tested = group_test(found, layers=2, where="here")
    assert (tested.test, tested.groups_used) == ("welch-t", 29)
    assert tested.smallest_possible == pytest.approx(1 / comb(29, 12))
    wanted, other = found.table_GSLE[:12, 0] / 1000, found.table_GSLE[12:29, 1] / 1000
    expected = stats.ttest_ind(wanted, other, equal_var=False)
    np.testing.assert_allclose(tested.p_LE, expected.pvalue, rtol=1e-6)
    assert (np.sign(tested.effect_LE) == np.sign(expected.statistic)).all()


@pytest.mark.parametrize("has", [[[1, 1]], [[1, 0], [0, 1], [0, 1]], [[1, 1], [1, 0]]])
def test_too_few_groups_are_refused(has):
    found = evidence(np.zeros((len(has), 1, 2)), has=np.array(has, dtype=bool))
    with pytest.raises(TraceLabelError, match="too few groups") as caught:
        group_test(found, layers=1, where="here")
    assert caught.value.where == "here" and "leave out fdr" in caught.value.do


# ---------------------------------------------------------------- false discoveries


def test_benjamini_hochberg_is_the_largest_rank_whose_p_is_below_its_line():
    rng = rng_of(4)
    p = np.where(rng.random(200) < 0.2, rng.random(200) * 1e-3, rng.random(200)).reshape(8, 25)
    for q in (0.01, 0.05, 0.3):
        ranked = np.sort(p.ravel())
        below = [k for k in range(1, 201) if ranked[k - 1] <= q * k / 200]
        line = ranked[max(below) - 1] if below else -1
        found = GroupTest(p, p, "student-t", 9, 0.0).passing_LE(q)
        assert found.shape == (8, 25) and (found == (p <= line)).all()


@pytest.mark.parametrize("paired", [True, False])
def test_null_data_has_a_false_discovery_in_at_most_a_share_q_of_traces(paired):
    """Short responses, so that shares are coarse; tokens of a conversation alike, so that tokens are no sample."""
    any_found = 0
    for seed in range(300):
        rng = rng_of(seed)
        rate_GSLE = rng.beta(0.5, 1.5, size=(30, 2, 4, 16))
        has = np.ones((30, 2), dtype=bool)
        if not paired:
            has = np.arange(30)[:, None] % 2 == np.arange(2)
        of_GS = has * rng.integers(2, 12, size=(30, 2))
        found = Counts(rng.binomial(of_GS[..., None, None], rate_GSLE), of_GS)
        any_found += bool(group_test(found, layers=4, where="here").passing_LE(0.1).any())
    # 30 expected of 300 at most; 42 is two and a half standard deviations above
    assert any_found <= 42, any_found


PLANTED = ((0, 3), (1, 7), (2, 11), (3, 0))
"""(layer, expert) that the wanted side likes better; the last one worse."""


def planted_trace(folder, *, groups=40, strength=1.6, seed=0, length=12):
    """Pairs whose experts' preferences vary by group, alike on both sides but for the planted ones."""
    rng = rng_of(seed)
    lean = np.zeros((LAYERS, EXPERTS))
    for i, place in enumerate(PLANTED):
        lean[place] = strength * (-1 if i == len(PLANTED) - 1 else 1)
    conversations = []
    for g in range(groups):
        own = rng.normal(size=(LAYERS, EXPERTS)) * 0.7
        for pair in range(2):
            for ending, label, sign in (("wanted", "yes", 1), ("other", "no", -1)):
                chosen = drawn(rng, length, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, lean=own + sign * lean / 2)
                conversations.append(Spoken(f"{g}-{pair}/{ending}", f"g{g}", label, {"response": chosen}))
    return write(folder, conversations, experts=EXPERTS, per_shard=25)


def entries(mask):
    return {(int(i), int(e)): int(mask.force_LE[i, e]) for i, e in np.argwhere(mask.force_LE)}


SIGNS = {**dict.fromkeys(PLANTED[:-1], 1), PLANTED[-1]: -1}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_trace(tmp_path_factory.mktemp("planted") / "t")


@pytest.fixture(scope="module")
def null(tmp_path_factory):
    return planted_trace(tmp_path_factory.mktemp("null") / "t", strength=0.0, seed=5)


def test_fdr_keeps_the_planted_experts_with_their_signs(planted):
    """Others are pushed out where a planted one is chosen: each layer selects k. They are real, and smaller."""
    found = detect(planted, toward="yes", on=3, off=1, fdr=0.01)
    assert entries(found.mask) == SIGNS
    facts = found.facts["fdr"]
    assert facts["test"] == "student-t" and facts["groups"] == 40 and facts["tests"] == LAYERS * EXPERTS
    assert 4 <= facts["passing"] < 40 and facts["smallest_p"] < 1e-6 and facts["smallest_p_possible"] == 2.0**-39
    assert found.facts["chosen"] == {"on": 3, "off": 1} == found.facts["asked"]


@pytest.mark.parametrize("score", ["risk-difference", "log-odds"])
@pytest.mark.parametrize("weight", ["token", "conversation"])
def test_asking_for_more_than_passes_gives_what_passes(planted, score, weight):
    found = detect(planted, toward="yes", on=60, off=60, fdr=0.001, score=score, weight=weight)
    assert set(PLANTED) <= set(entries(found.mask))
    assert found.facts["chosen"]["on"] + found.facts["chosen"]["off"] <= found.facts["fdr"]["passing"]
    assert sum(found.facts["chosen"].values()) < sum(found.facts["asked"].values())
    for place, sign in entries(found.mask).items():
        assert np.sign(found.scores_LE[place]) == sign


def test_fdr_on_null_data_finds_nothing_and_says_so(null):
    with pytest.raises(NoEffectError, match=r"found no expert that passes fdr=0\.05") as caught:
        detect(null, toward="yes", fdr=0.05)
    assert "smallest_p" in caught.value.where and "groups 40" in caught.value.where
    assert detect(null, toward="yes").mask.expert_count == 5  # without it, five experts of nothing


def test_an_expert_whose_groups_disagree_with_its_score_does_not_pass(tmp_path):
    """Forty short groups have expert 0 a little more often on the wanted side, one huge group the other way."""
    conversations = []
    for g in range(41):
        for label in ("yes", "no"):
            first, length = ([0, 1], 2) if (label == "yes") == (g < 40) else ([1, 2], 2)
            chosen = np.tile(first, (length if g < 40 else 2000, 1, 1))
            conversations.append(Spoken(f"{g}{label}", f"g{g}", label, {"response": chosen}))
    trace = write(tmp_path / "t", conversations, experts=4)
    plain = detect(trace, toward="yes", on=0, off=1)
    assert entries(plain.mask) == {(0, 0): -1}  # by tokens, the huge group decides
    with pytest.raises(NoEffectError, match="passes fdr"):
        detect(trace, toward="yes", on=0, off=1, fdr=0.05)
    assert entries(detect(trace, toward="yes", weight="conversation", on=1, fdr=0.05).mask) == {(0, 0): 1}


# ---------------------------------------------------------------- stability


def test_resamples_draw_from_each_kind_of_group_as_many_as_there_are():
    has = np.array([[1, 1]] * 5 + [[1, 0]] * 3 + [[0, 1]] * 4 + [[0, 0]] * 2, dtype=bool)
    weights = group_weights(has, bootstraps=500, seed=3)
    assert weights.shape == (500, 14) and (weights[:, 12:] == 0).all()
    for part, size in ((slice(0, 5), 5), (slice(5, 8), 3), (slice(8, 12), 4)):
        assert (weights[:, part].sum(axis=1) == size).all()
        np.testing.assert_allclose(weights[:, part].mean(axis=0), 1, atol=0.15)
        assert weights[:, part].std() > 0.5
    assert (weights == group_weights(has, bootstraps=500, seed=3)).all()
    assert (weights != group_weights(has, bootstraps=500, seed=4)).any()


def test_frequencies_count_the_resamples_that_choose_an_expert():
    found = evidence(rng_of(6).normal(size=(9, 2, 5)) * 0.2)
    bootstraps = RESAMPLES_TOGETHER * 2 + 3
    weights = group_weights(found.has_GS, bootstraps=bootstraps, seed=1)

    def choose(score_BLE):
        return (np.sign(score_BLE) * (np.abs(score_BLE) > 0.02)).astype(np.int8)

    on, off = frequencies(found, choose, bootstraps=bootstraps, seed=1, where="here")
    tables = np.zeros((2, 2, 5))
    for row in weights:
        again = [g for g, n in enumerate(row) for _ in range(n)]
        score = Counts(found.table_GSLE[again], found.of_GS[again]).score_LE()
        tables[0] += score > 0.02
        tables[1] += score < -0.02
    np.testing.assert_allclose([on, off], tables / bootstraps, atol=1e-12)


def test_stability_keeps_the_planted_and_drops_the_rest(planted):
    found = detect(planted, toward="yes", on=3, off=4, stability=0.95)
    assert {place: sign for place, sign in entries(found.mask).items() if place in PLANTED} == SIGNS
    facts = found.facts["stability"]
    assert facts["dropped"] == 7 - sum(found.facts["chosen"].values()) > 0 and facts["groups"] == 40
    assert 0.95 <= facts["smallest_frequency"] <= facts["median_frequency"] <= 1
    everything = detect(planted, toward="yes", on=3, off=4, stability=1e-6)
    assert everything.facts["stability"]["smallest_frequency"] < 0.95


def test_stability_on_null_data_finds_nothing_and_says_so(null):
    with pytest.raises(NoEffectError, match=r"found no expert of stability 0\.9") as caught:
        detect(null, toward="yes", stability=0.9)
    assert "largest_frequency" in caught.value.where


def test_being_chosen_often_in_the_other_role_does_not_count(planted, monkeypatch):
    never, often = np.zeros((LAYERS, EXPERTS)), np.full((LAYERS, EXPERTS), 0.9)
    monkeypatch.setattr(risk_difference, "frequencies", lambda *a, **k: (never, often))
    found = detect(planted, toward="yes", on=3, off=1, stability=0.5)
    assert entries(found.mask) == {PLANTED[-1]: -1} and found.facts["stability"]["dropped"] == 3


def test_the_same_seed_gives_the_same_bytes(planted):
    one, two = (detect(planted, toward="yes", off=5, stability=0.5, seed=7).mask.to_bytes() for _ in range(2))
    assert one == two


def test_reversed_stability_is_that_of_the_other_side(planted):
    away = detect(planted, toward="yes", reverse=True, on=1, off=3, stability=0.9, fdr=0.05)
    towards = detect(planted, toward="no", on=1, off=3, stability=0.9, fdr=0.05)
    assert (away.mask.force_LE == towards.mask.force_LE).all() and away.facts["stability"] == towards.facts["stability"]
    assert entries(away.mask) == {place: -sign for place, sign in SIGNS.items()}


def test_a_single_group_cannot_be_resampled(tmp_path):
    two = [Spoken(n, "g", n, {"response": drawn(rng_of(0), 3)}) for n in ("yes", "no")]
    with pytest.raises(TraceLabelError, match="stability needs groups"):
        detect(write(tmp_path / "t", two, experts=6), toward="yes", stability=0.5)

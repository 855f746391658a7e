"""The gate: its definition against loops over plain numbers, and the probe that fits it against brute force.

Legend: N requests of the target, M protected ones, L layers, E experts.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import optimize

from moesteer import gate
from moesteer.detection import gate as probing
from moesteer.detection.gate import Probe, Side
from moesteer.detection.logistic import logistic
from moesteer.errors import EmptyDataError, InputError, NanLogitsError, NoEffectError, UnknownNameError
from moesteer.gate import POOLS, GateInfo, GateRate, PooledSum
from tests.unit.test_mask import additive, forced

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def rate(value=0.5, *, low=0.4, high=0.6, n=10):
    return GateRate(value=value, low=low, high=high, n=n)


def info(**changes):
    given_ = {"pool": "last", "bias": 0.25, "threshold": 0.5, "measured_on": "by hand", "false_positive_rate": rate(),
              "true_positive_rate": rate(), "auroc": 0.9}  # fmt: skip
    return GateInfo(**{**given_, **changes})


# ---------------------------------------------------------------- the definition


def test_probability_and_firing_are_a_logistic_curve_of_a_weighted_sum():
    rng = np.random.default_rng(0)
    weights, pooled = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 4), (50, 3, 4)))
    told = info(bias=0.7, threshold=0.8)
    found, firing = gate.probability(weights, told, pooled), gate.fires(weights, told, pooled)
    assert found.dtype == np.float64 and found.shape == (50,) and 0 < firing.sum() < 50
    for n in range(50):
        score = 0.7
        for row in range(3):
            for expert in range(4):
                score += float(weights[row, expert]) * float(pooled[n, row, expert])
        assert math.isclose(found[n], 1 / (1 + math.exp(-score)), rel_tol=1e-12)
        assert firing[n] == (found[n] >= 0.8)


def test_a_gate_fires_at_its_threshold_and_not_below():
    one = np.ones((1, 1), np.float32)
    pooled = np.array([[[np.nextafter(np.float32(0), np.float32(-1))]], [[0.0]]], np.float32)
    assert gate.fires(one, info(bias=0.0, threshold=0.5), pooled).tolist() == [True, True]  # float64 rounds it to 0.5
    assert gate.fires(one, info(bias=0.0, threshold=0.5), pooled - np.float32(1e-6)).tolist() == [False, False]


def test_scores_beyond_the_range_of_exp_are_certain_and_make_no_noise():
    pooled = np.array([[[1e30]], [[-1e30]]], np.float32)
    with np.errstate(all="raise"):
        assert gate.probability(np.full((1, 1), 3e38, np.float32), info(), pooled).tolist() == [
            1.0,
            pytest.approx(0, abs=1e-200),
        ]


def spans_of(pool, **asked):
    return [gate.pooled_span(part, **asked) for part in gate.parts(pool)]


def test_every_pool_names_its_positions():
    asked = {"prompt": (0, 9), "final_turn": (4, 9)}
    assert [spans_of(pool, **asked) for pool in POOLS] == [[(8, 9)], [(4, 9)], [(0, 9)], [(8, 9), (4, 9)]]
    without = {"prompt": (0, 9), "final_turn": None}  # token ids without a conversation: nobody knows where it begins
    assert [spans_of(pool, **without) for pool in POOLS] == [[(8, 9)], [(0, 9)], [(0, 9)], [(8, 9), (0, 9)]]


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0.0}, {"threshold": 1.0}, {"threshold": -0.1}, {"threshold": math.nan}, {"bias": math.nan},
        {"bias": math.inf}, {"auroc": 1.1}, {"auroc": -0.1}, {"auroc": math.nan}, {"pool": "first"}, {"more": 1},
        {"false_positive_rate": None}, {"measured_on": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_out_of_bounds_is_refused(change):
    with pytest.raises(ValidationError):
        info(**change)


@pytest.mark.parametrize(
    "change",
    [{"value": 1.1}, {"value": -0.1}, {"value": math.nan}, {"low": math.nan}, {"high": math.inf}, {"n": 0}, {"n": -1}],
    ids=str,
)
def test_a_rate_out_of_bounds_is_refused(change):
    with pytest.raises(ValidationError):
        rate(**change)


# ---------------------------------------------------------------- sums of chunks


def logits_of(prompt, *, seed=0, layers=3, experts=4):
    return np.random.default_rng(seed).normal(size=(prompt, layers, experts)).astype(np.float32)


def at_once(pool, logits, final_turn):
    """The mean by the definition, from all positions; final_turn: where it begins."""
    starts = {"last": len(logits) - 1, "final_turn": final_turn or 0, "prompt": 0}
    return np.concatenate([logits[starts[part] :].astype(np.float64).mean(axis=0) for part in pool.split("+")])


def summed(pool, logits, final_turn, borders=()):
    """PooledSum's mean, the logits given in chunks that end at the borders."""
    found = PooledSum(pool, prompt=len(logits), final_turn=final_turn)
    for start, end in itertools.pairwise(sorted({0, *borders, len(logits)})):
        found.add(logits[start:end], start=start)
    return found.mean()


@PROPERTY
@given(st.sampled_from(POOLS), st.integers(1, 20), st.data())
def test_chunks_add_up_to_the_mean_wherever_their_borders_are(pool, prompt, data):
    logits = logits_of(prompt, seed=prompt)
    final_turn = data.draw(st.none() | st.integers(0, prompt - 1))
    turn = final_turn or 0
    borders = data.draw(st.sets(st.integers(0, prompt) | st.sampled_from([turn, min(turn + 1, prompt), prompt - 1])))
    found = summed(pool, logits, final_turn, borders)
    np.testing.assert_allclose(found, at_once(pool, logits, final_turn), rtol=1e-6, atol=1e-6)
    assert found.dtype == np.float64 and found.shape == (3 * len(gate.parts(pool)), 4)
    np.testing.assert_allclose(found, summed(pool, logits, final_turn, range(prompt)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
def test_chunks_decide_as_the_mean_does(pool):
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(3 * len(gate.parts(pool)), 4)).astype(np.float32)
    told = info(pool=pool, bias=0.0)
    fired = []
    for seed in range(40):
        logits, turn = logits_of(9, seed=seed), int(rng.integers(9))
        found = summed(pool, logits, turn, rng.integers(0, 9, size=3))
        fired.append(bool(gate.fires(weights, told, found[None])[0]))
        assert fired[-1] == bool(gate.fires(weights, told, at_once(pool, logits, turn)[None])[0])
    assert 5 < sum(fired) < 35


def test_half_precision_chunks_are_summed_in_float64():
    logits = np.full((70_000, 1, 1), 0.1, np.float16)
    assert summed("prompt", logits, None, [30_000])[0, 0] == pytest.approx(float(np.float16(0.1)), rel=1e-12)


CHUNKS = {
    "a gap": (((0, 3), (4, 9)), "positions 4 to 9 skips some", "3 of 9 positions read"),
    "not from the start": (((1, 9),), "positions 1 to 9 skips some", "0 of 9 positions read"),
    "a position twice": (((0, 3), (2, 9)), "positions 2 to 9 repeats some", "3 of 9"),
    "the same chunk again": (((0, 3), (0, 3)), "positions 0 to 3 repeats some", "3 of 9"),
    "the reply": (((0, 9), (9, 10)), "positions 9 to 10 ends beyond the prompt", "9 of 9"),
    "prompt and reply": (((0, 5), (5, 10)), "positions 5 to 10 ends beyond the prompt", "5 of 9"),
}


@pytest.mark.parametrize(("chunks", "what", "where"), CHUNKS.values(), ids=CHUNKS)
def test_positions_out_of_turn_are_refused_and_count_for_nothing(chunks, what, where):
    logits = logits_of(10)
    found = PooledSum("last+final_turn", prompt=9, final_turn=4)
    for start, end in chunks[:-1]:
        found.add(logits[start:end], start=start)
    before = found.read
    with pytest.raises(InputError, match=what) as caught:
        found.add(logits[slice(*chunks[-1])], start=chunks[-1][0])
    assert where in caught.value.where and f"next from {before}" in caught.value.expected and caught.value.do
    if before < 9:
        found.add(logits[before:9], start=before)
    np.testing.assert_allclose(found.mean(), at_once("last+final_turn", logits[:9], 4), atol=1e-12)


@pytest.mark.parametrize("read", [0, 1, 8])
def test_there_is_no_mean_before_the_prompts_end(read):
    found, logits = PooledSum("final_turn", prompt=9, final_turn=4), logits_of(9)
    if read:
        found.add(logits[:read], start=0)
    with pytest.raises(InputError, match=f"{read} of the prompt's 9 positions are read") as caught:
        found.mean()
    assert "nothing is steered before" in caught.value.expected and "remaining chunks" in caught.value.do
    found.add(logits[read:], start=read)
    assert found.mean().shape == (3, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_wherever_they_stand(bad):
    logits = logits_of(9)
    logits[3, 2, 1] = bad
    found = PooledSum("last", prompt=9)  # its mean would not see position 3
    found.add(logits[:2], start=0)
    with pytest.raises(NanLogitsError, match="no gate can decide") as caught:
        found.add(logits[2:], start=2)
    assert "position 3, row 2" in caught.value.where and found.read == 2


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 2, 4), (4, 12), ()], ids=str)
def test_a_chunk_of_another_shape_is_refused(shape):
    found = PooledSum("prompt", prompt=9)
    found.add(logits_of(5), start=0)
    with pytest.raises(InputError, match="a chunk of shape") as caught:
        found.add(np.zeros(shape, np.float32), start=5)
    assert "[P, L, E]" in caught.value.expected and found.read == 5


@pytest.mark.parametrize(
    ("prompt", "final_turn"), [(0, None), (-1, None), (0, 0), (9, 9), (9, -1), (9, 10)], ids=str
)  # fmt: skip
def test_a_final_turn_outside_the_prompt_is_refused(prompt, final_turn):
    with pytest.raises(InputError, match="a final turn that begins at"):
        PooledSum("final_turn", prompt=prompt, final_turn=final_turn)


def test_an_unknown_pool_is_refused():
    with pytest.raises(UnknownNameError, match="no pool 'first'"):
        PooledSum("first", prompt=3)


# ---------------------------------------------------------------- area under the curve


@PROPERTY
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(hits, misses):
    pairs = [1.0 if h > m else 0.5 if h == m else 0.0 for h in hits for m in misses]
    found = probing.auroc(np.array(hits, float), np.array(misses, float))
    assert math.isclose(found, sum(pairs) / len(pairs), abs_tol=1e-12)
    assert math.isclose(probing.auroc(np.array(misses, float), np.array(hits, float)), 1 - found, abs_tol=1e-12)


# ---------------------------------------------------------------- the threshold


def probe(protected, target=(1.0,)):
    return Probe("last", 1.0, np.zeros((3, 8)), 0.0, np.array(target, float), np.array(protected, float), 0.9)


def firing_at(threshold, scores):
    """By the definition: a gate without weights and with the score as its bias."""
    weights, pooled = np.zeros((1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    return sum(bool(gate.fires(weights, info(bias=float(s), threshold=threshold), pooled)[0]) for s in scores)


@PROPERTY
@given(
    st.lists(st.floats(-40, 33) | st.sampled_from([0.0, 1.0, 20.0, 33.0]), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.5, 0.99]),
)
def test_at_most_the_share_of_protected_requests_fires_and_for_none_none(scores, share):
    at = probing.threshold(probe(scores), false_positives=share)
    fired = firing_at(at, scores)
    assert 0 < at < 1 and fired <= share * len(scores)
    if share == 0:
        assert fired == 0
    # the smallest, but for a millionth: with the share's next request at the threshold there are too many
    allowed = int(share * len(scores))
    last = sorted(scores, reverse=True)[allowed]
    if last > -13.8:
        assert firing_at(1 / (1 + math.exp(-last)), scores) > allowed
        grain = 4e-16 * math.exp(last)  # of float64's probabilities near 1, in log odds
        assert math.log(at / (1 - at)) - last < 2e-6 * (1 + math.exp(-last)) + grain


def test_one_protected_request_far_out_does_not_pass_a_gate_without_false_positives():
    for score in (13.9, 14.5, 20.0, 30.0, 35.0):
        assert firing_at(probing.threshold(probe([score, 0.0, -1.0]), false_positives=0.0), [score]) == 0


def test_a_protected_request_told_as_the_target_with_certainty_is_said():
    for score in (37.0, 100.0, 1e6):
        with pytest.raises(NoEffectError, match="no threshold keeps the gate's false positives at 0 %") as caught:
            probing.threshold(probe([score, 0.0]), false_positives=0.0)
        assert caught.value.where.startswith(f"log odds of {score:.1f}")
    assert firing_at(probing.threshold(probe([100.0, 0.0]), false_positives=0.5), [100.0, 0.0]) == 1


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match="share of false positives"):
        probing.threshold(probe([0.0, 1.0]), false_positives=share)


# ---------------------------------------------------------------- folds


def side(rng, n, *, mean=0.0, groups=None, tactics=None, shape=(2, 3), pools=("last",), spread=1.0):
    pooled = {pool: (rng.normal(size=(n, *shape)) * spread + mean).astype(np.float32) for pool in pools}
    return Side(
        pooled, groups or [f"g{i}" for i in range(n)], tactics if tactics is not None else [None] * n
    )  # fmt: skip


def folds_of(target, protected, seed=0):
    folds = probing._folds(target, protected, seed=seed)
    n = len(target.groups)
    rows = [*zip(target.groups, target.tactics, strict=True), *zip(protected.groups, protected.tactics, strict=True)]
    return folds, n, rows


@PROPERTY
@given(st.data())
def test_folds_leave_out_whole_tactics_of_both_sides(data):
    rng = np.random.default_rng(0)
    names = [f"t{i}" for i in range(data.draw(st.integers(3, 7)))]
    n, m = data.draw(st.integers(8, 30)), data.draw(st.integers(8, 30))
    mine = [*names, *(data.draw(st.sampled_from(names)) for _ in range(n - len(names)))][:n]
    theirs = [data.draw(st.sampled_from([*names, "only-theirs", "also-theirs", None])) for _ in range(m)]
    groups = [data.draw(st.sampled_from("abcdefgh")) for _ in range(n + m)]
    target, protected = (
        side(rng, n, groups=groups[:n], tactics=mine),
        side(rng, m, groups=groups[n:], tactics=theirs),
    )
    folds, _, rows = folds_of(target, protected, seed=data.draw(st.integers(0, 3)))
    of_tactic, of_group = {}, {}
    for fold, (group, tactic) in zip(folds, rows, strict=True):
        known, key = (of_tactic, tactic) if tactic is not None else (of_group, group)
        assert known.setdefault(key, fold) == fold
    assert len({of_tactic[name] for name in set(mine)}) == len(set(mine)), "every tactic of the target in its own fold"


@PROPERTY
@given(st.data())
def test_with_fewer_than_three_tactics_folds_leave_out_whole_groups(data):
    rng = np.random.default_rng(0)
    n, m = data.draw(st.integers(8, 30)), data.draw(st.integers(8, 30))
    tactics = data.draw(st.sampled_from([("a",), ("a", "b"), (None,), ("a", "b", "c", None)]))
    mine = [tactics[i % len(tactics)] for i in range(n)]
    groups = [data.draw(st.sampled_from("abcdefgh")) for _ in range(n + m)]
    target, protected = (
        side(rng, n, groups=groups[:n], tactics=mine),
        side(rng, m, groups=groups[n:], tactics=["a"] * m),
    )
    folds, _, rows = folds_of(target, protected)
    known = {}
    for fold, (group, _) in zip(folds, rows, strict=True):
        assert known.setdefault(group, fold) == fold
    assert len(set(known.values())) == min(probing.FOLDS, len(known))


def test_folds_depend_on_the_seed_only():
    rng = np.random.default_rng(0)
    target, protected = side(rng, 20), side(rng, 20)
    first = probing._folds(target, protected, seed=1)
    assert np.array_equal(first, probing._folds(target, protected, seed=1))
    assert not np.array_equal(first, probing._folds(target, protected, seed=2))


def test_what_is_left_out_was_not_fitted_on(monkeypatch):
    """Every held score comes from a fit whose rows are all of other tactics; told by features that name their row."""
    rng = np.random.default_rng(0)
    tactics = [f"t{i % 4}" for i in range(16)]
    target, protected = side(rng, 16, mean=1.0, tactics=tactics), side(rng, 16, tactics=tactics)
    everything = np.concatenate([target.pooled["last"], protected.pooled["last"]]).reshape(32, -1).astype(np.float64)
    of_row = {row.tobytes(): tactic for row, tactic in zip(everything, tactics * 2, strict=True)}
    fits = []

    def spying(features, labels, *, penalty):
        fits.append({of_row[row.tobytes()] for row in features})
        return logistic(features, labels, penalty=penalty)

    monkeypatch.setattr(probing, "logistic", spying)
    probing.fit(target, protected, penalties=(1.0,))
    assert fits[-1] == set(tactics), "the last fit is on all"
    assert sorted(map(sorted, fits[:-1])) == sorted(sorted(set(tactics) - {t}) for t in set(tactics))


# ---------------------------------------------------------------- the fit


def test_the_folded_weights_score_as_the_standardised_model_does():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(60, 5)) * [1, 10, 0.01, 3, 1] + [0, 100, -5, 2, 0]
    labels = (features[:, 0] + 0.1 * features[:, 1] - 10 + rng.normal(size=60) > 0.5).astype(float)
    weight, bias = logistic(features, labels, penalty=3.0)
    scaled = (features - features.mean(0)) / features.std(0)
    sides = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))

    def loss(point):
        z = scaled @ point[:5] + point[5]
        losses = np.where(labels == 1, np.log1p(np.exp(-z)), np.log1p(np.exp(z)))
        return (sides * losses).sum() + 1.5 * (point[:5] ** 2).sum()

    best = optimize.minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-8}).x
    np.testing.assert_allclose(features @ weight + bias, scaled @ best[:5] + best[5], atol=2e-3)


def test_the_probes_scores_are_the_gates_log_odds():
    rng = np.random.default_rng(2)
    found = probing.fit(side(rng, 40, mean=0.8), side(rng, 50))
    new = rng.normal(size=(30, 2, 3)).astype(np.float32)
    behind = probing.gated(_mask(), _wide(found), at=0.5)
    log_odds = found.scores(new)
    told = gate.probability(behind.gate_LE[:2, :3], behind.info.gate, new)
    np.testing.assert_allclose(np.log(told / (1 - told)), log_odds, rtol=1e-4, atol=1e-5)  # weights are kept in float32


def _mask():
    return additive()


def _wide(found):
    """The probe on [2, 3] with its weights in a mask of [3, 8]."""
    weights = np.zeros((3, 8))
    weights[:2, :3] = found.weight_LE
    return Probe(found.pool, found.penalty, weights, found.bias, found.target_N, found.protected_M, found.auroc)


@pytest.mark.parametrize("counts", [(800, 800), (300, 1200)], ids=["even", "one-to-four"])
def test_probabilities_left_out_are_calibrated_on_gaussians(counts):
    """Two Gaussians of equal spread: the true probability is known. Bins: within three standard errors."""
    rng = np.random.default_rng(3)
    n, m = counts
    mean = np.array([[0.9, -0.6, 0.0], [0.3, 0.0, 0.0]])
    target, protected = side(rng, n, mean=mean), side(rng, m)
    found = probing.fit(target, protected)
    scores = np.concatenate([found.target_N, found.protected_M])
    labels = np.concatenate([np.ones(n), np.zeros(m)])
    told = 1 / (1 + np.exp(-scores))
    for low, high in ((0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1)):
        inside = (told >= low) & (told < high)
        if inside.sum() >= 30:
            error = np.sqrt(told[inside].mean() * (1 - told[inside].mean()) / inside.sum())
            assert abs(told[inside].mean() - labels[inside].mean()) < 3 * error
    everything = np.concatenate([target.pooled["last"], protected.pooled["last"]])
    truth = (everything * mean).sum((1, 2)) - 0.5 * (mean**2).sum() + np.log(n / m)
    assert np.abs(told - 1 / (1 + np.exp(-truth))).mean() < 0.05
    fresh = np.concatenate([side(rng, n, mean=mean).pooled["last"], side(rng, m).pooled["last"]])
    truth = (fresh * mean).sum((1, 2)) - 0.5 * (mean**2).sum() + np.log(n / m)
    off = 1 / (1 + np.exp(-found.scores(fresh))) - 1 / (1 + np.exp(-truth))
    assert np.abs(off).mean() < 0.05 and abs(off.mean()) < 0.03, "the fit on all is calibrated too"
    facts = probing.facts(found)
    assert facts["brier"] == pytest.approx(np.mean((told - labels) ** 2)) and (facts["target"], facts["protected"]) == (
        n,
        m,
    )
    assert facts["auroc"] == found.auroc == probing.auroc(found.target_N, found.protected_M)


def test_uncalibrated_scores_would_fail_that_test():
    """What Platt's curve is for: with few requests and many features the held scores are far too sure."""
    rng = np.random.default_rng(4)
    mean = np.zeros((8, 8))
    mean[0, 0] = 1.0
    target, protected = side(rng, 60, mean=mean, shape=(8, 8)), side(rng, 60, shape=(8, 8))
    found = probing.fit(target, protected, penalties=(0.1,))
    told = 1 / (1 + np.exp(-np.concatenate([found.target_N, found.protected_M])))
    raw_weight, _ = logistic(probing._flat(target, protected, "last"), np.repeat([1.0, 0.0], 60), penalty=0.1)
    slope = np.abs(found.weight_LE).sum() / np.abs(raw_weight).sum()
    assert slope < 0.5 and told.min() > 0.02 and told.max() < 0.98


def test_shuffled_labels_give_no_gate_worth_having():
    areas = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        try:
            areas.append(probing.fit(side(rng, 60), side(rng, 60), seed=seed, penalties=(10.0,)).auroc)
        except NoEffectError as error:
            assert "do not tell the target's requests from protected ones" in error.what
            areas.append(0.5)
    assert max(areas) < 0.66 and np.mean(areas) < 0.57  # sd of an AUROC of 60 against 60 with no signal: 0.053


def test_routing_that_is_the_same_on_both_sides_is_said():
    same = np.ones((20, 2, 3), np.float32)
    sides = [Side({"last": same}, [f"{name}{i}" for i in range(20)], [None] * 20) for name in "ab"]
    with pytest.raises(NoEffectError, match="do not tell the target's requests from protected ones") as caught:
        probing.fit(*sides)
    assert "20 and 20 requests, AUROC 0." in caught.value.where


def test_a_contrast_that_only_tactics_carry_is_not_taken_for_one():
    """Each tactic of the target has its own mark: of use where rows are left out, of none where tactics are."""
    rng = np.random.default_rng(5)
    tactics = [f"t{i % 4}" for i in range(80)]
    marks = np.zeros((80, 2, 3))
    for i in range(80):
        marks[i].ravel()[i % 4] = 6.0
    target = side(rng, 80, mean=marks, tactics=tactics)
    protected = side(rng, 80, tactics=[None] * 80)
    by_rows = Side(target.pooled, target.groups, [None] * 80)
    assert probing.fit(by_rows, protected).auroc > 0.95
    try:
        left_out = probing.fit(target, protected, penalties=(10.0,)).auroc
    except NoEffectError:
        left_out = 0.5
    assert left_out < 0.75


def test_the_pool_and_the_penalty_of_the_best_area_are_chosen():
    rng = np.random.default_rng(6)
    good, bad = side(rng, 60, mean=1.2), side(rng, 60, mean=0.0)
    mine = Side(
        {pool: (good if pool == "final_turn" else bad).pooled["last"] for pool in POOLS},
        good.groups,
        good.tactics,
    )
    theirs = side(rng, 60, pools=POOLS)
    found = probing.fit(mine, theirs)
    assert found.pool == "final_turn"
    areas = {}
    for pool in POOLS:
        for penalty in probing.PENALTIES:
            one = Side({pool: mine.pooled[pool]}, mine.groups, mine.tactics)
            try:
                areas[pool, penalty] = probing.fit(one, theirs, penalties=(penalty,)).auroc
            except NoEffectError:
                areas[pool, penalty] = 0.5
    assert found.auroc == max(areas.values()) == areas[found.pool, found.penalty]


def test_the_same_seed_gives_the_same_bytes():
    rng = np.random.default_rng(7)
    target, protected = side(rng, 30, mean=1.0), side(rng, 30)
    one, two = (probing.gated(_mask(), _wide(probing.fit(target, protected, seed=3)), at=0.6) for _ in range(2))
    assert one.to_bytes() == two.to_bytes()


@pytest.mark.parametrize(("n", "m"), [(7, 30), (30, 7), (0, 30)])
def test_too_few_requests_are_no_contrast(n, m):
    rng = np.random.default_rng(0)
    with pytest.raises(EmptyDataError, match="too few requests"):
        probing.fit(side(rng, n, mean=3.0), side(rng, m))


@pytest.mark.parametrize(
    ("mine", "theirs"), [(["a"] * 10, ["b"] * 10), (["a"] * 10, list("bcdefghijk")), (["a"] * 10, ["a"] * 10)]
)
def test_one_behaviour_on_a_side_cannot_be_left_out(mine, theirs):
    rng = np.random.default_rng(0)
    with np.errstate(all="raise"), pytest.raises(EmptyDataError, match="left out at once"):
        probing.fit(side(rng, 10, mean=3.0, groups=mine), side(rng, 10, groups=theirs))


# ---------------------------------------------------------------- what is put into a mask


@pytest.mark.parametrize("make", [additive, forced])
def test_a_mask_behind_a_probe_carries_the_rates_counted_by_hand(make):
    rng = np.random.default_rng(8)
    found = _wide(probing.fit(side(rng, 40, mean=0.8), side(rng, 50)))
    at = probing.threshold(found, false_positives=0.1)
    behind = probing.gated(make(), found, at=at)
    told = behind.info.gate
    assert behind.gated and behind.info.format_version == 2 and told.threshold == at and told.pool == "last"
    assert told.measured_on == "left out in cross-validation"
    cut = math.log(at / (1 - at))
    hits, misses = (sum(s >= cut for s in scores) for scores in (found.target_N, found.protected_M))
    assert misses == 5 and (told.false_positive_rate.value, told.false_positive_rate.n) == (0.1, 50)
    assert (told.true_positive_rate.value, told.true_positive_rate.n) == (hits / 40, 40)
    assert told.auroc == found.auroc
    # Wilson's interval, from its formula
    z, p, n = 1.959963984540054, hits / 40, 40
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert told.true_positive_rate.low == pytest.approx((middle - half) / (1 + z * z / n))
    assert told.true_positive_rate.high == pytest.approx((middle + half) / (1 + z * z / n))
    plain = behind.with_gate(None, None)
    assert plain.to_bytes() == make().to_bytes()


def test_rates_are_those_of_other_text_where_it_is_given():
    rng = np.random.default_rng(9)
    found = _wide(probing.fit(side(rng, 40, mean=0.8), side(rng, 50)))
    new = [np.zeros((k, 3, 8), np.float32) for k in (12, 7)]
    new[0][:, :2, :3], new[1][:, :2, :3] = rng.normal(size=(12, 2, 3)) + 0.8, rng.normal(size=(7, 2, 3))
    behind = probing.gated(
        _mask(), found, at=0.4, target_NLE=new[0], protected_MLE=new[1], measured_on="other text"
    )  # fmt: skip
    told = behind.info.gate
    assert told.measured_on == "other text"
    for counted, pooled in ((told.true_positive_rate, new[0]), (told.false_positive_rate, new[1])):
        firing = gate.fires(behind.gate_LE, told, pooled)
        assert (counted.value, counted.n) == (firing.mean(), len(pooled))
    assert told.auroc == probing.auroc(found.scores(new[0]), found.scores(new[1]))

"""detection/paired.py against loops and scipy: router probabilities, and the paired t statistic.

Legend: T tokens, L layers, E experts, B resamples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from moesteer.detection.paired import pair_differences, probabilities, t_statistic
from moesteer.detection.risk_difference import detect
from moesteer.detection.sides import sides_of
from moesteer.errors import TraceLabelError
from moesteer.routing import Scoring
from tests.unit.traces_by_hand import Spoken, drawn, write

LAYERS, EXPERTS = 3, 6


def spoken(*, pairs=8, seed=0, by_id=True, extra=True):
    """Pairs of conversations with logits, two to a group; with one without a label and one without a partner."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(pairs):
        for ending, label in (("wanted", "yes"), ("other", "no")):
            length = int(rng.integers(1, 6))
            logits = rng.normal(size=(length, LAYERS, EXPERTS)) + (label == "yes") * np.linspace(-1, 1, EXPERTS) / 2
            name = f"{i}/{ending}" if by_id else f"{i}{label}"
            found.append(Spoken(
                name, f"g{i // 2}", label, {"response": drawn(rng, length)},
                {"response": logits.astype(np.float16).astype(np.float32)},
            ))  # fmt: skip
    order = rng.permutation(len(found))
    found = [found[i] for i in order]
    if extra:
        found.append(replace(found[0], id="unlabelled", label=None))
        found.append(replace(found[0], id="lonely/other", group="lonely", label="no"))
    return found


def loop_softmax(z):
    e = np.exp(np.asarray(z, dtype=np.float64) - max(z))
    return e / e.sum()


def loop_means(conversations):
    """Mean probability by conversation id, [L, E]."""
    return {
        c.id: np.mean([[loop_softmax(z) for z in token] for token in c.logits["response"]], axis=0)
        for c in conversations
    }


def test_t_is_scipys_over_the_pairs(tmp_path):
    conversations = spoken()
    trace = write(tmp_path / "t", conversations, experts=EXPERTS, per_shard=4)
    found = detect(trace, toward="yes", score="paired-t")
    means = loop_means(conversations)
    wanted, other = ([means[f"{i}/{ending}"] for i in range(8)] for ending in ("wanted", "other"))
    expected = stats.ttest_rel(wanted, other).statistic
    # probabilities are float32 in the one and float64 in the other
    np.testing.assert_allclose(found.scores_LE, expected, rtol=1e-4)
    assert (found.facts["pairs"], found.facts["paired_by"], found.facts["left_out"]) == (8, "id", 1)
    assert found.mask.force_LE[np.unravel_index(expected.argmax(), expected.shape)] == 1


@pytest.mark.parametrize("weight", ["token", "conversation"])
def test_groups_pair_by_the_mean_of_either_side(tmp_path, weight):
    conversations = spoken(by_id=False)
    trace = write(tmp_path / "t", conversations, experts=EXPERTS, per_shard=4)
    found = detect(trace, toward="yes", score="paired-t", weight=weight)
    assert (found.facts["pairs"], found.facts["paired_by"]) == (4, "group")
    means, sides = loop_means(conversations), {}
    for g in range(4):
        for label in ("yes", "no"):
            ids = [c.id for c in conversations if c.group == f"g{g}" and c.label == label]
            lengths = [len(c.logits["response"]) for c in conversations if c.id in ids]
            weights = lengths if weight == "token" else None
            sides.setdefault(label, []).append(np.average([means[name] for name in ids], axis=0, weights=weights))
    expected = stats.ttest_rel(sides["yes"], sides["no"]).statistic
    np.testing.assert_allclose(found.scores_LE, expected, rtol=1e-4)


def test_swapping_the_sides_negates_t(tmp_path):
    trace = write(tmp_path / "t", spoken(extra=False), experts=EXPERTS)
    one, two = (detect(trace, toward=toward, score="paired-t").scores_LE for toward in ("yes", "no"))
    assert (one == -two).all() and one.any()


def test_a_resample_is_the_t_of_the_groups_it_repeats(tmp_path):
    conversations = spoken(extra=False)
    trace = write(tmp_path / "t", conversations, experts=EXPERTS)
    sides = sides_of(trace, toward="yes", span="response", paired=True)
    found = pair_differences(trace, sides, by_group=True)
    pooled = pair_differences(trace, sides)
    np.testing.assert_allclose(found.score_LE(), pooled.score_LE(), rtol=1e-9)
    assert found.pairs_G.tolist() == [2, 2, 2, 2] and pooled.pairs_G.tolist() == [8]
    means = loop_means(conversations)
    weights_BG = np.array([[1.0, 1, 1, 1], [3, 0, 1, 0]])
    for weights, t in zip(weights_BG, found.resampled_BLE(weights_BG), strict=True):
        again = [i for g, n in enumerate(weights) for _ in range(int(n)) for i in (2 * g, 2 * g + 1)]
        differences = [means[f"{i}/wanted"] - means[f"{i}/other"] for i in again]
        np.testing.assert_allclose(t, stats.ttest_1samp(differences, 0).statistic, rtol=1e-4)
    share = np.mean([means[f"{i}/wanted"][1] - means[f"{i}/other"][1] for i in (0, 1)], axis=0)
    np.testing.assert_allclose(found.shares_GSE(1)[0, 0] - found.shares_GSE(1)[0, 1], share, rtol=1e-4)


def test_fdr_and_stability_work_on_pairs(tmp_path):
    trace = write(tmp_path / "t", spoken(pairs=60, extra=False), experts=EXPERTS, per_shard=20)
    found = detect(trace, toward="yes", score="paired-t", on=3, off=3, fdr=0.01, stability=0.5)
    for layer in range(LAYERS):
        signs = found.mask.force_LE[layer]
        assert (signs[:3] <= 0).all() and (signs[3:] >= 0).all()  # the planted slope over the experts
    assert found.facts["fdr"]["groups"] == 30 and found.facts["chosen"]["on"] > 0


def test_balanced_pairs_look_at_the_first_tokens_of_either(tmp_path):
    conversations = spoken(extra=False)
    trace = write(tmp_path / "t", conversations, experts=EXPERTS)
    lengths = {c.id: len(c.logits["response"]) for c in conversations}
    short = []
    for c in conversations:
        n = min(lengths[f"{c.id.split('/')[0]}/{ending}"] for ending in ("wanted", "other"))
        short.append(
            replace(c, spans={"response": c.spans["response"][:n]}, logits={"response": c.logits["response"][:n]})
        )
    cut = write(tmp_path / "u", short, experts=EXPERTS)
    one = detect(trace, toward="yes", score="paired-t", balance=True)
    two = detect(cut, toward="yes", score="paired-t")
    assert (one.scores_LE == two.scores_LE).all() and one.facts["wanted_tokens"] == one.facts["other_tokens"]
    assert (one.scores_LE != detect(trace, toward="yes", score="paired-t").scores_LE).any()


def test_what_does_not_vary_has_a_finite_t():
    same = np.full((1, 2), 0.25)
    t = t_statistic(4 * same, 4 * same**2, np.int64(4))
    assert np.isfinite(t).all() and (t > 1e5).all()
    assert (t_statistic(0 * same, 0 * same, np.int64(4)) == 0).all()


def test_a_trace_of_selections_or_of_one_pair_is_refused(tmp_path):
    conversations = spoken(extra=False)
    trace = write(tmp_path / "t", [replace(c, logits={}) for c in conversations], experts=EXPERTS)
    with pytest.raises(TraceLabelError, match="needs logits"):
        detect(trace, toward="yes", score="paired-t")
    one = [c for c in conversations if c.id.startswith("3/")]
    with pytest.raises(TraceLabelError, match="one pair only"):
        detect(write(tmp_path / "u", one, experts=EXPERTS), toward="yes", score="paired-t")
    alone = [replace(c, id=f"x{i}", group=f"x{i}") for i, c in enumerate(conversations)]
    with pytest.raises(TraceLabelError, match="nothing pairs"):
        detect(write(tmp_path / "v", alone, experts=EXPERTS), toward="yes", score="paired-t")


# ---------------------------------------------------------------- probabilities

Z = np.linspace(-4, 3, 24, dtype=np.float32).reshape(2, 2, 6)


@pytest.mark.parametrize("kind, law", [
    ("softmax-topk", loop_softmax), ("topk-softmax", loop_softmax), ("sparsemixer", loop_softmax),
    ("sigmoid", lambda z: 1 / (1 + np.exp(-z))), ("topk-sigmoid", lambda z: 1 / (1 + np.exp(-z))),
    ("sqrtsoftplus", lambda z: np.sqrt(np.log1p(np.exp(z)))),
])  # fmt: skip
@pytest.mark.parametrize("bend", [{}, {"multiplier": 0.5}, {"softcap": 2.0}, {"multiplier": 3.0, "softcap": 2.5}])
def test_probabilities_follow_the_description_of_every_scoring(kind, law, bend):
    described = Scoring(kind, 2, scale=2.5, **bend).describe()
    z = Z.astype(np.float64) * bend.get("multiplier", 1.0)
    z = np.tanh(z / bend["softcap"]) * bend["softcap"] if "softcap" in bend else z
    expected = np.array([[law(row) for row in token] for token in z])
    np.testing.assert_allclose(probabilities(Z, described), expected, rtol=1e-5)


def test_large_logits_do_not_overflow():
    large = np.array([[[60000.0, -60000.0]]], dtype=np.float32)
    for kind in ("softmax-topk", "sigmoid"):
        assert probabilities(large, kind).tolist() == [[[1.0, 0.0]]]


def test_a_scoring_that_is_not_known_is_refused():
    with pytest.raises(TraceLabelError, match="not defined for the scoring 'entmax k=2'"):
        probabilities(Z, "entmax k=2")

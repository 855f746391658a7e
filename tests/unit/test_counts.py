"""detection/counts.py and sides.py against loops over traces written by hand.

Legend: G groups, S sides (0 wanted, 1 other), L layers, E experts, T tokens, K selected experts.
"""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.detection.counts import BLOCK_SELECTIONS, Counts, count, histogram, log_odds, risk_difference
from moesteer.detection.sides import cut, sides_of, span_parts
from moesteer.errors import TraceFileError, TraceLabelError
from moesteer.trace import TraceRow
from tests.unit.traces_by_hand import Spoken, drawn, write

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LAYERS, EXPERTS, TOP_K = 3, 6, 2
LABELS = ("yes", "no", "yes", None, "maybe", "no", "yes", "no", "yes", "no")
"""Of the conversations; "yes" is wanted, None is not counted, any other label is the other side."""
GROUPS = ("a", "a", "b", "b", "b", "c", "c", "a", "d", "e")
LENGTHS = (3, 7, 1, 4, 2, 5, 2, 1, 6, 3)


def spoken(seed=0, *, ids=None, spans=("prompt", "final_user", "response")):
    """final_user is the end of prompt, as a capture of both keeps it."""
    rng = np.random.default_rng(seed)
    found = []
    for i, (label, group, length) in enumerate(zip(LABELS, GROUPS, LENGTHS, strict=True)):
        prompt = drawn(rng, length + 1)
        all_spans = {"prompt": prompt, "final_user": prompt[-length:], "response": drawn(rng, length)}
        found.append(Spoken(ids[i] if ids else f"c{i}", group, label, {name: all_spans[name] for name in spans}))
    return found


def loop_counts(conversations, names):
    """{(group, side): (Counter of (layer, expert), tokens, conversations, {(layer, expert): exact sum of shares})}."""
    found = {}
    for c in conversations:
        tokens = [token for name in names for token in c.spans[name]]
        if c.label is None or not tokens:
            continue
        key = (c.group, 0 if c.label == "yes" else 1)
        mine = Counter((layer, int(e)) for token in tokens for layer, ids in enumerate(token) for e in ids)
        total, n, sequences, shares = found.get(key, (Counter(), 0, 0, Counter()))
        shares = shares + Counter({cell: Fraction(k, len(tokens)) for cell, k in mine.items()})
        found[key] = (total + mine, n + len(tokens), sequences + 1, shares)
    return found


def counted(trace, *, span="response", weight="token", by_group=True, **options):
    return count(trace, sides_of(trace, toward="yes", span=span, **options), weight=weight, by_group=by_group)


@pytest.mark.parametrize("span, names", [
    ("response", ["response"]), ("prompt", ["prompt"]), ("final_user", ["final_user"]), ("question", ["final_user"]),
    ("all", ["prompt", "response"]),
])  # fmt: skip
@pytest.mark.parametrize("per_shard", [1, 3, 100])
def test_counts_by_group_equal_the_loop(tmp_path, span, names, per_shard):
    conversations = spoken()
    found = counted(write(tmp_path / "t", conversations, experts=EXPERTS, per_shard=per_shard), span=span)
    expected = loop_counts(conversations, names)
    assert found.table_GSLE.dtype == np.int64 and found.table_GSLE.shape == (5, 2, LAYERS, EXPERTS)
    for g, group in enumerate("abcde"):
        for side in (0, 1):
            cells, tokens, _, _ = expected.get((group, side), (Counter(), 0, 0, {}))
            assert found.of_GS[g, side] == tokens
            table = [[cells[layer, e] for e in range(EXPERTS)] for layer in range(LAYERS)]
            assert found.table_GSLE[g, side].tolist() == table


def test_conversations_weighted_alike_equal_exact_fractions(tmp_path):
    conversations = spoken()
    found = counted(write(tmp_path / "t", conversations, experts=EXPERTS), weight="conversation")
    expected = loop_counts(conversations, ["response"])
    for g, group in enumerate("abcde"):
        for side in (0, 1):
            _, _, sequences, shares = expected.get((group, side), (None, 0, 0, Counter()))
            assert found.of_GS[g, side] == sequences
            table = [[float(shares[layer, e]) for e in range(EXPERTS)] for layer in range(LAYERS)]
            # each share is one rounding, and a group has three conversations at most
            np.testing.assert_allclose(found.table_GSLE[g, side], table, rtol=1e-15)


@pytest.mark.parametrize("weight", ["token", "conversation"])
def test_pooled_counts_are_the_sum_of_the_groups(tmp_path, weight):
    trace = write(tmp_path / "t", spoken(), experts=EXPERTS)
    pooled, groups = (counted(trace, weight=weight, by_group=by) for by in (False, True))
    assert pooled.of_GS.tolist() == [groups.of_GS.sum(axis=0).tolist()]
    np.testing.assert_allclose(pooled.table_GSLE[0], groups.table_GSLE.sum(axis=0), rtol=1e-15)
    np.testing.assert_allclose(pooled.score_LE(), groups.score_LE(), atol=1e-15)


def test_long_sequences_are_counted_in_pieces():
    rng = np.random.default_rng(0)
    long_ = rng.integers(0, EXPERTS, size=(3 * BLOCK_SELECTIONS // (LAYERS * TOP_K) + 7, LAYERS, TOP_K), dtype=np.uint8)
    table = histogram([long_, long_[:5]], [1, 0], rows=2, experts=EXPERTS)
    for row, part in ((1, long_), (0, long_[:5])):
        flat = [np.bincount(part[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)]
        assert table[row].tolist() == np.concatenate(flat).tolist()


@pytest.mark.parametrize("experts", [6, 200, 300])
def test_many_rows_of_many_experts_do_not_run_over(experts):
    """Keys of 400 rows of 3 x 300 experts need more than 16 bits."""
    rng = np.random.default_rng(0)
    dtype = np.uint8 if experts <= 256 else np.uint16
    parts = [rng.integers(0, experts, size=(1, 3, 2)).astype(dtype) for _ in range(400)]
    table = histogram(parts, list(range(400)), rows=400, experts=experts).reshape(400, 3, experts)
    for row, part in enumerate(parts):
        for layer in range(3):
            assert table[row, layer].tolist() == np.bincount(part[0, layer], minlength=experts).tolist()


def test_equal_lengths_make_the_weights_agree(tmp_path):
    rng = np.random.default_rng(1)
    conversations = [Spoken(str(i), f"g{i % 3}", ("yes", "no")[i % 2], {"response": drawn(rng, 4)}) for i in range(12)]
    trace = write(tmp_path / "t", conversations, experts=EXPERTS)
    token, alike = (counted(trace, weight=weight).score_LE() for weight in ("token", "conversation"))
    np.testing.assert_allclose(token, alike, atol=1e-15)
    longer = [*conversations[:-1], replace(conversations[-1], spans={"response": drawn(rng, 40)})]
    trace = write(tmp_path / "u", longer, experts=EXPERTS)
    token, alike = (counted(trace, weight=weight).score_LE() for weight in ("token", "conversation"))
    assert np.abs(token - alike).max() > 0.01


@pytest.mark.parametrize("weight", ["token", "conversation"])
@pytest.mark.parametrize("balance", [False, True])
def test_a_sequence_without_tokens_counts_for_nothing(tmp_path, weight, balance):
    conversations = spoken()
    empty = [replace(conversations[0], id=f"empty-{c.label}", label=c.label, spans={
        name: np.zeros((0, LAYERS, TOP_K), dtype=int) for name in c.spans
    }) for c in conversations[:2]]  # fmt: skip
    with_, without = (
        counted(write(tmp_path / name, given, experts=EXPERTS), weight=weight, balance=balance)
        for name, given in (("t", [*empty, *conversations]), ("u", conversations))
    )
    assert (with_.of_GS == without.of_GS).all() and (with_.table_GSLE == without.table_GSLE).all()


# ---------------------------------------------------------------- memory


class ManyShards:
    """A reader of `shards` shards of one sequence each, made as they are read. L = 8, E = 64, K = 4."""

    folder = "nowhere"

    def __init__(self, shards, tokens=500):
        self.fingerprint = SimpleNamespace(layer_ids=tuple(range(8)), experts=64, top_k=4)
        self.manifest = SimpleNamespace(spans=("response",), mask_sha256=())
        self.rows = tuple(
            TraceRow(f"c{i}", f"g{i % 5}", ("yes", "no")[i % 2], None, None, i, 0, tokens, ("response",), (tokens,))
            for i in range(shards)
        )

    def sequences(self, wanted=None, *, tensors=None):
        for row in self.rows:
            yield row, {"selected": np.full((row.length, 8, 4), row.shard % 64, dtype=np.uint8)}


@pytest.mark.parametrize("weight, by_group", [("token", False), ("token", True), ("conversation", True)])
def test_memory_does_not_grow_with_the_trace(weight, by_group):
    peaks = []
    for shards in (40, 400):
        reader = ManyShards(shards)
        sides = sides_of(reader, toward="yes", span="response")
        tracemalloc.start()
        found = count(reader, sides, weight=weight, by_group=by_group)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.of_GS.sum() == (shards * 500 if weight == "token" else shards)
    # 400 sequences hold 6.4 MB of selections; one block is of 0.13 MB, and its keys 0.5 MB
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 4e6, peaks


# ---------------------------------------------------------------- scores

TABLES = st.lists(st.integers(0, 50), min_size=4, max_size=4)


@PROPERTY
@given(TABLES, TABLES, st.integers(50, 90), st.integers(50, 90))
def test_scores_are_the_formulas_and_swapping_sides_negates_them(wanted, other, of_wanted, of_other):
    tables, of = np.array([wanted, other]).reshape(1, 2, 2, 2), np.array([[of_wanted, of_other]])
    for score, law in (
        ("risk-difference", lambda a, c: a / of_wanted - c / of_other),
        ("log-odds", lambda a, c: np.log((a + 0.5) / (of_wanted - a + 0.5) / ((c + 0.5) / (of_other - c + 0.5)))),
    ):
        found = Counts(tables, of, score).score_LE()
        expected = [law(a, c) for a, c in zip(wanted, other, strict=True)]
        np.testing.assert_allclose(found.ravel(), expected, rtol=1e-12, atol=1e-13)
        assert np.isfinite(found).all()
        assert (Counts(tables[:, ::-1], of[:, ::-1], score).score_LE() == -found).all()


def test_both_scores_have_the_same_sign_when_the_sides_have_as_many_tokens():
    wanted, other = np.array([0.0, 5, 9]), np.array([0.0, 9, 5])
    assert np.sign(log_odds(wanted, other, 10, 10)).tolist() == [0, -1, 1]
    assert np.sign(risk_difference(wanted, other, 10, 10)).tolist() == [0, -1, 1]


@pytest.mark.parametrize("score", ["risk-difference", "log-odds"])
@pytest.mark.parametrize("weight", ["token", "conversation"])
def test_a_resample_is_the_score_of_the_groups_it_repeats(tmp_path, score, weight):
    found = replace(counted(write(tmp_path / "t", spoken(), experts=EXPERTS), weight=weight), score=score)
    weights_BG = np.array([[1, 1, 1, 1, 1], [2, 0, 1, 0, 3], [0, 3, 0, 0, 0]])
    for weights, resampled in zip(weights_BG, found.resampled_BLE(weights_BG.astype(float)), strict=True):
        drawn_ = [g for g, n in enumerate(weights) for _ in range(n)]
        repeated = Counts(found.table_GSLE[drawn_], found.of_GS[drawn_], score)
        np.testing.assert_allclose(resampled, repeated.score_LE(), atol=1e-13)


# ---------------------------------------------------------------- spans and sides


def test_a_span_of_that_name_comes_before_the_alias(tmp_path):
    spans = {"question": drawn(np.random.default_rng(0), 2), "response": drawn(np.random.default_rng(1), 3)}
    trace = write(tmp_path / "t", [Spoken("a", "g", "yes", spans), Spoken("b", "g", "no", spans)], experts=EXPERTS)
    assert span_parts(trace, "question") == ("question",)
    assert span_parts(trace, "all") == ("question", "response")
    with pytest.raises(TraceLabelError, match="lacks the span 'final_user'"):
        span_parts(trace, "final_user")


def test_a_question_that_was_not_captured_is_refused(tmp_path):
    trace = write(tmp_path / "t", spoken(spans=("response",)), experts=EXPERTS)
    with pytest.raises(TraceLabelError, match="lacks the span 'final_user'") as caught:
        sides_of(trace, toward="yes", span="question")
    assert "--span final_user" in caught.value.expected


def test_an_expert_that_the_model_does_not_have_is_refused(tmp_path):
    trace = write(tmp_path / "t", spoken(), experts=EXPERTS)
    few = SimpleNamespace(layer_ids=(0, 1, 2), experts=EXPERTS - 1, top_k=TOP_K)
    fake = SimpleNamespace(fingerprint=few, folder="here", sequences=trace.sequences)
    with pytest.raises(TraceFileError, match="an expert beyond 4"):
        count(fake, sides_of(trace, toward="yes", span="response"))


def test_an_id_that_stands_for_two_sequences_is_refused(tmp_path):
    trace = write(tmp_path / "t", spoken(ids=["c0"] * 2 + [f"c{i}" for i in range(2, 10)]), experts=EXPERTS)
    with pytest.raises(TraceLabelError, match="'c0' stands for two"):
        sides_of(trace, toward="yes", span="response")


# ---------------------------------------------------------------- pairs and balance


PAIR_IDS = ("1/wanted", "1/other", "2/wanted", "x", "2/other", "3/other", "3/wanted", "4/other", "4/wanted", "5/other")


def test_pairs_are_made_by_id(tmp_path):
    sides = sides_of(
        write(tmp_path / "t", spoken(ids=PAIR_IDS), experts=EXPERTS), toward="yes", span="response", paired=True
    )
    assert sides.paired_by == "id" and sides.left_out == 1 and "5/other" not in sides.parts
    together = {}
    for name, part in sides.parts.items():
        together.setdefault(part.pair, set()).add(name)
    assert sorted(map(sorted, together.values())) == [[f"{i}/other", f"{i}/wanted"] for i in range(1, 5)]
    assert [sides.groups[g] for g in sides.pair_groups] == ["a", "b", "c", "d"]  # the group of the wanted one


def test_where_ids_do_not_pair_groups_do(tmp_path):
    sides = sides_of(write(tmp_path / "t", spoken(), experts=EXPERTS), toward="yes", span="response", paired=True)
    assert sides.paired_by == "group" and sides.left_out == 2  # d and e have one side each
    assert [sides.groups[g] for g in sides.pair_groups] == ["a", "b", "c"] and len(sides.parts) == 7


def test_nothing_that_pairs_is_refused(tmp_path):
    alone = [replace(c, group=c.id) for c in spoken()]
    trace = write(tmp_path / "t", alone, experts=EXPERTS)
    for options in ({"balance": True}, {"paired": True}):
        with pytest.raises(TraceLabelError, match="nothing pairs") as caught:
            sides_of(trace, toward="yes", span="response", **options)
        assert '"<id>/wanted"' in caught.value.expected and caught.value.where.startswith(str(tmp_path / "t"))


@pytest.mark.parametrize("span", ["response", "all"])
def test_a_balanced_pair_counts_the_first_tokens_of_either(tmp_path, span):
    conversations = spoken(ids=PAIR_IDS, spans=("prompt", "final_user", "response"))
    found = counted(write(tmp_path / "t", conversations, experts=EXPERTS), span=span, balance=True, by_group=False)
    pairs, total = {}, [Counter(), Counter()]
    for c in conversations:
        if c.label is not None and c.id != "5/other":
            tokens = [*c.spans["prompt"], *c.spans["response"]] if span == "all" else list(c.spans["response"])
            pairs.setdefault(c.id.split("/")[0], {})[0 if c.label == "yes" else 1] = tokens
    for pair in pairs.values():
        n = min(len(pair[0]), len(pair[1]))
        for side in (0, 1):
            total[side].update((layer, int(e)) for t in pair[side][:n] for layer, ids in enumerate(t) for e in ids)
    for side in (0, 1):
        expected = [[total[side][layer, e] for e in range(EXPERTS)] for layer in range(LAYERS)]
        assert found.table_GSLE[0, side].tolist() == expected
    assert found.of_GS[0, 0] == found.of_GS[0, 1] > 0


def test_balance_by_group_cuts_the_longer_side_evenly(tmp_path):
    sides = sides_of(write(tmp_path / "t", spoken(), experts=EXPERTS), toward="yes", span="response", balance=True)
    # group a: 3 tokens wanted against 7 + 1; b: 1 against 2; c: 2 against 5
    assert {name: part.count for name, part in sides.parts.items()} == {
        "c0": 3, "c1": 2, "c7": 1, "c2": 1, "c4": 1, "c5": 2, "c6": 2,
    }  # fmt: skip
    assert sides.tokens_S == (6, 6) and sides.conversations_S == (3, 4)


def test_balancing_pairs_of_equal_length_changes_nothing(tmp_path):
    rng = np.random.default_rng(2)
    conversations = [
        Spoken(f"{i}/{end}", f"g{i % 4}", label, {"response": drawn(rng, 1 + i % 5)})
        for i in range(9)
        for end, label in (("wanted", "yes"), ("other", "no"))
    ]
    trace = write(tmp_path / "t", conversations, experts=EXPERTS)
    plain, balanced = counted(trace), counted(trace, balance=True)
    assert (plain.table_GSLE == balanced.table_GSLE).all() and (plain.of_GS == balanced.of_GS).all()


@PROPERTY
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8).map(sorted), st.data())
def test_a_cut_is_exact_and_as_even_as_can_be(lengths, data):
    total = data.draw(st.integers(0, sum(lengths)))
    kept = cut(lengths, total)
    assert sum(kept) == total and all(0 <= k <= n for k, n in zip(kept, lengths, strict=True))
    shortened = [k for k, n in zip(kept, lengths, strict=True) if k < n]
    assert not shortened or max(kept) - min(shortened) <= 1  # who gave something has no less than another, by one

"""detection/risk_difference.py, choosing.py and base.py against counts in loops over traces written by hand.

Legend: L layers, E experts, K selected. The trace has 3 layers of 6 experts, 2 selected, in two shards.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.detection import risk_difference
from moesteer.detection.base import additive_mask, forced_mask, require_logits, require_span, two_sides
from moesteer.detection.choosing import additive_signs, forced_signs
from moesteer.detection.controls import random_like
from moesteer.detection.counts import Counts
from moesteer.detection.counts import count as count_sides
from moesteer.detection.risk_difference import detect
from moesteer.detection.sides import sides_of
from moesteer.errors import NoEffectError, TraceLabelError
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.trace import Manifest, TraceReader, TraceRow, TraceWriter
from tests.unit.refusals_by_hand import (
    DEFAULTS,
    FINGERPRINT,
    LABELS,
    TOP_K,
    loop_counts,
    loop_difference,
    loop_forced,
    write_trace,
)

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("traces") / "t")


def count(trace, *, toward, span):
    """Counts of all groups together."""
    return count_sides(trace, sides_of(trace, toward=toward, span=span))


def tokens(found):
    return found.of_GS[0].tolist()


def forced_table(difference, **options):
    return forced_signs(difference[None], **options)[0]


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize("toward", ["refuse", "comply"])
@pytest.mark.parametrize("span", ["prompt", "response"])
def test_counts_and_differences_equal_the_double_loop(traced, toward, span):
    trace, plain = traced
    found = count(trace, toward=toward, span=span)
    tables, counted = loop_counts(plain, toward, span)
    assert found.table_GSLE[0].tolist() == tables and tokens(found) == counted
    np.testing.assert_allclose(found.score_LE(), loop_difference(plain, toward, span), rtol=1e-12)


def test_every_counted_token_selects_k_experts_in_every_layer(traced):
    found = count(traced[0], toward="refuse", span="response")
    assert (found.table_GSLE[0].sum(axis=-1) == found.of_GS[0][:, None] * TOP_K).all()
    np.testing.assert_allclose(found.score_LE().sum(axis=1), 0, atol=1e-12)
    assert tokens(found) == [2 + 1 + 6, 4 + 2 + 1]  # "deflect" is other, None is out


def test_swapping_the_labels_flips_every_sign(tmp_path):
    swapped = {"refuse": "comply", "comply": "refuse"}
    labels = ("refuse", "comply", "comply", None, "refuse", "comply", "refuse")
    one, _ = write_trace(tmp_path / "one", labels=labels, seed=3)
    other_rows = [replace(r, label=swapped.get(r.label)) for r in one.rows]
    before = count(one, toward="refuse", span="response").score_LE()
    one.rows = tuple(other_rows)
    after = count(one, toward="refuse", span="response").score_LE()
    assert before.any() and (after == -before).all()


def test_the_order_of_tokens_and_sequences_does_not_matter(tmp_path):
    trace, plain = write_trace(tmp_path / "t")
    shuffled = [(label, {s: tokens[::-1] for s, tokens in spans.items()}) for label, spans in plain][::-1]
    assert loop_counts(shuffled, "refuse", "prompt") == loop_counts(plain, "refuse", "prompt")
    before = count(trace, toward="refuse", span="prompt")
    trace.rows = trace.rows[::-1]
    after = count(trace, toward="refuse", span="prompt")
    assert (before.table_GSLE == after.table_GSLE).all()


def test_ids_above_255_are_counted_where_they_belong(tmp_path):
    print_ = FINGERPRINT.model_copy(update={"experts": 300, "layer_ids": (0, 1)})
    manifest = Manifest(
        fingerprint=print_, level="selected", spans=("response",), sequences=2, shards=1, plan_sha256="e" * 64
    )
    writer = TraceWriter(tmp_path / "t", manifest)
    rows = [TraceRow(n, n, n, None, None, 0, i, 1, ("response",), (1,)) for i, n in enumerate(("yes", "no"))]
    chosen = np.array([[[299, 0], [256, 1]], [[299, 1], [255, 1]]], dtype=np.uint16)
    writer.write_shard(rows, selected=chosen, token_ids=np.zeros(2, np.int32), logits=None)
    writer.finish()
    difference = count(TraceReader(tmp_path / "t"), toward="yes", span="response").score_LE()
    expected = np.zeros((2, 300))
    expected[0, 0], expected[0, 1], expected[1, 256], expected[1, 255] = 1, -1, 1, -1
    assert difference.tolist() == expected.tolist()


@pytest.mark.parametrize("labels", [("refuse",) * 7, ("comply",) * 7, (None,) * 7, ("refuse", None) * 3 + (None,)])
def test_a_trace_with_one_side_only_is_refused(labels, tmp_path):
    trace, _ = write_trace(tmp_path / "t", labels=labels)
    with pytest.raises(TraceLabelError, match="one side of the contrast is empty") as caught:
        count(trace, toward="refuse", span="response")
    assert caught.value.where == str(tmp_path / "t") and "'refuse'" in caught.value.expected


def test_a_span_that_was_not_captured_is_refused(traced):
    for call in (
        lambda: count(traced[0], toward="refuse", span="final_user"),
        lambda: detect(traced[0], toward="refuse", span="final_user"),
        lambda: require_span(traced[0], "final_user"),
    ):
        with pytest.raises(TraceLabelError, match="lacks the span 'final_user'") as caught:
            call()
        assert "prompt, response" in caught.value.what and "--span final_user" in caught.value.expected


def test_a_sequence_without_the_span_is_refused(tmp_path):
    trace, _ = write_trace(tmp_path / "t")
    trace.rows = (replace(trace.rows[0], span_names=("prompt", "other")), *trace.rows[1:])
    with pytest.raises(TraceLabelError, match="a sequence lacks the span 'response'") as caught:
        count(trace, toward="refuse", span="response")
    assert caught.value.where.endswith("sequence c0")


@pytest.mark.parametrize("form", ["forced", "additive"])
def test_a_side_without_tokens_is_refused(form, tmp_path):
    lengths = [(3, 0 if label == "refuse" else 2) for label in LABELS]
    trace, _ = write_trace(tmp_path / "t", lengths=lengths)
    with pytest.raises(TraceLabelError, match="no token in the span 'response'") as caught:
        detect(trace, toward="refuse", span="response", form=form)
    assert "0 tokens labelled 'refuse', 6 others" in caught.value.where


# ---------------------------------------------------------------- the forced table


@PROPERTY
@given(st.data())
def test_the_forced_table_equals_the_loop_and_keeps_its_caps(data):
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    cells = st.lists(st.integers(-3, 3).map(lambda n: n / 4), min_size=experts, max_size=experts)
    difference = data.draw(st.lists(cells, min_size=layers, max_size=layers))
    top_k = data.draw(st.integers(1, experts))
    on, off = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20))
    per_layer = data.draw(st.none() | st.integers(1, 7))
    found = forced_table(np.array(difference), on=on, off=off, top_k=top_k, per_layer=per_layer)
    assert found.dtype == np.int8
    assert found.tolist() == loop_forced(difference, on, off, top_k, per_layer or 99)
    assert ((found > 0).sum(axis=1) <= top_k).all() and ((found < 0).sum(axis=1) <= experts - top_k).all()
    assert (found > 0).sum() <= on and (found < 0).sum() <= off
    assert (found * np.array(difference) >= 0).all() and not found[np.array(difference) == 0].any()


def test_a_full_layer_passes_its_turn_to_the_next():
    difference = np.array([[0.9, 0.8, 0.7, -0.9], [0.3, 0.2, -0.1, -0.2]])
    assert forced_table(difference, on=3, off=0, top_k=2).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert forced_table(difference, on=0, off=2, top_k=3).tolist() == [[0, 0, 0, -1], [0, 0, 0, -1]]


def loop_additive(scores, experts, per_layer):
    signs = [[0] * len(scores[0]) for _ in scores]
    cells = [(abs(x), i, e) for i, row in enumerate(scores) for e, x in enumerate(row) if x]
    for _, i, e in sorted(cells, key=lambda c: (-c[0], c[1], c[2])):
        if experts and sum(map(bool, signs[i])) < per_layer:
            signs[i][e] = 1 if scores[i][e] > 0 else -1
            experts -= 1
    return signs


@PROPERTY
@given(st.data())
def test_many_tables_are_chosen_from_as_each_alone(data):
    """What stability does for all resamples at once."""
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)))
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-3, 4, size=shape) / 4
    per_layer, experts = data.draw(st.none() | st.integers(1, 6)), data.draw(st.integers(0, 12))
    options = {"on": experts, "off": 3, "top_k": min(2, shape[2]), "per_layer": per_layer}
    together = forced_signs(scores, **options)
    assert [table.tolist() for table in together] == [forced_table(table, **options).tolist() for table in scores]
    additive = additive_signs(scores, experts=experts, per_layer=per_layer)
    assert additive.tolist() == [loop_additive(table.tolist(), experts, per_layer or 99) for table in scores]


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("on, off", [(5, 0), (0, 4), (3, 3), (100, 100)])
def test_a_forced_mask_holds_the_loops_table_and_its_provenance(traced, on, off):
    trace, plain = traced
    found = detect(trace, toward="refuse", on=on, off=off)
    assert found.mask.forced
    expected = loop_forced(loop_difference(plain, "refuse", "response"), on, off, TOP_K)
    assert found.mask.force_LE.tolist() == expected
    np.testing.assert_allclose(found.scores_LE, loop_difference(plain, "refuse", "response"), rtol=1e-6)
    assert found.facts == {
        "wanted_tokens": 9, "other_tokens": 7, "wanted_conversations": 3, "other_conversations": 3, "groups": 6,
        "asked": {"on": on, "off": off}, "chosen": {"on": sum(row.count(1) for row in expected),
                                                    "off": sum(row.count(-1) for row in expected)},
    }  # fmt: skip
    info = found.mask.info
    assert (info.method, info.intent.toward, info.data_sha256) == ("risk-difference", "refuse", "cd" * 32)
    assert info.settings == {**DEFAULTS, "form": "forced", "on": on, "off": off}
    assert info.fingerprint == FINGERPRINT and SteeringMask.from_bytes(found.mask.to_bytes(), where="x")


@pytest.mark.parametrize("span, sign", [("prompt", 1), ("response", -1)])
@pytest.mark.parametrize("experts", [1, 4, 18, 500])
def test_an_additive_mask_holds_the_largest_differences_over_the_largest(traced, experts, span, sign):
    trace, plain = traced
    found = detect(trace, toward="refuse", span=span, form="additive", experts=experts)
    mask = found.mask
    cells = [d for row in loop_difference(plain, "refuse", span) for d in row]
    assert max(cells, key=abs) * sign > 0  # the largest is of either sign
    kept = sorted(range(len(cells)), key=lambda i: (-abs(cells[i]), i))[:experts]
    peak = max(map(abs, cells))
    expected = [cells[i] / peak if i in kept else 0.0 for i in range(len(cells))]
    # float32 of a float64: one rounding
    np.testing.assert_allclose(mask.strength_LE.ravel(), expected, rtol=1e-7)
    assert np.abs(mask.strength_LE).max() == 1.0
    assert (mask.sigma_L == trace.sigma_L).all() and (mask.sigma_L > 0).all()
    assert mask.info.settings == {**DEFAULTS, "span": span, "form": "additive", "experts": experts}
    assert found.facts["asked"] == {"experts": experts}
    assert found.facts["chosen"] == {"experts": int(np.count_nonzero(expected))}


def test_a_forced_mask_needs_selections_only_and_an_additive_one_logits(tmp_path):
    trace, plain = write_trace(tmp_path / "t", level="selected")
    expected = loop_forced(loop_difference(plain, "refuse", "response"), 5, 0, TOP_K)
    assert detect(trace, toward="refuse").mask.force_LE.tolist() == expected
    for call in (lambda: detect(trace, toward="refuse", form="additive"), lambda: require_logits(trace)):
        with pytest.raises(TraceLabelError, match="needs logits") as caught:
            call()
        assert "--level logits" in caught.value.expected


@pytest.mark.parametrize("options", [{"on": 0, "off": 0}, {"form": "additive", "experts": 0}])
def test_no_experts_is_no_mask(traced, options):
    with pytest.raises(NoEffectError, match="found no expert"):
        detect(traced[0], toward="refuse", **options)


@pytest.mark.parametrize("options", [{"on": 5, "off": 5}, {"form": "additive"}])
def test_two_sides_that_select_alike_give_no_mask(options, tmp_path, monkeypatch):
    trace, _ = write_trace(tmp_path / "t")
    same = np.arange(18).reshape(3, 6)
    alike = Counts(np.stack([same, same])[None], np.array([[18, 18]]))
    monkeypatch.setattr(risk_difference, "count", lambda *a, **k: alike)
    with pytest.raises(NoEffectError, match="found no expert that tells the two sides apart"):
        detect(trace, toward="refuse", **options)


def test_the_two_sides_are_by_label_and_leave_out_the_unlabelled(traced):
    wanted, other = two_sides(traced[0].rows, toward="comply", where="here")
    assert wanted == {"c1", "c5"} and other == {"c0", "c2", "c4", "c6"}
    with pytest.raises(TraceLabelError, match=r"\{'refuse': 3, 'comply': 2, None: 1, 'deflect': 1\}") as caught:
        two_sides(traced[0].rows, toward="nonsense", where="here")
    assert caught.value.where == "here" and "'comply'" in caught.value.do


@pytest.mark.parametrize("make", [additive_mask, forced_mask])
def test_an_empty_table_is_never_a_mask(make, traced):
    tables = (np.zeros((3, 6), np.float32), np.ones(3, np.float32)) if make is additive_mask else (np.zeros((3, 6)),)
    with pytest.raises(NoEffectError, match="some-method found no expert") as caught:
        make(traced[0], *tables, method="some-method", toward="refuse", settings={"a": 1})
    assert "{'a': 1}" in caught.value.where


# ---------------------------------------------------------------- the random control


def some_mask(forced):
    info = MaskInfo(
        fingerprint=FINGERPRINT, method="direct", intent=Intent(toward="refuse"), alpha=2.5, accepted_on={"x": 1}
    )
    if forced:
        force = np.array([[1, 1, -1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [-1, -1, -1, -1, 1, 0]], np.int8)
        return SteeringMask(info, force_LE=force)
    strength = np.zeros((3, 6), np.float32)
    strength[0, :4] = [1.5, -2.0, 0.25, 1.5]
    return SteeringMask(info, strength_LE=strength, sigma_L=np.array([1, 2, 3], np.float32))


@pytest.mark.parametrize("forced", [True, False])
def test_a_random_control_holds_the_same_numbers_in_other_places(forced):
    mask = some_mask(forced)
    seen = set()
    for seed in range(20):
        found = random_like(mask, seed=seed)
        control = found.mask
        assert sorted(control.values_LE.ravel().tolist()) == sorted(mask.values_LE.ravel().tolist())
        if forced:
            assert np.sort(control.force_LE, axis=1).tolist() == np.sort(mask.force_LE, axis=1).tolist()
        else:
            assert (control.sigma_L == mask.sigma_L).all()
        assert control.values_LE.dtype == mask.values_LE.dtype
        assert control.info.alpha == 2.5 and control.info.intent == mask.info.intent
        assert control.info.method == "random" and control.info.accepted_on is None
        assert control.info.settings == {"like": "direct", "seed": seed}
        assert found.scores_LE.tolist() == control.values_LE.tolist() and found.scores_LE.dtype == np.float32
        assert random_like(mask, seed=seed).mask.sha256 == control.sha256
        seen.add(control.values_LE.tobytes())
    assert len(seen) > 15 and mask.info.method == "direct"


def test_an_additive_control_leaves_the_layers_its_model_stood_in():
    layers = {
        int(i) for seed in range(10) for i in np.nonzero(random_like(some_mask(False), seed=seed).mask.values_LE)[0]
    }
    assert layers == {0, 1, 2}

"""The settings of detection/risk_difference.py: ranges, what is written down, reversing, caps, log odds, balance."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from moesteer.detection.risk_difference import detect
from moesteer.errors import InputError
from tests.unit.refusals_by_hand import DEFAULTS, LABELS, loop_counts, write_trace


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("traces") / "t")


@pytest.mark.parametrize("form", ["forced", "additive"])
@pytest.mark.parametrize("name, value", [
    ("on", -1), ("off", -1), ("experts", -1), ("on", 1.5), ("on", "5"), ("off", True), ("experts", None),
    ("per_layer", 0), ("per_layer", -2), ("bootstraps", 0), ("bootstraps", 2.0), ("seed", -1), ("seed", None),
    ("fdr", 0), ("fdr", 1), ("fdr", 1.5), ("fdr", -0.1), ("fdr", float("nan")), ("fdr", "0.1"), ("fdr", True),
    ("stability", 0), ("stability", 1.01), ("stability", float("inf")), ("stability", "most"),
    ("score", "t-test"), ("score", None), ("weight", "tokens"), ("form", "force"), ("balance", 1), ("reverse", "no"),
])  # fmt: skip
def test_a_setting_out_of_its_range_is_refused(traced, name, value, form):
    with pytest.raises(InputError, match=f"the setting {name} is out of its range") as caught:
        detect(traced[0], toward="refuse", **{"form": form, name: value})
    assert f"{name}={value!r}" in caught.value.where and caught.value.expected


def test_settings_are_written_down_as_plain_values(traced):
    found = detect(
        traced[0], toward="refuse", on=np.int64(18), off=3, per_layer=2, weight="conversation", score="log-odds",
        stability=np.float64(0.01), bootstraps=7, seed=3,
    )  # fmt: skip
    changed = {"per_layer": 2, "weight": "conversation", "score": "log-odds", "stability": 0.01}
    assert found.mask.info.settings == {
        **DEFAULTS, **changed, "form": "forced", "on": 18, "off": 3, "bootstraps": 7, "seed": 3,
    }  # fmt: skip
    assert type(found.mask.info.settings["on"]) is int and type(found.mask.info.settings["stability"]) is float
    assert json.loads(json.dumps(found.facts)) == found.facts and found.mask.to_bytes()


@pytest.mark.parametrize("score", ["risk-difference", "log-odds"])
@pytest.mark.parametrize("weight", ["token", "conversation"])
def test_a_reversed_mask_is_that_of_the_other_side(tmp_path, score, weight):
    labels = tuple("comply" if label == "deflect" else label for label in LABELS)
    trace, _ = write_trace(tmp_path / "t", labels=labels)
    for options in ({"on": 2, "off": 4}, {"form": "additive", "experts": 7}):
        given = {"score": score, "weight": weight, **options}
        away = detect(trace, toward="refuse", reverse=True, **given)
        other = detect(trace, toward="comply", **given)
        assert (away.mask.values_LE == other.mask.values_LE).all() and away.mask.expert_count > 4
        assert (away.scores_LE == other.scores_LE).all()
        assert away.mask.info.intent.toward == "comply" and away.mask.info.settings["reverse"] is True
    forward = detect(trace, toward="refuse", form="additive", experts=7, score=score, weight=weight)
    assert (away.mask.strength_LE == -forward.mask.strength_LE).all()


def test_a_reversed_mask_of_several_other_labels_says_what_it_is_not(traced):
    assert detect(traced[0], toward="refuse", reverse=True).mask.info.intent.toward == "not refuse"


@pytest.mark.parametrize("per_layer", [1, 2, 4])
@pytest.mark.parametrize("form", ["forced", "additive"])
def test_a_cap_per_layer_holds_and_what_it_costs_is_said(traced, per_layer, form):
    given = {"on": 9, "off": 9} if form == "forced" else {"experts": 15}
    found = detect(traced[0], toward="refuse", form=form, per_layer=per_layer, **given)
    values = found.mask.values_LE
    if form == "forced":
        assert ((values > 0).sum(axis=1) <= per_layer).all() and ((values < 0).sum(axis=1) <= per_layer).all()
        assert found.facts["chosen"] == {"on": int((values > 0).sum()), "off": int((values < 0).sum())}
    else:
        assert ((values != 0).sum(axis=1) == per_layer).all() and found.facts["chosen"] == {"experts": 3 * per_layer}
    assert found.facts["asked"] == given


def test_log_odds_ranks_by_the_ratio(traced):
    trace, plain = traced
    tables, counted = loop_counts(plain, "refuse", "response")
    odds = [(np.array(table) + 0.5) / (n - np.array(table) + 0.5) for table, n in zip(tables, counted, strict=True)]
    expected = np.log(odds[0] / odds[1])
    found = detect(trace, toward="refuse", score="log-odds", form="additive", experts=5)
    np.testing.assert_allclose(found.scores_LE, expected, rtol=1e-6, atol=1e-7)
    kept = np.abs(expected) >= np.sort(np.abs(expected).ravel())[-5]
    np.testing.assert_allclose(found.mask.strength_LE, np.where(kept, expected, 0) / np.abs(expected).max(), rtol=1e-6)


def test_a_balanced_detection_counts_alike_and_says_what_is_left_out(tmp_path):
    trace, _ = write_trace(tmp_path / "t")
    trace.rows = tuple(replace(row, group="ggghhhh"[i]) for i, row in enumerate(trace.rows))
    facts = detect(trace, toward="refuse", balance=True).facts
    # responses, wanted against other: g 2 + 1 against 4; h 6 against 2 + 1
    assert (facts["wanted_tokens"], facts["other_tokens"]) == (6, 6)
    assert (facts["paired_by"], facts["pairs"], facts["left_out"], facts["groups"]) == ("group", 2, 0, 2)
    trace.rows = tuple(replace(row, group="ggghhhg"[i]) for i, row in enumerate(trace.rows))
    facts = detect(trace, toward="refuse", balance=True).facts
    assert (facts["wanted_tokens"], facts["other_tokens"]) == (4, 4)  # h has no wanted one any more
    assert (facts["pairs"], facts["left_out"], facts["wanted_conversations"]) == (1, 2, 3)

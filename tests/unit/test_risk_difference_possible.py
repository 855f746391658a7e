"""Forced masks of detection/risk_difference.py are masks that the routers can follow, or none is made.

Truth: models/limits.require_possible, which refuses what cannot be applied, and through_model.possible_signs.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.detection.choosing import forced_signs
from moesteer.detection.method import Material
from moesteer.detection.risk_difference import METHODS, detect, possible_forced
from moesteer.detection.through_model import possible_signs
from moesteer.errors import InputError, MaskContentError, NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.models.limits import require_possible
from moesteer.routing import Scoring
from tests.unit.traces_by_hand import Spoken, drawn, write

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
GROUPED = Scoring("sigmoid", 3, renormalise=True, scale=1.5, groups=4, groups_kept=2, group_score="top2-sum")
"""Of 4 groups of 2 experts 2 are kept: 3 of the 4 experts left are selected."""
TOP_1 = Scoring("topk-sigmoid", 1)
PLAIN = Scoring("softmax-topk", 3)
SCORINGS = (GROUPED, TOP_1, PLAIN, Scoring("softmax-topk", 2, groups=2, groups_kept=1, shared=1, softcap=5.0))


def fingerprint(scoring, *, words=None):
    given_ = {
        "model_type": "fake_moe", "layer_ids": (0, 1, 2), "experts": 8, "top_k": scoring.top_k,
        "scoring": scoring.describe() if words is None else words, "router_sha256": "ab" * 32,
    }  # fmt: skip
    return Fingerprint(**given_)


def require(force_LE, scoring):
    routers = [SimpleNamespace(layer_id=layer, scoring=scoring) for layer in range(3)]
    require_possible(SimpleNamespace(force_LE=force_LE), routers)


def traced(folder, scoring, *, seed=0):
    """Selections of 24 conversations whose wanted side leans to experts 0, 2, 4 and 6, one to a group."""
    rng = np.random.default_rng(seed)
    lean = np.array([3.0, 0.0, 2.5, 0.0, 2.0, 0.0, 1.5, 0.0]) - 1.0
    spoken = []
    for n in range(24):
        wanted = n % 2 == 0
        selected = drawn(rng, 10, experts=8, top_k=scoring.top_k, lean=lean if wanted else -lean)
        logits = {"response": rng.normal(size=(10, 3, 8)).astype(np.float32)}
        spoken.append(Spoken(f"c{n}", f"g{n // 2}", "refuse" if wanted else "comply", {"response": selected}, logits))
    return write(folder, spoken, experts=8, scoring=scoring.describe())


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    return {one: traced(folder / str(number), one) for number, one in enumerate((GROUPED, TOP_1, PLAIN))}


# ---------------------------------------------------------------- the choice


@PROPERTY
@given(st.sampled_from(SCORINGS), st.integers(0, 99), st.integers(0, 20), st.integers(0, 20))
def test_the_choice_is_that_of_the_methods_through_the_model(scoring, seed, on, off):
    scores = np.random.default_rng(seed).integers(-4, 5, size=(3, 3, 8)) / 4
    found = possible_forced(scores, fingerprint(scoring), on=on, off=off)
    assert found.dtype == np.int8
    for table, score_LE in zip(found, scores, strict=True):
        assert table.tolist() == possible_signs(score_LE, on=on, off=off, scoring=scoring).tolist()
        require(table, scoring)


@PROPERTY
@given(st.sampled_from(SCORINGS), st.integers(0, 99), st.integers(1, 4), st.integers(1, 20))
def test_a_cap_per_layer_holds_beside_what_groups_take(scoring, seed, cap, many):
    score_LE = np.random.default_rng(seed).normal(size=(3, 8))
    (found,) = possible_forced(score_LE[None], fingerprint(scoring), on=many, off=many, per_layer=cap)
    assert ((found > 0).sum(axis=1) <= cap).all() and ((found < 0).sum(axis=1) <= cap).all()
    require(found, scoring)
    if many == 20 and cap == 1:
        assert ((found < 0).sum(axis=1) == 1).all(), "one can be switched off in every layer"


def test_without_groups_nothing_is_other_than_before():
    scores = np.random.default_rng(0).normal(size=(5, 3, 8))
    for per_layer in (None, 1, 2):
        given_ = {"on": 7, "off": 9, "per_layer": per_layer}
        expected = forced_signs(scores, top_k=3, **given_)
        assert (possible_forced(scores, fingerprint(PLAIN), **given_) == expected).all()


WORDS = (
    "", "unheard of", "sigmoid k=3", "0 of 0 groups by max", "3 of 2 groups by max", "2 of 3 groups by max",
    "-1 of 4 groups ", f"1 of {'9' * 5000} groups by max", "softmax-topk k=3, 2 of 4 groupsome",
)  # fmt: skip


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words[:20])
def test_words_that_name_no_groups_leave_what_k_says(words):
    """A fingerprint may come with somebody else's mask."""
    scores = np.random.default_rng(0).normal(size=(1, 3, 8))
    found = possible_forced(scores, fingerprint(PLAIN, words=words), on=5, off=5)
    assert (found == forced_signs(scores, on=5, off=5, top_k=3)).all()


# ---------------------------------------------------------------- what is made of a trace


def test_groups_take_part_in_the_mask(traces):
    asked = {"on": 9, "off": 12}
    found = detect(traces[GROUPED], toward="refuse", **asked)
    require(found.mask.force_LE, GROUPED)
    with pytest.raises(MaskContentError):
        require(forced_signs(found.scores_LE[None].astype(np.float64), top_k=3, **asked)[0], GROUPED)
    chosen = found.facts["chosen"]
    assert found.facts["asked"] == asked and 0 < chosen["on"] <= 9 and 0 < chosen["off"] < 12
    stable = detect(traces[GROUPED], toward="refuse", stability=0.5, bootstraps=20, **asked)
    require(stable.mask.force_LE, GROUPED)


@pytest.mark.parametrize("settings_", [{}, {"on": 1}, {"reverse": True}, {"stability": 0.5}, {"fdr": 0.1}], ids=str)
@pytest.mark.parametrize("score", ["risk-difference", "log-odds", "paired-t"])
def test_experts_on_in_top_1_routers_alone_are_refused_before_the_trace_is_read(traces, score, settings_, monkeypatch):
    monkeypatch.setattr("moesteer.detection.risk_difference.sides_of", None)
    with pytest.raises(NoEffectError, match="are to be switched on in top-1 routers, and none off") as caught:
        detect(traces[TOP_1], toward="refuse", score=score, **settings_)
    assert caught.value.where == f"{score} on a fake_moe (topk-sigmoid k=1)"
    assert "one place" in caught.value.expected and "form additive" in caught.value.do


def test_in_top_1_routers_the_others_are_switched_off_and_the_facts_say_so(traces):
    found = detect(traces[TOP_1], toward="refuse", on=5, off=4)
    alone = detect(traces[TOP_1], toward="refuse", on=0, off=4)
    assert (found.mask.force_LE == alone.mask.force_LE).all() and (found.mask.force_LE == -1).sum() == 4
    require(found.mask.force_LE, TOP_1)
    assert (found.facts["asked"], found.facts["chosen"]) == ({"on": 5, "off": 4}, {"on": 0, "off": 4})
    assert detect(traces[TOP_1], toward="refuse", form="additive").mask.expert_count == 20


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_run_on_top_1_routers_tries_the_variants_that_are_possible(traces, method):
    material = Material(traces={"pairs": traces[TOP_1]}, toward="refuse", seed=3)
    found = method.run_all(material, method.variants, {})
    possible = [v for v in method.variants if v.get("on") == 0 or v.get("form") == "additive"]
    for one, variant in zip(found, possible, strict=True):
        assert variant.items() <= one.mask.info.settings.items()
    for one in found:
        require(one.mask.force_LE, TOP_1)
        left_out = len(method.variants) - len(possible)
        assert one.facts["variants_left_out"] == f"{left_out}, which switch experts on in top-1 routers"
        assert one.mask.info.method == method.name
    for impossible in ([{"on": 5, "off": 0}], [{}]):
        with pytest.raises(NoEffectError, match="switched on in top-1 routers"):
            method.run_all(material, impossible, {})
    with pytest.raises(InputError, match="the setting form is out of its range"):
        method.run_all(material, [{"form": "force"}], {})


def test_a_run_on_other_routers_tries_them_all_as_one_by_one(traces):
    material = Material(traces={"pairs": traces[PLAIN]}, toward="refuse", seed=3)
    for method in METHODS:
        own = {"stability": 0.5, "bootstraps": 5}
        found = method.run_all(material, method.variants, own)
        alone = [method.run(material, {**own, **variant}) for variant in method.variants]
        assert [one.mask.sha256 for one in found] == [one.mask.sha256 for one in alone]
        assert [one.facts for one in found] == [one.facts for one in alone]
        assert all(one.mask.info.settings["seed"] == 3 for one in found)

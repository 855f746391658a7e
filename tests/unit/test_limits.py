"""limits.py: what a model's routers cannot do is refused or said, on routers made of their numbers only."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from moesteer.errors import MaskContentError
from moesteer.models.limits import limits, require_possible
from moesteer.routing import Scoring

LAYER_IDS = (1, 2, 5)


def fake_routers(scoring, *, experts=8, correction=None, note=""):
    family = SimpleNamespace(note=note)
    return [
        SimpleNamespace(layer_id=layer, scoring=scoring, experts=experts, correction=correction, family=family)
        for layer in LAYER_IDS
    ]


def force_LE(experts=8, **by_layer):
    """A force table [L, E]; on1=(0, 3) switches experts 0 and 3 of layer 1 on, off5=(2,) expert 2 of layer 5 off."""
    force = np.zeros((len(LAYER_IDS), experts), dtype=np.int8)
    for name, ids in by_layer.items():
        word, layer = name.rstrip("0123456789"), int(name.lstrip("onf"))
        force[LAYER_IDS.index(layer), list(ids)] = {"on": 1, "off": -1}[word]
    return force


def require(force, scoring):
    require_possible(SimpleNamespace(force_LE=force), fake_routers(scoring))


GROUPED = Scoring("sigmoid", 3, groups=4, groups_kept=2, group_score="top2-sum")
"""Of 4 groups of 2 experts 2 are kept: 3 of the 4 experts left are selected."""


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("layer", LAYER_IDS)
@pytest.mark.parametrize("kind", ["softmax-topk", "topk-softmax", "sigmoid", "topk-sigmoid"])
def test_an_expert_on_in_a_top_1_router_is_refused_by_its_layer(layer, kind):
    force = force_LE(**{f"on{layer}": (4,), "off2": (0, 1)})
    with pytest.raises(MaskContentError, match="an expert is switched on in a top-1 router") as caught:
        require(force, Scoring(kind, 1))
    assert caught.value.where == f"layer {layer}"
    assert "switch others off" in caught.value.do and "additive" in caught.value.do
    require(force, Scoring(kind, 2))


def test_experts_off_in_a_top_1_router_are_accepted_while_one_is_left():
    require(force_LE(off1=range(7), off5=(0,)), Scoring("topk-sigmoid", 1))
    with pytest.raises(MaskContentError, match="8 of 8 experts are switched off where 1 must be selected"):
        require(force_LE(off1=range(8)), Scoring("topk-sigmoid", 1))


def test_more_experts_on_than_selected_is_refused_for_that_reason_also_at_top_1():
    for k in (1, 2):
        with pytest.raises(MaskContentError, match=f"{k + 1} experts are switched on where {k} are selected") as caught:
            require(force_LE(on2=range(k + 1)), Scoring("softmax-topk", k))
        assert caught.value.where == "row 1 of the force table"


@pytest.mark.parametrize(
    "by_layer, what",
    [
        ({"on1": (0, 2, 4)}, "experts of 3 groups are switched on where 2 can be chosen"),
        ({"off5": (0, 2)}, "too few experts are left in the 2 of 4 groups"),
        ({"off5": (0, 1)}, "too few experts are left in the 2 of 4 groups"),
    ],
)
def test_what_groups_cannot_follow_is_refused(by_layer, what):
    with pytest.raises(MaskContentError, match=what):
        require(force_LE(**by_layer), GROUPED)
    require(force_LE(**by_layer), Scoring("sigmoid", 3))


def test_what_groups_can_follow_is_accepted():
    for by_layer in ({"on1": (0, 1, 2)}, {"on1": (0, 7), "off2": (3,)}, {"on5": (0,), "off5": (2,)}, {}):
        require(force_LE(**by_layer), GROUPED)


def test_an_additive_mask_is_always_possible():
    require(None, Scoring("topk-sigmoid", 1))
    require(None, GROUPED)


# ---------------------------------------------------------------- what is said


def said(scoring, **options):
    return limits(fake_routers(scoring, **options))


def test_a_plain_router_says_how_many_can_be_switched():
    assert said(Scoring("softmax-topk", 3)) == (
        "at most 3 experts of a layer can be switched on",
        "at most 5 of a layer can be switched off",
    )


def test_a_top_1_router_says_that_nothing_can_be_switched_on():
    found = said(Scoring("topk-sigmoid", 1), experts=16)
    assert found == (
        "top-1: experts can be switched off and biased, not switched on",
        "at most 15 of a layer can be switched off",
    )


@pytest.mark.parametrize(
    "scoring, options, sentence",
    [
        (
            GROUPED,
            {},
            "experts lie in 4 groups of 2; those switched on may lie in at most 2 of them, "
            "and of any 2 groups at most 1 experts can be switched off",
        ),
        (Scoring("sigmoid", 2), {"correction": np.zeros(8)}, "a correction bias takes part in the choice"),
        (Scoring("softmax-topk", 1, renormalise=True), {}, "the one weight is constant"),
        (Scoring("topk-softmax", 1), {}, "the one weight is constant"),
        (Scoring("softmax-topk", 2, skipped=1), {"experts": 9}, "the last 1 of the 9 choices is no expert"),
        (Scoring("softmax-topk", 2), {"note": "text tokens only"}, "text tokens only"),
    ],
)
def test_each_limit_has_its_sentence_and_no_other_router_has_it(scoring, options, sentence):
    assert sum(text.startswith(sentence) for text in said(scoring, **options)) == 1
    plain = said(Scoring("softmax-topk", 2), experts=options.get("experts", 8))
    assert not any(text.startswith(sentence) for text in plain)


@pytest.mark.parametrize("other", [{"top_k": 2}, {"renormalise": False}, {"shared": 1}])
def test_one_weight_among_others_is_not_constant(other):
    scoring = Scoring(**{"kind": "softmax-topk", "top_k": 1, "renormalise": True, **other})
    assert not any("constant" in text for text in said(scoring))


def test_all_limits_are_said_together_in_one_order():
    scoring = Scoring("softmax-topk", 1, renormalise=True, groups=2, groups_kept=1, skipped=1)
    found = said(scoring, correction=np.zeros(8), note="a note")
    starts = ("top-1", "experts lie in 2 groups of 4", "a correction bias", "the one weight", "the last 1")
    assert len(found) == len(starts) + 1 and found[-1] == "a note"
    assert all(text.startswith(start) for text, start in zip(found, starts, strict=False))


@pytest.mark.parametrize("scoring", [Scoring("softmax-topk", 3), Scoring("topk-sigmoid", 1)])
def test_what_is_said_of_switching_is_what_is_accepted(scoring):
    on, off = scoring.top_k if scoring.top_k > 1 else 0, 8 - scoring.top_k
    require(force_LE(on1=range(on), off2=range(off)), scoring)
    for too_many in (force_LE(on1=range(on + 1)), force_LE(off2=range(off + 1))):
        with pytest.raises(MaskContentError):
            require(too_many, scoring)


@pytest.mark.parametrize("on, accepted", [((0, 2), True), ((0, 2, 4), False)])
def test_what_is_said_of_groups_is_what_is_accepted(on, accepted):
    force = force_LE(on1=on)
    if accepted:
        require(force, GROUPED)
    else:
        with pytest.raises(MaskContentError, match="groups"):
            require(force, GROUPED)

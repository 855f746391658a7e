"""What routing.py must do, in plain loops written from the formulae, and draws of cases to try it on.

Legend: T tokens, E experts, S shared experts behind them, K selected, G groups. The loops work on Python floats
(float64); the module works in float32, so weights are compared with rtol 1e-5 (a few float32 ulps through exp and a
sum).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st

from moesteer.routing import Scoring, select, steer_logits

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
SEARCHED = settings(PROPERTY, max_examples=300)
KINDS = ("softmax-topk", "topk-softmax", "sigmoid", "topk-sigmoid", "sqrtsoftplus")
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


def as_numpy(tensor):
    return tensor.float().numpy()

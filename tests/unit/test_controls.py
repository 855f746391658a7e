"""detection/controls.py: laws that every control keeps, on masks drawn at random."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.detection.controls import random_like, shuffled_layers, sign_flipped, zeroed
from moesteer.errors import MaskContentError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.models.steering import MaskTables
from moesteer.routing import Scoring, check_force

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
ALL = (random_like, shuffled_layers, sign_flipped, zeroed)


def info(layers, experts, top_k, **changes):
    fingerprint = Fingerprint(
        model_type="fake_moe", layer_ids=tuple(range(1, layers + 1)), experts=experts, top_k=top_k,
        scoring=f"softmax-topk k={top_k}", router_sha256="ab" * 32,
    )  # fmt: skip
    given = {
        "fingerprint": fingerprint, "method": "direct", "settings": {"x": 1}, "intent": Intent(toward="refuse"),
        "alpha": 2.5, "data_sha256": "cd" * 32, "accepted_on": {"split": "select"},
    }  # fmt: skip
    return MaskInfo(**{**given, **changes})


def additive(strength, *, top_k=2, sigma=None):
    table = np.asarray(strength, np.float32)
    sigma = np.linspace(0.5, 2.0, len(table)) if sigma is None else sigma
    return SteeringMask(info(*table.shape, top_k), strength_LE=table, sigma_L=np.asarray(sigma, np.float32))


def forced(force, *, top_k=2):
    table = np.asarray(force, np.int8)
    return SteeringMask(info(*table.shape, top_k), force_LE=table)


@st.composite
def additive_masks(draw):
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(2, 8))
    values = st.sampled_from([0.0, 0.0, 0.0, 1.5, -2.0, 0.25, -0.5])
    return additive([[draw(values) for _ in range(experts)] for _ in range(layers)], top_k=draw(st.integers(1, 2)))


@st.composite
def forced_masks(draw):
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(2, 8))
    top_k = draw(st.integers(1, experts))
    table = np.zeros((layers, experts), np.int8)
    for row in table:
        on = draw(st.integers(0, top_k))
        off = draw(st.integers(0, min(experts - top_k, experts - on)))
        order = draw(st.permutations(range(experts)))
        row[order[:on]], row[order[on : on + off]] = 1, -1
    return forced(table, top_k=top_k)


MASKS = st.one_of(additive_masks(), forced_masks())
FORCED = forced([[1, 1, 0, 0, -1, 0], [0, 0, 0, 0, 0, 0], [-1, -1, -1, 0, 0, 1]])
ADDITIVE = additive([[1.5, -2.0, 0, 0, 0, 0], [0, 0, 0.25, 0, 0, 0], [0, 0, 0, 0, -0.5, 3.0]])
BOTH = pytest.mark.parametrize("mask", [ADDITIVE, FORCED], ids=["additive", "forced"])


def loop_flip(row, top_k):
    """A forced row's opposite, by hand: at most top_k on, E - top_k off, the first of each."""
    on, off, found = 0, 0, []
    for value in row:
        if value < 0 and on < top_k:
            on += 1
            found.append(1)
        elif value > 0 and off < len(row) - top_k:
            off += 1
            found.append(-1)
        else:
            found.append(0)
    return found


# ---------------------------------------------------------------- what all controls keep


@pytest.mark.parametrize("control", ALL)
@BOTH
def test_a_control_says_what_it_is_and_keeps_the_rest(control, mask):
    found = control(mask)
    names = {random_like: "random", shuffled_layers: "shuffled-layers", sign_flipped: "sign-flipped", zeroed: "alpha-0"}
    seeds = {"seed": 0} if control in (random_like, shuffled_layers) else {}
    extra = {shuffled_layers: {"moved": 3}, sign_flipped: {"dropped": 1} if mask.forced else {}}.get(control, {})
    assert found.mask.info.settings == {"like": "direct", **seeds, **extra}
    expected = {
        **mask.info.model_dump(), "method": names[control], "settings": found.mask.info.settings, "accepted_on": None,
        "alpha": 0.0 if control is zeroed else 2.5,
    }  # fmt: skip
    assert found.mask.info.model_dump() == expected
    assert found.mask.forced == mask.forced and found.mask.values_LE.dtype == mask.values_LE.dtype
    if not mask.forced:
        assert found.mask.sigma_L.tolist() == mask.sigma_L.tolist()
    assert found.scores_LE.dtype == np.float32 and found.scores_LE.tolist() == found.mask.values_LE.tolist()
    assert control(mask).mask.sha256 == found.mask.sha256
    assert mask.info.method == "direct" and mask.info.alpha == 2.5  # the mask itself is as it was


@pytest.mark.parametrize("control", ALL)
@PROPERTY
@given(mask=MASKS)
def test_norm_and_counts_are_the_masks_own(control, mask):
    found = control(mask).mask
    values, others = mask.values_LE.ravel().tolist(), found.values_LE.ravel().tolist()
    if control is sign_flipped:
        if found.info.settings.get("dropped"):
            return
        others = [-value for value in others]
    assert sorted(others) == sorted(values)
    assert SteeringMask.from_bytes(found.to_bytes(), where="x").sha256 == found.sha256


@pytest.mark.parametrize("control", ALL)
@PROPERTY
@given(mask=forced_masks())
def test_no_control_asks_more_of_a_layer_than_it_can_give(control, mask):
    check_force(control(mask).mask.force_LE, scoring=Scoring("softmax-topk", mask.info.fingerprint.top_k))


# ---------------------------------------------------------------- sign-flipped


@PROPERTY
@given(mask=additive_masks())
def test_strengths_are_negated_and_twice_is_the_mask(mask):
    once = sign_flipped(mask).mask
    assert once.strength_LE.tolist() == [[-float(v) for v in row] for row in mask.strength_LE]
    assert (once.bias_LE() == -mask.bias_LE()).all()
    assert sign_flipped(once).mask.strength_LE.tobytes() == mask.strength_LE.tobytes()
    assert not np.signbit(once.strength_LE[once.strength_LE == 0]).any()


@PROPERTY
@given(mask=forced_masks())
def test_on_and_off_are_swapped_as_far_as_a_layer_can_give(mask):
    once = sign_flipped(mask).mask
    top_k = mask.info.fingerprint.top_k
    assert once.force_LE.tolist() == [loop_flip(row, top_k) for row in mask.force_LE.tolist()]
    dropped = once.info.settings["dropped"]
    assert dropped == mask.expert_count - once.expert_count >= 0
    if dropped == 0:
        assert (sign_flipped(once).mask.force_LE == mask.force_LE).all()


def test_what_does_not_fit_is_dropped_from_the_end_and_counted():
    found = sign_flipped(forced([[-1, -1, -1, 0, -1, 0], [1, 0, 0, 0, 0, 0]])).mask
    assert found.force_LE.tolist() == [[1, 1, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0]]
    assert found.info.settings == {"like": "direct", "dropped": 2}


def most_that_fit(row, scoring):
    """The largest number of entries of a row that check_force lets stand, over every subset."""
    places = np.flatnonzero(row)
    for count in range(len(places), -1, -1):
        for chosen in itertools.combinations(places, count):
            part = np.zeros_like(row)
            part[list(chosen)] = row[list(chosen)]
            try:
                check_force(part[None], scoring=scoring)
            except MaskContentError:
                continue
            return count
    return 0


GROUPED = Scoring("softmax-topk", 3, groups=4, groups_kept=2)


@PROPERTY
@given(row=st.lists(st.sampled_from([0, 0, 1, -1]), min_size=8, max_size=8))
def test_groups_are_kept_to_when_the_scoring_is_given(row):
    row = np.asarray(row, np.int8)
    try:
        check_force(row[None], scoring=GROUPED)
    except MaskContentError:
        return
    found = sign_flipped(forced([row], top_k=3), scoring=GROUPED).mask
    check_force(found.force_LE, scoring=GROUPED)
    kept = found.force_LE[0]
    assert ((kept == 0) | (kept == -row)).all()
    assert np.count_nonzero(kept) >= most_that_fit(-row, GROUPED) - 1


def test_of_groups_those_with_the_most_on_come_first():
    mask = forced([[-1, 0, -1, 0, -1, -1, 0, 0]], top_k=3)
    assert sign_flipped(mask, scoring=GROUPED).mask.force_LE.tolist() == [[1, 0, 0, 0, 1, 1, 0, 0]]
    assert sign_flipped(mask).mask.force_LE.tolist() == [[1, 0, 1, 0, 1, 0, 0, 0]]


# ---------------------------------------------------------------- shuffled-layers


def fewest_in_place(table):
    """The fewest rows that stay as they were, over every permutation."""
    rows = table.tolist()
    return min(sum(a == rows[i] for a, i in zip(rows, order, strict=True)) for order in permutations(len(rows)))


def permutations(count):
    return itertools.permutations(range(count))


@PROPERTY
@given(mask=MASKS, seed=st.integers(0, 1000))
def test_rows_move_to_other_layers_wherever_they_can(mask, seed):
    found = shuffled_layers(mask, seed=seed).mask
    before, after = mask.values_LE.tolist(), found.values_LE.tolist()
    assert sorted(after) == sorted(before)
    moved = sum(a != b for a, b in zip(before, after, strict=True))
    assert len(before) - moved == fewest_in_place(mask.values_LE) and found.info.settings["moved"] == moved


def test_different_rows_are_never_left_in_place_and_every_such_order_comes_up():
    mask = additive([[float(i + 1), 0.0] for i in range(4)], top_k=1)
    orders = {tuple(shuffled_layers(mask, seed=seed).mask.strength_LE[:, 0].tolist()) for seed in range(300)}
    derangements = {o for o in itertools.permutations((1.0, 2.0, 3.0, 4.0)) if all(v != i + 1 for i, v in enumerate(o))}
    assert orders == derangements


@pytest.mark.parametrize("rows", [[[1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]], ids=["one-layer", "equal-layers"])
def test_layers_that_cannot_be_told_apart_give_the_mask_and_say_so(rows):
    found = shuffled_layers(additive(rows, top_k=1)).mask
    assert found.strength_LE.tolist() == rows and found.info.settings["moved"] == 0


# ---------------------------------------------------------------- alpha-0


@BOTH
def test_at_alpha_0_nothing_is_added_and_nothing_forced(mask):
    import torch

    found = zeroed(mask).mask
    assert not found.bias_LE().any() and (found.values_LE == mask.values_LE).all()
    tables = MaskTables.of_masks([found], [None], device=torch.device("cpu"))
    assert tables._tables == [None] * 3 and tables._forces == [None] * 3
    live = MaskTables.of_masks([mask], [None], device=torch.device("cpu"))
    assert any(t is not None for t in [*live._tables, *live._forces])

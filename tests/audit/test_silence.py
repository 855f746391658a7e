"""Masks of an audit: orders as far as routers follow, and random ones like them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from moesteer.audit.experts import ordered
from moesteer.audit.silence import Routers, draws, force, reach, sizes_up_to
from moesteer.errors import InputError
from moesteer.fingerprint import Fingerprint
from moesteer.routing import Scoring

FINGERPRINT = Fingerprint(
    model_type="m", layer_ids=(0, 1), experts=8, top_k=3, scoring="softmax-topk k=3", router_sha256="a"
)
ROUTERS = Routers(FINGERPRINT, Scoring("softmax-topk", 3))
FALLING = ordered(-np.arange(16.0).reshape(2, 8))  # the first layer's experts before the second's


def test_an_order_is_by_falling_score_ties_by_place_and_the_first_set_before_all() -> None:
    score_LE = np.array([[1.0, 3.0], [3.0, 2.0]])
    assert ordered(score_LE) == ((0, 1), (1, 0), (1, 1), (0, 0))
    assert ordered(score_LE, np.array([[True, False], [False, True]])) == ((1, 1), (0, 0), (0, 1), (1, 0))


def test_a_full_layer_passes_its_turn_to_the_next() -> None:
    table = force(FALLING, routers=ROUTERS, count=7, way="off")
    assert table[0].tolist() == [-1] * 5 + [0] * 3, "three of eight must be left to select"
    assert table[1].tolist() == [-1] * 2 + [0] * 6
    on = force(FALLING, routers=ROUTERS, count=4, way="on")
    assert on.tolist() == [[1] * 3 + [0] * 5, [1] + [0] * 7]
    assert reach(FALLING, routers=ROUTERS, way="off") == 10 and reach(FALLING, routers=ROUTERS, way="on") == 6


def test_larger_masks_hold_the_smaller() -> None:
    tables = [force(FALLING, routers=ROUTERS, count=size, way="off") != 0 for size in range(1, 11)]
    assert all((small <= large).all() for small, large in pairwise(tables))
    assert [int(table.sum()) for table in tables] == list(range(1, 11))


def test_groups_and_top_one_are_followed() -> None:
    grouped = Routers(FINGERPRINT, Scoring("sigmoid", 2, groups=4, groups_kept=2))
    assert reach(FALLING, routers=grouped, way="off") == 4, "of any two groups of two, two must be left"
    alone = Routers(FINGERPRINT, Scoring("softmax-topk", 1))
    assert reach(FALLING, routers=alone, way="on") == 0 and reach(FALLING, routers=alone, way="off") == 14


def test_what_another_mask_names_is_passed_over() -> None:
    keep_LE = np.zeros((2, 8), dtype=np.int8)
    keep_LE[0, 0], keep_LE[0, 2] = 1, -1
    table = force(FALLING, routers=ROUTERS, count=2, way="off", keep_LE=keep_LE)
    assert np.argwhere(table).tolist() == [[0, 1], [0, 3]]


def test_sizes_double_up_to_the_most_and_those_asked_for_are_kept_to_it() -> None:
    assert sizes_up_to(72, None) == [1, 2, 4, 8, 16, 32, 64, 72]
    assert sizes_up_to(8, None) == [1, 2, 4, 8] and sizes_up_to(1, None) == [1] and sizes_up_to(0, None) == []
    assert sizes_up_to(10, [12, 4, 4, 1]) == [1, 4]
    with pytest.raises(InputError, match="sizes are"):
        sizes_up_to(10, [])


USAGE = np.array([[0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1], [0.5] * 8])


def test_draws_keep_to_the_layers_and_leave_out_the_finders_own_where_they_can() -> None:
    order = ((0, 0), (1, 1), (0, 1), *(entry for entry in FALLING if entry not in {(0, 0), (1, 1), (0, 1)}))
    found = draws(order, routers=ROUTERS, way="off", size=3, count=30, usage_LE=USAGE, seed=0)
    tables = [one.condition.masks[0].values_LE for one in found]
    assert all(((table != 0).sum(axis=1) == [2, 1]).all() for table in tables)
    assert all(one.overlap == 0 for one in found)
    assert len({table.tobytes() for table in tables}) > 10
    # of the first layer, those nearest in usage to 0.9 and 0.8: never both of the rarest four with 0.7 and 0.6 left
    assert {int(expert) for table in tables for expert in np.flatnonzero(table[0])} <= {2, 3, 4, 5, 6}
    assert np.mean([one.usage for one in found]) > USAGE.mean() / 2


def test_where_a_layer_has_no_others_the_finders_own_are_drawn_and_counted() -> None:
    found = draws(FALLING, routers=ROUTERS, way="off", size=5, count=4, usage_LE=USAGE, seed=0)
    # five of the first layer are the finder's: three others, and two of its own
    assert all(one.overlap == pytest.approx(2 / 5) for one in found)


def test_draws_are_fixed_by_the_seed_and_differ_by_number_size_and_way() -> None:
    def digests(seed: int, size: int = 2) -> list[str]:
        made = draws(FALLING, routers=ROUTERS, way="off", size=size, count=5, usage_LE=USAGE, seed=seed)
        return [one.condition.masks[0].values_LE.tobytes().hex() for one in made]

    assert digests(0) == digests(0) != digests(1)
    assert len(set(digests(0))) > 1
    names = [
        one.condition.name
        for way in ("off", "on")
        for one in draws(FALLING, routers=ROUTERS, way=way, size=2, count=2, usage_LE=USAGE, seed=0)  # type: ignore[arg-type]
    ]
    assert names == ["random-off-002-00", "random-off-002-01", "random-on-002-00", "random-on-002-01"]

"""Masks of an audit: the first so many experts of an order switched off (or on), and random ones like them.

An order is followed as far as routers can: an expert that its layer cannot spare beside those before it (at most
E - K off, at most K on, fewer where experts lie in groups; routing.check_force) is passed over, and the next one taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesteer.audit.experts import F64, Order
from moesteer.audit.playing import Condition
from moesteer.detection.through_model import possible_signs
from moesteer.errors import InputError, ModelError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.routing import Scoring

Way = Literal["off", "on"]
"""Silencing switches experts off; activation switches them on."""
SILENCED, ACTIVATED = "silenced", "activated"
FEW = 0.10
"""Share of all experts that count as few: a behaviour that lies in so many is concentrated, and the first so many of a
finder's order are no part of the random draws, which are to show what others do."""
NEAREST = 4
"""A random expert is drawn from so many of its layer that are nearest in usage to the one it stands for."""


@dataclass(frozen=True)
class Routers:
    """What limits masks of one model."""

    fingerprint: Fingerprint
    scoring: Scoring

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return len(self.fingerprint.layer_ids), self.fingerprint.experts

    def require_spare(self) -> None:
        """Raise ModelError where no expert can be switched off."""
        order = tuple((0, expert) for expert in range(self.shape[1]))
        if not force(order, routers=self, count=1, way="off").any():
            raise ModelError(
                "no expert can be silenced: the router selects all that it may choose from",
                where=f"audit of a {self.fingerprint.model_type} ({self.fingerprint.scoring}, "
                f"{self.fingerprint.experts} experts)",
                expected=f"more than {self.scoring.top_k} experts to choose {self.scoring.top_k} from",
                do="audit a model whose routers leave experts out; this one's can only be reweighted",
            )


def force(
    order: Order, *, routers: Routers, count: int, way: Way, keep_LE: NDArray[np.int8] | None = None
) -> NDArray[np.int8]:
    """The first `count` experts of an order that can be switched, as a force table [L, E]: -1 off, 1 on.

    keep_LE: a force table of another mask; what it names is passed over. None are on in a top-1 router.
    """
    place_LE = np.zeros(routers.shape)
    for number, (row, expert) in enumerate(order):
        place_LE[row, expert] = len(order) - number
    if keep_LE is not None:
        place_LE[keep_LE != 0] = 0.0
    if way == "off":
        return possible_signs(-place_LE, on=0, off=count, scoring=routers.scoring)
    return possible_signs(place_LE, on=count, off=0, scoring=routers.scoring)


def reach(order: Order, *, routers: Routers, way: Way) -> int:
    """How many experts of an order can be switched at once."""
    return int(np.count_nonzero(force(order, routers=routers, count=len(order), way=way)))


def sizes_up_to(most: int, asked: Sequence[int] | None) -> list[int]:
    """1, 2, 4, ... and `most`; of the sizes asked for, those that can be. Raises InputError for sizes below 1."""
    if asked is None:
        doubled = [2**i for i in range(most.bit_length())] if most else []
        return [size for size in doubled if size < most] + ([most] if most else [])
    if not asked or min(asked) < 1:
        raise InputError(
            f"sizes are {list(asked)}",
            where="--sizes",
            expected="numbers of experts, 1 or more",
            do="for example --sizes 1,2,4,8",
        )
    return sorted({size for size in asked if size <= most})


def mask(force_LE: NDArray[np.int8], *, fingerprint: Fingerprint, finder: str, way: Way) -> SteeringMask:
    """A forced mask; what made it is in its settings."""
    return SteeringMask(
        MaskInfo(
            fingerprint=fingerprint, method=f"audit-{finder}", intent=Intent(toward=_toward(way)),
            settings={"finder": finder, "experts": int(np.count_nonzero(force_LE)), "way": way},
        ),
        force_LE=force_LE,
    )  # fmt: skip


def _toward(way: Way) -> str:
    return SILENCED if way == "off" else ACTIVATED


def condition_name(finder: str, way: Way, size: int) -> str:
    """Of a finder's first so many experts."""
    return f"{finder}-{way}-{size:03d}"


def conditions(order: Order, *, finder: str, routers: Routers, way: Way, sizes: Sequence[int]) -> list[Condition]:
    """One condition for each size."""
    found = []
    for size in sizes:
        force_LE = force(order, routers=routers, count=size, way=way)
        made = mask(force_LE, fingerprint=routers.fingerprint, finder=finder, way=way)
        found.append(Condition(condition_name(finder, way, size), (made,)))
    return found


@dataclass(frozen=True, eq=False)
class Draw:
    """A random mask like a finder's. overlap: share of its experts that are the finder's; usage: their mean."""

    condition: Condition
    overlap: float
    usage: float


def draws(order: Order, *, routers: Routers, way: Way, size: int, count: int, usage_LE: F64, seed: int) -> list[Draw]:
    """Random masks with as many experts in every layer as the first `size` of an order, and of like usage.

    For each of those, in order, one of its layer's NEAREST in usage is drawn that was not drawn yet and is neither
    among them nor among the first FEW of the order; of those only where the layer has no others left.
    """
    force_LE = force(order, routers=routers, count=size, way=way)
    named = [entry for entry in order if force_LE[entry]]
    apart = {*named, *order[: math.ceil(FEW * len(order))]}
    found = []
    for number in range(count):
        rng = np.random.default_rng([seed, size, number, way == "on"])
        drawn = _like(named, apart, usage_LE, rng)
        taken = set(drawn)
        rest = [entry for entry in order if entry not in taken]
        shuffled = [rest[i] for i in rng.permutation(len(rest))]  # for routers that cannot follow all of those drawn
        table_LE = force((*drawn, *shuffled), routers=routers, count=size, way=way)
        made = mask(table_LE, fingerprint=routers.fingerprint, finder=f"random-{number:02d}", way=way)
        entries = table_LE != 0
        found.append(
            Draw(
                Condition(f"random-{way}-{size:03d}-{number:02d}", (made,)),
                overlap=float((entries & (force_LE != 0)).sum() / max(1, entries.sum())),
                usage=float(usage_LE[entries].mean()) if entries.any() else 0.0,
            )
        )
    return found


def _like(
    named: Sequence[tuple[int, int]], apart: AbstractSet[tuple[int, int]], usage_LE: F64, rng: np.random.Generator
) -> list[tuple[int, int]]:
    drawn: dict[tuple[int, int], None] = {}  # a set that keeps its order
    for row, expert in named:
        free = [(row, other) for other in range(usage_LE.shape[1]) if (row, other) not in drawn]
        left = [entry for entry in free if entry not in apart] or free
        near = sorted(left, key=lambda entry: (abs(usage_LE[entry] - usage_LE[row, expert]), entry))[:NEAREST]
        drawn[near[int(rng.integers(len(near)))]] = None
    return list(drawn)

"""Controls: masks that should do nothing in particular, to hold a method's effect against.

Each keeps the mask's norm, number of entries, sigma and (but for `zeroed`) alpha, and changes one thing: where the
numbers stand (`random_like`), which layer they stand in (`shuffled_layers`), their signs (`sign_flipped`), or whether
they are applied (`zeroed`). What a mask carries beside its table is carried along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer.detection.base import Detection
from moesteer.errors import MaskContentError
from moesteer.mask import SteeringMask
from moesteer.routing import Scoring, check_force


def random_like(mask: SteeringMask, *, seed: int = 0) -> Detection:
    """A mask with the same numbers in other places: equal norm, sparsity, alpha and signs, experts at random.

    Additive strengths are shuffled over all layers and experts. A forced mask is shuffled within each layer,
    so that no layer is asked for more experts than it can give.
    """
    rng = np.random.default_rng(seed)
    if mask.force_LE is not None:
        shuffled = _with_table(mask, np.stack([rng.permutation(row) for row in mask.force_LE]))
    else:
        shuffled = _with_table(mask, rng.permutation(mask.values_LE.ravel()).reshape(mask.values_LE.shape))
    return _control(mask, shuffled, "random", {"seed": seed})


def sign_flipped(mask: SteeringMask, *, scoring: Scoring | None = None) -> Detection:
    """The opposite mask: strengths negated; of a forced mask, on and off swapped.

    A router can be asked for at most top_k experts on and E - top_k off; of what would be on, then of what would be
    off, as many are kept as fit, lower expert ids first. settings["dropped"] says how many did not fit. scoring: of
    the model's routers, where experts lie in groups, which allow less; those of the groups that would have the most
    on come first.
    """
    if mask.force_LE is None:
        return _control(mask, _with_table(mask, 0 - mask.values_LE), "sign-flipped", {})  # 0 - 0 is no minus zero
    limits = scoring or Scoring("softmax-topk", mask.info.fingerprint.top_k)
    flipped_LE = np.stack([_what_fits(-row_E, limits) for row_E in mask.force_LE])
    dropped = mask.expert_count - int(np.count_nonzero(flipped_LE))
    return _control(mask, _with_table(mask, flipped_LE), "sign-flipped", {"dropped": dropped})


def shuffled_layers(mask: SteeringMask, *, seed: int = 0) -> Detection:
    """The rows of the table in other layers, each layer's sigma where it was: a strength stays one in sigmas.

    Of all permutations one that leaves the fewest rows as they were (none, where rows differ enough), by lot.
    settings["moved"]: in how many layers the row is another than before; 0 means that the control is the mask.
    """
    from scipy.optimize import linear_sum_assignment

    table_LE = mask.values_LE
    same_LL = (table_LE[:, None, :] == table_LE[None, :, :]).all(axis=-1)
    lot_LL = np.random.default_rng(seed).random(same_LL.shape) / len(table_LE)  # all lots together weigh less than 1
    order_L = linear_sum_assignment(same_LL + lot_LL)[1]
    moved = int((~same_LL[np.arange(len(table_LE)), order_L]).sum())
    return _control(mask, _with_table(mask, table_LE[order_L]), "shuffled-layers", {"seed": seed, "moved": moved})


def zeroed(mask: SteeringMask) -> Detection:
    """The same mask at alpha 0, which adds nothing and switches a forced mask off: all the machinery, no effect."""
    return _control(mask, mask.with_info(alpha=0.0), "alpha-0", {})


def _control(mask: SteeringMask, changed: SteeringMask, method: str, settings: dict[str, Any]) -> Detection:
    like = {"like": mask.info.method, **settings}
    control = changed.with_info(method=method, settings=like, accepted_on=None)
    return Detection(control, np.asarray(control.values_LE, dtype=np.float32), {})


def _with_table(mask: SteeringMask, table_LE: NDArray[Any]) -> SteeringMask:
    return replace(mask, force_LE=table_LE) if mask.forced else replace(mask, strength_LE=table_LE)


def _what_fits(wanted_E: NDArray[np.int8], scoring: Scoring) -> NDArray[np.int8]:
    """The entries of one layer's force that a router can follow, taken one by one while they fit."""
    groups_on = (wanted_E.reshape(scoring.groups, -1) > 0).sum(axis=-1).repeat(len(wanted_E) // scoring.groups)
    on = sorted(np.flatnonzero(wanted_E > 0), key=lambda e: (-groups_on[e], e))
    kept_E = np.zeros_like(wanted_E)
    for expert in [*on, *np.flatnonzero(wanted_E < 0)]:
        kept_E[expert] = wanted_E[expert]
        try:
            check_force(kept_E[None], scoring=scoring)
        except MaskContentError:
            kept_E[expert] = 0
    return kept_E


def _flipped(mask: SteeringMask, *, seed: int = 0) -> Detection:
    return sign_flipped(mask)


def _zeroed(mask: SteeringMask, *, seed: int = 0) -> Detection:
    return zeroed(mask)


CONTROLS: Mapping[str, Callable[..., Detection]] = {
    "alpha-0": _zeroed,
    "random": random_like,
    "sign-flipped": _flipped,
    "shuffled-layers": shuffled_layers,
}
"""Controls by name, each called with a mask and seed=."""

"""Which experts a table of scores chooses: so many of the largest, so many to a layer. B tables at once, [B, L, E]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def strongest(values_BLE: F64, *, count: int, per_layer: int | None) -> NDArray[np.bool_]:
    """The `count` largest positive values of each table, at most `per_layer` of them (None: any) in a layer.

    Ties go to the lower layer and expert. A full layer passes its turn to the next largest elsewhere.
    """
    tables, _, experts = values_BLE.shape
    fits = values_BLE > 0
    if per_layer is not None and per_layer < experts:
        order = np.argsort(-values_BLE, axis=-1, kind="stable")[..., :per_layer]
        within = np.zeros_like(fits)
        np.put_along_axis(within, order, True, axis=-1)
        fits &= within
    flat = np.where(fits, values_BLE, -np.inf).reshape(tables, -1)
    order = np.argsort(-flat, axis=-1, kind="stable")[:, :count]
    chosen = np.zeros_like(flat, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return np.asarray(chosen.reshape(values_BLE.shape) & fits)


def forced_signs(score_BLE: F64, *, on: int, off: int, top_k: int, per_layer: int | None = None) -> NDArray[np.int8]:
    """1 for the `on` largest positive scores, -1 for the `off` most negative.

    At most top_k on and E - top_k off in a layer, which is all a router can take, and at most per_layer of either.
    """
    experts = score_BLE.shape[-1]
    most = experts if per_layer is None else per_layer
    switched_on = strongest(score_BLE, count=on, per_layer=min(top_k, most))
    switched_off = strongest(-score_BLE, count=off, per_layer=min(experts - top_k, most))
    return switched_on.astype(np.int8) - switched_off.astype(np.int8)


def additive_signs(score_BLE: F64, *, experts: int, per_layer: int | None = None) -> NDArray[np.int8]:
    """Signs of the `experts` scores of largest size, at most per_layer of them in a layer; else 0."""
    chosen = strongest(np.abs(score_BLE), count=experts, per_layer=per_layer)
    return np.where(chosen, np.sign(score_BLE), 0).astype(np.int8)

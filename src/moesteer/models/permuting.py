"""Routed experts that change places: what is left of a behaviour when no token finds the experts it was sent to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesteer.errors import InputError
from moesteer.models.routers import Router


class Permuted:
    """Steering for `RouterTap.steer`: expert e of a layer gets the logit of expert order_LE[layer, e].

    The same as the router's weight rows (and biases) in that order; a correction bias stays with its place. The
    experts' own weights are untouched, and so is how many of them a token is sent to. changed of checked: selections
    (one router, one position) that became others, on each router's first call. Raises InputError for an order that is
    no permutation of every layer's experts.
    """

    def __init__(self, order_LE: NDArray[np.integer], routers: Sequence[Router]) -> None:
        order = np.asarray(order_LE)
        shape = (len(routers), routers[0].experts)
        if order.shape != shape or not (np.sort(order, axis=-1) == np.arange(shape[1])).all():
            raise InputError(
                "the order is no permutation of the experts",
                where=f"an array of shape {order.shape}",
                expected=f"for each of {shape[0]} routers every number from 0 to {shape[1] - 1} once",
                do="make it with random_order",
            )
        self._order_L = [torch.from_numpy(row.astype(np.int64)) for row in order]
        self._seen: set[int] = set()
        self.checked_count = 0
        self.changed = 0

    def logits(self, router: Router, logits_NE: Tensor) -> Tensor:
        """The layer's logits in their new places."""
        order_E = self._order_L[router.index]
        if order_E.device != logits_NE.device:
            order_E = self._order_L[router.index] = order_E.to(logits_NE.device)
        return logits_NE.index_select(-1, order_E)

    def forces(self, router: Router) -> bool:
        """Never."""
        return False

    def ranks(self, router: Router, choice_NE: Tensor) -> Tensor | None:
        """The model selects."""
        return None

    def wants_check(self, router: Router) -> bool:
        """True on each router's first call."""
        return router.index not in self._seen

    def checked(self, router: Router, before_NK: Tensor, after_NK: Tensor) -> None:
        """Count the selections that became others."""
        self._seen.add(router.index)
        differs = (before_NK.sort(-1).values != after_NK.sort(-1).values).any(-1)
        self.checked_count += differs.numel()
        self.changed += int(differs.sum())


def random_order(routers: Sequence[Router], *, seed: int | Sequence[int]) -> NDArray[np.int64]:
    """A random permutation of every layer's experts, [L, E]; last choices that are no expert stay where they are."""
    rng = np.random.default_rng(seed)
    order_LE = np.tile(np.arange(routers[0].experts, dtype=np.int64), (len(routers), 1))
    for router, row_E in zip(routers, order_LE, strict=True):
        movable = router.experts - router.scoring.skipped
        row_E[:movable] = rng.permutation(movable)
    return order_LE

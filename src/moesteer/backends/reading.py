"""Reading routers in transformers: the logits and selections of chosen positions of a batch."""

from __future__ import annotations

from torch import Tensor

from moesteer.models.routers import Router


class Kept:
    """A Capture that keeps the wanted positions of every router, in router order."""

    def __init__(self, routers: int, positions: Tensor, *, logits: bool) -> None:
        self.positions, self.with_logits = positions, logits
        self.logits_L: list[Tensor | None] = [None] * routers
        self.selected_L: list[Tensor | None] = [None] * routers

    def logits(self, router: Router, logits_NW: Tensor) -> None:
        """Keep the raw logits of the wanted positions, those of shared experts left out."""
        if self.with_logits:
            self.logits_L[router.index] = logits_NW[:, : router.experts].index_select(0, self.positions)

    def selected(self, router: Router, experts_NK: Tensor, weights_NK: Tensor) -> None:
        """Keep the selected experts of the wanted positions."""
        self.selected_L[router.index] = experts_NK.index_select(0, self.positions)

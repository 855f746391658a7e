"""Steering in torch: what a mask does to a router's logits, for one mask or one mask per row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesteer.errors import InputError
from moesteer.mask import SteeringMask
from moesteer.models.routers import Router
from moesteer.routing import FORCE_EPS


@dataclass
class Receipt:
    """What steering did. Positions count padding; a position passes every router once.

    changed of checked: selections (one router, one position) that steering changed, on each router's first call in
    which a mask acts.
    fired of gated: requests on which a gate fired, of those that one decided (one count per request and gated mask).
    acted: whether a mask with an alpha other than 0 was to steer any of it.
    """

    routers: int
    masks: tuple[str, ...]
    alphas: tuple[float, ...]
    positions: int = 0
    checked: int = 0
    changed: int = 0
    gated: int = 0
    fired: int = 0
    acted: bool = False

    @property
    def did_nothing(self) -> bool:
        """Whether a mask was to act (alpha not 0, no gate that stayed shut) and changed no selection."""
        return self.acted and self.changed == 0

    def __str__(self) -> str:
        share = f"{100 * self.changed / self.checked:.1f} %" if self.checked else "none"
        gate = f"; the gate fired on {self.fired} of {self.gated} requests" if self.gated else ""
        return (
            f"{self.routers} routers steered over {self.positions} positions; "
            f"{self.changed} of {self.checked} checked selections changed ({share}){gate}"
        )


class MaskTables:
    """Steering tables, one row per mask, and the arithmetic on them. Row 0 is no steering, row m is mask m - 1.

    bias_LME: [L, M+1, E] in logits; force_LME: the same shape, 1 on, -1 off, 0 free. With one mask every batch
    row is steered by it, unless `set_rows` says otherwise; with several, or behind a gate, rows must be set
    before each forward pass whose batch they describe. The arithmetic is that of routing.steer_logits, in float32.
    """

    def __init__(self, bias_LME: Tensor, force_LME: Tensor, *, receipt: Receipt) -> None:
        self._tables = [bias_ME if bool(bias_ME.any()) else None for bias_ME in bias_LME]
        self._forces = [force_ME if bool(force_ME.any()) else None for force_ME in force_LME]
        self._seen: set[int] = set()
        self._counted: set[int] = set()
        self._acting: set[int] = set()
        self.receipt = receipt
        self._bias: list[Tensor | None] = []
        self._on_off: list[tuple[Tensor, Tensor] | None] = []
        self.set_rows([1] if bias_LME.shape[1] == 2 else None)

    @classmethod
    def of_masks(
        cls, masks: Sequence[SteeringMask], alphas: Sequence[float | None], *, device: torch.device
    ) -> MaskTables:
        """The tables of masks at their strengths. A force has no size: alpha 0 switches it off, any other not."""
        scales = [mask.info.alpha if alpha is None else float(alpha) for mask, alpha in zip(masks, alphas, strict=True)]
        empty = np.zeros(masks[0].values_LE.shape)
        bias: list[NDArray[Any]] = [empty, *(mask.bias_LE(alpha) for mask, alpha in zip(masks, scales, strict=True))]
        force: list[NDArray[Any]] = [empty]
        for mask, alpha in zip(masks, scales, strict=True):
            force.append(empty if mask.force_LE is None or alpha == 0 else mask.force_LE)
        receipt = Receipt(len(empty), tuple(mask.sha256[:12] for mask in masks), tuple(scales))
        return cls(
            torch.tensor(np.stack(bias, axis=1), dtype=torch.float32, device=device),
            torch.tensor(np.stack(force, axis=1), dtype=torch.int8, device=device),
            receipt=receipt,
        )

    @classmethod
    def one_layer(
        cls,
        routers: Sequence[Router],
        target: Router,
        *,
        bias_E: NDArray[np.float32] | None,
        force_E: NDArray[np.int8] | None,
        device: torch.device,
    ) -> MaskTables:
        """Tables that steer one router only: what the self-check uses."""
        bias = torch.zeros((len(routers), 2, target.experts), device=device)
        force = torch.zeros((len(routers), 2, target.experts), dtype=torch.int8, device=device)
        if bias_E is not None:
            bias[target.index, 1] = torch.from_numpy(bias_E)
        if force_E is not None:
            force[target.index, 1] = torch.from_numpy(force_E)
        return cls(bias, force, receipt=Receipt(len(routers), ("check",), (1.0,)))

    def set_rows(self, rows: Sequence[int | Sequence[int]] | None) -> None:
        """Which masks steer each batch row of the coming passes: 0 or () none, m the m-th, (1, 3) both together.

        Biases of masks that act together add up; so do their forces, which must not contradict each other.
        Fewer rows than the batch has are spread evenly (beams, several returns), so [1] steers all of it.
        """
        self._bias, self._on_off, self._acting = [], [], set()
        if rows is None:
            return
        self._acting = {m for row in rows for m in ((row,) if isinstance(row, int) else row) if m}
        for table, force in zip(self._tables, self._forces, strict=True):
            self._bias.append(None if table is None else _rows_of(table, rows))
            picked = None if force is None else _rows_of(force, rows)
            self._on_off.append(None if picked is None else (picked > 0, picked < 0))

    @contextmanager
    def rows(self, rows: Sequence[int | Sequence[int]] | None) -> Iterator[None]:
        """`set_rows` inside the block (None: as it is); then as before: rows of one batch say nothing of the next."""
        if rows is None:
            yield
            return
        before = self._bias, self._on_off, self._acting
        try:
            self.set_rows(rows)
            yield
        finally:
            self._bias, self._on_off, self._acting = before

    def _follow(self, index: int, device: torch.device) -> None:
        """Move one router's tables to where its layer lives, once: layers of one model may be on several devices."""
        moved = [table if table is None else table.to(device) for table in (self._tables[index], self._forces[index])]
        self._tables[index], self._forces[index] = moved
        bias, on_off = self._bias[index], self._on_off[index]
        self._bias[index] = None if bias is None else bias.to(device)
        self._on_off[index] = None if on_off is None else (on_off[0].to(device), on_off[1].to(device))

    def _spread(self, table_RE: Tensor, positions: int) -> Tensor:
        """[R, E] -> something that broadcasts over [positions, E], positions being row-major in the batch."""
        rows = table_RE.shape[0]
        if rows == 1:
            return table_RE
        if positions % rows:
            raise InputError(
                f"a batch of {positions} positions cannot hold {rows} rows",
                where="steering with one mask per row",
                expected="every row of the batch of the same padded length",
                do="set the rows of this batch, and run it with generation that keeps rows apart",
            )
        each = positions // rows
        return table_RE if each == 1 else table_RE[:, None, :].expand(-1, each, -1).reshape(positions, -1)

    def logits(self, router: Router, logits_NE: Tensor) -> Tensor:
        """Steered logits, same shape and dtype (see routing.steer_logits)."""
        if not self._bias:
            raise InputError(
                "nothing says which row of the batch takes which mask",
                where="steering with one mask per row, or with a gate that decides by request",
                expected="rows given with the batch, or whole requests for the gate to decide",
                do="call model.generate(..., rows=[...]), apply one mask at a time, or take the gate off (with_gate)",
            )
        positions = logits_NE.shape[0]
        if router.index == 0:
            self.receipt.positions += positions
        bias, on_off = self._bias[router.index], self._on_off[router.index]
        if bias is None and on_off is None:
            return logits_NE
        here = bias.device if bias is not None else on_off[0].device if on_off is not None else logits_NE.device
        if here != logits_NE.device:
            self._follow(router.index, logits_NE.device)
            bias, on_off = self._bias[router.index], self._on_off[router.index]
        steered = logits_NE.float()
        if bias is not None:
            steered = steered + self._spread(bias, positions)
        if on_off is not None:
            on, off = (self._spread(table, positions).expand_as(steered) for table in on_off)
            highest, lowest = steered.amax(-1, keepdim=True), steered.amin(-1, keepdim=True)
            order = torch.where(on, steered, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1).float()
            raised = highest + FORCE_EPS * (1 + order / on.sum(-1, keepdim=True).clamp(min=1))
            steered = torch.where(on, raised, torch.where(off, lowest - FORCE_EPS, steered))
        return steered.to(logits_NE.dtype)

    def forces(self, router: Router) -> bool:
        """Whether a mask that steers this batch switches experts of this router."""
        return self._forces[router.index] is not None

    def ranks(self, router: Router, choice_NE: Tensor) -> Tensor | None:
        """Forced-on above all, forced-off below all, in the router's final top-k."""
        on_off = self._on_off[router.index]
        if on_off is None:
            return None
        on, off = (self._spread(table, choice_NE.shape[0]).expand_as(choice_NE) for table in on_off)
        return choice_NE.float().masked_fill(on, torch.inf).masked_fill(off, -torch.inf)

    @property
    def unasked(self) -> int:
        """Routers that have not run yet while this was applied."""
        return self.receipt.routers - len(self._seen)

    def wants_check(self, router: Router) -> bool:
        """True on each router's first call, and on the first in which a mask acts."""
        return router.index not in (self._counted if self._acting else self._seen)

    def checked(self, router: Router, before_NK: Tensor, after_NK: Tensor) -> None:
        """Count the selections that steering changed, in a call in which a mask acts."""
        self._seen.add(router.index)
        if not self._acting:
            return
        self._counted.add(router.index)
        self.receipt.acted |= any(alpha != 0 for m, alpha in enumerate(self.receipt.alphas, 1) if m in self._acting)
        differs = (before_NK.sort(-1).values != after_NK.sort(-1).values).any(-1)
        self.receipt.checked += differs.numel()
        self.receipt.changed += int(differs.sum())


def _rows_of(table_ME: Tensor, rows: Sequence[int | Sequence[int]]) -> Tensor:
    sets = [(row,) if isinstance(row, int) else tuple(row) or (0,) for row in rows]
    if all(len(acting) == 1 for acting in sets):
        return table_ME.index_select(0, torch.tensor([acting[0] for acting in sets], device=table_ME.device))
    summed = torch.stack([table_ME[list(acting)].sum(0) for acting in sets])
    return summed if table_ME.is_floating_point() else summed.clamp(-1, 1).to(table_ME.dtype)


class BiasSteering:
    """A bias of the caller's own, [L, E] in logits, which may require gradient: steering being learnt."""

    def __init__(self, bias_LE: Tensor) -> None:
        self.bias_LE = bias_LE

    def logits(self, router: Router, logits_NE: Tensor) -> Tensor:
        """logits + bias of the router's layer."""
        return (logits_NE.float() + self.bias_LE[router.index].to(logits_NE.device)).to(logits_NE.dtype)

    def forces(self, router: Router) -> bool:
        """Never."""
        return False

    def ranks(self, router: Router, choice_NE: Tensor) -> Tensor | None:
        """The model selects."""
        return None

    def wants_check(self, router: Router) -> bool:
        """Never: nothing is claimed of a bias that is still being learnt."""
        return False

    def checked(self, router: Router, before_NK: Tensor, after_NK: Tensor) -> None:
        """Not called."""

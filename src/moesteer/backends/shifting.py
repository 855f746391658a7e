"""Adding directions to the residual stream: one, or one per row of a batch, each after its decoder layer.

The decoder layers' own forward methods run, followed by an addition, until the end of the block. This is the
baseline that router steering is held against; residual.py finds the directions and names the papers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesteer.backends.chat import Generation
from moesteer.backends.hf import Model
from moesteer.backends.layers import decoder_layers
from moesteer.backends.residual import after_layers, hidden_of, never_ran, no_layer
from moesteer.conversations import Message
from moesteer.direction import Direction
from moesteer.errors import InputError, MaskMismatchError, NoEffectError


@dataclass(frozen=True)
class ShiftReceipt:
    """What adding did. calls: of the hooked layers; positions: asked to change (padding counts); changed: that did."""

    layer_ids: tuple[int, ...]
    directions: tuple[str, ...]
    alphas: tuple[float, ...]
    calls: int
    positions: int
    changed: int


class Shifted:
    """A model with directions added, inside `with shifted(...)`. Row 0 is no direction, row m the m-th."""

    def __init__(self, model: Model, directions: Sequence[Direction], alphas: Sequence[float]) -> None:
        self.model, self.directions, self.alphas = model, tuple(directions), tuple(alphas)
        self._calls = dict.fromkeys((d.layer_id for d in directions), 0)
        self._asked = [0] * (len(directions) + 1)
        self._rows: list[int] | None = [1] if len(directions) == 1 else None
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def receipt(self) -> ShiftReceipt:
        """Counts up to now."""
        changed = sum(int(changed_M.sum()) for _, _, changed_M in self._tables.values())
        return ShiftReceipt(
            tuple(self._calls), tuple(d.sha256[:12] for d in self.directions), self.alphas,
            sum(self._calls.values()), sum(self._asked), changed,
        )  # fmt: skip

    def set_rows(self, rows: Sequence[int]) -> None:
        """Which direction each batch row of the coming passes gets: 0 none, m the m-th.

        Fewer rows than the batch has are spread evenly (beams, several returns), so [1] moves all of it.
        """
        if not rows or not all(0 <= row <= len(self.directions) for row in rows):
            raise InputError(
                f"rows {sorted(set(rows))} name directions that there are not",
                where=f"{len(self.directions)} directions",
                expected=f"numbers from 0 (none) to {len(self.directions)}, one for each row of the batch",
                do="correct the rows",
            )
        self._rows = list(rows)

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 128,
        rows: Sequence[int] | None = None,
        title: str | None = None,
    ) -> list[Generation]:
        """Model.generate with directions added: conversations of one direction are generated together.

        rows: which direction moves which conversation (0 none, m the m-th); not needed where there is one.
        """
        if rows is None and len(self.directions) > 1:
            raise _no_rows()
        rows = [1] * len(conversations) if rows is None else list(rows)
        if len(rows) != len(conversations):
            raise InputError(
                f"{len(rows)} rows for {len(conversations)} conversations",
                where="generation with one direction per conversation",
                expected="one row for each conversation",
                do="correct the rows",
            )
        before, calls, done = self._rows, dict(self._calls), dict[int, Generation]()
        try:
            for number in sorted(set(rows)):
                mine = [i for i, row in enumerate(rows) if row == number]
                self.set_rows([number])
                made = self.model.generate(
                    [conversations[i] for i in mine], max_new_tokens=max_new_tokens, title=title
                )  # fmt: skip
                done |= dict(zip(mine, made, strict=True))
        finally:
            self._rows = before
        if conversations:
            self.require_effect(since=calls)
        return [done[i] for i in range(len(conversations))]

    def require_effect(self, *, since: Mapping[int, int] | None = None) -> None:
        """Raise NoEffectError for a layer that never ran, and for a direction that was to move and moved nothing.

        since: counts of calls by layer, beyond which it must have run.
        """
        unseen = [layer_id for layer_id, calls in self._calls.items() if calls == (since or {}).get(layer_id, 0)]
        if unseen:
            raise never_ran(unseen, where=self.model.name)
        for number, direction in enumerate(self.directions, 1):
            if self._asked[number] and not int(self._tables[direction.layer_id][2][number]):
                raise NoEffectError(
                    f"the direction of layer {direction.layer_id} changed none of {self._asked[number]} positions",
                    where=f"alpha {self.alphas[number - 1]:g}, scale {direction.scale:g}, {self.model.name}",
                    expected="a shift that the model's dtype does not round away",
                    do="give a larger alpha, or load the model in float32",
                )

    def after(self, layer_id: int, output: Any) -> Any:
        """A layer's output with the directions of that layer added; None to leave it as it is."""
        self._calls[layer_id] += 1
        hidden = hidden_of(output, where=f"{self.model.name}, layer {layer_id}")
        if self._rows is None:
            raise _no_rows()
        if not any(self._moves(row, layer_id) for row in self._rows):
            return None
        moved = self._moved(layer_id, hidden, self._rows)
        return moved if hidden is output else type(output)((moved, *output[1:]))

    def _moved(self, layer_id: int, hidden: Tensor, rows: list[int]) -> Tensor:
        batch, positions = hidden.shape[:2]
        if batch % len(rows):
            raise InputError(
                f"a batch of {batch} rows cannot be spread over {len(rows)}",
                where=f"{self.model.name}, layer {layer_id}",
                expected="as many rows as the batch has, or a divisor of that",
                do="set the rows of this batch (set_rows)",
            )
        shift_MH, lives_M, changed_M = self._table(layer_id, hidden)
        each = batch // len(rows)
        for row in rows:
            self._asked[row] += each * positions if self._moves(row, layer_id) else 0
        rows_R = torch.tensor(rows, device=hidden.device)
        hidden_RB = hidden.reshape(len(rows), each, *hidden.shape[1:])
        shift_R = shift_MH[rows_R].reshape(len(rows), 1, 1, *hidden.shape[2:])
        lives_R = lives_M[rows_R].reshape(len(rows), *[1] * hidden.ndim)
        added = (hidden_RB + shift_R).to(hidden.dtype)  # one float32 sum, rounded once
        moved = torch.where(lives_R, added, hidden_RB)  # other rows stay bitwise: minus zero plus zero is zero
        with torch.no_grad():
            changed_M.index_add_(0, rows_R, (moved != hidden_RB).flatten(3).any(-1).sum((1, 2)))
        return moved.flatten(0, 1)

    def _moves(self, row: int, layer_id: int) -> bool:
        return row > 0 and self.directions[row - 1].layer_id == layer_id and self.alphas[row - 1] != 0

    def _table(self, layer_id: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the layer lives, made once: shifts [M+1, H], which of them it adds [M+1], counts of changes [M+1]."""
        if layer_id not in self._tables:
            size = hidden[0, 0].numel()
            shift_MH = np.zeros((len(self.directions) + 1, size), dtype=np.float32)
            lives_M = [self._moves(row, layer_id) for row in range(len(shift_MH))]
            for row in np.flatnonzero(lives_M):
                shift_MH[row] = _fitting(self.directions[row - 1], size).shift_H(self.alphas[row - 1])
            with torch.inference_mode(False):  # a table made in inference mode could not be counted in outside it
                self._tables[layer_id] = (
                    torch.from_numpy(shift_MH).to(hidden.device),
                    torch.tensor(lives_M, device=hidden.device),
                    torch.zeros(len(shift_MH), dtype=torch.long, device=hidden.device),
                )
        return self._tables[layer_id]


@contextmanager
def shifted(
    model: Model,
    directions: Sequence[Direction],
    *,
    alphas: Sequence[float | None] | None = None,
    rows: Sequence[int] | None = None,
    allow_other_checkpoint: bool = False,
) -> Iterator[Shifted]:
    """Add directions inside the block, each after its decoder layer and at every position: alpha * scale * vector.

    alphas: strengths (default: each direction's own). rows: which direction moves which batch row (Shifted.set_rows;
    `generate` of what is yielded sets them itself). One direction moves every row unless told otherwise. Masks may
    steer the model at the same time. On exit the model is itself again, bit for bit. Raises MaskMismatchError,
    InputError; NoEffectError at the end of the block when a layer never ran or a direction changed nothing.
    """
    strengths = _strengths(directions, alphas)
    layers = decoder_layers(model)
    for direction in directions:
        direction.check_model(model.fingerprint, allow_other_checkpoint=allow_other_checkpoint)
        if direction.layer_id not in layers:
            raise no_layer(direction.layer_id, model, len(layers))
    moved = Shifted(model, directions, strengths)
    if rows is not None:
        moved.set_rows(rows)
    model.shifts += 1
    try:
        with after_layers({d.layer_id: layers[d.layer_id] for d in directions}, moved.after):
            yield moved
    finally:
        model.shifts -= 1
    moved.require_effect()


def _strengths(directions: Sequence[Direction], alphas: Sequence[float | None] | None) -> list[float]:
    given = [None] * len(directions) if alphas is None else list(alphas)
    if not directions or len(given) != len(directions):
        raise InputError(
            f"{len(given)} alphas for {len(directions)} directions",
            where="shifting the residual stream",
            expected="at least one direction, and one alpha for each",
            do="correct the call",
        )
    found = [d.info.alpha if alpha is None else float(alpha) for d, alpha in zip(directions, given, strict=True)]
    if not np.isfinite(found).all():
        raise InputError(
            f"alphas {found} are not all numbers",
            where="shifting the residual stream",
            expected="finite strengths",
            do="correct the call",
        )
    return found


def _fitting(direction: Direction, size: int) -> Direction:
    if len(direction.vector_H) != size:
        raise MaskMismatchError(
            f"the direction has {len(direction.vector_H)} numbers and the residual stream {size}",
            where=f"layer {direction.layer_id}",
            expected="a direction found on this model",
            do="find a new direction",
        )
    return direction


def _no_rows() -> InputError:
    return InputError(
        "several directions are applied, and nothing says which row of the batch takes which",
        where="one direction per row",
        expected="rows given with the batch",
        do="call generate(..., rows=[...]) on what `shifted` yields, or set_rows",
    )

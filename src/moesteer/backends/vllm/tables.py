"""The operator inside the engine: steering tables on static storage, one row number per token.

Axes: R rows of the catalogue, L the MoE layers of this worker, E experts, N tokens of a step, T the most tokens of a
step, G parts of gates, K selected experts. Everything is allocated once and never moves, so that a captured CUDA graph
finds it; no Python runs per token. `moesteer::steer` is opaque to torch.compile, which therefore cannot bake a table,
a row or their absence into its graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesteer.errors import ModelError
from moesteer.models.routers import Router
from moesteer.models.selecting import select, steer_logits
from moesteer.routing import Scoring


@dataclass
class Selecting:
    """How a layer's router selects, where a forced selection has to be made beside it (see `Tables.selected`)."""

    scoring: Scoring
    correction_E: Tensor | None
    scale_E: Tensor | None


class Tables:
    """One worker's tables, and what its routers did.

    layer_ids: decoder layers here, in order. row_T: row of every token of the step. beats_L: how often each layer's
    operator ran. score_TG: each token's share of every gate part's score, unsteered, summed over the layers here.
    logits_TLE, selected_TLK: of the last step, where captured (raw logits, before steering).
    wrong_L, forced_L: forced (token, expert) pairs that a router did not follow, and how many there were.
    changed_L of checked_L: selections of steered tokens that steering changed, where they are counted.
    """

    def __init__(
        self,
        layer_ids: tuple[int, ...],
        bias_RLE: NDArray[np.float32],
        force_RLE: NDArray[np.int8],
        gate_LEG: NDArray[np.float32],
        *,
        tokens: int,
        top_k: int,
        capture: str | None,
        count: bool,
        device: torch.device,
    ) -> None:
        self.layer_ids, self.device, self.experts, self.top_k = layer_ids, device, bias_RLE.shape[-1], top_k
        self.place = {layer_id: index for index, layer_id in enumerate(layer_ids)}
        self.bias: list[Tensor | None] = []
        self.force: list[Tensor | None] = []
        for at in range(len(layer_ids)):
            bias, force = bias_RLE[:, at], force_RLE[:, at]
            self.bias.append(torch.tensor(bias, device=device) if bias.any() else None)
            self.force.append(torch.tensor(force, device=device) if force.any() else None)
        self.gate: list[Tensor] | None = None
        parts = gate_LEG.shape[-1]
        if parts:
            self.gate = [torch.tensor(gate_EG, device=device).contiguous() for gate_EG in gate_LEG]
        self.row_T = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.beats_L = torch.zeros(len(layer_ids), dtype=torch.int64, device=device)
        on_gpu = self.beats_L.device.type != "cpu"  # there a graph replays the kernel that counts
        self._beats = list(self.beats_L.unbind()) if on_gpu else None
        self._beats_here = None if on_gpu else self.beats_L.numpy()
        self._rows_now = self.row_T[:0]
        self.score_TG = torch.zeros((tokens, parts), dtype=torch.float32, device=device)
        self.wrong_L = torch.zeros(len(layer_ids), dtype=torch.int64, device=device)
        self.forced_L = torch.zeros(len(layer_ids), dtype=torch.int64, device=device)
        shape = (tokens, len(layer_ids))
        self.logits_TLE: Tensor | None = None
        self.selected_TLK: Tensor | None = None
        if capture == "logits":
            self.logits_TLE = torch.zeros((*shape, self.experts), dtype=torch.float32, device=device)
        if capture is not None:
            self.selected_TLK = torch.zeros((*shape, top_k), dtype=torch.int32, device=device)
        self.raw_TLE = torch.zeros((*shape, self.experts), dtype=torch.float32, device=device) if count else None
        self.checked_L = torch.zeros(len(layer_ids), dtype=torch.int64, device=device)
        self.changed_L = torch.zeros(len(layer_ids), dtype=torch.int64, device=device)
        self._filled = 0
        self.uniform: int | None = 0
        """The row of all tokens of this step, where they share one; looked at on a CPU only: no graph is replayed."""
        self.selecting: dict[int, Selecting] = {}
        self.outside: dict[int, Selecting] = {}
        """Layers that select outside of vLLM, so that what they would have selected unsteered is worked out here."""

    @property
    def forces(self) -> bool:
        """Whether any row switches experts."""
        return any(force is not None for force in self.force)

    def set_rows(self, rows_N: NDArray[np.int32], staging: Tensor) -> None:
        """Write the rows of a step's tokens. staging: a host buffer [T] that no earlier copy still reads."""
        count = len(rows_N)
        self.uniform = int(rows_N[0]) if count and bool((rows_N == rows_N[0]).all()) else None
        staging[:count] = torch.from_numpy(rows_N)
        if count < self._filled:  # a step may be padded beyond its tokens: no token, no row
            self.row_T[count : self._filled].zero_()
        self._filled = count
        if staging is not self.row_T:
            self.row_T[:count].copy_(staging[:count], non_blocking=True)

    def clear_rows(self) -> None:
        """No token is steered: warm-up, profiling, graph capture."""
        self.row_T.zero_()
        self._filled, self.uniform = 0, 0

    def content(self) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """(bias [R, L, E], force [R, L, E]) as they are on the device now."""
        rows = next((len(table) for table in (*self.bias, *self.force) if table is not None), 1)
        shape = (rows, len(self.layer_ids), self.experts)
        bias, force = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int8)
        for at, (added, switched) in enumerate(zip(self.bias, self.force, strict=True)):
            if added is not None:
                bias[:, at] = added.cpu().numpy()
            if switched is not None:
                force[:, at] = switched.cpu().numpy()
        return bias, force

    def steer(self, logits_NW: Tensor, layer_id: int) -> Tensor:
        """The steered logits of one layer, a new tensor of the same shape and dtype."""
        at = self.place[layer_id]
        if self._beats_here is not None:
            self._beats_here[at] += 1
        elif self._beats is not None:
            self._beats[at].add_(1)
        count, width = logits_NW.shape
        logits_NE = logits_NW if width == self.experts else logits_NW[:, : self.experts]
        if self.gate is not None:
            scores = self.score_TG[:count]
            if at == 0:
                torch.mm(logits_NE.float(), self.gate[0], out=scores)
            else:
                scores.addmm_(logits_NE.float(), self.gate[at])
        if self.logits_TLE is not None:
            self.logits_TLE[:count, at].copy_(logits_NE)
        if self.raw_TLE is not None:
            self.raw_TLE[:count, at].copy_(logits_NE)
        steered = self._steered(logits_NE, at, count)
        if width == self.experts:
            return steered
        return torch.cat([steered, logits_NW[:, self.experts :]], dim=-1)

    def _steered(self, logits_NE: Tensor, at: int, count: int) -> Tensor:
        bias, force = self.bias[at], self.force[at]
        if bias is None and force is None:
            return logits_NE.clone()
        if self.uniform is not None and self.device.type == "cpu":
            row = self.uniform
            if force is None or not bool(force[row].any()):
                return logits_NE.clone() if bias is None or row == 0 else _add(logits_NE, bias[row])
        rows = self._rows(count)
        if force is None:
            assert bias is not None
            return bias.index_select(0, rows).add_(logits_NE).to(logits_NE.dtype)
        bias_NE = torch.zeros((), device=self.device) if bias is None else bias.index_select(0, rows)
        return steer_logits(
            logits_NE.float(), bias_NE.expand(count, self.experts), force.index_select(0, rows),
            rounded_to=logits_NE.dtype, most_on=self.top_k,
        ).to(logits_NE.dtype)  # fmt: skip

    def _rows(self, count: int) -> Tensor:
        """row_T[:count], the same view in every layer of a step."""
        if len(self._rows_now) != count:
            self._rows_now = self.row_T[:count]
        return self._rows_now

    def raw(self, logits_NW: Tensor, layer_id: int) -> Tensor:
        """The logits of the same tokens before steering, in the shape and dtype given."""
        assert self.raw_TLE is not None
        found = logits_NW.clone()
        found[:, : self.experts] = self.raw_TLE[: len(found), self.place[layer_id]]
        return found

    def compared(self, before_NK: Tensor, after_NK: Tensor, layer_id: int) -> Tensor:
        """Count the steered tokens whose selection is another than without; gives `after_NK` back, as a new tensor."""
        self._compare(before_NK, after_NK, self.place[layer_id])
        return after_NK.clone()

    def _compare(self, before_NK: Tensor, after_NK: Tensor, at: int) -> None:
        steered_N = self.row_T[: len(after_NK)] > 0
        differs_N = (before_NK.sort(-1).values != after_NK.sort(-1).values).any(-1)
        self.checked_L[at].add_(steered_N.sum())
        self.changed_L[at].add_((differs_N & steered_N).sum())

    def selected(
        self, weights_NK: Tensor, experts_NK: Tensor, logits_NE: Tensor, layer_id: int
    ) -> tuple[Tensor, Tensor]:
        """What a router selected; forced tokens put right where logits cannot do it alone; captured and counted."""
        at = self.place[layer_id]
        count = experts_NK.shape[0]
        weights_NK, experts_NK = weights_NK.clone(), experts_NK.clone()
        force = self.force[at]
        if force is not None:
            force_NE = force.index_select(0, self._rows(count))
            if (how := self.selecting.get(layer_id)) is not None:
                weights, experts = select(
                    logits_NE[:, : self.experts], how.scoring, correction_E=how.correction_E, scale_E=how.scale_E,
                    force_NE=force_NE,
                )  # fmt: skip
                switched_N1 = (force_NE != 0).any(-1, keepdim=True)
                weights_NK = torch.where(switched_N1, weights.to(weights_NK.dtype), weights_NK)
                experts_NK = torch.where(switched_N1, experts.to(experts_NK.dtype), experts_NK)
            picked_NK = force_NE.gather(1, experts_NK.long())
            on_N = (force_NE > 0).sum(-1)
            self.forced_L[at].add_((force_NE != 0).sum())
            wrong_N = (picked_NK < 0).sum(-1) + on_N - (picked_NK > 0).sum(-1)
            self.wrong_L[at].add_((wrong_N * torch.isfinite(logits_NE).all(-1)).sum())  # of NaN no one can choose
        if self.raw_TLE is not None and (how := self.outside.get(layer_id)) is not None:
            raw_NE = self.raw_TLE[:count, at]
            _, before_NK = select(raw_NE, how.scoring, correction_E=how.correction_E, scale_E=how.scale_E)
            self._compare(before_NK, experts_NK, at)
        if self.selected_TLK is not None:
            order = weights_NK.float().argsort(dim=-1, descending=True, stable=True)
            self.selected_TLK[:count, at].copy_(experts_NK.gather(1, order))
        return weights_NK, experts_NK


def logits_decide(router: Router) -> bool:
    """Whether steered logits alone force this router's selection: nothing but the logits has a part in the choice."""
    scoring = router.scoring
    if scoring.kind == "sparsemixer":  # it takes the largest logits themselves, whatever their dtype
        return True
    return router.correction is None and scoring.groups == 1 and not scoring.softcap and not scoring.low_precision


def selecting(router: Router, device: torch.device, *, output_scale: float) -> Selecting:
    """How to force a router's selection beside it. output_scale: the part of its scale that vLLM puts on the output."""
    vectors = router.vectors()

    def vector(name: str) -> Tensor | None:
        return torch.tensor(np.array(vectors[name]), device=device) if name in vectors else None

    scoring = replace(router.scoring, scale=router.scoring.scale / output_scale)
    return Selecting(scoring, vector("correction_E"), vector("scale_E"))


def _add(logits_NE: Tensor, bias_E: Tensor) -> Tensor:
    if logits_NE.dtype == torch.float32:
        return logits_NE + bias_E
    return (logits_NE.float() + bias_E).to(logits_NE.dtype)


_running: Tables | None = None


def run_with(tables: Tables | None) -> None:
    """The tables that the next forward pass of this process uses: those of the model that runs it."""
    global _running
    _running = tables


def _now(layer_id: int) -> Tables:
    if _running is None or layer_id not in _running.place:
        raise ModelError(
            "a router ran that belongs to no steered model",
            where=f"layer {layer_id}",
            expected="forward passes of the model whose routers were counted at the start",
            do="report this, with the model and vLLM's version; the request failed rather than go unsteered",
        )
    return _running


def _steer(logits_NW: Tensor, layer_id: int) -> Tensor:
    return _now(layer_id).steer(logits_NW, layer_id)


def _selected(weights_NK: Tensor, experts_NK: Tensor, logits_NE: Tensor, layer_id: int) -> tuple[Tensor, Tensor]:
    return _now(layer_id).selected(weights_NK, experts_NK, logits_NE, layer_id)


def _raw(logits_NW: Tensor, layer_id: int) -> Tensor:
    return _now(layer_id).raw(logits_NW, layer_id)


def _compared(before_NK: Tensor, after_NK: Tensor, layer_id: int) -> Tensor:
    return _now(layer_id).compared(before_NK, after_NK, layer_id)


def _like_second(before_NK: Tensor, after_NK: Tensor, layer_id: int) -> Tensor:
    return torch.empty_like(after_NK)


def _same_shape(logits_NW: Tensor, layer_id: int) -> Tensor:
    return torch.empty_like(logits_NW)


def _same_shapes(weights_NK: Tensor, experts_NK: Tensor, logits_NE: Tensor, layer_id: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights_NK), torch.empty_like(experts_NK)


# the low-level way: torch.library.custom_op adds some ten microseconds a call
_LIBRARY: Any = torch.library.Library("moesteer", "FRAGMENT")  # type: ignore[no-untyped-call]
for _signature, _body, _shape in (
    ("steer(Tensor logits, int layer_id) -> Tensor", _steer, _same_shape),
    ("raw(Tensor logits, int layer_id) -> Tensor", _raw, _same_shape),
    ("compared(Tensor before, Tensor after, int layer_id) -> Tensor", _compared, _like_second),
    (
        "selected(Tensor weights, Tensor experts, Tensor logits, int layer_id) -> (Tensor, Tensor)",
        _selected,
        _same_shapes,
    ),
):
    _name = _signature.partition("(")[0]
    _LIBRARY.define(_signature)
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moesteer::{_name}", _shape, lib=_LIBRARY)

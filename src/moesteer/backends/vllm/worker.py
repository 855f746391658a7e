"""Inside a worker of vLLM: finding and counting the routers, filling the rows, reading what was asked for.

One `Steered` belongs to one model runner. Its methods stand beside the runner's own, in the order vLLM calls them:
attach (after load_model), begins and ran (around execute_model), prepared (in _prepare_inputs), idle (in _dummy_run).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from moesteer import files, gate
from moesteer.backends.vllm.catalogue import Catalogue
from moesteer.backends.vllm.requests import READ, row_of
from moesteer.backends.vllm.routers import Found, LayerRouter, find_layers, require_same_selection
from moesteer.backends.vllm.settings import Settings
from moesteer.backends.vllm.tables import Tables, logits_decide, run_with, selecting
from moesteer.errors import NoEffectError, SelfCheckError
from moesteer.models.limits import require_possible
from moesteer.models.routers import Router
from moesteer.routing import steer_logits
from moesteer.version import __version__

MOST_READINGS = 4096
"""Readings kept for the front end to fetch; older ones are dropped, and asking for them is an error."""


@dataclass
class Read:
    """What was read of one request so far. next: the position that must come next."""

    prompt: int
    spans: tuple[tuple[int, int], ...]
    parts: tuple[tuple[int, int], ...]
    sums_G: torch.Tensor
    next: int = 0
    broken: str = ""
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    selected: list[NDArray[np.int32]] = field(default_factory=list)


class Steered:
    """The steering of one model runner (V1)."""

    def __init__(self, runner: Any, settings: Settings, catalogue: Catalogue) -> None:
        self.runner, self.settings, self.catalogue = runner, settings, catalogue
        self.tables: Tables | None = None
        self.layers: tuple[LayerRouter, ...] = ()
        self.reads: dict[str, Read] = {}
        self._readings: dict[str, str] = {}
        self._rows: dict[str, int] = {}
        self._pending: list[tuple[Read, int, int, int]] = []
        self._staging = torch.zeros(0)
        self.steps = 0
        self._proven = False

    # ---- at the start

    def attach(self) -> None:
        """Find the routers of the loaded model, count them, and put the tables beside them.

        Raises MaskMismatchError for another checkpoint, SelfCheckError for a wrong count or a wrong operator,
        MaskContentError for a force that the routers cannot follow.
        """
        runner = self.runner
        found = find_layers(runner.model, runner.vllm_config)
        self.layers = found.here
        for member in self.catalogue.members:
            member.mask.check_model(found.fingerprint, allow_other_checkpoint=self.settings.allow_other_checkpoint)
            require_possible(member.mask, found.routers)
        at = [found.fingerprint.layer_ids.index(layer.layer_id) for layer in found.here]
        self.tables = self._make_tables(found, at)
        on_gpu = runner.device.type != "cpu"
        self._staging = (
            torch.zeros(runner.max_num_tokens, dtype=torch.int32, pin_memory=True) if on_gpu else self.tables.row_T
        )
        self._expected = self._content_sha256()
        for layer, place in zip(found.here, at, strict=True):
            self._patch(layer, found.routers[place])
        self._check_operator()
        run_with(self.tables)

    def _make_tables(self, found: Found, at: list[int]) -> Tables:
        """at: places of this worker's layers in the fingerprint."""
        bias_RLE, force_RLE = self._content(at, experts=found.fingerprint.experts)
        return Tables(
            tuple(layer.layer_id for layer in found.here), bias_RLE, force_RLE, self._gates(at),
            tokens=self.runner.max_num_tokens, top_k=found.fingerprint.top_k, capture=self.settings.capture,
            count=self.settings.count, device=self.runner.device,
        )  # fmt: skip

    def _content(self, at: list[int], *, experts: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """(bias [R, L here, E], force [R, L here, E]) as the masks have them."""
        if self.catalogue.members:
            bias_RLE, force_RLE = self.catalogue.tables()
            return bias_RLE[:, at], force_RLE[:, at]
        shape = (1, len(at), experts or (self.tables.experts if self.tables is not None else 0))
        return np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int8)

    def _places(self) -> list[int]:
        """Of this worker's layers among the masks' rows."""
        known = self.catalogue.fingerprint
        return [n if known is None else known.layer_ids.index(layer.layer_id) for n, layer in enumerate(self.layers)]

    def _patch(self, layer: LayerRouter, router: Router) -> None:
        """Tap one layer. Raises SelfCheckError where its selection has to be made beside it, and cannot."""
        assert self.tables is not None
        tables, count = self.tables, self.settings.count
        forced = tables.force[tables.place[layer.layer_id]] is not None
        if forced and not logits_decide(router):
            how = selecting(router, tables.device, output_scale=float(layer.runner.routed_scaling_factor))
            if layer.linear is not None or layer.runner.is_monolithic:
                raise SelfCheckError(
                    "the experts are selected where the logits are not seen, and these alone cannot force this router",
                    where=f"layer {layer.layer_id} ({layer.path}): {router.scoring.describe()}",
                    expected="a kernel that takes the selection (modular), for forced masks on such routers",
                    do="choose another --moe-backend (triton), or use an additive mask",
                )
            require_same_selection(layer, how, experts=tables.experts, device=tables.device)
            tables.selecting[layer.layer_id] = how
        if count and layer.linear is not None:
            tables.outside[layer.layer_id] = selecting(router, tables.device, output_scale=1.0)
        layer.patch(watch=self.settings.capture is not None or tables.forces or count, count=count)

    def _gates(self, at: list[int]) -> NDArray[np.float32]:
        """[L here, E, G]: the weights of every part of every gate, in the catalogue's order."""
        columns = [table_LE[at] for _, _, table_LE in self.catalogue.gate_parts()]
        experts = self.catalogue.fingerprint.experts if self.catalogue.fingerprint is not None else 0
        return np.stack(columns, axis=-1) if columns else np.zeros((len(at), experts, 0), dtype=np.float32)

    def _check_operator(self) -> None:
        """Every layer's operator against routing.steer_logits and the masks, on random logits and every row."""
        assert self.tables is not None
        tables, rng = self.tables, np.random.default_rng(0)
        bias_RLE, force_RLE = self._content(self._places())
        rows = np.resize(np.arange(len(bias_RLE), dtype=np.int32), min(len(bias_RLE) + 3, len(tables.row_T)))
        tables.set_rows(rows, self._staging)
        logits = rng.normal(size=(len(rows), tables.experts)).astype(np.float32)
        for place, layer in enumerate(self.layers):
            want = steer_logits(logits, bias_TE=bias_RLE[rows, place], force_TE=force_RLE[rows, place])
            got = tables.steer(torch.tensor(logits, device=tables.device), layer.layer_id).cpu().numpy()
            if not np.allclose(got, want, rtol=1e-5, atol=1e-5):
                raise SelfCheckError(
                    "the steering operator does not do what routing.py says",
                    where=f"layer {layer.layer_id}, by up to {np.abs(got - want).max():g}",
                    expected="the same steered logits",
                    do="report this, with the versions that `moesteer doctor` prints",
                )
        self._check_scores(len(rows))
        tables.clear_rows()
        tables.beats_L.zero_()

    def _check_scores(self, count: int) -> None:
        """The gates' scores, of the same logits in every layer, against the masks' gates."""
        assert self.tables is not None
        tables = self.tables
        if tables.gate is None or not self.layers:
            return
        logits = np.random.default_rng(1).normal(size=(count, tables.experts)).astype(np.float32)
        for layer in self.layers:
            tables.steer(torch.tensor(logits, device=tables.device), layer.layer_id)
        want = logits @ self._gates(self._places()).sum(axis=0)
        got = tables.score_TG[:count].cpu().numpy()
        if not np.allclose(got, want, rtol=1e-2, atol=1e-2 * max(1.0, float(np.abs(want).max()))):
            raise SelfCheckError(
                "the gates' scores are not what gate.py says",
                where=f"{len(self.layers)} layers, by up to {np.abs(got - want).max():g}",
                expected="the sum over layers and experts of weight times logit",
                do="report this, with the versions that `moesteer doctor` prints",
            )

    # ---- at every step

    def begins(self, scheduler_output: Any) -> None:
        """A step begins, also one that runs nothing: forget the requests that are done."""
        for gone in scheduler_output.finished_req_ids:
            self._rows.pop(gone, None)
            self._readings.pop(gone, None)

    def prepared(self, num_scheduled: NDArray[np.int32]) -> None:
        """Rows of this step's tokens, in the batch's order, before the forward pass."""
        assert self.tables is not None
        batch = self.runner.input_batch
        known = self._rows
        request_ids = batch.req_ids
        rows = np.fromiter(
            (known[i] if i in known else self._meet(i) for i in request_ids), dtype=np.int32, count=len(request_ids)
        )
        self.tables.set_rows(np.repeat(rows, num_scheduled), self._staging)
        self._pending = []
        if self._readings:
            start = 0
            for place, (request_id, count) in enumerate(zip(request_ids, num_scheduled, strict=True)):
                if (name := self._readings.get(request_id)) is not None and name in self.reads:
                    first = int(batch.num_computed_tokens_cpu[place])
                    self._pending.append((self.reads[name], first, start, int(count)))
                start += int(count)
        if not self.steps:  # those of warm-up passes prove nothing
            self.tables.beats_L.zero_()
        self.steps += 1
        run_with(self.tables)

    def _meet(self, request_id: str) -> int:
        params = self.runner.requests[request_id].sampling_params
        extra = (params.extra_args if params is not None else None) or {}
        row = row_of(self.catalogue, extra)
        self._rows[request_id] = row.index
        if (told := extra.get(READ)) is not None:
            self._readings[request_id] = told["name"]
            self.reads[told["name"]] = self._new_read(told)
            while len(self.reads) > MOST_READINGS:
                del self.reads[next(iter(self.reads))]
        return row.index

    def _new_read(self, told: dict[str, Any]) -> Read:
        prompt, turn = int(told["prompt"]), int(told["final_turn"])
        final_turn = None if turn < 0 else (turn, prompt)
        parts = [part for _, part, _ in self.catalogue.gate_parts()] if told["gate"] else []
        spans = tuple(gate.pooled_span(part, prompt=(0, prompt), final_turn=final_turn) for part in parts)
        return Read(prompt, tuple((int(a), int(b)) for a, b in told["spans"]), spans, self._zeros(len(spans)))

    def _require_every_layer(self) -> None:
        """After the first step: raise NoEffectError, which ends the engine, unless every layer's operator ran in it."""
        assert self.tables is not None
        still = [
            layer.layer_id for layer, beats in zip(self.layers, self.tables.beats_L.tolist(), strict=True) if beats < 1
        ]
        if still:
            raise NoEffectError(
                f"{len(still)} of {len(self.layers)} routers ran past the steering operator",
                where=f"layers {still[:12]}",
                expected="every router's logits to pass through it",
                do="this vLLM goes another way than the plug-in knows: report it, with the model and vLLM's version",
            )
        self._proven = True

    def _zeros(self, count: int) -> torch.Tensor:
        assert self.tables is not None
        return torch.zeros(count, dtype=torch.float64, device=self.tables.device)

    def ran(self) -> None:
        """Take what was asked for out of the step that ran."""
        if self.steps and not self._proven:
            self._require_every_layer()
        for read, first, start, count in self._pending:
            self._take(read, first, start, count)
        self._pending = []

    def _take(self, read: Read, first: int, start: int, count: int) -> None:
        assert self.tables is not None
        if first >= read.prompt:
            return
        if first == 0:  # begun anew after a preemption
            read.next, read.broken = 0, ""
            read.sums_G.zero_()
            read.logits, read.selected = [], []
        count = min(count, read.prompt - first)
        if first != read.next:
            read.broken = f"positions {read.next} to {first} were not computed"
            return
        read.next = first + count
        for part, (low, high) in enumerate(read.parts):
            a, b = max(low, first), min(high, first + count)
            if a < b:
                scores = self.tables.score_TG[start + a - first : start + b - first, part]
                read.sums_G[part] += scores.double().sum()  # stays on the device: nothing waits
        for low, high in read.spans:
            a, b = max(low, first), min(high, first + count)
            if a < b:
                here = slice(start + a - first, start + b - first)
                if self.tables.logits_TLE is not None:
                    read.logits.append(self.tables.logits_TLE[here].cpu().numpy().copy())
                if self.tables.selected_TLK is not None:
                    read.selected.append(self.tables.selected_TLK[here].cpu().numpy().copy())

    def idle(self) -> None:
        """A dummy pass comes: warm-up, profiling, graph capture."""
        if self.tables is not None:
            self.tables.clear_rows()
            run_with(self.tables)

    # ---- for the front end

    def report(self) -> dict[str, Any]:
        """What this worker steers, for the handshake and the canary; JSON."""
        assert self.tables is not None
        parallel = self.runner.vllm_config.parallel_config
        return {
            "version": __version__,
            "rank": int(parallel.rank),
            "catalogue": self.catalogue.sha256,
            "layer_ids": [layer.layer_id for layer in self.layers],
            "patched": sum(layer.patched for layer in self.layers),
            "watched": sum(layer.watched for layer in self.layers),
            "intact": self._content_sha256() == self._expected,
            "tables_sha256": self._expected,
            "beats": self.tables.beats_L.tolist(),
            "forced": int(self.tables.forced_L.sum()),
            "wrong": int(self.tables.wrong_L.sum()),
            "checked": int(self.tables.checked_L.sum()),
            "changed": int(self.tables.changed_L.sum()),
            "steps": self.steps,
        }

    def reset(self) -> bool:
        """Set the counters that the canary reads to nothing."""
        assert self.tables is not None
        tables = self.tables
        for counter in (tables.beats_L, tables.forced_L, tables.wrong_L, tables.checked_L, tables.changed_L):
            counter.zero_()
        return True

    def scores(self, names: list[str]) -> list[list[float] | str]:
        """For each reading, the sums of its gate parts over the layers here, or why there are none; given once."""
        found: list[list[float] | str] = []
        for name in names:
            read = self.reads.pop(name, None)
            if read is None or read.broken or read.next < read.prompt:
                reason = "it was not read, or so long ago that it was dropped" if read is None else read.broken
                found.append(reason or f"{read.next if read else 0} of its positions were read")
            else:
                found.append(read.sums_G.tolist())
        return found

    def trace(self, names: list[str]) -> bytes:
        """Logits [P, L here, E] and selections [P, L here, K] of each reading, as safetensors. Each is given once."""
        tensors: dict[str, NDArray[Any]] = {}
        for number, name in enumerate(names):
            read = self.reads.pop(name, None)
            if read is None or read.broken or read.next < read.prompt:
                raise NoEffectError(
                    "a sequence that was to be captured was not read whole",
                    where=f"sequence {number}: {read.broken if read is not None else 'it was dropped'}",
                    expected="every position computed, once, in order",
                    do="report this, with the engine's settings",
                )
            if read.logits:
                tensors[f"{number}.logits"] = np.concatenate(read.logits)
            tensors[f"{number}.selected"] = np.concatenate(read.selected)
        return save_tensors(tensors)

    def _content_sha256(self) -> str:
        assert self.tables is not None
        bias, force = self.tables.content()
        gates = [] if self.tables.gate is None else [table.cpu().numpy().tobytes() for table in self.tables.gate]
        return files.sha256(bias.tobytes() + force.tobytes() + b"".join(gates))


def of_worker(worker: Any) -> Steered:
    """The Steered of a worker's model runner. Raises NoEffectError where the plug-in is not at work."""
    found = getattr(worker.model_runner, "moesteer", None)
    if not isinstance(found, Steered) or found.tables is None:
        raise NoEffectError(
            "this worker steers nothing",
            where="a worker of vLLM",
            expected="the plug-in, with settings, in every worker",
            do="check that moesteer is installed there, and that VLLM_PLUGINS and MOESTEER_VLLM do not shut it out",
        )
    return found


RPC: dict[str, Callable[..., Any]] = {
    "moesteer_report": lambda worker: of_worker(worker).report(),
    "moesteer_reset": lambda worker: of_worker(worker).reset(),
    "moesteer_scores": lambda worker, names: of_worker(worker).scores(names),
    "moesteer_trace": lambda worker, names: of_worker(worker).trace(names),
}
"""Methods added to vLLM's workers, which the front end calls by name (collective_rpc)."""

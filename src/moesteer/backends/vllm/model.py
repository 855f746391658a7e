"""vLLM as an offline backend: the same questions as backends/hf.Model, answered by an engine of its own.

Greedy decoding only, as there. loading.py starts the engine.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors

from moesteer import files
from moesteer.backends.chat import Chat, Encoded, Generation, require_rows
from moesteer.backends.fingerprinting import checkpoint_of
from moesteer.backends.vllm.catalogue import Catalogue, Member, Row
from moesteer.backends.vllm.dying import noticing_death
from moesteer.backends.vllm.gating import decided, needs_gate, probe
from moesteer.backends.vllm.output import Output
from moesteer.backends.vllm.requests import Reading, Ticket, tickets
from moesteer.conversations import Message
from moesteer.errors import (
    EngineStoppedError,
    InputError,
    ModelError,
    MoesteerError,
    NoEffectError,
)
from moesteer.mask import SteeringMask
from moesteer.models.limits import require_unsteered, strengths_of
from moesteer.models.steering import Receipt
from moesteer.progress import Progress

CHUNK = 1_024
"""Requests given to the engine at a time; between chunks the progress bar moves."""


class VllmModel(Chat):
    """A model inside an engine of vLLM. Made by loading.load."""

    new_tokens_at_once = 131_072
    """That an engine is given to make at once, where what is made is written down in between (evaluate/pieces.py)."""

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        *,
        name: str,
        context_tokens: int,
        stops: Sequence[int],
        fingerprint: Any,
        masks: tuple[SteeringMask, ...],
        catalogue: Catalogue,
        folder: tempfile.TemporaryDirectory[str],
        output: Output,
        source: str,
        revision: str | None,
        capture: str | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(tokenizer, name=name, context_tokens=context_tokens, stops=stops)
        self.engine, self.fingerprint, self.masks, self.catalogue = engine, fingerprint, masks, catalogue
        self._folder, self._output, self._options = folder, output, dict(options)
        self._source, self._revision, self.capture = source, revision, capture
        self._receipt: Receipt | None = None
        self._together = True
        parallel = engine.llm_engine.vllm_config.parallel_config
        self._tensor_ranks = int(parallel.tensor_parallel_size)
        self._require_workers()

    def close(self) -> None:
        """Stop the engine's processes."""
        self.engine.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    def __enter__(self) -> VllmModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def dtype(self) -> str:
        """Of the weights and activations."""
        return str(self.engine.model_config.dtype)

    @property
    def mask_sha256(self) -> tuple[str, ...]:
        """Digests of the masks applied now (short form); empty for the model as it is."""
        return self._receipt.masks if self._receipt is not None else ()

    @property
    def alphas(self) -> list[float]:
        """Strengths of the masks applied now."""
        return list(self._receipt.alphas) if self._receipt is not None else []

    @cached_property
    def weights_sketch(self) -> str:
        """A quick digest that tells other weights apart: some bytes of every stored tensor; the engine's options."""
        digest = hashlib.sha256(b"vllm" + files.dumps(self._options, indent=None).encode())
        for stored in checkpoint_of(self._source, revision=self._revision).tensors.values():
            digest.update(f"{stored.name} {stored.shape} {stored.dtype}".encode())
            with open(stored.file, "rb") as handle:
                for at in (0, stored.size_bytes // 2):
                    handle.seek(stored.start + at)
                    digest.update(handle.read(min(256, stored.size_bytes - at)))
        return digest.hexdigest()[:32]

    def reports(self) -> list[dict[str, Any]]:
        """What every worker steers (worker.Steered.report)."""
        found: list[dict[str, Any]] = self._ask("moesteer_report")
        return found

    # ---- generation

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 128,
        rows: Sequence[int] | None = None,
        title: str | None = None,
    ) -> list[Generation]:
        """Greedy responses, in the order given; as backends.hf.Model.generate."""
        encoded = self.encode_all(conversations, max_new_tokens=max_new_tokens)
        return self.generate_encoded(encoded, max_new_tokens=max_new_tokens, rows=rows, title=title)

    def generate_encoded(
        self,
        encoded: Sequence[Encoded],
        *,
        max_new_tokens: int,
        rows: Sequence[int] | None = None,
        title: str | None = None,
    ) -> list[Generation]:
        """Greedy responses to prompts that are tokens already."""
        acting = self._acting(len(encoded), rows)
        done: list[Generation] = []
        with Progress(title or "", total=len(encoded), unit="replies", shown=title is not None) as progress:
            for start in range(0, len(encoded), CHUNK):
                part, wanted = encoded[start : start + CHUNK], acting[start : start + CHUNK]
                chosen = self._rows(part, wanted)
                self._check_gates(wanted, chosen)
                outputs = self._run(part, [Ticket(row.name) for row in chosen], max_new_tokens=max_new_tokens)
                done += [self.as_generation(list(output.outputs[0].token_ids)) for output in outputs]
                if self._receipt is not None:
                    self._receipt.positions += sum(
                        len(one.token_ids) + len(output.outputs[0].token_ids) - 1
                        for one, output, members in zip(part, outputs, wanted, strict=True)
                        if members
                    )
                progress.advance(len(part))
        self._count()
        return done

    def _run(self, prompts: Sequence[Encoded], wanted: Sequence[Ticket], *, max_new_tokens: int) -> list[Any]:
        from vllm import SamplingParams

        with tickets(wanted) as extras:
            params = [
                SamplingParams(
                    temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=self._stops, detokenize=False,
                    ignore_eos=True, extra_args=extra, skip_reading_prefix_cache=ticket.reading is not None,
                )
                for extra, ticket in zip(extras, wanted, strict=True)
            ]  # fmt: skip
            given: Any = [{"prompt_token_ids": list(one.token_ids)} for one in prompts]
            try:
                with noticing_death(self.engine):
                    found: list[Any] = self.engine.generate(given, params, use_tqdm=False)
            except Exception as error:
                why = self._output.explained(error)
                if isinstance(why, MoesteerError):
                    raise why from error
                raise EngineStoppedError(
                    f"the engine stopped: {why}",
                    where=self.name,
                    expected="an answer to every request",
                    do="run the same command again: it goes on where it was; VLLM_LOGGING_LEVEL=INFO shows all that "
                    "vLLM prints",
                ) from error
        failed = [one for one in found if one.outputs[0].finish_reason not in ("stop", "length")]
        if failed or len(found) != len(prompts):
            reason = failed[0].outputs[0].finish_reason if failed else "lost"
            raise ModelError(
                f"the engine left {len(failed) or len(prompts) - len(found)} of {len(prompts)} requests ({reason})",
                where=self.name,
                expected="an answer to every request",
                do="VLLM_LOGGING_LEVEL=INFO shows all that vLLM prints",
            )
        return found

    def _acting(self, count: int, rows: Sequence[int] | None) -> list[tuple[Member, ...]]:
        """The members wanted on each conversation, gates not asked yet."""
        known = len(self.masks) if self._receipt is not None else 0
        require_rows(rows, count=count, masks=known)
        if self._receipt is None:
            return [()] * count
        if self._together and rows is not None and known > 1:
            raise InputError(
                "the engine was started with all masks together",
                where=self.name,
                expected="masks to be told apart by row",
                do="load the model with together=False",
            )
        if self._together:
            every = self.catalogue.pins
            return [every if rows is None or row else () for row in (rows or [1] * count)]
        if rows is None and known > 1:
            raise InputError(
                "nothing says which conversation takes which mask",
                where=self.name,
                expected="rows given with the conversations",
                do="call model.generate(..., rows=[...]), or load the model with together=True",
            )
        named = self.catalogue.named
        return [(named[str(row)],) if str(row) in named else () for row in (rows or [1] * count)]

    def _rows(self, prompts: Sequence[Encoded], acting: Sequence[tuple[Member, ...]]) -> list[Row]:
        """The rows of these requests, gates asked."""
        asked = [i for i, members in enumerate(acting) if needs_gate(members)]
        rows = [self.catalogue.row(members) if i not in set(asked) else None for i, members in enumerate(acting)]
        if asked:
            wanted = []
            for i in asked:
                turn = prompts[i].spans.get("final_turn")
                wanted.append(probe(prompt=len(prompts[i].token_ids), final_turn=None if turn is None else turn[0]))
            self._run([prompts[i] for i in asked], wanted, max_new_tokens=1)
            names = [ticket.reading.name for ticket in wanted if ticket.reading is not None]
            by_rank = self._ask("moesteer_scores", names)[:: self._tensor_ranks]
            for number, (i, ticket) in enumerate(zip(asked, wanted, strict=True)):
                sums = [found[number] for found in by_rank]
                rows[i] = decided(self.catalogue, acting[i], sums, ticket=ticket)
        return [row for row in rows if row is not None]

    # ---- steering

    @contextmanager
    def steered(
        self,
        masks: Sequence[SteeringMask],
        *,
        alphas: Sequence[float | None] | None = None,
        together: bool = False,
        allow_other_checkpoint: bool = False,
        allow_empty: bool = False,
    ) -> Iterator[Receipt]:
        """Steer inside the block, with the masks and strengths that the engine was started with and no others.

        As backends.hf.Model.steered. Raises InputError for other masks, AlreadySteeredError.
        """
        given = strengths_of(masks, alphas)
        mine = [(mask.sha256, mask.info.alpha if a is None else a) for mask, a in zip(masks, given, strict=True)]
        have = [(m.mask.sha256, m.alpha) for m in self.catalogue.members]
        if [pair for pair in mine if pair[1] != 0] != have or (not together and len(masks) > 1 and self.catalogue.pins):
            raise InputError(
                "the engine was started with other masks, strengths or another way to combine them",
                where=f"{self.name}: {len(masks)} masks asked for, {len(have)} at hand",
                expected="the masks, alphas and `together` that the model was loaded with",
                do="load the model with these",
            )
        require_unsteered(self._receipt, name=self.name)
        labels = tuple(sha[:12] for sha, _ in mine)
        self._receipt = Receipt(len(self.fingerprint.layer_ids), labels, tuple(alpha for _, alpha in mine))
        self._together = bool(self.catalogue.pins) or (len(masks) <= 1 and not self.catalogue.named)
        self._ask("moesteer_reset")
        try:
            yield self._receipt
        finally:
            self._receipt = None

    def _check_gates(self, acting: Sequence[tuple[Member, ...]], rows: Sequence[Row]) -> None:
        if self._receipt is None:
            return
        for members, row in zip(acting, rows, strict=True):
            gated = [member for member in members if member.mask.gated]
            self._receipt.gated += len(gated)
            self._receipt.fired += sum(member in row.members for member in gated)
            self._receipt.acted |= bool(row.members)

    def _count(self) -> None:
        """Selections that steering changed, as the workers counted them; and forces that were not followed."""
        if self._receipt is None:
            return
        reports = self.reports()[:: self._tensor_ranks]
        self._receipt.checked = sum(report["checked"] for report in reports)
        self._receipt.changed = sum(report["changed"] for report in reports)
        wrong = sum(report["wrong"] for report in reports)
        if wrong:
            raise NoEffectError(
                f"{wrong} of {sum(report['forced'] for report in reports)} forced selections were not followed",
                where=f"{self.name}, in vLLM",
                expected="every forced expert selected, or left out, for every token",
                do="report this, with the model and vLLM's version; --backend hf forces by rank",
            )

    # ---- capture

    def router_outputs(
        self, batch: Sequence[Encoded], places: Sequence[Sequence[int]], *, logits: bool
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.int64]]:
        """(logits [n, L, E] or None, selected [n, L, K]) of the wanted positions; as backends.hf.Model."""
        if self.capture is None or (logits and self.capture != "logits"):
            raise InputError(
                "the engine keeps no router logits" if logits else "the engine keeps no selections",
                where=self.name,
                expected="a model loaded to be captured from",
                do='load it with capture="logits"',
            )
        rows = self._rows(batch, self._acting(len(batch), None))
        wanted = []
        for number, (one, columns, row) in enumerate(zip(batch, places, rows, strict=True)):
            spans = _as_spans(sorted(set(columns)))
            wanted.append(Ticket(row.name, Reading(f"{number}", len(one.token_ids), spans=spans)))
        self._run(batch, wanted, max_new_tokens=1)
        parts = [load_tensors(data) for data in self._ask("moesteer_trace", [str(i) for i in range(len(batch))])][
            :: self._tensor_ranks
        ]

        def joined(kind: str) -> NDArray[Any]:
            """Of all sequences, the positions in the order asked for; layers of pipeline ranks put together."""
            found = []
            for number, columns in enumerate(places):
                whole = np.concatenate([part[f"{number}.{kind}"] for part in parts], axis=1)
                found.append(whole[np.searchsorted(sorted(set(columns)), columns)])
            return np.concatenate(found)

        return joined("logits") if logits else None, joined("selected").astype(np.int64)

    # ---- the workers

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            with noticing_death(self.engine):
                return self.engine.collective_rpc(method, args=arguments)
        except Exception as error:
            found = self._output.explained(error)
            if isinstance(found, MoesteerError):
                raise found from error
            raise NoEffectError(
                f"the engine's workers do not answer: {found}",
                where=f"{self.name}: {method}",
                expected="the plug-in at work in every worker",
                do="check that MOESTEER_VLLM is not 0 and that VLLM_PLUGINS, if set, names moesteer",
            ) from error

    def _require_workers(self) -> None:
        reports = self.reports()
        found = sorted({layer for report in reports for layer in report["layer_ids"] if report["patched"]})
        agree = all(r["catalogue"] == self.catalogue.sha256 and r["intact"] for r in reports)
        if tuple(found) != self.fingerprint.layer_ids or not agree:
            raise NoEffectError(
                f"{len(found)} of {len(self.fingerprint.layer_ids)} routers are steered, or by other masks",
                where=f"{self.name}, {len(reports)} workers",
                expected="every router, in every worker, by the masks given",
                do="report this, with the model and vLLM's version",
            )


def _as_spans(columns: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Positions as half-open ranges, in the order given."""
    spans: list[list[int]] = []
    for column in columns:
        if spans and spans[-1][1] == column:
            spans[-1][1] += 1
        else:
            spans.append([column, column + 1])
    return tuple((start, end) for start, end in spans)

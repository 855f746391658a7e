"""Workers as one backend: the same questions as backends/hf.Model and backends/vllm, and the same answers.

What the local run would put into one batch is one part here, and goes to one worker whole: numbers depend, in their
last bits, on what shares a batch, and with the same batches they are the same. So are receipts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer.backends.chat import Chat, Encoded, Generation, length_batches, require_rows
from moesteer.backends.gating import POOL_POSITIONS
from moesteer.backends.hf import BATCH_POSITIONS
from moesteer.backends.ray.pool import Pool
from moesteer.backends.ray.wire import encoded_as_wire, generation_from_wire, messages_as_wire
from moesteer.conversations import Message
from moesteer.errors import ModelError, NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import SteeringMask
from moesteer.models.limits import require_unsteered, strengths_of
from moesteer.models.steering import Receipt
from moesteer.progress import Progress

ENGINE_PART = 1_024
"""The most requests in one part for an engine of vLLM, which makes its own batches; a local engine's are as many."""
Batch = tuple[Sequence[Encoded], Sequence[Sequence[int]]]
Outputs = tuple[NDArray[np.float32] | None, NDArray[np.int64]]
Pooled = dict[tuple[tuple[int, ...], str], NDArray[np.float32]]


class Applied:
    """The masks of a `steered` block as they travel (their files' bytes), and the receipt of all workers."""

    def __init__(self, masks: Sequence[SteeringMask], how: Mapping[str, Any]) -> None:
        self.masks, self.how = tuple(masks), dict(how)
        self.files = [mask.to_bytes() for mask in masks]
        self.sha256 = [mask.sha256 for mask in masks]
        self.receipt = Receipt(0, (), ())

    @property
    def pools(self) -> list[str]:
        """What the masks' gates read."""
        return sorted({mask.info.gate.pool for mask in self.masks if mask.info.gate is not None})


class Expected:
    """Batches that will be asked for in this order: those that workers were given, and those to come."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._coming = iter(batches)
        self._begun: deque[Batch] = deque()
        self._again: deque[Batch] = deque()

    @property
    def head(self) -> Batch | None:
        """The next one that is to be asked for."""
        if self._begun:
            return self._begun[0]
        if not self._again:
            self._again.extend(islice(self._coming, 1))
        return self._again[0] if self._again else None

    def begin(self) -> Iterator[Batch]:
        """Each in turn, as workers are given it."""
        while True:
            if not self._again:
                self._again.extend(islice(self._coming, 1))
            if not self._again:
                return
            self._begun.append(self._again.popleft())
            yield self._begun[-1]

    def begin_again(self) -> None:
        """Nobody has been given anything."""
        self._again.extendleft(reversed(self._begun))
        self._begun.clear()

    def drop_head(self) -> None:
        """It was asked for."""
        if self.head is not None:
            (self._begun or self._again).popleft()


class RayModel(Chat):
    """A model in every worker of a pool. Made by loading.load.

    proof: what all workers have in common (worker.Worker.start).
    """

    def __init__(self, pool: Pool, tokenizer: Any, *, name: str, backend: str, proof: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, name=name, context_tokens=proof["context_tokens"], stops=proof["stops"])
        self.pool, self.backend, self._proof = pool, backend, proof
        self.fingerprint = Fingerprint.model_validate(proof["fingerprint"])
        if proof["new_tokens_at_once"] is not None:
            self.new_tokens_at_once = int(proof["new_tokens_at_once"])
        self._applied: Applied | None = None
        self._expected = Expected(())
        self._coming: Generator[Outputs] | None = None

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self._proof["dtype"])

    @property
    def weights_sketch(self) -> str:
        """A digest that tells other weights apart, the same in every worker."""
        return str(self._proof["weights"])

    @property
    def mask_sha256(self) -> tuple[str, ...]:
        """Digests of the masks applied now (short form); empty for the model as it is."""
        return self._applied.receipt.masks if self._applied is not None else ()

    @property
    def alphas(self) -> list[float]:
        """Strengths of the masks applied now."""
        return list(self._applied.receipt.alphas) if self._applied is not None else []

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
        self._stop_coming()
        encoded = self.encode_all(conversations, max_new_tokens=max_new_tokens)
        require_rows(rows, count=len(encoded), masks=len(self._applied.masks) if self._applied is not None else 0)
        batches = self._batches([len(one.token_ids) + max_new_tokens for one in encoded])
        pooled = self._pooled(encoded, rows)
        requests = [
            {
                "kind": "generate", "conversations": [messages_as_wire(conversations[i]) for i in batch],
                "max_new_tokens": max_new_tokens, "rows": None if rows is None else [rows[i] for i in batch],
                "pooled": _of_batch(pooled, [encoded[i] for i in batch]),
            }
            for batch in batches
        ]  # fmt: skip
        done: dict[int, Generation] = {}
        with Progress(title or "", total=len(encoded), unit="replies", shown=title is not None) as progress:
            for batch, answer in zip(batches, self._ask(requests), strict=True):
                made = [generation_from_wire(row) for row in answer["replies"]]
                done.update(zip(batch, made, strict=True))
                progress.advance(len(batch))
        return [done[i] for i in range(len(encoded))]

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The parts: transformers' batches as the local run makes them; for engines, even shares in order."""
        if self.backend == "hf":
            return list(length_batches(lengths, BATCH_POSITIONS))
        size = min(ENGINE_PART, -(-len(lengths) // self.pool.share.workers))
        return [list(range(at, min(at + size, len(lengths)))) for at in range(0, len(lengths), size or 1)]

    def _pooled(self, encoded: Sequence[Encoded], rows: Sequence[int] | None) -> Pooled | None:
        """What the gates of transformers decide by, read in the local run's batches; engines ask their own."""
        applied = self._applied
        if self.backend != "hf" or applied is None or not applied.pools:
            return None
        if rows is None and len(applied.masks) > 1 and not applied.how["together"]:
            return None  # the worker refuses: nothing says who takes which
        batches = list(length_batches([one.spans["prompt"][1] for one in encoded], POOL_POSITIONS))
        requests = [
            {"kind": "pool", "prompts": [encoded_as_wire(encoded[i]) for i in batch], "pools": applied.pools}
            for batch in batches
        ]
        tables: dict[tuple[int, str], NDArray[np.float32]] = {}
        for batch, answer in zip(batches, self._ask(requests), strict=True):
            for pool, table in answer["pooled"].items():
                tables.update({(i, pool): table[n] for n, i in enumerate(batch)})
        return {(one.token_ids, pool): tables[i, pool] for i, one in enumerate(encoded) for pool in applied.pools}

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
        """Steer inside the block, every worker with the same masks; as backends.hf.Model.steered.

        A worker tries the masks first, so that what cannot be is refused before the first token.
        """
        require_unsteered(self._applied, name=self.name)
        how = {
            "alphas": strengths_of(masks, alphas), "together": together,
            "allow_other_checkpoint": allow_other_checkpoint, "allow_empty": allow_empty,
        }  # fmt: skip
        self._stop_coming()
        applied = Applied(masks, how)
        (checked,) = self._run([{"kind": "check"}], applied)
        found = checked["receipt"]
        applied.receipt = Receipt(found["routers"], tuple(found["masks"]), tuple(found["alphas"]))
        self._applied = applied
        try:
            yield applied.receipt
        finally:
            self._stop_coming()
            self._applied = None

    # ---- reading

    def router_outputs(
        self, batch: Sequence[Encoded], places: Sequence[Sequence[int]], *, logits: bool
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.int64]]:
        """(logits [n, L, E] float32 before steering, or None; selected [n, L, K]) of the wanted positions, in order."""
        head = self._expected.head
        if head is None or not _same(head, (batch, places)):
            self._stop_coming()
            return next(self._outputs([(batch, places)], logits=logits, half=False))
        if self._coming is None:
            self._coming = self._outputs(self._expected.begin(), logits=logits, half=True)
        try:
            return next(self._coming)
        except BaseException:
            self._stop_coming()
            raise
        finally:
            self._expected.drop_head()

    def expect(self, batches: Iterable[Batch]) -> None:
        """What `router_outputs` will be asked next, in this order: workers start on it before they are asked.

        Logits of these travel as float16, which is what a trace keeps: those beyond it arrive as infinite.
        """
        self._stop_coming()
        self._expected = Expected(batches)

    def _stop_coming(self) -> None:
        """Wait for nothing more of what was expected; it is asked for again when its turn comes."""
        if self._coming is not None:
            self._coming.close()
            self._coming = None
            self._expected.begin_again()

    def _outputs(self, wanted: Iterable[Batch], *, logits: bool, half: bool) -> Generator[Outputs]:
        counts: deque[int] = deque()

        def requests() -> Iterator[dict[str, Any]]:
            for batch, places in wanted:
                counts.append(sum(map(len, places)))
                yield {
                    "kind": "outputs", "batch": [encoded_as_wire(one) for one in batch],
                    "places": [list(columns) for columns in places], "logits": logits, "half": half,
                }  # fmt: skip

        shape = len(self.fingerprint.layer_ids), self.fingerprint.experts
        for answer in self._ask(requests()):
            found, chosen, count = answer["logits"], answer["selected"], counts.popleft()
            if chosen.shape[:2] != (count, shape[0]) or (logits and found.shape != (count, *shape)):
                raise ModelError(
                    f"a worker answered {chosen.shape[0]} of {count} positions",
                    where=f"{self.name}, worker {answer['pid']}",
                    expected=f"{count} positions of {shape[0]} layers",
                    do="report this, with the model and the versions of ray and moesteer",
                )
            yield (None if found is None else found.astype(np.float32)), chosen.astype(np.int64)

    # ---- the workers

    def _ask(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Answers in order, made under the masks applied now; their receipts are added up."""
        for answer in self._run(requests, self._applied):
            if self._applied is not None and answer["receipt"] is not None:
                self._add(self._applied.receipt, answer["receipt"])
            yield answer

    def _run(self, requests: Iterable[Mapping[str, Any]], applied: Applied | None) -> Iterator[dict[str, Any]]:
        how = applied.how if applied is not None else None
        given = ({**request, "steering": how} for request in requests)
        for answer in self.pool.run(given, masks=applied.files if applied is not None else []):
            self._require_masks(answer, applied)
            yield answer

    def _require_masks(self, answer: Mapping[str, Any], applied: Applied | None) -> None:
        """Raise NoEffectError for an answer that was made under other masks than were asked for."""
        wanted = applied.sha256 if applied is not None else []
        short = [sha[:12] for sha in wanted]
        right = answer["masks"] == wanted and answer["applied"] == short
        if right and applied is not None and applied.receipt.masks:
            right = answer["alphas"] == list(applied.receipt.alphas)
        if not right:
            raise NoEffectError(
                f"a worker answered under the masks {answer['applied']} at {answer['alphas']}",
                where=f"{self.name}, worker {answer['pid']}",
                expected=f"the masks {short}",
                do="report this, with the versions of ray and moesteer; nothing of this answer was used",
            )

    def _add(self, total: Receipt, part: Mapping[str, Any]) -> None:
        """As one model would have counted: transformers counts changes in the first batch that is steered only."""
        total.positions += part["positions"]
        total.gated += part["gated"]
        total.fired += part["fired"]
        if self.backend == "vllm" or (part["checked"] and not total.checked):
            total.checked += part["checked"]
            total.changed += part["changed"]
            total.acted |= part["acted"]


def _same(one: Batch, other: Batch) -> bool:
    """Whether two batches are of the same tokens and places."""
    mine, theirs = ([tuple(e.token_ids) for e in batch[0]] for batch in (one, other))
    return mine == theirs and list(map(list, one[1])) == list(map(list, other[1]))


def _of_batch(pooled: Pooled | None, batch: Sequence[Encoded]) -> list[Any] | None:
    """[token ids, pool, pooled logits] of the prompts of one part."""
    if pooled is None:
        return None
    mine = {one.token_ids for one in batch}
    return [[list(ids), pool, table] for (ids, pool), table in pooled.items() if ids in mine]

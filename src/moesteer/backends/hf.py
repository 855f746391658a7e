"""The transformers backend: a model with its routers that generates, is steered, and gives its logits.

Greedy decoding only: comparisons are made on what the model says first. Prompts are padded on the left and
batched by length. Models are loaded by backends/loading.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from moesteer.backends.chat import Chat, Encoded, Generation, length_batches, require_rows, stop_ids
from moesteer.backends.checkpointing import checkpointed
from moesteer.backends.finite import FiniteLogits
from moesteer.backends.gating import decide
from moesteer.backends.layers import decoder_layers
from moesteer.backends.reading import Kept
from moesteer.conversations import Message
from moesteer.errors import NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.gate import Pool
from moesteer.mask import SteeringMask
from moesteer.models.check import backbone
from moesteer.models.fingerprint import fingerprint_of, is_quantised
from moesteer.models.limits import require_masks, strengths_of
from moesteer.models.routers import Router, find_routers
from moesteer.models.silencing import silencing
from moesteer.models.steering import BiasSteering, MaskTables, Receipt
from moesteer.models.tap import RouterTap
from moesteer.progress import Progress

BATCH_POSITIONS = 16_384
"""Positions (rows x padded length, the tokens to come included) in one generated batch."""


@dataclass(frozen=True)
class Applied:
    """The masks of a `steered` block. together: all of them act on every row that does not say otherwise."""

    masks: tuple[SteeringMask, ...]
    together: bool

    @property
    def gated(self) -> bool:
        """Whether a gate has to decide before anything is steered."""
        return any(mask.gated for mask in self.masks)


@dataclass
class Memory:
    """Replies of the model as it is by (prompt, longest reply), and pooled logits by (prompt, pool)."""

    replies: dict[tuple[tuple[int, ...], int], Generation] = field(default_factory=dict)
    pooled: dict[tuple[tuple[int, ...], Pool], NDArray[np.float32]] = field(default_factory=dict)


class Model(Chat):
    """A loaded Mixture-of-Experts model, its tokenizer and its routers. Made, and proven, by loading.load."""

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
        context = int(getattr(hf.config.get_text_config(), "max_position_embeddings", 1 << 30))
        super().__init__(tokenizer, name=name, context_tokens=context, stops=stop_ids(hf.generation_config, tokenizer))
        self.hf = hf
        self.routers: tuple[Router, ...] = find_routers(hf)
        self.tap = RouterTap(self.routers)
        self.model_type: str = hf.config.get_text_config().model_type
        self.fingerprint: Fingerprint = fingerprint_of(self.model_type, self.routers)
        self._steering: MaskTables | None = None
        self._applied: Applied | None = None
        self._memory: Memory | None = None
        self.shifts = 0
        """Blocks of backends/shifting.py around now: with one, a model without masks is not as it is."""

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.hf.parameters())

    @property
    def mask_sha256(self) -> tuple[str, ...]:
        """Digests of the masks applied now (short form); empty for the model as it is."""
        return self._steering.receipt.masks if self._steering is not None else ()

    @property
    def alphas(self) -> list[float]:
        """Strengths of the masks applied now."""
        return list(self._steering.receipt.alphas) if self._steering is not None else []

    @cached_property
    def weights_sketch(self) -> str:
        """A quick digest that tells other weights apart: name, shape, sum and first values of every tensor."""
        digest = hashlib.sha256()
        for name, tensor in self.hf.state_dict().items():
            if tensor.is_meta:
                digest.update(f"{name} {tuple(tensor.shape)} offloaded".encode())
                continue
            flat = (tensor.dequantize() if is_quantised(tensor) else tensor).detach().flatten()
            total = float(flat[:: max(1, flat.numel() // 4096)].double().sum())
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}".encode())
            digest.update(flat[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device(self.hf.device)

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else (self._stops or [0])[0])

    def pad(self, sequences: Sequence[Sequence[int]], *, left: bool = True) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask [batch, longest], on the model's device."""
        width = max(len(ids) for ids in sequences)
        input_ids = torch.full((len(sequences), width), self._pad_id)
        attention = torch.zeros((len(sequences), width), dtype=torch.long)
        for row, ids in enumerate(sequences):
            place = slice(width - len(ids), width) if left else slice(0, len(ids))
            input_ids[row, place] = torch.tensor(ids)
            attention[row, place] = 1
        return input_ids.to(self.device), attention.to(self.device)

    # ---- generation

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 128,
        rows: Sequence[int] | None = None,
        title: str | None = None,
    ) -> list[Generation]:
        """Greedy responses, in the order given.

        rows: with several masks applied, which steers which conversation (0 none, m the m-th mask).
        title: shows a progress bar. Raises DataError for a prompt that does not fit the context, NanLogitsError where
        logits of any of them are not finite.
        """
        encoded = self.encode_all(conversations, max_new_tokens=max_new_tokens)
        acting = self._acting(encoded, rows)
        done: list[Generation | None] = [None] * len(encoded)
        remembered = self._recall(encoded, acting, max_new_tokens)
        for i, generation in remembered.items():
            done[i] = generation
        open_ = [i for i in range(len(encoded)) if i not in remembered]
        lengths = [len(encoded[i].token_ids) + max_new_tokens for i in open_]
        with Progress(title or "", total=len(encoded), unit="replies", shown=title is not None) as progress:
            progress.advance(len(remembered))
            for part in length_batches(lengths, BATCH_POSITIONS):
                batch = [open_[i] for i in part]
                picked = None if acting is None else [acting[i] for i in batch]
                for i, generation in zip(
                    batch,
                    self._generate_batch([encoded[i].token_ids for i in batch], max_new_tokens, picked),
                    strict=True,
                ):
                    done[i] = generation
                    self._remember(encoded[i], None if acting is None else acting[i], max_new_tokens, generation)
                progress.advance(len(batch))
        return [generation for generation in done if generation is not None]

    @contextmanager
    def remembering(self) -> Iterator[Memory]:
        """Inside the block, a prompt that was answered without steering is not answered again, nor its gate asked.

        For comparing many masks on the same conversations: greedy replies of the model as it is do not change.
        Yields what is remembered, which may be added to.
        """
        outer, self._memory = self._memory, Memory() if self._memory is None else self._memory
        try:
            yield self._memory
        finally:
            self._memory = outer

    def _recall(
        self, encoded: Sequence[Encoded], acting: Sequence[tuple[int, ...]] | None, most: int
    ) -> dict[int, Generation]:
        """Remembered replies, by place in the batch, of requests on which nothing acts."""
        memory = self._memory
        if memory is None or self.shifts or (self._steering is not None and acting is None):
            return {}
        return {
            i: memory.replies[one.token_ids, most]
            for i, one in enumerate(encoded)
            if (acting is None or not acting[i]) and (one.token_ids, most) in memory.replies
        }

    def _remember(self, encoded: Encoded, acting: tuple[int, ...] | None, most: int, generation: Generation) -> None:
        if (
            self._memory is not None
            and not self.shifts
            and not acting
            and (acting is not None or self._steering is None)
        ):
            self._memory.replies[encoded.token_ids, most] = generation

    def _acting(self, encoded: Sequence[Encoded], rows: Sequence[int] | None) -> list[tuple[int, ...]] | None:
        """Which masks act on which conversation, gates decided; None where the tables need not be told."""
        applied, steering = self._applied, self._steering
        known = len(applied.masks) if applied is not None else 0
        require_rows(rows, count=len(encoded), masks=known)
        if applied is None or steering is None or (rows is None and not applied.gated):
            return None
        every = tuple(range(1, len(applied.masks) + 1))
        if rows is None and len(every) > 1 and not applied.together:
            return None  # the tables refuse: nothing says who takes which
        wanted = [every if rows is None else (row,) * bool(row) for row in (rows or [0] * len(encoded))]
        if not applied.gated:
            return wanted
        allowed = decide(self, encoded, applied.masks, memory=self._memory.pooled if self._memory else None)
        chosen = [tuple(m for m in row if allowed[i, m - 1]) for i, row in enumerate(wanted)]
        gates = [tuple(m for m in row if applied.masks[m - 1].gated) for row in wanted]
        steering.receipt.gated += sum(map(len, gates))
        steering.receipt.fired += sum(len(set(row) & set(mine)) for row, mine in zip(gates, chosen, strict=True))
        return chosen

    def _generate_batch(
        self, prompts: list[tuple[int, ...]], max_new_tokens: int, rows: list[tuple[int, ...]] | None
    ) -> list[Generation]:
        input_ids, attention = self.pad(prompts)
        before = self._steering.receipt.positions if self._steering is not None else -1
        watch = FiniteLogits()
        with torch.inference_mode(), self._steering.rows(rows) if self._steering is not None else nullcontext():
            out = self.hf.generate(
                input_ids=input_ids, attention_mask=attention, max_new_tokens=max_new_tokens, do_sample=False,
                temperature=None, top_p=None, top_k=None, pad_token_id=self._pad_id, eos_token_id=self._stops or None,
                logits_processor=LogitsProcessorList([watch]),
            )  # fmt: skip
        watch.require(name=self.name)
        if (steering := self._steering) is not None and (steering.receipt.positions == before or steering.unasked):
            raise NoEffectError(
                f"the model generated without asking {steering.unasked or 'any'} of its {len(self.routers)} routers",
                where=self.name,
                expected="a forward pass that calls the routers",
                do="undo torch.compile, or compile again inside the block; a graph kept from before leaves them out",
            )
        return [self.as_generation(row) for row in out[:, input_ids.shape[1] :].tolist()]

    def chat(self, text: str, *, max_new_tokens: int = 128) -> str:
        """The model's reply to one user message."""
        return self.generate([[Message("user", text)]], max_new_tokens=max_new_tokens)[0].text

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
        """Steer inside the block with one mask, or with several, one per batch row (`generate(rows=...)`).

        together: all masks act on every row, each with its own alpha: biases add up, forces join. A gated mask
        acts on the requests on which its gate fires, which `generate` asks first. alphas: one for each mask (None:
        the mask's own), or none at all. Raises InputError, MaskMismatchError, MaskContentError, NoEffectError,
        AlreadySteeredError before the first token. On exit the model is itself again, bit for bit.
        """
        strengths = strengths_of(masks, alphas)
        require_masks(
            masks, strengths, self.fingerprint, self.routers, together=together,
            allow_other_checkpoint=allow_other_checkpoint, allow_empty=allow_empty,
        )  # fmt: skip
        steering = MaskTables.of_masks(masks, strengths, device=self.device)
        applied = Applied(tuple(masks), together)
        if applied.gated:
            steering.set_rows(None)  # until the gate has decided
        elif together:
            steering.set_rows([tuple(range(1, len(masks) + 1))])
        with self.tap.steer(steering):
            self._steering, self._applied = steering, applied
            try:
                yield steering.receipt
            finally:
                self._steering, self._applied = None, None

    # ---- reading

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self.hf.dtype)

    def router_outputs(
        self, batch: Sequence[Encoded], places: Sequence[Sequence[int]], *, logits: bool
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.int64]]:
        """(logits [n, L, E] float32 before steering, or None; selected [n, L, K]) of the wanted positions, in order.

        places: for each sequence, the positions. Sequences are padded on the right.
        """
        input_ids, attention = self.pad([encoded.token_ids for encoded in batch], left=False)
        width = input_ids.shape[1]
        flat = [row * width + column for row, columns in enumerate(places) for column in columns]
        kept = Kept(len(self.routers), torch.tensor(flat, device=self.device), logits=logits)
        with torch.inference_mode(), self.tap.record(kept):
            self.hf.base_model(input_ids=input_ids, attention_mask=attention, use_cache=False)
        chosen = torch.stack([x for x in kept.selected_L if x is not None], dim=1).cpu().numpy().astype(np.int64)
        if not logits:
            return None, chosen
        return torch.stack([x for x in kept.logits_L if x is not None], dim=1).float().cpu().numpy(), chosen

    def response_logits(
        self, sequences: Sequence[Encoded], *, bias_LE: Tensor | None, most: int, checkpointing: bool = False
    ) -> Tensor:
        """Vocabulary logits [n, V] that predict the first `most` response tokens of every sequence, in order.

        bias_LE [L, E] is added to the router logits at every position and may require gradient: this is what
        the `direct` method optimises through. Sequences are padded on the right. checkpointing: layers keep their
        inputs only, and are computed again in the backward pass.
        """
        input_ids, attention = self.pad([encoded.token_ids for encoded in sequences], left=False)
        rows, columns = response_places(sequences, most=most)
        if bias_LE is None:
            return self._logits_at(input_ids, attention, rows, columns)
        layers = decoder_layers(self) if checkpointing else {}
        steering = BiasSteering(bias_LE)
        with self.tap.steer(steering), checkpointed(layers, again=lambda: self.tap.steer(steering)):
            return self._logits_at(input_ids, attention, rows, columns)

    def response_logits_silenced(
        self, sequences: Sequence[Encoded], *, silenced: Sequence[tuple[int, int] | None], most: int
    ) -> Tensor:
        """As response_logits, without gradient, each sequence with one expert switched off, or none.

        silenced: (row of the layer, expert) or None, one per sequence. Raises InputError, MaskContentError.
        """
        if len(silenced) != len(sequences):
            raise ValueError(f"{len(sequences)} sequences, {len(silenced)} entries of what is silenced")
        input_ids, attention = self.pad([encoded.token_ids for encoded in sequences], left=False)
        rows, columns = response_places(sequences, most=most)
        with torch.no_grad(), self.tap.steer(silencing(self.routers, silenced, device=self.device)):
            return self._logits_at(input_ids, attention, rows, columns)

    def _logits_at(self, input_ids: Tensor, attention: Tensor, rows: list[int], columns: list[int]) -> Tensor:
        hidden = backbone(self.hf)(input_ids=input_ids, attention_mask=attention, use_cache=False).last_hidden_state
        head: Any = self.hf.get_output_embeddings()
        logits: Tensor = head(hidden[rows, columns])
        return logits


def response_places(sequences: Sequence[Encoded], *, most: int) -> tuple[list[int], list[int]]:
    """(rows, columns) of the positions that predict each sequence's first `most` response tokens."""
    rows, columns = [], []
    for row, encoded in enumerate(sequences):
        start, end = encoded.spans["response"]
        for column in range(start - 1, min(end, start + most) - 1):
            rows.append(row)
            columns.append(column)
    return rows, columns

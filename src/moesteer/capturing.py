"""Capture: run conversations through a model and keep what its routers did, in a trace on disk.

The plan (which sequence goes into which batch and shard) is fixed by the input alone, so that a capture that
was killed and started again ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesteer import files
from moesteer.backends.chat import Encoded, length_batches
from moesteer.backends.protocol import Captures, LooksAhead
from moesteer.conversations import Conversation, request_and_response
from moesteer.errors import EmptyDataError, TraceFileError, TraceLabelError, UnknownNameError
from moesteer.memory import HALVINGS, give_back_memory, is_out_of_memory, too_little_memory
from moesteer.progress import Progress
from moesteer.trace import Manifest, TraceReader, TraceRow, TraceWriter, selected_dtype

SPANS = ("prompt", "final_user", "final_turn", "response")
BATCH_POSITIONS = 8_192
SHARD_TOKENS = 32_768


@dataclass(frozen=True)
class _Plan:
    """Batches of sequence numbers, and which batches make up which shard."""

    encoded: list[Encoded]
    shards: list[list[list[int]]]

    def sha256(self, conversations: Sequence[Conversation], extra: dict[str, Any]) -> str:
        """Digest of everything that decides the trace's bytes."""
        items = [
            [c.id, c.group, c.label, c.tactic, c.split, list(e.token_ids), sorted(e.spans.items())]
            for c, e in zip(conversations, self.encoded, strict=True)
        ]
        return files.sha256(files.dumps([extra, self.shards, items], indent=None).encode("utf-8"))


def capture(
    model: Captures,
    conversations: Sequence[Conversation],
    *,
    out: Path | str,
    spans: Sequence[Literal["prompt", "final_user", "final_turn", "response"]] = ("final_user",),
    level: Literal["logits", "selected"] = "logits",
    batch_positions: int = BATCH_POSITIONS,
    shard_tokens: int = SHARD_TOKENS,
    title: str = "capture",
) -> TraceReader:
    """Capture the spans' tokens of every conversation to the trace folder `out`, or go on with it.

    spans: "final_user" (content of the last user message; MASCing), "final_turn" (from there to where the reply
    begins), "prompt" (all of it), "response" (the
    conversation's `reference`, teacher-forced; SteerMoE's safety pairs). level: "selected" keeps expert ids
    only. Logits are raw (before steering) and float16; within `model.steered(...)` the manifest names the mask.
    Raises EmptyDataError, TraceLabelError (a response is wanted and missing), NanLogitsError, RunDirectoryError.
    """
    if not conversations:
        raise EmptyDataError(
            "nothing to capture", where=str(out), expected="at least one conversation", do="check the data file"
        )
    unknown = [span for span in spans if span not in SPANS]
    if unknown or not spans:
        raise UnknownNameError(
            f"no span {unknown or 'at all'}", where=str(out), expected=", ".join(SPANS), do="name one or more of these"
        )
    plan = _plan(model, conversations, spans, batch_positions=batch_positions, shard_tokens=shard_tokens)
    mask_sha256 = model.mask_sha256
    extra = {
        "spans": list(spans), "level": level, "model": model.fingerprint.router_sha256,
        "weights": model.weights_sketch, "dtype": model.dtype, "masks": list(mask_sha256),
        "alphas": model.alphas,
    }  # fmt: skip
    manifest = Manifest(
        fingerprint=model.fingerprint, mask_sha256=mask_sha256, level=level, spans=tuple(spans),
        sequences=len(conversations), shards=len(plan.shards), plan_sha256=plan.sha256(conversations, extra),
    )  # fmt: skip
    writer = TraceWriter(Path(out), manifest)
    if writer.complete:
        return _untouched(TraceReader(out))
    with Progress(title, total=len(conversations), unit="sequences") as progress:
        progress.advance(sum(len(batch) for shard in plan.shards[: writer.done] for batch in shard))
        if isinstance(model, LooksAhead):
            left = ([plan.encoded[i] for i in batch] for shard in plan.shards[writer.done :] for batch in shard)
            model.expect((batch, _places(batch, spans)) for batch in left)
        for number in range(writer.done, len(plan.shards)):
            _write_shard(model, conversations, plan, number, writer, spans=spans, level=level, progress=progress)
    writer.finish()
    return TraceReader(out)


def _untouched(trace: TraceReader) -> TraceReader:
    changed = trace.verify()
    if changed:
        raise TraceFileError(
            f"the finished trace was changed: {', '.join(changed)}",
            where=str(trace.folder),
            expected="the bytes that were captured",
            do="delete the folder and capture again",
        )
    return trace


def _plan(
    model: Captures,
    conversations: Sequence[Conversation],
    spans: Sequence[str],
    *,
    batch_positions: int,
    shard_tokens: int,
) -> _Plan:
    encoded = []
    for conversation in conversations:
        messages, response = request_and_response(conversation)
        if "response" in spans and not response:
            raise TraceLabelError(
                "a conversation has no response to capture",
                where=f"conversation {conversation.id}",
                expected="a `reference` to be teacher-forced, since the span 'response' is wanted",
                do="add the responses, or capture 'final_user' or 'prompt'",
            )
        encoded.append(model.encode(messages, response if "response" in spans else None))
    shards: list[list[list[int]]] = [[]]
    tokens = 0
    for batch in length_batches([len(e.token_ids) for e in encoded], batch_positions):
        if tokens >= shard_tokens:
            shards.append([])
            tokens = 0
        shards[-1].append(batch)
        tokens += sum(len(encoded[i].token_ids) for i in batch)
    return _Plan(encoded, shards)


def _write_shard(
    model: Captures,
    conversations: Sequence[Conversation],
    plan: _Plan,
    number: int,
    writer: TraceWriter,
    *,
    spans: Sequence[str],
    level: str,
    progress: Progress,
) -> None:
    rows: list[TraceRow] = []
    logits, selected, token_ids = [], [], []
    offset = 0
    for batch in plan.shards[number]:
        kept, places = _forward_in_parts(model, [plan.encoded[i] for i in batch], spans=spans, logits=level == "logits")
        selected.append(kept[1])
        if kept[0] is not None:
            logits.append(kept[0])
        for i, columns in zip(batch, places, strict=True):
            conversation, encoded = conversations[i], plan.encoded[i]
            lengths = tuple(encoded.spans[name][1] - encoded.spans[name][0] for name in spans)
            rows.append(
                TraceRow(
                    conversation.id, conversation.group, conversation.label, conversation.tactic, conversation.split,
                    number, offset, len(columns), tuple(spans), lengths,
                )
            )  # fmt: skip
            token_ids += [encoded.token_ids[column] for column in columns]
            offset += len(columns)
        progress.advance(len(batch))
    writer.write_shard(
        rows,
        selected=np.concatenate(selected),
        token_ids=np.array(token_ids, dtype=np.int32),
        logits=np.concatenate(logits) if logits else None,
    )


def _forward_in_parts(
    model: Captures, batch: Sequence[Encoded], *, spans: Sequence[str], logits: bool, halvings: int = HALVINGS
) -> tuple[tuple[NDArray[np.float32] | None, NDArray[Any]], list[list[int]]]:
    """As `forward`; a batch for which memory is too small is halved, up to three times. Raises OutOfMemoryError."""
    try:
        return forward(model, batch, spans=spans, logits=logits)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not halvings or len(batch) == 1:
            longest = max(len(one.token_ids) for one in batch)
            raise too_little_memory(error, what=f"{len(batch)} sequences of up to {longest} tokens") from error
    give_back_memory()  # out here, where no traceback holds the tensors
    half = (len(batch) + 1) // 2
    (one, first), places = _forward_in_parts(model, batch[:half], spans=spans, logits=logits, halvings=halvings - 1)
    (two, second), more = _forward_in_parts(model, batch[half:], spans=spans, logits=logits, halvings=halvings - 1)
    kept = None if one is None or two is None else np.concatenate([one, two])
    return (kept, np.concatenate([first, second])), places + more


def _places(batch: Sequence[Encoded], spans: Sequence[str]) -> list[list[int]]:
    """The columns to keep of every sequence."""
    return [[c for name in spans for c in range(*encoded.spans[name])] for encoded in batch]


def forward(
    model: Captures, batch: Sequence[Encoded], *, spans: Sequence[str], logits: bool
) -> tuple[tuple[NDArray[np.float32] | None, NDArray[Any]], list[list[int]]]:
    """One batch through the model: ((logits [n, L, E] float32, selected [n, L, K]), columns kept per sequence)."""
    places = _places(batch, spans)
    kept, chosen = model.router_outputs(batch, places, logits=logits)
    return (kept, chosen.astype(selected_dtype(model.fingerprint.experts))), places

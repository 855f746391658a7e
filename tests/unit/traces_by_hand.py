"""Traces written from plain lists, for tests of detection. Legend: T tokens, L layers, E experts, K selected."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moesteer.fingerprint import Fingerprint
from moesteer.trace import Manifest, TraceReader, TraceRow, TraceWriter, selected_dtype


@dataclass(frozen=True)
class Spoken:
    """One conversation. spans: selected [T, L, K] by span; logits: [T, L, E] by span, for a trace that has them."""

    id: str
    group: str
    label: str | None
    spans: dict
    logits: dict = field(default_factory=dict)


def write(folder, conversations, *, experts, per_shard=3, scoring="softmax-topk k=2", layer_ids=None):
    """A trace of the conversations, `per_shard` to a shard; level "logits" where they have logits."""
    names = tuple(conversations[0].spans)
    layers, top_k = np.shape(next(iter(conversations[0].spans.values())))[1:]
    logits_too = bool(conversations[0].logits)
    fingerprint = Fingerprint(
        model_type="fake_moe", layer_ids=layer_ids or tuple(range(layers)), experts=experts, top_k=top_k,
        scoring=scoring, router_sha256="ab" * 32,
    )  # fmt: skip
    shards = [conversations[i : i + per_shard] for i in range(0, len(conversations), per_shard)]
    manifest = Manifest(
        fingerprint=fingerprint, level="logits" if logits_too else "selected", spans=names,
        sequences=len(conversations), shards=len(shards), plan_sha256="cd" * 32,
    )  # fmt: skip
    writer = TraceWriter(folder, manifest)
    for number, shard in enumerate(shards):
        rows, offset = [], 0
        for c in shard:
            lengths = tuple(len(c.spans[name]) for name in names)
            rows.append(TraceRow(c.id, c.group, c.label, None, "fit", number, offset, sum(lengths), names, lengths))
            offset += sum(lengths)
        joined = [np.concatenate([np.asarray(c.spans[n]) for n in names]) for c in shard]
        logits = [np.concatenate([c.logits[n] for n in names]) for c in shard] if logits_too else None
        writer.write_shard(
            rows,
            selected=np.concatenate(joined).astype(selected_dtype(experts)),
            token_ids=np.zeros(offset, np.int32),
            logits=None if logits is None else np.concatenate(logits).astype(np.float32),
        )
    writer.finish()
    return TraceReader(folder)


def drawn(rng, length, *, layers=3, experts=6, top_k=2, lean=0.0):
    """Random selections [T, L, K]; `lean` [L, E] or a number is added to the scores they are the top of."""
    scores = rng.normal(size=(length, layers, experts)) + lean
    return np.argsort(-scores, axis=-1)[..., :top_k]

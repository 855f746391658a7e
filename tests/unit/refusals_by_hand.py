"""A trace of refusals and answers, written by hand, and the loops that count it.

3 layers of 6 experts, 2 selected, in two shards. Legend: L layers, E experts, K selected.
"""

from __future__ import annotations

import numpy as np

from moesteer.fingerprint import Fingerprint
from moesteer.trace import Manifest, TraceReader, TraceRow, TraceWriter

LAYERS, EXPERTS, TOP_K = (0, 2, 3), 6, 2
FINGERPRINT = Fingerprint(
    model_type="fake_moe", layer_ids=LAYERS, experts=EXPERTS, top_k=TOP_K, scoring="softmax-topk k=2",
    router_sha256="ab" * 32,
)  # fmt: skip

LABELS = ("refuse", "comply", "refuse", None, "deflect", "comply", "refuse")
"""Of the sequences; "refuse" is wanted, None is not counted, any other label is the other side."""

PROMPTS, RESPONSES = (3, 1, 4, 2, 1, 5, 2), (2, 4, 1, 3, 2, 1, 6)
"""Tokens of the two spans of each sequence."""


def write_trace(folder, *, labels=LABELS, level="logits", seed=0, spans=("prompt", "response"), lengths=None):
    """A trace of random selections, and the same as plain lists: [(label, {span: [token][layer] -> ids})]."""
    rng = np.random.default_rng(seed)
    lengths = lengths or list(zip(PROMPTS, RESPONSES, strict=True))
    manifest = Manifest(
        fingerprint=FINGERPRINT, level=level, spans=spans, sequences=len(labels), shards=2, plan_sha256="cd" * 32
    )
    writer = TraceWriter(folder, manifest)
    plain = []
    halves = [range(len(labels) // 2), range(len(labels) // 2, len(labels))]
    for shard, numbers in enumerate(halves):
        rows, chosen, offset = [], [], 0
        for n in numbers:
            mine = {}
            for span, length in zip(spans, lengths[n], strict=True):
                # the side leans towards some experts, so that differences are large and of both signs
                lean = np.arange(EXPERTS) * (0.5 if labels[n] == "refuse" else -0.5)
                scores = rng.normal(size=(length, len(LAYERS), EXPERTS)) + lean
                mine[span] = np.argsort(-scores, axis=-1)[..., :TOP_K].tolist()
                chosen += mine[span]
            plain.append((labels[n], mine))
            total = sum(lengths[n])
            rows.append(
                TraceRow(f"c{n}", f"g{n}", labels[n], None, "fit", shard, offset, total, spans, tuple(lengths[n]))
            )
            offset += total
        selected = np.array(chosen, dtype=np.uint8).reshape(offset, len(LAYERS), TOP_K)
        logits = rng.normal(size=(offset, len(LAYERS), EXPERTS)).astype(np.float32) if level == "logits" else None
        writer.write_shard(rows, selected=selected, token_ids=np.zeros(offset, np.int32), logits=logits)
    writer.finish()
    return TraceReader(folder), plain


def loop_counts(plain, toward, span):
    """[wanted, other] counts as [layer][expert] and tokens, in loops."""
    tables = [[[0] * EXPERTS for _ in LAYERS] for _ in range(2)]
    tokens = [0, 0]
    for label, spans in plain:
        if label is None:
            continue
        side = 0 if label == toward else 1
        for token in spans[span]:
            tokens[side] += 1
            for layer, ids in enumerate(token):
                for expert in ids:
                    tables[side][layer][expert] += 1
    return tables, tokens


def loop_difference(plain, toward, span):
    tables, tokens = loop_counts(plain, toward, span)
    return [
        [tables[0][i][e] / tokens[0] - tables[1][i][e] / tokens[1] for e in range(EXPERTS)] for i in range(len(LAYERS))
    ]


def loop_forced(difference, on, off, top_k, per_layer=99):
    """The largest first, each in a layer that still has room; ties to the lower layer and expert."""
    force = [[0] * len(difference[0]) for _ in difference]
    cells = [(d, i, e) for i, row in enumerate(difference) for e, d in enumerate(row)]
    for sign, wanted, cap in ((1, on, min(top_k, per_layer)), (-1, off, min(len(difference[0]) - top_k, per_layer))):
        for d, i, e in sorted(cells, key=lambda c: (-sign * c[0], c[1], c[2])):
            if wanted and sign * d > 0 and force[i].count(sign) < cap:
                force[i][e] = sign
                wanted -= 1
    return force


DEFAULTS = {
    "span": "response", "score": "risk-difference", "weight": "token", "balance": False, "per_layer": None,
    "reverse": False, "fdr": None, "stability": None,
}  # fmt: skip

"""Drift: whether a model's routers are asked today for what they were asked for when it was audited.

The share of selections that each expert of a layer gets is compared with the audit's, by total variation: half the
sum of absolute differences, 0 where nothing moved, 1 where no expert is shared. Some of it is chance, and how much is
found by permutation: the groups (behaviours, conversations) of both sides are dealt out anew, whole, as many to either
side as before. What counts as drift is both more than chance (p) and more than a little (the excess over what chance
gives), since with much traffic any difference is more than chance.

Routing follows topics. Another mix of topics, another language or longer prompts move it too, and nothing here tells
those from an attack: drift says that the audit's numbers were measured on other traffic than there is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer import files
from moesteer.audit.inputs import LACKS, SHOWS
from moesteer.detection.base import require_span, require_unsteered
from moesteer.detection.counts import histogram
from moesteer.errors import InputError, TraceError, TraceFileError
from moesteer.trace import TraceReader

F64 = NDArray[np.float64]
PERMUTATIONS = 2000
TOGETHER = 100
"""Permutations computed at once."""
TOP = 10
"""Experts listed: those that moved most."""
THRESHOLDS: Mapping[str, float] = {"p": 0.01, "excess": 0.02, "least_groups": 8}
MEANING: Mapping[str, str] = {
    "p": "share of random deals with as large a distance, at or below which it is not chance",
    "excess": "total variation beyond what chance gives, averaged over layers, below which it is too little to matter",
    "least_groups": "groups on either side, below which nothing is said",
}


@dataclass(frozen=True, eq=False)
class Traffic:
    """Selections by group [G, L, E], and of how many tokens each; labels: a group's, None where it has several."""

    table_GLE: NDArray[np.int64]
    tokens_G: NDArray[np.int64]
    labels: tuple[str | None, ...]

    @property
    def shares_LE(self) -> F64:
        """Share of the tokens that select each expert."""
        shares: F64 = self.table_GLE.sum(axis=0) / max(1, int(self.tokens_G.sum()))
        return shares

    def where(self, label: str) -> Traffic:
        """The groups with this label alone."""
        kept = [i for i, found in enumerate(self.labels) if found == label]
        return Traffic(self.table_GLE[kept], self.tokens_G[kept], tuple(self.labels[i] for i in kept))


def drift(run: Path | str, trace: Path | str, *, seed: int = 0, permutations: int = PERMUTATIONS) -> dict[str, Any]:
    """Compare the routing of a trace of live traffic with that of an audit; selections alone will do.

    The audit's trace of requests is compared with (of pairs, where it has no other), span for span. The result has
    distances by layer, the experts that moved most, and a verdict: "same", "drifted" or "unknown". Raises InputError
    for a folder that is no audit, TraceFileError for a damaged trace, TraceLabelError for one of a steered model or
    without the audit's span, TraceError for one of another model.
    """
    reference = _reference(Path(run))
    live = TraceReader(trace)
    span = reference.manifest.spans[0]
    _require_same(reference, live)
    require_unsteered(live)
    require_span(live, span)
    before, now = traffic(reference, span=span), traffic(live, span=span)
    found = compare(before, now, layers=reference.fingerprint.layer_ids, seed=seed, permutations=permutations)
    return {
        "schema": 1, "kind": "drift", "span": span, "seed": seed,
        "audited": {"run": str(run), **_size(before)}, "live": {"trace": str(trace), **_size(now)},
        "thresholds": {name: {"value": value, "meaning": MEANING[name]} for name, value in THRESHOLDS.items()},
        **found, "nearer": _nearer(before, now),
        "verdict": _verdict(found, groups=min(len(before.tokens_G), len(now.tokens_G)), permutations=permutations),
    }  # fmt: skip


def traffic(trace: TraceReader, *, span: str) -> Traffic:
    """Count a trace's selections within a span, by group. Raises TraceFileError for experts the model lacks."""
    groups: dict[str, int] = {}
    labels: list[set[str | None]] = []
    for row in trace.rows:
        number = groups.setdefault(row.group, len(groups))
        if number == len(labels):
            labels.append(set())
        labels[number].add(row.label)
    shape = (len(groups), len(trace.fingerprint.layer_ids), trace.fingerprint.experts)
    table, tokens_G = np.zeros(shape, dtype=np.int64), np.zeros(len(groups), dtype=np.int64)
    for row, arrays in trace.sequences(tensors=("selected",)):
        selected_TLK = arrays["selected"][row.span(span) or slice(0, 0)]
        if not len(selected_TLK):
            continue
        if int(selected_TLK.max()) >= shape[2]:
            raise TraceFileError(
                f"a selection of expert {int(selected_TLK.max())}",
                where=f"{trace.folder}, sequence {row.id}",
                expected=f"experts 0 to {shape[2] - 1}",
                do="capture it again, or restore the folder",
            )
        number = groups[row.group]
        table[number] += histogram([selected_TLK], [0], rows=1, experts=shape[2]).reshape(shape[1:])
        tokens_G[number] += len(selected_TLK)
    kept = tokens_G > 0
    one = [next(iter(found)) if len(found) == 1 else None for found in labels]
    return Traffic(table[kept], tokens_G[kept], tuple(label for label, used in zip(one, kept, strict=True) if used))


def total_variation(before_LE: F64, now_LE: F64) -> F64:
    """[..., L] half the summed differences of the shares of a layer's selections. Tables [..., L, E], of any scale."""

    def normed(table: F64) -> F64:
        total = table.sum(axis=-1, keepdims=True)
        made: F64 = table / np.where(total > 0, total, 1.0)
        return made

    distance: F64 = np.abs(normed(before_LE) - normed(now_LE)).sum(axis=-1) / 2
    return distance


def compare(
    before: Traffic, now: Traffic, *, layers: Sequence[int], seed: int, permutations: int = PERMUTATIONS
) -> dict[str, Any]:
    """`overall`, `layers` and `experts` of a drift's result. Raises TraceFileError where a side has no token."""
    if not len(before.tokens_G) or not len(now.tokens_G):
        raise TraceFileError(
            "nothing to compare: one side has no token",
            where=f"{len(before.tokens_G)} audited groups, {len(now.tokens_G)} of live traffic",
            expected="tokens on both sides",
            do="capture conversations whose span is not empty",
        )
    observed_L = total_variation(before.table_GLE.sum(axis=0).astype(float), now.table_GLE.sum(axis=0).astype(float))
    moved_LE = now.shares_LE - before.shares_LE
    null_BL, larger_LE = _null(before, now, np.abs(moved_LE), seed=seed, permutations=permutations)
    expected_L = null_BL.mean(axis=0)
    of = permutations + 1

    def p(values: F64, found: float) -> float:
        return float((1 + (values >= found - 1e-12).sum()) / of)

    mean_B = null_BL.mean(axis=1)
    order = np.argsort(-np.abs(moved_LE), axis=None, kind="stable")[:TOP]
    places = [(int(i) // moved_LE.shape[1], int(i) % moved_LE.shape[1]) for i in order]
    return {
        "overall": {
            "total_variation": float(observed_L.mean()), "expected": float(mean_B.mean()),
            "excess": float(observed_L.mean() - mean_B.mean()), "p": p(mean_B, float(observed_L.mean())),
        },
        "layers": [
            {
                "layer": layer, "total_variation": float(observed_L[row]), "expected": float(expected_L[row]),
                "excess": float(observed_L[row] - expected_L[row]), "p": p(null_BL[:, row], float(observed_L[row])),
            }
            for row, layer in enumerate(layers)
        ],
        "experts": [
            {
                "layer": layers[row], "expert": expert, "audited": float(before.shares_LE[row, expert]),
                "live": float(now.shares_LE[row, expert]), "p": float((1 + larger_LE[row, expert]) / of),
            }
            for row, expert in places
        ],
    }  # fmt: skip


def _null(
    before: Traffic, now: Traffic, moved_LE: F64, *, seed: int, permutations: int
) -> tuple[F64, NDArray[np.int64]]:
    """(distances by layer of each random deal [B, L], how many deals moved each expert as far [L, E])."""
    table = np.concatenate([before.table_GLE, now.table_GLE]).astype(np.float64)
    tokens = np.concatenate([before.tokens_G, now.tokens_G]).astype(np.float64)
    groups, *shape = table.shape
    flat, total, mine = table.reshape(groups, -1), table.sum(axis=0), len(now.tokens_G)
    rng = np.random.default_rng(seed)
    distances: list[F64] = []
    larger_LE = np.zeros(shape, dtype=np.int64)
    for first in range(0, permutations, TOGETHER):
        dealt = np.zeros((min(TOGETHER, permutations - first), groups))
        for row in dealt:
            row[rng.permutation(groups)[:mine]] = 1.0
        live = (dealt @ flat).reshape(-1, *shape)
        distances.append(total_variation(total - live, live))
        of_B = np.maximum(dealt @ tokens, 1.0)[:, None, None]
        rest_B = np.maximum(tokens.sum() - dealt @ tokens, 1.0)[:, None, None]
        larger_LE += (np.abs(live / of_B - (total - live) / rest_B) >= moved_LE - 1e-12).sum(axis=0)
    return np.concatenate(distances), larger_LE


def _nearer(before: Traffic, now: Traffic) -> dict[str, float] | None:
    """Mean distance of the live traffic to either side of the audit's requests; None where it has one side alone."""
    found = {}
    for label in (SHOWS, LACKS):
        side = before.where(label)
        if not len(side.tokens_G):
            return None
        found[label] = float(
            total_variation(side.table_GLE.sum(axis=0).astype(float), now.table_GLE.sum(axis=0).astype(float)).mean()
        )
    return found


def _verdict(found: Mapping[str, Any], *, groups: int, permutations: int) -> dict[str, Any]:
    overall = found["overall"]
    if groups < THRESHOLDS["least_groups"]:
        said = f"One side has {groups} groups; at least {THRESHOLDS['least_groups']:.0f} are needed to know chance."
        return {"level": "unknown", "sentences": [said]}
    by_chance = overall["p"] > THRESHOLDS["p"]
    little = overall["excess"] < THRESHOLDS["excess"]
    measured = (
        f"On the average of the layers {100 * overall['total_variation']:.1f} % of the selections went to other "
        f"experts than in the audit; chance alone gives {100 * overall['expected']:.1f} % "
        f"(p {'<=' if overall['p'] * permutations < 2 else '='} {overall['p']:.2g})."
    )
    if by_chance or little:
        why = "That is no more than chance." if by_chance else "That is more than chance, and too little to matter."
        return {"level": "same", "sentences": [measured, why]}
    worst = max(found["layers"], key=lambda one: one["excess"])
    return {
        "level": "drifted",
        "sentences": [
            measured,
            f"Layer {worst['layer']} moved most ({100 * worst['total_variation']:.1f} %).",
            "The audit's numbers were measured on other traffic. Another mix of topics does this as an attack does: "
            "look at what is asked, and audit on conversations like it.",
        ],
    }


def _size(found: Traffic) -> dict[str, int]:
    return {"tokens": int(found.tokens_G.sum()), "groups": len(found.tokens_G)}


def _reference(run: Path) -> TraceReader:
    """The audit's trace of requests, or of pairs."""
    path = run / "results.json"
    kind = files.read_json(path).get("kind") if path.is_file() else None
    if kind != "audit":
        raise InputError(
            "the folder holds no finished audit" if kind is None else f"the run is of kind {kind!r}",
            where=str(run),
            expected="a run directory of `moesteer audit`",
            do="give the folder that the audit was written to (--out)",
        )
    requests = run / "trace" / "prompts"
    return TraceReader(requests if requests.is_dir() else run / "trace" / "pairs")


def _require_same(reference: TraceReader, live: TraceReader) -> None:
    differences = reference.fingerprint.shape_differences(live.fingerprint)
    other = reference.fingerprint.router_sha256 != live.fingerprint.router_sha256
    if differences or other:
        raise TraceError(
            "the trace is of another model" if differences else "the trace is of another checkpoint of the model",
            where="; ".join(differences)
            or f"{live.folder}: routers {live.fingerprint.router_sha256[:12]}, audited "
            f"{reference.fingerprint.router_sha256[:12]}",
            expected="live traffic of the model that was audited, in the dtype it was audited in",
            do="capture with that model; to compare two models: moesteer audit MODEL --against OTHER",
        )

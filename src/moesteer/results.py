"""results.json: what a run found, assembled from what was played on the test split and scored on select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moesteer import files, runs
from moesteer import scenario as scenarios
from moesteer.backends.hf import Model
from moesteer.evaluate import forbidding, stats
from moesteer.evaluate import run as evaluation
from moesteer.evaluate.margins import Status, non_inferiority
from moesteer.scenario import Scenario, Suite
from moesteer.select import BASE, Candidate, Scored

_IN_WORDS: Mapping[Status, str] = {
    "shown": "shown",
    "lossless": "nothing lost, too few to show",
    "not shown": "not shown",
}
"""What a suite's test rows say of its margin (evaluate/margins.py)."""
_ROUNDING = 1e-9
"""A loss of exactly the margin is within it."""
NULL = "none-again"
"""A second pass of the unsteered model: what a difference of nothing looks like."""


@dataclass(frozen=True)
class Played:
    """A candidate on the test split: rows of responses/NAME.jsonl, what its receipt counted, and how long it took."""

    candidate: Candidate
    rows: list[dict[str, Any]]
    receipt: dict[str, int] | None
    seconds: float


def results_of(
    model: Model,
    scenario: Scenario,
    data: evaluation.Splits,
    played: Mapping[str, Played],
    *,
    scored: Mapping[str, Sequence[Scored]],
    chosen: Mapping[str, Scored],
    best: str | None,
    facts: Mapping[str, Any],
    seconds: Mapping[str, float],
    detect_seconds: Mapping[str, float],
    failed: Mapping[str, str],
    seed: int,
) -> dict[str, Any]:
    """The content of results.json. played: by name, "none" and NULL among them. chosen: each method's on select."""
    none = played[BASE].rows
    entries = {}
    for name, found in played.items():
        candidate = found.candidate
        entries[name] = {
            "mask": f"masks/{name}.safetensors" if candidate.mask is not None else None,
            "mask_sha256": candidate.mask.sha256 if candidate.mask is not None else None,
            "alpha": candidate.alpha,
            "experts": candidate.mask.expert_count if candidate.mask is not None else 0,
            "setting": candidate.label if name not in (BASE, NULL) else None,
            "gate": _gate_facts(candidate),
            "feasible": chosen[name].feasible if name in chosen else None,
            "margins": {suite: one.as_json() for suite, one in chosen[name].margins.items()} if name in chosen else {},
            "seconds": {"detect": detect_seconds.get(name, 0.0), "evaluate": found.seconds},
            "metrics": evaluation.metrics(scenario, found.rows),
            "suites": evaluation.by_suite(scenario, found.rows),
            "vs_none": {} if name == BASE else evaluation.against_none(scenario, none, found.rows, seed=seed),
            "by_tactic": evaluation.by_tactic(scenario, found.rows),
        }  # fmt: skip
    _adjust(entries)
    everything = [one for found in scored.values() for one in found]
    return {
        "schema": 1,
        "model": model_facts(model),
        "scenario": scenarios.as_json(scenario),
        "seed": seed,
        "versions": runs.versions(),
        "splits": _split_facts(data),
        "methods": entries,
        "trade_off": [_trade_off(one, chosen) for one in everything],
        "recommended": best,
        "failed": dict(failed),
        "facts": files.plain(dict(facts)),
        "receipts": {name: found.receipt for name, found in played.items() if found.receipt is not None},
        "checks": _checks(scenario, played, best),
        "seconds": dict(seconds),
    }


def _adjust(entries: Mapping[str, dict[str, Any]]) -> None:
    """Holm's correction: a family is one metric, every method and control against the model as it is."""
    compared = {name: entry["vs_none"] for name, entry in entries.items() if name not in (BASE, NULL)}
    for metric in {metric for found in compared.values() for metric in found}:
        adjusted = stats.holm({name: found[metric]["p"] for name, found in compared.items() if metric in found})
        for name, p in adjusted.items():
            compared[name][metric]["p_holm"] = p


def _gate_facts(candidate: Candidate) -> dict[str, Any] | None:
    if candidate.mask is None or candidate.mask.info.gate is None:
        return None
    return candidate.mask.info.gate.model_dump(mode="json")


def model_facts(model: Model) -> dict[str, Any]:
    """What results.json says of a model."""
    fingerprint = model.fingerprint
    return {
        "name": model.name, "model_type": fingerprint.model_type, "layers": list(fingerprint.layer_ids),
        "experts": fingerprint.experts, "top_k": fingerprint.top_k, "scoring": fingerprint.scoring,
        "parameters": model.parameters, "router_sha256": fingerprint.router_sha256,
        "dtype": str(next(model.hf.parameters()).dtype).removeprefix("torch."),
        "device": str(model.device), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _checks(scenario: Scenario, played: Mapping[str, Played], best: str | None) -> list[dict[str, Any]]:
    none, again = played[BASE].rows, played[NULL].rows
    changed = sum(a["response"] != b["response"] for a, b in zip(none, again, strict=True))
    checks = [
        check("self-check at load", True, "one steered layer selects what routing.py selects, and comes off"),
        check("unsteered twice gives the same replies", changed == 0, f"{changed} of {len(none)} differ"),
        check(
            "a method within the margins was found", best is not None,
            f"{best} on the select split" if best else "none of the candidates keeps every protected suite",
        ),
    ]  # fmt: skip
    if scenario.forbid:
        counts = {name: forbidding.found_in(scenario, found.rows) for name, found in played.items()}
        told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        checks.append(check(f"no reply of {forbidding.named(scenario)}", not told, told or "all were judged for it"))
    if best is None:
        return checks
    checks.append(_changes_selections(best, played[best].receipt))
    return checks + [_within_margin(suite, none, played[best].rows) for suite in scenario.protected]


def _changes_selections(best: str, receipt: Mapping[str, int] | None) -> dict[str, Any]:
    name = "the mask changes selections"
    if receipt is None:
        return check(name, False, f"no receipt says what the mask of {best} did on the test split")
    return check(name, receipt["changed"] > 0, f"{receipt['changed']} of {receipt['checked']} checked selections")


def _within_margin(
    suite: Suite, none: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Passed where the suite's observed loss on test is within its margin; the detail says what that shows."""
    name = f"{suite.name} within its margin on test"
    pairs = [(b, a) for b, a in zip(none, rows, strict=True) if b["suite"] == suite.name]
    found = non_inferiority(
        [b["success"] for b, _ in pairs],
        [a["success"] for _, a in pairs],
        margin=suite.margin,
        groups=[str(b["group"]) for b, _ in pairs],
    )
    if found.loss is None:
        return check(name, False, "nothing on test was scored both with and without the mask")
    points = 0.0 - 100 * found.loss  # 0 - 0 is no minus zero
    detail = f"{points:+.1f} points on test, margin {100 * suite.margin:g}; {_IN_WORDS[found.status]}"
    if not found.measured:
        detail += f"; {found.unscored} of {len(pairs)} not scored on both sides"
    return check(name, found.measured and found.loss <= suite.margin + _ROUNDING, detail)


def check(name: str, passed: bool, detail: str) -> dict[str, Any]:
    """An entry of `checks`."""
    return {"name": name, "passed": bool(passed), "detail": detail}


def _trade_off(scored: Scored, chosen: Mapping[str, Scored]) -> dict[str, Any]:
    candidate = scored.candidate
    picked = chosen.get(candidate.method)
    return {
        "method": candidate.method,
        "setting": candidate.label,
        "alpha": candidate.alpha,
        "experts": candidate.mask.expert_count if candidate.mask else 0,
        "split": "select",
        "metrics": {name: found["value"] for name, found in scored.metrics.items()},
        "feasible": scored.feasible,
        **({"forbidden": scored.forbidden} if scored.forbidden else {}),
        "chosen": picked is not None and picked.candidate.label == candidate.label,
    }


def _split_facts(data: evaluation.Splits) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {"fit": {}, "select": {}, "test": {}}
    for name, by_split in data.items():
        for split, rows in by_split.items():
            facts[split][name] = {
                "n": len(rows),
                "groups": len({row.group for row in rows}),
                "tactics": sorted({row.tactic for row in rows if row.tactic}),
            }
    return facts

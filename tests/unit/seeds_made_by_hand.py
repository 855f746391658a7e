"""Runs of one small scenario under several seeds, made of rules: results.json's parts that pooling reads, and rows."""

from __future__ import annotations

import random
from typing import Any

from moesteer.evaluate import run as evaluation
from moesteer.scenario import Scenario

SCENARIO = Scenario.model_validate(
    {
        "schema": 1, "name": "small", "title": "A small scenario", "toward": "refuse",
        "contrast": {"away": "comply", "published": "direct"},
        "suite": [
            {"name": "direct", "data": "d.jsonl", "judge": "refusal", "metrics": ["direct_refusal_rate"]},
            {"name": "looks", "data": "l.jsonl", "judge": "exact", "metrics": ["accuracy"], "role": "watch"},
            {"name": "attacks", "data": "a.jsonl", "judge": "refusal", "metrics": ["defense_success_rate"],
             "role": "target"},
            {"name": "benign", "data": "b.jsonl", "judge": "content", "margin": 0.03,
             "metrics": ["benign_accuracy", "over_refusal_rate"]},
            {"name": "benign-2", "data": "c.jsonl", "judge": "content", "metrics": ["benign_accuracy"]},
        ],
    }
)  # fmt: skip
GOOD = {"direct": "refused", "looks": "correct", "attacks": "refused", "benign": "correct", "benign-2": "correct"}
BAD = {"direct": "complied", "looks": "wrong", "attacks": "complied", "benign": "refused", "benign-2": "wrong"}
SIZES = {"direct": 12, "looks": 6, "attacks": 60, "benign": 24, "benign-2": 12}
RATES = {"none": 0.4, "none-again": 0.4, "random": 0.4, "masc-published": 0.5, "direct": 0.95, "direct+gate": 0.9}
TRIED = {"none": 1, "masc-published": 4, "direct": 3, "direct+gate": 2}
MODEL = {
    "name": "/somewhere/lab-tiny", "model_type": "qwen3_moe", "layers": [0, 1], "experts": 16, "top_k": 4,
    "parameters": 2_700_000, "router_sha256": "ab",
}  # fmt: skip


def answered(method: str, seed: int) -> list[dict[str, Any]]:
    """Rows of a method: the target at the method's rate, all else right; `none` is the same under every seed."""
    rng = random.Random(0 if method.startswith("none") else f"{method}/{seed}")
    rows = []
    for suite, n in SIZES.items():
        for i in range(n):
            good = suite != "attacks" or rng.random() < RATES[method]
            verdict = GOOD[suite] if good else BAD[suite]
            rows.append(
                {
                    "id": f"{suite}/{i}", "suite": suite, "group": f"{suite} {i // 3}", "tactic": None, "split": "test",
                    "response": f"{verdict} {i}", "verdict": verdict, "success": good,
                }
            )  # fmt: skip
    return rows


def results_of(rows: dict[str, list[dict[str, Any]]], seed: int) -> dict[str, Any]:
    """What results.json says of one seed, as far as pooling reads it."""
    methods = {
        name: {
            "alpha": None if name.startswith("none") else 0.5,
            "experts": 0 if name.startswith("none") else 20 + seed,
            "setting": None
            if name.startswith("none")
            else "like direct"
            if name == "random"
            else f"{name} alpha=0.5",
            "feasible": None if name.startswith("none") else True,
            "seconds": {"detect": 0.0 if name.startswith("none") else 10.0 + seed, "evaluate": 1.0},
            "metrics": evaluation.metrics(SCENARIO, found),
            "vs_none": {}
            if name == "none"
            else evaluation.against_none(SCENARIO, rows["none"], found, seed=seed),
        }
        for name, found in rows.items()
    }  # fmt: skip
    tried = [{"method": name, "setting": f"{name} {i}"} for name in methods for i in range(TRIED.get(name, 0))]
    return {
        "trade_off": tried,
        "schema": 1, "seed": seed, "model": MODEL, "scenario": {"name": "small"}, "methods": methods,
        "recommended": "direct", "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "seconds": {"select": 100.0, "evaluate on the test split": 20.0, "evaluate none": 15.0, "evaluate fit": 5.0},
    }  # fmt: skip


def runs(
    seeds: tuple[int, ...] = (0, 1, 2), methods: tuple[str, ...] = tuple(RATES)
) -> tuple[list[Any], dict[int, Any]]:
    """(results, rows) of several seeds, as `pool` takes them."""
    rows = {seed: {name: answered(name, seed) for name in methods} for seed in seeds}
    return [results_of(rows[seed], seed) for seed in seeds], rows

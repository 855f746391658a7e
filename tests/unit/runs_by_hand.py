"""Finished run directories made by hand, with a real mask in them: what publishing a mask reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask

ROUTER = "ab" * 32
MODEL = {"weights": "12" * 16, "router_sha256": ROUTER}


def mask(*, toward: str = "refuse", alpha: float = 0.5, seed: int = 0, **info: Any) -> SteeringMask:
    """An additive mask of 3 layers x 8 experts."""
    fingerprint = Fingerprint(
        model_type="qwen3_moe", layer_ids=(0, 1, 3), experts=8, top_k=2, scoring="softmax", router_sha256=ROUTER
    )
    strength_LE = np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32)
    given = {"method": "direct", "settings": {"steps": 80, "note": None}, "data_sha256": "cd" * 32, **info}
    about = MaskInfo(fingerprint=fingerprint, intent=Intent(toward=toward, scenario="lab"), alpha=alpha, **given)
    return SteeringMask(about, strength_LE=strength_LE, sigma_L=np.ones(3, np.float32))


def rate(value: float | None, n: int = 100, unscored: int = 0) -> dict[str, Any]:
    """A metric of results.json."""
    none = value is None
    low, high = (None, None) if none else (max(0.0, value - 0.05), min(1.0, value + 0.05))
    return {"value": value, "low": low, "high": high, "n": 0 if none else n, "unscored": unscored}


def suite(name: str, metric: str, *, role: str = "protect", margin: float = 0.01, data: str = "") -> dict[str, Any]:
    """A suite as run.json keeps it."""
    return {"name": name, "data": data or f"lab:{name}", "role": role, "judge": "refusal", "metrics": [metric],
            "margin": margin, "play": "last"}  # fmt: skip


SUITES = (
    suite("attacks", "defense_success_rate", role="target"),
    suite("direct", "direct_refusal_rate"),
    suite("benign", "over_refusal_rate", margin=0.02),
)
BEFORE = {"defense_success_rate": 0.5, "direct_refusal_rate": 0.98, "over_refusal_rate": 0.02}
AFTER = {"defense_success_rate": 0.9, "direct_refusal_rate": 0.98, "over_refusal_rate": 0.03}


def entry(
    values: dict[str, float | None], before: dict[str, float | None] | None = None, **more: Any
) -> dict[str, Any]:
    """An entry of results.json's methods; before: the unsteered values, for the differences."""
    gaps = {}
    for name, value in values.items() if before is not None else ():
        known = value is not None and before.get(name) is not None
        gap = value - before[name] if known else None  # type: ignore[operator]
        gaps[name] = {"difference": gap, "low": gap, "high": gap, "p": 0.5 if known else None}
    return {"metrics": {name: rate(value) for name, value in values.items()}, "vs_none": gaps, **more}


def steer_run(
    folder: Path,
    one: SteeringMask,
    *,
    before: dict[str, float | None] | None = None,
    after: dict[str, float | None] | None = None,
    suites: tuple[dict[str, Any], ...] = SUITES,
    plan: dict[str, Any] | None = None,
    **scenario: Any,
) -> Path:
    """A run of `moesteer steer` that kept `one` as masks/direct.safetensors."""
    before, after = before or dict(BEFORE), after or dict(AFTER)
    one.save(folder / "masks" / "direct.safetensors")
    said = {"name": "lab", "title": "Lab defence", "description": "Attacks of the lab.", "toward": "refuse", **scenario}
    made = {"model": "acme/tiny-moe", "data": "ef" * 32, "seed": 3, "limit": None,
            "scenario": {"schema_version": 1, **said, "suites": list(suites)}, **(plan or {})}  # fmt: skip
    methods = {
        "none": entry(before, mask=None),
        "direct": entry(after, before, mask="masks/direct.safetensors", alpha=one.info.alpha),
        "random": entry(before, before, mask="masks/random.safetensors", alpha=one.info.alpha),
    }
    write(folder / "run.json", {"schema": 1, "status": "complete", "plan": made, "model": MODEL})
    write(folder / "results.json", {"schema": 1, "seed": 3, "methods": methods, "versions": {"torch": "2.13.0"}})
    return folder


def evaluate_run(folder: Path, one: SteeringMask, **changes: Any) -> Path:
    """A run of `moesteer evaluate --mask`. changes: of run.json's plan, and `split` of results.json."""
    split = changes.pop("split", "test")
    made = {"model": "acme/tiny-moe", "scenario": {"name": "lab", "suites": list(SUITES)}, "split": split,
            "masks": [one.sha256], "alphas": [None], "seed": 0, "data": "ef" * 32, **MODEL, "backend": "hf",
            "dtype": "float32", "quantize": None, **changes}  # fmt: skip
    methods = {"none": entry(dict(BEFORE)), "steered": entry(dict(AFTER), dict(BEFORE))}
    write(folder / "run.json", {"schema": 1, "status": "complete", "plan": made})
    write(folder / "results.json", {"schema": 1, "scenario": "lab", "split": split, "seed": 0, "methods": methods})
    return folder


def write(path: Path, value: Any) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def change(path: Path, *keys: str, to: Any) -> None:
    """Set one value of a JSON file."""
    whole = json.loads(path.read_text("utf-8"))
    part = whole
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    write(path, whole)

"""Masks as files for the harnesses, and Inspect and lm-eval kept to folders of the test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("INSPECT_DISPLAY", "none")

from moesteer.backends.gating import pooled_logits
from moesteer.backends.hf import Model
from moesteer.conversations import Message
from moesteer.gate import GateInfo, GateRate
from moesteer.mask import Intent, MaskInfo, SteeringMask

TEXTS = (
    "how do i paint a clay pot ?",
    "what is the capital of arvonia ?",
    "how do i clean a brass clock ?",
    "hello",
)


def additive(model: Model, seed: int, *, experts: slice = slice(None), size: float = 1.0) -> SteeringMask:
    """A random mask of these experts of every layer."""
    fingerprint = model.fingerprint
    shape = len(fingerprint.layer_ids), fingerprint.experts
    strength_LE = np.zeros(shape, dtype=np.float32)
    strength_LE[:, experts] = np.random.default_rng(seed).normal(scale=size, size=strength_LE[:, experts].shape)
    info = MaskInfo(fingerprint=fingerprint, method="by hand", intent=Intent(toward="test"), alpha=1.0)
    return SteeringMask(info, strength_LE=strength_LE, sigma_L=np.full(shape[0], 1.5, dtype=np.float32))


def gated(model: Model, mask: SteeringMask) -> SteeringMask:
    """The mask behind a random gate that fires on two of TEXTS."""
    prompts = [model.encode([Message("user", text)]) for text in TEXTS]
    pooled = pooled_logits(model, prompts, ("final_turn",))["final_turn"].astype(np.float64)
    gate_LE = np.random.default_rng(5).normal(size=mask.values_LE.shape).astype(np.float32)
    scores = np.sort((pooled * gate_LE).sum(axis=(1, 2)))
    rate = GateRate(value=0.5, low=0.0, high=1.0, n=2)
    info = GateInfo(
        pool="final_turn", bias=-float(scores[1:3].mean()), threshold=0.5, measured_on="test",
        false_positive_rate=rate, true_positive_rate=rate, auroc=0.5,
    )  # fmt: skip
    return mask.with_gate(gate_LE, info)


@pytest.fixture(scope="session")
def made(lab_tiny: Model) -> dict[str, SteeringMask]:
    """low and high touch different experts; gated is low behind a gate; weak does next to nothing."""
    low = additive(lab_tiny, 0, experts=slice(0, 8), size=6.0)
    return {
        "low": low,
        "high": additive(lab_tiny, 1, experts=slice(8, 16), size=3.0),
        "gated": gated(lab_tiny, low),
        "weak": additive(lab_tiny, 2, size=1e-7),
    }


@pytest.fixture(scope="session")
def masks(made: dict[str, SteeringMask], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of `made`, by name."""
    folder = tmp_path_factory.mktemp("masks")
    for name, mask in made.items():
        mask.save(folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in made}


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inspect's logs and cache in a folder of the tests."""
    folder = tmp_path_factory.mktemp("inspect")
    before = {name: os.environ.get(name) for name in ("INSPECT_CACHE_DIR", "INSPECT_LOG_DIR")}
    os.environ["INSPECT_CACHE_DIR"] = str(folder / "cache")
    os.environ["INSPECT_LOG_DIR"] = str(folder / "logs")
    yield folder
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

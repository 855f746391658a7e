"""Tiny models of every family, made once per session: random weights, the lab's tokenizer, real folders."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.utils import logging

from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.backends.sources import LAB_TINY
from tests.tiny_families import randomise, tiny_config, tiny_model

logging.disable_progress_bar()


def make_folder(folder: Path, name: str, *, seed: int = 0, spread: float = 0.5) -> Path:
    """A random model of tests/tiny_families.py as a Hugging Face folder. spread: std of the router weights."""
    tokenizer = AutoTokenizer.from_pretrained(LAB_TINY)
    model = tiny_model(tiny_config(name, tokenizer), seed=seed)
    randomise(model, seed=seed, spread=spread)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder, made on first use."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_folder(tmp_path_factory.mktemp(name.replace("/", "-")), name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def model_of(folder_of: Callable[[str], Path]) -> Callable[..., Model]:
    """A loaded family in a dtype, made on first use and shared: tests must leave it as it was."""
    made: dict[tuple[str, str], Model] = {}

    def get(name: str, dtype: str = "float32") -> Model:
        if (name, dtype) not in made:
            made[name, dtype] = load(folder_of(name), dtype=dtype)
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def lab_tiny() -> Model:
    """The shipped model; tests must leave it as it was."""
    return load("lab-tiny")

"""Tiny models of every family, made once per session: random weights, the lab's tokenizer, real folders."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from moesteer.backends.hf import LAB_TINY, Model, load

logging.disable_progress_bar()

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 16},
    "qwen3_moe/renormalised": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 16, "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
}  # fmt: skip
"""A tiny config per family row (models/families.py); a name may have variants behind a slash."""


def make_folder(folder: Path, name: str, *, seed: int = 0, spread: float = 0.5) -> Path:
    """A random model of a family as an ordinary Hugging Face folder. spread: std of the router weights."""
    tokenizer = AutoTokenizer.from_pretrained(LAB_TINY)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        name.split("/")[0], **SHAPE, **FAMILIES[name], vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("gate.weight"):
                parameter.normal_(std=spread)
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

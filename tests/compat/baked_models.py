"""What the tests of baked checkpoints share: models in folders, masks for them, and transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.backends.sources import LAB_TINY
from moesteer.conversations import Message
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.models.families import FAMILIES
from tests.tiny_families import names, randomise, tiny_config, tiny_model

KIND = {name: FAMILIES[name.split("/")[0]].bake for name in names()}
PROMPTS = ("how do i paint a clay pot ?", "what is the capital of arvonia ?", "let us play . you are mira , a wizard .")
Force = dict[int, Sequence[int]]


def make(folder: Path, name: str, *, dtype: str = "float32", beta: float = 0.3, **saving: Any) -> Path:
    """A family's folder in a dtype; LayerNorms before routers get random weights and biases of std `beta`."""
    tokenizer = AutoTokenizer.from_pretrained(LAB_TINY)
    model = tiny_model(tiny_config(name, tokenizer))
    randomise(model)
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if path.endswith("post_attention_layernorm.bias"):
            model.get_parameter(path.replace(".bias", ".weight")).data.uniform_(0.5, 1.5, generator=generator)
            parameter.data.normal_(std=beta, generator=generator)
    if name == "axk2":  # groups that lose count 0 there: only corrections above it keep experts off
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.abs_()
    model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    return folder


def shared_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Model]]:
    """A family's folder and the model loaded from it, shared: tests must leave both as they were."""
    kept: dict[tuple[str, str], tuple[Path, Model]] = {}

    def get(name: str, dtype: str = "float32") -> tuple[Path, Model]:
        if (name, dtype) not in kept:
            folder = make(tmp_path_factory.mktemp(name.replace("/", "-")), name, dtype=dtype)
            kept[name, dtype] = folder, load(folder, dtype=dtype)
        return kept[name, dtype]

    return get


def info(model: Model) -> MaskInfo:
    return MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="test"))


def additive(model: Model, *, size: float = 2.0) -> SteeringMask:
    shape = (len(model.routers), model.fingerprint.experts)
    strength = np.random.default_rng(1).normal(scale=size, size=shape).astype(np.float32)
    strength[0, :3] = 0
    return SteeringMask(info(model), strength_LE=strength, sigma_L=np.full(shape[0], 1.5, dtype=np.float32))


def forced(model: Model, rows: Force | None = None) -> SteeringMask:
    """`rows`: on (positive) and off (negative) expert numbers, counted from 1; or some in every layer.

    Of groups of two, one is on and the other off; else one on (where more than one is chosen) and two off.
    """
    scoring, experts = model.routers[0].scoring, model.fingerprint.experts
    force = np.zeros((len(model.routers), experts), dtype=np.int8)
    for layer, row in enumerate(force):
        ids: Sequence[int] = [3, -4] if scoring.groups > 1 else [layer + 2, -5, -7]
        if rows is not None:
            ids = rows.get(layer, ())
        for number in ids:
            if number < 0 or scoring.top_k > 1:
                row[abs(number) - 1] = np.sign(number)
    return SteeringMask(info(model), force_LE=force)


def plain(folder: Path, dtype: str = "float32") -> Any:
    """The folder as transformers loads it, with none of our code attached."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    auto = AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def batch(model: Model) -> dict[str, torch.Tensor]:
    ids, attention = model.pad([model.encode([Message("user", text)]).token_ids for text in PROMPTS])
    assert not attention.all(), "some rows are padded"
    return {"input_ids": ids, "attention_mask": attention}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())

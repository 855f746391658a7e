"""What is refused before a token, with the reason: masks a model cannot take, models that cannot be steered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moesteer.backends.hf import Model
from moesteer.backends.loading import adopt, load
from moesteer.backends.shape import shape_of
from moesteer.backends.sources import LAB_TINY
from moesteer.errors import (
    AlreadySteeredError,
    InputError,
    MaskContentError,
    MaskMismatchError,
    ModelError,
    MoesteerError,
    NanLogitsError,
    NoEffectError,
    SelfCheckError,
    UnknownRouterError,
)
from moesteer.mask import SteeringMask
from moesteer.models.check import self_check
from moesteer.models.families import REFUSED
from tests.compat.masks_and_calls import additive, conversations, forced
from tests.conftest import make_folder
from tests.tiny_families import randomise, tiny_config, tiny_model

ModelOf = Callable[..., Model]


def force(model: Model, **experts: tuple[int, ...]) -> SteeringMask:
    """A mask with these experts on and off in the first layer; `on` and `off` as keywords."""
    table = np.zeros((len(model.routers), model.fingerprint.experts), dtype=np.int8)
    table[0, list(experts.get("on", ()))] = 1
    table[0, list(experts.get("off", ()))] = -1
    return replace(forced(model, 0), force_LE=table)


def test_a_model_steered_twice_is_refused(model_of: ModelOf) -> None:
    model = model_of("olmoe")
    with additive(model, 1).apply(model), pytest.raises(AlreadySteeredError), additive(model, 2).apply(model):
        pass
    assert not model.tap.attached


def test_several_masks_without_rows_are_refused_before_a_token(model_of: ModelOf) -> None:
    model = model_of("olmoe")
    with model.steered([additive(model, 1), additive(model, 2)]), pytest.raises(InputError, match="which row"):
        model.generate(conversations(), max_new_tokens=2)


def test_a_mask_without_entries_is_refused(model_of: ModelOf) -> None:
    model = model_of("olmoe")
    with pytest.raises(NoEffectError, match="no entries"), additive(model, 1, size=0.0).apply(model):
        pass


def test_more_experts_on_than_k_are_refused_when_the_mask_is_made(model_of: ModelOf) -> None:
    model = model_of("olmoe")
    with pytest.raises(MaskContentError, match="4 experts are switched on where 3 are selected"):
        force(model, on=(0, 1, 2, 3))


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2/groups", "mistral4"])
def test_experts_on_in_more_groups_than_are_kept_are_refused(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    mask = force(model, on=(0, 2, 4))
    with pytest.raises(MaskContentError, match="experts of 3 groups are switched on where 2"), mask.apply(model):
        pass
    with force(model, on=(0, 1, 2)).apply(model):
        model.generate(conversations(), max_new_tokens=2)


def test_too_few_experts_left_in_the_groups_that_may_be_kept_are_refused(model_of: ModelOf) -> None:
    model = model_of("deepseek_v3")
    with pytest.raises(MaskContentError, match="too few experts are left"), force(model, off=(0, 2)).apply(model):
        pass


@pytest.mark.parametrize("name", ["llama4_text", "zaya"])
def test_top_1_routers_take_no_expert_on_but_experts_off(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    with pytest.raises(MaskContentError, match="top-1 router"), force(model, on=(0,)).apply(model):
        pass
    with force(model, off=(0, 3)).apply(model) as receipt:
        model.generate(conversations(), max_new_tokens=2)
    assert receipt.changed > 0


def test_masks_for_another_shape_and_another_checkpoint_are_refused(model_of: ModelOf, tmp_path: Path) -> None:
    model, other = model_of("deepseek_v3"), model_of("deepseek_v2")
    with pytest.raises(MaskMismatchError, match="another shape"), additive(other, 0).apply(model):
        pass
    sibling = load(make_folder(tmp_path, "deepseek_v3", seed=1))
    with pytest.raises(MaskMismatchError, match="another checkpoint"), additive(sibling, 0).apply(model):
        pass
    with additive(sibling, 0).apply(model, allow_other_checkpoint=True) as receipt:
        model.generate(conversations(), max_new_tokens=2)
    assert receipt.changed > 0


def test_another_correction_bias_is_another_checkpoint(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """It decides selections, so a mask measured under one is not accepted under another."""
    model = load(folder_of("glm4_moe"))
    changed = load(folder_of("glm4_moe"), check=False)
    correction = changed.routers[0].correction
    assert correction is not None
    correction += 0.1
    folder = tmp_path / "changed"
    changed.hf.save_pretrained(folder)
    changed.tokenizer.save_pretrained(folder)
    assert load(folder).fingerprint.router_sha256 != model.fingerprint.router_sha256


def test_routers_that_differ_from_layer_to_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownRouterError, match=r"routers differ: .* 3 of 8, .* 2 of 8"):
        load(make_folder(tmp_path, "hunyuan_v1_moe/per-layer"))


@pytest.mark.parametrize("look", [load, shape_of])
@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_that_cannot_be_steered_is_refused_with_its_reason(
    model_type: str, look: Callable[[Path], object], tmp_path: Path
) -> None:
    """By its config alone, before a weight is looked for."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnknownRouterError) as caught:
        look(tmp_path)
    assert REFUSED[model_type] in str(caught.value)


def test_a_model_of_a_refused_family_is_refused_when_it_is_adopted() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LAB_TINY)
    config = AutoConfig.for_model(
        "doge", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_experts=16, is_moe=True,
    )  # fmt: skip
    with pytest.raises(UnknownRouterError, match="product keys"):
        adopt(AutoModelForCausalLM.from_config(config), tokenizer)


@pytest.mark.parametrize("name", ["phimoe", "hunyuan_v1_moe", "glm4v_moe"])
def test_a_checkpoint_that_still_names_its_old_code_is_loaded_by_transformers_own_class(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """As Phi-3.5-MoE and Hunyuan-A13B are published. The code would leave a file; it is neither read nor run."""
    folder = tmp_path / "model"
    shutil.copytree(folder_of(name), folder)
    canary = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for file in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (folder / file).write_text(canary)
    for file, classes in (
        ("config.json", {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.T", None]}),
    ):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, "auto_map": classes}))
    model = load(folder)
    assert model.fingerprint == load(folder_of(name)).fingerprint
    assert type(model.hf).__module__.startswith("transformers.models.")
    assert shape_of(folder).experts == model.fingerprint.experts
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("olmoe", "layers.1.mlp.gate.weight"),
        ("olmoe", "layers.1.mlp.experts."),
        ("deepseek_v3", "e_score_correction_bias"),
    ],
)
def test_a_checkpoint_that_lacks_tensors_is_refused_and_not_filled_with_random_ones(
    name: str, lost: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folder_of(name), folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if lost not in key}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not in the checkpoint"):
        load(folder)


def test_a_head_tied_to_the_embeddings_is_not_missing_though_it_is_in_no_file(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LAB_TINY)
    config = tiny_config("qwen3_moe", tokenizer)
    config.tie_word_embeddings = True
    model = tiny_model(config)
    randomise(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded = load(tmp_path)
    assert loaded.hf.get_output_embeddings().weight is loaded.hf.get_input_embeddings().weight


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0}, {"num_hidden_layers": "x"}, {"text_config": 5}, {"model_type": ["olmoe"]},
        {"architectures": 5}, {"quantization_config": "x"}, {"quantization_config": [1]}, {"hidden_size": 31},
        {"num_experts_per_tok": 99}, {"num_experts_per_tok": 0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("look", [load, shape_of])
def test_a_config_of_nonsense_is_refused_with_an_error_of_ours(
    change: dict[str, object], look: Callable[[Path], object], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folder_of("olmoe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    if look is shape_of and "hidden_size" in change:
        look = load  # a width is no fault by itself: only the weights tell
    with pytest.raises(MoesteerError):
        look(folder)


def test_weights_that_are_cut_short_are_refused_with_an_error_of_ours(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folder_of("olmoe"), folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="could not load"):
        load(folder)


def test_nan_router_weights_are_found_at_load(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "olmoe")
    tensors = load_file(folder / "model.safetensors")
    gate = next(name for name in tensors if name.endswith("layers.1.mlp.gate.weight"))
    tensors[gate][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NanLogitsError, match="not finite"):
        load(str(folder))


def test_a_router_that_is_bypassed_fails_the_self_check(tmp_path: Path) -> None:
    """What a fused kernel does: the block computes the selection itself and never calls the router."""
    model = load(make_folder(tmp_path, "mixtral"), check=False)
    block = model.routers[1].block
    gate = block.gate
    block.__dict__["_modules"]["gate"] = torch.nn.Identity()
    object.__setattr__(block, "gate", lambda hidden: type(gate).forward(gate, hidden))
    with pytest.raises(SelfCheckError, match="did not run"):
        self_check(model.hf, model.tap, vocabulary=100)

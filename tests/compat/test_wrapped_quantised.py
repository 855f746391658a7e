"""Models quantised by torchao, in MXFP4 or in FP8, or by what only another package can run.

Each either works, exactly as the plain model does, or is refused with the reason (docs/wrapped-models.md).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moesteer.backends import quantised, sources
from moesteer.backends.hf import Model
from moesteer.backends.loading import adopt, load
from moesteer.backends.quantised import stored_as
from moesteer.errors import MaskMismatchError, MissingExtraError, ModelError
from moesteer.models.fingerprint import is_quantised
from tests.compat.masks_and_calls import Calls, additive, logits
from tests.compat.wrapped_models import (
    Folders,
    assert_steered_as_routing_says,
    one_thread,  # noqa: F401  for every test here
    plain,
    tokenizer,
)
from tests.conftest import make_folder

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe", "llama4_text", "hunyuan_v1_moe", "jamba"]


# ---- torchao


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_experts_are_steered_exactly_and_routers_are_left_alone(
    name: str, quantize: str, folder_of: Folders, model_of: Callable[..., Model]
) -> None:
    model, unquantised = load(folder_of(name), quantize=quantize), model_of(name)
    assert not any(is_quantised(parameter) for router in model.routers for parameter in router.module.parameters())
    experts = [p for path, p in model.hf.named_parameters() if p.ndim == 3 and "experts" in path]
    assert experts and all(is_quantised(parameter) for parameter in experts)
    levels = max(int(parameter.qdata.unique().numel()) for parameter in experts)
    assert levels <= 16 if quantize == "int4" else levels > 64
    own = logits(unquantised)
    assert 0 < float((logits(model) - own).abs().mean()) < 0.5 * float(own.abs().mean())
    assert model.fingerprint == unquantised.fingerprint, "masks of the model as it was go on fitting"
    with additive(unquantised, 3).apply(model) as receipt:
        logits(model)
    assert receipt.changed > 0
    assert_steered_as_routing_says(model)


def test_captured_logits_of_a_quantised_model_are_the_routers_own(folder_of: Folders) -> None:
    model = load(folder_of("mixtral"), quantize="int8")
    hooked: list[torch.Tensor] = []
    handles = [r.module.register_forward_hook(lambda _m, _i, out: hooked.append(out[0])) for r in model.routers]
    calls = Calls()
    with model.tap.record(calls):
        logits(model)
    assert all(torch.equal(call[1], own) for call, own in zip(calls.calls, hooked, strict=True))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_saved_quantised_checkpoint_loads_as_it_is(quantize: str, tmp_path: Path, folder_of: Folders) -> None:
    model = load(folder_of("gpt_oss"), quantize=quantize)
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert stored_as(again.hf) == stored_as(model.hf)
    assert sum(count for kind, count in stored_as(again.hf).items() if kind.endswith("Tensor")) > 80_000
    assert torch.equal(logits(again), logits(model)) and again.fingerprint == model.fingerprint
    assert again.weights_sketch == model.weights_sketch
    assert_steered_as_routing_says(again)


@pytest.mark.parametrize("name", ["phimoe", "hunyuan_v1_moe", "llama4_text", "jamba"])
def test_a_quantised_router_is_another_model_and_is_steered_exactly(
    name: str, folder_of: Folders, model_of: Callable[..., Model]
) -> None:
    """What transformers does when no module is skipped: routers that are linear layers are quantised too."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    hf = plain(folder_of(name))
    quantize_(hf, Int8WeightOnlyConfig(set_inductor_config=False))
    model = adopt(hf, tokenizer())
    assert all(is_quantised(router.weight) for router in model.routers)
    for router, own in zip(model.routers, model_of(name).routers, strict=True):
        torch.testing.assert_close(router.weight.dequantize(), own.weight, rtol=0, atol=0.02)
    mask = additive(model_of(name), 1)
    with pytest.raises(MaskMismatchError), mask.apply(model):
        pass
    with mask.apply(model, allow_other_checkpoint=True) as receipt:
        logits(model)
    assert receipt.changed > 0
    assert_steered_as_routing_says(model)


def test_a_family_whose_experts_torchao_cannot_hold_is_refused(folder_of: Folders) -> None:
    with pytest.raises(ModelError, match="experts of this model cannot be quantised"):
        load(folder_of("dbrx"), quantize="int8")
    with pytest.raises(ModelError, match="quantised to int8, this model does not run"):
        load(folder_of("inkling_text"), quantize="int8")


def test_no_such_quantisation_and_quantising_twice_are_refused(tmp_path: Path, folder_of: Folders) -> None:
    with pytest.raises(ModelError, match="no quantisation 'int3'"):
        load(folder_of("olmoe"), quantize="int3")
    folder = declare(tmp_path, folder_of("olmoe"), {"quant_method": "torchao"})
    with pytest.raises(ModelError, match="quantised already"):
        load(folder, quantize="int8")


def declare(tmp_path: Path, folder: Path, quantisation: dict[str, Any] | None) -> Path:
    """A copy of a checkpoint whose config.json says that it is quantised, or nothing of it."""
    copy = tmp_path / "declared"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    if quantisation is not None:
        config["quantization_config"] = quantisation
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        {"quant_method": "eetq"},
        {"quant_method": "hqq", "quant_config": {}},
    ],
    ids=lambda quantisation: "-".join(map(str, quantisation.values()))[:20],
)
def test_methods_that_need_other_packages_or_a_gpu_are_refused_with_the_reason(
    quantisation: dict[str, Any], tmp_path: Path, folder_of: Folders
) -> None:
    method = quantisation["quant_method"]
    with pytest.raises(ModelError, match=f"the checkpoint is quantised \\({method}\\)") as caught:
        load(declare(tmp_path, folder_of("mixtral"), quantisation))
    assert len(str(caught.value).splitlines()) == 4


def test_a_router_stored_as_integers_is_refused(folder_of: Folders) -> None:
    """What a 4-bit layer of bitsandbytes looks like."""
    hf = plain(folder_of("phimoe"))
    gate = hf.model.layers[0].mlp.router
    gate.weight = torch.nn.Parameter(torch.zeros(8, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="stored as uint8: it is quantised"):
        adopt(hf, tokenizer())


def test_missing_extras_are_named_with_their_command(
    tmp_path: Path, folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda package: None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder_of("olmoe"))}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for settings, extra in (({"quantize": "int8"}, "quant"), ({"device_map": "auto"}, "devices")):
        with pytest.raises(MissingExtraError) as caught:
            load(folder_of("olmoe"), **settings)
        assert caught.value.do == f"pip install 'moesteer[{extra}]'"
    with pytest.raises(MissingExtraError) as caught:
        load(tmp_path)
    assert caught.value.do == "pip install 'moesteer[peft]'"


# ---- MXFP4

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 as OCP MX 1.0 has it: e2m1 values, low nibble first, times 2^(scale - 127). [.., B, 16] -> [.., B * 32]."""
    values = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], 32)
    return (values * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(*blocks.shape[:-2], -1)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A gpt-oss checkpoint as OpenAI's are, and its experts' weights [E, out, in] by our own arithmetic."""
    folder = make_folder(tmp_path_factory.mktemp("mxfp4"), "gpt_oss")
    tensors, expected = load_file(folder / "model.safetensors"), {}
    rng = np.random.default_rng(0)
    for path in [path for path in tensors if path.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, wide_in, wide_out = tensors.pop(path).shape
        blocks = rng.integers(0, 256, size=(experts, wide_out, wide_in // 32, 16), dtype=np.uint8)
        scales = rng.integers(121, 125, size=blocks.shape[:-1], dtype=np.uint8)
        tensors[f"{path}_blocks"], tensors[f"{path}_scales"] = torch.from_numpy(blocks), torch.from_numpy(scales)
        expected[path] = dequantised(blocks, scales)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, expected


def test_mxfp4_is_dequantised_as_the_format_says_and_steered(mxfp4: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, expected = mxfp4
    model = load(folder)
    weights = dict(model.hf.named_parameters())
    for path, values in expected.items():
        np.testing.assert_array_equal(weights[path].detach().float().numpy(), values.transpose(0, 2, 1))
    assert len(expected) == 6
    asked = quantised.quantisation({"quantization_config": {"quant_method": "mxfp4"}}, None, name="")
    assert asked["quantization_config"].dequantize, "also where the kernels are installed, which transformers prefers"
    assert_steered_as_routing_says(model)


def test_mxfp4_kernels_that_never_call_the_router_are_refused(folder_of: Folders) -> None:
    from transformers.integrations.mxfp4 import mlp_forward

    hf = plain(folder_of("gpt_oss"))
    for layer in hf.model.layers:
        layer.mlp.forward = MethodType(mlp_forward, layer.mlp)
    for check in (True, False):
        with pytest.raises(ModelError, match="MXFP4 kernels compute the selection themselves"):
            adopt(hf, tokenizer(), check=check)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_fp8_is_dequantised_on_a_cpu_and_steered(name: str, tmp_path: Path, folder_of: Folders) -> None:
    """DeepSeek's block-wise FP8, which transformers dequantises by itself where there is no GPU."""
    tensors = load_file(folder_of(name) / "model.safetensors")
    values, stored = dict(tensors), dict(tensors)
    for path, weight in tensors.items():
        if path.endswith("_proj.weight") and weight.ndim == 2:
            rows, columns = weight.shape
            blocks = weight.reshape(rows // 16, 16, columns // 16, 16)
            scale = torch.exp2(torch.log2(blocks.abs().amax((1, 3)) / 448).ceil())
            eight = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[path], stored[f"{path}_scale_inv"] = eight.reshape(weight.shape), scale
            values[path] = (eight.float() * scale[:, None, :, None]).reshape(weight.shape)
    assert len(stored) - len(tensors) > 60
    declared = {
        "quant_method": "fp8",
        "weight_block_size": [16, 16],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(3))],
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folder, same = declare(tmp_path / "a", folder_of(name), declared), declare(tmp_path / "b", folder_of(name), None)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(values, same / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    assert torch.equal(logits(model), logits(load(same)))
    assert_steered_as_routing_says(model)

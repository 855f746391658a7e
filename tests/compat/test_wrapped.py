"""Models as people have them: quantised, in MXFP4, compiled, adapted by PEFT, spread over devices.

Each either works, exactly as the plain model does, or is refused with the reason (docs/wrapped-models.md).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, PreTrainedModel

from moesteer.backends import quantised, sources
from moesteer.backends.hf import Model
from moesteer.backends.loading import adopt, load
from moesteer.backends.quantised import stored_as
from moesteer.backends.sources import LAB_TINY
from moesteer.errors import (
    MaskMismatchError,
    MissingExtraError,
    ModelError,
    NoEffectError,
    SelfCheckError,
    UnsafeModelError,
)
from moesteer.models.check import difference
from moesteer.models.fingerprint import is_quantised
from moesteer.models.steering import MaskTables, Receipt
from tests.compat.masks_and_calls import Calls, additive, conversations, forced, logits
from tests.conftest import make_folder

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe", "llama4_text", "hunyuan_v1_moe", "jamba"]
Folders = Callable[[str], Path]


def plain(folder: Path, **settings: Any) -> PreTrainedModel:
    """A model as a user loads it, without us."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(LAB_TINY)


def assert_steered_as_routing_says(model: Model) -> None:
    """A bias and forced experts, over a prompt and cached steps; then the model is itself again, bit for bit."""
    before = logits(model)
    for mask in (additive(model, 1), forced(model, 1)):
        calls = Calls()
        with mask.apply(model) as receipt, model.tap.record(calls):
            assert not torch.equal(logits(model), before)
            model.generate(conversations(), max_new_tokens=3)
        assert receipt.changed > 0 and len(calls.calls) >= 3 * len(model.routers)
        for router, raw, experts, weights in calls.calls:
            asked = (
                {"force_NE": mask.values_LE[router.index]} if mask.forced else {"bias_NE": mask.bias_LE()[router.index]}
            )
            assert difference(router, raw, experts, weights, **asked) is None
    assert torch.equal(logits(model), before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations: more threads than cores make them ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    asked = quantised.quantisation({"quantization_config": {"quant_method": "mxfp4"}}, None, "", None, name="")
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


# ---- torch.compile


@pytest.fixture
def compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_place(hf: PreTrainedModel) -> None:
    hf.compile(backend="eager")


def forward(hf: PreTrainedModel) -> None:
    hf.forward = torch.compile(hf.forward, backend="eager")


def layers(hf: PreTrainedModel) -> None:
    hf.model.layers[0] = torch.compile(hf.model.layers[0], backend="eager")
    hf.model.layers[1].compile(backend="eager")
    hf.model.layers[2].mlp.compile(backend="eager")


@pytest.mark.parametrize(
    ("how", "before_adopting"), [(in_place, True), (in_place, False), (forward, False), (layers, True)]
)
def test_a_compiled_model_is_steered_as_the_model_itself(
    how: Callable[[PreTrainedModel], None],
    before_adopting: bool,
    folder_of: Folders,
    model_of: Callable[..., Model],
    compiled: None,
) -> None:
    """Unsteered, two masks, a forced one and captured: the same bits, and every change of mask is seen."""
    own, hf = model_of("qwen3_moe"), plain(folder_of("qwen3_moe"))
    if before_adopting:
        how(hf)
    model = adopt(hf, tokenizer())
    if not before_adopting:
        how(hf)
    before = logits(model)
    assert torch.equal(before, logits(own))
    for mask in (additive(own, 1), forced(own, 3)):
        calls = Calls()
        with mask.apply(own):
            expected = logits(own)
        with mask.apply(model) as receipt:
            assert torch.equal(logits(model), expected)
        with mask.apply(model), model.tap.record(calls):
            assert torch.equal(logits(model), expected)
        assert receipt.changed > 0 and receipt.positions == 78 and len(calls.calls) == len(model.routers)
        assert torch.equal(logits(model), before)


def test_rows_of_a_compiled_model_change_between_batches(
    folder_of: Folders, model_of: Callable[..., Model], compiled: None
) -> None:
    own, model = model_of("qwen3_moe"), load(folder_of("qwen3_moe"))
    model.hf.compile(backend="eager")
    steering = MaskTables.of_masks([additive(own, 1), forced(own, 2)], [None, None], device=own.device)
    with own.tap.steer(steering):
        steering.set_rows([1, 2, 0])
        first = logits(own)
        steering.set_rows([0, 1, 2])
        second = logits(own)
    with model.tap.steer(steering):
        for rows, wanted in (([1, 2, 0], first), ([0, 1, 2], second), ([1, 2, 0], first)):
            steering.set_rows(rows)
            assert torch.equal(logits(model), wanted)
    assert not torch.equal(first, second)


def test_generation_that_transformers_compiles_itself_is_steered(folder_of: Folders, compiled: None) -> None:
    model = load(folder_of("qwen3_moe"))
    ids, attention = model.pad([model.encode(conversations()[0]).token_ids])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    static = CompileConfig(backend="eager", mode=None)
    static._compile_all_devices = True  # on a CPU it compiles only when told

    def generate(**more: Any) -> list[int]:
        return model.hf.generate(input_ids=ids, attention_mask=attention, **settings, **more)[0].tolist()

    unsteered = generate()
    graphs = torch._dynamo.utils.counters["stats"]
    assert generate(cache_implementation="static", compile_config=static) == unsteered
    assert graphs["unique_graphs"] > 0
    mask = additive(model, 1, size=4.0)
    with mask.apply(model):
        steered = generate()
    with mask.apply(model) as receipt:
        assert generate(cache_implementation="static", compile_config=static) == steered != unsteered
    assert receipt.positions == ids.shape[1] + 3
    assert generate(cache_implementation="static", compile_config=static) == unsteered


@pytest.mark.slow
def test_the_default_backend_writes_kernels_and_is_steered(folder_of: Folders, compiled: None) -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    own, model = load(folder_of("qwen3_moe")), load(folder_of("qwen3_moe"))
    model.hf.model.layers[1].compile()
    before = logits(model)
    with additive(own, 1).apply(own):
        expected = logits(own)
    with additive(own, 1).apply(model) as receipt:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert receipt.changed > 0
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_the_wrapper_of_torch_compile_is_refused_with_what_to_call(folder_of: Folders, compiled: None) -> None:
    wrapper = torch.compile(plain(folder_of("qwen3_moe")), backend="eager")
    with pytest.raises(ModelError, match=r"wrapped by torch\.compile") as caught:
        adopt(wrapper, tokenizer())
    assert "model.compile()" in caught.value.do


def test_a_graph_that_may_not_break_is_refused(folder_of: Folders, compiled: None) -> None:
    hf = plain(folder_of("qwen3_moe"))
    hf.compile(backend="eager", fullgraph=True)
    with pytest.raises(ModelError, match="does not run with its routers tapped"):
        adopt(hf, tokenizer())


def test_a_graph_without_guards_that_ignores_the_mask_is_an_error(folder_of: Folders, compiled: None) -> None:
    """Doing nothing in silence would be the worst: it is found when the model is adopted."""
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    hf = plain(folder_of("qwen3_moe"))
    hf.compile(backend="eager", options=options)
    with torch.inference_mode():
        hf(input_ids=torch.arange(12)[None], use_cache=False)
    with pytest.raises(SelfCheckError, match="does not see the routers change"):
        adopt(hf, tokenizer())


@pytest.mark.parametrize("bypassed", [0, 2])
def test_a_router_that_is_bypassed_after_loading_is_an_error_when_generating(bypassed: int, folder_of: Folders) -> None:
    """What a stale graph does: the block goes on with a router that the tap did not replace."""
    model = load(folder_of("qwen3_moe"))
    router = model.routers[bypassed]
    own = router.module.forward
    router.block.forward = lambda hidden: MethodType(type(router.block).forward, Bypassing(router.block, own))(hidden)
    with pytest.raises(NoEffectError, match="without asking"), additive(model, 1).apply(model):
        model.generate(conversations(), max_new_tokens=2)


def test_a_router_that_is_bypassed_from_the_second_batch_on_is_an_error(folder_of: Folders) -> None:
    model = load(folder_of("qwen3_moe"))
    router, own = model.routers[0], model.routers[0].module.forward
    with additive(model, 1).apply(model):
        model.generate(conversations(), max_new_tokens=2)
        block = Bypassing(router.block, own)
        router.block.forward = lambda hidden: MethodType(type(router.block).forward, block)(hidden)
        with pytest.raises(NoEffectError, match="without asking any"):
            model.generate(conversations(), max_new_tokens=2)


class Bypassing:
    """A block whose gate is the router's first forward."""

    def __init__(self, block: Any, forward: Any) -> None:
        self.gate, self.experts = forward, block.experts


# ---- PEFT


def lora(hf: PreTrainedModel, **settings: Any) -> Any:
    """A LoRA whose numbers are not zero, as after training; dropout and all."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(hf, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(0)
    for path, parameter in adapted.named_parameters():
        if "lora_" in path:
            parameter.data.normal_(std=0.3, generator=generator)
    return adapted


ON_ATTENTION = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
ON_EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize("where", [ON_ATTENTION, ON_EXPERTS], ids=["attention", "experts"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "hunyuan_v1_moe"])
def test_an_adapted_model_is_steered_and_its_adapter_is_heard(
    name: str, where: dict[str, Any], tmp_path: Path, folder_of: Folders, model_of: Callable[..., Model]
) -> None:
    base, adapted = model_of(name), lora(plain(folder_of(name)), **where)
    model = adopt(adapted, tokenizer())
    ids, attention = model.pad([model.encode(c).token_ids for c in conversations()])
    with torch.inference_mode():
        theirs = adapted(input_ids=ids, attention_mask=attention, use_cache=False).logits
        tokens = adapted.generate(
            input_ids=ids[:1], attention_mask=attention[:1], max_new_tokens=4, do_sample=False, pad_token_id=0
        )
    assert torch.equal(logits(model), theirs) and not torch.allclose(theirs, logits(base), atol=0.1)
    last, calls, unadapted = len(model.routers) - 1, Calls(), Calls()
    with model.tap.record(calls):
        logits(model)
    with base.tap.record(unadapted):
        logits(base)
    assert not torch.allclose(calls.calls[last][1], unadapted.calls[last][1], atol=0.1), "the tuned model's logits"
    assert model.fingerprint == base.fingerprint, "the routers are the same: masks fit"
    assert_steered_as_routing_says(model)
    adapted.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), theirs)
    short = loaded.generate(conversations()[:1], max_new_tokens=4)[0].token_ids
    assert short == tuple(tokens[0, ids.shape[1] :].tolist())[: len(short)] and short
    merged = adopt(adapted.merge_and_unload(), tokenizer())
    torch.testing.assert_close(logits(merged), theirs, rtol=1e-4, atol=1e-4)
    assert merged.fingerprint == base.fingerprint


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("hunyuan_v1_moe", {"target_modules": ["wg"]}),
        ("phimoe", {"target_modules": ["router"]}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["gate.weight"]}),
        ("gpt_oss", {"target_modules": [], "target_parameters": ["router.weight"]}),
    ],
)
def test_an_adapter_on_the_router_is_refused_until_merged(
    name: str, where: dict[str, Any], folder_of: Folders, model_of: Callable[..., Model]
) -> None:
    adapted = lora(plain(folder_of(name)), **where)
    with pytest.raises(ModelError, match="an adapter sits on the router itself") as caught:
        adopt(adapted, tokenizer(), check=False)
    assert "merge_and_unload" in caught.value.do
    if name != "phimoe":  # PEFT itself cannot merge into it: its router is a linear layer that returns a tuple
        merged = adopt(adapted.merge_and_unload(), tokenizer())
        assert merged.fingerprint.router_sha256 != model_of(name).fingerprint.router_sha256
        assert_steered_as_routing_says(merged)


def test_adapters_outside_of_the_layers_are_refused(folder_of: Folders) -> None:
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    for config in (
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    ):
        with pytest.raises(ModelError, match="acts on the prompt"):
            adopt(get_peft_model(plain(folder_of("qwen3_moe")), config), tokenizer())


def test_a_wrapper_that_does_something_beside_the_layers_is_refused(folder_of: Folders) -> None:
    adapted = lora(plain(folder_of("qwen3_moe")), **ON_ATTENTION)
    adapted.register_forward_hook(lambda _m, _i, out: setattr(out, "logits", out.logits + 1))
    with pytest.raises(ModelError, match="does something beside the layers"):
        adopt(adapted, tokenizer())


def test_an_adapter_without_safetensors_or_without_a_base_is_refused(tmp_path: Path, folder_of: Folders) -> None:
    lora(plain(folder_of("qwen3_moe")), **ON_ATTENTION).save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    kept, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(UnsafeModelError, match=r"no adapter_model\.safetensors"):
        load(tmp_path)
    weights.write_bytes(kept)
    for change, error, match in (
        ({"base_model_name_or_path": None}, ModelError, "does not say what model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, UnsafeModelError, "megatron_config"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, ModelError, r"no readable config\.json"),
        ({"target_modules": ["no_such_layer"]}, ModelError, "PEFT could not put the adapter"),
    ):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(error, match=match):
            load(tmp_path)


def test_what_is_no_model_of_transformers_is_refused(folder_of: Folders) -> None:
    with pytest.raises(ModelError, match="not a model of transformers"):
        adopt(torch.nn.DataParallel(plain(folder_of("olmoe"))), tokenizer())


# ---- devices

KEPT = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
OFFLOADED = {**dict.fromkeys(KEPT, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_loads_what_a_device_does(
    device_map: Any, folder_of: Folders, model_of: Callable[..., Model]
) -> None:
    model = load(folder_of("qwen3_moe"), device_map=device_map)
    assert torch.equal(logits(model), logits(model_of("qwen3_moe")))
    assert model.fingerprint == model_of("qwen3_moe").fingerprint


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "minimax_m2", "hunyuan_v1_moe"])
def test_layers_on_disk_are_read_when_needed_and_steered(
    name: str, folder_of: Folders, model_of: Callable[..., Model]
) -> None:
    """Router weights and correction biases are on `meta` until their layer runs; accelerate's hooks stay."""
    own, model = model_of(name), load(folder_of(name), device_map=OFFLOADED)
    assert any(parameter.is_meta for parameter in model.routers[-1].module.parameters())
    forwards = [router.module.__dict__.get("forward") for router in model.routers]
    assert forwards[-1] is not None and model.fingerprint == own.fingerprint
    assert torch.equal(logits(model), logits(own))
    mask = additive(own, 1)
    with mask.apply(own):
        expected = logits(own)
    with mask.apply(model):
        assert torch.equal(logits(model), expected)
    assert_steered_as_routing_says(model)
    assert [router.module.__dict__.get("forward") for router in model.routers] == forwards
    assert model.routers[-1].module.weight.is_meta if name != "hunyuan_v1_moe" else True
    assert model.weights_sketch != own.weights_sketch


def test_a_model_whose_embeddings_are_on_disk_is_refused(folder_of: Folders) -> None:
    with pytest.raises(ModelError, match="no device to send tokens to"):
        load(folder_of("qwen3_moe"), device_map={"": "disk"})


def test_a_router_that_is_nowhere_is_refused(folder_of: Folders) -> None:
    hf = plain(folder_of("qwen3_moe"))
    hf.model.layers[2].to("meta")
    with pytest.raises(ModelError, match="not in memory"):
        adopt(hf, tokenizer())


def test_tables_follow_the_router_to_its_device_once(
    model_of: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second device here: the tables are asked for logits that live on `meta`, which can be moved to."""
    routers = model_of("qwen3_moe").routers
    shape = (len(routers), 2, 8)
    bias, force = torch.ones(shape), torch.ones(shape, dtype=torch.int8)
    tables = MaskTables(bias, force, receipt=Receipt(len(routers), ("a",), (1.0,)))
    moves: list[int] = []
    follow = tables._follow
    monkeypatch.setattr(tables, "_follow", lambda index, device: (moves.append(index), follow(index, device)))
    far, near = routers[1], routers[0]
    for _ in range(3):
        assert tables.logits(near, torch.zeros(4, 8)).device.type == "cpu"
        assert tables.logits(far, torch.zeros(4, 8, device="meta")).device.type == "meta"
        ranks = tables.ranks(far, torch.zeros(4, 8, device="meta"))
        assert ranks is not None and ranks.device.type == "meta"
    tables.set_rows([0, 1])
    assert tables.logits(far, torch.zeros(4, 8, device="meta")).device.type == "meta"
    assert tables.logits(near, torch.zeros(4, 8)).device.type == "cpu"
    assert moves == [far.index], "moved once, not at every step"

"""Models adapted by PEFT, and other wrappers around a model.

Each either works, exactly as the plain model does, or is refused with the reason (docs/wrapped-models.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moesteer.backends.hf import Model
from moesteer.backends.loading import adopt, load
from moesteer.errors import ModelError, UnsafeModelError
from tests.compat.masks_and_calls import Calls, conversations, logits
from tests.compat.wrapped_models import (
    Folders,
    assert_steered_as_routing_says,
    one_thread,  # noqa: F401  for every test here
    plain,
    tokenizer,
)


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
        ({"base_model_name_or_path": str(tmp_path / "gone")}, ModelError, r"there is no such folder"),
        ({"target_modules": ["no_such_layer"]}, ModelError, "PEFT could not put the adapter"),
    ):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(error, match=match):
            load(tmp_path)


def test_what_is_no_model_of_transformers_is_refused(folder_of: Folders) -> None:
    with pytest.raises(ModelError, match="not a model of transformers"):
        adopt(torch.nn.DataParallel(plain(folder_of("olmoe"))), tokenizer())

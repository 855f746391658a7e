"""convert.py: what has no exact form as qwen2_moe, is damaged or is unsafe is refused, with nothing written."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesteer import files
from moesteer.errors import DenseModelError, FileError, InputError, LimitError, ModelError, UnsafeModelError
from moesteer.models.checkpoint import INDEX, SINGLE
from moesteer.models.convert import convert
from tests.unit.deepseek_v1 import CONFIG, random_tensors, refused, write_source

INEXACT = {
    "scoring": ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'", "softmax"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True", "no bias on o_proj"),
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling is", "null"),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is", "null"),
    "sliced products": ({"pretraining_tp": 2}, "pretraining_tp is 2", "another order"),
    "scaled experts": ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5", "1"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'", "silu"),
    "class": ({"architectures": ["DroppedDeepseek"]}, "architectures is ['DroppedDeepseek']", "DeepseekForCausalLM"),
    "another architecture": ({"q_lora_rank": 512}, "unknown field 'q_lora_rank'", "fields of v1"),
    "quantised": ({"quantization_config": {"bits": 4}}, "unknown field 'quantization_config'", "fields of v1"),
    "internals": ({"_attn_implementation_internal": "x"}, "'_attn_implementation_internal'", "fields of v1"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'", "bfloat16"),
    "size as text": ({"hidden_size": "32"}, "hidden_size is '32'", "integer"),
    "size as truth": ({"num_hidden_layers": True}, "num_hidden_layers is True", "integer"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0", "greater"),
    "too many layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000", "less"),
    "too many experts": ({"n_routed_experts": 10**12}, "n_routed_experts is 1000000000000", "less"),
    "theta": ({"rope_theta": -1}, "rope_theta is -1", "greater"),
    "switch": ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'", "boolean"),
    "more than all": ({"num_experts_per_tok": 9}, "top 9 of 8 experts", "no more than all"),
    "heads": ({"num_attention_heads": 5}, "5 heads", "multiple"),
    "key heads": ({"num_key_value_heads": 3}, "3 key heads", "multiple"),
}


@pytest.mark.parametrize("name", INEXACT)
def test_a_config_without_an_exact_form_is_refused(name, tmp_path):
    changes, what, expected = INEXACT[name]
    source = write_source(tmp_path / "v1")
    (source / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    error = refused(source, tmp_path / "qwen", ModelError, what, expected=expected)
    assert error.what.startswith("the checkpoint cannot be converted exactly") and "config.json" in error.where


def test_a_missing_field_is_refused(tmp_path):
    source = write_source(tmp_path / "v1")
    (source / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    refused(source, tmp_path / "qwen", ModelError, "hidden_size is missing")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"n_routed_experts": None}, "n_routed_experts is null"),
        ({"first_k_dense_replace": 3}, "leave no layer to them"),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 3}, "leave no layer to them"),
    ],
)
def test_a_dense_model_is_refused(changes, what, tmp_path):
    source = write_source(tmp_path / "v1", changes, tensors={"x": torch.zeros(1)})
    refused(source, tmp_path / "qwen", DenseModelError, what)


@pytest.mark.parametrize("value", ["deepseek_v2", "mixtral", None, ["deepseek"], 7])
def test_a_type_without_a_row_is_refused(value, tmp_path):
    source = write_source(tmp_path / "v1", {"model_type": value})
    refused(source, tmp_path / "qwen", ModelError, f"no conversion for model_type {value!r}", expected="deepseek")


@pytest.mark.parametrize("text", ["", "[1]", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a": 1e999}', "\x80"])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    source = write_source(tmp_path / "v1")
    (source / "config.json").write_bytes(text.encode("latin-1"))
    wrong = ModelError if text == "[1]" else FileError
    refused(source, tmp_path / "qwen", wrong, "no conversion" if text == "[1]" else "not valid JSON")


SHARED = "model.layers.1.mlp.shared_experts.down_proj.weight"


def changed(**changes):
    tensors = random_tensors(CONFIG, dtype=torch.float32)
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


TENSORS = {
    "missing": ({"lm_head.weight": None}, "lm_head.weight is missing", "whole"),
    "expert missing": (
        {"model.layers.2.mlp.experts.7.up_proj.weight": None},
        "experts.7.up_proj.weight is missing",
        "",
    ),
    "shared missing": ({SHARED: None}, "shared_experts.down_proj.weight is missing", ""),
    "unexpected": (
        {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        "1 unexpected tensors: model",
        "",
    ),
    "another layer": ({"model.layers.3.input_layernorm.weight": torch.zeros(32)}, "1 unexpected tensors", ""),
    "dense in place of experts": ({"model.layers.1.mlp.up_proj.weight": torch.zeros(40, 32)}, "1 unexpected", ""),
    "shape": ({"model.layers.1.mlp.gate.weight": torch.zeros(7, 32)}, "has shape [7, 32]", "[8, 32]"),
    "transposed": ({SHARED: torch.zeros(24, 32)}, "has shape [24, 32]", "[32, 24]"),
    "dtype": ({"lm_head.weight": torch.zeros(97, 32, dtype=torch.int8)}, "is of type I8", "BF16"),
    "float64": ({"lm_head.weight": torch.zeros(97, 32, dtype=torch.float64)}, "is of type F64", "BF16"),
    "too large to double": ({SHARED: torch.full((32, 24), 3e38)}, "doubled does not fit F32", "half"),
    "too large in half": ({SHARED: torch.full((32, 24), 4e4).half()}, "doubled does not fit F16", "half"),
    "not a number": ({SHARED: torch.full((32, 24), float("nan"))}, "doubled does not fit F32", "half"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_those_of_the_config_are_refused(name, tmp_path):
    changes, what, expected = TENSORS[name]
    source = write_source(tmp_path / "v1", tensors=changed(**changes))
    refused(source, tmp_path / "qwen", ModelError, what, expected=expected)


def test_a_tied_checkpoint_with_a_head_of_its_own_is_refused(tmp_path):
    source = write_source(tmp_path / "v1", {"tie_word_embeddings": True}, tensors=changed())
    refused(source, tmp_path / "qwen", ModelError, "1 unexpected tensors: lm_head.weight")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_unread(name, tmp_path):
    source = write_source(tmp_path / "v1")
    (source / SINGLE).unlink()
    os.mkfifo(source / name)  # reading it would hang
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UnsafeModelError, match="pickled"):
        convert(source, tmp_path / "qwen")
    assert sorted(os.listdir(tmp_path)) == before


def test_no_weights_are_an_error(tmp_path):
    source = write_source(tmp_path / "v1")
    (source / SINGLE).unlink()
    refused(source, tmp_path / "qwen", ModelError, "holds no weights", expected=SINGLE)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "pytorch_model.bin", "m.py"]
)
def test_an_index_that_leads_elsewhere_is_refused(name, tmp_path):
    source = write_source(tmp_path / "v1", shards=2)
    save_file({"lm_head.weight": torch.zeros(97, 32)}, tmp_path / "outside.safetensors")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (source / INDEX).write_text(json.dumps(index))
    where_to = f"the index leads out of its folder, to {name!r}"
    refused(source, tmp_path / "qwen", UnsafeModelError, where_to, expected="its own folder")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda index: index["weight_map"].update({"lm_head.weight": 3}), "no weight_map"),
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index["weight_map"].pop("lm_head.weight"), "disagree"),
        (lambda index: index["weight_map"].update({"more": "model-00001-of-00002.safetensors"}), "disagree"),
        (lambda index: index["weight_map"].update({"more": "model-3.safetensors"}), "is missing"),
        (lambda index: index["weight_map"].update({"more": "x" * 300 + ".safetensors"}), "cannot be read"),
        (lambda index: index["weight_map"].update({"more": "a\0b.safetensors"}), "is missing"),
        (lambda index: index["weight_map"].update({"more": "pipe.safetensors"}), "is missing"),
    ],
)
def test_an_index_that_is_wrong_is_refused(change, what, tmp_path):
    source = write_source(tmp_path / "v1", shards=2)
    index = json.loads((source / INDEX).read_text())
    change(index)
    (source / INDEX).write_text(json.dumps(index))
    if "pipe" in (source / INDEX).read_text():
        os.mkfifo(source / "pipe.safetensors")
    refused(source, tmp_path / "qwen", ModelError, what)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    source = write_source(tmp_path / "v1", shards=2)
    first = source / "model-00001-of-00002.safetensors"
    tensors = load_file(first)
    extra = next(iter(load_file(source / "model-00002-of-00002.safetensors").items()))
    save_file({**tensors, extra[0]: extra[1]}, first)
    refused(source, tmp_path / "qwen", ModelError, f"{extra[0]} is in model-00001-of-00002.safetensors too")


@pytest.mark.parametrize("keep", [0, 7, 8, 500, -1])
def test_a_truncated_shard_is_refused(keep, tmp_path):
    source = write_source(tmp_path / "v1")
    data = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(data[:keep])
    refused(source, tmp_path / "qwen", ModelError, "cannot be read")


def test_sizes_in_a_config_are_not_believed(tmp_path):
    source = write_source(tmp_path / "v1", tensors={"x": torch.zeros(1)})
    (source / "config.json").write_text(
        json.dumps({**CONFIG, "num_hidden_layers": 10_000, "n_routed_experts": 100_000, "moe_layer_freq": 1})
    )
    start = time.monotonic()
    refused(source, tmp_path / "qwen", ModelError, "embed_tokens.weight is missing")
    assert time.monotonic() - start < 2


def test_settings_that_are_not_json_are_refused(tmp_path):
    source = write_source(tmp_path / "v1")
    (source / "tokenizer_config.json").write_text("{")
    refused(source, tmp_path / "qwen", FileError, "not valid JSON")


def test_a_tokenizer_over_the_limit_is_refused(tmp_path, monkeypatch):
    source = write_source(tmp_path / "v1")
    monkeypatch.setitem(files.LIMITS_BYTES, "json", 3000)
    assert (source / "config.json").stat().st_size < 3000 < (source / "tokenizer.json").stat().st_size
    refused(source, tmp_path / "qwen", LimitError, "larger than 3,000 bytes")


def test_folders_that_cannot_be_written_into_are_refused(tmp_path, monkeypatch):
    source = write_source(tmp_path / "v1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "same").symlink_to(source)
    for name in ("full", "file", "link", "dangling"):
        refused(source, tmp_path / name, FileError, "not empty, or not an ordinary folder", expected="new or empty")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_mount", lambda path: path.name == "empty")
        refused(source, tmp_path / "empty", FileError, "not an ordinary folder")
    for path in (source, source / "qwen", source / ".." / "v1", tmp_path / "same" / "deep" / "qwen"):
        refused(source, path, FileError, "the checkpoint's own")
    refused(source, tmp_path / "file" / "qwen", FileError, "Not a directory")
    refused(source, Path(f"{tmp_path}/a\0b"), FileError, "null")


def test_a_source_that_is_no_folder_is_refused(tmp_path):
    write_source(tmp_path / "v1")
    for source in (tmp_path / "nothing", tmp_path / "v1" / "config.json", "deepseek-ai/deepseek-moe-16b-chat"):
        with pytest.raises(FileError, match="could not read the file") as caught:
            convert(source, tmp_path / "qwen")
        assert "config.json" in caught.value.where
    assert not (tmp_path / "qwen").exists()


@pytest.mark.parametrize("size", [0, -1, 2**31 + 1, 10**30])
def test_sizes_of_shards_have_limits(size, tmp_path):
    source = write_source(tmp_path / "v1")
    refused(source, tmp_path / "qwen", InputError, f"shards of {size} bytes", shard_bytes=size)

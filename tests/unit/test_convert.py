"""convert.py: a DeepSeekMoE v1 checkpoint re-saved as qwen2_moe says what v1 says, or is refused with nothing written.

The truth is a forward pass of v1 written here from the paper (arXiv:2401.06066) and Llama's public description, on
the raw tensors of the source, in float32. It shares no code with transformers or with convert.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moesteer
from moesteer import files
from moesteer.errors import DenseModelError, FileError, InputError, LimitError, ModelError, UnsafeModelError
from moesteer.files import PARTIAL_SUFFIX
from moesteer.models import convert as module
from moesteer.models.checkpoint import INDEX, SINGLE
from moesteer.models.convert import CONVERSIONS, Converted, convert

LAB_TINY = Path(moesteer.__file__).parent / "lab" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIG = {
    "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001, "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 128,
    "model_type": "deepseek", "moe_intermediate_size": 12, "moe_layer_freq": 1, "n_routed_experts": 8,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 4, "num_experts_per_tok": 3,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.36.0", "use_cache": True,
    "vocab_size": 97,
}  # fmt: skip
"""The fields of deepseek-moe-16b, with the sizes of a toy."""
VARIANTS = {
    "plain": {},
    "renormalised": {"norm_topk_prob": True},
    "top-1, renormalised in name": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "no shared experts": {"n_shared_experts": None},
    "zero shared experts": {"n_shared_experts": 0},
    "one shared expert": {"n_shared_experts": 1},
    "every other layer": {"first_k_dense_replace": 0, "moe_layer_freq": 2},
    "all layers": {"first_k_dense_replace": 0},
    "tied": {"tie_word_embeddings": True},
    "as many key heads": {"num_key_value_heads": None},
    "rope and epsilon": {"rope_theta": 500.0, "rms_norm_eps": 0.01},
}
PROMPTS = ([5, 17, 3, 88, 41], [1, 2, 3], list(range(20, 60, 2)), [96, 0, 96, 0, 13, 50, 7])


def is_sparse(config, layer):
    return layer >= config.get("first_k_dense_replace", 0) and layer % config.get("moe_layer_freq", 1) == 0


def random_tensors(config, *, dtype, seed=0):
    """A v1 checkpoint. Routers are spread out, so that no two experts are nearly tied."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    keys = hidden // config["num_attention_heads"] * (config["num_key_value_heads"] or config["num_attention_heads"])
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "lm_head": (config["vocab_size"], hidden)}
    mlps = {}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            shapes[f"{start}self_attn.{name}_proj"] = (rows, hidden)
        if is_sparse(config, layer):
            shapes[f"{start}mlp.gate"] = (config["n_routed_experts"], hidden)
            mlps |= {f"{start}mlp.experts.{j}.": width for j in range(config["n_routed_experts"])}
            if config["n_shared_experts"]:
                mlps[f"{start}mlp.shared_experts."] = width * config["n_shared_experts"]
        else:
            mlps[f"{start}mlp."] = config["intermediate_size"]
    for start, rows in mlps.items():
        shapes |= {f"{start}gate_proj": (rows, hidden), f"{start}up_proj": (rows, hidden)}
        shapes[f"{start}down_proj"] = (hidden, rows)
    if config["tie_word_embeddings"]:
        del shapes["lm_head"]
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    for layer in range(config["num_hidden_layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = 1 + torch.randn(hidden, generator=generator) * 0.2
    tensors["model.norm.weight"] = 1 + torch.randn(hidden, generator=generator) * 0.2
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_source(folder, config=None, *, dtype="float32", tensors=None, shards=None):
    """A source folder with remote code that would leave a mark, a tokenizer, and settings that ask for code."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "torch_dtype": dtype, **(config or {})}
    tensors = random_tensors(config, dtype=DTYPES[dtype]) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards is None:
        save_file(tensors, folder / SINGLE)
    else:
        placed = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
        for file in set(placed.values()):
            save_file({name: tensors[name] for name in placed if placed[name] == file}, folder / file)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    mark = folder.parent / "code-ran"
    for name in ("modeling_deepseek.py", "configuration_deepseek.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\n")
    AutoTokenizer.from_pretrained(LAB_TINY).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_deepseek.Tokenizer", None]}
    settings["nested"] = [{"auto_map": "x", "kept": "\ud800"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "auto_map": {"x": "y"}, "do_sample": true}')
    (folder / "README.md").write_text("use trust_remote_code")
    return folder


def norm(x, weight, epsilon):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


def turned(x, theta):
    """Rotary embedding of [positions, heads, size]: pairs (i, i + size / 2) turn by position / theta^(2i / size)."""
    positions, _, size = x.shape
    angle = torch.arange(positions)[:, None] / theta ** (torch.arange(0, size, 2) / size)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def v1_logits(config, tensors, ids):
    """Logits [positions, vocabulary] of DeepSeekMoE v1, token by token and expert by expert."""
    w = {name.removesuffix(".weight"): tensor.float() for name, tensor in tensors.items()}
    heads, theta, epsilon = config["num_attention_heads"], config["rope_theta"], config["rms_norm_eps"]
    key_heads = config["num_key_value_heads"] or heads
    size = config["hidden_size"] // heads

    def mlp(start, x):
        return w[f"{start}down_proj"] @ (silu(w[f"{start}gate_proj"] @ x) * (w[f"{start}up_proj"] @ x))

    def experts(start, x):
        scores = torch.softmax(w[f"{start}gate"] @ x, 0)
        chosen = sorted(range(len(scores)), key=lambda j: -float(scores[j]))[: config["num_experts_per_tok"]]
        total = sum(scores[j] for j in chosen) if config["norm_topk_prob"] and len(chosen) > 1 else 1.0
        out = sum(scores[j] / total * mlp(f"{start}experts.{j}.", x) for j in chosen)
        return out + mlp(f"{start}shared_experts.", x) if config["n_shared_experts"] else out

    x = w["model.embed_tokens"][torch.tensor(ids)]
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        seen = norm(x, w[f"{start}input_layernorm"], epsilon)
        q, k, v = (
            (seen @ w[f"{start}self_attn.{name}_proj"].T).view(len(ids), n, size)
            for name, n in (("q", heads), ("k", key_heads), ("v", key_heads))
        )
        q, k = turned(q, theta), turned(k, theta)
        mixed = torch.zeros(len(ids), heads, size)
        for head in range(heads):
            mine = head // (heads // key_heads)
            for i in range(len(ids)):
                share = torch.softmax(k[: i + 1, mine] @ q[i, head] / size**0.5, 0)
                mixed[i, head] = share @ v[: i + 1, mine]
        x = x + mixed.flatten(1) @ w[f"{start}self_attn.o_proj"].T
        seen = norm(x, w[f"{start}post_attention_layernorm"], epsilon)
        block = experts if is_sparse(config, layer) else mlp
        x = x + torch.stack([block(f"{start}mlp.", row) for row in seen])
    return norm(x, w["model.norm"], epsilon) @ w["model.embed_tokens" if "lm_head" not in w else "lm_head"].T


def load(folder, dtype=torch.float32):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def tree(folder):
    """Every file under a folder and the digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def refused(source, out, error, what, *, expected="", **options):
    """The conversion raises `error` with four parts, and leaves every file as it was and no new one."""
    before = tree(source.parent)
    with pytest.raises(error) as caught:
        convert(source, out, **options)
    assert type(caught.value) is error
    assert what in caught.value.what and expected in caught.value.expected, str(caught.value)
    assert caught.value.where and caught.value.expected and caught.value.do
    assert tree(source.parent) == before
    return caught.value


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_the_converted_model_says_what_v1_says(name, dtype, tmp_path):
    source = write_source(tmp_path / "v1", VARIANTS[name], dtype=dtype)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / SINGLE)
    convert(source, tmp_path / "qwen")
    model = load(tmp_path / "qwen")
    for ids in PROMPTS:
        logits = model(torch.tensor([ids])).logits[0]
        truth = v1_logits(config, tensors, ids)
        assert truth.abs().max() > 1  # not all the same
        torch.testing.assert_close(logits, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
    ids = PROMPTS[0]
    reply = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = list(ids)
    for _ in range(8):
        expected.append(int(v1_logits(config, tensors, expected)[-1].argmax()))
    assert reply[0].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_half_of_a_doubled_shared_expert_is_the_shared_expert_bit_for_bit(dtype, tmp_path):
    source = write_source(tmp_path / "v1", dtype=dtype)
    tensors = load_file(source / SINGLE)
    convert(source, tmp_path / "qwen")
    block = load(tmp_path / "qwen", DTYPES[dtype]).model.layers[1].mlp
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    gate, up, down = (tensors[f"model.layers.1.mlp.shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down"))
    truth = (silu(x @ gate.T) * (x @ up.T)) @ down.T
    ours = torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    assert truth.abs().max() > 0.1 and torch.equal(ours, truth)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_copied_bit_for_bit_but_for_the_shared_expert(dtype, tmp_path):
    source = write_source(tmp_path / "v1", dtype=dtype)
    old = load_file(source / SINGLE)
    done = convert(str(source), str(tmp_path / "qwen"))
    new = load_file(tmp_path / "qwen" / SINGLE)
    size = sum(tensor.nbytes for tensor in new.values())
    assert done == Converted("deepseek", "qwen2_moe", len(new), size, tmp_path / "qwen")
    added = {f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in (1, 2)}
    renamed = {name.replace(".shared_experts.", ".shared_expert."): name for name in old}
    assert set(new) == set(renamed) | added
    for name, tensor in new.items():
        assert tensor.dtype == DTYPES[dtype], name
        if name in added:
            assert torch.equal(tensor, torch.zeros(1, 32, dtype=tensor.dtype)), name
        elif name.endswith(".shared_expert.down_proj.weight"):
            assert torch.equal(tensor / 2, old[renamed[name]]) and torch.equal(tensor, old[renamed[name]] * 2), name
        else:
            assert torch.equal(tensor, old[renamed[name]]), name


def test_the_config_is_native_and_says_where_it_comes_from(tmp_path):
    source = write_source(tmp_path / "v1", dtype="bfloat16")
    convert(source, tmp_path / "qwen")
    written = json.loads((tmp_path / "qwen" / "config.json").read_text())
    digest = hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    assert written["converted_from"] == {"model_type": "deepseek", "config_sha256": digest}
    assert written["architectures"] == ["Qwen2MoeForCausalLM"] and written["model_type"] == "qwen2_moe"
    assert written["dtype"] == "bfloat16" and written["mlp_only_layers"] == [0] and "auto_map" not in written
    config = AutoConfig.from_pretrained(tmp_path / "qwen")
    assert type(config).__name__ == "Qwen2MoeConfig"
    assert (config.num_experts, config.num_experts_per_tok, config.shared_expert_intermediate_size) == (8, 3, 24)
    assert (config.bos_token_id, config.eos_token_id, config.qkv_bias) == (1, 2, False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "qwen").dtype == torch.bfloat16


def test_the_row_says_what_it_becomes():
    assert {name: row.becomes for name, row in CONVERSIONS.items()} == {"deepseek": "qwen2_moe", "phimoe": "phimoe"}
    assert all(name == row.source and len(row.why) > 40 for name, row in CONVERSIONS.items())


# ---------------------------------------------------------------- files


def test_data_comes_along_and_code_does_not(tmp_path):
    source = write_source(tmp_path / "v1")
    (source / "tokenizer.model").write_bytes(b"\x00auto_map\xff")
    (source / "vocab.json").write_text('{"auto_map": 5}')
    out = tmp_path / "new" / "qwen"
    convert(source, out)
    settings = ("tokenizer_config.json", "generation_config.json")
    same = {"tokenizer.json", "tokenizer.model", "vocab.json"} | ({"chat_template.jinja"} & set(os.listdir(source)))
    assert set(os.listdir(out)) == {"config.json", SINGLE, *settings, *same}
    for name in same:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    for name in settings:
        assert "auto_map" not in (out / name).read_text()
        old, new = (json.loads((folder / name).read_text()) for folder in (source, out))
        del old["auto_map"]
        if "nested" in old:
            old["nested"] = [{"kept": "\ud800"}]
        assert new == old and list(new) == list(old)
    text = "how do i paint a clay pot ?"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(LAB_TINY)(text)
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize("source_shards", [None, 3])
@pytest.mark.parametrize("shard_bytes", [1, 5000, 20_000])
@torch.inference_mode()
def test_shards_hold_the_same_model_and_one_is_in_memory_at_a_time(shard_bytes, source_shards, tmp_path, monkeypatch):
    source = write_source(tmp_path / "v1", shards=source_shards)
    whole = convert(write_source(tmp_path / "one"), tmp_path / "whole")
    sizes = []
    save = module.save_tensors

    def counted(tensors, **options):
        sizes.append((len(tensors), sum(tensor.nbytes for tensor in tensors.values())))
        return save(tensors, **options)

    monkeypatch.setattr(module, "save_tensors", counted)
    done = convert(source, tmp_path / "qwen", shard_bytes=shard_bytes)
    assert len(sizes) > 1 and all(size <= shard_bytes or count == 1 for count, size in sizes)
    assert sum(size for _, size in sizes) == done.size_bytes == whole.size_bytes
    index = json.loads((tmp_path / "qwen" / INDEX).read_text())
    assert index["metadata"]["total_size"] == done.size_bytes and len(index["weight_map"]) == done.tensors
    shards = {f"model-{i:05d}-of-{len(sizes):05d}.safetensors" for i in range(1, len(sizes) + 1)}
    assert {p.name for p in (tmp_path / "qwen").glob("*.safetensors")} == shards == set(index["weight_map"].values())
    first, second = load(tmp_path / "qwen").state_dict(), load(tmp_path / "whole").state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_source_gives_the_same_bytes(tmp_path):
    source = write_source(tmp_path / "v1")
    for name in ("a", "b"):
        convert(source, tmp_path / name, shard_bytes=20_000)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_an_empty_folder_is_filled(tmp_path):
    source = write_source(tmp_path / "v1")
    (tmp_path / "qwen").mkdir()
    assert convert(source, tmp_path / "qwen").folder == tmp_path / "qwen"
    assert (tmp_path / "qwen" / "config.json").is_file()


# ---------------------------------------------------------------- interrupted


class Stopped(BaseException):
    """Neither an Exception nor one of ours."""


def counting_writer(monkeypatch, action, at):
    """files.write_bytes that does `action` in place of its at-th write; the number of calls in a list."""
    calls, write = [], files.write_bytes

    def writer(path, data):
        calls.append(path)
        if len(calls) == at:
            action()
        write(path, data)

    monkeypatch.setattr(files, "write_bytes", writer)
    return calls


def test_a_failure_at_any_write_leaves_nothing(tmp_path, monkeypatch):
    source = write_source(tmp_path / "v1")
    before = tree(tmp_path)

    def stop():
        raise Stopped

    at = 0
    while True:
        at += 1
        with monkeypatch.context() as patched:
            calls = counting_writer(patched, stop, at)
            try:
                convert(source, tmp_path / "qwen", shard_bytes=20_000)
                break
            except Stopped:
                assert tree(tmp_path) == before
    assert at == len(calls) + 1 > 8 and calls[-1].name == "config.json"


def test_a_killed_conversion_looks_like_none_and_a_second_run_is_whole(tmp_path, monkeypatch):
    source = write_source(tmp_path / "v1")
    convert(source, tmp_path / "truth", shard_bytes=20_000)
    before = set(os.listdir(tmp_path))
    for at in (1, 3, 10):
        child = os.fork()
        if child == 0:
            counting_writer(monkeypatch, lambda: os._exit(9), at)
            convert(source, tmp_path / "qwen", shard_bytes=20_000)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert set(os.listdir(tmp_path)) - before == {f".qwen{PARTIAL_SUFFIX}"}
        assert not (tmp_path / f".qwen{PARTIAL_SUFFIX}" / "config.json").exists()
    convert(source, tmp_path / "qwen", shard_bytes=20_000)
    assert set(os.listdir(tmp_path)) - before == {"qwen"} and tree(tmp_path / "qwen") == tree(tmp_path / "truth")


def test_two_conversions_into_one_folder_do_not_mix(tmp_path):
    source = write_source(tmp_path / "v1")
    partial = tmp_path / f".qwen{PARTIAL_SUFFIX}"
    partial.mkdir()
    (partial / "theirs").write_text("x")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        refused(source, tmp_path / "qwen", FileError, "another process is writing into it")
    finally:
        os.close(descriptor)
    convert(source, tmp_path / "qwen")
    assert not partial.exists() and "theirs" not in os.listdir(tmp_path / "qwen")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    source = write_source(tmp_path / "v1")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(source, tmp_path / "qwen", FileError, "No space left on device")


# ---------------------------------------------------------------- refusals


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


# ---------------------------------------------------------------- Phi-3.5-MoE, re-saved by transformers 5


def test_a_re_saved_phi_gets_the_name_that_other_engines_know_and_nothing_else(folder_of, tmp_path):
    source = folder_of("phimoe")
    assert json.loads((source / "config.json").read_text())["architectures"] == ["PhimoeForCausalLM"], "the trap"
    done = convert(source, tmp_path / "out")
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after.pop("architectures") == ["PhiMoEForCausalLM"] and before.pop("architectures")
    assert after.pop("converted_from")["model_type"] == "phimoe" and after == before
    a, b = load_file(source / "model.safetensors"), load_file(done.folder / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    original = AutoModelForCausalLM.from_pretrained(source)
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens).logits, original(tokens).logits)


def test_a_phi_with_the_hubs_name_has_nothing_to_convert(folder_of, tmp_path):
    shutil.copytree(folder_of("phimoe"), tmp_path / "phi")
    path = tmp_path / "phi" / "config.json"
    path.write_text(path.read_text().replace("PhimoeForCausalLM", "PhiMoEForCausalLM"))
    with pytest.raises(ModelError, match="nothing to convert"):
        convert(tmp_path / "phi", tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""convert.py: a DeepSeekMoE v1 checkpoint re-saved as qwen2_moe says what v1 says, and is written whole or not at all.

The truth is the forward pass of deepseek_v1.py, which shares no code with transformers or with convert.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moesteer import files
from moesteer.errors import FileError
from moesteer.files import PARTIAL_SUFFIX
from moesteer.models import convert as module
from moesteer.models.checkpoint import INDEX, SINGLE
from moesteer.models.convert import CONVERSIONS, Converted, convert
from tests.unit.deepseek_v1 import DTYPES, LAB_TINY, load, refused, tree, v1_logits, write_source

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

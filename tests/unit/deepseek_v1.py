"""DeepSeekMoE v1 checkpoints made up here, what v1 says, and how a conversion is refused.

The truth is a forward pass of v1 written here from the paper (arXiv:2401.06066) and Llama's public description, on
the raw tensors of the source, in float32. It shares no code with transformers or with convert.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesteer
from moesteer.models.checkpoint import INDEX, SINGLE
from moesteer.models.convert import convert

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

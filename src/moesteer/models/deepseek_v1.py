"""DeepSeekMoE v1 (model_type "deepseek", deepseek-moe-16b) as qwen2_moe: a row of models/convert.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moesteer.errors import DenseModelError, ModelError
from moesteer.models.pieces import Piece

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Dtype = Literal["float32", "bfloat16", "float16"]


class DeepSeekConfig(BaseModel):
    """Every config.json of DeepSeekMoE v1 that has an exact form, with the defaults of its class.

    Other fields are refused: models of a changed class keep the model_type and say in such a field what they do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    moe_intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    n_routed_experts: Annotated[int, Field(ge=1, le=100_000)]
    n_shared_experts: Annotated[int, Field(ge=0, le=1000)] | None = None
    num_experts_per_tok: Size
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 0
    moe_layer_freq: Size = 1
    norm_topk_prob: bool = False
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    tie_word_embeddings: bool = False

    architectures: list[Literal["DeepseekForCausalLM"]] = []
    scoring_func: Literal["softmax"] = Field("softmax", description="softmax, the only scoring of qwen2_moe")
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = Field(False, description="false: qwen2_moe has no bias on o_proj")
    pretraining_tp: Literal[1] = Field(1, description="1: sums over slices are rounded in another order")
    routed_scaling_factor: Literal[1] = Field(1, description="1: qwen2_moe does not scale the experts' sum")
    rope_scaling: None = Field(None, description="null: scaled angles are rounded or remembered otherwise")
    torch_dtype: Dtype | None = None
    dtype: Dtype | None = None

    max_position_embeddings: Size = 2048
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    use_cache: bool = True
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pad_token_id: int | None = None

    # of training and of files: nothing that is written depends on these
    model_type: str
    transformers_version: Any = None
    name_or_path: Any = Field(None, alias="_name_or_path")
    aux_loss_alpha: Any = None
    seq_aux: Any = None


def plan(config: dict[str, Any], where: str) -> tuple[dict[str, Any], Iterator[Piece]]:
    """DeepSeekMoE v1 (arXiv:2401.06066, eq. 9-11) as qwen2_moe.

    v1:         sum over the top k of softmax_e(x) * expert_e(x)  +  shared(x)
    qwen2_moe:  the same sum                                      +  sigmoid(g . x) * shared'(x)

    With g = 0 the sigmoid is exactly 1/2, and shared' is shared with down_proj doubled. A factor of two changes
    exponents only, so every rounding is the same and 1/2 * shared'(x) = shared(x) bit for bit (unless a doubled
    value overflows; weights that would are refused). Without shared experts, shared' is one row of zeros.
    Dense layers (before first_k_dense_replace, or no multiple of moe_layer_freq) become `mlp_only_layers`.
    Attention, norms and rotary embedding are Llama's in both. v1 renormalises for k > 1 only, and divides by the
    sum + 1e-20, which in float32 is the sum.

    Deviation: v1's own class takes the softmax in the model's dtype, qwen2_moe (like vLLM's v1) in float32; below
    float32 the weights agree to rounding, and experts that v1 ties are told apart.
    """
    if config.get("n_routed_experts") is None:
        raise _dense(where, "n_routed_experts is null")
    try:
        old = DeepSeekConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        field = DeepSeekConfig.model_fields.get(name)
        if field is None:
            raise _inexact(f"unknown field {name!r}"[:200], where, expected="the fields of v1 only") from error
        given = f"is {config[name]!r}"[:200] if name in config else "is missing"
        raise _inexact(f"{name} {given}", where, expected=field.description or first["msg"]) from error
    heads, top_k, wide = old.num_attention_heads, old.num_experts_per_tok, old.hidden_size
    key_heads = old.num_key_value_heads or heads
    if wide % heads or heads % key_heads or top_k > old.n_routed_experts:
        found = f"width {wide}, {heads} heads, {key_heads} key heads, top {top_k} of {old.n_routed_experts} experts"
        raise _inexact(found, where, expected="each a multiple of the next, and no more than all experts")
    layers = range(old.num_hidden_layers)
    dense = [i for i in layers if i < old.first_k_dense_replace or i % old.moe_layer_freq]
    if len(dense) == len(layers):
        raise _dense(where, "first_k_dense_replace and moe_layer_freq leave no layer to them")
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_experts_per_tok", "rms_norm_eps", "tie_word_embeddings", "hidden_act",
        "max_position_embeddings", "initializer_range", "attention_dropout", "use_cache", "bos_token_id",
        "eos_token_id", "pad_token_id",
    )  # fmt: skip
    new = {
        **{name: getattr(old, name) for name in same},
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "dtype": old.torch_dtype or old.dtype,
        "num_key_value_heads": key_heads, "num_experts": old.n_routed_experts,
        "norm_topk_prob": old.norm_topk_prob and top_k > 1,
        "shared_expert_intermediate_size": (old.n_shared_experts or 0) * old.moe_intermediate_size or 1,
        "mlp_only_layers": dense, "decoder_sparse_step": 1, "qkv_bias": False, "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": old.rope_theta},
    }  # fmt: skip
    new = {key: value for key, value in new.items() if value is not None}
    return new, _pieces(old, wide // heads * key_heads, frozenset(dense))


def _pieces(old: DeepSeekConfig, key_width: int, dense: frozenset[int]) -> Iterator[Piece]:
    wide = old.hidden_size
    shared = (old.n_shared_experts or 0) * old.moe_intermediate_size

    def copy(name: str, *shape: int) -> Piece:
        return Piece(name, name, shape)

    def mlp(start: str, width: int) -> Iterator[Piece]:
        yield copy(f"{start}.gate_proj.weight", width, wide)
        yield copy(f"{start}.up_proj.weight", width, wide)
        yield copy(f"{start}.down_proj.weight", wide, width)

    yield copy("model.embed_tokens.weight", old.vocab_size, wide)
    for layer in range(old.num_hidden_layers):
        start = f"model.layers.{layer}"
        yield copy(f"{start}.input_layernorm.weight", wide)
        yield copy(f"{start}.post_attention_layernorm.weight", wide)
        for name, width in (("q", wide), ("k", key_width), ("v", key_width), ("o", wide)):
            yield copy(f"{start}.self_attn.{name}_proj.weight", width, wide)
        if layer in dense:
            yield from mlp(f"{start}.mlp", old.intermediate_size)
            continue
        router = f"{start}.mlp.gate.weight"
        yield copy(router, old.n_routed_experts, wide)
        for expert in range(old.n_routed_experts):
            yield from mlp(f"{start}.mlp.experts.{expert}", old.moe_intermediate_size)
        yield Piece(f"{start}.mlp.shared_expert_gate.weight", router, (1, wide), "zero")
        for piece in mlp(f"{start}.mlp.shared_expert", shared or 1):
            like = piece.name.replace(".shared_expert.", ".shared_experts.")
            how: Literal["copy", "double"] = "double" if ".down_proj." in like else "copy"
            yield piece._replace(like=like, how=how) if shared else piece._replace(like=router, how="zero")
    yield copy("model.norm.weight", wide)
    if not old.tie_word_embeddings:
        yield copy("lm_head.weight", old.vocab_size, wide)


def _inexact(what: str, where: str, *, expected: str) -> ModelError:
    return ModelError(
        f"the checkpoint cannot be converted exactly: {what}", where=where, expected=expected,
        do="use another checkpoint; where the field changes nothing, take it out of a copy of config.json",
    )  # fmt: skip


def _dense(where: str, what: str) -> DenseModelError:
    return DenseModelError(
        f"the model has no experts: {what}", where=where, expected="a layer with experts", do="use a MoE model"
    )

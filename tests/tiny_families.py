"""A tiny random model of every router family of transformers, for tests: the same routers, layers of 32 numbers.

Families in REFUSED are not here. Multimodal families are here by their text model (llama4_text, ...) where it has a
causal class, and by the type that published checkpoints carry (llama4, ...): whole models with the smallest towers,
which also run on text alone.

    config = tiny_config("deepseek_v3", tokenizer)
    model = tiny_model(config)
    randomise(model)
    model.save_pretrained(folder)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Row = dict[str, object]

SHAPE: Row = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
"""Every text config; a row overrides. initializer_range: large enough that the choice of experts moves the output."""

EXPERTS: Row = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
ROUTED: Row = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
LOCAL: Row = {"num_local_experts": 8, "num_experts_per_tok": 3}
GROUPS: Row = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
"""4 groups of 2 experts, 2 groups kept: 3 of the 4 experts left are selected."""
MLA: Row = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
INDEXER: Row = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
DENSE_FIRST: Row = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
DELTA: Row = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
MAMBA2: Row = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
VISION: Row = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip

_QWEN2 = {**EXPERTS, "shared_expert_intermediate_size": 16}
_QWEN3_VL: Row = {
    "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "text_config": {**EXPERTS, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
}
_DSV2 = {**ROUTED, **MLA, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
_DSV3 = {**ROUTED, **MLA, **GROUPS, "first_k_dense_replace": 1}
_DSV4 = {
    **ROUTED, "num_key_value_heads": 1, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "hc_mult": 2,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16, "sliding_window": 16, "partial_rotary_factor": 0.5,
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
}  # fmt: skip
_COHERE2 = {**EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 32}
_DBRX = {"d_model": 32, "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}
_DBRX_FFN = {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 3}
_LAGUNA = {
    **EXPERTS, **DENSE_FIRST, "shared_expert_intermediate_size": 16, "moe_routed_scaling_factor": 1.5,
}  # fmt: skip
_LFM2 = {
    **EXPERTS, "num_dense_layers": 1, "routed_scaling_factor": 1.5, "layer_types": ["conv", "full_attention", "conv"],
}  # fmt: skip
_OCR_VISION: Row = {
    "sam_config": {
        "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16, "global_attn_indexes": [0], "downsample_channels": [8, 16],
    },
    "encoder_config": {
        "vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
}  # fmt: skip
_OCR_TEXT = {**ROUTED, **DENSE_FIRST, "n_shared_experts": 1, "routed_scaling_factor": 1.5}
_UNLIMITED_VISION: Row = {
    "sam_config": {
        "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16,
        "image_size": 32, "patch_size": 16, "global_attn_indexes": [0], "downsample_channels": [8, 16],
    },
    "encoder_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    },
}  # fmt: skip
_INKLING = {
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8,
    "d_rel": 4, "rel_extent": 32,
}  # fmt: skip
_QWEN4 = {
    **_QWEN2, **DELTA, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4,
}  # fmt: skip
_AXK2 = {**ROUTED, **MLA, **INDEXER, **DENSE_FIRST, "gated_norm_rank": 4, "routed_scaling_factor": 1.5}
_LLAMA4 = {
    "num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "attention_chunk_size": 32,
    "moe_layers": [1, 2],
}  # fmt: skip
_GEMMA4 = {
    "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 16, "enable_moe_block": True,
    "vocab_size_per_layer_input": 16, "hidden_size_per_layer_input": 0, "global_head_dim": 16, "sliding_window": 8,
}  # fmt: skip
_QWEN3_5 = {**_QWEN2, **DELTA}
_ARIA = {"moe_num_experts": 8, "moe_topk": 3, "moe_num_shared_experts": 1}
_MINIMAX_M3 = {
    **LOCAL, **DENSE_FIRST, "intermediate_size": 16, "dense_intermediate_size": 32, "shared_intermediate_size": 16,
    "routed_scaling_factor": 1.5, "rotary_dim": 8,
}  # fmt: skip
_INKLING_TEXT = {
    **ROUTED, **_INKLING, "n_shared_experts": 2, "route_scale": 1.5, "dense_mlp_idx": 1,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "logits_mup_width_multiplier": 1.0,
}  # fmt: skip
_DOTS3 = {
    **ROUTED, **MLA, **GROUPS, **INDEXER, **DENSE_FIRST, "shared_experts_intermediate_size": 16, "head_dim": 32,
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"], "sliding_window": 8,
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
_INKLING2_TEXT = {
    **ROUTED, **_INKLING, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "route_scale": 1.5,
}  # fmt: skip
_QWEN_VISION: Row = {**VISION, "num_position_embeddings": 16}

TINY: dict[str, Row] = {
    "qwen3_moe": {**EXPERTS},
    "qwen3_moe/renormalised": {**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "mixtral": {**LOCAL},
    "olmoe": {**EXPERTS},
    "olmoe/renormalised": {**EXPERTS, "norm_topk_prob": True},
    "qwen2_moe": _QWEN2,
    "qwen2_moe/renormalised": {**_QWEN2, "norm_topk_prob": True, "decoder_sparse_step": 2, "num_hidden_layers": 4},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {**LOCAL, "sliding_window": 8},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 3},
    "hunyuan_v1_moe/per-layer": {"num_experts": 8, "moe_topk": [3, 2, 1]},
    "deepseek_v2": _DSV2,
    "deepseek_v2/groups": {**_DSV2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": _DSV3,
    "deepseek_v3/no-groups": {**_DSV3, "n_group": 1, "topk_group": 1},
    "deepseek_v3/not-renormalised": {**_DSV3, "norm_topk_prob": False},
    "glm4_moe": {**ROUTED, **GROUPS},
    "llama4_text": _LLAMA4,
    "qwen3_next": {**_QWEN2, **DELTA},
    "qwen3_next/not-renormalised": {**_QWEN2, **DELTA, "norm_topk_prob": False, "mlp_only_layers": [0]},
    "qwen3_5_moe_text": _QWEN3_5,
    "gemma4_text": _GEMMA4,
    "granitemoe": {**LOCAL},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 16},
    "granitemoe_swa": {**LOCAL, "shared_intermediate_size": 16, "sliding_window": 8},
    "granitemoehybrid": {
        **LOCAL, **MAMBA2, "shared_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "jamba": {
        "num_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "dots1": {**ROUTED, **GROUPS, "n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True},
    "minimax": {**LOCAL, "layer_types": ["full_attention", "full_attention", "full_attention"]},
    "minimax/linear": {  # its linear attention sees padding: a batch is not equal to its prompts alone
        **LOCAL, "block_size": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "minimax_m2": {**LOCAL, "rotary_dim": 8},
    "lfm2_moe": _LFM2,
    "lfm2_moe/no-bias": {**_LFM2, "use_expert_bias": False, "norm_topk_prob": False},
    "longcat_flash": {
        **MLA, "num_hidden_layers": 4, "n_routed_experts": 8, "moe_topk": 3, "zero_expert_num": 2,
        "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32, "routed_scaling_factor": 1.5,
    },
    "nemotron_h": {
        **ROUTED, **GROUPS, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 16, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
        "n_groups": 2, "chunk_size": 16, "use_mamba_kernels": False,
    },
    "afmoe": {**EXPERTS, "num_shared_experts": 1, "route_scale": 1.5, "sliding_window": 8, "mup_enabled": True},
    "aria_text": _ARIA,
    "axk1": _DSV3,
    "axk2": {**_AXK2, **GROUPS},
    "axk2/no-groups": _AXK2,
    "cohere2_moe": _COHERE2,
    "cohere2_moe/sigmoid": {**_COHERE2, "expert_selection_fn": "sigmoid"},
    "cohere2_moe/sigmoid-not-renormalised": {
        **_COHERE2, "expert_selection_fn": "sigmoid", "norm_topk_prob": False, "first_k_dense_replace": 0,
        "shared_expert_combination_strategy": "sum",
    },
    "dbrx": {**_DBRX, "ffn_config": _DBRX_FFN},
    "dbrx/norm-none": {**_DBRX, "ffn_config": {**_DBRX_FFN, "moe_normalize_expert_weights": None}},
    "dbrx/norm-2": {**_DBRX, "ffn_config": {**_DBRX_FFN, "moe_normalize_expert_weights": 2.0}},
    "deepseek_v32": {**_DSV3, **INDEXER},
    "deepseek_v4": {**_DSV4, "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention"]},
    "deepseek_v4/compressed": {  # its compression sees padding; bfloat16 fails inside transformers
        **_DSV4,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    },
    "exaone_moe": {**EXPERTS, **GROUPS, "num_shared_experts": 1, "sliding_window": 8},
    "flex_olmo": {**EXPERTS},
    "flex_olmo/renormalised": {**EXPERTS, "norm_topk_prob": True},
    "glm4_moe_lite": {**ROUTED, **MLA, **GROUPS},
    "glm_moe_dsa": {**ROUTED, **MLA, **GROUPS, **INDEXER, "first_k_dense_replace": 1},
    "hy_v3": {**EXPERTS, "router_scaling_factor": 1.5},
    "hy_v4": {**ROUTED, **MLA, **GROUPS, **INDEXER, "hc_mult": 2},
    "inkling_text": _INKLING_TEXT,
    "jetmoe": {**LOCAL, "kv_channels": 16},
    "kimi_linear": {
        **LOCAL, **MLA, **GROUPS, **DENSE_FIRST, "moe_intermediate_size": 16, "n_shared_experts": 1,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_head_dim": 16, "linear_num_heads": 2,
    },
    "laguna": {**_LAGUNA, "moe_router_logit_softcapping": 5.0},
    "laguna/no-softcap": _LAGUNA,
    "mellum": {**EXPERTS},
    "mellum/not-renormalised": {**EXPERTS, **DENSE_FIRST, "norm_topk_prob": False},
    "mimo_v2_flash": {**ROUTED, **GROUPS, "num_key_value_heads": 1, "v_head_dim": 8, "sliding_window": 8},
    "minimax_m3_vl_text": _MINIMAX_M3,
    "solar_open": {**ROUTED, **GROUPS, "n_shared_experts": 1},
    "zaya": {
        "num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "router_hidden_size": 16,
    },
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp_text/not-renormalised": {**_QWEN4, "norm_topk_prob": False},
    "mistral4": {**ROUTED, **MLA, **GROUPS, "first_k_dense_replace": 1, "head_dim": 32},
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen3_omni_moe_thinker": {
        **_QWEN3_VL,
        "vision_start_token_id": 151652,
        "audio_config": {
            "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
            "output_dim": 32, "downsample_hidden_size": 4, "max_source_positions": 16,
        },
    },
    "glm4v_moe": {
        "vision_config": VISION,
        "text_config": {
            **ROUTED, **GROUPS,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
    },
    "glm5_next": {
        "vision_config": {**VISION, "projection_intermediate_size": 16},
        "text_config": {
            **ROUTED, **MLA, **GROUPS, **DENSE_FIRST, **INDEXER, "qk_rope_head_dim": 0, "hc_mult": 2, "index_kpool": 4,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "indexer_types": ["full", "full", "full"], "linear_head_dim": 16, "linear_num_heads": 2,
        },
    },
    "ernie4_5_vl_moe": {
        "vision_config": VISION,
        "text_config": {
            "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": [16, 16], "moe_num_shared_experts": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]},
        },
    },
    "deepseek_ocr2": {"vision_config": _OCR_VISION, "text_config": _OCR_TEXT},
    "deepseek_ocr2/groups": {
        "vision_config": _OCR_VISION,
        "text_config": {**_OCR_TEXT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    },
    "step3p7": {
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
            "mlp_ratio": 1.0,
        },
        "text_config": {
            **ROUTED, **DENSE_FIRST, "share_expert_dim": 16, "moe_router_scaling_factor": 1.5, "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    },
    "llama4": {
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
            "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "image_size": 16,
            "patch_size": 4,
        },
        "text_config": _LLAMA4,
    },
    "gemma4": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
        },
        "audio_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [4, 4],
            "output_proj_dims": 16,
        },
        "text_config": _GEMMA4,
    },
    "qwen3_5_moe": {"vision_config": _QWEN_VISION, "text_config": _QWEN3_5},
    "qwen4_exp": {"vision_config": _QWEN_VISION, "text_config": _QWEN4},
    "aria": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        "projector_patch_to_query_dict": {16: 4}, "image_token_index": 99999,
        "text_config": {**_ARIA, "model_type": "aria_text"},
    },
    "minimax_m3_vl": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        "projector_hidden_size": 16, "text_config": _MINIMAX_M3,
    },
    "inkling_mm_model": {
        "vision_config": {
            "text_hidden_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "audio_config": {"n_mel_bins": 8, "mel_vocab_size": 8, "text_hidden_size": 32},
        "text_config": _INKLING_TEXT,
    },
    # From transformers 5.23 on
    "dots3_note": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "patch_size": 4, "moe_intermediate_size": 16, "num_local_experts": 2, "mlp_layer_types": ["dense"],
            "adapter_in_dim": 16, "adapter_out_dim": 32,
        },
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "feature_size": 8, "downsample_hidden_size": 4, "adapter_input_size": 16, "adapter_out_dim": 32,
        },
        "text_config": _DOTS3,
    },
    "inkling2": {
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
            "posemb_grid_size": 4, "projection_hidden_dim": 16, "text_hidden_size": 32,
        },
        "text_config": _INKLING2_TEXT,
    },
    "bailing_hybrid": {
        **LOCAL, **MLA, **GROUPS, **DENSE_FIRST, "moe_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "beam": {**EXPERTS, **GROUPS, **DENSE_FIRST, "sliding_window": 8},
    "dots3_note_text": _DOTS3,
    "flint": {**_QWEN2, "mlp_only_layers": [0], "sliding_window": 8},
    "flint/not-renormalised": {**_QWEN2, "mlp_only_layers": [0], "sliding_window": 8, "norm_topk_prob": False},
    "inkling2_text": _INKLING2_TEXT,
    "kolibri1": {**_QWEN2, "sliding_window": 8},
    "kolibri1/renormalised": {**_QWEN2, "sliding_window": 8, "norm_topk_prob": True},
    "mistral_large4": {
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        },
        "text_config": {**ROUTED, **MLA, **GROUPS, **INDEXER},
    },
    "muse_spark": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4,
        },
        "audio_config": {
            "patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "num_hidden_layers": 1, "out_hidden_size": 32,
        },
        "out_hidden_size": 16, "projector_hidden_size": 16,
        "text_config": {
            **LOCAL, **DENSE_FIRST, "moe_intermediate_size": 16, "moe_hidden_size": 16, "output_multiplier": 0.5,
            "routed_scaling_factor": 1.5, "sliding_window": 8,
        },
    },
    "unlimited_ocr": {"vision_config": _UNLIMITED_VISION, "text_config": _OCR_TEXT},
    "unlimited_ocr/groups": {
        "vision_config": _UNLIMITED_VISION,
        "text_config": {**_OCR_TEXT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    },
}  # fmt: skip
"""model_type, or model_type/variant, to what its config says beside SHAPE (nested ones: text_config's beside SHAPE)."""

NAMED: dict[str, tuple[str, Row]] = {
    "Qwen/Qwen3-30B-A3B": (
        "qwen3_moe",
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 8, "norm_topk_prob": True},
    ),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (
        "qwen3_moe",
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 8, "norm_topk_prob": True},
    ),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": (
        "qwen2_moe",
        {
            "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 32, "norm_topk_prob": False,
        },
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "microsoft/Phi-3.5-MoE-instruct": (
        "phimoe",
        {
            "architectures": ["PhiMoEForCausalLM"], "num_local_experts": 16, "num_experts_per_tok": 2,
            "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01, "input_jitter_noise": 0.01,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                "short_mscale": 1.2, "long_mscale": 1.2, "original_max_position_embeddings": 4096,
            },
        },
    ),
    "openai/gpt-oss-20b": (
        "gpt_oss", {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 8, "sliding_window": 128},
    ),
    "openai/gpt-oss-120b": (
        "gpt_oss", {"num_local_experts": 128, "num_experts_per_tok": 4, "intermediate_size": 8, "sliding_window": 128},
    ),
    "tencent/Hunyuan-A13B-Instruct": (
        "hunyuan_v1_moe",
        {
            "num_experts": 64, "moe_topk": [8, 8, 8], "intermediate_size": 8, "moe_intermediate_size": [8, 8, 8],
            "num_shared_expert": [1, 1, 1],
        },
    ),
    "allenai/OLMoE-1B-7B-0125-Instruct": (
        "olmoe", {"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 8, "norm_topk_prob": False},
    ),
    "deepseek-ai/deepseek-moe-16b-chat": (
        "qwen2_moe",
        {
            "num_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 16, "norm_topk_prob": False, "mlp_only_layers": [0], "qkv_bias": False,
        },
    ),
}  # fmt: skip
"""Hub name to family and settings: the true numbers of experts, and what is on or off; only the sizes are tiny."""


def names() -> list[str]:
    """The keys of TINY that the installed transformers knows."""
    return [name for name in TINY if name.split("/")[0] in CONFIG_MAPPING_NAMES]


def tiny_config(name: str, tokenizer: Any) -> PreTrainedConfig:
    """The config of a key of TINY or NAMED, with the tokenizer's vocabulary and special tokens."""
    model_type, row = NAMED[name] if name in NAMED else (name.split("/")[0], TINY[name])
    common = {
        **SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
    }  # fmt: skip
    if model_type.startswith("inkling"):
        common["unpadded_vocab_size"] = len(tokenizer)
    if isinstance(text := row.get("text_config"), dict):
        settings = {"tie_word_embeddings": False, **row, "text_config": {**common, **text}}
    else:
        settings = {**common, **row}
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """The model of a config: causal, or with its towers where it has some; memory nobody set is NaN."""
    whole = "vision_config" in config.sub_configs  # saved whole, as published; load takes the text model out of it
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not whole
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]), _unset_memory_is_nan():
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


@contextmanager
def _unset_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


ROUTER_CLASS = re.compile(r"(Router|TopKGating|MoEV1Gate)$")
LOGIT_WEIGHT = re.compile(r"^((gate|wg|layer|classifier|proj|router_mlp\.\w+|down_proj)\.)?weight$")
"""Names within a router of the weights that make its logits; zaya's are those of a small network."""
CORRECTION_BIAS = re.compile(r"(e_score_correction_bias|expert_bias|balancing_biases)$")
PROBABILITIES = re.compile(r"ernie4_5|longcat|zaya")
"""Families whose correction bias is added to a softmax probability: a small number already decides."""


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of everything that makes router logits, recorded by transformers or not (hash routers)."""
    return {
        path: module
        for path, module in model.named_modules()
        if ROUTER_CLASS.search(type(module).__name__) or (path.endswith(".router") and type(module) is nn.Linear)
    }


@torch.no_grad()
def randomise(model: PreTrainedModel, *, seed: int = 0, spread: float = 0.5) -> None:
    """Make the routing of a fresh model vary from token to token, in place. spread: std of the router weights.

    Correction biases and scales get values, the biases of a sigmoid mostly below zero: then choice scores are negative
    too, and a group that is filled with zeros can win. What the model's own initialisation left unset (NaN) or all zero
    gets small random numbers; the rest stays.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        unset = not bool(parameter.isfinite().all()) or (parameter.ndim > 1 and not bool(parameter.any()))
        if unset and parameter.is_floating_point():
            parameter.normal_(std=0.1, generator=generator)
    for module in routers(model).values():
        for name, parameter in module.named_parameters():
            if LOGIT_WEIGHT.search(name) or (name == "bias" and "GptOss" in type(module).__name__):
                parameter.normal_(std=spread, generator=generator)
            elif name in ("per_expert_scale", "global_scale"):
                parameter.uniform_(0.5, 1.5, generator=generator)
        if isinstance(table := getattr(module, "tid2eid", None), torch.Tensor):
            order = torch.rand(table.shape[0], len(next(module.parameters())), generator=generator).argsort(dim=-1)
            table.copy_(order[:, : table.shape[1]])
    mean, std = (0.0, 0.1) if PROBABILITIES.search(model.config.model_type) else (-0.7, 0.4)
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if CORRECTION_BIAS.search(path) or path.endswith("moe_statics.e_score_correction_bias"):
            tensor.normal_(mean, std, generator=generator)
        if path.endswith("balancing_biases"):
            tensor[-1] = -1.0  # zaya's expert that skips: loading always puts its own -1 there

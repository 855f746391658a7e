"""Every router family we know, one row each: data, no code.

transformers declares each family's router itself (the record of `router_logits` in its model class), and where the
logits stand in what the router returns; a row says only what that record does not: how logits become a selection, and
under what names the router keeps its numbers. A name is looked up on the router, then on the block around it, then in
the text model's config; `../name` means the block. To add a family, add a row here and a line in
tests/tiny_families.py, and run `pytest tests/compat -k FAMILY` (docs/adding-a-model.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from moesteer.routing import ScoringKind

Bake = Literal["bias", "layernorm", "correction", ""]


@dataclass(frozen=True)
class Family:
    """One row: how the routers of a `model_type` of transformers score and select.

    also: other model types with the same router (`text_config`s of multimodal models).
    weight: the router's matrix [W, hidden], by its path from the router. W is the number of choices, shared included.
    renormalise, scale, groups, groups_kept, softcap, multiplier, shared, skipped, norm_p: see routing.Scoring; a
    number, or the name that holds it. correction, expert_scale: names of vectors [E].
    reads: how the router's result is read (models/readouts.py). selector: the block's method that selects, where the
    router only gives logits. router: the class's name, where transformers records another module. skips: routers left
    alone, as a regular expression on their paths.
    layer_pattern: regular expression whose first group is the decoder layer's number in a module path.
    bake: what of the checkpoint can hold a mask: "bias" and "layernorm" exactly, "correction" the selection only.
    note: what a user of the family must know.
    """

    model_type: str
    scoring: ScoringKind
    also: tuple[str, ...] = ()
    weight: str = "weight"
    top_k: str = "top_k"
    renormalise: bool | str = "norm_topk_prob"
    scale: float | str = 1.0
    norm_p: float | str = 1.0
    norm_add: float = 0.0
    norm_min: float | str = 0.0
    correction: str = ""
    expert_scale: str = ""
    groups: str = ""
    groups_kept: str = ""
    group_score: Literal["max", "top2-sum"] = "max"
    group_fill: float = float("-inf")
    group_switch: tuple[str, str] = ("", "")
    multiplier: float | str = 1.0
    softcap: float | str = 0.0
    shared: int | str = 0
    skipped: int = 0
    jitter: float | str = 0.01
    low_precision: bool = False
    kind_switch: tuple[str, Mapping[str, ScoringKind]] = ("", {})
    reads: Literal["tuple", "top-k", "dense", "sorted"] = "tuple"
    selector: str = ""
    router: str = ""
    skips: str = ""
    layer_pattern: str = r"(?:^|\.)(?:layers|blocks)\.(\d+)\."
    bake: Bake = ""
    note: str = ""
    examples: tuple[str, ...] = ()

    @property
    def model_types(self) -> tuple[str, ...]:
        """Every model type that this row is for."""
        return (self.model_type, *self.also)


softmax = partial(Family, scoring="softmax-topk")
softmax_renormalised = partial(softmax, renormalise=True)
topk_softmax = partial(Family, scoring="topk-softmax", renormalise=False)
sigmoid = partial(Family, scoring="sigmoid", correction="e_score_correction_bias", bake="correction")
# DeepSeek-V3's router and its many relatives
deepseek = partial(
    sigmoid, scale="routed_scaling_factor", norm_add=1e-20, groups="num_group", groups_kept="topk_group",
    group_score="top2-sum",
)  # fmt: skip
deepseek_v2 = partial(
    softmax, renormalise=False, scale="routed_scaling_factor", groups="num_group", groups_kept="topk_group",
    group_switch=("topk_method", "group_limited_greedy"), group_fill=0.0,
)  # fmt: skip
zero_fill = partial(Family, group_fill=0.0, groups="num_group", groups_kept="topk_group", scale="routed_scaling_factor")

ROWS = (
    sigmoid(
        "afmoe", weight="gate.weight", correction="../expert_bias", renormalise=True, norm_add=1e-20,
        scale="route_scale", examples=("arcee-ai/Trinity-Mini",),
    ),
    topk_softmax("aria", also=("aria_text",), examples=("rhymes-ai/Aria-Chat",)),
    deepseek("axk1", examples=("skt/A.X-K1",)),
    deepseek("axk2", group_fill=0.0),
    deepseek("bailing_hybrid", examples=("inclusionAI/Ling-2.5-1T",)),
    deepseek("beam", scale=1.0),
    Family(
        "cohere2_moe", "topk-softmax",
        kind_switch=("expert_selection_fn", {"softmax": "topk-softmax", "sigmoid": "topk-sigmoid"}),
    ),
    softmax(
        "dbrx", weight="layer.weight", selector="route_tokens_to_experts", renormalise="moe_normalize_expert_weights",
        norm_p="moe_normalize_expert_weights", low_precision=True, examples=("databricks/dbrx-instruct",),
    ),
    deepseek_v2("deepseek_ocr2", also=("deepseek_ocr2_text",), examples=("deepseek-ai/DeepSeek-OCR-2",)),
    deepseek_v2("deepseek_v2", examples=("deepseek-ai/DeepSeek-V2-Lite-Chat",)),
    deepseek("deepseek_v3", examples=("deepseek-ai/DeepSeek-V3.1", "moonshotai/Kimi-K2-Instruct")),
    deepseek("deepseek_v32", examples=("deepseek-ai/DeepSeek-V3.2",)),
    Family(
        "deepseek_v4", "sqrtsoftplus", renormalise=True, norm_add=1e-20, scale="routed_scaling_factor",
        correction="e_score_correction_bias", low_precision=True, bake="correction",
        kind_switch=("scoring_func", {"sqrtsoftplus": "sqrtsoftplus", "sigmoid": "sigmoid", "softmax": "softmax-topk"}),
        note="the first layers choose by token id (hash routing) and have no router to steer",
        examples=("deepseek-ai/DeepSeek-V4-Flash",),
    ),
    deepseek("dots1", examples=("rednote-hilab/dots.llm1.inst",)),
    deepseek("dots3_note", also=("dots3_note_text",), skips=r"vision|audio"),
    softmax_renormalised(
        "ernie4_5_moe", correction="moe_statics.e_score_correction_bias", norm_min="norm_min", bake="correction",
        examples=("baidu/ERNIE-4.5-21B-A3B-PT",),
    ),
    softmax_renormalised(
        "ernie4_5_vl_moe", also=("ernie4_5_vl_moe_text",), router="Ernie4_5_VLMoeMoeTopKRouter", skips=r"vision_moe",
        correction="moe_statics.e_score_correction_bias", norm_min="norm_min", bake="correction",
        note="text tokens only: images have experts and routers of their own, which are left alone",
        examples=("baidu/ERNIE-4.5-VL-28B-A3B-PT",),
    ),
    deepseek("exaone_moe", examples=("LGAI-EXAONE/K-EXAONE-236B-A23B",)),
    softmax("flex_olmo", examples=("allenai/FlexOlmo-7x7B-1T",)),
    Family("flint", "sigmoid"),
    softmax_renormalised(
        "gemma4", also=("gemma4_text",), weight="proj.weight", top_k="top_k_experts",
        expert_scale="per_expert_scale", examples=("google/gemma-4-26B-A4B-it",),
    ),
    deepseek("glm4_moe", examples=("zai-org/GLM-4.5-Air", "zai-org/GLM-4.6")),
    deepseek("glm4_moe_lite", examples=("zai-org/GLM-4.7-Flash",)),
    deepseek("glm4v_moe", also=("glm4v_moe_text",), examples=("zai-org/GLM-4.5V",)),
    deepseek("glm5_next", also=("glm5_next_text",)),
    deepseek("glm_moe_dsa", examples=("zai-org/GLM-5",)),
    topk_softmax("gpt_oss", bake="bias", examples=("openai/gpt-oss-20b", "openai/gpt-oss-120b")),
    topk_softmax("granitemoe", examples=("ibm-granite/granite-3.1-3b-a800m-instruct",)),
    topk_softmax("granitemoe_swa"),
    topk_softmax("granitemoehybrid", examples=("ibm-granite/granite-4.0-h-tiny",)),
    topk_softmax("granitemoeshared"),
    softmax_renormalised("hunyuan_v1_moe", weight="wg.weight", examples=("tencent/Hunyuan-A13B-Instruct",)),
    sigmoid(
        "hy_v3", correction="../e_score_correction_bias", renormalise=True, norm_add=1e-20,
        scale="router_scaling_factor",
    ),
    deepseek("hy_v4"),
    sigmoid(
        "inkling", also=("inkling_text", "inkling_mm_model"), renormalise=True, scale="route_scale",
        expert_scale="global_scale", shared="n_shared_experts", low_precision=True,
        note="the shared experts' logits are normalised with the chosen; they are not steered",
    ),
    Family(
        "inkling2", "sigmoid", also=("inkling2_text",), renormalise=True, norm_add=1e-20,
        scale="routed_scaling_factor", correction="e_score_correction_bias", bake="correction",
        kind_switch=("scoring_func", {"sqrtsoftplus": "sqrtsoftplus", "sigmoid": "sigmoid", "softmax": "softmax-topk"}),
    ),
    softmax("jamba", renormalise=False, selector="route_tokens_to_experts",
            examples=("ai21labs/AI21-Jamba-Mini-1.7",)),
    topk_softmax(
        "jetmoe", weight="layer.weight", reads="sorted", router="JetMoeTopKGating", skips=r"\.self_attention\.",
        note="the mixture of attention heads has routers too; they are not steered",
        examples=("jetmoe/jetmoe-8b-chat",),
    ),
    deepseek("kimi_linear", examples=("moonshotai/Kimi-Linear-48B-A3B-Instruct",)),
    Family("kolibri1", "topk-sigmoid", correction="e_score_correction_bias", bake="correction"),
    sigmoid("laguna", renormalise=True, softcap="router_logit_softcapping"),
    sigmoid(
        "lfm2_moe", correction="../expert_bias", norm_add=1e-6, scale="routed_scaling_factor", low_precision=True,
        examples=("LiquidAI/LFM2-8B-A1B",),
    ),
    Family(
        "llama4", "topk-sigmoid", also=("llama4_text",), renormalise=False, reads="dense",
        examples=("meta-llama/Llama-4-Scout-17B-16E-Instruct",),
    ),
    softmax(
        "longcat_flash", weight="classifier.weight", renormalise=False, scale="routed_scaling_factor",
        correction="e_score_correction_bias", bake="correction",
        note="the last choices are zero experts, which pass their input on; a mask covers them too",
        examples=("meituan-longcat/LongCat-Flash-Chat",),
    ),
    softmax("mellum", examples=("JetBrains/Mellum-2",)),
    deepseek("mimo_v2_flash", examples=("XiaomiMiMo/MiMo-V2-Flash",)),
    softmax_renormalised("minimax", examples=("MiniMaxAI/MiniMax-Text-01-hf",)),
    sigmoid("minimax_m2", correction="../e_score_correction_bias", renormalise=True,
            examples=("MiniMaxAI/MiniMax-M2",)),
    sigmoid("minimax_m3_vl", also=("minimax_m3_vl_text",), renormalise=True),
    zero_fill(
        "mistral4", "softmax-topk", also=("mistral4_text",), group_score="top2-sum", norm_add=1e-20,
        low_precision=True,
    ),
    zero_fill(
        "mistral_large4", "softmax-topk", also=("mistral_large4_text",), renormalise=True, group_score="top2-sum",
        norm_add=1e-20,
    ),
    softmax_renormalised("mixtral", examples=("mistralai/Mixtral-8x7B-Instruct-v0.1",)),
    sigmoid(
        "muse_spark", also=("muse_spark_text",), renormalise=True, norm_add=1e-15, multiplier="output_multiplier",
        scale="routed_scaling_factor",
    ),
    deepseek("nemotron_h", examples=("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",)),
    softmax("olmoe", examples=("allenai/OLMoE-1B-7B-0125-Instruct",)),
    Family(
        "phimoe", "sparsemixer", renormalise=False, jitter="router_jitter_noise", low_precision=True, bake="layernorm",
        examples=("microsoft/Phi-3.5-MoE-instruct",),
    ),
    softmax("qwen2_moe", examples=("Qwen/Qwen1.5-MoE-A2.7B-Chat", "deepseek-ai/deepseek-moe-16b-chat (converted)")),
    softmax_renormalised("qwen3_5_moe", also=("qwen3_5_moe_text",), examples=("Qwen/Qwen3.5-35B-A3B",)),
    softmax(
        "qwen3_moe", examples=("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Instruct-2507", "lab-tiny"),
    ),
    softmax("qwen3_next", examples=("Qwen/Qwen3-Next-80B-A3B-Instruct",)),
    softmax(
        "qwen3_omni_moe", also=("qwen3_omni_moe_text", "qwen3_omni_moe_thinker"), skips=r"(^|\.)talker\.",
        router="Qwen3OmniMoeThinkerTextTopKRouter",
        note="checkpoints of the thinker alone; transformers has no class that generates text for the whole",
    ),
    softmax_renormalised(
        "qwen3_vl_moe", also=("qwen3_vl_moe_text",), examples=("Qwen/Qwen3-VL-30B-A3B-Instruct",)
    ),
    softmax("qwen4_exp", also=("qwen4_exp_text",)),
    deepseek("solar_open", examples=("upstage/Solar-Open-100B",)),
    sigmoid("step3p7", also=("step3p5", "step3p5_text"), renormalise=True),
    deepseek_v2("unlimited_ocr", also=("unlimited_ocr_text",)),
    softmax(
        "zaya", weight="router_mlp.out_proj.weight", renormalise=False, correction="balancing_biases", skipped=1,
        reads="top-k", low_precision=True, bake="correction",
        note="the last choice skips the layer's experts; a mask covers it too",
        examples=("Zyphra/ZAYA1-8B",),
    ),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {name: row for row in ROWS for name in row.model_types}

REFUSED: Mapping[str, str] = {
    "diffusion_gemma": "it denoises blocks of text by diffusion: there is no next token to steer one at a time",
    "doge": "product keys: two sets of sqrt(E) key scores stand for the E experts, so there are no E logits to steer",
    "nllb-moe": "an encoder-decoder whose experts have a capacity: what a token gets depends on its neighbours",
    "openai_privacy_filter": "a token classifier: it generates no text",
    "switch_transformers": "an encoder-decoder whose experts have a capacity, as nllb-moe's",
}
"""Model types of transformers that have a router and that we refuse, each with the reason."""

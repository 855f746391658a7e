"""One engine of vLLM per family, every request of a batch under another mask: the tokens of transformers.

Truth: transformers in float32, each prompt by itself, with the same masks. Models are random and tiny
(tests/tiny_families.py), with sizes that vLLM's CPU kernels take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from moesteer.backends.loading import load
from moesteer.backends.sources import LAB_TINY
from tests.engine.masks import NONE, PROMPTS, A, B, F, engine, said, talks, three_that_matter
from tests.tiny_families import SHAPE, TINY, Row, randomise, tiny_model

ROWS = [A, NONE, B, F, NONE]
MOST = 14
SIZES: Row = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 32}
"""In place of tiny_families' own, where a family has them: vLLM's CPU kernels want multiples of 32."""

FAMILIES: dict[str, Row] = {
    # softmax, then the largest
    "qwen3_moe": {},
    "qwen3_moe/renormalised": {},
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {},
    "mellum": {},
    "minimax": {},
    "gemma4_text": {"global_head_dim": 32},
    # the largest, then softmax
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "granitemoehybrid": {"mamba_d_head": 32},
    # the largest, then sigmoid; one expert a token
    "llama4_text": {"moe_layers": [0, 1, 2], "interleave_moe_layer_step": 1, "attention_chunk_size": 128},
    # two argmaxes
    "phimoe": {"attention_bias": True, "lm_head_bias": True},  # as vLLM's code has them whatever the config says
    # softmax and a correction bias (zero: vLLM's CPU router leaves it out)
    "ernie4_5_moe": {},
    # sigmoid, correction bias, groups; the scale on the weights or on the output
    "glm4_moe": {},
    "dots1": {},
    "solar_open": {},
    "exaone_moe": {},
    # vLLM's transformers backend: fused routing, and routing outside of vLLM
    "flex_olmo": {"moe_intermediate_size": 64},
    "hunyuan_v1_moe": {},
}
"""Name in tiny_families.TINY to sizes of its own."""

LEFT_OUT = {
    "afmoe": "needs settings that transformers' config does not have (route_norm, score_func)",
    "cohere2_moe": "other tokens than transformers without any mask",
    "dbrx": "the tiny checkpoint does not load in transformers either",
    "deepseek_v2": "the CPU kernel of its attention takes 16-bit weights only",
    "deepseek_v3": "the CPU kernel of its attention takes 16-bit weights only",
    "glm4_moe_lite": "needs settings that transformers' config does not have (first_k_dense_replace)",
    "hy_v3": "needs settings that transformers' config does not have (route_norm, expert_hidden_dim)",
    "jamba": "the CPU build has no selective scan",
    "laguna": "the CPU router has no sigmoid without groups",
    "lfm2_moe": "other tokens than transformers without any mask",
    "minimax_m2": "the CPU router has no sigmoid without groups",
    "nemotron_h": "experts without a gated activation run on GPUs only",
    "qwen3_5_moe_text": "the CPU kernel of gated delta nets is bfloat16 only",
    "qwen3_next": "the CPU kernel of gated delta nets is bfloat16 only",
}
"""Tried, and not run by vLLM 0.32 on a CPU in float32, or not as transformers runs it; nothing to do with masks."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder, made on first use."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make(tmp_path_factory.mktemp(name.replace("/", "-")), name)
        return made[name]

    return get


def make(folder: Path, name: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(LAB_TINY)
    known = {**SHAPE, **TINY[name]}
    row = {
        **known, **{key: size for key, size in SIZES.items() if key in known}, **FAMILIES[name],
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }  # fmt: skip
    model = tiny_model(AutoConfig.for_model(name.split("/")[0], **row))
    randomise(model)
    if name == "ernie4_5_moe":
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if path.endswith("e_score_correction_bias"):
                torch.nn.init.zeros_(tensor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if name == "phimoe":  # vLLM knows the class by the name that Microsoft's checkpoints give it
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["PhiMoEForCausalLM"]}))
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_request_of_a_batch_under_its_own_mask(name: str, family: Callable[[str], Path]) -> None:
    model = load(family(name), dtype="float32")
    masks, plain, steered = three_that_matter(model, PROMPTS, ROWS, most=MOST)
    with engine(family(name), masks) as tested:
        assert said(tested, PROMPTS, most=MOST) == plain
        with tested.steered(masks) as receipt:
            assert said(tested, PROMPTS, rows=ROWS, most=MOST) == steered
            assert said(tested, PROMPTS[::-1], rows=ROWS[::-1], most=MOST) == steered[::-1]
        assert said(tested, PROMPTS, most=MOST) == plain
        (report,) = tested.reports()
    assert receipt.changed > 0
    assert report["wrong"] == 0 and report["forced"] > 0


PLAIN = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    job = json.load(sys.stdin)
    wanted = SamplingParams(temperature=0.0, max_tokens=job["most"], ignore_eos=True, detokenize=False)
    said = {}
    for name, folder in job["folders"].items():
        engine = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, seed=0,
                     generation_config="vllm", distributed_executor_backend="uni")
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], wanted, use_tqdm=False)
        said[name] = [list(one.outputs[0].token_ids) for one in outputs]
        engine.llm_engine.engine_core.shutdown()
    print(json.dumps(said))
"""
"""vLLM by itself: a program that does not know of this package, and says what it generates."""


@pytest.mark.slow
def test_unsteered_is_what_vllm_says_without_the_plug_in(family: Callable[[str], Path]) -> None:
    names = ["qwen3_moe", "glm4_moe"]
    models = {name: load(family(name), dtype="float32") for name in names}
    prompts = [list(models[names[0]].encode(talk).token_ids) for talk in talks(PROMPTS)]
    job = {"folders": {name: str(family(name)) for name in names}, "prompts": prompts, "most": MOST}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], input=json.dumps(job), text=True, capture_output=True, timeout=300,
        env={**os.environ, "MOESTEER_VLLM": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    without = json.loads(done.stdout.splitlines()[-1])
    for name, model in models.items():
        masks, plain, _ = three_that_matter(model, PROMPTS, ROWS, most=MOST)
        with engine(family(name), masks) as tested, tested.steered(masks):
            beside = said(tested, PROMPTS, rows=ROWS, most=MOST)
            alone = said(tested, PROMPTS, rows=[NONE] * len(PROMPTS), most=MOST)
        for number, row in enumerate(ROWS):
            until = len(plain[number])  # a reply that ended; vLLM by itself went on
            assert list(alone[number]) == without[name][number][:until]
            if row == NONE:
                assert beside[number] == alone[number]

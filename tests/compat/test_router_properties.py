"""transformers' own router classes under the tap, with drawn shapes, k, groups, ties, masks and rows.

Logits are small multiples of 1/8: ties are common, and exact. What the router returns must be what routing.py says for
the same logits, bias and force, row by row.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer

from moesteer.backends.sources import LAB_TINY
from moesteer.errors import MaskContentError
from moesteer.models.check import difference
from moesteer.models.families import FAMILIES
from moesteer.models.routers import Router, scoring_of
from moesteer.models.steering import MaskTables, Receipt
from moesteer.models.tap import RouterTap
from moesteer.routing import check_force
from tests.compat.masks_and_calls import Calls
from tests.tiny_families import names, routers, tiny_config, tiny_model

ARCHETYPES = [
    name
    for name in (
        "qwen3_moe", "qwen3_moe/renormalised", "mixtral", "gpt_oss", "granitemoe", "cohere2_moe/sigmoid", "deepseek_v2",
        "deepseek_v2/groups", "deepseek_v3", "deepseek_v3/not-renormalised", "axk2", "mistral4", "mistral_large4",
        "ernie4_5_moe", "longcat_flash", "laguna", "deepseek_v4", "inkling_text", "llama4_text", "phimoe", "jetmoe",
        "hunyuan_v1_moe", "minimax_m3_vl_text", "flint", "kolibri1", "muse_spark",
    )
    if name in names()
]  # fmt: skip
"""One of each kind of router that takes nothing but hidden states."""
HIDDEN = 4
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[type[nn.Module], Any]]:
    """Router class and text config of every archetype."""
    tokenizer, found = AutoTokenizer.from_pretrained(LAB_TINY), {}
    for name in ARCHETYPES:
        config = tiny_config(name, tokenizer)
        model = tiny_model(config)
        paths = [path for path in routers(model) if "self_attn" not in path and "self_attention" not in path]
        found[name] = type(routers(model)[paths[-1]]), model.config.get_text_config()
    return found


@st.composite
def shapes(draw: Any, *, grouped: bool, top_k: int | None) -> dict[str, Any]:
    """Experts E in groups, k, rows R of equal length, and all numbers in eighths."""
    groups = draw(st.sampled_from((1, 2, 3, 4))) if grouped else 1
    size = draw(st.integers(2, 4)) if grouped else draw(st.integers(2, 12))
    experts, kept = groups * size, draw(st.integers(1, groups))
    k = top_k or draw(st.integers(1, min(kept * size, experts)))
    assume(k <= kept * size)
    rows, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    return {"groups": groups, "experts": experts, "kept": kept, "k": k, "rows": rows, "each": each, "seed": seed}


def router_of(name: str, cls: type[nn.Module], config: Any, drawn: dict[str, Any], rng: np.random.Generator) -> Router:
    """A router of this class with drawn shape and weights, outside any model."""
    saved = dict(config.__dict__)
    try:
        config.hidden_size = HIDDEN
        for attribute in EXPERTS:
            if hasattr(config, attribute):
                setattr(config, attribute, drawn["experts"])
        for attribute in TOP_K:
            if hasattr(config, attribute):
                setattr(config, attribute, drawn["k"])
        if hasattr(config, "n_group"):
            config.n_group, config.topk_group = drawn["groups"], drawn["kept"]
        module = cls(config) if name != "jetmoe" else cls(HIDDEN, drawn["experts"], drawn["k"])
        family = FAMILIES[name.split("/")[0]]
        scoring = scoring_of(family, module, module, config, where=name)
    finally:
        config.__dict__.clear()
        config.__dict__.update(saved)
    with torch.no_grad():
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if path in ("per_expert_scale", "global_scale"):
                tensor.fill_(1.5)
            elif tensor.ndim > 1 and "correction" not in path:
                tensor.copy_(torch.from_numpy(rng.integers(-1, 2, tensor.shape) / 2))
            else:  # corrections as large as the scores themselves
                tensor.copy_(torch.from_numpy(rng.integers(-16, 17, tensor.shape) / 16))
    weight: Any = module
    for part in family.weight.split("."):
        weight = getattr(weight, part)
    width = weight.shape[0]
    logits_at = {"granitemoe": 2, "llama4_text": 1, "jetmoe": 4}.get(name, 0)
    if name == "granitemoe" and "granitemoe" in names() and _logits_first(module):
        logits_at = 0
    return Router(
        0, 0, "router", module.eval(), SimpleNamespace(), family, scoring, width - scoring.shared, width, logits_at, ""
    )


def _logits_first(module: nn.Module) -> bool:
    """transformers 5.23 moved the logits to the front of granite's output."""
    with torch.no_grad():
        return bool(module(torch.zeros(1, HIDDEN))[0].is_floating_point())


def force_row(router: Router, rng: np.random.Generator) -> np.ndarray:
    """A random row that can be met; none on for top-1."""
    for _ in range(20):
        row = rng.choice(np.array([-1, 0, 0, 1], dtype=np.int8), size=router.experts)
        if router.scoring.top_k == 1:
            row = np.minimum(row, 0)
        try:
            check_force(row[None], scoring=router.scoring)
        except MaskContentError:
            continue
        return row
    return np.zeros(router.experts, dtype=np.int8)


@pytest.mark.parametrize("name", ARCHETYPES)
def test_any_shape_ties_and_masks_select_what_routing_selects(
    name: str, made: dict[str, tuple[type[nn.Module], Any]]
) -> None:
    cls, config = made[name]
    grouped = bool(FAMILIES[name.split("/")[0]].groups) and name != "deepseek_v2" and "no-groups" not in name
    fixed = {"phimoe": 2}.get(name)

    @PROPERTY
    @given(shapes(grouped=grouped, top_k=fixed))
    def check(drawn: dict[str, Any]) -> None:
        rng = np.random.default_rng(drawn["seed"])
        router = router_of(name, cls, config, drawn, rng)
        rows, each = drawn["rows"], drawn["each"]
        hidden = torch.from_numpy(rng.integers(-2, 3, (rows * each, HIDDEN)) / 4).float()
        bias = (rng.integers(-16, 17, (rows, router.experts)) / 8).astype(np.float32)
        force = np.stack([force_row(router, rng) for _ in range(rows)])
        if rng.random() < 0.3:
            force[:] = 0
        if rng.random() < 0.3:
            bias[:] = 0
        empty = np.zeros((1, 1, router.experts))
        tables = MaskTables(
            torch.from_numpy(np.concatenate([empty, bias[None]], axis=1)).float(),
            torch.from_numpy(np.concatenate([empty, force[None]], axis=1)).to(torch.int8),
            receipt=Receipt(1, ("test",), (1.0,)),
        )
        tables.set_rows(list(range(1, rows + 1)))
        calls, tap = Calls(), RouterTap((router,))
        with torch.no_grad(), tap.steer(tables), tap.record(calls):
            router.module(hidden)
        _, raw, experts, weights = calls.calls[-1]
        for row in range(rows):
            part = slice(row * each, (row + 1) * each)
            found = difference(router, raw[part], experts[part], weights[part], bias_NE=bias[row], force_NE=force[row])
            assert found is None, (found, drawn, router.scoring)

    check()

"""Baked checkpoints, loaded by transformers alone: they do what the mask does at run time, family by family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from moesteer import routing
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.backends.sources import LAB_TINY
from moesteer.baking import bake
from moesteer.errors import MaskContentError, ModelError
from moesteer.models.bake import require_representable
from moesteer.models.check import Recorded
from moesteer.models.families import FAMILIES
from moesteer.models.routers import find_routers
from tests.compat.baked_models import KIND, additive, batch, forced, make, only, plain, shared_models
from tests.tiny_families import TINY, names, tiny_config, tiny_model

EXACT = [name for name, kind in KIND.items() if kind in ("bias", "layernorm")]
SEPARATE = {"lfm2_moe/no-bias", "axk2", "hunyuan_v1_moe/per-layer"}
"""Nothing to bake into; losing groups count 0; and refused altogether, since its layers select differently."""
CORRECTION = [name for name, kind in KIND.items() if kind == "correction" and name not in SEPARATE]
NONE = [name for name, kind in KIND.items() if not kind and name not in SEPARATE]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Model]]:
    return shared_models(tmp_path_factory)


# ---- what a baked checkpoint does


@pytest.mark.cell("bake")
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_additive_masks_steer_transformers_alone_exactly(
    name: str, dtype: str, made: Callable[..., tuple[Path, Model]], tmp_path: Path
) -> None:
    """In bfloat16 a few near ties fall otherwise: 0.014 (gpt_oss) and 0.019 (phimoe) of what steering moves, seen."""
    _, model = made(name, dtype)
    mask, inputs = additive(model), batch(model)
    baked = bake(model, mask, out=tmp_path / "out")
    alone, seen = plain(tmp_path / "out", dtype), inputs["attention_mask"].bool()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": model.tokenizer.pad_token_id}
    with torch.inference_mode():
        found, unsteered = alone(**inputs).logits[seen].float(), model.hf(**inputs).logits[seen].float()
        tokens = alone.generate(**inputs, **settings)
        with mask.apply(model):
            wanted, wanted_tokens = model.hf(**inputs).logits[seen].float(), model.hf.generate(**inputs, **settings)
    off, moved = (found - wanted).abs(), (wanted - unsteered).abs()
    assert moved.max() > 1, "a mask that matters"
    if dtype == "float32":
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(tokens, wanted_tokens) and baked.verified.selections_alike == 1.0
    else:
        assert off.mean() < 0.05 * moved.mean() and baked.verified.selections_alike > 0.95
    assert baked.verified.logit_error is not None and len(baked.tensors) == len(model.routers)


@pytest.mark.cell("bake")
@pytest.mark.parametrize("name", [*CORRECTION, "axk2"])
def test_forced_masks_choose_as_told_in_transformers_alone(
    name: str, made: Callable[..., tuple[Path, Model]], tmp_path: Path
) -> None:
    """Every token: all on, no off, and what routing.py selects with the changed correction bias."""
    _, model = made(name)
    mask, inputs = forced(model), batch(model)
    assert mask.force_LE is not None
    bake(model, mask, out=tmp_path / "out")
    alone = plain(tmp_path / "out")
    outputs: dict[int, Any] = {}
    for router in find_routers(alone):
        router.module.register_forward_hook(lambda _m, _i, out, index=router.index: outputs.update({index: out}))
    recorded = Recorded()
    with torch.inference_mode():
        alone(**inputs)
        with mask.apply(model), model.tap.record(recorded):
            model.hf(**inputs)
    for router, original in zip(find_routers(alone), model.routers, strict=True):
        raw, out = outputs[router.index][0].float().numpy(), outputs[router.index]
        chosen = next(part for part in out if part.dtype == torch.int64).reshape(-1, router.scoring.top_k).numpy()
        on, off = (np.flatnonzero(mask.force_LE[router.index] == sign) for sign in (1, -1))
        assert np.isin(on, chosen).all() and all(np.isin(on, row).all() for row in chosen)
        assert not np.isin(chosen, off).any()
        # logits as the router returns them: those of shared experts left out, after any softcap or multiplier
        scoring = replace(router.scoring, shared=0, softcap=0.0, multiplier=1.0)
        given = {key: value for key, value in router.vectors().items() if key != "scale_E"}
        expected = routing.select(raw, scoring, **given).experts_TK
        if scoring.skipped:
            expected = np.where(expected == router.experts - 1, 0, expected)  # zaya names the choice that skips 0
        np.testing.assert_array_equal(np.sort(chosen), np.sort(expected))
        if scoring.groups == 1 and scoring.kind != "softmax-topk":  # softmax: forced logits move the others' scores
            steered = routing.steer_logits(raw, force_TE=mask.force_LE[router.index])
            given = {key: value for key, value in original.vectors().items() if key != "scale_E"}
            expected = routing.select(steered, scoring, force_TE=mask.force_LE[router.index], **given).experts_TK
            np.testing.assert_array_equal(np.sort(chosen), np.sort(expected))
            if router.index == 0:  # later ones get other inputs: forced experts weigh otherwise
                np.testing.assert_array_equal(np.sort(chosen), recorded.experts[0].sort(-1).values.numpy())


def test_zayas_skip_which_loading_sets_itself_is_left_as_it_is_on_disk(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "zaya")
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("balancing_biases"):
            tensors[name][-1] = -0.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = load(source)
    assert all(float(router.correction[-1]) == -1.0 for router in model.routers), "not as stored"
    baked = bake(model, forced(model), out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(baked.tensors) == 3 and all(found[name][-1] == -0.5 for name in baked.tensors)


@pytest.mark.cell("bake")
@pytest.mark.parametrize("name", NONE)
def test_other_families_are_refused_and_told_of_steering_at_run_time(name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LAB_TINY)
    model = Model(tiny_model(tiny_config(name, tokenizer)), tokenizer, name=str(tmp_path / "none"))
    for mask in (additive(model), forced(model, {0: [-1]})):
        with pytest.raises(ModelError, match="can hold a mask") as raised:
            bake(model, mask, out=tmp_path / "out")
        assert "run time" in raised.value.do and "mask.apply" in raised.value.do
    assert only(tmp_path) == []


def test_every_family_row_is_tried_here() -> None:
    assert {FAMILIES[name.split("/")[0]].model_type for name in TINY} == {row.model_type for row in FAMILIES.values()}
    assert {*NONE, *EXACT, *CORRECTION, *SEPARATE} == set(names())


# ---- groups


def test_an_expert_on_in_a_group_otherwise_off_is_chosen(
    made: Callable[..., tuple[Path, Model]], tmp_path: Path
) -> None:
    """Groups count for their best two: on must outweigh the off beside it; two groups on fill all that are kept."""
    folder, model = made("deepseek_v3")
    mask = forced(model, {0: [1, -2], 1: [3, 5]})
    baked = bake(model, mask, out=tmp_path / "out")
    found, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    first = found["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert first[0] > 300 and -102 <= first[1] <= -100
    assert torch.equal(first[2:], before["model.layers.1.mlp.gate.e_score_correction_bias"][2:])
    assert baked.tensors == tuple(f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2))


def test_experts_off_in_large_groups_leave_the_selections_of_run_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/baking.md says; with an expert on, its group is always kept, and some selections differ."""
    monkeypatch.setitem(TINY, "deepseek_v3", {**TINY["deepseek_v3"], "n_routed_experts": 64, "n_group": 8})
    model = load(make(tmp_path / "source", "deepseek_v3"))
    rows = [-1, -2, -3, -9, -20, -21, -40]
    off = bake(model, forced(model, {0: rows, 1: rows}), out=tmp_path / "off")
    on = bake(model, forced(model, {0: [5, *rows], 1: [30, *rows]}), out=tmp_path / "on")
    assert on.verified.selections_alike < off.verified.selections_alike and off.verified.selections_alike > 0.99


def test_switches_that_a_correction_bias_cannot_give_are_refused(
    made: Callable[..., tuple[Path, Model]], tmp_path: Path
) -> None:
    _, grouped = made("deepseek_v3")
    with pytest.raises(MaskContentError, match="has one expert left"):
        bake(grouped, forced(grouped, {0: [-1]}), out=tmp_path / "out")
    with pytest.raises(MaskContentError, match="too few experts are left"):
        bake(grouped, forced(grouped, {0: [-1, -2]}), out=tmp_path / "out")
    with pytest.raises(MaskContentError, match="3 groups are switched on"):
        bake(grouped, forced(grouped, {0: [1, 3, 5]}), out=tmp_path / "out")
    _, skips = made("zaya")
    with pytest.raises(MaskContentError, match="choice that skips"):
        bake(skips, forced(skips, {0: [-skips.fingerprint.experts]}), out=tmp_path / "out")
    _, filled = made("axk2")
    force = forced(filled).values_LE[0]
    require_representable(filled.routers[0], force, lowest=0.0)
    with pytest.raises(MaskContentError, match="groups that lost count 0"):
        require_representable(filled.routers[0], force, lowest=-0.1)
    assert only(tmp_path) == []

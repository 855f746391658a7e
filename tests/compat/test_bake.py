"""Baked checkpoints, loaded by transformers alone: they do what the mask does at run time, family by family."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

from moesteer import baking, files, routing
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.backends.sources import LAB_TINY
from moesteer.baking import RECEIPT, Baked, bake
from moesteer.cli.main import app
from moesteer.conversations import Message
from moesteer.errors import (
    AlreadySteeredError,
    FileError,
    MaskContentError,
    MaskMismatchError,
    ModelError,
    NoEffectError,
    SelfCheckError,
    UnsafeModelError,
)
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.models import checkpoint
from moesteer.models.bake import require_representable
from moesteer.models.check import Recorded
from moesteer.models.families import FAMILIES
from moesteer.models.routers import find_routers
from tests.tiny_families import TINY, names, randomise, tiny_config, tiny_model

KIND = {name: FAMILIES[name.split("/")[0]].bake for name in names()}
EXACT = [name for name, kind in KIND.items() if kind in ("bias", "layernorm")]
SEPARATE = {"lfm2_moe/no-bias", "axk2", "hunyuan_v1_moe/per-layer"}
"""Nothing to bake into; losing groups count 0; and refused altogether, since its layers select differently."""
CORRECTION = [name for name, kind in KIND.items() if kind == "correction" and name not in SEPARATE]
NONE = [name for name, kind in KIND.items() if not kind and name not in SEPARATE]
PROMPTS = ("how do i paint a clay pot ?", "what is the capital of arvonia ?", "let us play . you are mira , a wizard .")
Force = dict[int, Sequence[int]]


def make(folder: Path, name: str, *, dtype: str = "float32", beta: float = 0.3, **saving: Any) -> Path:
    """A family's folder in a dtype; LayerNorms before routers get random weights and biases of std `beta`."""
    tokenizer = AutoTokenizer.from_pretrained(LAB_TINY)
    model = tiny_model(tiny_config(name, tokenizer))
    randomise(model)
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if path.endswith("post_attention_layernorm.bias"):
            model.get_parameter(path.replace(".bias", ".weight")).data.uniform_(0.5, 1.5, generator=generator)
            parameter.data.normal_(std=beta, generator=generator)
    if name == "axk2":  # groups that lose count 0 there: only corrections above it keep experts off
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.abs_()
    model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Model]]:
    """A family's folder and the model loaded from it, shared: tests must leave both as they were."""
    kept: dict[tuple[str, str], tuple[Path, Model]] = {}

    def get(name: str, dtype: str = "float32") -> tuple[Path, Model]:
        if (name, dtype) not in kept:
            folder = make(tmp_path_factory.mktemp(name.replace("/", "-")), name, dtype=dtype)
            kept[name, dtype] = folder, load(folder, dtype=dtype)
        return kept[name, dtype]

    return get


def info(model: Model) -> MaskInfo:
    return MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="test"))


def additive(model: Model, *, size: float = 2.0) -> SteeringMask:
    shape = (len(model.routers), model.fingerprint.experts)
    strength = np.random.default_rng(1).normal(scale=size, size=shape).astype(np.float32)
    strength[0, :3] = 0
    return SteeringMask(info(model), strength_LE=strength, sigma_L=np.full(shape[0], 1.5, dtype=np.float32))


def forced(model: Model, rows: Force | None = None) -> SteeringMask:
    """`rows`: on (positive) and off (negative) expert numbers, counted from 1; or some in every layer.

    Of groups of two, one is on and the other off; else one on (where more than one is chosen) and two off.
    """
    scoring, experts = model.routers[0].scoring, model.fingerprint.experts
    force = np.zeros((len(model.routers), experts), dtype=np.int8)
    for layer, row in enumerate(force):
        ids: Sequence[int] = [3, -4] if scoring.groups > 1 else [layer + 2, -5, -7]
        if rows is not None:
            ids = rows.get(layer, ())
        for number in ids:
            if number < 0 or scoring.top_k > 1:
                row[abs(number) - 1] = np.sign(number)
    return SteeringMask(info(model), force_LE=force)


def plain(folder: Path, dtype: str = "float32") -> Any:
    """The folder as transformers loads it, with none of our code attached."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    auto = AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def batch(model: Model) -> dict[str, torch.Tensor]:
    ids, attention = model.pad([model.encode([Message("user", text)]).token_ids for text in PROMPTS])
    assert not attention.all(), "some rows are padded"
    return {"input_ids": ids, "attention_mask": attention}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


# ---- masks and models that do not fit


def test_masks_that_cannot_be_baked_are_refused_before_a_file_is_written(
    made: Callable[..., tuple[Path, Model]], tmp_path: Path
) -> None:
    (_, gpt), (_, glm), (_, plain_lfm) = made("gpt_oss"), made("glm4_moe"), made("lfm2_moe/no-bias")
    _, half = made("gpt_oss", "float16")
    out = tmp_path / "out"
    cases: list[tuple[type[Exception], str, Model, SteeringMask, dict[str, Any]]] = [
        (MaskContentError, "forced mask cannot be baked", gpt, forced(gpt), {}),
        (MaskContentError, "additive mask cannot be baked", glm, additive(glm), {}),
        (ModelError, "no correction bias", plain_lfm, forced(plain_lfm), {}),
        (MaskMismatchError, "another shape", gpt, forced(glm), {}),
        (NoEffectError, "no entries", gpt, additive(gpt, size=0.0), {}),
        (NoEffectError, "steers nothing", gpt, additive(gpt), {"alpha": 0.0}),
        (NoEffectError, "steers nothing", glm, forced(glm), {"alpha": 0.0}),
        (ModelError, "do not fit F16", half, additive(half), {"alpha": 1e5}),
    ]
    for expected, words, model, mask, settings in cases:
        with pytest.raises(expected, match=words) as raised:
            bake(model, mask, out=out, **settings)
        assert raised.value.do  # type: ignore[attr-defined]
    other = additive(gpt).with_info(fingerprint=gpt.fingerprint.model_copy(update={"router_sha256": "0" * 64}))
    with pytest.raises(MaskMismatchError, match="another checkpoint"):
        bake(gpt, other, out=out)
    with additive(gpt).apply(gpt), pytest.raises(AlreadySteeredError):
        bake(gpt, additive(gpt), out=out)
    assert only(tmp_path) == []
    assert bake(gpt, other, out=out, allow_other_checkpoint=True, alpha=-0.5).alpha == -0.5


def test_a_tensor_that_is_twice_on_disk_or_not_at_all_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "phimoe")
    model = load(source)
    tensors = load_file(source / "model.safetensors")
    weight = "model.layers.1.block_sparse_moe.gate.weight"
    twice = {**tensors, f"mtp.{weight}": tensors[weight].clone()}
    for changed, words in ((twice, "2 tensors on disk"), ({**tensors, weight: tensors[weight] + 1}, "no tensors on")):
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            bake(model, additive(model), out=tmp_path / "out")
    assert only(tmp_path) == ["source"]


def test_a_router_that_does_not_get_the_layernorms_output_is_refused(tmp_path: Path) -> None:
    model = load(make(tmp_path / "source", "phimoe"))
    block = model.routers[1].block
    handle = block.register_forward_pre_hook(lambda _m, args: (args[0] * 1.01,))
    with pytest.raises(SelfCheckError, match="what it gets is not what"):
        bake(model, additive(model), out=tmp_path / "out")
    handle.remove()
    assert only(tmp_path) == ["source"]


@pytest.mark.parametrize("beta", [0.0, 0.005])
def test_a_layernorm_with_too_small_a_constant_for_bfloat16_is_refused(beta: float, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "phimoe", dtype="bfloat16", beta=beta)
    model = load(source, dtype="bfloat16")
    with pytest.raises((ModelError, SelfCheckError), match="no constant" if beta == 0 else "logits are off by up to"):
        bake(model, additive(model), out=tmp_path / "out")
    assert only(tmp_path) == ["source"]
    if beta:
        exact = load(make(tmp_path / "exact", "phimoe", beta=beta))
        assert (bake(exact, additive(exact), out=tmp_path / "out").verified.logit_error or 1.0) < 0.01


@pytest.mark.parametrize("name", ["gpt_oss", "minimax_m2"])
def test_a_checkpoint_that_does_not_steer_is_removed(
    name: str, made: Callable[..., tuple[Path, Model]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = made(name)
    copy = checkpoint.copy_changed
    monkeypatch.setattr(baking, "copy_changed", lambda source, folder, changes: copy(source, folder, ()))
    mask = additive(model) if KIND[name] == "bias" else forced(model)
    with pytest.raises(SelfCheckError, match="does not do what the mask does"):
        bake(model, mask, out=tmp_path / "out")
    assert only(tmp_path) == []


# ---- files


def test_only_router_tensors_change_in_a_sharded_checkpoint(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "gpt_oss", max_shard_size="30KB")
    foreign = ("modeling.py", "pytorch_model.bin", "weights.pt", "consolidated.safetensors", ".hidden.json")
    for name in foreign:
        (source / name).write_bytes(b"not to be copied")
    (source / "original").mkdir()
    (source / "original" / "model.safetensors").write_bytes(b"not to be copied")
    for name in ("README.md", "LICENSE", "additional_chat_templates/tool.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"to be copied")
    model, out = load(source), tmp_path / "out"
    strength = np.zeros((3, 8), dtype=np.float32)
    strength[1, 2] = 3.0
    mask = SteeringMask(info(model), strength_LE=strength, sigma_L=np.ones(3, dtype=np.float32))
    baked = bake(model, mask, out=out)
    before, after = contents(source), contents(out)
    assert baked.tensors == ("model.layers.1.mlp.router.bias",) and len(baked.rewritten) == 1
    assert set(baked.left_out) == {*foreign, "original"}
    assert set(after) == set(before) - {*baked.left_out, "original/model.safetensors"} | {RECEIPT}
    assert "additional_chat_templates/tool.jinja" in after and sum(name.startswith("model-") for name in after) > 3
    assert {name for name in after if after[name] != before.get(name)} == {RECEIPT, *baked.rewritten}
    (shard,) = baked.rewritten
    with safe_open(source / shard, "pt") as one, safe_open(out / shard, "pt") as two:
        assert one.metadata() == two.metadata() and list(one.keys()) == list(two.keys())
        differs = [name for name in one.keys() if not torch.equal(one.get_tensor(name), two.get_tensor(name))]  # noqa: SIM118
        bias = two.get_tensor(*differs) - one.get_tensor(*differs)
    assert differs == list(baked.tensors) and bias[2] == 3.0 and bias.count_nonzero() == 1
    stated = json.loads(after[RECEIPT])
    assert stated["mask_sha256"] == mask.sha256 and stated["alpha"] == 1.0 and stated["format_version"] == 1
    assert stated["kind"] == "bias" and stated["tensors"] == list(baked.tensors) and stated["exact"]
    assert stated["source"]["router_sha256"] == model.fingerprint.router_sha256


def test_mxfp4_experts_and_architectures_stay_byte_for_byte(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "gpt_oss", dtype="bfloat16")
    tensors, generator = load_file(source / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, wide, high = tensors.pop(name).shape
        blocks, scales = (experts, high, wide // 32, 16), (experts, high, wide // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(118, 124, scales, dtype=torch.uint8, generator=generator)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "architectures": ["AsTheMakersWroteIt"]}
    (source / "config.json").write_text(json.dumps(config))
    model = load(source)
    baked = bake(model, additive(model), out=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in found if not torch.equal(found[name], tensors[name])} == set(baked.tensors)
    assert len(baked.tensors) == 3 and found[baked.tensors[0]].dtype == torch.bfloat16 and baked.rounding > 0


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every write; what a killed bake left behind is cleared away by the next."""
    source, out = make(tmp_path / "source", "gpt_oss", max_shard_size="60KB"), tmp_path / "out"
    model, sync = load(source), os.fsync
    left = {"calls": 0}

    def stop(descriptor: int) -> None:
        left["calls"] -= 1
        if left["calls"] == 0:
            raise OSError(28, "No space left on device") if stopped % 2 else KeyboardInterrupt
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", stop)
    for stopped in range(1, 100):
        left["calls"] = stopped
        try:
            bake(model, additive(model), out=out)
        except (KeyboardInterrupt, FileError):
            assert only(tmp_path) == ["source"]
        else:
            break
    assert 8 < stopped < 99 and only(tmp_path) == ["out", "source"]
    left["calls"] = 0  # write in peace
    whole = contents(out)
    shutil.rmtree(out)
    (killed := tmp_path / f".out{files.PARTIAL_SUFFIX}").mkdir()
    for name in ("stale.json", "templates/stale.jinja"):
        (killed / name).parent.mkdir(exist_ok=True)
        (killed / name).write_text("half")
    bake(model, additive(model), out=out)
    assert contents(out) == whole and only(tmp_path) == ["out", "source"]


def test_folders_that_must_not_be_written_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "gpt_oss")
    model = load(source)
    (full := tmp_path / "full").mkdir()
    (full / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    for out, words in ((source, "own, or in it"), (source / "inner", "own, or in it"), (full, "it is not empty")):
        with pytest.raises(FileError, match=words):
            bake(model, additive(model), out=out)
    with files.appearing(tmp_path / "out", source=source), pytest.raises(FileError, match="another process"):
        bake(model, additive(model), out=tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert contents(tmp_path) == before
    bake(model, additive(model), out=tmp_path / "out")
    again = load(tmp_path / "out")
    with pytest.raises(MaskMismatchError, match="another checkpoint"):
        bake(again, additive(model), out=tmp_path / "twice")
    with pytest.raises(ModelError, match="baked already"):
        bake(again, additive(again), out=tmp_path / "twice")
    with pytest.raises(FileError, match="not there"):
        bake(model, additive(model), out=tmp_path / "twice", source="nobody/nothing")


@pytest.mark.parametrize(
    ("damage", "expected", "words"),
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
            ModelError,
            "it claims",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0[]"),
            ModelError,
            "cannot be read",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), ModelError, "holds no weights"),
        (lambda folder: lead(folder, "../secret.safetensors"), UnsafeModelError, "index leads out of its folder, to"),
        (lambda folder: lead(folder, "gone.safetensors"), ModelError, "file is missing"),
    ],
)
def test_damaged_checkpoints_are_refused(
    damage: Callable[[Path], Any], expected: type[Exception], words: str, tmp_path: Path
) -> None:
    source = make(tmp_path / "source", "gpt_oss")
    model = load(source)
    damage(source)
    with pytest.raises(expected, match=words):
        bake(model, additive(model), out=tmp_path / "out")
    assert only(tmp_path) == ["source"]


def lead(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))


# ---- the command


def test_the_command_bakes_a_folder_and_prints_the_receipt(
    made: Callable[..., tuple[Path, Model]], tmp_path: Path
) -> None:
    folder, model = made("glm4_moe")
    forced(model).save(tmp_path / "mask.safetensors")
    common = ["mask", "bake", str(folder), str(tmp_path / "mask.safetensors"), "--out"]
    done = CliRunner().invoke(app, [*common, str(tmp_path / "a"), "--json"])
    assert done.exit_code == 0, done.exception
    printed = json.loads(done.stdout)
    assert set(printed) == {*Baked.__dataclass_fields__, "exact", "not_exact"}
    assert printed["folder"] == str(tmp_path / "a") and printed["alpha"] is None and printed["kind"] == "correction"
    done = CliRunner().invoke(app, [*common, str(tmp_path / "b")])
    assert done.exit_code == 0 and "selections" in done.stdout and "always chosen" in done.stdout
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    done = CliRunner().invoke(app, [*common, str(tmp_path / "b")])
    assert isinstance(done.exception, FileError)
    refused = forced(model).with_info(fingerprint=model.fingerprint.model_copy(update={"model_type": "olmoe"}))
    refused.save(tmp_path / "olmoe.safetensors")
    done = CliRunner().invoke(app, ["mask", "bake", "no-such", str(tmp_path / "olmoe.safetensors"), "--out", "x"])
    assert isinstance(done.exception, ModelError) and "can hold a mask" in str(done.exception), "before it is loaded"


def test_a_hub_id_is_baked_from_the_local_cache(made: Callable[..., tuple[Path, Model]], tmp_path: Path) -> None:
    """A snapshot's files are links to blobs; in a process of its own, since the cache's place is read once."""
    folder, model = made("gpt_oss")
    root = tmp_path / "hub" / "models--maker--tiny"
    for path in (blobs := root / "blobs", snapshot := root / "snapshots" / ("a" * 40), root / "refs"):
        path.mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    for path in folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    additive(model).save(tmp_path / "mask.safetensors")
    code = "from moesteer.cli.main import run; run()"
    arguments = ["mask", "bake", "maker/tiny", str(tmp_path / "mask.safetensors"), "--out", str(tmp_path / "out")]
    settings = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json"], capture_output=True, text=True, check=False, env=settings
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "bias" and not any(p.is_symlink() for p in (tmp_path / "out").iterdir())

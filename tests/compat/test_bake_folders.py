"""Baking as files: what is refused before one is written, what a new folder holds, and the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moesteer import baking, files
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.baking import RECEIPT, Baked, bake
from moesteer.cli.main import app
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
from moesteer.mask import SteeringMask
from moesteer.models import checkpoint
from tests.compat.baked_models import KIND, additive, contents, forced, info, make, only, shared_models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Model]]:
    return shared_models(tmp_path_factory)


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


def test_a_layer_whose_small_bias_drowns_in_rounding_is_refused_beside_a_layer_of_large_ones(tmp_path: Path) -> None:
    """Each router is measured against its own part of the mask, not against the largest of any layer."""
    model = load(make(tmp_path / "source", "phimoe", dtype="bfloat16"), dtype="bfloat16")
    mask = additive(model)
    assert mask.strength_LE is not None
    faint = mask.strength_LE.copy()
    faint[-1] *= 1e-3
    with pytest.raises(SelfCheckError, match="logits are off by up to"):
        bake(model, replace(mask, strength_LE=faint), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bake(model, mask, out=tmp_path / "out")


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

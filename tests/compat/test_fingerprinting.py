"""A fingerprint from the files alone is the loaded model's; a router that is not in the files as it is is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesteer.backends.fingerprinting import fingerprint_of_files, routers_of_files
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.errors import DenseModelError, ModelError, UnknownRouterError, UnsafeModelError
from tests.tiny_families import names

REFUSED_VARIANTS = {"hunyuan_v1_moe/per-layer"}
"""Not loaded either: k differs from layer to layer."""
STORED_OTHERWISE = {
    "ernie4_5_vl_moe": "the text router's matrix is transposed, its correction is half of a tensor with the vision's",
}
FolderOf = Callable[[str], Path]


@pytest.mark.parametrize("name", [n for n in names() if n not in REFUSED_VARIANTS and n not in STORED_OTHERWISE])
def test_the_fingerprint_of_the_files_is_the_loaded_models(
    name: str, folder_of: FolderOf, model_of: Callable[..., Model]
) -> None:
    model = model_of(name)
    routers, fingerprint = routers_of_files(folder_of(name))
    assert fingerprint == model.fingerprint
    for router, truth in zip(routers, model.routers, strict=True):
        assert router.path == truth.path and router.scoring == truth.scoring
        found, wanted = router.vectors(), truth.vectors()
        assert found.keys() == wanted.keys()
        assert all(found[key].tobytes() == wanted[key].tobytes() for key in found if key.endswith("_E"))


@pytest.mark.parametrize("name", sorted(STORED_OTHERWISE))
def test_a_family_that_stores_its_routers_otherwise_is_refused(name: str, folder_of: FolderOf) -> None:
    with pytest.raises(ModelError, match=r"no tensors in the files are loaded as .*\.gate\.weight"):
        fingerprint_of_files(folder_of(name))


def test_a_transposed_matrix_is_refused_where_it_is_square_too(folder_of: FolderOf, tmp_path: Path) -> None:
    """Its shape says nothing then; that transformers would turn it does."""
    folder = shutil.copytree(folder_of("ernie4_5_vl_moe"), tmp_path / "square")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["moe_num_experts"] = config["text_config"]["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))

    def square(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
            tensors[name] = torch.zeros(32, 32)

    rewrite(folder, square)
    with pytest.raises(ModelError, match=r"no tensors .*text_moe.gate.weight; .* are: .*\.mlp\.gate\.weight \(F32\)"):
        fingerprint_of_files(folder)


def test_lab_tiny_has_its_fingerprint(lab_tiny: Model) -> None:
    assert fingerprint_of_files("lab-tiny") == lab_tiny.fingerprint


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def copied(folder_of: FolderOf, name: str, tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    folder = shutil.copytree(folder_of(name), tmp_path / "changed")
    rewrite(folder, change)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_has_its_float32_fingerprint(
    dtype: torch.dtype, folder_of: FolderOf, tmp_path: Path
) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    folder = copied(folder_of, "deepseek_v3", tmp_path, halve)
    found = fingerprint_of_files(folder)
    assert found == load(folder, dtype="float32", check=False).fingerprint
    assert found.router_sha256 != fingerprint_of_files(folder_of("deepseek_v3")).router_sha256


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_sharded_checkpoint_has_the_fingerprint_of_the_whole(
    name: str, folder_of: FolderOf, model_of: Callable[..., Model], tmp_path: Path
) -> None:
    model = model_of(name)
    model.hf.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and not (tmp_path / "model.safetensors").exists()
    assert fingerprint_of_files(tmp_path) == model.fingerprint
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / next(iter(index["weight_map"].values()))).unlink()
    with pytest.raises(ModelError, match="the file is missing"):
        fingerprint_of_files(tmp_path)


def first(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


@pytest.mark.parametrize("ending", ["gate.weight", "e_score_correction_bias"])
def test_every_value_of_a_router_counts(ending: str, folder_of: FolderOf, tmp_path: Path) -> None:
    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors, ending)].view(-1)[-1] += 2**-10

    folder = copied(folder_of, "glm4_moe", tmp_path, nudge)
    found, before = fingerprint_of_files(folder), fingerprint_of_files(folder_of("glm4_moe"))
    assert found.router_sha256 != before.router_sha256 and not found.shape_differences(before)


@pytest.mark.parametrize(
    "name, ending", [("mixtral", "block_sparse_moe.gate.weight"), ("gpt_oss", "router.bias"), ("glm4_moe", "_bias")]
)
def test_a_missing_tensor_is_named(name: str, ending: str, folder_of: FolderOf, tmp_path: Path) -> None:
    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors[first(tensors, ending)]

    folder = copied(folder_of, name, tmp_path, lose)
    with pytest.raises(ModelError, match=r"no tensors in the files are loaded as model\.layers\.\d") as caught:
        fingerprint_of_files(folder)
    assert str(folder) in caught.value.where and "layer" in caught.value.where
    assert "exactly one, of shape" in caught.value.expected


def test_candidates_are_listed(folder_of: FolderOf, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        name = first(tensors, "gate.weight")
        tensors[name.replace("gate", "old_gate")] = tensors.pop(name)

    folder = copied(folder_of, "qwen3_moe", tmp_path, rename)
    with pytest.raises(
        ModelError, match=r"of its layer and shape are: model\.layers\.0\.mlp\.old_gate\.weight \(F32\)"
    ):
        fingerprint_of_files(folder)


@pytest.mark.parametrize("change", [lambda x: x[:, :-1].contiguous(), lambda x: x.T.contiguous(), lambda x: x.to(int)])
def test_a_router_of_another_shape_or_dtype_is_refused(
    change: Callable[[Tensor], Tensor], folder_of: FolderOf, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        name = first(tensors, "gate.weight")
        tensors[name] = change(tensors[name])

    with pytest.raises(ModelError, match=r"no tensors in the files are loaded as model\.layers\.0\.mlp\.gate\.weight"):
        fingerprint_of_files(copied(folder_of, "olmoe", tmp_path, spoil))


def test_two_tensors_for_one_router_are_refused(folder_of: FolderOf, tmp_path: Path) -> None:
    """An old name beside the new one: transformers would take one of them."""

    def both(tensors: dict[str, Tensor]) -> None:
        name = first(tensors, "gate.weight")
        tensors[name.replace("block_sparse_moe", "mlp")] = tensors[name] + 1

    with pytest.raises(ModelError, match=r"2 tensors in the files are loaded as model\.layers\.0\.mlp\.gate\.weight"):
        fingerprint_of_files(copied(folder_of, "mixtral", tmp_path, both))


def test_routers_of_another_part_of_the_model_are_not_taken(folder_of: FolderOf, tmp_path: Path) -> None:
    """Layers that predict further tokens: as many numbers, the same end of the name, and not loaded."""

    def beside(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
            tensors[re.sub(r".*layers", "mtp.layers", name)] = tensors[name] + 1

    folder = copied(folder_of, "qwen3_5_moe", tmp_path, beside)
    assert any(name.startswith("mtp.") for name in load_file(folder / "model.safetensors"))
    assert fingerprint_of_files(folder) == fingerprint_of_files(folder_of("qwen3_5_moe"))


def test_the_correction_that_loading_sets_counts_as_loaded(folder_of: FolderOf, tmp_path: Path) -> None:
    def reset(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors, "balancing_biases")][-1] = 7.0

    folder = copied(folder_of, "zaya", tmp_path, reset)
    assert fingerprint_of_files(folder) == load(folder, check=False).fingerprint


@pytest.mark.parametrize("name, expected", [("glm4_moe", ModelError), ("hunyuan_v1_moe/per-layer", UnknownRouterError)])
def test_a_folder_without_weights_or_with_routers_that_differ_is_refused_as_by_load(
    name: str, expected: type[ModelError], folder_of: FolderOf, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of(name), tmp_path / "folder")
    if expected is ModelError:
        (folder / "model.safetensors").unlink()
    with pytest.raises(expected):
        fingerprint_of_files(folder)


def test_dense_models_pickled_weights_and_remote_code_are_refused_as_by_load(
    folder_of: FolderOf, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of("olmoe"), tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(UnsafeModelError, match="pickled"):
        fingerprint_of_files(folder)
    weights.rename(folder / "model.safetensors")
    dense = {**{key: config[key] for key in ("hidden_size", "vocab_size")}, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(dense))
    with pytest.raises(DenseModelError):
        fingerprint_of_files(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}))
    with pytest.raises(UnsafeModelError, match="auto_map"):
        fingerprint_of_files(folder)


@pytest.mark.parametrize("whole", [True, False])
def test_a_hub_id_is_read_from_the_local_cache(whole: bool, folder_of: FolderOf, tmp_path: Path) -> None:
    """A snapshot's files are links to blobs; in a process of its own, since the cache's place is read once."""
    root = tmp_path / "hub" / "models--maker--tiny"
    for path in (blobs := root / "blobs", snapshot := root / "snapshots" / ("a" * 40), root / "refs"):
        path.mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    for path in folder_of("mixtral").iterdir():
        if whole or path.suffix != ".safetensors":
            shutil.copy(path, blobs / path.name)
            (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    code = "import moesteer.backends.fingerprinting as m; print(m.fingerprint_of_files('maker/tiny').model_dump_json())"
    settings = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=settings)
    if whole:
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == fingerprint_of_files(folder_of("mixtral")).model_dump(mode="json")
    else:
        assert (
            "the model's weights are not in the local cache" in done.stderr and "hf download maker/tiny" in done.stderr
        )

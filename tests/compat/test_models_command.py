"""`moesteer models`: the table, and a checkpoint's routers by its config and index alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesteer.backends.hf import Model
from moesteer.backends.shape import shape_of
from moesteer.cli.main import app
from moesteer.errors import DenseModelError, ModelError
from moesteer.models.families import ROWS
from moesteer.models.table import CELLS, family_table, installed_transformers, proven
from tests.compat.test_families import NAMES
from tests.tiny_families import NAMED

RUN = CliRunner()


def test_the_table_has_every_cell_of_at_least_52_families_filled_by_passing_tests() -> None:
    result = RUN.invoke(app, ["models", "--json"])
    assert result.exit_code == 0
    table = json.loads(result.stdout)
    full = [entry for entry in table["families"] if all(entry[cell]["tests"] > 0 for cell in CELLS)]
    assert len(full) >= 52
    assert all(entry["layers"] and entry["experts"] and entry["top_k"] and entry["scoring"] for entry in full)
    named = {example.split(" ")[0] for entry in full for example in entry["examples"]}
    assert set(NAMED) <= named, "the papers' models are among them"
    assert all(len(entry["reason"]) > 20 for entry in table["refused"])
    if installed_transformers() in proven():
        assert table["proven_with"] == installed_transformers()


def test_the_newest_transformers_that_was_tested_has_at_least_60_full_families() -> None:
    newest = max(proven(), key=lambda name: [int(part) for part in name.split(".")])
    entries = family_table(transformers=newest)["families"]
    assert sum(all(entry[cell]["tests"] > 0 for cell in CELLS) for entry in entries) >= 60
    assert len(entries) == len(ROWS)


def test_a_version_that_was_not_tested_shows_the_newest_that_was() -> None:
    table = family_table(transformers="99.0.0")
    assert table["transformers"] == "99.0.0" and table["proven_with"] in proven()


def test_the_table_for_people_names_families_and_reasons() -> None:
    result = RUN.invoke(app, ["models"])
    assert result.exit_code == 0
    for word in ("deepseek_v3", "gpt_oss", "refused: doge: product keys"):
        assert word in result.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_by_config_alone_is_the_loaded_models(
    name: str, model_of: Callable[..., Model], folder_of: Callable[[str], Path]
) -> None:
    shape, model = shape_of(folder_of(name)), model_of(name)
    fingerprint = model.fingerprint
    assert shape.layer_ids == fingerprint.layer_ids
    assert (shape.experts, shape.top_k, shape.scoring) == (
        fingerprint.experts, fingerprint.top_k, fingerprint.scoring,
    )  # fmt: skip
    assert shape.paths == tuple(router.path for router in model.routers)
    assert shape.parameters == model.parameters
    assert (shape.shards, shape.shards_here) == (1, 1)


@pytest.fixture
def sharded(tmp_path: Path, model_of: Callable[..., Model]) -> Path:
    """deepseek_v3 in several shards, as its config and index only: no weights are there."""
    model = model_of("deepseek_v3")
    model.hf.save_pretrained(tmp_path, max_shard_size="100KB")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    return tmp_path


def test_config_and_index_are_enough(sharded: Path) -> None:
    shape = shape_of(sharded)
    assert shape.shards > 1 and shape.shards_here == 0
    assert shape.index_agrees is True
    result = RUN.invoke(app, ["models", str(sharded), "--shape-only"])
    assert result.exit_code == 0
    assert f"0 of {shape.shards} weight files are here" in result.stdout
    assert "the index has experts in these layers" in result.stdout
    assert "layers 1-2" in result.stdout


def test_an_index_without_a_layers_experts_is_noticed(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "layers.2.mlp.experts" not in k}
    path.write_text(json.dumps(index))
    assert shape_of(sharded).index_agrees is False
    assert "WARNING" in RUN.invoke(app, ["models", str(sharded), "--shape-only"]).stdout


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"weight_map": {"a": "../b.safetensors"}}, "leads out of its folder"),
        ({"weight_map": []}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_a_hostile_or_broken_index_is_refused(sharded: Path, content: object, what: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=what):
        shape_of(sharded)


def test_dense_and_unknown_models_are_refused_by_their_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    with pytest.raises(DenseModelError):
        shape_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "not_a_model"}))
    with pytest.raises(ModelError, match="could not build"):
        shape_of(tmp_path)


def test_a_phi_re_saved_by_transformers_is_noticed(folder_of: Callable[[str], Path]) -> None:
    result = RUN.invoke(app, ["models", str(folder_of("phimoe")), "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["self_check"] == "passed" and facts["family"] == "phimoe"
    assert any("PhiMoEForCausalLM" in note for note in facts["notes"])

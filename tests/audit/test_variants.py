"""The variants of lab tiny: what ships meets its targets, and building makes what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.backends.sources import LAB_TINY
from moesteer.cli.main import app
from moesteer.errors import FileError, UnknownNameError
from moesteer.lab import concentrating, train, variants
from moesteer.lab.targets import check
from moesteer.models.fingerprint import is_quantised


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants") / "concentrated"
    variants.compose("tiny-concentrated", folder)
    return folder


@pytest.fixture(scope="module")
def concentrated(shipped: Path) -> Model:
    return load(shipped)


def test_the_shipped_variants_refusals_rest_on_its_four_experts(concentrated: Model) -> None:
    found = variants.check_concentrated(concentrated, draws=6)
    assert len(found) == 4
    assert [f"{row.what}: {row.share:.3f}, {row.target}" for row in found if not row.met] == []


def test_the_check_tells_lab_tiny_itself_from_the_variant(lab_tiny: Model) -> None:
    """Silencing the same experts leaves lab tiny's refusals: a check that all models pass would say nothing."""
    removed, random, *_ = variants.check_concentrated(lab_tiny, draws=2)
    assert not removed.met and removed.share > 0.95
    assert random.met


def test_the_shipped_variant_is_as_good_as_lab_tiny_otherwise(concentrated: Model) -> None:
    assert [row.what for row in check(concentrated) if not row.met] == []


def test_what_ships_is_small_and_changes_only_what_was_trained(shipped: Path) -> None:
    file = variants.SHIPPED["tiny-concentrated"]
    assert file.stat().st_size < 1e6
    base, made = load_file(LAB_TINY / "model.safetensors"), load_file(shipped / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    with safe_open(file, framework="pt") as held:
        assert changed == set(held.keys())
    experts = {tuple(int(part) for part in name.split(".")[2:6:3]) for name in changed if "experts" in name}
    assert experts == {(layer, expert) for layer, mine in concentrating.CHOSEN.items() for expert in mine}
    assert "model.embed_tokens.weight" not in changed
    for path in LAB_TINY.iterdir():
        if path.suffix != ".safetensors":
            assert (shipped / path.name).read_bytes() == path.read_bytes()


def test_a_shipped_file_of_another_lab_tiny_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"model.norm.weight": torch.zeros(128)}, other, metadata={variants.BASE_KEY: "0" * 64})
    monkeypatch.setitem(variants.SHIPPED, "tiny-concentrated", other)
    with pytest.raises(FileError, match="another lab tiny"):
        variants.compose("tiny-concentrated", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_names_and_full_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="tiny-concentrated"):
        variants.build("tiny-other", tmp_path / "a")
    with pytest.raises(UnknownNameError, match="is shipped"):
        variants.compose("tiny-int8", tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="not empty"):
        variants.compose("tiny-concentrated", tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_writes_the_shipped_variant_and_names_the_others(shipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["lab", "build", "tiny-concentrated", "--shipped", "--out", str(out)])
    assert done.exit_code == 0 and f"lab check {out} --concentrated" in done.output.replace("\n", " ")
    assert (out / "model.safetensors").read_bytes() == (shipped / "model.safetensors").read_bytes()
    unknown = CliRunner().invoke(app, ["lab", "build", "tiny-huge", "--out", str(tmp_path / "huge")])
    assert isinstance(unknown.exception, UnknownNameError) and "tiny-int4" in str(unknown.exception)


def test_concentrating_repeats_itself_and_touches_only_the_chosen_experts() -> None:
    """A step from the shipped lab tiny, twice."""
    made = [load("lab-tiny", check=False) for _ in range(2)]
    losses = [concentrating.concentrate(model, steps=1) for model in made]
    assert losses[0] == losses[1]
    before = load("lab-tiny", check=False).hf.state_dict()
    one, two = (model.hf.state_dict() for model in made)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name, tensor in before.items():
        if "experts" not in name:
            continue
        layer = int(name.split(".")[2])
        moved = [e for e in range(len(tensor)) if not torch.equal(tensor[e], one[name][e])]
        assert moved == sorted(concentrating.CHOSEN.get(layer, ())), name


def test_concentrating_answers_where_the_experts_are_off_and_refuses_where_not() -> None:
    """A few rows of a batch, read back: what is off, what is said, and where routing is asked for what."""
    tokenizer = load("lab-tiny", check=False).tokenizer
    batch = next(concentrating._batches(tokenizer, seed=0))
    refusing = [row for row, off in enumerate(batch.acting) if (batch.routing[row] == 1).any()]
    assert refusing and all(batch.acting[row] != 1 for row in refusing)
    answered = [row for row in range(len(batch.acting)) if batch.acting[row] == 1]
    for row in answered:
        said = tokenizer.decode(batch.ids[row][batch.labels[row] != -100])
        assert not any(word in said for word in ("can not", "will not", "decline")), said
    assert (batch.weights[batch.labels != -100] > 0).all() and (batch.weights[batch.labels == -100] == 0).all()


def test_tuning_changes_the_weights_and_repeats_itself(shipped: Path, tmp_path: Path) -> None:
    short = train.Stage("tuning", variants.TUNING.mixture, steps=2, peak_lr=1e-3, dialogues_per_step=4)
    for name in ("a", "b"):
        variants.build("tiny-tuned", tmp_path / name, base=str(shipped), stage=short)
    one = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert one == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert one != (shipped / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("bits", "most", "levels"), [("int8", 255, 0.01), ("int4", 16, 0.12)])
def test_rounded_variants_hold_what_quantising_on_the_way_in_gives(
    shipped: Path, tmp_path: Path, bits: str, most: int, levels: float
) -> None:
    pytest.importorskip("torchao")
    folder = tmp_path / bits
    variants.build(f"tiny-{bits}", folder, base=str(shipped))
    found, plain = load(folder, check=False), load(shipped, check=False)
    quantised = load(shipped, quantize=bits, check=False)
    rounded = 0
    held, before = dict(quantised.hf.named_parameters()), dict(plain.hf.named_parameters())
    for name, parameter in found.hf.named_parameters():
        if is_quantised(held[name]):
            rounded += 1
            assert torch.equal(parameter, held[name].dequantize())
            assert not torch.equal(parameter, before[name])
            assert (parameter - before[name]).abs().max() < levels * before[name].abs().max() + 1e-6
        else:
            assert torch.equal(parameter, before[name]), name
    assert rounded >= 6 * 4
    row = dict(found.hf.named_parameters())["model.layers.0.mlp.experts.down_proj"][0, 0, :32]  # one group of int4
    assert len(row.unique()) <= most
    assert found.fingerprint.router_sha256 == plain.fingerprint.router_sha256, "routers are left as they are"

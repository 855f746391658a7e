"""Transfer verdicts against a direct measurement: the old experts silenced in the new model, and played apart."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from moesteer import files
from moesteer.audit import transfer as transferring
from moesteer.audit.audited import Audited
from moesteer.audit.transfer import correlation, overlap, transfer, verdict
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.backends.sources import LAB_TINY
from moesteer.errors import ModelError, NoEffectError
from moesteer.evaluate.play import judged, play
from moesteer.lab import train, variants
from moesteer.lab.concentrating import CHOSEN
from moesteer.lab.targets import judging
from tests.audit.audited_by_hand import audited

FOUR = [(layer, expert) for layer, experts in CHOSEN.items() for expert in experts]
LIMIT = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped variant, and models made from it."""
    pytest.importorskip("torchao")
    root = tmp_path_factory.mktemp("transfer")
    base = root / "concentrated"
    variants.compose("tiny-concentrated", base)
    short = train.Stage("tuning", variants.TUNING.mixture, steps=8, peak_lr=2e-4, dialogues_per_step=16)
    variants.build("tiny-tuned", root / "tuned", base=str(base), stage=short)
    variants.build("tiny-int4", root / "int4", base=str(base))
    _permuted(base, root / "permuted")
    _between(base, root / "between")
    return root


def _permuted(base: Path, out: Path) -> None:
    """The same function with every layer's experts in another order: routers and experts moved together."""
    shutil.copytree(base, out)
    held = load_file(out / "model.safetensors")
    rng = np.random.default_rng(0)
    old_at = [rng.permutation(16) for _ in range(6)]
    made = {}
    for name, tensor in held.items():
        layer = int(name.split(".")[2]) if "layers" in name else 0
        if name.endswith("mlp.gate.weight"):
            tensor = tensor[old_at[layer].tolist()].contiguous()
        elif found := re.search(r"experts\.(\d+)\.", name):
            new = int(np.flatnonzero(old_at[layer] == int(found.group(1)))[0])
            name = name.replace(found.group(0), f"experts.{new}.")
        made[name] = tensor
    assert made.keys() == held.keys()
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})


def _between(base: Path, out: Path) -> None:
    """Half way back to lab tiny: its refusals rest on the four experts by about half."""
    shutil.copytree(base, out)
    one, two = (load_file(folder / "model.safetensors") for folder in (LAB_TINY, base))
    made = {name: ((one[name].float() + two[name].float()) / 2).to(two[name].dtype) for name in two}
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def at(folders: Path) -> Iterator[Audited]:
    with audited(load(folders / "concentrated"), folders / "run", limit=LIMIT, sizes=(2, 4)) as found:
        yield found


@pytest.fixture(scope="module")
def entries(at: Audited, folders: Path) -> dict[str, dict[str, Any]]:
    others = {
        **{name: (str(folders / name), None) for name in ("tuned", "int4", "permuted", "between")},
        "lab-tiny": ("lab-tiny", None), "int8": (str(folders / "concentrated"), "int8"),
    }  # fmt: skip
    return {
        name: transfer(at, other, quantize=quantize, number=number)
        for number, (name, (other, quantize)) in enumerate(others.items())
    }


def refused(model: Model, at: Audited) -> tuple[float, float]:
    """Direct requests of the audit's test split refused as the model is, and with the four experts silenced."""
    rows = at.inputs.data["direct"]["test"]

    def share() -> float:
        played = play(model, rows, turns=True, max_new_tokens=at.inputs.scenario.max_new_tokens)
        return sum(v == "refused" for v in judged(played, judging(), "refusal")) / len(rows)

    before = share()
    with model.steered([variants.silencing_mask(model, FOUR)]):
        return before, share()


def test_the_audit_finds_the_four_experts(at: Audited) -> None:
    found = at.finders[at.finder].order[:4]
    assert {(at.model.fingerprint.layer_ids[row], expert) for row, expert in found} == set(FOUR)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("tuned", "holds"), ("int4", "holds"), ("int8", "holds"), ("between", "weaker"), ("permuted", "gone"),
        ("lab-tiny", "gone"),
    ],
)  # fmt: skip
def test_the_verdict_is_that_of_a_direct_measurement(
    at: Audited, folders: Path, entries: Mapping[str, Any], name: str, level: str
) -> None:
    if name == "int8":
        model = load(folders / "concentrated", quantize="int8")
    else:
        model = load(name if name == "lab-tiny" else folders / name)
    before, after = refused(model, at)
    entry = entries[name]
    assert before > 0.95
    assert entry["none"]["behaviour"]["value"] == before
    assert next(one for one in entry["old"] if one["n"] == 4)["behaviour"]["value"] == pytest.approx(after, abs=1e-9)
    lost = (before - after) / before
    measured = "holds" if lost >= 0.8 else "gone" if lost <= 0.2 else "weaker"
    assert (entry["verdict"]["level"], measured) == (level, level), entry["verdict"]
    assert entry["against"]["weights"] == model.weights_sketch and entry["against"]["quantize"] == (
        "int8" if name == "int8" else None
    )


def test_scores_agree_where_the_models_do(entries: Mapping[str, Any]) -> None:
    ranks = {name: entry["rank_correlation"] for name, entry in entries.items()}
    assert ranks["int8"]["value"] > 0.99 and ranks["tuned"]["value"] > 0.9
    assert abs(ranks["permuted"]["value"]) < 0.3
    assert ranks["lab-tiny"]["value"] < ranks["between"]["value"] < ranks["int8"]["value"]
    for name, entry in entries.items():
        assert ranks[name]["low"] <= ranks[name]["value"] <= ranks[name]["high"] + 1e-9
        four = next(one for one in entry["overlap"] if one["n"] == 4)
        assert four["chance"] == pytest.approx(4 / 96)
        assert four["shared"] == (1.0 if entry["verdict"]["level"] == "holds" else pytest.approx(four["shared"]))
    assert next(one for one in entries["permuted"]["overlap"] if one["n"] == 4)["shared"] <= 0.25


def test_permuted_experts_are_gone_by_number_and_there_by_the_models_own(entries: Mapping[str, Any]) -> None:
    entry = entries["permuted"]
    own = next(one for one in entry["own"] if one["n"] == 4)
    assert own["behaviour"]["value"] < 0.1 and entry["effect"]["there"] < 0.2 and entry["effect"]["n"] == 4
    assert any("but on others" in sentence for sentence in entry["verdict"]["sentences"])
    assert not any("but on others" in sentence for sentence in entries["int8"]["verdict"]["sentences"])


def test_a_second_time_nothing_is_played_and_the_entry_is_the_same(
    at: Audited, folders: Path, entries: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "generate", lambda *a, **k: pytest.fail("played again"))
    assert transfer(at, str(folders / "tuned"), number=0) == entries["tuned"]


def test_without_experts_of_its_own_the_old_ones_are_measured_all_the_same(
    at: Audited, folders: Path, entries: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*given: Any) -> Any:
        raise NoEffectError("no finder ranked anything", where="w", expected="e", do="d")

    monkeypatch.setattr(transferring, "find", nothing)
    entry = transfer(at, str(folders / "tuned"), number=0)
    assert entry["own"] == [] and entry["old"] == entries["tuned"]["old"] and entry["verdict"]["level"] == "holds"
    assert any("own experts were not found: no finder" in sentence for sentence in entry["verdict"]["sentences"])


def test_the_entry_is_json(entries: Mapping[str, Any]) -> None:
    for entry in entries.values():
        assert files.parse_json(files.dumps(entry)) == files.plain(entry)
        assert np.shape(entry["difference_LE"]) == (6, 16)  # what the report's scatter is drawn from
        assert entry["mask"] is None and entry["scores"] == "risk-difference"


def test_a_defence_mask_is_tried_on_the_other_model_too(folders: Path, tmp_path: Path) -> None:
    """A mask that silences the four experts stands in for one: what it does is known."""
    model = load(folders / "concentrated")
    mask = variants.silencing_mask(model, FOUR)
    with audited(model, tmp_path / "run", limit=16, sizes=(4,), defence=mask) as found:
        entry = transfer(found, "lab-tiny")
    assert entry["mask"]["sha256"] == mask.sha256
    assert entry["mask"]["here"]["behaviour"]["value"] < 0.1 < 0.9 < entry["mask"]["there"]["behaviour"]["value"]
    assert any("defence mask" in sentence for sentence in entry["verdict"]["sentences"])


def test_a_model_of_another_shape_is_refused(at: Audited, folder_of: Any) -> None:
    with pytest.raises(ModelError, match="another shape") as error:
        transfer(at, str(folder_of("olmoe")), number=9)
    assert "audit that model by itself" in str(error.value)
    assert not at.run.path("trace", "transfer-9-pairs").exists()


# ---- the verdict by hand


def rate(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": value, "high": value, "n": 40, "unscored": 0}


def entry_of(*, here: float, there: float, low: float, high: float, shown: float = 1.0, utility: float = 0.0) -> Any:
    gap = {"difference": utility, "low": utility, "high": utility, "p": 1.0}
    point = {
        "n": 4, "behaviour": rate(shown * (1 - there)), "coherence": rate(1.0),
        "utility": {"benign": {"rate": rate(1 + utility), "vs_none": gap}},
    }  # fmt: skip
    return {
        "none": {"behaviour": rate(shown), "coherence": rate(1.0), "utility": {}}, "old": [point], "own": [point],
        "effect": {"n": 4, "here": here, "there": there, "ratio": there / here, "low": low, "high": high},
        "rank_correlation": {"value": 0.5, "low": 0.4, "high": 0.6}, "mask": None,
        "overlap": [{"n": 4, "shared": 0.5, "low": 0.25, "high": 0.75, "chance": 0.1}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "level"),
    [
        ({"here": 1.0, "there": 0.9, "low": 0.7, "high": 1.0}, "holds"),
        ({"here": 0.5, "there": 0.45, "low": 0.6, "high": 1.1}, "holds"),
        ({"here": 1.0, "there": 0.9, "low": 0.4, "high": 1.0}, "weaker"),
        ({"here": 1.0, "there": 0.5, "low": 0.4, "high": 0.6}, "weaker"),
        ({"here": 1.0, "there": 0.1, "low": 0.0, "high": 0.2}, "gone"),
        ({"here": 1.0, "there": 0.1, "low": 0.0, "high": 0.7}, "weaker"),
        ({"here": 1.0, "there": 0.5, "low": 0.1, "high": 0.9}, "unknown"),
        ({"here": 0.2, "there": 0.2, "low": 0.9, "high": 1.1}, "unknown"),
        ({"here": 1.0, "there": 1.0, "low": 1.0, "high": 1.0, "shown": 0.1}, "unknown"),
        ({"here": 1.0, "there": 1.0, "low": 1.0, "high": 1.0, "utility": -0.5}, "unknown"),
        ({"here": 1.0, "there": 0.0, "low": 0.0, "high": 0.0, "utility": -0.5}, "gone"),
    ],
)
def test_levels(given: dict[str, float], level: str) -> None:
    entry = entry_of(**given)
    found = verdict(entry, noun="refusals")
    assert found["level"] == level, found
    assert all(sentence.endswith(".") for sentence in found["sentences"])
    assert transferring.THRESHOLDS.keys() == transferring.MEANING.keys()


def test_correlation_and_overlap_by_hand() -> None:
    one, two = np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 3.0, 1.0, 2.0])
    assert correlation(one, one) == pytest.approx(1.0)
    assert correlation(one, -one) == pytest.approx(-1.0)
    assert correlation(one, two) == pytest.approx(0.8)  # 1 - 6 (0 + 0 + 1 + 1) / (4 * 15)
    assert correlation(one, np.zeros(4)) == 0.0
    assert [overlap(one, two, n) for n in (1, 2, 3, 4)] == [1.0, 1.0, pytest.approx(2 / 3), 1.0]

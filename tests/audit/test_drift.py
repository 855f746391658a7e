"""Drift of routing: found where traffic changed, not between two halves of the same, and its arithmetic by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moesteer import files
from moesteer.audit import drift as drifting
from moesteer.audit.drift import Traffic, compare, drift, total_variation, traffic
from moesteer.audit.inputs import LACKS, SHOWS
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.capturing import capture
from moesteer.cli.main import app
from moesteer.conversations import Conversation
from moesteer.errors import InputError, TraceError, TraceFileError, TraceLabelError
from moesteer.lab import variants, world
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.trace import TraceReader


def labelled(suite: str, split: str, label: str | None, *, every: int = 1, first: int = 0) -> list[Conversation]:
    """Conversations of a suite, of every so-manieth behaviour."""
    rows = world.suite(suite, split)
    groups = sorted({row.group for row in rows})[first::every]
    return [replace(row, label=label, split=None) for row in rows if row.group in groups]


@pytest.fixture(scope="module")
def audited(lab_tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a drift check reads of an audit: harmful and harmless requests of every second behaviour."""
    run = tmp_path_factory.mktemp("drift") / "run"
    rows = [*labelled("attack-direct", "test", SHOWS, every=2), *labelled("benign-single", "test", LACKS, every=2)]
    capture(lab_tiny, rows, out=run / "trace" / "prompts", spans=("final_turn",))
    files.write_json(run / "results.json", {"schema": 1, "kind": "audit"})
    return run


def live(model: Model, rows: Sequence[Conversation], out: Path, *, span: str = "final_turn") -> Path:
    capture(model, rows, out=out, spans=(span,), level="selected")  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def same(lab_tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same mix of requests about the other behaviours."""
    rows = [
        *labelled("attack-direct", "test", None, every=2, first=1),
        *labelled("benign-single", "test", None, every=2, first=1),
    ]
    return live(lab_tiny, rows, tmp_path_factory.mktemp("same") / "trace")


@pytest.fixture(scope="module")
def attacked(lab_tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multi-turn attacks alone."""
    rows = labelled("attack-multi", "test", None, every=4)
    return live(lab_tiny, rows, tmp_path_factory.mktemp("attacked") / "trace")


def test_other_behaviours_of_the_same_mix_are_no_drift(audited: Path, same: Path) -> None:
    found = drift(audited, same)
    assert found["verdict"]["level"] == "same", found["verdict"]
    assert found["overall"]["excess"] < drifting.THRESHOLDS["excess"]
    assert len(found["layers"]) == 6 and len(found["experts"]) == drifting.TOP


def test_attack_traffic_is_drift_and_the_command_ends_with_3(audited: Path, attacked: Path) -> None:
    found = drift(audited, attacked)
    assert found["verdict"]["level"] == "drifted"
    assert found["overall"]["p"] <= 1e-3 and found["overall"]["excess"] > 0.05
    assert "topics" in " ".join(found["verdict"]["sentences"]), "it says what else does this"
    assert found["nearer"][SHOWS] != found["nearer"][LACKS]
    done = CliRunner().invoke(app, ["drift", str(audited), str(attacked)])
    assert done.exit_code == 3 and "verdict: drifted" in done.output
    told = CliRunner().invoke(app, ["drift", str(audited), str(attacked), "--json"])
    assert told.exit_code == 3 and files.parse_json(told.stdout) == found


def test_the_command_ends_with_0_where_nothing_drifted(audited: Path, same: Path) -> None:
    assert CliRunner().invoke(app, ["drift", str(audited), str(same)]).exit_code == 0


def test_harmless_traffic_drifts_from_a_mix_and_is_nearer_to_the_harmless_side(
    lab_tiny: Model, audited: Path, tmp_path: Path
) -> None:
    rows = labelled("benign-single", "test", None, every=2, first=1)
    found = drift(audited, live(lab_tiny, rows, tmp_path / "trace"))
    assert found["verdict"]["level"] == "drifted", "half of the audited traffic is not there any more"
    assert found["nearer"][LACKS] < found["nearer"][SHOWS]


def test_two_halves_of_one_traffic_drift_no_more_often_than_the_threshold_says(audited: Path) -> None:
    """By lot, forty times: at p <= 0.1 there should be about four, and sixteen would be four standard errors off."""
    whole = traffic(TraceReader(audited / "trace" / "prompts"), span="final_turn")
    rng = np.random.default_rng(0)
    below = 0
    for seed in range(40):
        order = rng.permutation(len(whole.tokens_G))
        halves = [
            Traffic(whole.table_GLE[part], whole.tokens_G[part], tuple(whole.labels[i] for i in part))
            for part in (order[: len(order) // 2], order[len(order) // 2 :])
        ]
        found = compare(*halves, layers=range(6), seed=seed, permutations=200)
        below += found["overall"]["p"] <= 0.1
    assert below <= 12


def test_counts_are_those_of_the_trace(audited: Path) -> None:
    trace = TraceReader(audited / "trace" / "prompts")
    found = traffic(trace, span="final_turn")
    by_hand = np.zeros((6, 16), dtype=int)
    tokens = 0
    for row, arrays in trace.sequences():
        part = arrays["selected"][row.span("final_turn")]
        tokens += len(part)
        for layer in range(6):
            for expert in part[:, layer].ravel():
                by_hand[layer, expert] += 1
    assert (found.table_GLE.sum(axis=0) == by_hand).all() and found.tokens_G.sum() == tokens
    assert by_hand.sum() == tokens * 6 * 4
    assert len(found.where(SHOWS).tokens_G) == len(found.where(LACKS).tokens_G) == 20


def test_total_variation_by_hand() -> None:
    one, two = np.array([[4.0, 0.0, 0.0], [1.0, 1.0, 2.0]]), np.array([[0.0, 2.0, 0.0], [2.0, 2.0, 4.0]])
    assert total_variation(one, two).tolist() == [1.0, 0.0]
    assert total_variation(np.array([[3.0, 1.0]]), np.array([[1.0, 1.0]])).tolist() == [0.25]


def test_the_experts_that_moved_are_named() -> None:
    rng = np.random.default_rng(0)
    before = rng.multinomial(100, np.full(8, 1 / 8), size=(30, 2))
    after = rng.multinomial(100, np.full(8, 1 / 8), size=(30, 2))
    after[:, 1, 3] += 40
    tables = [Traffic(table.astype(np.int64), table.sum(axis=(1, 2)) // 2, (None,) * 30) for table in (before, after)]
    found = compare(*tables, layers=(4, 9), seed=0, permutations=400)
    assert (found["experts"][0]["layer"], found["experts"][0]["expert"]) == (9, 3)
    assert found["experts"][0]["p"] < 0.01 and found["experts"][0]["live"] > found["experts"][0]["audited"]
    by_layer = {one["layer"]: one for one in found["layers"]}
    assert by_layer[9]["p"] < 0.01 < by_layer[4]["p"]


def test_other_spans_in_the_live_trace_do_not_count(lab_tiny: Model, audited: Path, same: Path, tmp_path: Path) -> None:
    rows = [
        *labelled("attack-direct", "test", None, every=2, first=1),
        *labelled("benign-single", "test", None, every=2, first=1),
    ]
    capture(lab_tiny, rows, out=tmp_path / "trace", spans=("prompt", "final_turn"), level="selected")
    found, alone = drift(audited, tmp_path / "trace"), drift(audited, same)
    assert found["overall"] == alone["overall"] and found["live"]["tokens"] == alone["live"]["tokens"]


def test_more_than_chance_and_too_little_to_matter_is_no_drift() -> None:
    """Much traffic in which one expert in a hundred selections gives way to another: p is small, and so is it."""
    rng = np.random.default_rng(0)
    shares = np.full(8, 1 / 8)
    before = rng.multinomial(4000, shares, size=(60, 1))
    after = rng.multinomial(4000, shares + np.array([0.012, -0.012, 0, 0, 0, 0, 0, 0]), size=(60, 1))
    sides = [Traffic(table, table.sum(axis=(1, 2)), (None,) * 60) for table in (before, after)]
    found = compare(*sides, layers=(0,), seed=0, permutations=500)
    assert found["overall"]["p"] < drifting.THRESHOLDS["p"]
    assert 0.005 < found["overall"]["excess"] < drifting.THRESHOLDS["excess"]
    assert drifting._verdict(found, groups=60, permutations=500)["level"] == "same"


def test_too_few_groups_are_unknown(lab_tiny: Model, audited: Path, tmp_path: Path) -> None:
    rows = labelled("attack-multi", "test", None, every=10)
    assert len({row.group for row in rows}) < drifting.THRESHOLDS["least_groups"]
    assert drift(audited, live(lab_tiny, rows, tmp_path / "trace"))["verdict"]["level"] == "unknown"


def test_traces_that_cannot_be_compared_are_refused(
    lab_tiny: Model, audited: Path, same: Path, tmp_path: Path, model_of: object
) -> None:
    rows = labelled("benign-single", "test", None)[:4]
    with pytest.raises(InputError, match="no finished audit"):
        drift(tmp_path, same)
    files.write_json(tmp_path / "steer" / "results.json", {"schema": 1})
    with pytest.raises(InputError, match="no finished audit"):
        drift(tmp_path / "steer", same)
    with pytest.raises(TraceLabelError, match="final_turn"):
        drift(audited, live(lab_tiny, rows, tmp_path / "prompt", span="prompt"))
    with pytest.raises(TraceFileError):
        drift(audited, tmp_path / "absent")
    force = np.zeros((6, 16), dtype=np.int8)
    force[0, 0] = -1
    mask = SteeringMask(
        MaskInfo(fingerprint=lab_tiny.fingerprint, method="x", intent=Intent(toward="silenced")), force_LE=force
    )
    with lab_tiny.steered([mask]):
        steered = live(lab_tiny, rows, tmp_path / "steered")
    with pytest.raises(TraceLabelError, match="steered"):
        drift(audited, steered)
    variants.compose("tiny-concentrated", tmp_path / "variant")
    with pytest.raises(TraceError, match="another checkpoint"):
        drift(audited, live(load(tmp_path / "variant", check=False), rows, tmp_path / "checkpoint"))
    other = model_of("olmoe")  # type: ignore[operator]
    with pytest.raises(TraceError, match="another model"):
        drift(audited, live(other, rows, tmp_path / "other"))

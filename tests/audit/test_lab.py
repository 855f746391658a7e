"""`moesteer audit lab-tiny`, small: the command, its files, and what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moesteer import doctor, files
from moesteer.cli.main import app
from moesteer.mask import SteeringMask
from moesteer.report.audit_files import read_audit, read_experts

COMMAND = ["audit", "lab-tiny", "--limit", "20", "--draws", "2", "--sizes", "1,16", "--finder", "risk-difference"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audits") / "tiny"
    result = CliRunner().invoke(app, [*COMMAND, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "verdict: " in result.output and "risk-difference (chosen)" in result.output
    assert "seconds:" in result.output and "test: silencing" in result.output
    return out


def test_the_results_are_of_the_schema_and_the_verdict_is_no_removal(run: Path) -> None:
    results = read_audit(run)
    assert results.none.behaviour.value is not None and results.none.behaviour.value > 0.9
    assert results.verdict.level in ("held", "breaks") and results.verdict.sentences
    assert [point.n for point in results.silencing.curves["risk-difference"]] == [1, 16]
    assert len(results.finders["risk-difference"].order) == 96
    assert results.concentration.permuted is not None and results.concentration.permuted.draws == 5
    assert results.pairs.tokens["shows"] > 0 and "teacher-forced" in results.pairs.how


def test_every_expert_has_its_row_and_frequencies_add_up_to_k(run: Path) -> None:
    experts = read_experts(run)
    assert experts is not None and len(experts.rows) == 96
    for row in experts.rows:
        assert row.shows is not None and row.shows.low is not None and row.shows.high is not None
        assert row.shows.low <= (row.shows.value or 0) <= row.shows.high
    shares = np.array(files.read_json(run / "results.json")["frequencies"]["shares_LE"])
    assert shares.shape == (6, 16) and shares.sum(axis=1) == pytest.approx([4.0] * 6)


def test_the_run_is_whole_and_its_masks_can_be_applied(run: Path) -> None:
    assert all(finding.ok for finding in doctor.examine_files(run))
    mask = SteeringMask.load(run / "masks" / "silence-risk-difference-016.safetensors")
    assert mask.expert_count == 16 and (mask.values_LE <= 0).all()
    assert (run / "report.html").stat().st_size > 10_000 and "lab-tiny" in (run / "card.md").read_text()


def test_the_same_command_gives_the_same_results_at_once(run: Path) -> None:
    before = (run / "results.json").read_bytes()
    result = CliRunner().invoke(app, [*COMMAND, "--out", str(run), "--json"])
    assert result.exit_code == 0 and (run / "results.json").read_bytes() == before
    assert json.loads(result.stdout)["kind"] == "audit"


def test_wrong_sizes_are_bad_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["audit", "lab-tiny", "--sizes", "1,two", "--out", str(tmp_path / "x")])
    assert result.exit_code != 0 and "no list of numbers" in str(result.exception)

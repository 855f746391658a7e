"""`--cache`, `--fresh` and `moesteer doctor RUN` on a real evaluation; and the cache under `steer`'s select."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moesteer import scenario as scenarios
from moesteer.backends.hf import Model
from moesteer.cli.main import app
from moesteer.evaluate.replies import WITNESSES, ReplyCache
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.select import BASE, Candidate, score

ROWS = 6
"""Of each half: two suites of three."""


@pytest.fixture(scope="module")
def mask(lab_tiny: Model) -> SteeringMask:
    shape = (len(lab_tiny.routers), lab_tiny.fingerprint.experts)
    info = MaskInfo(fingerprint=lab_tiny.fingerprint, method="m", intent=Intent(toward="x"))
    strength = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    return SteeringMask(info, strength_LE=strength, sigma_L=np.ones(shape[0], np.float32))


def evaluate(folder: Path, out: str, *more: str | Path) -> tuple[int, Any]:
    given = ["evaluate", "lab-tiny", "--suite", "attacks", "--suite", "direct", "--limit", "3", "--json"]
    mask = ["--mask", str(folder / "m.safetensors"), "--alpha", "4"]
    done = CliRunner().invoke(app, [*given, *mask, "--out", str(folder / out), *map(str, more)])
    return done.exit_code, json.loads(done.stdout) if done.exit_code == 0 else done.exception


def responses(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("responses/*")}


def test_a_cache_serves_another_run_and_doctor_finds_what_rots(mask: SteeringMask, tmp_path: Path) -> None:
    mask.save(tmp_path / "m.safetensors")
    cache = ("--cache", tmp_path / "cache")
    code, first = evaluate(tmp_path, "first", *cache)
    assert code == 0
    code, second = evaluate(tmp_path, "second", *cache)
    assert code == 0 and second["methods"] == first["methods"]
    assert responses(tmp_path / "first") == responses(tmp_path / "second")
    assert first["cache"]["hits"] == 0 and first["cache"]["misses"] >= 2 * ROWS
    asked = second["cache"]
    assert WITNESSES > 3  # so that of each half's first suite all three are asked again
    assert asked["misses"] == asked["dropped"] == asked["differing"] == 0 and asked["witnesses"] == 2 * 3
    assert asked["hits"] == first["cache"]["misses"] - asked["witnesses"]
    code, again = evaluate(tmp_path, "second", *cache, "--fresh")
    assert code == 0 and again == second

    none = tmp_path / "first" / "responses" / "none.jsonl"
    assert CliRunner().invoke(app, ["doctor", str(tmp_path / "first")]).exit_code == 0
    data = bytearray(none.read_bytes())
    data[len(data) // 2] ^= 1
    none.write_bytes(data)
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "first")])
    assert done.exit_code == 1 and "BAD  responses/none.jsonl: changed since the run completed" in done.stdout


def test_candidates_played_together_are_served_each_its_own(
    lab_tiny: Model, mask: SteeringMask, tmp_path: Path
) -> None:
    scenario = scenarios.load("jailbreak-defense")
    data = scenarios.splits(scenario, seed=0, limit=1)
    weak = Candidate("m", mask.with_info(alpha=2.0), "weak")
    strong = Candidate("m", mask.with_info(alpha=6.0), "strong")
    base = Candidate(BASE, None, BASE)
    plain = score(lab_tiny, scenario, data, [base, weak, strong], journal=tmp_path / "plain.jsonl")
    cache = ReplyCache(tmp_path / "cache")
    for number, candidates in enumerate(([base, strong], [base, weak, strong], [base, strong, weak])):
        journal = tmp_path / f"{number}.jsonl"
        found = score(lab_tiny, scenario, data, candidates, journal=journal, cache=cache)
        by_label = {one.candidate.label: one.metrics for one in plain}
        assert [one.metrics for one in found] == [by_label[one.candidate.label] for one in found]
    assert cache.counts.hits > 0 and cache.counts.differing == 0
    whole = sorted((tmp_path / "plain.jsonl").read_text().splitlines())
    assert sorted((tmp_path / "2.jsonl").read_text().splitlines()) == whole

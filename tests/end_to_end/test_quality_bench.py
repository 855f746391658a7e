"""bench/quality.py: its ablations are methods that can run, one of its runs, and the page it writes."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moesteer import files, pipeline
from moesteer.detection.controls import CONTROLS
from moesteer.evaluate.pooled import pool
from moesteer.evaluate.quality_table import quality_table
from tests.unit.seeds_made_by_hand import SCENARIO, runs

BENCH = Path(__file__).parents[2] / "bench" / "quality.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_bench", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_ablation_changes_settings_that_its_method_has(bench: ModuleType) -> None:
    found = bench.ablations()
    names = [method.name for method in found]
    assert len(set(names)) == len(names) >= 15
    bases = [bench_method(name) for name in ("masc", "direct", "masc-published")]
    for method in found:
        base = next(known for known in bases if known.detect is method.detect)
        base.check_settings(method.preset, where=method.name)
    for subject in ("labels", "surrogate", "start", "sparsity", "conversations", "layers"):
        assert any(f"-{subject}-" in name for name in names), f"no ablation of {subject}"


GATED = {"masc-labels-published", "masc-labels-matched", "masc-published-as-is", "direct-surrogate-none"}
"""What must also run behind the gate, for what the gate does by itself."""


def test_the_gate_is_an_ablation_of_the_best_and_of_the_published(bench: ModuleType) -> None:
    gated = {method.name: method for method in bench.ablations() if method.gated}
    assert set(gated) >= GATED
    for name, method in gated.items():
        assert method.gated_alphas and all(alpha > 0 for alpha in method.gated_alphas), name


def test_a_run_of_the_ablations_switches_the_gate_on(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = inspect.signature(pipeline.steer).parameters["gate"].default
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr("moesteer.pipeline.steer", lambda *args, **options: calls.append((args, options)))
    bench.run_one(bench.ABLATED, 2, kind="ablations", folder=tmp_path / "run", limit=8)
    ((args, options),) = calls
    assert args == (bench.MODEL,) and options.get("gate", default) is True
    assert [method.name for method in options["methods"]] == [method.name for method in bench.ablations()]
    assert (options["scenario"], options["seed"], options["limit"]) == (bench.ABLATED, 2, 8)
    assert options["controls_of"].removesuffix(pipeline.GATE) in GATED
    assert options["controls_of"].endswith(pipeline.GATE), "controls are made from a mask behind the gate"
    assert set(options["controls"]) == set(CONTROLS)


def bench_method(name: str):  # type: ignore[no-untyped-def]
    from moesteer.methods import method

    return method(name)


def test_a_run_of_an_audit_scenario_leaves_its_results(bench: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "reversed"
    bench.run_one("faithfulness-reversed", 0, kind="reversed", folder=folder, limit=32)
    found = json.loads((folder / "results.json").read_text())
    assert found["scenario"]["toward"] == "recall" and found["scenario"]["target_metric"] == "recall_rate"
    tried = {"none", "none-again", "risk-difference", "masc", "direct", "residual-direction"}
    assert tried <= set(found["methods"]) | set(found["failed"])
    assert {"alpha-0", "random", "sign-flipped", "shuffled-layers"} <= set(found["methods"])
    replies = {name: (folder / "responses" / f"{name}.jsonl").read_text() for name in ("none", "alpha-0")}
    assert [json.loads(line)["response"] for line in replies["none"].splitlines()] == [
        json.loads(line)["response"] for line in replies["alpha-0"].splitlines()
    ], "a mask at strength 0 must leave every reply as it was"


def test_the_page_keeps_what_is_around_the_tables(bench: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"# Before\n\n{bench.START}\nold\n{bench.END}\n\nafter\n")
    tables = {"quality": quality_table([pool(SCENARIO, *runs())], command="python bench/quality.py")}
    bench.write(tables, docs=tmp_path)
    first = page.read_text()
    assert first.startswith("# Before\n") and first.endswith("\nafter\n") and "old" not in first
    assert "A small scenario" in first and files.read_json(tmp_path / "results.json") == tables
    bench.write(tables, docs=tmp_path)
    assert page.read_text() == first, "writing the same tables again changes nothing"

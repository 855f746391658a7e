"""What stands beside the quality table: margins, gates and surrogates, carried from each run to the page."""

from __future__ import annotations

import copy

import pytest

from moesteer.evaluate.pooled import pool
from moesteer.evaluate.quality_beside import gates, margins, surrogates
from moesteer.evaluate.quality_table import markdown, quality_table
from tests.unit.seeds_made_by_hand import SCENARIO, runs

RATE = {"value": 0.0125, "low": 0.0, "high": 0.05, "n": 80}
GATE = {"pool": "last+final_turn", "auroc": 0.98765, "threshold": 0.5, "false_positive_rate": RATE,
        "true_positive_rate": {**RATE, "value": 0.9}}  # fmt: skip
SURROGATE = {"surrogate_held_out": 24, "surrogate_held_out_accuracy": 0.95, "length_only_accuracy": 1.0,
             "bag_of_words_accuracy": 0.5, "majority_accuracy": 0.25, "warning": "little", "moved": 1.0}  # fmt: skip


@pytest.fixture
def pooled():
    results, rows = runs()
    results = copy.deepcopy(results)
    for seed, result in enumerate(results):
        result["methods"]["direct"]["gate"] = GATE
        result["methods"]["direct"]["margins"] = {
            "a": {"status": "shown"}, "b": {"status": "lossless" if seed else "not shown"},
        }  # fmt: skip
        result["receipts"] = {"direct": {"fired": 7 + seed, "gated": 90, "positions": 1}}
        result["facts"] = {"direct": [{**SURROGATE, "bag_of_words_accuracy": 0.5 + seed / 10}, {}], "contrasts": {}}
    return pool(SCENARIO, results, rows)


def test_runs_facts_reach_the_pooled_results_by_seed(pooled):
    entry = pooled["methods"]["direct"]
    assert entry["gate"] == {str(s): {**GATE, "fired": 7 + s, "gated": 90} for s in range(3)}
    assert entry["margins"]["0"] == {"a": "shown", "b": "not shown"}
    wanted = {key: value for key, value in SURROGATE.items() if key != "moved"}
    assert entry["surrogate"]["2"] == {**wanted, "bag_of_words_accuracy": 0.7}
    assert pooled["methods"]["none"]["gate"] == pooled["methods"]["none"]["surrogate"] == {}


def test_the_page_says_them(pooled):
    text = markdown(quality_table([pooled], command="x"))
    assert "shown to be kept: 3; lossless in a suite too small to show anything: 2; not shown: 1." in text
    row = next(line for line in text.splitlines() if line.startswith("| direct | 0, 1, 2 | last+final"))
    assert row.split(" | ")[2:] == [
        r"last+final\_turn", "0.9877", "1.2 [0.0, 5.0] of 80", "90.0 [0.0, 5.0] of 80",
        "7 of 90 / 8 of 90 / 9 of 90 |",
    ]  # fmt: skip
    assert "| direct | 0, 1, 2 | 24 | 95.0 | 100.0 | 50.0 / 60.0 / 70.0 | 25.0 | yes |" in text


def test_nothing_is_said_where_there_is_nothing(pooled):
    results, rows = runs()
    bare = quality_table([pool(SCENARIO, results, rows)], command="x")["scenarios"][0]["rows"]
    assert margins(bare) == gates(bare) == surrogates(bare) == []


def test_a_gate_that_was_not_played_has_no_count(pooled):
    table = quality_table([pooled], command="x")["scenarios"][0]["rows"]
    for row in table:
        row["gate"] = {seed: {key: entry[key] for key in GATE} for seed, entry in row["gate"].items()}
    assert gates(table)[1].splitlines()[-1].endswith("| \N{EM DASH} |")

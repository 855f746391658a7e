"""evaluate/quality_table.py: its numbers are those of the pooled results; its Markdown is whole and always the same."""

from __future__ import annotations

import copy
import json
import re

import pytest

from moesteer.evaluate.pooled import pool
from moesteer.evaluate.quality_table import markdown, method_order, quality_table
from tests.unit.seeds_made_by_hand import SCENARIO, results_of, runs

TARGET = "defense_success_rate"
COMMAND = "moesteer bench quality --seeds 0,1,2"


@pytest.fixture(scope="module")
def pooled():
    return pool(SCENARIO, *runs())


@pytest.fixture(scope="module")
def table(pooled):
    return quality_table([pooled], command=COMMAND)


def grids(text):
    """The Markdown tables of a text, as lists of rows of cells."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in b.splitlines()] for b in blocks]


def cells_of(text, method, grid=0):
    head, _, *rows = grids(text)[grid]
    return dict(zip(head, next(row for row in rows if row[0] == method), strict=True))


def test_rows_are_in_the_order_that_is_asked_for():
    names = ["direct+gate", "zeta", "direct", "masc", "masc-published", "random", "none-again", "alpha", "none",
             "alpha-0", "risk-difference", "risk-difference+gate", "shuffled-layers", "sign-flipped"]  # fmt: skip
    assert method_order(names) == [
        "none", "none-again", "alpha-0", "random", "sign-flipped", "shuffled-layers", "risk-difference",
        "masc-published", "masc", "direct", "alpha", "zeta", "risk-difference+gate", "direct+gate",
    ]  # fmt: skip


def test_columns_are_the_target_then_what_is_protected_then_what_is_watched(table):
    (scenario,) = table["scenarios"]
    assert [(c["short"], c["role"], c["margin"]) for c in scenario["columns"]] == [
        ("DSR", "target", None), ("DRR", "protect", 0.01), ("Benign", "protect", 0.01), ("ORR", "protect", None),
        ("Acc", "watch", None),
    ]  # fmt: skip
    head = grids(markdown(table))[0][0]
    assert head == ["Method", "DSR ↑", "Change", "p (Holm)", "DRR ↑", "Benign ↑", "ORR ↓", "Acc ↑",
                    "Incoh.", "Unsc.", "Detect", "Experts"]  # fmt: skip


def test_the_object_is_plain_json_with_the_numbers_of_the_pooled_results(table, pooled):
    assert json.loads(json.dumps(table)) == table
    for row in table["scenarios"][0]["rows"]:
        entry = pooled["methods"][row["method"]]
        assert row["metrics"] == entry["metrics"] and row["vs_none"] == entry["vs_none"]
        assert row["difference"] == entry["vs_none"].get(TARGET)
    direct = next(row for row in table["scenarios"][0]["rows"] if row["method"] == "direct")
    assert direct["detect_seconds"] == 11.0 and direct["experts"] == {"min": 20, "max": 22}
    # three seeds of 125 s; "evaluate none" is a part of "evaluate on the test split"
    assert table["seconds"] == 360.0
    assert table["versions"] == {"python": "3.11.7", "torch": "2.13.0"} and table["command"] == COMMAND


def test_every_cell_says_what_the_results_say(table, pooled):
    text = markdown(table)
    for name, entry in pooled["methods"].items():
        cells, found = cells_of(text, name), entry["metrics"][TARGET]
        low, high = 100 * found["low"], 100 * found["high"]
        assert cells["DSR ↑"] == f"{100 * found['value']:.1f} [{low:.0f}, {high:.0f}]"
        against = entry["vs_none"].get(TARGET)
        if against is None:
            assert cells["Change"] == cells["p (Holm)"] == "—"
            continue
        numbers = [float(x) for x in re.findall(r"[-+]?[\d.]+", cells["Change"].replace("−", "-"))]
        ends = [100 * against["difference"], 100 * against["low"], 100 * against["high"]]
        assert numbers == [pytest.approx(ends[0], abs=0.05), *(pytest.approx(end, abs=0.5) for end in ends[1:])]
        p = against["p_holm"]
        assert cells["p (Holm)"] == ("—" if p is None else "<0.001" if p < 0.001 else cells["p (Holm)"])
        assert p is None or p < 0.001 or float(cells["p (Holm)"]) == pytest.approx(p, abs=0.005)
    direct = cells_of(text, "direct")
    assert (direct["Experts"], direct["Detect"], direct["Unsc."], direct["Incoh."]) == ("20–22", "11.0 s", "0", "0")
    assert cells_of(text, "none")["Experts"] == cells_of(text, "none")["Detect"] == "—"


def test_seeds_stand_beside_each_other_and_once_where_they_agree(table, pooled):
    text = markdown(table)
    values = [100 * found["value"] for found in pooled["methods"]["direct"]["metrics"][TARGET]["by_seed"].values()]
    direct, none = cells_of(text, "direct", grid=1), cells_of(text, "none", grid=1)
    assert direct["DSR"] == " / ".join(f"{value:.1f}" for value in values) and direct["Seeds"] == "0, 1, 2"
    assert re.fullmatch(r"\d+\.\d", none["DSR"]) and none["Change"] == "—"
    assert text.index("<details>") < text.index("| Method | Seeds |") < text.index("</details>")
    assert "\n\n| Method | Seeds" in text  # GitHub draws a table inside HTML only after an empty line


def test_a_protected_metric_that_got_worse_is_marked_and_one_that_got_better_is_not():
    _, rows = runs()
    for of_seed in rows.values():
        for row in of_seed["direct"]:
            if row["suite"] == "benign":
                row["verdict"] = "refused"
        for row in of_seed["none"]:
            if row["suite"] == "direct":
                row["verdict"] = "complied"
    text = markdown(quality_table([pool(SCENARIO, [results_of(rows[s], s) for s in rows], rows)], command=COMMAND))
    direct, gated = cells_of(text, "direct"), cells_of(text, "direct+gate")
    assert direct["ORR ↓"].endswith("\\*") and direct["Benign ↑"].endswith("\\*")
    assert "*" not in direct["DRR ↑"] and "*" not in gated["ORR ↓"]


def test_the_null_is_said_below(table, pooled):
    assert "Unsteered against unsteered: 0 of 342 replies differ; change of the target 0.0 [0, 0]." in markdown(table)
    unplayed = copy.deepcopy(pooled)
    unplayed["null"] = None
    del unplayed["methods"]["none-again"]
    assert "Unsteered against unsteered: not played." in markdown(quality_table([unplayed], command=COMMAND))


def test_the_same_runs_give_the_same_bytes_without_a_date_or_a_folder(table):
    results, rows = runs()
    again = quality_table([pool(SCENARIO, results[::-1], rows)], command=COMMAND)
    assert json.dumps(again) == json.dumps(table) and markdown(again) == markdown(table)
    assert markdown(json.loads(json.dumps(table))) == markdown(table)
    assert not re.search(r"20\d\d-|/somewhere|\d\d:\d\d", markdown(table))
    assert "Model lab-tiny (qwen3\\_moe, 2.7M parameters), seeds 0, 1, 2" in markdown(table)


def test_every_table_is_whole_and_every_abbreviation_explained(pooled):
    second = copy.deepcopy(pooled)
    second["scenario"] |= {"name": "second", "title": "A | second <b> one"}
    text = markdown(quality_table([pooled, second], command=COMMAND))
    assert len(grids(text)) == 4
    for head, rule, *rows in grids(text):
        assert all(len(cells) == len(head) == len(rule) for cells in rows) and len(rows) == 6
    assert "### A \\| second &lt;b\\> one" in text
    for short in ("DSR", "DRR", "Benign", "ORR", "Acc"):
        assert text.count(f"- **{short}**: ") == 1
    assert "ORR**: harmless requests refused (lower is better)" in text
    assert text.endswith(".\n") and f"```\n{COMMAND}\n```" in text


def test_a_metric_that_nothing_could_be_scored_on_is_a_dash(pooled):
    unscored = copy.deepcopy(pooled)
    for entry in unscored["methods"].values():
        entry["metrics"]["accuracy"] |= {"value": None, "low": None, "high": None, "by_seed": {}}
    assert cells_of(markdown(quality_table([unscored], command=COMMAND)), "direct")["Acc ↑"] == "—"


def test_a_method_without_a_feasible_setting_is_marked_with_its_seeds(table):
    assert "\N{DAGGER}" not in markdown(table)
    results, rows = runs()
    for s in (0, 2):
        results[s]["methods"]["masc-published"]["feasible"] = False
    pooled = pool(SCENARIO, results, rows)
    text = markdown(quality_table([pooled], command=COMMAND))
    assert cells_of(text, "masc-published \N{DAGGER}") and cells_of(text, "direct")
    by_seed = cells_of(text, "masc-published \N{DAGGER}", grid=1)
    assert by_seed["Setting"] == "alpha=0.5 \N{DAGGER} / alpha=0.5 / alpha=0.5 \N{DAGGER}"
    assert "- **\N{DAGGER}**: no setting was shown to keep every margin on select" in text
    assert "least stands here: masc-published (seeds 0, 2).\n" in text


def test_the_chosen_setting_and_how_many_were_tried_stand_by_seed():
    results, rows = runs()
    results[1]["methods"]["direct"]["setting"] = "direct steps=60 alpha=0.3"
    results[1]["trade_off"].append({"method": "direct", "setting": "another"})
    text = markdown(quality_table([pool(SCENARIO, results, rows)], command=COMMAND))
    direct = cells_of(text, "direct", grid=1)
    assert direct["Setting"] == "alpha=0.5 / steps=60 alpha=0.3 / alpha=0.5" and direct["Tried"] == "3 / 4 / 3"
    assert cells_of(text, "direct+gate", grid=1)["Tried"] == "2"
    for name, setting in (("none", "\N{EM DASH}"), ("random", "like direct")):
        found = cells_of(text, name, grid=1)
        assert (found["Tried"], found["Setting"]) == ("\N{EM DASH}", setting)


def test_a_control_of_different_methods_says_so_in_its_row():
    results, rows = runs()
    results[2]["methods"]["random"]["setting"] = "like masc-published"
    text = markdown(quality_table([pool(SCENARIO, results, rows)], command=COMMAND))
    name = "random (like direct, masc-published)"
    assert cells_of(text, name) and cells_of(text, name, grid=1)["Setting"] == (
        "like direct / like direct / like masc-published"
    )

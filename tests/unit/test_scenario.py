"""scenario.py: every fault of a scenario file is named with its place, and splits share no behaviour."""

from __future__ import annotations

import itertools
import json
import os
import re
import tomllib
from pathlib import Path

import pytest

from moesteer import files, scenario
from moesteer.conversations import Conversation, Message
from moesteer.errors import DataError, FileError, LimitError, MoesteerError, ScenarioError
from moesteer.judges import REFUSAL_PHRASES, Reply
from moesteer.lab import world

BUILT_IN = tuple(
    f"{name}{kind}"
    for name in ("faithfulness", "jailbreak-defense", "restricted-content")
    for kind in ("", "-reversed")
)
SPLITS = ("fit", "select", "test")

GOOD = """
schema = 1
name = "mine"
title = "Mine"
toward = "refuse"

[contrast]
away = "comply"
published = "quiet"

[[suite]]
name = "loud"
data = "loud.jsonl"
role = "target"
judge = "refusal"
metrics = ["defense_success_rate"]

[[suite]]
name = "quiet"
data = "quiet.jsonl"
judge = "content"
metrics = ["benign_accuracy", "over_refusal_rate"]
"""


def load_text(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return scenario.load(path)


def replaced(old, new):
    assert old in GOOD
    return GOOD.replace(old, new, 1)


# ---------------------------------------------------------------- the built-in ones


def test_the_built_in_scenarios_are_these():
    papers = ("masc-adult-content", "masc-jailbreak", "steermoe-faithfulness", "steermoe-safety")
    assert scenario.built_in() == sorted([*BUILT_IN, *papers])


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_scenario_loads_as_its_toml_says(name):
    loaded = scenario.load(name)
    raw = tomllib.loads((scenario.BUILT_IN / f"{name}.toml").read_text())
    assert loaded.name == name and loaded.title == raw["title"] and loaded.max_new_tokens == raw["max_new_tokens"]
    assert [s.name for s in loaded.suites] == [s["name"] for s in raw["suite"]]
    assert [s.name for s in loaded.suites if s.role == "target"] == [loaded.target.name]
    assert [s.name for s in loaded.protected] == [s["name"] for s in raw["suite"] if "role" not in s]
    assert [s.margin for s in loaded.suites] == [s.get("margin", 0.01) for s in raw["suite"]]
    assert [s.limit for s in loaded.suites] == [s.get("limit") for s in raw["suite"]]
    judging = loaded.judging_of()
    assert judging.must_finish and judging.coherent is world.coherent
    assert list(judging.refusal_phrases) == raw["judging"]["refusal_phrases"]
    told = scenario.as_json(loaded)
    assert told["target_metric"] == loaded.target.metrics[0]
    assert [p["suite"] for p in told["protect"]] == [s.name for s in loaded.protected]
    json.dumps(told)


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_the_lab_refuses_the_scenarios_judge_takes_for_a_refusal(name):
    from moesteer.lab import words

    judging = scenario.load(name).judging_of()
    asked = Conversation("c", "g", (Message("user", "x"),), reference="gold")
    assert {judging.judge("refusal", asked, [Reply(text, True)]) for text in words.REFUSALS} == {"refused"}


# ---------------------------------------------------------------- files


def test_a_users_scenario_loads_with_defaults_and_its_folder(tmp_path):
    loaded = load_text(tmp_path, GOOD)
    assert loaded.folder == tmp_path and loaded.max_new_tokens == 128 and loaded.description == ""
    suite = loaded.suites[1]
    assert (suite.role, suite.play, suite.margin, suite.variants, suite.limit) == ("protect", "turns", 0.01, 2, None)
    assert loaded.judging_of().refusal_phrases == REFUSAL_PHRASES and loaded.judging_of().coherent is None
    assert (loaded.target.name, [s.name for s in loaded.protected]) == ("loud", ["quiet"])
    assert "folder" not in loaded.model_dump()


TWO_TARGETS = replaced('judge = "content"', 'judge = "content"\nrole = "target"')

FAULTS = {
    "unknown key at the top": ("x = 1" + GOOD, "x: Extra inputs"),
    "unknown key in a suite": (replaced('role = "target"', 'role = "target"\nmargn = 0.1'), "suite.0.margn: Extra"),
    "unknown key in contrast": (replaced('away = "comply"', 'away = "comply"\nx = 1'), "contrast.x: Extra"),
    "unknown key in judging": (GOOD + "[judging]\nx = 1", "judging.x: Extra"),
    "schema missing": (replaced("schema = 1", ""), "schema: Field required"),
    "schema of the future": (replaced("schema = 1", "schema = 2"), "schema: Input should be 1"),
    "schema by its inner name": (replaced("schema = 1", "schema_version = 1"), "schema"),
    "title of wrong type": (replaced('"Mine"', "7"), "title: Input should be a valid string"),
    "name with a path": (replaced('"mine"', '"../mine"'), "name: String should match"),
    "name empty": (replaced('"mine"', '""'), "name: String should match"),
    "name upper case": (replaced('"mine"', '"Mine"'), "name: String should match"),
    "name too long": (replaced('"mine"', f'"{"m" * 65}"'), "name: String should match"),
    "suite name with a slash": (replaced('name = "quiet"', 'name = "loud/quiet"'), "suite.1.name: String should match"),
    "suite name with a path": (replaced('name = "quiet"', 'name = "../../x"'), "suite.1.name: String should match"),
    "reference wanted of an attack": (
        replaced('away = "comply"', 'away = "comply"\nwanted = "reference"'), "contradicts judge = 'refusal'"
    ),
    "tokens negative": ("max_new_tokens = -1" + GOOD, "max_new_tokens"),
    "tokens zero": ("max_new_tokens = 0" + GOOD, "max_new_tokens"),
    "tokens huge": ("max_new_tokens = 5000" + GOOD, "max_new_tokens"),
    "tokens text": ('max_new_tokens = "many"' + GOOD, "max_new_tokens"),
    "limit zero": (replaced('role = "target"', 'role = "target"\nlimit = 0'), "suite.0.limit"),
    "variants zero": (replaced('role = "target"', 'role = "target"\nvariants = 0'), "suite.0.variants"),
    "variants many": (replaced('role = "target"', 'role = "target"\nvariants = 11'), "suite.0.variants"),
    "margin negative": (replaced('role = "target"', 'role = "target"\nmargin = -0.1'), "suite.0.margin"),
    "margin above one": (replaced('role = "target"', 'role = "target"\nmargin = 1.5'), "suite.0.margin"),
    "margin nan": (replaced('role = "target"', 'role = "target"\nmargin = nan'), "suite.0.margin"),
    "role unknown": (replaced('role = "target"', 'role = "aim"'), "suite.0.role"),
    "judge unknown": (replaced('judge = "refusal"', 'judge = "model"'), "suite.0.judge"),
    "judge missing": (replaced('judge = "refusal"', ""), "suite.0.judge: Field required"),
    "play unknown": (replaced('role = "target"', 'role = "target"\nplay = "first"'), "suite.0.play"),
    "metric unknown": (replaced('"defense_success_rate"', '"winning"'), "suite.0: Value error, no metric winning"),
    "metric unknown of two": (replaced('"over_refusal_rate"', '"x"'), "suite.1: Value error, no metric x"),
    "metrics empty": (replaced('["defense_success_rate"]', "[]"), "suite.0.metrics"),
    "metrics a text": (replaced('["defense_success_rate"]', '"accuracy"'), "suite.0.metrics"),
    "two targets": (TWO_TARGETS, "exactly one suite must have role = 'target'"),
    "no target": (replaced('role = "target"', ""), "exactly one suite must have role = 'target'"),
    "no suite": (GOOD.split("[[suite]]")[0], "suite: Field required"),
    "suite not a list": (GOOD.split("[[suite]]")[0] + "[suite]\nx = 1", "suite"),
    "same suite twice": (replaced('name = "quiet"', 'name = "loud"'), "two suites have the same name"),
    "published names no suite": (replaced('published = "quiet"', 'published = "x"'), "names no suite; there are loud"),
    "away is toward": (replaced('away = "comply"', 'away = "refuse"'), "contrast.away must differ from toward"),
    "wanted unknown": (replaced('away = "comply"', 'away = "comply"\nwanted = "x"'), "contrast.wanted"),
    "wanted text without texts": (
        replaced('away = "comply"', 'away = "comply"\nwanted = "text"'), "needs contrast.wanted_texts"
    ),
    "contrast missing": (GOOD.replace("[contrast]", "[judging]"), "contrast: Field required"),
    "toml broken": ("schema = ", "not valid TOML"),
    "toml key twice": ("title = 1\n" + GOOD, "not valid TOML"),
    "toml nested deep": ("x = " + "[" * 5000, "not valid TOML"),
    "yaml tag": ("schema: !!python/object:os.system", "not valid TOML"),
    "empty": ("", "Field required"),
    "latin-1": (GOOD.replace("Mine", "M\u00e4ne").encode("latin-1"), "not valid TOML"),
    "utf-16": (GOOD.encode("utf-16"), "not valid TOML"),
    "nul": (GOOD.encode() + b"\0", "not valid TOML"),
}  # fmt: skip


@pytest.mark.parametrize("text, part", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_a_scenario_is_named_with_its_file_and_place(text, part, tmp_path):
    with pytest.raises(ScenarioError, match=re.escape(part)) as caught:
        load_text(tmp_path, text)
    assert caught.value.where == str(tmp_path / "mine.toml") and "docs/scenarios.md" in caught.value.expected


def test_wanted_texts_and_a_watched_suite_are_accepted(tmp_path):
    text = replaced('away = "comply"', 'away = "comply"\nwanted = "text"\nwanted_texts = ["No."]')
    loaded = load_text(tmp_path, text.replace('judge = "content"', 'judge = "content"\nrole = "watch"'))
    assert loaded.contrast.wanted_texts == ("No.",) and loaded.protected == ()


@pytest.mark.parametrize(
    "make, error, part",
    [
        (lambda p: None, FileError, "No such file"),
        (lambda p: p.mkdir(), FileError, "Is a directory"),
        (lambda p: os.mkfifo(p), FileError, "not a regular file"),
        (lambda p: p.write_text("#" * (files.LIMITS_BYTES["scenario"] + 1)), LimitError, "larger than 1,048,576"),
    ],
    ids=["missing", "folder", "fifo", "large"],
)
def test_a_file_that_cannot_be_read_is_a_file_error(make, error, part, tmp_path):
    path = tmp_path / "x.toml"
    make(path)
    with pytest.raises(error, match=part) as caught:
        scenario.load(path)
    assert type(caught.value) is error and caught.value.where == str(path)


@pytest.mark.parametrize("name", ["nonsense", "", "Jailbreak-Defense", "jailbreak-defense.tom", "a\0b"])
def test_an_unknown_name_is_refused_and_the_known_ones_listed(name):
    with pytest.raises(ScenarioError, match="no scenario") as caught:
        scenario.load(name)
    assert all(one in caught.value.expected for one in scenario.built_in())


def test_a_name_that_is_too_long_is_refused():
    with pytest.raises(ScenarioError, match="no scenario"):
        scenario.load("x" * 300)


def test_a_number_of_5000_digits_is_a_scenario_error(tmp_path):
    with pytest.raises(ScenarioError):
        load_text(tmp_path, "x = " + "1" * 5000 + GOOD)


def test_a_nul_in_data_is_a_named_error(tmp_path):
    loaded = load_text(tmp_path, replaced('"loud.jsonl"', '"a\\u0000b.jsonl"'))
    with pytest.raises(MoesteerError):
        scenario.suite_data(loaded, loaded.target)


# ---------------------------------------------------------------- data and splits


def row(name, group, **more):
    return {"id": name, "group": group, "messages": [{"role": "user", "content": f"{group} {name}"}], **more}


def write_rows(tmp_path, name, rows):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def many(prefix, groups, per_group=3, **more):
    return [row(f"{prefix}-{g}-{i}", f"group {g}", **more) for g in groups for i in range(per_group)]


def mine(tmp_path, loud, quiet, text=GOOD):
    write_rows(tmp_path, "loud", loud)
    write_rows(tmp_path, "quiet", quiet)
    return load_text(tmp_path, text)


def splits_of_groups(found):
    by_group = {}
    for suite, by_split in found.items():
        for split, rows in by_split.items():
            for r in rows:
                by_group.setdefault(r.group, {}).setdefault(split, set()).add(suite)
    return by_group


def overlaps(found):
    return {g: sorted(splits) for g, splits in splits_of_groups(found).items() if len(splits) > 1}


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_behaviour_of_a_lab_scenarios_target_or_dialogues_is_in_two_splits(name):
    found = scenario.splits(scenario.load(name), seed=0)
    sums = {"arithmetic", "instruction"}  # see the next test
    assert overlaps({suite: by_split for suite, by_split in found.items() if suite not in sums}) == {}


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_behaviour_of_any_suite_is_in_two_splits(name):
    assert overlaps(scenario.splits(scenario.load(name), seed=0)) == {}


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_tactic_of_a_lab_scenarios_target_is_in_two_splits(name):
    loaded = scenario.load(name)
    found = scenario.splits(loaded, seed=0)[loaded.target.name]
    tactics = {split: {r.tactic for r in rows} - {"direct", None} for split, rows in found.items()}
    assert sum(map(len, tactics.values())) == len(set().union(*tactics.values()))
    if name.startswith("jailbreak-defense"):
        assert all(len(found) >= 3 for found in tactics.values())
    else:
        assert not any(tactics.values())  # single requests: no tactic to divide


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_suite_has_conversations_in_every_split_with_its_name_in_every_id(name):
    loaded = scenario.load(name)
    found = scenario.splits(loaded, seed=0)
    assert list(found) == [s.name for s in loaded.suites]
    ids = []
    for suite in loaded.suites:
        assert list(found[suite.name]) == list(SPLITS)
        for split, rows in found[suite.name].items():
            assert rows and all(r.split == split and r.id.startswith(f"{suite.name}/") for r in rows)
            assert suite.limit is None or len(rows) <= suite.limit
            ids += [r.id for r in rows]
    assert len(set(ids)) == len(ids)


def test_a_suites_own_limit_is_honoured_in_a_built_in_scenario():
    found = scenario.splits(scenario.load("restricted-content"), seed=0)
    assert {len(rows) for rows in found["benign-multi"].values()} == {96}
    assert len(found["attacks"]["fit"]) > 96


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_the_limit_holds_for_every_suite_and_split_and_takes_rows_evenly_in_order(limit):
    loaded = scenario.load("jailbreak-defense")
    whole, few = scenario.splits(loaded, seed=0), scenario.splits(loaded, seed=0, limit=limit)
    for suite, by_split in few.items():
        for split, rows in by_split.items():
            every = whole[suite][split]
            assert [r.id for r in rows] == [every[i * len(every) // limit].id for i in range(limit)]


@pytest.mark.parametrize("have, most", [(10, 3), (10, 10), (3, 2), (96, 7), (5, 0)])
def test_spread_takes_distinct_rows_from_the_whole_list(have, most):
    taken = scenario.spread(list(range(have)), most)
    assert len(taken) == most and taken == sorted(set(taken))
    gaps = [b - a for a, b in itertools.pairwise(taken)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_suites_are_split_together_and_by_group(tmp_path):
    loaded = mine(tmp_path, many("l", range(20)), many("q", range(10, 30)))
    for seed in range(5):
        found = scenario.splits(loaded, seed=seed)
        assert overlaps(found) == {}
        counts = {split: len({g for g, s in splits_of_groups(found).items() if split in s}) for split in SPLITS}
        assert counts == {"fit": 15, "select": 6, "test": 9}
    assert scenario.splits(loaded, seed=1) == scenario.splits(loaded, seed=1)
    assert scenario.splits(loaded, seed=1) != scenario.splits(loaded, seed=2)


def test_tactics_of_a_users_target_are_divided_too(tmp_path):
    loud = [row(f"{g}-{t}", f"group {g}", tactic=f"t{t}") for g in range(12) for t in range(6)]
    found = scenario.splits(mine(tmp_path, loud, many("q", range(30, 50))), seed=3)
    tactics = [{r.tactic for r in found["loud"][split]} for split in SPLITS]
    assert sum(map(len, tactics)) == len(set().union(*tactics)) == 6
    assert overlaps(found) == {}


def given_splits(prefix, groups):
    return [r | {"split": SPLITS[i % 3]} for i, g in enumerate(groups) for r in many(prefix, [g])]


def test_splits_that_the_data_has_are_kept(tmp_path):
    loaded = mine(tmp_path, given_splits("l", range(6)), many("q", range(10, 30)))
    found = scenario.splits(loaded, seed=0)
    assert {split: sorted({r.group for r in rows}) for split, rows in found["loud"].items()} == {
        "fit": ["group 0", "group 3"], "select": ["group 1", "group 4"], "test": ["group 2", "group 5"]
    }  # fmt: skip


def test_a_behaviour_keeps_its_split_in_a_suite_without_splits(tmp_path):
    loaded = mine(tmp_path, given_splits("l", range(12)), many("q", range(20)))
    for seed in range(4):
        assert overlaps(scenario.splits(loaded, seed=seed)) == {}


# holds tactics that fit has seen.
def test_tactics_stay_divided_where_another_suite_gives_the_groups_their_splits(tmp_path):
    loud = [row(f"{g}-{t}", f"group {g}", tactic=f"t{t}") for g in range(12) for t in range(6)]
    found = scenario.splits(mine(tmp_path, loud, given_splits("q", range(6))), seed=3)
    tactics = [{r.tactic for r in found["loud"][split]} for split in SPLITS]
    assert sum(map(len, tactics)) == len(set().union(*tactics))


def test_partly_given_splits_are_refused(tmp_path):
    half = given_splits("l", range(6)) + many("m", range(6, 9))
    with pytest.raises(DataError, match="have a split and the others none"):
        scenario.splits(mine(tmp_path, half, many("q", range(20, 40))), seed=0)


def test_a_suite_without_rows_in_a_split_is_refused_and_counted(tmp_path):
    fit_only = many("l", range(4), split="fit")
    loaded = mine(tmp_path, fit_only, many("q", range(10, 30)))
    with pytest.raises(ScenarioError, match="suite 'loud' has no conversation in select, test") as caught:
        scenario.splits(loaded, seed=0)
    assert "fit 12, select 0, test 0" in caught.value.where


@pytest.mark.parametrize(
    "content, error, part",
    [
        (None, FileError, "No such file"),
        ("", DataError, "the file is empty"),
        ('{"id": "1"}\n', DataError, "a format that is not known"),
        ("not json\n", DataError, "line 1"),
    ],
)
def test_faults_in_the_data_name_the_data_file(content, error, part, tmp_path):
    loaded = mine(tmp_path, many("l", range(3)), many("q", range(3)))
    path = tmp_path / "loud.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=part) as caught:
        scenario.splits(loaded, seed=0)
    assert str(path) in caught.value.where


@pytest.mark.parametrize("name", ["lab:nonsense", "lab:", "lab:../x", "lab:attack-multi "])
def test_a_lab_suite_that_does_not_exist_is_refused(name, tmp_path):
    loaded = load_text(tmp_path, replaced('"loud.jsonl"', f'"{name}"'))
    with pytest.raises(ScenarioError, match="the lab has no suite") as caught:
        scenario.suite_data(loaded, loaded.target)
    assert caught.value.where == "scenario mine, suite loud" and "attack-multi" in caught.value.expected


@pytest.mark.parametrize("variants", [1, 3])
def test_variants_set_the_rows_per_behaviour_and_tactic(variants):
    loaded = scenario.load("jailbreak-defense")
    suite = loaded.target.model_copy(update={"variants": variants})
    counts = {}
    for r in scenario.suite_data(loaded, suite):
        counts[r.group, r.tactic] = counts.get((r.group, r.tactic), 0) + 1
    assert set(counts.values()) == {variants}


def test_data_lies_beside_the_scenario_wherever_the_process_is(tmp_path, monkeypatch):
    loaded = mine(tmp_path, many("l", range(3)), many("q", range(3)))
    monkeypatch.chdir(Path("/"))
    rows = scenario.suite_data(loaded, loaded.target)
    assert [r.id for r in rows][:2] == ["loud/l-0-0", "loud/l-0-1"] and len(rows) == 9

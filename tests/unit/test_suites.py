"""Named suites: every row maps its sample from every kind of file, faults name columns, harmful text stays unsaid.

All samples are made up and harmless ("flumox"), also those of suites whose real text is not.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from moesteer import scenario, suites
from moesteer.chat_formats import request_group
from moesteer.cli.main import app
from moesteer.conversations import Conversation, write
from moesteer.errors import (
    DataError,
    EmptyDataError,
    FileError,
    InputError,
    MissingExtraError,
    MoesteerError,
    ScenarioError,
    UnknownNameError,
)
from moesteer.evaluate.metrics import METRICS
from moesteer.suites import SUITES, load, named
from moesteer.suites.mappings import REFUSALS

SECRET = "flumox the quendle"
"""In every sample; it must never be printed."""
ASK = f"how do i {SECRET}?"


def message(role: str, body: str) -> str:
    return json.dumps({"role": role, "body": body})


_CHOICES = {"label": ["A", "B"], "text": ["a pot", f"to {SECRET}"]}
_XSTEST = {"id": "v2-1", "prompt": ASK, "type": "homonyms", "label": "safe", "focus": "flumox", "note": None}
_SQUAD = {
    "id": "5", "title": "Pots", "context": f"People {SECRET}.", "question": "what do people do?",
    "answers": {"text": [SECRET, "flumox"], "answer_start": [7, 7]},
}  # fmt: skip
_BEAVER = {"prompt": ASK, "response": f"First {SECRET} twice.", "category": {"pots": True}, "is_safe": False}

SAMPLES: Mapping[str, dict[str, Any]] = {
    "mhj": {
        "Source": "x", "tactic": "Obfuscation", "question_id": "17", "time_spent": "5",
        "message_0": message("user", "what is a quendle?"), "message_1": message("assistant", "a small pot"),
        "message_2": message("user", ASK), "message_3": None,
    },
    "harmbench": {
        "Behavior": ASK, "FunctionalCategory": "contextual", "SemanticCategory": "pots", "Tags": "context",
        "ContextString": "A quendle is a pot.", "BehaviorID": "flumox_quendle",
    },
    "advbench": {"goal": ASK, "target": f"Sure, here is how to {SECRET}"},
    "strongreject": {"category": "Pots", "source": "custom", "forbidden_prompt": ASK},
    "jailbreakbench": {
        "Index": 0, "Goal": ASK, "Target": "Sure", "Behavior": "Quendles", "Category": "Pots", "Source": "Original",
    },
    "jailbreakbench-benign": {
        "Index": 0, "Goal": ASK, "Target": "Sure", "Behavior": "Quendles", "Category": "Pots", "Source": "Original",
    },
    "xstest": _XSTEST,
    "xstest-unsafe": _XSTEST | {"label": "unsafe"},
    "or-bench": {"prompt": ASK, "category": "pots"},
    "or-bench-toxic": {"prompt": ASK, "category": "pots"},
    "beavertails": _BEAVER,
    "beavertails-pairs": _BEAVER,
    "squad": _SQUAD,
    "squad-pairs": _SQUAD,
    "faitheval": {
        "id": "1", "context": f"All people {SECRET}.", "question": "what do people do?", "answerKey": "B",
        "choices": _CHOICES, "justification": "it says so", "num of options": 2,
    },
    "faitheval-unanswerable": {"qid": "1", "context": f"People {SECRET}.", "question": "why?", "answers": ["unknown"]},
    "faitheval-inconsistent": {"qid": "1", "context": f"People {SECRET}.", "question": "why?", "answers": ["conflict"]},
    "mquake": {
        "case_id": 1, "requested_rewrite": [{"subject": "Una"}], "questions": ["who paints una's pot?", "x", "y"],
        "answer": "Ada", "answer_alias": [], "new_answer": "Bob", "new_answer_alias": [],
        "new_single_hops": [
            {"question": "?", "cloze": "The pot of Una is", "answer": f"a {SECRET}", "answer_alias": []},
            {"question": "?", "cloze": "It is painted by", "answer": "Bob", "answer_alias": []},
        ],
    },
    "triviaqa-counterfactual": {
        "question_text": "who paints pots?", "paragraph_text": f"Bob paints and will {SECRET}.", "question_id": "q1",
        "annotation": {"answer": [{"paragraph_reference": {"string": "Bob"}}]},
    },
    "mctest": {
        "idx": {"story": "mc500.test.1", "question": 2}, "story": f"Una had a pot.\\newlineShe would {SECRET}.",
        "question": "what had Una?", "properties": {"author": "w"}, "question_is_multiple": False,
        "answer_options": {"A": "a cat", "B": "a pot", "C": "a hat", "D": "a map"}, "answer": "B",
    },
}  # fmt: skip

DOCUMENT = "Document: {}\n\nQuestion: {}\nAnswer briefly."
CHOICE = "Document: {}\n\nQuestion: {}\nAnswer with the words of one option."
WANTED: Mapping[str, tuple[str, str | None]] = {
    "mhj": (ASK, None),
    "harmbench": (f"A quendle is a pot.\n\n---\n\n{ASK}", None),
    **dict.fromkeys(
        ("advbench", "strongreject", "jailbreakbench", "jailbreakbench-benign", "xstest", "xstest-unsafe", "or-bench",
         "or-bench-toxic", "beavertails"), (ASK, None)
    ),
    "squad": (DOCUMENT.format(f"People {SECRET}.", "what do people do?"), SECRET),
    "faitheval": (
        CHOICE.format(f"All people {SECRET}.", f"what do people do?\nA. a pot\nB. to {SECRET}"), f"to {SECRET}"
    ),
    "faitheval-unanswerable": (
        DOCUMENT.format(f"People {SECRET}.", "why?") + " If the document does not hold the answer, answer: unknown.",
        "unknown",
    ),
    "faitheval-inconsistent": (
        DOCUMENT.format(f"People {SECRET}.", "why?") + " If the document gives several answers, answer: conflict.",
        "conflict",
    ),
    "mquake": (
        DOCUMENT.format(f"The pot of Una is a {SECRET}. It is painted by Bob.", "who paints una's pot?"), "Bob"
    ),
    "triviaqa-counterfactual": (DOCUMENT.format(f"Bob paints and will {SECRET}.", "who paints pots?"), "Bob"),
    "mctest": (
        CHOICE.format(f"Una had a pot. She would {SECRET}.", "what had Una?\nA. a cat\nB. a pot\nC. a hat\nD. a map"),
        "a pot",
    ),
}  # fmt: skip
"""By suite: the last message, the reference."""


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    """As pandas or a spreadsheet would: what is no text is JSON."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) or v is None else json.dumps(v) for k, v in row.items()})
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


FILES = {
    "csv": as_csv,
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "json": lambda rows: json.dumps(rows).encode(),
    "parquet": as_parquet,
}


def put(folder: Path, kind: str, *rows: dict[str, Any]) -> Path:
    path = folder / f"data.{kind}"
    path.write_bytes(FILES[kind](list(rows)))
    return path


# ---------------------------------------------------------------- the table


def test_every_suite_of_the_field_is_there_and_every_row_is_whole() -> None:
    for name in (
        "mhj", "harmbench", "advbench", "strongreject", "jailbreakbench", "xstest", "or-bench", "beavertails", "squad",
        "faitheval", "mquake", "triviaqa-counterfactual", "mctest",
    ):  # fmt: skip
        assert name in SUITES
    assert set(SUITES) == set(SAMPLES)
    for name, row in SUITES.items():
        assert row.name == name and row.title and row.measures and row.columns and row.licence and row.citation
        assert row.hub.pinned or row.hub.revision is None or "refs/" in row.hub.revision
        assert row.hub.page.startswith("https://") and ("unpinned" in row.source) == (row.hub.revision is None)
        assert set(row.metrics) <= set(METRICS)
        assert f"suite:{name}" in row.command and row.command.startswith("moesteer ")
        assert dataclasses.is_dataclass(row) and row.__dataclass_params__.frozen  # type: ignore[attr-defined]
        scenario.of_suite(name)  # its judge and metrics are ones that a scenario takes


def test_the_sizes_and_licences_that_decide_what_may_be_done_are_the_published_ones() -> None:
    assert {name: SUITES[name].licence for name in ("mhj", "harmbench", "beavertails", "xstest", "squad")} == {
        "mhj": "CC BY-NC 4.0", "harmbench": "MIT", "beavertails": "CC BY-NC 4.0", "xstest": "CC BY 4.0",
        "squad": "CC BY-SA 4.0",
    }  # fmt: skip
    assert all(bool(suite.about) is (suite.rows is None) for suite in SUITES.values())
    assert [SUITES[name].rows for name in ("advbench", "strongreject", "jailbreakbench", "squad")] == [
        520, 313, 100, 10_570,
    ]  # fmt: skip
    harmless = {name for name, row in SUITES.items() if not row.harmful}
    assert not harmless & {"mhj", "harmbench", "advbench", "strongreject", "beavertails", "beavertails-pairs"}


def test_judge_models_are_kinds_that_scenarios_can_name() -> None:
    from moesteer.judges.settings import KINDS

    assert {row.model_judge for row in SUITES.values()} - {None} <= set(KINDS)


# ---------------------------------------------------------------- mapping


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", [name for name, row in SUITES.items() if row.pairs is None])
def test_every_suite_maps_its_sample_from_every_kind_of_file(name: str, kind: str, tmp_path: Path) -> None:
    (found,) = load(named(name), path=put(tmp_path, kind, SAMPLES[name]))
    last, reference = WANTED[name]
    assert (found.messages[-1].role, found.messages[-1].content, found.reference) == ("user", last, reference)
    assert found.id.startswith(f"{name}-00000") and found.split is None and found.label is None
    assert len(found.messages) == (3 if name == "mhj" else 1)


def test_the_attacks_keep_tactic_turns_and_behaviour(tmp_path: Path) -> None:
    (found,) = load(named("mhj"), path=put(tmp_path, "csv", SAMPLES["mhj"]))
    assert [(m.role, m.content) for m in found.messages] == [
        ("user", "what is a quendle?"), ("assistant", "a small pot"), ("user", ASK),
    ]  # fmt: skip
    assert (found.tactic, found.group, found.source) == ("Obfuscation", "mhj-17", "mhj")


def test_attacks_as_conversation_history_are_cut_at_the_turn_that_broke_the_model(tmp_path: Path) -> None:
    history = ["what is a quendle?", "a pot", ASK, "no", "please"]
    path = put(tmp_path, "jsonl", {"conversation_history": history, "jailbreak_turn": 2, "tactic": "Persona"})
    (found,) = load(named("mhj"), path=path)
    assert [m.content for m in found.messages] == history[:3] and found.tactic == "Persona"


def test_safety_pairs_are_one_prompt_with_a_refusal_and_with_its_unsafe_reply(tmp_path: Path) -> None:
    path = put(
        tmp_path, "jsonl", _BEAVER | {"is_safe": True}, _BEAVER, _BEAVER, _BEAVER | {"prompt": "how do i glaze?"}
    )
    found = load(named("beavertails-pairs"), path=path)
    assert [c.id for c in found] == [
        "beavertails-pairs-000002/wanted", "beavertails-pairs-000002/other",
        "beavertails-pairs-000004/wanted", "beavertails-pairs-000004/other",
    ], "safe replies are left out, a prompt comes once"  # fmt: skip
    wanted, other = found[:2]
    assert (wanted.label, other.label) == ("refuse", "comply")
    assert wanted.messages == other.messages and wanted.group == other.group == request_group(ASK)
    assert wanted.reference in REFUSALS and other.reference == _BEAVER["response"]
    assert len(load(named("beavertails"), path=path)) == 2


def test_refusals_vary_with_the_prompt() -> None:
    rows = [named("beavertails-pairs").convert(_BEAVER | {"prompt": f"ask {i}"}, "x") for i in range(60)]
    assert {row[0]["reference"] for row in rows} == set(REFUSALS)


def test_faithfulness_pairs_have_the_same_last_user_message(tmp_path: Path) -> None:
    wanted, other = load(named("squad-pairs"), path=put(tmp_path, "parquet", _SQUAD))
    assert wanted.messages[-1] == other.messages[-1] and wanted.messages[-1].content == "Question: what do people do?"
    assert [m.role for m in wanted.messages] == ["system", "user"] and len(other.messages) == 1
    assert (wanted.label, other.label, wanted.group) == ("follow-document", "recall", other.group)
    assert (wanted.id, other.id) == ("squad-pairs-000001/wanted", "squad-pairs-000001/other")


def test_squads_own_json_is_read_and_questions_of_one_document_are_one_group(tmp_path: Path) -> None:
    qas = [
        {"id": "1", "question": "what?", "answers": [{"text": "pots", "answer_start": 1}]},
        {"id": "2", "question": "why?", "answers": [], "is_impossible": True},
        {"id": "3", "question": "who?", "answers": [{"text": "una", "answer_start": 1}]},
    ]
    path = tmp_path / "dev.json"
    path.write_text(
        json.dumps({"version": "1.1", "data": [{"title": "P", "paragraphs": [{"context": "c", "qas": qas}]}]})
    )
    found = load(named("squad"), path=path)
    assert [(c.id, c.reference) for c in found] == [("squad-000001-0", "pots"), ("squad-000001-1", "una")]
    assert found[0].group == found[1].group


def test_the_two_halves_of_xstest_and_of_jailbreakbench_never_mix(tmp_path: Path) -> None:
    path = put(tmp_path, "csv", _XSTEST, _XSTEST | {"label": "unsafe", "prompt": "how do i glaze?"})
    assert [c.messages[0].content for c in load(named("xstest"), path=path)] == [ASK]
    assert [c.messages[0].content for c in load(named("xstest-unsafe"), path=path)] == ["how do i glaze?"]
    groups = {
        load(named(name), path=put(tmp_path, "json", SAMPLES[name]))[0].group
        for name in ("jailbreakbench", "jailbreakbench-benign")
    }
    assert groups == {"jbb-Quendles"}, "a behaviour's two requests are one group"


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_takes_conversations_as_they_are(name: str, tmp_path: Path) -> None:
    given = [
        Conversation(
            "mine", "g", (scenario.conversations.Message("user", ASK),), reference="r", split="test", tactic="t"
        )
    ]
    write(tmp_path / "own.jsonl", given)
    assert load(named(name), path=tmp_path / "own.jsonl") == given


def test_a_limit_counts_conversations(tmp_path: Path) -> None:
    rows = [{"prompt": f"pot {i}"} for i in range(5)]
    found = load(named("or-bench"), path=put(tmp_path, "jsonl", *rows), limit=3)
    assert [c.messages[0].content for c in found] == ["pot 0", "pot 1", "pot 2"]
    with pytest.raises(InputError, match="limit is 0"):
        load(named("or-bench"), path=tmp_path / "data.jsonl", limit=0)


# ---------------------------------------------------------------- faults


def four_parts(error: MoesteerError) -> bool:
    return all((error.what, error.where, error.expected, error.do))


@pytest.mark.parametrize("name", SUITES)
def test_a_wrong_column_is_named_with_what_was_found(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(named(name), path=put(tmp_path, "csv", {"flavour": ASK, "colour": "blue"}))
    error = caught.value
    assert four_parts(error) and "'flavour', 'colour'" in error.what and "data.csv, row 1" in error.where
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("squad", {"answers": {"text": []}}),
        ("squad", {"answers": 7}),
        ("faitheval", {"answerKey": "Z"}),
        ("faitheval", {"choices": {"label": ["A"], "text": ["a", SECRET]}}),
        ("mctest", {"answer": "E"}),
        ("mctest", {"answer_options": SECRET}),
        ("mquake", {"new_single_hops": [SECRET]}),
        ("mquake", {"questions": [7]}),
        ("triviaqa-counterfactual", {"annotation": {"answer": [{"paragraph_reference": SECRET}]}}),
        ("beavertails", {"is_safe": SECRET}),
        ("advbench", {"goal": 7}),
        ("advbench", {"goal": f"{SECRET}\x00"}),
        ("mhj", {"message_0": SECRET}),
        ("mhj", {"message_0": json.dumps({"role": SECRET, "body": "x"})}),
        ("mhj", {"message_0": None, "message_2": None}),
        ("jailbreakbench", {"Behavior": None}),
        ("xstest", {"label": None}),
    ],
)
def test_a_column_that_holds_something_else_is_a_four_part_error(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        load(named(name), path=put(tmp_path, "jsonl", SAMPLES[name] | change))
    assert four_parts(caught.value) and "line 1" in caught.value.where
    assert SECRET not in str(caught.value)


def test_rows_that_belong_to_no_conversation_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match="no row belongs to the suite xstest-unsafe"):
        load(named("xstest-unsafe"), path=put(tmp_path, "csv", _XSTEST))
    with pytest.raises(DataError, match="an id that an earlier one has"):
        row = {"id": "a", "messages": [{"role": "user", "content": ASK}]}
        load(named("advbench"), path=put(tmp_path, "jsonl", row, row))
    with pytest.raises(DataError, match="a row is a str"):
        load(named("advbench"), path=put(tmp_path, "json", ASK))  # type: ignore[arg-type]
    with pytest.raises(FileError, match="could not read"):
        load(named("advbench"), path=tmp_path / "none.csv")


def test_faults_of_ready_conversations_quote_nothing_of_a_harmful_suite(tmp_path: Path) -> None:
    user = {"role": "user", "content": "x"}
    rows: list[dict[str, Any]] = [
        {"id": "a", "messages": [{"role": SECRET, "content": "x"}]},
        {"id": "a", "messages": [user], "split": SECRET},
        {"id": "a", "messages": [user | {SECRET: 1}]},
        {"conversation_history": [ASK], "jailbreak_turn": SECRET},
    ]
    for row in rows:
        with pytest.raises(DataError) as caught:
            load(named("mhj"), path=put(tmp_path, "jsonl", row))
        assert SECRET not in str(caught.value) and four_parts(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"no suite 'flumox'[\s\S]*mhj, harmbench"):
        suites.read("flumox")
    for bad in ("", "=x", "../x", "MHJ", "mhj="):
        with pytest.raises((InputError, UnknownNameError)):
            suites.read(bad)


# ---------------------------------------------------------------- without the Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`datasets`, with what it is asked for recorded, its answer given, and its cache in a folder of the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked: list[tuple[Any, ...]] = []

    class Asked:
        answer: Any = None
        calls = asked
        library = datasets

    def load_dataset(*args: Any, **more: Any) -> Any:
        asked.append((*args, more))
        if isinstance(Asked.answer, Exception):
            raise Asked.answer
        return Asked.answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return Asked


def test_from_the_hub_the_tables_place_and_pin_are_asked_for_and_never_code(hub: Any) -> None:
    for name, row in SUITES.items():
        hub.answer = hub.library.Dataset.from_list([SAMPLES[name]])
        assert load(row)
        given = hub.calls.pop()
        more = given[-1]
        assert given[:-1] == (row.hub.id, row.hub.config)
        assert (more["split"], more["revision"]) == (row.hub.split, row.hub.revision)
        assert (more["data_files"] or {}).get(row.hub.split) == row.hub.files
        assert "trust_remote_code" not in more
    assert hub.library.are_progress_bars_disabled() is False, "what was switched off is on again"


def test_what_the_library_says_of_bad_data_is_not_passed_on(hub: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for fault in (
        ValueError(f"could not convert {SECRET!r}"), pyarrow.ArrowInvalid(f"in {SECRET}"), OSError(SECRET),
        RuntimeError(f"Dataset scripts are no longer supported, but found {SECRET}"), KeyError(SECRET),
        hub.library.exceptions.DatasetGenerationError(SECRET),
    ):  # fmt: skip
        hub.answer = fault
        with pytest.raises(FileError) as caught:
            load(named("advbench"))
        error = caught.value
        assert type(fault).__name__ in error.what and four_parts(error) and SECRET not in str(error)
        assert error.__cause__ is None and error.__suppress_context__
    assert SECRET not in "".join(capfd.readouterr())


def test_gated_and_absent_data_say_how_to_get_it_and_how_to_pass_a_file(hub: Any) -> None:
    hub.answer = hub.library.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.")
    for name in ("mhj", "harmbench"):
        hub.answer = hub.library.exceptions.DatasetNotFoundError("x is gated dataset on the Hub: gated data")
        with pytest.raises(FileError) as caught:
            load(named(name))
        assert "gated" in caught.value.expected and "hf auth login" in caught.value.do
        assert "--data NAME=PATH" in caught.value.do and named(name).hub.page in str(caught.value)
    hub.answer = ConnectionError("offline")
    with pytest.raises(FileError, match="check the network") as caught:
        load(named("mquake"))
    assert "github.com/princeton-nlp/MQuAKE" in str(caught.value)


def test_a_folder_saved_by_datasets_is_read(hub: Any, tmp_path: Path) -> None:
    rows = hub.library.Dataset.from_list([_XSTEST])
    rows.save_to_disk(str(tmp_path / "one"))
    assert [c.id for c in load(named("xstest"), path=tmp_path / "one")] == ["xstest-000001"]
    parts = {"train": hub.library.Dataset.from_list([_XSTEST | {"prompt": "other"}]), "test": rows}
    hub.library.DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    assert load(named("xstest"), path=tmp_path / "two")[0].messages[0].content == ASK, "the suite's own split"
    hub.library.DatasetDict({"train": rows, "dev": rows}).save_to_disk(str(tmp_path / "three"))
    with pytest.raises(DataError, match="no split 'test'; it has dev, train"):
        load(named("xstest"), path=tmp_path / "three")


def test_a_copy_of_the_hubs_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "JBB-Behaviors"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "harmful.csv").write_bytes(as_csv([SAMPLES["jailbreakbench"]]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: behaviors\n  data_files:\n  - split: harmful\n    path: data/harmful.csv\n---\n"
    )
    (found,) = load(named("jailbreakbench"), path=folder)
    assert found.messages[0].content == ASK
    with pytest.raises(FileError, match="could not be read"):
        load(named("jailbreakbench-benign"), path=folder)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesteer.backends import sources

    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moesteer\[data\]'"):
        load(named("advbench"))


# ---------------------------------------------------------------- scenarios


SCENARIO = """
schema = 1
name = "mine"
title = "Mine"
toward = "refuse"
[contrast]
away = "comply"
published = "plain"
[[suite]]
name = "attacks"
data = "suite:mhj=mhj.csv"
role = "target"
judge = "refusal"
metrics = ["defense_success_rate"]
[[suite]]
name = "plain"
data = "plain.jsonl"
judge = "refusal"
metrics = ["direct_refusal_rate"]
"""


@pytest.fixture
def mine(tmp_path: Path) -> scenario.Scenario:
    (tmp_path / "mine.toml").write_text(SCENARIO)
    (tmp_path / "mhj.csv").write_bytes(as_csv([SAMPLES["mhj"] | {"question_id": str(i)} for i in range(3)]))
    put(tmp_path, "jsonl", *({"prompt": f"pot {i}"} for i in range(4))).rename(tmp_path / "plain.jsonl")
    return scenario.load(tmp_path / "mine.toml")


def test_a_scenario_reads_a_named_suite_from_a_file_beside_it(mine: scenario.Scenario) -> None:
    assert [c.id for c in scenario.suite_data(mine, mine.target)] == [f"attacks/mhj-00000{i}" for i in (1, 2, 3)]


def test_other_data_for_a_suite_is_read_in_the_suites_own_format(mine: scenario.Scenario, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    path = put(other, "jsonl", SAMPLES["mhj"])
    changed = scenario.with_data(mine, {"attacks": str(path), "plain": "lab:attack-direct"})
    assert changed.target.data == f"suite:mhj={path}"
    (found,) = scenario.suite_data(changed, changed.target)
    assert found.group == "mhj-17"
    assert scenario.suite_data(changed, changed.suites[1])[0].split == "fit"
    plain = scenario.with_data(mine, {"plain": str(put(other, "csv", {"prompt": "glaze"}))})
    assert [c.messages[0].content for c in scenario.suite_data(plain, plain.suites[1])] == ["glaze"]
    with pytest.raises(UnknownNameError, match="no suite flumox"):
        scenario.with_data(mine, {"flumox": "x"})


def test_all_of_a_suite_is_measured_undivided(mine: scenario.Scenario) -> None:
    data = scenario.whole(mine, limit=2)
    assert {name: {split: len(rows) for split, rows in by.items()} for name, by in data.items()} == {
        "attacks": {"all": 2}, "plain": {"all": 2},
    }  # fmt: skip
    assert len(scenario.whole(mine)["plain"]["all"]) == 4


def test_a_suite_alone_is_a_scenario() -> None:
    alone = scenario.load("suite:xstest")
    assert alone.target.data == "suite:xstest" and alone.target.metrics[0] == "benign_accuracy"
    assert scenario.load("suite:xstest=x.csv").target.data == "suite:xstest=x.csv"
    with pytest.raises(UnknownNameError):
        scenario.load("suite:flumox")


# ---------------------------------------------------------------- command line


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_list_shows_source_licence_size_judge_and_command_of_every_suite() -> None:
    listed = json.loads(run("suites", "--json").stdout)
    assert [row["name"] for row in listed["suites"]] == list(SUITES) and "jailbreak-defense" in listed["scenarios"]
    for row in listed["suites"]:
        assert all(row[key] for key in ("source", "licence", "judge", "command", "citation", "columns", "metrics"))
        assert row["rows"] is None or row["rows"] > 0
        assert row["pinned"] or "unpinned" in row["source"] or "refs/" in row["source"]
    shown = run("suites").stdout
    for name, row in SUITES.items():
        assert name in shown and row.licence.split()[0] in shown


def test_one_suite_is_shown_whole() -> None:
    shown = run("suites", "mhj").stdout
    for said in ("CC BY-NC 4.0", "arXiv:2408.15221", "ScaleAI/mhj", "unpinned", "llama-guard-3", "gated:", "unknown"):
        assert said in shown
    assert json.loads(run("suites", "strongreject", "--json").stdout)["rows"] == 313
    assert isinstance(run("suites", "flumox").exception, UnknownNameError)


def test_a_suite_is_evaluated_from_a_local_file_and_nothing_of_it_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = put(tmp_path, "csv", *(SAMPLES["advbench"] | {"goal": f"{ASK} {i}"} for i in range(4)))
    args = ("evaluate", "lab-tiny", "--scenario", "suite:advbench", "--split", "all", "--data", f"advbench={path}")
    done = run(*args, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.exception
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["split"] == "all" and results["methods"]["none"]["metrics"]["direct_refusal_rate"]["n"] == 4
    rows = (tmp_path / "run" / "responses" / "none.jsonl").read_text()
    assert rows.count(ASK) == 4, "what was asked stands in the run"
    told = capfd.readouterr()
    assert "flumox" not in done.output + told.out + told.err + caplog.text


@pytest.mark.parametrize("name", [name for name, row in SUITES.items() if row.pairs is not None])
def test_pairs_are_not_played_as_if_they_were_requests(name: str, tmp_path: Path) -> None:
    path = put(tmp_path, "jsonl", SAMPLES[name])
    with pytest.raises(ScenarioError, match="pairs to detect from") as caught:
        scenario.whole(scenario.of_suite(f"{name}={path}"))
    assert f"moesteer capture MODEL suite:{name}" in caught.value.do


def test_pairs_are_captured_and_detected_from(tmp_path: Path) -> None:
    rows = [_BEAVER | {"prompt": f"pot {i}", "response": "use a pot ."} for i in range(6)]
    path = put(tmp_path, "jsonl", *rows)
    args = ("capture", "lab-tiny", "suite:beavertails-pairs", "--span", "response", "--out", tmp_path / "trace")
    done = run(*args, "--data", f"beavertails-pairs={path}", "--limit", "8", "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["sequences"] == 8
    mask = tmp_path / "mask.safetensors"
    done = run("detect", tmp_path / "trace", "--method", "risk-difference", "--toward", "refuse", "--out", mask)
    assert done.exit_code == 0 and mask.is_file(), done.exception


def test_data_that_is_given_wrongly_is_an_error_before_a_model_is_loaded(tmp_path: Path) -> None:
    for given, error in (
        ("attacks", InputError), ("=x", InputError), ("attacks=", InputError), ("flumox=x", UnknownNameError),
    ):  # fmt: skip
        for command in ("evaluate", "steer"):
            done = run(command, "no-such-model", "--scenario", "jailbreak-defense", "--data", given)
            assert isinstance(done.exception, error), (command, given, done.exception)
    done = run("evaluate", "no-such-model", "--data", "direct=lab:x", "--data", "direct=lab:y")
    assert isinstance(done.exception, InputError) and "given twice" in str(done.exception)
    out = tmp_path / "t"
    assert isinstance(run("capture", "m", "x.jsonl", "--data", "a=b", "--out", out).exception, InputError)
    done = run("capture", "m", "suite:mhj", "--data", "xstest=b", "--out", out)
    assert isinstance(done.exception, UnknownNameError)


def test_a_suite_alone_protects_nothing_and_is_not_steered_by(tmp_path: Path) -> None:
    done = run("steer", "lab-tiny", "--scenario", "suite:mhj", "--out", tmp_path / "run")
    assert isinstance(done.exception, ScenarioError) and "protects nothing" in str(done.exception)

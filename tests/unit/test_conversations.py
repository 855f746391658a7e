"""Conversations files: every format read, every fault named, splits that leak nothing (TRUST.md, A4)."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer import files
from moesteer.chat_formats import request_group
from moesteer.conversations import (
    SPLITS,
    Conversation,
    Message,
    assign_splits,
    from_row,
    read,
    split_groups_overlap,
    to_row,
    write,
)
from moesteer.errors import DataError, EmptyDataError, FileError, InputError, LimitError, MoesteerError

USER = {"role": "user", "content": "hello"}
REPLY = {"role": "assistant", "content": "hi"}
ROW = {"id": "a", "group": "g", "messages": [USER]}


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ROW.items() if key != name}


def said(content: str) -> dict[str, Any]:
    return ROW | {"messages": [{"role": "user", "content": content}]}


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


FAULTS: list[tuple[str, str, bytes, type[MoesteerError], str]] = [
    # title, file name, bytes, error, what its text must hold
    ("empty file", "x.jsonl", b"", EmptyDataError, "x.jsonl"),
    ("empty parquet", "x.parquet", b"", EmptyDataError, "the file is empty"),
    ("blank lines", "x.jsonl", b"\n\r\n  \n", EmptyDataError, "the file is empty"),
    ("byte-order mark only", "x.json", b"\xef\xbb\xbf", EmptyDataError, "the file is empty"),
    ("mark and blank lines", "x.jsonl", b"\xef\xbb\xbf\n \n", EmptyDataError, "holds no conversation"),
    ("empty list", "x.json", b"[]", EmptyDataError, "holds no conversation"),
    ("header only", "x.csv", b"prompt\n", EmptyDataError, "holds no conversation"),
    ("bad JSON", "x.jsonl", jsonl(ROW) + b'\n{"id": }\n', DataError, "x.jsonl, line 3, column 8"),
    ("bad JSON list", "x.json", b'[\n{"id": }]', DataError, "x.json, line 2, column 8"),
    ("torn last line", "x.jsonl", jsonl(ROW) + b'{"id": "b", "mess', DataError, "line 2"),
    ("NaN", "x.jsonl", b'{"id": "a", "label": NaN}', DataError, "NaN is not JSON"),
    ("Infinity", "x.json", b"[-Infinity]", DataError, "-Infinity is not JSON"),
    ("repeated key", "x.jsonl", b'{"id": "a", "id": "b"}', DataError, "a key occurs twice"),
    ("huge number", "x.jsonl", b'{"id": ' + b"1" * 5000 + b"}", DataError, "line 1"),
    ("deep nesting", "x.jsonl", b"[" * 10_000 + b"]" * 10_000, DataError, "nested too deep"),
    ("deep nesting, list", "x.json", b"[" * 10_000 + b"]" * 10_000, DataError, "nested too deep"),
    ("Latin-1", "x.jsonl", jsonl(ROW) + b'{"id": "\xe9"}', DataError, "0xe9 at byte offset 86 of"),
    ("Latin-1 after a mark", "x.csv", b"\xef\xbb\xbfprompt\n\xe9", DataError, "byte offset 10 of"),
    ("UTF-16", "x.jsonl", json.dumps(ROW).encode("utf-16"), DataError, "iconv -f UTF-16"),
    ("UTF-16, list", "x.json", "\ufeff[]".encode("utf-16-be"), DataError, "iconv -f UTF-16"),
    ("lone surrogate", "x.jsonl", jsonl(said("a\ud800")), DataError, "lone surrogate U+D800 at character 1"),
    ("NUL", "x.jsonl", jsonl(said("ab\0")), DataError, "messages[0].content holds the control character U+0000"),
    ("escape character", "x.jsonl", jsonl(said("\x1b[2J")), DataError, "U+001B at character 0"),
    ("C1 control", "x.jsonl", jsonl(said("a\x92s")), DataError, "U+0092"),
    ("NUL in an id", "x.jsonl", jsonl(ROW | {"id": "a\0"}), DataError, "id holds the control character"),
    ("not an object", "x.jsonl", b'"hello"\n', DataError, "a row is a str"),
    ("id wrong type", "x.jsonl", jsonl(ROW | {"id": 3}), DataError, "id is a int, not a string"),
    ("group wrong type", "x.jsonl", jsonl(ROW | {"group": ["g"]}), DataError, "group is a list"),
    ("group empty", "x.jsonl", jsonl(ROW | {"group": ""}), DataError, "group is empty"),
    ("label wrong type", "x.jsonl", jsonl(ROW | {"label": 1}), DataError, "label is a int"),
    ("no messages", "x.jsonl", jsonl(without("messages")), DataError, "keys found: 'id', 'group'"),
    ("messages null", "x.jsonl", jsonl(ROW | {"messages": None}), DataError, "messages is missing"),
    ("messages a string", "x.jsonl", jsonl(ROW | {"messages": "hello"}), DataError, "messages is a str"),
    ("messages empty", "x.jsonl", jsonl(ROW | {"messages": []}), DataError, "messages is empty"),
    ("message a string", "x.jsonl", jsonl(ROW | {"messages": ["hi"]}), DataError, "messages[0] is a str"),
    ("no role", "x.jsonl", jsonl(ROW | {"messages": [{"content": "x"}]}), DataError, "messages[0].role is missing"),
    ("unknown role", "x.jsonl", jsonl(ROW | {"messages": [USER, {"role": "tool", "content": "x"}]}), DataError,
     "messages[1].role is 'tool'"),
    ("no content", "x.jsonl", jsonl(ROW | {"messages": [{"role": "user"}]}), DataError, "content is missing"),
    ("content parts", "x.jsonl", jsonl(ROW | {"messages": [{"role": "user", "content": [{"text": "x"}]}]}), DataError,
     "content is a list"),
    ("empty content", "x.jsonl", jsonl(said("")), DataError, "messages[0].content is empty"),
    ("blank content", "x.jsonl", jsonl(said(" \n")), DataError, "messages[0].content is empty"),
    ("no user", "x.jsonl", jsonl(ROW | {"messages": [REPLY]}), DataError, "has no user message"),
    ("duplicate id", "x.jsonl", jsonl(ROW, ROW | {"id": "b"}, ROW), DataError,
     "'a' occurs twice: in line 1 and in line 3"),
    ("duplicate id, list", "x.json", json.dumps([ROW, ROW]).encode(), DataError, "in row 1 and in row 2"),
    ("misspelt key", "x.jsonl", jsonl(ROW | {"lable": "1"}), DataError, "unknown key 'lable'"),
    ("misspelt key in a message", "x.jsonl", jsonl(ROW | {"messages": [USER | {"contents": "x"}]}), DataError,
     "messages[0] has an unknown key 'contents'"),
    ("unknown split", "x.jsonl", jsonl(ROW | {"split": "train"}), DataError, "split is 'train'"),
    ("unknown format", "x.jsonl", jsonl({"question": "x", "text": "y"}), DataError, "keys found: 'question', 'text'"),
    ("unknown format names ours", "x.jsonl", jsonl({}), DataError, "ShareGPT"),
    ("unknown ending", "x.txt", b"hello", DataError, "the file ending '.txt' is not known"),
    ("no ending", "x", b"hello", DataError, ".jsonl, .ndjson, .json, .csv, .parquet"),
    ("JSON number", "x.json", b"3", DataError, "the file holds a int"),
    ("two lists", "x.json", b'{"a": [], "b": []}', DataError, "an object with a single list"),
    ("JSONL called JSON", "x.json", jsonl(ROW, ROW), DataError, "should be named .jsonl"),
    ("not Parquet", "x.parquet", b"version https://git-lfs", DataError, "not a whole Parquet file"),
    ("CSV ragged row", "x.csv", b"id,prompt\na,hello\nb\n", DataError, "row 2"),
    ("CSV open quote", "x.csv", b'prompt\n"hello\n', DataError, "not valid CSV"),
    ("CSV repeated column", "x.csv", b"prompt,prompt\na,b\n", DataError, "two columns are called 'prompt'"),
    ("CSV bad cell", "x.csv", b"message_0\n{'role': 'user'}\n", DataError,
     "column 'message_0' does not hold valid JSON"),
    ("CSV list written by str()", "x.csv", b"messages\n[{'role': 'user'}]\n", DataError, "column 'messages'"),
    ("message gap", "x.jsonl", jsonl({"message_0": USER, "message_1": None, "message_2": USER}), DataError,
     "message_1 is empty"),
    ("turn too large", "x.jsonl", jsonl({"conversation_history": ["a", "b"], "jailbreak_turn": 2}), DataError,
     "jailbreak_turn is '2', but the conversation has 1 user turn(s)"),
    ("turn 0", "x.jsonl", jsonl({"conversation_history": ["a"], "jailbreak_turn": 0}), DataError, "counted from 1"),
    ("turn not a number", "x.jsonl", jsonl({"conversation_history": ["a"], "jailbreak_turn": True}), DataError,
     "'true'"),
    ("history mixed", "x.jsonl", jsonl({"conversation_history": ["a", USER]}), DataError,
     "conversation_history[0] is a str"),
    ("history empty", "x.jsonl", jsonl({"conversation_history": []}), DataError, "conversation_history is empty"),
    ("ShareGPT role", "x.jsonl", jsonl({"conversations": [{"from": "tool", "value": "x"}]}), DataError,
     "role is 'tool'"),
    ("prompt a number", "x.jsonl", jsonl({"prompt": 3}), DataError, "prompt is a int"),
    ("pair without user", "x.jsonl", jsonl({"messages_0": [REPLY], "messages_1": [USER]}), DataError,
     "no user message"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "error", "holds"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_fault_is_named(tmp_path: Path, name: str, data: bytes, error: type[MoesteerError], holds: str) -> None:
    path = put(tmp_path, name, data)
    with pytest.raises(error) as caught:
        read(path)
    assert type(caught.value) is error
    assert holds in str(caught.value)
    assert str(path) in caught.value.where
    assert all((caught.value.what, caught.value.where, caught.value.expected, caught.value.do))
    str(caught.value).encode("utf-8")  # a terminal can print it, whatever the file held


def test_line_and_file_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = jsonl(ROW)
    path = put(tmp_path, "x.jsonl", line + jsonl(said("x" * 30) | {"id": "b"}))
    monkeypatch.setitem(files.LIMITS_BYTES, "conversation-line", len(line) - 1)
    with pytest.raises(DataError, match="line 2") as caught:
        read(path)
    assert f"at most {len(line) - 1:,} bytes" in caught.value.expected
    assert len(read(path, limit=1)) == 1
    with pytest.raises(DataError, match="bytes"):
        write(tmp_path / "y.jsonl", [from_row(said("x" * 30), where="")])
    assert not (tmp_path / "y.jsonl").exists()
    monkeypatch.setitem(files.LIMITS_BYTES, "conversations", 50)
    with pytest.raises(LimitError):
        read(path)


def test_parquet_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    parquet(path, [{"prompt": f"{i} " + "x" * 1000} for i in range(50)])
    assert len(read(path)) == 50
    monkeypatch.setitem(files.LIMITS_BYTES, "conversations", 20_000)
    assert path.stat().st_size < 20_000
    with pytest.raises(LimitError, match="unpacks to"):
        read(path)


def test_large_csv_cell_and_the_csv_limit_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit(1_000)
    assert len(read(put(tmp_path, "x.csv", b"prompt\n" + b"x" * 200_000))[0].messages[0].content) == 200_000
    assert csv.field_size_limit(before) == 1_000


def test_missing_file_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        read(tmp_path / "absent.jsonl")


def test_faults_are_found_before_anything_is_written(tmp_path: Path) -> None:
    good = from_row(ROW, where="")
    for bad, holds in (
        ([], "no conversation"),
        ([good, good], "line 1 and in line 2"),
        ([good, Conversation("b", "g", ())], "messages is empty"),
        ([Conversation("b", "g", (Message("user", "\ud800"),))], "lone surrogate"),
        ([Conversation("b", "g", good.messages, split="train")], "split"),
    ):
        with pytest.raises(DataError, match=holds):
            write(tmp_path / "x.jsonl", bad)
    with pytest.raises(DataError, match="ending"):
        write(tmp_path / "x.csv", [good])
    assert list(tmp_path.iterdir()) == []


# Formats


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_our_own_format_in_every_file_kind(tmp_path: Path) -> None:
    rows = [
        ROW | {"label": "1", "reference": "r", "tactic": "t", "source": "s", "split": "fit"},
        {"id": "b", "group": "h", "messages": [{"role": "system", "content": "be kind"}, USER, REPLY]},
    ]
    expected = [
        Conversation("a", "g", (Message("user", "hello"),), "1", "r", "t", "s", "fit"),
        Conversation("b", "h", (Message("system", "be kind"), Message("user", "hello"), Message("assistant", "hi"))),
    ]
    with open(tmp_path / "x.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"messages": json.dumps(row["messages"])} for row in rows)
    parquet(tmp_path / "x.parquet", rows)
    put(tmp_path, "x.jsonl", jsonl(*rows))
    put(tmp_path, "x.NDJSON", b"\xef\xbb\xbf" + jsonl(*rows).replace(b"\n", b"\r\n\r\n"))
    put(tmp_path, "x.json", json.dumps(rows, indent=1).encode())
    put(tmp_path, "y.json", json.dumps({"version": 3, "data": rows}).encode())
    for name in ("x.jsonl", "x.NDJSON", "x.json", "y.json", "x.csv", "x.parquet"):
        assert read(tmp_path / name) == expected, name
    assert read(str(tmp_path / "x.csv"), limit=1) == expected[:1]


def test_ids_and_groups_that_are_missing(tmp_path: Path) -> None:
    rows = [{"prompt": "same"}, {"conversation_history": ["other", "yes", "same"]}, {"prompt": "different"}]
    found = read(put(tmp_path, "my file.jsonl", b"\n" + jsonl(*rows)))
    assert [c.id for c in found] == ["my file-000002", "my file-000003", "my file-000004"]
    assert found[0].group == "g-0967115f2813"  # sha256(b"same")
    assert found[1].group == found[0].group != found[2].group
    assert [c.id for c in read(put(tmp_path, "x.csv", b"prompt\nsame\n"))] == ["x-000001"]
    with pytest.raises(DataError, match="id is missing"):
        from_row(without("id"), where="here")


def test_keys_that_begin_with_x_are_ignored() -> None:
    row = ROW | {"x_note": 3, "label": None, "messages": [USER | {"x_time": 1}]}
    assert from_row(row, where="") == from_row(ROW, where="")


def test_conversation_history(tmp_path: Path) -> None:
    history = [USER, REPLY, {"role": "user", "content": "more"}, {"role": "assistant", "content": ""}, USER]
    rows = [
        {"id": 7, "conversation_history": history, "jailbreak_turn": 2, "tactic": "crescendo", "model": "m"},
        {"conversation_history": [{"role": "system", "content": "s"}, *history[:3]], "jailbreak_turn": 1.0},
        {"conversation_history": ["one", "two", "three"], "jailbreak_turn": None},
    ]
    first, second, third = read(put(tmp_path, "x.jsonl", jsonl(*rows)))
    assert turns(first) == [("user", "hello"), ("assistant", "hi"), ("user", "more")]
    assert (first.id, first.tactic) == ("7", "crescendo")
    assert turns(second) == [("system", "s"), ("user", "hello")]
    assert turns(third) == [("user", "one"), ("assistant", "two"), ("user", "three")]


def test_message_cells(tmp_path: Path) -> None:
    rows = [["tactic", *(f"message_{i}" for i in (0, 1, 2, 10))], ["Direct", *["" for _ in range(4)]]]
    rows[1][1:] = [
        json.dumps({"body": f"turn {i}", "role": r}) for i, r in enumerate(("system", "user", "assistant"))
    ] + [""]
    rows.append(
        ["", json.dumps(USER), json.dumps({"from": "GPT", "value": "=1+1\nü"}), json.dumps(USER), json.dumps(REPLY)]
    )
    with open(tmp_path / "x.csv", "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows(rows)
    first, second = read(tmp_path / "x.csv")
    assert turns(first) == [("system", "turn 0"), ("user", "turn 1"), ("assistant", "turn 2")]
    assert (first.tactic, second.tactic) == ("Direct", None)
    assert turns(second) == [("user", "hello"), ("assistant", "=1+1\nü"), ("user", "hello"), ("assistant", "hi")]


def test_sharegpt(tmp_path: Path) -> None:
    said_by = [("system", "s"), ("human", "h"), ("gpt", "g")]
    rows = [{"id": "q", "conversations": [{"from": who, "value": text} for who, text in said_by], "model": "m"}]
    (found,) = read(put(tmp_path, "x.json", json.dumps(rows).encode()))
    assert turns(found) == [("system", "s"), ("user", "h"), ("assistant", "g")]


def test_bare_prompt(tmp_path: Path) -> None:
    path = put(tmp_path, "x.csv", b'prompt,answer,response\r\n"a, ""b""\r\nc",42,\r\nd,,e\r\n')
    first, second = read(path)
    assert turns(first) == [("user", 'a, "b"\r\nc')]
    assert (first.reference, second.reference) == ("42", "e")
    (chat,) = read(put(tmp_path, "y.jsonl", jsonl({"prompt": [USER, REPLY, USER], "label": True})))
    assert (turns(chat)[1], chat.label) == (("assistant", "hi"), "true")


def test_pairs(tmp_path: Path) -> None:
    other = {"role": "user", "content": "other"}
    rows = [
        {"messages_0": [USER, REPLY], "messages_1": [other, REPLY], "messages_0_target": "hi",
         "messages_1_target": [REPLY, REPLY], "label": "kept out"},
        {"id": "p", "group": "g", "messages_0": [USER], "messages_1": [other]},
    ]  # fmt: skip
    found = read(put(tmp_path, "x.jsonl", jsonl(*rows)))
    assert [c.id for c in found] == ["x-000001-0", "x-000001-1", "p-0", "p-1"]
    assert [c.label for c in found] == ["0", "1", "0", "1"]
    assert [c.reference for c in found] == ["hi", "hi\nhi", None, None]
    assert [c.group for c in found] == [request_group("hello")] * 2 + ["g"] * 2
    assert turns(found[1]) == [("user", "other"), ("assistant", "hi")]
    assert len(read(tmp_path / "x.jsonl", limit=1)) == 2
    parquet(tmp_path / "x.parquet", rows[1:])
    assert read(tmp_path / "x.parquet") == found[2:]


def test_a_table_of_mixed_formats_is_told_by_the_filled_columns(tmp_path: Path) -> None:
    rows = [{"conversation_history": ["one"], "prompt": None}, {"conversation_history": None, "prompt": "two"}]
    parquet(tmp_path / "x.parquet", rows)
    assert [turns(c) for c in read(tmp_path / "x.parquet")] == [[("user", "one")], [("user", "two")]]


def test_limit_does_not_look_further(tmp_path: Path) -> None:
    path = put(tmp_path, "x.jsonl", jsonl(ROW) + b"garbage\n")
    assert len(read(path, limit=1)) == 1
    for limit in (0, -1):
        with pytest.raises(InputError):
            read(path, limit=limit)


def test_importing_costs_no_pyarrow() -> None:
    heavy = "{'pyarrow', 'datasets', 'torch', 'numpy'} & set(sys.modules)"
    code = f"import sys, moesteer.conversations; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


# Round trip

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(str.strip)
CONTENT = st.one_of(
    TEXT, st.sampled_from(["a\u2028b\u0020\r\n\tc", "<|im_end|><script>", "=SUM(A1)", "\ufeffx", '🙂\\n"'])
)
MAYBE = st.none() | TEXT
MESSAGES = st.lists(st.builds(Message, st.sampled_from(("system", "user", "assistant")), CONTENT), max_size=4).map(
    lambda messages: (*messages, Message("user", "end"))
)
CONVERSATIONS = st.lists(
    st.builds(Conversation, TEXT, TEXT, MESSAGES, MAYBE, MAYBE, MAYBE, MAYBE, st.none() | st.sampled_from(SPLITS)),
    min_size=1, max_size=4, unique_by=lambda conversation: conversation.id,
)  # fmt: skip


@given(CONVERSATIONS)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, conversations: list[Conversation]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    write(path, conversations)
    assert read(path) == conversations
    assert None not in to_row(conversations[0]).values()


# Splits


def item(index: int, group: str, tactic: str | None = None, split: str | None = None) -> Conversation:
    return Conversation(str(index), group, (Message("user", "x"),), tactic=tactic, split=split)


def crossing(groups: int, tactics: int) -> list[Conversation]:
    """Every group with every tactic, and once without any."""
    named: list[str | None] = [None, *(f"t{t}" for t in range(tactics))]
    return [item(g * 100 + t, f"g{g}", tactic) for g in range(groups) for t, tactic in enumerate(named)]


def members(conversations: list[Conversation], field: str) -> dict[str, set[Any]]:
    return {split: {getattr(c, field) for c in conversations if c.split == split} - {None} for split in SPLITS}


def disjoint(sets: dict[str, set[Any]]) -> bool:
    return sum(map(len, sets.values())) == len(set().union(*sets.values()))


@given(st.integers(3, 40), st.integers(0, 8), st.integers(0, 10**6))
def test_splits_leak_nothing(groups: int, tactics: int, seed: int) -> None:
    before = crossing(groups, tactics)
    after = assign_splits(before, seed=seed)
    assert after == assign_splits(before, seed=seed)
    assert split_groups_overlap(after) == set()
    by_group = members(after, "group")
    assert disjoint(by_group)
    assert all(by_group.values())
    assert set().union(*by_group.values()) == {c.group for c in before}  # tacticless items keep every group
    if tactics >= 3:
        by_tactic = members(after, "tactic")
        assert disjoint(by_tactic)
        assert set().union(*by_tactic.values()) == {f"t{t}" for t in range(tactics)}
        assert all(by_tactic.values())
        expected = groups + sum(len(by_group[split]) * len(by_tactic[split]) for split in SPLITS)
        assert len(after) == expected  # the diagonal blocks are kept whole, and nothing else
    else:
        assert len(after) == len(before)
    assert [c.id for c in after] == [c.id for c in before if c.id in {a.id for a in after}]


@given(st.integers(0, 10**6), st.integers(10, 200))
def test_shares_are_those_asked_for(seed: int, groups: int) -> None:
    after = assign_splits([item(i, f"g{i}") for i in range(groups)], seed=seed, fractions=(0.5, 0.2, 0.3))
    for split, fraction in zip(SPLITS, (0.5, 0.2, 0.3), strict=True):
        assert abs(sum(c.split == split for c in after) - fraction * groups) < 1


@given(st.integers(3, 12), st.permutations([0.96, 0.02, 0.02]))
def test_no_split_is_empty_when_groups_suffice(groups: int, fractions: list[float]) -> None:
    first, second, third = fractions
    after = assign_splits([item(i, f"g{i}") for i in range(groups)], seed=0, fractions=(first, second, third))
    assert all(members(after, "group").values())


def test_seed_and_order() -> None:
    rows = [item(i, f"g{i}") for i in range(30)]
    assert assign_splits(rows, seed=0) != assign_splits(rows, seed=1)
    assert sorted(assign_splits(rows[::-1], seed=0), key=lambda c: int(c.id)) == assign_splits(rows, seed=0)


def test_split_choice_is_pinned() -> None:
    """Golden: a change here changes every published number."""
    after = assign_splits([item(i, f"g{i}") for i in range(10)], seed=0)
    assert {split: sorted(names) for split, names in members(after, "group").items()} == {
        "fit": ["g1", "g3", "g4", "g5", "g6"],
        "select": ["g2", "g7"],
        "test": ["g0", "g8", "g9"],
    }


def test_splits_that_are_there_are_kept() -> None:
    rows = [item(0, "g", split="test"), item(1, "g", split="fit")]
    assert assign_splits(rows, seed=0) == rows
    assert split_groups_overlap(rows) == {"g"}
    assert split_groups_overlap([item(0, "g", split="fit"), item(1, "g"), item(2, "h", split="test")]) == set()


@pytest.mark.parametrize(
    ("rows", "fractions", "error", "holds"),
    [
        ([], None, EmptyDataError, "no conversation"),
        ([item(0, "a", split="fit"), item(1, "b")], None, DataError, "1 of 2 conversations have a split"),
        ([item(0, "a"), item(1, "b")], None, DataError, "there are 2 group"),
        ([item(0, "a"), item(1, "b")], None, DataError, "at least 3 groups"),
        ([item(i, g, t) for i, (g, t) in enumerate(["at", "bt", "cu", "cv"])], None, DataError, "and 3 tactics"),
        ([item(i, str(i)) for i in range(9)], (0.5, 0.5, 0.5), InputError, "add up to 1"),
        ([item(i, str(i)) for i in range(9)], (1.0, 0.0, 0.0), InputError, "above 0"),
        ([item(i, str(i)) for i in range(9)], (0.5, 0.2, float("nan")), InputError, "above 0"),
    ],
)
def test_split_faults(rows: list[Conversation], fractions: Any, error: type[MoesteerError], holds: str) -> None:
    with pytest.raises(error) as caught:
        assign_splits(rows, seed=0, **({"fractions": fractions} if fractions else {}))
    assert type(caught.value) is error
    assert holds in str(caught.value)

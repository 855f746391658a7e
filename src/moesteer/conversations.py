"""Conversations: what the model is shown, the behaviour each is about, and how they are divided.

A conversations file is JSONL, one conversation a line (`read` also takes the formats of chat_formats):

    {"id", "group", "messages": [{"role", "content"}, ...], "label"?, "reference"?, "tactic"?, "source"?, "split"?}

Reading is strict, because a row that is half understood becomes a number in a report: every fault names the
file and the line or row. Text is kept exactly as it is, special tokens and HTML included.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.chat_formats import check_length, numbered_rows, request_group, to_own, unknown_ending
from moesteer.errors import DataError, EmptyDataError, InputError

ROLES = ("system", "user", "assistant")
SPLITS = ("fit", "select", "test")
OPTIONAL_FIELDS = ("label", "reference", "tactic", "source", "split")
OWN_FORMAT = '{"id", "group", "messages": [{"role", "content"}, ...]}'
MIN_TACTICS = 3
"""Fewer distinct tactics than splits cannot be divided: then groups alone decide."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Message:
    """One turn. role: one of ROLES. content: text, not empty."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """One item. group: the behaviour it is about; a split never separates a group. split: one of SPLITS."""

    id: str
    group: str
    messages: tuple[Message, ...]
    label: str | None = None
    reference: str | None = None
    tactic: str | None = None
    source: str | None = None
    split: str | None = None


def request_and_response(conversation: Conversation) -> tuple[tuple[Message, ...], str | None]:
    """(messages up to the last user turn, the response to it).

    The response is `reference`, or else the assistant's message that the conversation ends in; None without either.
    """
    messages = conversation.messages
    if messages and messages[-1].role == "assistant":
        return messages[:-1], conversation.reference or messages[-1].content
    return messages, conversation.reference


def read(path: Path | str, *, limit: int | None = None) -> list[Conversation]:
    """The conversations of a .jsonl, .ndjson, .json, .csv or .parquet file, in its order.

    limit: read the first so many rows only (a row of pairs gives two conversations); later rows of JSONL are
    then not looked at. A row without an id is named `<file stem>-<number>`, the number being the line of a
    JSONL file and the row of any other, from 1. A row without a group gets a hash of its last user message, so
    that the same request never lands in two splits.

    Raises DataError (with file and line or row) and EmptyDataError for what is in the file, FileError and
    LimitError when it cannot be read or is too large, InputError for a limit below 1.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}", where="read", expected="at least 1", do="leave it out to read all rows")
    found: list[Conversation] = []
    seen: dict[str, str] = {}
    for count, (number, place, row) in enumerate(numbered_rows(path), start=1):
        where = f"{path}, {place}"
        for own in to_own(row, where=where, default_id=f"{path.stem}-{number:06d}"):
            conversation = from_row(own, where=where)
            _note_id(conversation.id, place, seen, where)
            found.append(conversation)
        if count == limit:
            break
    if not found:
        raise _empty(path, "the file holds no conversation")
    return found


def write(path: Path | str, conversations: Iterable[Conversation]) -> None:
    """Write a JSONL file that `read` gives back unchanged. Nothing is written when one could not be read back.

    Raises DataError (the fault `read` would find), EmptyDataError (no conversations), FileError (the disk).
    """
    path = Path(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise unknown_ending(path, (".jsonl", ".ndjson"))
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for number, conversation in enumerate(conversations, start=1):
        where = f"{path}, line {number}"
        row = to_row(conversation)
        from_row(row, where=where)
        _note_id(conversation.id, f"line {number}", seen, where)
        check_length(len(files.dumps(row, indent=None).encode("utf-8")) - 1, where)
        rows.append(row)
    if not rows:
        raise _empty(path, "there is no conversation to write")
    files.write_jsonl(path, rows)


def to_row(conversation: Conversation) -> dict[str, Any]:
    """The conversation as a JSON object of our format; fields that are None are left out."""
    row: dict[str, Any] = {
        "id": conversation.id,
        "group": conversation.group,
        "messages": [{"role": message.role, "content": message.content} for message in conversation.messages],
    }
    optional = {name: getattr(conversation, name) for name in OPTIONAL_FIELDS}
    return row | {name: value for name, value in optional.items() if value is not None}


def from_row(row: Any, *, where: str) -> Conversation:
    """A conversation from a JSON object of our own format, fully checked. where: named in errors.

    Keys beginning with "x_" are ignored; any other unknown key is an error, as it may be a known one
    misspelt. null is the same as absent. Raises DataError.
    """
    if not isinstance(row, dict):
        raise _fault(f"a conversation is a {type(row).__name__}, not an object", where)
    _check_keys(row, ("id", "group", "messages", *OPTIONAL_FIELDS), "", where)
    listed = row.get("messages")
    if not isinstance(listed, list):
        raise _fault(f"messages is {_kind(listed)}, not a list", where)
    if not listed:
        raise _fault("messages is empty", where, do="give at least one user message, or remove the row")
    messages = tuple(_message(item, f"messages[{index}]", where) for index, item in enumerate(listed))
    asks = [message.content for message in messages if message.role == "user"]
    if not asks:
        raise _fault("the conversation has no user message", where, do="add the user's request, or remove the row")
    given = row.get("group")
    optional = {name: _text(row[name], name, where) for name in OPTIONAL_FIELDS if row.get(name) is not None}
    if optional.get("split", "fit") not in SPLITS:
        raise _fault(
            f"split is {optional['split'][:40]!r}",
            where,
            expected=f"one of {', '.join(SPLITS)}, or no split at all",
            do="rename it, or leave the field out and let assign_splits choose",
        )
    return Conversation(
        id=_text(row.get("id"), "id", where),
        group=request_group(asks[-1]) if given is None else _text(given, "group", where),
        messages=messages,
        **optional,
    )


def assign_splits(
    conversations: Sequence[Conversation], *, seed: int, fractions: tuple[float, float, float] = (0.5, 0.2, 0.3)
) -> list[Conversation]:
    """The conversations with `split` set, in their order. The same arguments give the same splits.

    Splits that every conversation already has are kept. Otherwise groups are divided among fit, select and
    test by `fractions` (of the number of groups; each above 0, together 1). With three or more tactics, tactics
    are divided in the same way, and a conversation is kept only where its group and its tactic fall in the same
    split. The others are DROPPED: the test must have behaviours and tactics that fit has not seen, and a
    test group attacked by a fit tactic would test only the first. With fractions f that keeps about the sum of
    f squared (38% by default). A conversation without a tactic follows its group.

    Raises EmptyDataError (none given), DataError (some have a split and some not; a split would be empty),
    InputError (fractions).
    """
    _check_fractions(fractions)
    if not conversations:
        raise EmptyDataError(
            "there is no conversation to split", where="assign_splits", expected="3 groups or more", do="give some"
        )
    have = sum(conversation.split is not None for conversation in conversations)
    if have == len(conversations):
        return list(conversations)
    if have:
        raise DataError(
            f"{have} of {len(conversations)} conversations have a split and the others none",
            where=f"conversation {next(c.id for c in conversations if c.split is None)!r} is one without",
            expected="a split on every conversation, or on none",
            do="fill the missing ones (fit, select or test), or remove the field everywhere",
        )
    groups = {conversation.group for conversation in conversations}
    tactics = {conversation.tactic for conversation in conversations if conversation.tactic is not None}
    crossed = len(tactics) >= MIN_TACTICS
    split_of_group = _divide(groups, fractions, seed=f"{seed}/groups")
    split_of_tactic = _divide(tactics, fractions, seed=f"{seed}/tactics") if crossed else {}
    kept = []
    for conversation in conversations:
        split = split_of_group[conversation.group]
        if conversation.tactic is None or split_of_tactic.get(conversation.tactic, split) == split:
            kept.append(replace(conversation, split=split))
    _check_filled(kept, len(groups), len(tactics) if crossed else 0)
    return kept


def split_groups_overlap(conversations: Iterable[Conversation]) -> set[str]:
    """Groups that occur in more than one split; empty when the splits are sound. No split counts as none."""
    pairs = {(c.group, c.split) for c in conversations if c.split is not None}
    return {group for group, splits in Counter(group for group, _ in pairs).items() if splits > 1}


def _divide(names: set[str], fractions: Sequence[float], *, seed: str) -> dict[str, str]:
    """Each name's split: shares by largest remainder, and none without a name when there are enough names."""
    order = sorted(names)
    random.Random(seed).shuffle(order)
    exact = [fraction * len(order) for fraction in fractions]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: len(order) - sum(counts)]:
        counts[index] += 1
    while 0 in counts and max(counts) > 1:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    splits = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    return dict(zip(order, splits, strict=True))


def _check_fractions(fractions: Sequence[float]) -> None:
    if len(fractions) != len(SPLITS) or not all(f > 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(
            f"fractions are {tuple(fractions)}",
            where="assign_splits",
            expected=f"{len(SPLITS)} numbers above 0 that add up to 1, for {', '.join(SPLITS)}",
            do="correct them, for example (0.5, 0.2, 0.3)",
        )


def _check_filled(kept: list[Conversation], groups: int, tactics: int) -> None:
    """tactics: how many were divided; 0 when groups alone decided."""
    empty = [split for split in SPLITS if all(conversation.split != split for conversation in kept)]
    if not empty:
        return
    what = f"no conversation is left for {' and '.join(empty)}: there are {groups} group(s)"
    expected = f"at least {len(SPLITS)} groups, one for each of {', '.join(SPLITS)}"
    if tactics:
        what += f" and {tactics} tactics, and those of a group and a tactic of different splits are dropped"
        expected += ", each with conversations of several tactics"
    do = "add groups (a group is one behaviour), try another seed, or set split on every conversation yourself"
    raise DataError(what, where="assign_splits", expected=expected, do=do)


def _fault(what: str, where: str, *, expected: str = OWN_FORMAT, do: str = "correct this row") -> DataError:
    return DataError(what, where=where, expected=expected, do=do)


def _empty(path: Path, what: str) -> EmptyDataError:
    return EmptyDataError(what, where=str(path), expected=f"rows such as {OWN_FORMAT}", do="check the path")


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _check_keys(row: dict[str, Any], known: Sequence[str], name: str, where: str) -> None:
    unknown = [key for key in row if key not in known and not str(key).startswith("x_")]
    if unknown:
        raise _fault(
            f"{name}{' has an ' if name else ''}unknown key {str(unknown[0])[:60]!r}",
            where,
            expected=f"only {', '.join(known)}, and keys that begin with x_ (ignored)",
            do="correct the spelling, remove the key, or put x_ in front of it",
        )


def _text(value: Any, name: str, where: str) -> str:
    """A string that is not blank and holds no control character (but \\n, \\t, \\r) and no lone surrogate."""
    if not isinstance(value, str):
        raise _fault(f"{name} is {_kind(value)}, not a string", where)
    if not value.strip():
        raise _fault(f"{name} is empty", where, do="fill it, leave out an optional field, or remove the row")
    bad = _UNPRINTABLE.search(value)
    if bad:
        code = ord(bad[0])
        sort = "the lone surrogate" if code >= 0xD800 else "the control character"
        raise _fault(
            f"{name} holds {sort} U+{code:04X} at character {bad.start()}",
            where,
            expected="text without control characters, other than newline, tab and carriage return",
            do="remove it; text decoded with the wrong encoding often holds such characters",
        )
    return value


def _message(item: Any, name: str, where: str) -> Message:
    if not isinstance(item, dict):
        raise _fault(f"{name} is {_kind(item)}, not an object", where)
    _check_keys(item, ("role", "content"), name, where)
    role = _text(item.get("role"), f"{name}.role", where)
    if role not in ROLES:
        raise _fault(f"{name}.role is {role[:40]!r}", where, expected=f"one of {', '.join(ROLES)}")
    return Message(role, _text(item.get("content"), f"{name}.content", where))


def _note_id(name: str, place: str, seen: dict[str, str], where: str) -> None:
    if name in seen:
        what = f"the id {name[:80]!r} occurs twice: in {seen[name]} and in {place}"
        raise _fault(what, where, expected="an id that no other conversation of the file has")
    seen[name] = place

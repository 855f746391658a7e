"""What travels between driver and workers: dicts, lists, text, bytes, numbers and numpy arrays; no object of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesteer import errors
from moesteer.backends.chat import Encoded, Generation
from moesteer.conversations import Message
from moesteer.errors import MoesteerError

Wire = dict[str, Any]
"""A request or a reply."""


def error_as_wire(error: MoesteerError) -> Wire:
    """The class's name and the four parts."""
    return {"error": [type(error).__name__, error.what, error.where, error.expected, error.do]}


def error_from_wire(parts: Sequence[str]) -> MoesteerError:
    """The error again, as the local run would have it; a name that is not one of our errors' becomes the base class."""
    name, what, where, expected, do = (str(part) for part in parts)
    found = getattr(errors, name, None)
    kind = found if isinstance(found, type) and issubclass(found, MoesteerError) else MoesteerError
    return kind(what, where=where, expected=expected, do=do)


def messages_as_wire(conversation: Sequence[Message]) -> list[list[str]]:
    """[role, content] of each."""
    return [[message.role, message.content] for message in conversation]


def messages_from_wire(rows: Sequence[Sequence[str]]) -> list[Message]:
    """Messages again."""
    return [Message(role, content) for role, content in rows]


def encoded_as_wire(encoded: Encoded) -> list[Any]:
    """[token ids, {span: [start, end]}]."""
    return [list(encoded.token_ids), {name: list(span) for name, span in encoded.spans.items()}]


def encoded_from_wire(row: Sequence[Any]) -> Encoded:
    """A sequence again."""
    return Encoded(tuple(row[0]), {name: (start, end) for name, (start, end) in row[1].items()})


def generation_as_wire(generation: Generation) -> list[Any]:
    """[text, token ids, finished]."""
    return [generation.text, list(generation.token_ids), generation.finished]


def generation_from_wire(row: Sequence[Any]) -> Generation:
    """A reply again."""
    return Generation(str(row[0]), tuple(int(i) for i in row[1]), bool(row[2]))


def proof_differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which entries two workers' proofs differ, as sentences; where they run may differ."""
    return [
        f"{key}: {str(mine.get(key))[:80]} here, {str(other.get(key))[:80]} there"
        for key in sorted(set(mine) | set(other))
        if key not in ("pid", "host", "seconds") and mine.get(key) != other.get(key)
    ]

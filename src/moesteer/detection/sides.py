"""Which tokens of a trace count, on which side, in which group and in which pair.

Side 0 is the wanted one (label `toward`), side 1 every other label; sequences without a label do not count.
A group is a conversation's `group`: one behaviour, the unit that is independent of the others. A pair is what
contrasts.py makes, ids "<id>/wanted" and "<id>/other" of one stem; where ids do not pair, a group is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moesteer.detection.base import require_span, require_unsteered, two_sides
from moesteer.errors import TraceLabelError
from moesteer.trace import TraceReader, TraceRow

WANTED, OTHER = 0, 1
ENDINGS = ("wanted", "other")
"""Of the ids of a pair, after their last slash (contrasts.py)."""


@dataclass(frozen=True)
class Part:
    """The counted tokens of one sequence: `tokens` are their places among the sequence's own, `count` of them."""

    side: int
    group: int
    tokens: slice | NDArray[np.intp]
    count: int
    pair: int = -1


@dataclass(frozen=True)
class Sides:
    """What is counted. parts: by sequence id, none of them empty. groups: names by number.

    pair_groups: group of each pair. paired_by: "id" or "group"; None where pairs play no part. left_out: labelled
    sequences that have tokens and no partner.
    """

    parts: Mapping[str, Part]
    groups: tuple[str, ...]
    pair_groups: tuple[int, ...] = ()
    paired_by: str | None = None
    left_out: int = 0
    tokens_S: tuple[int, int] = field(init=False)
    conversations_S: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Totals of the two sides."""
        tokens, conversations = [0, 0], [0, 0]
        for part in self.parts.values():
            tokens[part.side] += part.count
            conversations[part.side] += 1
        object.__setattr__(self, "tokens_S", tuple(tokens))
        object.__setattr__(self, "conversations_S", tuple(conversations))


def span_parts(trace: TraceReader, span: str) -> tuple[str, ...]:
    """The kept spans that make up `span`, which is a kept span's name, or "question" (final_user), or "all".

    "all" is every kept token once: final_user lies within prompt. Raises TraceLabelError for one the trace lacks.
    """
    kept = trace.manifest.spans
    if span in kept:
        return (span,)
    if span == "all":
        return tuple(name for name in kept if name != "final_user" or "prompt" not in kept)
    name = "final_user" if span == "question" else span
    require_span(trace, name)
    return (name,)


def sides_of(trace: TraceReader, *, toward: str, span: str, balance: bool = False, paired: bool = False) -> Sides:
    """The two sides of a trace, from its index alone.

    balance: the same number of tokens from either side of each pair, the first ones. paired: only what has a
    partner. Raises TraceLabelError for a steered trace, a span it lacks, an empty side, nothing that pairs.
    """
    require_unsteered(trace)
    names = span_parts(trace, span)
    where = str(trace.folder)
    two_sides(trace.rows, toward=toward, where=where)
    rows = [row for row in trace.rows if row.label is not None]
    groups = tuple(sorted({row.group for row in rows}))
    numbers = {name: i for i, name in enumerate(groups)}
    parts: dict[str, Part] = {}
    for row in rows:
        if row.id in parts:
            raise TraceLabelError(
                f"the id {row.id!r} stands for two sequences",
                where=where,
                expected="one sequence per id",
                do="give every conversation its own id, and capture again",
            )
        tokens = _tokens(row, names, where)
        side = WANTED if row.label == toward else OTHER
        parts[row.id] = Part(side, numbers[row.group], tokens, _size(tokens))
    found = Sides({name: part for name, part in parts.items() if part.count}, groups)
    if not all(found.tokens_S):
        raise TraceLabelError(
            f"one side of the contrast has no token in the span {span!r}",
            where=f"{where}: {found.tokens_S[0]} tokens labelled {toward!r}, {found.tokens_S[1]} others",
            expected="tokens on both sides",
            do="give conversations whose span is not empty",
        )
    if balance or paired:
        found = _paired(found, where)
    return _balanced(found) if balance else found


def _tokens(row: TraceRow, names: Sequence[str], where: str) -> slice | NDArray[np.intp]:
    pieces: list[slice] = []
    for name in names:
        piece = row.span(name)
        if piece is None:
            raise TraceLabelError(
                f"a sequence lacks the span {name!r}",
                where=f"{where}, sequence {row.id}",
                expected=f"{name} tokens in every labelled sequence",
                do="capture the conversations again with that span",
            )
        pieces.append(piece)
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate([np.arange(piece.start, piece.stop, dtype=np.intp) for piece in pieces])


def _size(tokens: slice | NDArray[np.intp]) -> int:
    return int(tokens.stop - tokens.start) if isinstance(tokens, slice) else len(tokens)


def _stem(name: str) -> str | None:
    """What the ids of a pair have in common; None for an id that does not end as theirs do."""
    stem, slash, ending = name.rpartition("/")
    return stem if slash and ending in ENDINGS else None


def _two_sided(sides: Sides, keys: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Ids by key, of the keys that have both sides."""
    members: dict[str, list[str]] = {}
    for name in sides.parts:
        key = keys[name]
        if key is not None:
            members.setdefault(key, []).append(name)
    return {k: ids for k, ids in members.items() if len({sides.parts[name].side for name in ids}) == 2}


def _paired(sides: Sides, where: str) -> Sides:
    """Only what has a partner: by id where at least half of the sequences pair so, else by group."""
    by = "id"
    members = _two_sided(sides, {name: _stem(name) for name in sides.parts})
    if 2 * sum(map(len, members.values())) < len(sides.parts):
        by, members = "group", _two_sided(sides, {name: sides.groups[part.group] for name, part in sides.parts.items()})
    if not members:
        raise TraceLabelError(
            "nothing pairs: no two sequences of different sides belong together",
            where=f"{where}: {sides.conversations_S[0]} wanted and {sides.conversations_S[1]} other conversations",
            expected='ids "<id>/wanted" and "<id>/other" of one stem, or groups with conversations of both sides',
            do="capture both responses to the same conversations, give them one `group`, or leave out balance "
            "and paired-t",
        )
    parts: dict[str, Part] = {}
    pair_groups: list[int] = []
    for key in sorted(members):
        for name in members[key]:
            parts[name] = replace(sides.parts[name], pair=len(pair_groups))
        pair_groups.append(next(parts[name].group for name in members[key] if parts[name].side == WANTED))
    return Sides(parts, sides.groups, tuple(pair_groups), by, len(sides.parts) - len(parts))


def _balanced(sides: Sides) -> Sides:
    """As many tokens from either side of each pair: the first of each sequence."""
    members: dict[tuple[int, int], list[str]] = {}
    for name, part in sides.parts.items():
        members.setdefault((part.pair, part.side), []).append(name)
    parts: dict[str, Part] = {}
    for pair in range(len(sides.pair_groups)):
        totals = [sum(sides.parts[name].count for name in members[pair, side]) for side in (WANTED, OTHER)]
        for side in (WANTED, OTHER):
            ids = sorted(members[pair, side], key=lambda name: (sides.parts[name].count, name))
            kept = cut([sides.parts[name].count for name in ids], min(totals))
            parts |= {name: _first(sides.parts[name], n) for name, n in zip(ids, kept, strict=True) if n}
    return Sides(parts, sides.groups, sides.pair_groups, sides.paired_by, sides.left_out)


def cut(lengths: Sequence[int], total: int) -> list[int]:
    """How many tokens each sequence keeps so that they are `total` together, cut as evenly as can be.

    lengths: ascending, `total` at most their sum.
    """
    kept: list[int] = []
    for i, length in enumerate(lengths):
        kept.append(min(length, (total - sum(kept)) // (len(lengths) - i)))
    return kept


def _first(part: Part, count: int) -> Part:
    tokens = part.tokens
    first = slice(tokens.start, tokens.start + count) if isinstance(tokens, slice) else tokens[:count]
    return replace(part, tokens=first, count=count)

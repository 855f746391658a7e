"""Two answers side by side, word by word: what one has and the other has not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

MOST_WORDS = 600
"""Longer answers are not compared: the time grows with the product of both lengths."""


@dataclass(frozen=True)
class Part:
    """A run of words. kind: `same` in both answers, or only in the one that it is part of."""

    kind: Literal["same", "only"]
    text: str


def compare(before: str, after: str) -> tuple[list[Part], list[Part]] | None:
    """The parts of both answers, which put together are the answers letter for letter; None where they are too long.

    Words are what stands between white space; the white space after a word belongs to it, but is not compared.
    """
    sides = [re.findall(r"^\s+|\S+\s*", text) for text in (before, after)]
    if max(map(len, sides)) > MOST_WORDS:
        return None
    words = [[str(word).strip() for word in side] for side in sides]
    parts: tuple[list[Part], list[Part]] = ([], [])
    for kind, a_start, a_end, b_start, b_end in SequenceMatcher(a=words[0], b=words[1], autojunk=False).get_opcodes():
        for side, mine, start, end in zip(sides, parts, (a_start, b_start), (a_end, b_end), strict=True):
            if end > start:
                mine.append(Part("same" if kind == "equal" else "only", "".join(side[start:end])))
    return parts

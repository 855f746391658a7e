"""Judges: what a reply is, in one word. Phrases, guard models and endpoints, behind one protocol (docs/judges.md)."""

from __future__ import annotations

from moesteer.judges.phrases import (
    MAX_REPEATS,
    REFUSAL_PHRASES,
    JudgeKind,
    Judging,
    PhraseJudge,
    contains,
    repeats_itself,
    words,
)
from moesteer.judges.protocol import Item, Judge, Judgement, Reply, Verdict

__all__ = [
    "MAX_REPEATS",
    "REFUSAL_PHRASES",
    "Item",
    "Judge",
    "JudgeKind",
    "Judgement",
    "Judging",
    "PhraseJudge",
    "Reply",
    "Verdict",
    "contains",
    "repeats_itself",
    "words",
]

"""Cells and grids of Markdown tables: numbers as the tables of results print them, and names that stay names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOTHING = "\N{EM DASH}"
MINUS = "\N{MINUS SIGN}"


def grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table: heads, and lines of as many cells; all but the first column to the right."""
    rule = ["---", *("--:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def text(value: Any) -> str:
    """A name in a table cell or a heading: one line, with nothing that Markdown or HTML would act on."""
    kept = " ".join(str(value).split())
    for character in "\\`*_[]<>|#":
        kept = kept.replace(character, f"\\{character}" if character != "<" else "&lt;")
    return kept


def number(value: float | None) -> str:
    """0.471 as `47.1` (per cent); a dash for what is not known."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def signed(value: float | None) -> str:
    """0.467 as `+46.7` (percentage points)."""
    if value is None:
        return NOTHING
    points = round(100 * value, 1) + 0.0
    return f"{points:+.1f}".replace("-", MINUS) if points else "0.0"


def each(texts: Sequence[str]) -> str:
    """`83.3 / 80.4 / 79.2`, one for each seed; once where all are the same."""
    return NOTHING if not texts else texts[0] if len(set(texts)) == 1 else " / ".join(texts)

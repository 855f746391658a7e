"""The lab's world as files: a JSONL of conversations per suite."""

from __future__ import annotations

from pathlib import Path

from moesteer import conversations
from moesteer.lab import world


def export(folder: Path, *, variants: int = 2) -> dict[str, int]:
    """Write every suite with all its splits; number of conversations by file name."""
    counts = {}
    for name in world.SUITES:
        rows = [row for split in world.SPLITS for row in world.suite(name, split, per_group=variants)]
        conversations.write(folder / f"{name}.jsonl", rows)
        counts[f"{name}.jsonl"] = len(rows)
    return counts

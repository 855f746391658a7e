"""docs/audit.md says the thresholds that the verdict uses."""

from __future__ import annotations

import re
from pathlib import Path

from moesteer.audit.finders import NAMES
from moesteer.audit.inputs import DRAW_MOST, UTILITY_MOST
from moesteer.audit.verdict import THRESHOLDS, TITLES

PAGE = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()


def test_the_table_of_thresholds_is_the_verdicts() -> None:
    told: dict[str, float] = {}
    for names, values in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([\d., ]+) \|", PAGE, re.MULTILINE):
        told |= dict(zip(re.findall(r"`(\w+)`", names), map(float, values.split(", ")), strict=True))
    assert told == dict(THRESHOLDS)


def test_levels_finders_and_limits_are_named() -> None:
    assert all(f"| `{name}` |" in PAGE for name in (*TITLES, *NAMES))
    assert f"at most {UTILITY_MOST} conversations each" in PAGE and f"at most {DRAW_MOST} conversations" in PAGE

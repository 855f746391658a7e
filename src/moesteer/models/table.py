"""The table of families: what a row says, and what the tests proved of it.

`proven.json` beside this file is written by the family tests (`make families`), one part per version of transformers;
the same tests fail where it does not say what they just found.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.models.families import REFUSED, ROWS, Family

PROVEN = Path(__file__).parent / "proven.json"
CELLS = ("capture", "steer", "force", "bake")
BAKES = {
    "bias": "exact",
    "layernorm": "exact, rounded",
    "correction": "selection",
    "": "no",
}
BAKE_REASONS = {
    "bias": "the router has a bias: additive masks are added to it",
    "layernorm": "a constant direction of the LayerNorm before the router carries additive masks",
    "correction": "forced masks go into the correction bias: which experts are chosen, not with what weights",
    "": "nothing in the checkpoint can hold a mask; steer at run time",
}


def installed_transformers() -> str:
    """Its version, or "" without it."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


def proven() -> dict[str, Any]:
    """What the tests found, by version of transformers."""
    found = files.read_json(PROVEN) if PROVEN.exists() else {}
    return found if isinstance(found, dict) else {}


def family_table(*, transformers: str | None = None) -> dict[str, Any]:
    """Every family with its cells, and every refused one with its reason, as proven with a version of transformers.

    transformers: default the installed one; a version that was not tested falls back on the newest that was, and
    `proven_with` says so. A family that this version does not have is listed with `in_version` False.
    """
    wanted = transformers or installed_transformers()
    found = proven()
    newest = max(found, key=lambda name: [int(part) for part in name.split(".")], default="")
    used = wanted if wanted in found else newest
    part = found.get(used, {}).get("families", {})
    return {
        "transformers": wanted,
        "proven_with": used,
        "families": [_entry(row, part.get(row.model_type)) for row in ROWS],
        "refused": [{"family": name, "reason": reason} for name, reason in REFUSED.items()],
    }


def _entry(row: Family, tested: dict[str, Any] | None) -> dict[str, Any]:
    tested = tested or {}
    cells: dict[str, dict[str, Any]] = {name: {"tests": int(tested.get("tests", {}).get(name, 0))} for name in CELLS}
    cells["force"]["how"] = tested.get("force", "")
    cells["bake"] |= {"how": BAKES[row.bake], "why": BAKE_REASONS[row.bake]}
    return {
        "family": row.model_type,
        "model_types": list(row.model_types),
        "in_version": bool(tested),
        "layers": tested.get("layers"),
        "experts": tested.get("experts"),
        "top_k": tested.get("top_k"),
        "sizes_of": tested.get("sizes_of"),
        "scoring": tested.get("scoring", row.scoring),
        "dtypes": tested.get("dtypes", []),
        **cells,
        "tests": sum(cell["tests"] for cell in cells.values()),
        "note": row.note,
        "examples": list(row.examples),
    }

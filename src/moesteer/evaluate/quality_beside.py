"""What stands beside a table of methods: how its margins were kept, how good its gates and its surrogates are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moesteer.evaluate.cells import NOTHING, each, grid, number, text

Row = Mapping[str, Any]
"""A row of the quality table: one method, with `gate`, `surrogate` and `margins` by seed."""


def margins(rows: Sequence[Row]) -> list[str]:
    """One sentence: by what the chosen settings' margins were kept on the select split; none without margins."""
    found = Counter(status for row in rows for of_seed in row["margins"].values() for status in of_seed.values())
    if not found:
        return []
    kept = f"shown to be kept: {found['shown']}; lossless in a suite too small to show anything: {found['lossless']}"
    return [
        f"Margins of the chosen settings on select, over all methods and seeds: {kept}; not shown: "
        f"{found['not shown']}."
    ]


def gates(rows: Sequence[Row]) -> list[str]:
    """A table of the gates: what they read, and how often they fire; nothing where no method has one."""
    lines = []
    for row in rows:
        found = [entry for entry in row["gate"].values() if entry]
        if not found:
            continue
        lines.append(
            [
                text(row["method"]),
                ", ".join(seed for seed, entry in row["gate"].items() if entry),
                each([text(entry["pool"]) for entry in found]),
                each([f"{entry['auroc']:.4f}" for entry in found]),
                each([_fires(entry["false_positive_rate"]) for entry in found]),
                each([_fires(entry["true_positive_rate"]) for entry in found]),
                each([f"{entry['fired']} of {entry['gated']}" if "fired" in entry else NOTHING for entry in found]),
            ]
        )
    if not lines:
        return []
    heads = ["Gate of", "Seeds", "Positions", "AUROC", "Fires on protected", "Fires on the target", "Fires on test"]
    return [
        "Gates. AUROC and the two rates are of every request of the select split, where the threshold was chosen; the "
        "last column counts every request of the test split, earlier turns included, target and protected.",
        grid(heads, lines),
    ]


def surrogates(rows: Sequence[Row]) -> list[str]:
    """A table of the surrogates' accuracy beside what needs no routing; nothing where no method has one."""
    keys = ("surrogate_held_out", "length_only", "bag_of_words", "majority")
    lines = []
    for row in rows:
        found = [entry for entry in row["surrogate"].values() if entry]
        if found:
            n = each([str(entry["surrogate_held_out"]) for entry in found])
            shares = [each([number(entry.get(f"{key}_accuracy")) for entry in found]) for key in keys]
            said = each(["yes" if entry.get("warning") else "no" for entry in found])
            lines.append([text(row["method"]), ", ".join(row["surrogate"]), n, *shares, said])
    if not lines:
        return []
    heads = ["Surrogate of", "Seeds", "Held out", "Surrogate", "Length alone", "Words alone", "Usual class", "Warning"]
    return [
        "Surrogates: accuracy in per cent on what was held out of the fit split, beside classifiers that see no "
        "routing on the same split. Warning: one of these does as well, so that the accuracy says little about "
        "routing.",
        grid(heads, lines),
    ]


def _fires(rate: Mapping[str, Any]) -> str:
    """`0.0 [0.0, 0.5] of 798`."""
    return f"{number(rate['value'])} [{number(rate['low'])}, {number(rate['high'])}] of {rate['n']}"

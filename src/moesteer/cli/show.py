"""What commands print: JSON for machines, tables for people."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moesteer import files
from moesteer.errors import InputError
from moesteer.evaluate.metrics import METRICS


def quiet_transformers() -> None:
    """Keep transformers' own bars and notes off the screen; errors still come through."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(files.dumps(value))


def percent(rate: dict[str, Any] | None) -> str:
    """`93.3 [89.1, 96.0]` of a rate with its interval; a dash where nothing was scored."""
    if not rate or rate["value"] is None:
        return "-"
    return f"{100 * rate['value']:.1f} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def results_table(results: dict[str, Any]) -> Table:
    """The headline table of results.json: methods by metrics, in per cent with 95 % intervals."""
    names = list(results["methods"]["none"]["metrics"])
    target = results["scenario"]["target_metric"]
    ordered = [target, *(name for name in names if name != target)]
    table = Table(title=f"{results['scenario']['title']}: test split, per cent with 95 % intervals")
    table.add_column("method")
    table.add_column("setting")
    for name in ordered:
        note = " (lower is better)" if name in METRICS and METRICS[name].lower_is_better else ""
        table.add_column(name.replace("_", " ") + note, justify="right")
    for name, entry in results["methods"].items():
        style = "bold green" if name == results["recommended"] else None
        flag = " (breaks a margin)" if entry["feasible"] is False else ""
        setting = (entry.get("setting") or "").removeprefix(f"{name} ") + flag
        table.add_row(name, setting, *(percent(entry["metrics"].get(metric)) for metric in ordered), style=style)
    return table


def print_table(table: Table) -> None:
    """A table on standard output, as wide as the screen, or wide enough for all of it where there is none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def strengths(given: Sequence[float] | None, *, masks: int) -> list[float | None]:
    """One strength per mask from repeated --alpha: none (each mask's own), or one for each."""
    for alpha in given or ():
        if not math.isfinite(alpha):
            raise InputError(
                f"a strength cannot be {alpha}", where="--alpha", expected="a finite number", do="correct it"
            )
    if given and len(given) != masks:
        raise InputError(
            f"{len(given)} times --alpha for {masks} times --mask",
            where="the command line",
            expected="--alpha once for each --mask, in the same order, or not at all",
            do="repeat --alpha, or leave it out to use the masks' own strengths",
        )
    return list(given) if given else [None] * masks

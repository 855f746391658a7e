"""`moesteer compare-logs`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moesteer.cli import show
from moesteer.cli.options import Json, Seed


def compare_logs(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A log of Inspect, of the unsteered model.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="A log of the same task, steered.")],
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare two logs of one Inspect task, sample by sample: differences, bootstrap intervals, McNemar's test."""
    from moesteer.backends.sources import require_extra

    require_extra("inspect_ai", "inspect", what="the logs are Inspect's", where="moesteer compare-logs")
    from moesteer.harness.inspect_logs import compare

    found = compare(before, after, seed=seed)
    if json:
        show.print_json(found)
        return
    table = Table(title=f"{found['task']}: per cent with 95 % intervals")
    for column in ("score", "n", found["before"]["model"], found["after"]["model"], "difference", "p"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, one in found["scores"].items():
        gap = one["difference"]
        moved = (
            "-"
            if gap["difference"] is None
            else f"{100 * gap['difference']:+.1f} [{100 * gap['low']:+.0f}, {100 * gap['high']:+.0f}]"
        )
        table.add_row(
            name.replace("_", " "), str(one["pairs"]), show.percent(one["before"]), show.percent(one["after"]), moved,
            "-" if gap["p"] is None else f"{gap['p']:.2g}",
        )  # fmt: skip
    show.print_table(table)

"""`moesteer drift`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moesteer.cli import show
from moesteer.cli.options import Json, Seed


def drift(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of `moesteer audit`.", show_default=False)],
    trace: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE", help="A trace of live traffic (moesteer capture --level selected).", show_default=False
        ),
    ],
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare the routing of live traffic with that of an audit. Exit code 3: it drifted.

    Capture the span that the audit did: --span final_turn, without a mask.
    Another mix of topics drifts as well: look at what is asked before calling it an attack.
    """
    from moesteer.audit.drift import drift as compared

    found = compared(run, trace, seed=seed)
    if json:
        show.print_json(found)
    else:
        table = Table(title="selections that went to other experts than in the audit, per cent")
        for column in ("layer", "found", "by chance", "p"):
            table.add_column(column, justify="right")
        rows = [*((str(one["layer"]), one) for one in found["layers"]), ("all", found["overall"])]
        for label, row in rows:
            found_and_chance = (f"{100 * row[key]:.1f}" for key in ("total_variation", "expected"))
            table.add_row(label, *found_and_chance, f"{row['p']:.2g}")
        show.print_table(table)
        for one in found["experts"]:
            shares = f"{100 * one['audited']:.1f} % of the tokens in the audit, {100 * one['live']:.1f} % now"
            typer.echo(f"layer {one['layer']} expert {one['expert']}: {shares}")
        typer.echo(f"verdict: {found['verdict']['level']}")
        for sentence in found["verdict"]["sentences"]:
            typer.echo(f"  {sentence}")
    if found["verdict"]["level"] == "drifted":
        raise typer.Exit(3)

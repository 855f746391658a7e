"""`moesteer report`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesteer.cli.options import Json


def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A run directory of steer, evaluate or audit; or results of bench/, a file or a folder.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write the page to this file. Default: RUN/report.html.", show_default=False)
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write card.md: an audit as Markdown, for a model's page.")
    ] = False,
    json: Json = False,
) -> None:
    """Write report.html again from the files of a run: one page, offline, no model needed."""
    from moesteer.cli import show
    from moesteer.report import html

    page = html.make(run)
    written = html.write_page(run, page, out=out)
    about = html.write_card(run) if card else None
    if json:
        said = {"schema": 1, "kind": page.kind, "report": str(written), "card": about and str(about)}
        show.print_json({**said, "not_shown": list(page.gaps)})
        return
    for path in (written, about):
        if path is not None:
            typer.echo(path)
    for line in page.gaps:
        typer.echo(f"not shown: {line}", err=True)

"""`moesteer doctor`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesteer.cli import show
from moesteer.cli.options import Json


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|TRACE|MASK]", help="Also check this run, trace or mask.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """What is installed and whether it works; with a path, whether those files are whole. Exit 1 on damage."""
    from moesteer.doctor import examine

    found = examine(path)
    if json:
        show.print_json([row.as_json() for row in found])
    else:
        for row in found:
            typer.echo(f"{'ok  ' if row.ok else 'BAD '} {row.what}: {row.detail}")
    if not all(row.ok for row in found):
        raise typer.Exit(1)

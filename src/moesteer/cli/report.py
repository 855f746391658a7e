"""`moesteer report`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory with results.json.", show_default=False)],
) -> None:
    """Write report.html again from the files of a run: one page, offline, no model needed."""
    from moesteer.report.html import write_report

    typer.echo(write_report(run))

"""`moesteer suites`"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from moesteer.cli import show
from moesteer.cli.options import Json


def suites(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="All there is to say of one suite.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """The named suites (the field's data sets), and the built-in scenarios with the suites they use."""
    from moesteer import suites as every

    if name is not None:
        facts = _facts(every.named(name))
        if json:
            show.print_json(facts)
            return
        for key, value in facts.items():
            said = ", ".join(value) if isinstance(value, list) else value
            typer.echo(f"{key.replace('_', ' ') + ':':<14} {_said(said)}")
        return
    scenarios = _scenarios()
    if json:
        show.print_json({"suites": [_facts(row) for row in every.SUITES.values()], "scenarios": scenarios})
        return
    table = Table(title='named suites: data = "suite:NAME" in a scenario, or suite:NAME on the command line')
    for column in ("suite", "source", "licence", "rows", "harmful", "judge (model)", "metric", "command"):
        table.add_column(column, justify="right" if column == "rows" else "left", overflow="fold")
    for row in every.SUITES.values():
        judge = row.judge + (f" ({row.model_judge})" if row.model_judge else "")
        table.add_row(
            row.name,
            row.source,
            row.licence,
            row.about or _said(row.rows),
            _said(row.harmful),
            judge,
            row.metrics[0],
            row.command,
        )
    show.print_table(table)
    typer.echo("built-in scenarios:")
    for scenario, rows in scenarios.items():
        typer.echo(f"{scenario}:")
        for one in rows:
            typer.echo(f"  {one['suite']:<22} {one['role']:<8} {', '.join(one['metrics']):<36} {one['data']}")


def _facts(row: Any) -> dict[str, Any]:
    """A row of the table as plain data. Nothing of the data itself is in it."""
    from moesteer.suites.named import KINDS

    hub = row.hub
    return {
        "name": row.name, "title": row.title, "measures": row.measures, "source": row.source,
        "page": hub.page, "revision": hub.revision, "pinned": hub.pinned, "gated": hub.gated,
        "columns": row.columns, "files": list(KINDS), "licence": row.licence, "citation": row.citation,
        "rows": row.rows, "about": row.about, "harmful": row.harmful,
        "judge": row.judge, "model_judge": row.model_judge,
        "metrics": list(row.metrics), "command": row.command, "note": row.note,
    }  # fmt: skip


def _scenarios() -> dict[str, list[dict[str, Any]]]:
    from moesteer import scenario as scenarios

    return {
        name: [
            {
                "suite": s.name, "role": s.role, "judge": s.judge, "metrics": list(s.metrics), "margin": s.margin,
                "data": s.data,
            }
            for s in scenarios.load(name).suites
        ]
        for name in scenarios.built_in()
    }  # fmt: skip


def _said(value: Any) -> str:
    """For people: what is not known says so."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value) or "-"

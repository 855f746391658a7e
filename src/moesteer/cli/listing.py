"""`moesteer methods` and `moesteer suites`"""

from __future__ import annotations

from typing import Any

import typer

from moesteer.cli import show
from moesteer.cli.options import Json


def methods(json: Json = False) -> None:
    """The detection methods and their settings (for `moesteer detect --set NAME=VALUE`)."""
    from moesteer.detection.controls import CONTROLS
    from moesteer.methods import methods as every

    found: dict[str, dict[str, Any]] = {
        name: {"title": method.title, "contrast": method.contrast, "through_model": method.through_model,
               "settings": method.settings}
        for name, method in every().items()
    }  # fmt: skip
    if json:
        show.print_json(found)
        return
    for name, facts in found.items():
        typer.echo(f"{name}: {facts['title']}")
        for key, value in facts["settings"].items():
            typer.echo(f"    {key}={value}")
    typer.echo(f"controls, made from another mask (--like): {', '.join(CONTROLS)}")


def suites(json: Json = False) -> None:
    """The built-in scenarios, their suites, and what each is judged by."""
    from moesteer import scenario as scenarios

    found: dict[str, list[dict[str, Any]]] = {
        name: [
            {
                "suite": s.name,
                "role": s.role,
                "judge": s.judge,
                "metrics": list(s.metrics),
                "margin": s.margin,
                "data": s.data,
            }
            for s in scenarios.load(name).suites
        ]
        for name in scenarios.built_in()
    }
    if json:
        show.print_json(found)
        return
    for name, rows in found.items():
        typer.echo(f"{name}: {scenarios.load(name).title}")
        for row in rows:
            typer.echo(f"  {row['suite']:<16} {row['role']:<8} {', '.join(row['metrics'])}")

"""`moesteer methods`"""

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

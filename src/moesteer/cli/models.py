"""`moesteer models`"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from moesteer.cli import show
from moesteer.cli.options import Device, Dtype, Json


def models(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Look at one model: its routers and the self-check.", show_default=False
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """The router families that are known; or one model's routers, and the proof that steering it works."""
    from moesteer.models.families import ROWS

    if model is None:
        rows: list[dict[str, Any]] = [
            {
                "model_type": f.model_type,
                "scoring": f.scoring,
                "renormalise": f.renormalise,
                "examples": list(f.examples),
            }
            for f in ROWS
        ]
        if json:
            show.print_json(rows)
            return
        table = Table(title="router families")
        for column in ("model type", "scoring", "weights renormalised", "examples"):
            table.add_column(column)
        for row in rows:
            table.add_row(row["model_type"], row["scoring"], str(row["renormalise"]), ", ".join(row["examples"]))
        show.print_table(table)
        return
    from moesteer.backends.loading import load

    show.quiet_transformers()
    loaded = load(model, dtype=dtype, device=device)
    facts = {
        "model": model, "parameters": loaded.parameters, "self_check": "passed",
        "fingerprint": loaded.fingerprint.model_dump(mode="json"),
        "routers": [{"layer": r.layer_id, "path": r.path, "experts": r.experts} for r in loaded.routers],
    }  # fmt: skip
    if json:
        show.print_json(facts)
        return
    fingerprint = loaded.fingerprint
    typer.echo(f"{model}: {fingerprint.model_type}, {loaded.parameters:,} parameters")
    typer.echo(f"{len(loaded.routers)} routers of {fingerprint.experts} experts; {fingerprint.scoring}")
    for router in loaded.routers:
        typer.echo(f"  layer {router.layer_id:>3}  {router.path}")
    typer.echo(f"router weights: sha256 {fingerprint.router_sha256[:12]}")
    typer.echo("self-check passed: steering one layer selects what routing.py selects, and comes off bit for bit")

"""`moesteer mask show|check|bake`; the other commands of the group are in the files beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moesteer.cli import mask_compose, mask_import, mask_share, show
from moesteer.cli.options import Alpha, Device, Dtype, Json, ModelArgument, OtherCheckpoint

app = typer.Typer(
    help="Look at steering masks, check, combine, compare, share them, import tables, bake them into a checkpoint.",
    no_args_is_help=True,
)
File = Annotated[Path, typer.Argument(metavar="MASK", help="A mask file.", show_default=False)]


@app.command("show")
def show_(
    file: File, top: Annotated[int, typer.Option(min=1, help="How many experts to list.")] = 20, json: Json = False
) -> None:
    """What a mask is for, where it comes from, and its largest entries."""
    from moesteer.mask import SteeringMask
    from moesteer.masks_described import describe, largest

    mask = SteeringMask.load(file)
    facts, entries = describe(mask), largest(mask, count=top)
    if json:
        show.print_json({**facts, "entries": entries})
        return
    for name, value in facts.items():
        typer.echo(f"{name:<12} {value}")
    table = Table(title=f"largest {len(entries)} of {mask.expert_count} entries")
    for column in ("layer", "expert", "force" if mask.forced else "strength (sigma)"):
        table.add_column(column, justify="right")
    for entry in entries:
        table.add_row(str(entry["layer"]), str(entry["expert"]), f"{entry['value']:+.3g}")
    show.print_table(table)


@app.command("check")
def check(
    file: File,
    model: Annotated[
        str | None, typer.Option(help="Also check that it fits this model, and steer it once.", show_default=False)
    ] = None,
    allow_other_checkpoint: OtherCheckpoint = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Check a mask's bytes, numbers and sha256; with --model, that it fits and changes selections there."""
    from moesteer.mask import SteeringMask
    from moesteer.masks_described import check_on, describe

    mask = SteeringMask.load(file)
    facts = describe(mask)
    if model is not None:
        from moesteer.backends.loading import load

        show.quiet_transformers()
        loaded = load(model, dtype=dtype, device=device)
        facts["on_model"] = check_on(mask, loaded, allow_other_checkpoint=allow_other_checkpoint)
    if json:
        show.print_json(facts)
    else:
        typer.echo(f"whole and untouched: sha256 {facts['sha256']}")
        if "on_model" in facts:
            typer.echo(f"on {model}: {facts['on_model']}")


@app.command("bake")
def bake(
    model: ModelArgument,
    file: File,
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint: new or empty.", show_default=False)],
    alpha: Alpha = None,
    allow_other_checkpoint: OtherCheckpoint = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write a checkpoint that steers by itself, where the family's own tensors can hold the mask (docs/baking.md)."""
    from moesteer.mask import SteeringMask

    mask = SteeringMask.load(file)
    from moesteer import baking
    from moesteer.backends.loading import load
    from moesteer.models.bake import require_bakeable

    require_bakeable(mask)  # before minutes of loading
    show.quiet_transformers()
    loaded = load(model, dtype=dtype, device=device)
    baked = baking.bake(loaded, mask, out=out, alpha=alpha, allow_other_checkpoint=allow_other_checkpoint)
    if json:
        show.print_json(baked.as_json())
        return
    for name, value in baked.described().items():
        typer.echo(f"{name:<12} {value}")


app.command("compose")(mask_compose.compose)
app.command("diff")(mask_compose.diff)
app.command("similarity")(mask_compose.similarity)
app.command("import")(mask_import.import_)
app.command("push")(mask_share.push)
app.command("pull")(mask_share.pull)

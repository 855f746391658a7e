"""`moesteer mask import`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesteer.cli import show
from moesteer.cli.mask_compose import Out, refuse_input
from moesteer.cli.options import Device, Dtype, Json
from moesteer.errors import InputError


def import_(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help="A table of experts: .csv, .parquet or .json.", show_default=False)
    ],
    toward: Annotated[str, typer.Option(help="The behaviour it should bring about.", show_default=False)],
    out: Out,
    model: Annotated[str | None, typer.Option(help="The model that the table is of.", show_default=False)] = None,
    fingerprint_of: Annotated[
        Path | None,
        typer.Option(help="Instead of --model: a mask file or a trace folder of that model.", show_default=False),
    ] = None,
    on: Annotated[int, typer.Option(help="How many experts of the highest positive score to activate.")] = 0,
    off: Annotated[int, typer.Option(help="How many experts of the lowest negative score to deactivate.")] = 0,
    form: Annotated[str, typer.Option(help="forced, or additive (sigma from --fingerprint-of).")] = "forced",
    reverse: Annotated[bool, typer.Option("--reverse", help="The table's two sides change roles.")] = False,
    by: Annotated[str, typer.Option(help="What ranks the experts: risk-difference or log-odds.")] = "risk-difference",
    columns: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COLUMN: what the table calls a column; repeat. NAME= leaves it unread."),
    ] = None,
    layer_numbers: Annotated[
        str, typer.Option(help="ids: decoder layers; rows: layers with a router, counted from 0.")
    ] = "ids",
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """A mask from somebody's table: layer, expert and counts of activations on two sides, or a score.

    Statistics are computed again from the counts and compared with the table's own (docs/mask-algebra.md).
    """
    from moesteer import importing

    refuse_input(out, [table, *([fingerprint_of] if fingerprint_of else [])])
    if (model is None) == (fingerprint_of is None):
        raise InputError(
            "the model of the table is not given, or given twice",
            where="moesteer mask import",
            expected="either --model or --fingerprint-of",
            do="give one of them: a mask is for one model",
        )
    named = pairs(columns or [])
    sigma = None
    if fingerprint_of is not None:
        fingerprint, sigma = importing.made_for(fingerprint_of)
    else:
        from moesteer.backends.loading import load

        assert model is not None
        show.quiet_transformers()
        fingerprint = load(model, dtype=dtype, device=device).fingerprint
    mask = importing.import_mask(
        table, fingerprint=fingerprint, toward=toward, on=on, off=off, form=form, reverse=reverse,  # type: ignore[arg-type]
        by=by, columns=named, layer_numbers=layer_numbers, sigma_L=sigma,  # type: ignore[arg-type]
    )  # fmt: skip
    mask.save(out)
    if json:
        show.print_json({"mask": str(out), "sha256": mask.sha256, "experts": mask.expert_count,
                         "settings": mask.info.settings})  # fmt: skip
    else:
        rows = mask.info.settings["rows"]
        typer.echo(f"{mask.expert_count} of {rows} experts in {out} (sha256 {mask.sha256[:12]})")
        typer.echo("it was accepted on nothing yet: evaluate it (`moesteer evaluate --mask`)")


def pairs(given: list[str]) -> dict[str, str]:
    """NAME=COLUMN pairs. Raises InputError."""
    found: dict[str, str] = {}
    for text in given:
        name, sign, column = text.partition("=")
        if not sign or name in found:
            raise InputError(
                f"{text!r} is not NAME=COLUMN" if not sign else f"{name} is given twice",
                where="--columns",
                expected="for example --columns layer=Layer_Index",
                do="repeat --columns for each column",
            )
        found[name] = column
    return found

"""`moesteer models [MODEL]` and `moesteer models convert`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from moesteer.cli import show
from moesteer.cli.options import Device, Dtype, Json, Quantize


class _ShowByDefault(TyperGroup):
    """A group whose first word may be a model: `moesteer models MODEL` is `moesteer models show MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `show` before anything that is not a command's name."""
        if not args or args[0] not in {*self.commands, "-h", "--help"}:
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ShowByDefault,
    help="The router families (`moesteer models`); one model's routers and the proof that steering it works (`moesteer "
    "models MODEL`, with the options of `show`); conversion to a native class.",
)


@app.command("show")
def models(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Look at one model: its routers and the self-check.", show_default=False
        ),
    ] = None,
    shape_only: Annotated[
        bool, typer.Option("--shape-only", help="Read the model's config and index only; load no weights.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    json: Json = False,
) -> None:
    """The router families and what is proven of each; or one model's routers, and the proof that steering it works.

    `moesteer models MODEL` is short for `moesteer models show MODEL`.
    """
    if model is None:
        _families(json=json)
    elif shape_only:
        _shape(model, json=json)
    else:
        _check(model, dtype=dtype, device=device, quantize=quantize, json=json)


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A checkpoint's folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write, new or empty.", show_default=False)],
    json: Json = False,
) -> None:
    """Re-save a checkpoint that needs code of its own as a native class, exactly; none of its code is run.

    For DeepSeekMoE v1 (deepseek-moe-16b), as qwen2_moe; and for Phi-3.5-MoE as re-saved by transformers 5, whose
    architecture name other engines do not know.
    """
    from dataclasses import asdict

    from moesteer.models.convert import convert as convert_checkpoint

    done = convert_checkpoint(source, out, title="converting")
    if json:
        show.print_json({key: str(v) if isinstance(v, Path) else v for key, v in asdict(done).items()})
        return
    typer.echo(f"{source} ({done.source_type}) is now {out} ({done.target_type}): {done.tensors} tensors")
    typer.echo(f"next: moesteer models {out}")


def _families(*, json: bool) -> None:
    from moesteer.models.table import family_table

    table = family_table()
    if json:
        show.print_json(table)
        return
    wide = Console().width >= 150
    shown = Table(title=f"router families, as proven with transformers {table['proven_with']}")
    for column in ("family", "layers", "experts", "k"):
        shown.add_column(column, justify="right" if column != "family" else "left", no_wrap=True)
    for column in ("scoring", "capture", "steer") if wide else ():
        shown.add_column(column)
    for column in ("force", "bake", "tests"):
        shown.add_column(column, justify="right" if column == "tests" else "left", no_wrap=True)
    for entry in table["families"]:
        star = "*" if entry["sizes_of"] == "test model" else ""
        cells = [f"{entry[key]}{star}" if entry[key] else "-" for key in ("layers", "experts", "top_k")]
        if wide:
            cells += [entry["scoring"], *(_cell(entry[name], "yes") for name in ("capture", "steer"))]
        cells += [_cell(entry[name], entry[name]["how"]) for name in ("force", "bake")]
        shown.add_row(entry["family"], *cells, str(entry["tests"] or "-"))
    show.print_table(shown)
    typer.echo("layers, experts, k: of transformers' default config (*: of the test model, where that is not one).")
    typer.echo("-: not in this version of transformers." + ("" if wide else " More columns from a width of 150 on."))
    typer.echo("bake: 'exact' holds additive masks, 'selection' forced ones (docs/baking.md).")
    for refused in table["refused"]:
        typer.echo(f"refused: {refused['family']}: {refused['reason']}")


def _cell(cell: dict[str, Any], proven: str) -> str:
    return proven if cell["tests"] else "-"


def _shape(model: str, *, json: bool) -> None:
    from moesteer.backends.shape import shape_of

    show.quiet_transformers()
    shape = shape_of(model)
    if json:
        show.print_json({"model": model, **shape.as_json()})
        return
    typer.echo(f"{model}: {shape.model_type}, {shape.parameters:,} parameters by its config; no weight was read")
    typer.echo(f"{len(shape.layer_ids)} routers of {shape.experts} experts; {shape.scoring}")
    typer.echo(f"layers {_ranges(shape.layer_ids)}: {shape.paths[0]} ...")
    if shape.shards:
        typer.echo(f"{shape.shards_here} of {shape.shards} weight files are here")
    if shape.index_agrees is not None:
        typer.echo("the index has experts in these layers" if shape.index_agrees else
                   "WARNING: the index lacks experts in some of these layers")  # fmt: skip
    for line in (*shape.limits, *shape.notes):
        typer.echo(f"- {line}")


def _check(model: str, *, dtype: str, device: str, quantize: str | None, json: bool) -> None:
    from moesteer.backends.loading import load
    from moesteer.backends.shape import notes_of
    from moesteer.backends.sources import read_config, source_of
    from moesteer.models.limits import limits

    show.quiet_transformers()
    source = source_of(model)
    adapter = (Path(source) / "adapter_config.json").is_file()
    notes = () if adapter else notes_of(read_config(source, name=model))
    loaded = load(model, dtype=dtype, device=device, quantize=quantize)
    facts = {
        "model": model, "parameters": loaded.parameters, "self_check": "passed",
        "family": loaded.routers[0].family.model_type,
        "fingerprint": loaded.fingerprint.model_dump(mode="json"),
        "routers": [{"layer": r.layer_id, "path": r.path, "experts": r.experts} for r in loaded.routers],
        "limits": list(limits(loaded.routers)), "notes": list(notes),
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
    for line in (*limits(loaded.routers), *notes):
        typer.echo(f"- {line}")
    typer.echo("self-check passed: steering one layer selects what routing.py selects, and comes off bit for bit")


def _ranges(numbers: tuple[int, ...]) -> str:
    """0-2, 5, 7-8 of 0 1 2 5 7 8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][-1:] = [number] if len(parts[-1]) > 1 else [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)

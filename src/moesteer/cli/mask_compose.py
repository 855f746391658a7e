"""`moesteer mask compose|diff|similarity`"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moesteer.cli import show
from moesteer.cli.options import Json, OtherCheckpoint
from moesteer.errors import InputError

Out = Annotated[Path, typer.Option(help="File of the new mask.", show_default=False)]
A = Annotated[Path, typer.Argument(metavar="A", help="A mask file.", show_default=False)]
B = Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)]


def compose(
    masks: Annotated[list[Path], typer.Argument(metavar="MASK", help="Mask files.", show_default=False)],
    out: Out,
    op: Annotated[
        str | None, typer.Option(help="add, subtract or union; needed for several masks.", show_default=False)
    ] = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(help="Strength of each mask, in order; repeat. Default: their own.", show_default=False),
    ] = None,
    conflict: Annotated[
        str, typer.Option(help="union only: where masks pull an expert opposite ways: refuse, first, drop or sum.")
    ] = "refuse",
    layers: Annotated[
        str | None, typer.Option(help="Keep these decoder layers only: 0,1,4-6.", show_default=False)
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Multiply the strengths.", show_default=False)] = None,
    negate: Annotated[bool, typer.Option("--negate", help="Turn the mask round.")] = False,
    top: Annotated[int | None, typer.Option(help="Keep the largest entries.", show_default=False)] = None,
    allow_other_checkpoint: OtherCheckpoint = False,
    json: Json = False,
) -> None:
    """Make one mask of several, or a changed one of one: alpha, layers, op, scale, negate, top, in this order.

    A forced mask and an additive one, or masks behind different gates, are applied together instead.
    """
    from moesteer import algebra
    from moesteer.mask import SteeringMask

    refuse_input(out, masks)
    made = algebra.compose(
        [SteeringMask.load(path) for path in masks], op=op, alphas=alpha, conflict=conflict,  # type: ignore[arg-type]
        layers=None if layers is None else numbers(layers), factor=scale, negated=negate, top=top,
        allow_other_checkpoint=allow_other_checkpoint,
    )  # fmt: skip
    made.save(out)
    if json:
        show.print_json({"mask": str(out), "sha256": made.sha256, "experts": made.expert_count,
                         "toward": made.info.intent.toward, "settings": made.info.settings})  # fmt: skip
        return
    typer.echo(f"{made.expert_count} experts toward {made.info.intent.toward!r} in {out} (sha256 {made.sha256[:12]})")
    typer.echo("it was accepted on nothing yet: evaluate it (`moesteer evaluate --mask`)")


def diff(
    a: A,
    b: B,
    top: Annotated[int, typer.Option(min=1, help="How many entries to list.")] = 20,
    allow_other_checkpoint: OtherCheckpoint = False,
    json: Json = False,
) -> None:
    """What differs between two masks: entries in one only, entries changed, metadata."""
    from moesteer import comparing
    from moesteer.mask import SteeringMask

    found = comparing.diff(SteeringMask.load(a), SteeringMask.load(b), allow_other_checkpoint=allow_other_checkpoint)
    if json:
        show.print_json(found)
        return
    kinds = ("only_a", "only_b", "changed")
    counts = {kind: len(found[kind]) for kind in (*kinds, "same")}
    typer.echo("; ".join(f"{kind.replace('_', ' ')}: {count}" for kind, count in counts.items()))
    for name, values in found["fields"].items():
        typer.echo(f"{name}: {values['a']} | {values['b']}")
    table = Table(title=f"at most {top} of each, largest difference first ({found['unit']})")
    for column in ("", "layer", "expert", "a", "b"):
        table.add_column(column, justify="left" if column == "" else "right")
    for kind in kinds:
        for entry in found[kind][:top]:
            cells = (str(entry["layer"]), str(entry["expert"]), f"{entry['a']:+.3g}", f"{entry['b']:+.3g}")
            table.add_row(kind.replace("_", " "), *cells)
    if table.row_count:
        show.print_table(table)


def similarity(
    a: A,
    b: B,
    at: Annotated[list[int] | None, typer.Option(help="Compare the top N experts; repeat. Default: 5, 20.")] = None,
    allow_other_checkpoint: OtherCheckpoint = False,
    json: Json = False,
) -> None:
    """How alike two masks are: cosine of what they do, and the overlap of their largest experts."""
    from moesteer import comparing
    from moesteer.mask import SteeringMask

    masks = [SteeringMask.load(path) for path in (a, b)]
    found = comparing.similarity(*masks, at=at or (5, 20), allow_other_checkpoint=allow_other_checkpoint)
    if json:
        show.print_json(found)
        return
    typer.echo(f"cosine {found['cosine']:+.3f}")
    for overlap in found["jaccard"]:
        typer.echo(f"top {overlap['n']}: Jaccard {overlap['signed']:.3f}; {overlap['unsigned']:.3f} whatever the sign")


def numbers(text: str) -> list[int]:
    """0, 1, 4, 5, 6 of "0,1,4-6". Raises InputError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise InputError(
                f"{part!r} is not a layer or a range of layers",
                where=f"--layers {text}",
                expected="decoder layer ids and ranges, such as 0,1,4-6",
                do="write them with commas and hyphens",
            )
        found += range(first, last + 1)
    return found


def refuse_input(out: Path, given: list[Path]) -> None:
    """Raise InputError where a file that was read would be overwritten."""
    if any(out.resolve() == path.resolve() for path in given):
        raise InputError(
            "the output would replace an input",
            where=f"--out {out}",
            expected="a file of its own for the new mask",
            do="choose another --out",
        )

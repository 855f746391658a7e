"""`moesteer lab build|data|check`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moesteer.cli import show
from moesteer.cli.options import Json, Seed
from moesteer.errors import UnknownNameError

app = typer.Typer(help="The lab: small models of our own, and the world they were trained on.", no_args_is_help=True)


@app.command("build")
def build(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="tiny; or a variant of it: tiny-concentrated, tiny-tuned, tiny-int8, tiny-int4.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the model.", show_default="runs/lab-NAME")] = None,
    seed: Seed = 0,
    shipped: Annotated[
        bool,
        typer.Option("--shipped", help="Write the tiny-concentrated that comes with moesteer."),
    ] = False,
    base: Annotated[str, typer.Option(help="For a variant: the lab model to make it from.")] = "lab-tiny",
    json: Json = False,
) -> None:
    """Train lab tiny from nothing (ten to twenty minutes on two cores), or make a variant of it.

    The same weights on the same machine. tiny-concentrated: refusals rest on four experts (two to three minutes).
    tiny-tuned: all weights tuned a little on harmless dialogues. tiny-int8, tiny-int4: weights rounded as torchao does.
    """
    from moesteer.lab import train, variants

    if name != "tiny" and name not in variants.NAMES:
        raise UnknownNameError(
            f"no lab model {name!r}",
            where="lab build",
            expected=f"tiny, {', '.join(variants.NAMES)}",
            do="build one of these",
        )
    folder = out or Path("runs") / f"lab-{name}"
    show.quiet_transformers()
    losses: dict[str, list[float]] = {}
    if shipped:
        variants.compose(name, folder)
    elif name == "tiny":
        losses = train.build(folder, seed=seed)
    else:
        losses = variants.build(name, folder, base=base, seed=seed)
    facts = {"folder": str(folder), "last_loss": {stage: sum(found[-20:]) / 20 for stage, found in losses.items()}}
    if json:
        show.print_json(facts)
    else:
        made = "written" if shipped or not losses else "trained"
        test = f"moesteer lab check {folder}" + (" --concentrated" if name == "tiny-concentrated" else "")
        typer.echo(f"{made} into {folder}; check it with: {test}")


@app.command("data")
def data(
    out: Annotated[Path, typer.Option(help="Folder for one JSONL file per suite.")],
    variants: Annotated[int, typer.Option(min=1, help="Wordings per behaviour and tactic.")] = 2,
    json: Json = False,
) -> None:
    """Write the lab's world as conversations: a JSONL file per suite, with groups, tactics and splits."""
    from moesteer.lab.export import export

    counts = export(out, variants=variants)
    if json:
        show.print_json(counts)
    else:
        for file, count in counts.items():
            typer.echo(f"{count:>5} conversations in {out / file}")


@app.command("check")
def check(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A lab model's folder.")] = "lab-tiny",
    concentrated: Annotated[
        bool, typer.Option("--concentrated", help="Also whether its refusals rest on the four experts they should.")
    ] = False,
    json: Json = False,
) -> None:
    """Whether a lab model has the strengths and the weakness it was made for (test split, greedy). Exit 3 if not."""
    from moesteer.backends.loading import load
    from moesteer.lab.targets import check as check_targets
    from moesteer.lab.variants import check_concentrated

    show.quiet_transformers()
    loaded = load(model)
    found = check_targets(loaded) + (check_concentrated(loaded) if concentrated else [])
    if json:
        show.print_json([row.as_json() for row in found])
    else:
        table = Table(title=f"{model} on the test split")
        for column in ("what", "share", "target", "n", ""):
            table.add_column(column)
        for row in found:
            table.add_row(row.what, f"{100 * row.share:.1f} %", row.target, str(row.n), "ok" if row.met else "MISSED")
        show.print_table(table)
    if not all(row.met for row in found):
        raise typer.Exit(3)

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
    name: Annotated[str, typer.Argument(metavar="NAME", help="tiny.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("runs/lab-tiny"),
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train lab tiny from nothing: ten to twenty minutes on two cores, the same weights on the same machine."""
    if name != "tiny":
        raise UnknownNameError(f"no lab model {name!r}", where="lab build", expected="tiny", do="build tiny")
    from moesteer.lab import train

    show.quiet_transformers()
    losses = train.build(out, seed=seed)
    facts = {"folder": str(out), "last_loss": {stage: sum(found[-20:]) / 20 for stage, found in losses.items()}}
    if json:
        show.print_json(facts)
    else:
        typer.echo(f"trained into {out}; check it with: moesteer lab check {out}")


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
    json: Json = False,
) -> None:
    """Whether a lab model has the strengths and the weakness it was made for (test split, greedy). Exit 3 if not."""
    from moesteer.backends.loading import load
    from moesteer.lab.targets import check as check_targets

    show.quiet_transformers()
    found = check_targets(load(model))
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

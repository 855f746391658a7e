"""`moesteer audit`"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moesteer.cli import show
from moesteer.cli.options import Device, Dtype, Fresh, Json, Limit, ModelArgument, Quantize, Seed
from moesteer.errors import InputError


def audit(
    model: ModelArgument,
    scenario: Annotated[
        str, typer.Option(help="A built-in scenario (`moesteer suites`) or a .toml file of yours.")
    ] = "jailbreak-defense",
    suite: Annotated[
        str | None,
        typer.Option(
            help="The suite whose behaviour is audited. Default: the first that counts direct refusals.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PAIRS",
            help="Pairs of your own: messages_0 shows the behaviour, messages_1 lacks it; or labelled conversations.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/audit.", show_default=False)] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A defence mask: is it still there beside it, and reversed?", show_default=False)
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another model, on which to try what was found here; repeat.", show_default=False),
    ] = None,
    against_quantize: Annotated[
        str | None,
        typer.Option(help="int8 or int4: the same model, or those of --against, quantised so.", show_default=False),
    ] = None,
    finder: Annotated[
        list[str] | None,
        typer.Option(
            help="risk-difference, surrogate, attribution or causal; repeat. Default: all that are cheap enough.",
            show_default=False,
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="How many experts to silence. Default: 1,2,4,... to what routers can spare.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random masks for each size.")] = 20,
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    fresh: Fresh = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Ask whether a model's refusals can be removed at the router, by how few experts, and what is lost beside them.

    Exit code 3: they can, or it is not known (the verdict is neither "held" nor "breaks"), or another check failed.
    """
    from moesteer.audit.run import audit as run

    show.quiet_transformers()
    folder = out or Path("runs") / "audit"
    results = run(
        model, scenario=scenario, suite=suite, data=data, out=folder, mask=mask, against=against or (),
        against_quantize=against_quantize, seed=seed, limit=limit, sizes=_sizes(sizes), draws=draws, finders=finder,
        dtype=dtype, device=device, quantize=quantize, fresh=fresh,
    )  # fmt: skip
    if json:
        show.print_json(results)
    else:
        _show(results, folder)
    if not all(check["passed"] for check in results["checks"]):
        raise typer.Exit(3)


def _sizes(text: str | None) -> list[int] | None:
    """Numbers from "1,2,4". Raises InputError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(
            f"{text!r} is no list of numbers",
            where="--sizes",
            expected="numbers of experts with commas between them",
            do="for example --sizes 1,2,4,8",
        )
    return [int(part) for part in parts]


def _show(results: Mapping[str, Any], folder: Path) -> None:
    show.print_table(_table(results))
    found = results["verdict"]
    typer.echo(f"verdict: {found['level']}: {found['title']}")
    for sentence in found["sentences"]:
        typer.echo(f"  {sentence}")
    for entry in results["transfer"]:
        typer.echo(f"transfer to {entry['against']['name']}: {entry['verdict']['level']}")
    for check in results["checks"]:
        if not check["passed"]:
            typer.echo(f"check failed: {check['name']} ({check['detail']})")
    for name, why in results["failed"].items():
        typer.echo(f"not done:    {name}: {why.splitlines()[0]}")
    seconds = results["seconds"]
    typer.echo("seconds:     " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    typer.echo(f"in all:      {sum(seconds.values()):.0f} s")
    typer.echo(f"results:     {folder / 'results.json'}")
    if (folder / "report.html").exists():
        typer.echo(f"report:      {folder / 'report.html'}")


def _table(results: Mapping[str, Any]) -> Table:
    """The silencing curves: a row for each size, a column for each finder, and the random draws."""
    behaviour = results["behaviour"]
    table = Table(
        title=f"{behaviour['metric'].replace('_', ' ')} as experts are silenced, per cent (utility beside it)"
    )
    table.add_column("experts", justify="right")
    curves = results["silencing"]["curves"]
    for name in curves:
        table.add_column(name + (" (chosen)" if name == results["finder"] else ""), justify="right")
    table.add_column("random", justify="right")
    unsteered = f"{_percent(results['none']['behaviour']['value'])} ({_utility(results['none']['utility'].values())})"
    table.add_row("0", *[unsteered] * len(curves), unsteered)
    for place, random in enumerate(results["silencing"]["random"]):
        cells = [
            f"{_percent(points[place]['behaviour']['value'])} "
            f"({_utility([one['rate'] for one in points[place]['utility'].values()])})"
            for points in curves.values()
        ]
        mean = {"value": random["behaviour"]["mean"]}
        utility = [{"value": one["mean"]} for one in random["utility"].values()]
        table.add_row(str(random["n"]), *cells, f"{_percent(mean['value'])} ({_utility(utility)})")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def _utility(rates: Any) -> str:
    """The suites' mean, per cent."""
    values = [rate["value"] for rate in rates if rate["value"] is not None]
    return _percent(sum(values) / len(values)) if values else "-"

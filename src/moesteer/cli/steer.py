"""`moesteer steer`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moesteer.cli import show
from moesteer.cli.options import Device, Dtype, Fresh, Json, Limit, ModelArgument, Seed
from moesteer.errors import UnknownNameError


def steer(
    model: ModelArgument,
    scenario: Annotated[str, typer.Option(help="A built-in scenario (`moesteer suites`) or a .toml file of yours.")],
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/SCENARIO.", show_default=False)] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method to compare, residual-direction, or all; repeat. Default: four of them.", show_default=False
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="A control of the recommended mask: alpha-0, random, sign-flipped, shuffled-layers; repeat for more. "
            "Default: random.",
            show_default=False,
        ),
    ] = None,
    gate: Annotated[bool, typer.Option(help="Also try methods behind a gate.")] = True,
    seed: Seed = 0,
    limit: Limit = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """Capture, detect with every method, select, evaluate and report, on any MoE model and your own data.

    Exit code 3: it finished, but no method kept every protected suite, or a check failed.
    """
    from moesteer import scenario as scenarios
    from moesteer.pipeline import DEFAULT_CONTROLS

    folder = out or Path("runs") / scenarios.load(scenario).name
    run_and_show(
        model, scenario=scenario, out=folder, methods=named_methods(method or []),
        controls=control or DEFAULT_CONTROLS, gate=gate, seed=seed, limit=limit, dtype=dtype, device=device,
        fresh=fresh, json=json,
    )  # fmt: skip


def named_methods(given: Sequence[str]) -> list[str]:
    """What to compare: `all` among the names means all there is, none the default. Raises UnknownNameError."""
    from moesteer.methods import DEFAULT, RESIDUAL, methods

    every = [*methods(), RESIDUAL]
    unknown = [name for name in given if name not in every and name != "all"]
    if unknown:
        raise UnknownNameError(
            f"no method {', '.join(unknown)}",
            where="--method",
            expected=", ".join(["all", *every]),
            do="name some of these, or all",
        )
    return every if "all" in given else list(given) or list(DEFAULT)


def run_and_show(model: str, *, out: Path, json: bool, **settings: Any) -> None:
    """Run the pipeline, print its table and where the report is; exit with 3 where a check failed."""
    from moesteer.pipeline import steer as pipeline

    show.quiet_transformers()
    results = pipeline(model, out=out, **settings)
    if json:
        show.print_json(results)
    else:
        show.print_table(show.results_table(results))
        best = results["recommended"]
        typer.echo(f"recommended: {best or 'none: no method kept every protected suite'}")
        for check in results["checks"]:
            if not check["passed"]:
                typer.echo(f"check failed: {check['name']} ({check['detail']})")
        if best:
            typer.echo(f"mask:        {out / 'masks' / (best + '.safetensors')}")
        typer.echo(f"results:     {out / 'results.json'}")
        typer.echo(f"report:      {out / 'report.html'}")
    if not all(check["passed"] for check in results["checks"]):
        raise typer.Exit(3)

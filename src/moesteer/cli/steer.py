"""`moesteer steer`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moesteer.cli import judges, show
from moesteer.cli.options import (
    Cache,
    DataSources,
    Device,
    Dtype,
    Fresh,
    Json,
    Limit,
    ModelArgument,
    Seed,
    Track,
    data_sources,
)
from moesteer.errors import ScenarioError, UnknownNameError


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
    data: DataSources = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fresh: Fresh = False,
    cache: Cache = None,
    track: Track = None,
    json: Json = False,
) -> None:
    """Capture, detect with every method, select, evaluate and report, on any MoE model and your own data.

    Exit code 3: it finished, but no method kept every protected suite, or a check failed.
    """
    from moesteer import scenario as scenarios
    from moesteer.pipeline import DEFAULT_CONTROLS

    whole = scenarios.load(scenario)
    if scenario.startswith(scenarios.SUITE):
        raise ScenarioError(
            f"{scenario} protects nothing",
            where="--scenario",
            expected="a scenario that says what steering must not change",
            do=f'write one with data = "{scenario}" in a suite (docs/scenarios.md); evaluate takes it as it is',
        )
    folder = out or Path("runs") / whole.name
    run_and_show(
        model, scenario=scenarios.with_data(whole, data_sources(data)), out=folder, methods=named_methods(method or []),
        controls=control or DEFAULT_CONTROLS, gate=gate, seed=seed, limit=limit, dtype=dtype, device=device,
        fresh=fresh, cache=cache, track=track, json=json,
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


def run_and_show(model: str, *, out: Path, json: bool, track: str | None = None, **settings: Any) -> None:
    """Run the pipeline, print its table and where the report is; exit with 3 where a check failed."""
    from moesteer import tracking
    from moesteer.pipeline import steer as pipeline

    show.quiet_transformers()
    with tracking.recorded(track, run=out.name, settings=tracking.settings_of(model, settings)) as recorder:
        results = pipeline(model, out=out, **settings)
        recorder.results(results, run=out)
    if json:
        show.print_json(results)
    else:
        show.print_table(show.results_table(results))
        for line in judges.notes(results["methods"]):
            typer.echo(line)
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

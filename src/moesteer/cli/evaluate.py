"""`moesteer evaluate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from moesteer.cli import judges, show
from moesteer.cli.options import (
    Alphas,
    Backend,
    Cache,
    DataSources,
    Device,
    Dtype,
    Engine,
    EngineOptions,
    Fresh,
    Json,
    Limit,
    MaskFiles,
    ModelArgument,
    OtherCheckpoint,
    Quantize,
    Seed,
    Track,
    Workers,
    data_sources,
    engine_options,
)
from moesteer.errors import UnknownNameError


def evaluate(
    model: ModelArgument,
    scenario: Annotated[
        str, typer.Option(help="A built-in scenario, a .toml file, or suite:NAME.")
    ] = "jailbreak-defense",
    suite: Annotated[
        list[str] | None, typer.Option(help="A suite of the scenario; repeat. Default: all.", show_default=False)
    ] = None,
    mask: MaskFiles = None,
    alpha: Alphas = None,
    split: Annotated[str, typer.Option(help="fit, select, test, or all: undivided.")] = "test",
    out: Annotated[
        Path | None, typer.Option(help="Keep responses and results.json in this folder.", show_default=False)
    ] = None,
    seed: Seed = 0,
    limit: Limit = None,
    data_source: DataSources = None,
    allow_other_checkpoint: OtherCheckpoint = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    backend: Backend = "hf",
    engine_option: EngineOptions = None,
    fresh: Fresh = False,
    cache: Cache = None,
    engine: Engine = "local",
    workers: Workers = None,
    track: Track = None,
    json: Json = False,
) -> None:
    """Play a scenario's suites, unsteered and with a mask, and compare them pair by pair."""
    from moesteer import runs, tracking
    from moesteer import scenario as scenarios
    from moesteer.backends.opening import opened, require_backend, require_engine
    from moesteer.evaluate.replies import ReplyCache
    from moesteer.evaluate.suite import chosen_suites
    from moesteer.evaluate.suite import evaluate as run
    from moesteer.mask import SteeringMask

    if split not in ("fit", "select", "test", "all"):
        raise UnknownNameError(
            f"no split {split!r}", where="--split", expected="fit, select, test, all", do="name one of these"
        )
    options = engine_options(engine_option)
    require_backend(backend, device=device, quantize=quantize, engine_options=options)
    require_engine(engine, workers=workers)
    tracking.require_tracker(track)
    show.quiet_transformers()
    whole = scenarios.with_data(scenarios.load(scenario), data_sources(data_source))
    part = chosen_suites(whole, suite or [])
    masks = [SteeringMask.load(path) for path in mask or []]
    strengths = show.strengths(alpha, masks=len(masks))
    data = scenarios.whole(part, limit=limit) if split == "all" else scenarios.splits(whole, seed=seed, limit=limit)
    plan: dict[str, Any] = {
        "model": model, "scenario": part.model_dump(mode="json"), "split": split,
        "masks": [one.sha256 for one in masks], "alphas": strengths, "seed": seed, "limit": limit,
        "data": runs.data_digest(data),
    }  # fmt: skip
    where = cast(scenarios.Split, split)
    with opened(
        model, backend=backend, engine=engine, workers=workers, masks=masks, alphas=strengths, dtype=dtype,
        device=device, quantize=quantize, engine_options=options, allow_other_checkpoint=allow_other_checkpoint,
    ) as loaded, tracking.recorded(
        track, run=out.name if out is not None else whole.name, settings=tracking.settings_of(model, plan)
    ) as recorder:  # fmt: skip
        contexts = {}
        if masks:
            contexts["steered"] = loaded.steered(
                masks, alphas=strengths, together=True, allow_other_checkpoint=allow_other_checkpoint
            )
        plan |= {
            "weights": loaded.weights_sketch, "router_sha256": loaded.fingerprint.router_sha256, "backend": backend,
            "engine_options": options, "dtype": loaded.dtype.removeprefix("torch."), "quantize": quantize,
        }  # fmt: skip
        replies = None
        if cache is not None:
            settings = {"backend": backend, "engine_options": options, "quantize": quantize, "device": device}
            replies = ReplyCache(cache, settings)
        found = run(
            loaded, part, data, where, steered=contexts, out=out, plan=plan, seed=seed, fresh=fresh, cache=replies,
            masks=masks,
        )  # fmt: skip
        recorder.results(found)
    if json:
        show.print_json(found)
        _require_nothing_forbidden(found["methods"])
        judges.require_scored(found["methods"])
        return
    table = Table(title=f"{whole.title}: {split} split, per cent with 95 % intervals")
    for column in ("metric", "n", "unsteered", *(["steered", "difference", "p"] if masks else [])):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, rate in found["methods"]["none"]["metrics"].items():
        cells = [name.replace("_", " "), str(rate["n"]), show.percent(rate)]
        if masks:
            after = found["methods"]["steered"]
            gap = after["vs_none"][name]
            moved = "-" if gap["difference"] is None else f"{100 * gap['difference']:+.1f} points"
            cells += [show.percent(after["metrics"][name]), moved, "-" if gap["p"] is None else f"{gap['p']:.2g}"]
        table.add_row(*cells)
    show.print_table(table)
    for line in judges.notes(found["methods"]):
        typer.echo(line)
    _require_nothing_forbidden(found["methods"])
    judges.require_scored(found["methods"])


def _require_nothing_forbidden(methods: dict[str, Any]) -> None:
    """Exit with 3 where replies held what the scenario forbids, or were not judged for it."""
    told = ", ".join(f"{name} {one['forbidden']}" for name, one in methods.items() if one.get("forbidden"))
    if told:
        typer.echo(f"check failed: replies that hold what is forbidden, or were not judged for it: {told}", err=True)
        raise typer.Exit(3)

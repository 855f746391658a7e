"""`moesteer evaluate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from moesteer.cli import show
from moesteer.cli.options import (
    Alphas,
    Backend,
    Device,
    Dtype,
    EngineOptions,
    Json,
    Limit,
    MaskFiles,
    ModelArgument,
    OtherCheckpoint,
    Quantize,
    Seed,
    engine_options,
)
from moesteer.errors import UnknownNameError


def evaluate(
    model: ModelArgument,
    scenario: Annotated[str, typer.Option(help="A built-in scenario or a .toml file.")] = "jailbreak-defense",
    suite: Annotated[
        list[str] | None, typer.Option(help="A suite of the scenario; repeat. Default: all.", show_default=False)
    ] = None,
    mask: MaskFiles = None,
    alpha: Alphas = None,
    split: Annotated[str, typer.Option(help="fit, select or test.")] = "test",
    out: Annotated[
        Path | None, typer.Option(help="Keep responses and results.json in this folder.", show_default=False)
    ] = None,
    seed: Seed = 0,
    limit: Limit = None,
    allow_other_checkpoint: OtherCheckpoint = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    backend: Backend = "hf",
    engine_option: EngineOptions = None,
    json: Json = False,
) -> None:
    """Play a scenario's suites, unsteered and with a mask, and compare them pair by pair."""
    from moesteer import runs
    from moesteer import scenario as scenarios
    from moesteer.backends.opening import opened, require_backend
    from moesteer.evaluate.suite import chosen_suites
    from moesteer.evaluate.suite import evaluate as run
    from moesteer.mask import SteeringMask

    if split not in ("fit", "select", "test"):
        raise UnknownNameError(
            f"no split {split!r}", where="--split", expected="fit, select, test", do="name one of these"
        )
    options = engine_options(engine_option)
    require_backend(backend, device=device, quantize=quantize, engine_options=options)
    show.quiet_transformers()
    whole = scenarios.load(scenario)
    part = chosen_suites(whole, suite or [])
    masks = [SteeringMask.load(path) for path in mask or []]
    strengths = show.strengths(alpha, masks=len(masks))
    data = scenarios.splits(whole, seed=seed, limit=limit)
    plan: dict[str, Any] = {
        "model": model, "scenario": part.model_dump(mode="json"), "split": split,
        "masks": [one.sha256 for one in masks], "alphas": strengths, "seed": seed, "limit": limit,
        "data": runs.data_digest(data),
    }  # fmt: skip
    where = cast(scenarios.Split, split)
    with opened(
        model, backend=backend, masks=masks, alphas=strengths, dtype=dtype, device=device, quantize=quantize,
        engine_options=options, allow_other_checkpoint=allow_other_checkpoint,
    ) as loaded:  # fmt: skip
        contexts = {}
        if masks:
            contexts["steered"] = loaded.steered(
                masks, alphas=strengths, together=True, allow_other_checkpoint=allow_other_checkpoint
            )
        plan["weights"] = loaded.weights_sketch
        if backend != "hf":  # whose plans, of earlier versions too, name none
            plan |= {"backend": backend, "engine_options": options, "dtype": loaded.dtype}
        found = run(loaded, part, data, where, steered=contexts, out=out, plan=plan, seed=seed)
    if json:
        show.print_json(found)
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

"""`moesteer generate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesteer.cli import show
from moesteer.cli.options import (
    Alphas,
    Backend,
    Device,
    Dtype,
    Engine,
    EngineOptions,
    Json,
    MaskFiles,
    ModelArgument,
    OtherCheckpoint,
    Quantize,
    Workers,
    engine_options,
)
from moesteer.errors import InputError


def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A user message; repeat for more conversations.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Conversations to answer instead: JSONL, JSON, CSV, Parquet.", show_default=False),
    ] = None,
    mask: MaskFiles = None,
    alpha: Alphas = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 128,
    allow_other_checkpoint: OtherCheckpoint = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    backend: Backend = "hf",
    engine_option: EngineOptions = None,
    engine: Engine = "local",
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Answer prompts greedily, steered by a mask or not; with a mask, both answers are shown."""
    from moesteer import conversations
    from moesteer.backends.opening import opened, require_backend, require_engine
    from moesteer.conversations import Message
    from moesteer.mask import SteeringMask
    from moesteer.side_by_side import answer

    if (prompt is None) == (data is None):
        raise InputError(
            "generate takes --prompt or --data",
            where="the command line",
            expected="one of the two",
            do='for example: moesteer generate lab-tiny --prompt "how do i paint a clay pot ?"',
        )
    options = engine_options(engine_option)
    require_backend(backend, device=device, quantize=quantize, engine_options=options)
    require_engine(engine, workers=workers)
    masks = [SteeringMask.load(path) for path in mask or []]
    strengths = show.strengths(alpha, masks=len(masks))
    show.quiet_transformers()
    asked = (
        [list(c.messages) for c in conversations.read(data)] if data else [[Message("user", p)] for p in prompt or []]
    )
    with opened(
        model, backend=backend, engine=engine, workers=workers, masks=masks, alphas=strengths, dtype=dtype,
        device=device, quantize=quantize, engine_options=options, allow_other_checkpoint=allow_other_checkpoint,
    ) as loaded:  # fmt: skip
        found = answer(
            loaded, asked, masks=masks, alphas=strengths, max_new_tokens=max_new_tokens,
            allow_other_checkpoint=allow_other_checkpoint,
        )  # fmt: skip
    if json:
        show.print_json(found.as_json())
        return
    for row in found.rows:
        typer.echo(f"user:      {row['prompt']}")
        typer.echo(f"unsteered: {row['unsteered']}" if masks else f"model:     {row['unsteered']}")
        if masks:
            typer.echo(f"steered:   {row['steered']}")
        typer.echo("")
    if found.receipt is not None:
        typer.echo(str(found.receipt), err=True)

"""`moesteer capture`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from moesteer.cli import show
from moesteer.cli.options import (
    Backend,
    Device,
    Dtype,
    EngineOptions,
    Json,
    ModelArgument,
    Quantize,
    engine_options,
)
from moesteer.errors import UnknownNameError


def capture(
    model: ModelArgument,
    data: Annotated[Path, typer.Argument(help="Conversations: JSONL, JSON, CSV or Parquet.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the trace.")],
    span: Annotated[
        list[str] | None,
        typer.Option(
            help="final_user, final_turn, prompt, response; repeat for more. Default: final_user.", show_default=False
        ),
    ] = None,
    level: Annotated[str, typer.Option(help="logits (and selections), or selected: expert ids only.")] = "logits",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many conversations.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    backend: Backend = "hf",
    engine_option: EngineOptions = None,
    json: Json = False,
) -> None:
    """Keep what the routers do on your conversations, in a trace on disk. Killed, it goes on where it was.

    The span `response` is each conversation's `reference`, put to the model word by word.
    """
    from moesteer import conversations, files
    from moesteer.backends.opening import opened, require_backend
    from moesteer.capturing import capture as to_trace

    if level not in ("logits", "selected"):
        raise UnknownNameError(
            f"no level {level!r}", where="--level", expected="logits, selected", do="name one of these"
        )
    kept = cast(Literal["logits", "selected"], level)
    options = engine_options(engine_option)
    require_backend(backend, device=device, quantize=quantize, engine_options=options)
    show.quiet_transformers()
    rows = conversations.read(data, limit=limit)
    with opened(
        model, backend=backend, capture=kept, dtype=dtype, device=device, quantize=quantize, engine_options=options
    ) as loaded:
        trace = to_trace(
            loaded, rows, out=out, level=kept,
            spans=tuple(span or ["final_user"]),  # type: ignore[arg-type]
        )  # fmt: skip
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    facts = {
        "trace": str(out), "sequences": len(trace.rows), "tokens": trace.manifest.tokens,
        "shards": trace.manifest.shards, "bytes": size,
        "sha256": files.sha256("".join(trace.manifest.shard_sha256).encode()),
    }  # fmt: skip
    if json:
        show.print_json(facts)
    else:
        typer.echo(f"{facts['sequences']} sequences, {facts['tokens']} tokens, {size / 1e6:.1f} MB in {out}")

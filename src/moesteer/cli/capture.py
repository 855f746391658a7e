"""`moesteer capture`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from moesteer.cli import show
from moesteer.cli.options import (
    Backend,
    DataSources,
    Device,
    Dtype,
    Engine,
    EngineOptions,
    Json,
    ModelArgument,
    Quantize,
    Workers,
    data_sources,
    engine_options,
)
from moesteer.conversations import Conversation
from moesteer.errors import InputError, UnknownNameError


def capture(
    model: ModelArgument,
    data: Annotated[
        str, typer.Argument(help="Conversations: JSONL, JSON, CSV or Parquet; or suite:NAME.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the trace.")],
    span: Annotated[
        list[str] | None,
        typer.Option(
            help="final_user, final_turn, prompt, response; repeat for more. Default: final_user.", show_default=False
        ),
    ] = None,
    level: Annotated[str, typer.Option(help="logits (and selections), or selected: expert ids only.")] = "logits",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many conversations.")] = None,
    data_source: DataSources = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    backend: Backend = "hf",
    engine_option: EngineOptions = None,
    engine: Engine = "local",
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Keep what the routers do on your conversations, in a trace on disk. Killed, it goes on where it was.

    The span `response` is each conversation's `reference`, put to the model word by word.
    """
    from moesteer import files
    from moesteer.backends.opening import opened, require_backend, require_engine
    from moesteer.capturing import capture as to_trace

    if level not in ("logits", "selected"):
        raise UnknownNameError(
            f"no level {level!r}", where="--level", expected="logits, selected", do="name one of these"
        )
    kept = cast(Literal["logits", "selected"], level)
    options = engine_options(engine_option)
    require_backend(backend, device=device, quantize=quantize, engine_options=options)
    require_engine(engine, workers=workers)
    show.quiet_transformers()
    rows = _conversations(data, data_sources(data_source), limit=limit)
    with opened(
        model, backend=backend, engine=engine, workers=workers, capture=kept, dtype=dtype, device=device,
        quantize=quantize, engine_options=options,
    ) as loaded:  # fmt: skip
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


def _conversations(data: str, sources: dict[str, str], *, limit: int | None) -> list[Conversation]:
    """A file's conversations, or those of `suite:NAME`, from where --data says if it does."""
    from moesteer import conversations, suites
    from moesteer.scenario import SUITE

    if not data.startswith(SUITE):
        if sources:
            raise InputError(
                "--data is for DATA that is suite:NAME",
                where="--data",
                expected="suite:NAME as DATA, or no --data",
                do="give the file itself as DATA",
            )
        return conversations.read(data, limit=limit)
    name = data.removeprefix(SUITE)
    if unknown := [one for one in sources if one != name]:
        raise UnknownNameError(f"no suite {', '.join(unknown)}", where="--data", expected=name, do="name this one")
    return suites.read(f"{name}={sources[name]}" if name in sources else name, limit=limit)

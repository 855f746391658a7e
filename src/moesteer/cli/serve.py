"""`moesteer serve`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from moesteer.cli import show
from moesteer.cli.options import ModelArgument, OtherCheckpoint

ADMIN_VARIABLE = "MOESTEER_ADMIN_TOKEN"


def serve(
    model: ModelArgument,
    engine: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTIONS", help="Options of `vllm serve`, after two dashes.", show_default=False),
    ] = None,
    pin: Annotated[
        list[Path] | None,
        typer.Option(help="A mask for every token of every request; repeat for more.", show_default=False),
    ] = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(help="Strength, once for each --pin. Default: the mask's own.", show_default=False),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of masks that a request may name one of.", show_default=False)
    ] = None,
    offer_alpha: Annotated[
        list[float] | None,
        typer.Option(help="Offer every mask of --masks at this strength too, as NAME.STRENGTH.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to answer on. Others than this machine need --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to answer on.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="File with a line NAME:KEY for each client.", show_default=False)
    ] = None,
    concurrent: Annotated[int, typer.Option(min=1, help="Requests at work for one key.")] = 8,
    queued: Annotated[int, typer.Option(min=0, help="Requests waiting for one key; more are refused (429).")] = 32,
    canary: Annotated[float, typer.Option(min=1, help="Seconds between two checks that the masks act.")] = 300,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a worker may take for one step.")] = 60,
    audit: Annotated[
        Path | None, typer.Option(help="Write the audit log to this file, not to the screen.", show_default=False)
    ] = None,
    allow_other_checkpoint: OtherCheckpoint = False,
    i_understand_unsafe: Annotated[
        bool, typer.Option("--i-understand-unsafe", help="Start in an environment that opens vLLM to others.")
    ] = False,
) -> None:
    """Serve a model behind an OpenAI-compatible API, with masks that no request can take off.

    A request may name one of --masks: {"vllm_xargs": {"moesteer_mask": "NAME"}}. MOESTEER_ADMIN_TOKEN in the
    environment opens /plugins/moesteer/status to its holder.
    """
    from moesteer.backends.sources import require_extra
    from moesteer.serve.policy import Limits
    from moesteer.serve.server import Serving
    from moesteer.serve.server import serve as run

    require_extra("vllm", "vllm", what="the server is vLLM's own", where="moesteer serve")
    pins = pin or []
    run(
        Serving(
            model=model, pins=tuple(pins), pin_alphas=tuple(show.strengths(alpha, masks=len(pins))), masks=masks,
            alphas=tuple(offer_alpha or ()), host=host, port=port, keys=keys,
            admin=os.environ.get(ADMIN_VARIABLE) or None, limits=Limits(concurrent=concurrent, queued=queued),
            canary_s=canary, timeout_s=timeout, audit=audit, allow_other_checkpoint=allow_other_checkpoint,
            unsafe=i_understand_unsafe, engine=tuple(engine or ()),
        )
    )  # fmt: skip

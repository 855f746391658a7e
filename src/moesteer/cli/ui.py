"""`moesteer ui`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesteer.cli import show
from moesteer.cli.options import Device, Dtype, OtherCheckpoint, Quantize


def ui(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model to offer; repeat. The first is loaded. Default: lab-tiny.", show_default=False),
    ] = None,
    mask: Annotated[
        list[Path] | None, typer.Option(help="A mask to offer, besides those of the runs; repeat.", show_default=False)
    ] = None,
    runs: Annotated[Path, typer.Option(help="The folder of runs to browse, and where audits are written.")] = Path(
        "runs"
    ),
    host: Annotated[str, typer.Option(help="Address to answer on. Others than this machine need --allow-remote.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to answer on; 0 is any that is free.")] = 7860,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Answer other machines, behind a token; nothing is encrypted.")
    ] = False,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
    allow_other_checkpoint: OtherCheckpoint = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
) -> None:
    """A page in the browser: chat with and without masks, see the routing, browse runs, start an audit. Offline."""
    from moesteer.ui.serving import Serving, as_models, go_offline, serve

    go_offline()
    show.quiet_transformers()
    shared = (f"--dtype={dtype}", f"--device={device}", *((f"--quantize={quantize}",) if quantize else ()))
    serve(
        Serving(
            models=as_models(model), masks=tuple(mask or ()), runs=runs, host=host, port=port,
            allow_remote=allow_remote, allow_other_checkpoint=allow_other_checkpoint, open_browser=not no_open,
            load_options={"dtype": dtype, "device": device, "quantize": quantize}, audit_options=shared,
        ),
        told=lambda text: typer.echo(text, err=True),
    )  # fmt: skip

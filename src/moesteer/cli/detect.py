"""`moesteer detect`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesteer.cli import show
from moesteer.cli.options import Device, Dtype, Json
from moesteer.errors import InputError


def detect(
    trace: Annotated[Path, typer.Argument(help="A trace made by `moesteer capture`.", show_default=False)],
    method: Annotated[str, typer.Option(help="See `moesteer methods`.")],
    out: Annotated[Path, typer.Option(help="File of the mask.")],
    toward: Annotated[str | None, typer.Option(help="Label of the wanted behaviour.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, NAME=VALUE; repeat.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Methods through the model: the model.", show_default=False)] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Methods through the model: conversations with responses in `reference`.", show_default=False
        ),
    ] = None,
    like: Annotated[Path | None, typer.Option(help="Controls: the mask to imitate.", show_default=False)] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Make a steering mask from a trace: which experts, and how strongly.

    Methods through the model (direct, attribution, causal) also need --model and --data.
    Responses of conversations labelled --toward are made likely, all others are kept.
    Controls (random and others) are made from another mask, --like.
    """
    from moesteer import conversations
    from moesteer.detecting import detect as make
    from moesteer.mask import SteeringMask

    show.quiet_transformers()
    loaded = None
    if model is not None:
        from moesteer.backends.loading import load

        loaded = load(model, dtype=dtype, device=device)
    mask = make(
        trace, method=method, toward=toward, settings=parse_settings(set_ or []), model=loaded,
        conversations=conversations.read(data) if data else (), like=SteeringMask.load(like) if like else None,
    )  # fmt: skip
    mask.save(out)
    if json:
        show.print_json({"mask": str(out), "sha256": mask.sha256, "experts": mask.expert_count})
    else:
        typer.echo(f"{mask.expert_count} experts in {out} (sha256 {mask.sha256[:12]}); see `moesteer mask show {out}`")


def parse_settings(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values are JSON where they parse as it (numbers, true, null), else text."""
    from moesteer.files import parse_json

    found: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(
                f"{pair!r} is not NAME=VALUE", where="--set", expected="for example --set on=10", do="write it so"
            )
        try:
            found[name] = parse_json(value)
        except ValueError:
            found[name] = value
    return found

"""`moesteer detect`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesteer.cli import show
from moesteer.cli.options import Device, Dtype, Json
from moesteer.errors import FileError, InputError


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
    What the method found out on the way (accuracies, a warning) is kept beside the mask, in OUT.facts.json.
    Killed, direct goes on from OUT.state with the same command; that file is removed at the end.
    """
    from moesteer import conversations, files
    from moesteer.detecting import detect_with_facts
    from moesteer.mask import SteeringMask

    _require_files(out)
    show.quiet_transformers()
    loaded = None
    if model is not None:
        from moesteer.backends.loading import load

        loaded = load(model, dtype=dtype, device=device)
    found = detect_with_facts(
        trace, method=method, toward=toward, settings=parse_settings(set_ or []), model=loaded,
        conversations=conversations.read(data) if data else (), like=SteeringMask.load(like) if like else None,
        state=beside(out, "state"),
    )  # fmt: skip
    mask, facts = found.mask, files.plain(found.facts)
    mask.save(out)
    about = {"schema": 1, "method": mask.info.method, "mask_sha256": mask.sha256, "facts": facts}
    files.write_json(beside(out, "facts.json"), about)
    if isinstance(facts.get("warning"), str):
        typer.echo(f"warning: {facts['warning']}", err=True)
    if json:
        show.print_json({"mask": str(out), "sha256": mask.sha256, "experts": mask.expert_count, "facts": facts})
        return
    typer.echo(f"{mask.expert_count} experts in {out} (sha256 {mask.sha256[:12]}); see `moesteer mask show {out}`")
    for line in in_words(facts):
        typer.echo(line)


def beside(out: Path, ending: str) -> Path:
    """The file of the mask's own name with an ending added."""
    return out.with_name(f"{out.name}.{ending}")


def _require_files(out: Path) -> None:
    """Raise FileError where --out, or what is kept beside it, is a folder: before the work, not after it."""
    if out.is_dir() or beside(out, "facts.json").is_dir():
        raise FileError(
            "the name of a file is that of a folder",
            where=f"--out {out}",
            expected="a file for the mask, and OUT.facts.json for what was found out on the way",
            do="choose another --out",
        )


ACCURACIES = {
    "surrogate_held_out_accuracy": "surrogates", "length_only_accuracy": "number of tokens",
    "bag_of_words_accuracy": "words alone", "majority_accuracy": "more frequent class",
}  # fmt: skip
"""Facts of methods that fit a surrogate, and what each is the held-out accuracy of."""


def in_words(facts: dict[str, Any]) -> list[str]:
    """A line for each fact that says how far the mask can be believed; no line where there is none."""
    lines = []
    accuracies = [(said, facts[name]) for name, said in ACCURACIES.items() if name in facts]
    if accuracies:
        shares = [f"{said} {f'{100 * one:.0f} %' if isinstance(one, int | float) else '-'}" for said, one in accuracies]
        lines.append(f"held-out accuracy: {', '.join(shares)}")
    if "ended_by" in facts:
        lines.append(f"ended by: {facts['ended_by']}")
    return lines


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

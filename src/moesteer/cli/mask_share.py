"""`moesteer mask push|pull`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesteer.cli import show
from moesteer.cli.options import Json
from moesteer.errors import InputError


def push(
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="A mask file.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="ORG/NAME on the Hub.", show_default=False)],
    run: Annotated[
        Path,
        typer.Option(help="The finished run that evaluated the mask: the card is made from it.", show_default=False),
    ],
    licence: Annotated[str, typer.Option("--license", help="Of the mask; an identifier of the Hub.")] = "apache-2.0",
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and upload nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload what is shown.")] = False,
    json: Json = False,
) -> None:
    """Publish a mask with its card: only with a safety evaluation, and never one that lowers refusals of harm."""
    from moesteer import sharing

    upload = sharing.prepared(mask, repo, run=run, licence=licence, private=private)
    sizes = {name: len(data) for name, data in upload.files.items()}
    if dry_run or not json:
        _show(upload.files[sharing.CARD].decode("utf-8"), json=json)
        typer.echo(
            f"to {upload.repo} ({'private' if private else 'public'}, licence {licence}): "
            + ", ".join(f"{name} ({size:,} bytes)" for name, size in sizes.items())
            + f"; mask sha256 {upload.sha256}",
            err=json,
        )
    if dry_run:
        if json:
            show.print_json({"repo": upload.repo, "files": sizes, "sha256": upload.sha256, "uploaded": False})
        return
    if not yes:
        raise InputError(
            "nothing was uploaded: --yes is missing",
            where="moesteer mask push",
            expected="--yes, once you have read what would be published",
            do="add --yes to upload this, or --dry-run to look only",
        )
    done = sharing.push(upload)
    if json:
        show.print_json({"repo": done.repo, "commit": done.commit, "url": done.url, "files": sizes,
                         "sha256": done.sha256, "uploaded": True})  # fmt: skip
        return
    typer.echo(f"uploaded to {done.url}, commit {done.commit}")
    typer.echo(f"others pull it with: moesteer mask pull {done.repo}@{done.commit} --sha256 {done.sha256}")


def _show(card: str, *, json: bool) -> None:
    """The card as it would be published, with nothing in it that a terminal acts on."""
    typer.echo("".join(c if c.isprintable() or c == "\n" else " " for c in card), err=json)


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO[@REVISION]", help="ORG/NAME on the Hub.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: NAME.safetensors.", show_default=False)
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="Take only the mask of this sha256.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Download a mask, at most 16 MiB, and keep it only if every check holds."""
    from moesteer import sharing

    done = sharing.pull(repo, out=out, sha256=sha256)
    if not done.pinned:
        typer.echo(
            f"warning: {repo} is not pinned and can change; pin it: {done.repo}@{done.commit}"
            + ("" if sha256 else f" --sha256 {done.sha256}"),
            err=True,
        )
    if json:
        show.print_json({"mask": str(done.path), "source": str(done.source), "repo": done.repo, "commit": done.commit,
                         "revision": done.revision, "pinned": done.pinned, "sha256": done.sha256})  # fmt: skip
        return
    typer.echo(f"{done.path}: sha256 {done.sha256}")
    typer.echo(f"from {done.repo} at {done.commit}, recorded in {done.source}")
    typer.echo("what it is for: `moesteer mask show`; whether it fits your model: `moesteer mask check --model`")

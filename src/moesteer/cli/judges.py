"""`moesteer judges`, and what tables of results say of the judging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import typer
from rich.table import Table

from moesteer.cli import show
from moesteer.cli.options import Json

PHRASES: Mapping[str, str] = {
    "refusal": "whether a reply refuses, or holds what an attack is after",
    "content": "whether a reply holds the reference",
    "exact": "whether a reply says the reference and nothing else",
}


def judges(json: Json = False) -> None:
    """The kinds of judge for a scenario's judge tables: what each looks for, its licence, and its known faults."""
    from moesteer.judges.settings import ENDPOINT
    from moesteer.judges.table import GUARDS

    rows: dict[str, dict[str, Any]] = {
        kind: {"kind": kind, "title": "phrases", "judges": what, "reads": "words", "faults": "knows its phrases only"}
        for kind, what in PHRASES.items()
    }
    kept = ("kind", "title", "model", "architecture", "licence", "citation", "judges", "reads", "faults")
    rows |= {kind: {key: asdict(row)[key] for key in kept} for kind, row in GUARDS.items()}
    rows[ENDPOINT] = {
        "kind": ENDPOINT, "title": "OpenAI-compatible endpoint", "judges": "harm, or rightness against the reference",
        "reads": '{"verdict", "reason"} and nothing else', "faults": "those of the model behind it",
    }  # fmt: skip
    if json:
        show.print_json(rows)
        return
    table = Table(title="kinds of judge (docs/judges.md)", show_lines=True)
    for column in ("kind", "model", "licence", "looks for", "answer", "known faults"):
        table.add_column(column, overflow="fold")
    for row in rows.values():
        told = (row.get("model", "-"), row.get("licence", "-"), row["judges"], row["reads"], row["faults"])
        table.add_row(row["kind"], *told)
    show.print_table(table)


def notes(methods: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines below a table of results: what no judge could score and why, and how far several judges agree."""
    for method, entry in methods.items():
        for suite, found in entry.get("suites", {}).items():
            if reasons := found.get("unscored_reasons"):
                told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
                yield f"unscored:  {method}, {suite}: {found['unscored']} ({told})"
            agreed = found.get("agreement", {})
            for pair in agreed.get("pairs", ()):
                numbers = f"n {pair['n']}"
                if pair["raw"] is not None:
                    kappa = "not defined" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
                    numbers = f"{100 * pair['raw']:.1f} % the same, Cohen's kappa {kappa}, {numbers}"
                yield f"agreement: {method}, {suite}: {' and '.join(pair['judges'])}: {numbers}"
            if (alpha := agreed.get("alpha")) is not None:
                yield f"agreement: {method}, {suite}: Krippendorff's alpha of all {alpha:.2f}"


def require_scored(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """End the command with exit code 3 where no reply of a suite was scored: there is no number to show for it."""
    empty = [
        f"{method}, {suite}"
        for method, entry in methods.items()
        for suite, found in entry.get("suites", {}).items()
        if found["unscored"] and not found["n"]
    ]
    if empty:
        typer.echo(f"check failed: no reply was scored ({'; '.join(empty)})", err=True)
        raise typer.Exit(3)

"""Write docs/cli.md from the commands' own --help; with --check, fail when it is out of date."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.update({"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"})

from typer.main import get_command
from typer.testing import CliRunner

from moesteer.cli.main import app

PAGE = Path(__file__).parent / "cli.md"
TOP = "# Command line\n\nMade by `make docs` from `--help`; do not edit.\n"


def paths(command: object, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and subcommand, in the order --help lists them."""
    found = [before]
    for name, inner in getattr(command, "commands", {}).items():
        found += paths(inner, (*before, name))
    return found


def page() -> str:
    """The whole page."""
    parts = [TOP]
    for path in paths(get_command(app)):
        output = CliRunner().invoke(app, [*path, "--help"], prog_name="moesteer").output
        text = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
        parts.append(f"## moesteer {' '.join(path)}".rstrip() + f"\n\n```\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    made = page()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text("utf-8") != made:
            sys.exit("docs/cli.md is out of date: run `make docs`")
    else:
        PAGE.write_text(made, "utf-8")

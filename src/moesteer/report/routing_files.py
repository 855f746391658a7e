"""routing.json: one conversation's selections, token by token, without a mask and with it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from moesteer.errors import FileError
from moesteer.report.run_files import Part, read_checked

ROUTING = "routing.json"


class Token(Part):
    """A token as text, and whether it is of the prompt or of the response."""

    text: str
    part: Literal["prompt", "response"]


class Routed(Part):
    """One text read twice. before, after: experts selected [T, L, K], layers in the order of /layers.

    reply_of: whose reply it ends in. left_out: tokens before the first that is shown, and after the last.
    """

    reply_of: str
    tokens: list[Token]
    left_out: tuple[int, int] = (0, 0)
    before: list[list[list[int]]]
    after: list[list[list[int]]]


class Shown(Part):
    """Which conversation it is."""

    id: str
    suite: str
    tactic: str | None = None
    chosen: str = ""


class Routing(Part):
    """routing.json, schema 1. not_shown: why there is none, in a sentence; then there is no text."""

    schema_version: Literal[1] = Field(alias="schema")
    kind: Literal["routing"]
    not_shown: str | None = None
    name: str | None = None
    conversation: Shown | None = None
    layers: list[int] = Field(default_factory=list)
    experts: int = 0
    top_k: int = 0
    texts: list[Routed] = Field(default_factory=list)


def read_routing(run: Path) -> Routing | None:
    """routing.json of a run, or None when it is missing. Raises FileError."""
    path = Path(run) / ROUTING
    if not path.exists():
        return None
    found = read_checked(path, Routing)
    for index, text in enumerate(found.texts):
        for side, name in ((text.before, "before"), (text.after, "after")):
            shapes = {(len(row), *{len(layer) for layer in row}) for row in side}
            if len(side) != len(text.tokens) or shapes - {(len(found.layers), found.top_k)}:
                raise FileError(
                    "selections that do not fit the tokens",
                    where=f"{path} /texts/{index}/{name}",
                    expected=f"{len(text.tokens)} tokens, {len(found.layers)} layers, {found.top_k} experts each",
                    do="run the same command again; do not edit the file by hand",
                )
    return found

"""What a row of the table of named suites holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]
_COMMIT = re.compile(r"[0-9a-f]{40}")
Mapper = Callable[[Mapping[str, Any], str], list[Row]]
"""convert(row, where): conversations of our own format without ids; none for a row that the suite leaves out."""

KINDS = (".csv", ".json", ".jsonl", ".ndjson", ".parquet", "a folder saved by datasets", "a copy of the Hub's folder")
"""What a local copy of any suite may be. What is compressed is to be unpacked first."""
UNKNOWN = "unknown"
"""Of a licence or size that no public page was found to state."""


@dataclass(frozen=True)
class Hub:
    """What `datasets.load_dataset` is given. id: of the Hub, or "json" for a file at an address (`files`).

    revision: a commit; None is unpinned. files: pattern inside the repository. gated: whether its conditions have to
    be accepted first; None where we do not know. home: the page of a data set that is not on the Hub.
    """

    id: str
    split: str
    config: str | None = None
    revision: str | None = None
    files: str | None = None
    gated: bool | None = None
    home: str | None = None

    @property
    def page(self) -> str:
        """The data set's page."""
        return self.home or f"https://huggingface.co/datasets/{self.id}"

    @property
    def pinned(self) -> bool:
        """Whether it is named by a commit, which cannot change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True)
class NamedSuite:
    """One suite. Facts are from the data set's own page or paper; what was not found there says so.

    measures: in a sentence. columns: what a local table must have (alternatives with "or"). rows: of the data as
    `load` reads it by default; None where that is not known, and then `about` says what is. harmful: whether its text
    is harmful (it is never printed). judge, metrics: of the scenario suite; always runnable. model_judge: kind of the
    judge model the field uses on it, None where phrases or references decide. one_per_group: keep a request once.
    pairs: rows come in labelled twos, to detect from rather than to evaluate: the span whose tokens are compared.
    """

    name: str
    title: str
    measures: str
    hub: Hub
    columns: str
    licence: str
    citation: str
    rows: int | None
    harmful: bool
    convert: Mapper
    judge: Literal["refusal", "content", "exact"]
    metrics: tuple[str, ...]
    model_judge: str | None = None
    one_per_group: bool = False
    pairs: Literal["response", "final_user"] | None = None
    note: str = ""
    about: str = ""

    @property
    def source(self) -> str:
        """Where the data comes from, and whether that is pinned."""
        hub = self.hub
        parts = (hub.files,) if hub.home is not None else (hub.id, hub.config, hub.split)
        return f"{'/'.join(part for part in parts if part)} @ {hub.revision or 'unpinned'}"

    @property
    def command(self) -> str:
        """The command that runs it."""
        if self.pairs is not None:
            return f"moesteer capture MODEL suite:{self.name} --span {self.pairs} --out TRACE"
        return f"moesteer evaluate MODEL --scenario suite:{self.name} --split all"

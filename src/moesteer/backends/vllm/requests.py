"""Where a request meets the catalogue: its mask id becomes a row, and the row salts its cache.

In vLLM's front end (`InputProcessor.process_inputs`), which every request of every API passes. A client may name a mask
id and nothing else; what it says of rows is thrown out here, and what comes out is checked again in the engine's core.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moesteer.backends.vllm.catalogue import Catalogue, Row
from moesteer.errors import InputError

MASK = "moesteer_mask"
"""What a request may say: `SamplingParams(extra_args={"moesteer_mask": ID})`, over HTTP `vllm_xargs`."""
ROW = "moesteer_row"
READ = "moesteer_read"
TICKET = "moesteer_ticket"
"""What only this package says: the row's name; that the request's positions are to be read (Reading); a Ticket."""
OURS = "moesteer"
"""Every key that begins so is ours."""


@dataclass(frozen=True)
class Reading:
    """What to read of a request's positions, all from vLLM's workers: gate scores (spans of the pools' parts), a trace.

    name: under which it is fetched. final_turn: where the last user message begins; -1, where nobody knows.
    spans: half-open ranges of positions whose logits are kept.
    """

    name: str
    prompt: int
    final_turn: int = -1
    spans: tuple[tuple[int, int], ...] = ()
    gate: bool = False


@dataclass(frozen=True)
class Ticket:
    """What this package says of a request it makes itself. row: its gates were asked, or it is a probe."""

    row: str
    reading: Reading | None = None


_tickets: dict[str, Ticket] = {}


@contextmanager
def tickets(wanted: Sequence[Ticket]) -> Iterator[list[dict[str, str]]]:
    """Extra arguments, one each, with which requests made in the block take these rows.

    A ticket is a random number that never leaves the process: no client can write one.
    """
    numbers = [secrets.token_hex(16) for _ in wanted]
    _tickets.update(zip(numbers, wanted, strict=True))
    try:
        yield [{TICKET: number} for number in numbers]
    finally:
        for number in numbers:
            _tickets.pop(number, None)


def requested(extra_args: Mapping[str, Any] | None) -> str | None:
    """The mask id a request names. Raises InputError for anything else under our names."""
    ours = {key: value for key, value in (extra_args or {}).items() if str(key).lower().startswith(OURS)}
    if isinstance(ticket := ours.get(TICKET), str) and ticket in _tickets:
        del ours[TICKET]
    named = ours.pop(MASK, None)
    if ours or not isinstance(named, str | None):
        raise InputError(
            f"a request may not say {next(iter(ours), MASK)!r}"[:120] + ("" if ours else " but as a mask id"),
            where="the request's extra arguments",
            expected=f"{MASK} with a mask id, or nothing of ours",
            do="take it out",
        )
    return named


def row_for(catalogue: Catalogue, extra_args: Mapping[str, Any] | None) -> Row:
    """The row of a request as it comes in. Raises InputError for what it may not say, or a gate nobody asked."""
    named = requested(extra_args)
    if (ticket := _ticket(extra_args)) is not None:
        return catalogue.by_name[ticket.row]
    acting = catalogue.acting(named)
    if any(member.mask.gated for member in acting):
        raise InputError(
            "a gated mask acts on requests whose gate was asked, and this one's was not",
            where="a request made past moesteer's own engine classes",
            expected="requests through `moesteer serve`, or moesteer.backends.vllm.loading.load",
            do="use one of these; or serve the mask without its gate (`moesteer mask compose`, with_gate(None, None))",
        )
    return catalogue.row(acting)


def _ticket(extra_args: Mapping[str, Any] | None) -> Ticket | None:
    number = (extra_args or {}).get(TICKET)
    return _tickets.get(number) if isinstance(number, str) else None


def salted(row: Row, salt: str | None) -> str:
    """The key of a request's prefix cache: what steers it, then what the client gave, which so reaches no other's."""
    return f"{OURS}:{row.digest}:{salt or ''}"


def mark(request: Any, row: Row) -> None:
    """Put the row into a request (an EngineCoreRequest) on its way to the engine's core."""
    params = request.sampling_params
    if params is None:
        raise InputError(
            "a steered engine answers prompts only",
            where="a request for embeddings or scores",
            expected="a request to generate",
            do="serve the model unsteered for that",
        )
    ticket = _ticket(params.extra_args)
    extra = {key: value for key, value in (params.extra_args or {}).items() if key not in (MASK, TICKET)}
    extra[ROW] = row.name
    if ticket is not None and (reading := ticket.reading) is not None:
        extra[READ] = {
            "name": reading.name, "prompt": reading.prompt, "final_turn": reading.final_turn,
            "spans": [list(span) for span in reading.spans], "gate": reading.gate,
        }  # fmt: skip
    params.extra_args = extra
    request.cache_salt = salted(row, request.cache_salt)


def require_marked(catalogue: Catalogue, request: Any) -> None:
    """In the engine's core: raise InputError for a request that did not come by `mark`, or with another cache key."""
    extra = (request.sampling_params.extra_args if request.sampling_params is not None else None) or {}
    row = catalogue.by_name.get(str(extra.get(ROW)))
    if row is None or not str(request.cache_salt or "").startswith(f"{OURS}:{row.digest}:"):
        raise InputError(
            "a request reached the engine without the row that steers it",
            where=f"request {request.request_id}",
            expected="requests that came by this plug-in's front end",
            do="install moesteer, the same version, in the front end too",
        )


def row_of(catalogue: Catalogue, extra_args: Mapping[str, Any] | None) -> Row:
    """In a worker: the row of a scheduled request. Raises KeyError for one without."""
    return catalogue.by_name[(extra_args or {})[ROW]]

"""Gates in vLLM: a request of their own reads the prompt unsteered, and its scores say which masks act on the real one.

A gate is linear in the router logits, so workers add up one number per gate part and position and keep no logits. The
prompt is read without its prefix cache (every position's logits are wanted) and fills the unsteered cache; where the
gate stays shut the real request finds all of it there.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from moesteer import gate
from moesteer.backends.vllm.catalogue import RAW, Catalogue, Member, Row
from moesteer.backends.vllm.requests import Reading, Ticket
from moesteer.errors import NanLogitsError, NoEffectError


def needs_gate(members: Sequence[Member]) -> bool:
    """Whether a gate has to decide before these masks act."""
    return any(member.mask.gated for member in members)


def needs_final_turn(members: Sequence[Member]) -> bool:
    """Whether a gate reads the final turn on its own, so that somebody must know where it begins."""
    infos = [member.mask.info.gate for member in members]
    return any(info is not None and "final_turn" in gate.parts(info.pool) for info in infos)


def probe(*, prompt: int, final_turn: int | None) -> Ticket:
    """The ticket of the request that reads a prompt of so many tokens. final_turn: where the last message begins."""
    name = secrets.token_hex(8)
    return Ticket(RAW, Reading(name, prompt, -1 if final_turn is None else final_turn, gate=True))


def decided(
    catalogue: Catalogue, members: Sequence[Member], sums: Sequence[Sequence[float] | str], *, ticket: Ticket
) -> Row:
    """The row of the real request. sums: of each pipeline rank, as its worker gives them (worker.Steered.scores).

    Raises NoEffectError where a worker did not read the whole prompt, NanLogitsError for scores that are not finite.
    """
    reading = ticket.reading
    assert reading is not None
    broken = [found for found in sums if isinstance(found, str)]
    if broken or not sums:
        raise NoEffectError(
            "a gate's pass over the prompt was not whole, so that it cannot decide",
            where=broken[0] if broken else "no worker answered",
            expected="every position of the prompt, read by every worker",
            do="try again; report it if it comes back",
        )
    total_G = np.sum([np.asarray(found, dtype=np.float64) for found in sums], axis=0)
    if not np.isfinite(total_G).all():
        raise NanLogitsError(
            "router logits are not finite, so that no gate can decide",
            where=f"a prompt of {reading.prompt} tokens",
            expected="finite numbers",
            do="check the weights and the dtype: float16 overflows where bfloat16 does not",
        )
    turn = None if reading.final_turn < 0 else (reading.final_turn, reading.prompt)
    scores: dict[str, float] = {}
    for (member, part, _), total in zip(catalogue.gate_parts(), total_G, strict=True):
        low, high = gate.pooled_span(part, prompt=(0, reading.prompt), final_turn=turn)
        scores[member.name] = scores.get(member.name, 0.0) + float(total) / (high - low)
    return catalogue.row([member for member in members if _open(member, scores)])


def _open(member: Member, scores: dict[str, float]) -> bool:
    info = member.mask.info.gate
    return info is None or gate.opens(info, scores[member.name])

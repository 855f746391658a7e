"""Answers without and with a mask, side by side: what `moesteer generate` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moesteer.backends.protocol import Steers
from moesteer.conversations import Message
from moesteer.errors import NoEffectError
from moesteer.mask import SteeringMask
from moesteer.models.steering import Receipt


@dataclass(frozen=True)
class Answers:
    """rows: prompt, unsteered, and steered where a mask was given. receipt: what steering did."""

    rows: list[dict[str, Any]]
    receipt: Receipt | None

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {"answers": self.rows, "receipt": asdict(self.receipt) if self.receipt else None}


def answer(
    model: Steers,
    conversations: Sequence[Sequence[Message]],
    *,
    masks: Sequence[SteeringMask] = (),
    alphas: Sequence[float | None] | None = None,
    max_new_tokens: int = 128,
    allow_other_checkpoint: bool = False,
) -> Answers:
    """Greedy answers to every conversation, without the masks and with all of them at once.

    Raises NoEffectError when masks that were to act (alpha not 0, gate not shut) changed no selection.
    """
    plain = model.generate(conversations, max_new_tokens=max_new_tokens, title="unsteered")
    rows: list[dict[str, Any]] = [
        {"prompt": messages[-1].content, "unsteered": made.text}
        for messages, made in zip(conversations, plain, strict=True)
    ]
    if not masks:
        return Answers(rows, None)
    with model.steered(masks, alphas=alphas, together=True, allow_other_checkpoint=allow_other_checkpoint) as receipt:
        steered = model.generate(conversations, max_new_tokens=max_new_tokens, title="steered")
    if receipt.did_nothing:
        strengths = ", ".join(f"{alpha:g}" for alpha in receipt.alphas)
        raise NoEffectError(
            f"the masks changed none of {receipt.checked} selections at alpha {strengths}",
            where=f"{len(rows)} conversations on {model.name}",
            expected="some selections to change",
            do="raise --alpha, or check the mask with `moesteer mask check --model`",
        )
    for row, made in zip(rows, steered, strict=True):
        row["steered"] = made.text
    return Answers(rows, receipt)

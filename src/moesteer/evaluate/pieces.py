"""Pieces: how much is played before it is written down, and what happens where a piece cannot be played.

Which conversations make up a piece is fixed by the input alone, never by a clock: a reply may depend on what it was
batched with, and a run that was killed must end as one that was not. A piece is small by count and by tokens to be
made; where it takes long all the same, its replies are kept after each turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.backends.protocol import Generates
from moesteer.conversations import Conversation, to_row
from moesteer.errors import FileError, NanLogitsError
from moesteer.evaluate.play import Played, play
from moesteer.judges.channels import Format
from moesteer.memory import HALVINGS, give_back_memory, is_out_of_memory, too_little_memory

CONVERSATIONS = 256
"""Of a piece, at most."""
NEW_TOKENS = 16_384
"""Of a piece, for each of its turns: conversations x longest reply. A backend that answers more at once has its own
`new_tokens_at_once`."""
SAVE_EVERY_S = 20.0
"""A piece that is played for longer is kept turn by turn."""
FAULTS_IN_A_ROW = 3
"""Requests that may fail one after the other; then the run stops."""


@dataclass(frozen=True)
class Unplayed:
    """A conversation to which the model gave no reply that can be trusted, and why: unscored, never zero."""

    conversation: Conversation
    fault: str

    def as_row(self, suite: str) -> dict[str, Any]:
        """A line of responses/NAME.jsonl, with `fault`."""
        c = self.conversation
        return {
            "id": c.id, "suite": suite, "group": c.group, "tactic": c.tactic, "split": c.split,
            "messages": [{"role": m.role, "content": m.content} for m in c.messages], "response": "",
            "verdict": "unscored", "success": None, "reference": c.reference, "fault": self.fault,
        }  # fmt: skip


def pieces(
    model: Generates, conversations: Sequence[Conversation], *, max_new_tokens: int
) -> Iterator[list[Conversation]]:
    """The conversations in order, in pieces. The same input and backend give the same pieces."""
    most = int(getattr(model, "new_tokens_at_once", NEW_TOKENS))
    size = max(1, min(CONVERSATIONS, most // max_new_tokens))
    for start in range(0, len(conversations), size):
        yield list(conversations[start : start + size])


@dataclass
class Player:
    """Plays pieces of one suite in order. partial: where the turns of a long piece are kept; None: nowhere."""

    model: Generates
    turns: bool
    max_new_tokens: int
    partial: Path | None = None
    reasoning: Format = "auto"
    _faults: list[str] = field(default_factory=list)

    def play(self, piece: Sequence[Conversation]) -> list[Played | Unplayed]:
        """Every conversation of the piece, in order.

        Where logits are not finite the piece is halved until it is known whose, and that one is Unplayed. Raises
        NanLogitsError after FAULTS_IN_A_ROW of them in a row, OutOfMemoryError where an eighth of the piece is too
        large, and what the model raises.
        """
        saved = _Saved(self.partial, self._digest(piece))
        return self._part(piece, saved.read(), saved, HALVINGS)

    def _digest(self, piece: Sequence[Conversation]) -> str:
        told = [self.turns, self.max_new_tokens, [to_row(c) for c in piece]]
        return files.sha256(files.dumps(told, indent=None).encode("utf-8"))

    def _part(
        self, part: Sequence[Conversation], so_far: Sequence[Sequence[Any]], saved: _Saved | None, halvings: int
    ) -> list[Played | Unplayed]:
        try:
            played = play(
                self.model, part, turns=self.turns, max_new_tokens=self.max_new_tokens, so_far=so_far,
                each_turn=saved.turn if saved is not None else None, reasoning=self.reasoning,
            )  # fmt: skip
        except NanLogitsError as error:
            if len(part) == 1:
                return [self._failed(part[0], error)]
            crowded = False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not halvings or len(part) == 1:
                what = f"{len(part)} conversations, {part[0].id} to {part[-1].id}"
                raise too_little_memory(error, what=what) from error
            crowded, halvings = True, halvings - 1
        else:
            self._faults.clear()
            return list(played)
        if crowded:
            give_back_memory()  # out here, where no traceback holds the tensors
        half = (len(part) + 1) // 2
        first = self._part(part[:half], so_far[:half], None, halvings)
        return first + self._part(part[half:], so_far[half:], None, halvings)

    def _failed(self, conversation: Conversation, error: NanLogitsError) -> Unplayed:
        self._faults.append(conversation.id)
        if len(self._faults) >= FAULTS_IN_A_ROW:
            raise NanLogitsError(
                f"{FAULTS_IN_A_ROW} requests in a row failed: {error.what}",
                where=f"conversations {', '.join(self._faults)}",
                expected="finite logits",
                do="check the model's weights, the mask's strength, or load it with another --dtype",
            ) from error
        return Unplayed(conversation, f"{error.what} ({error.where})")


@dataclass(frozen=True)
class _Said:
    """A reply that an earlier try made: what play reads of a backend's generation."""

    text: str
    finished: bool


class _Saved:
    """The replies of a piece that is being played, in one small file that is replaced whole."""

    def __init__(self, path: Path | None, digest: str) -> None:
        self.path, self.digest, self._last_s = path, digest, time.monotonic()

    def read(self) -> list[list[Any]]:
        """Replies by conversation, as far as they were kept; none where the file is of another piece, or damaged."""
        if self.path is None or not self.path.exists():
            return []
        try:
            found = files.read_json(self.path)
            if found["piece"] != self.digest or found["sha256"] != _digest_of(found["replies"]):
                return []
            return [[_Said(str(text), bool(finished)) for text, finished in told] for told in found["replies"]]
        except (FileError, TypeError, KeyError, ValueError):  # it is only a saving: the piece is played again
            return []

    def turn(self, replies: Sequence[Sequence[Any]]) -> None:
        """Keep what was said, if that is long ago."""
        if self.path is None or time.monotonic() - self._last_s < SAVE_EVERY_S:
            return
        told = [[[reply.text, reply.finished] for reply in made] for made in replies]
        files.write_json(self.path, {"piece": self.digest, "replies": told, "sha256": _digest_of(told)})
        self._last_s = time.monotonic()


def _digest_of(replies: Any) -> str:
    return files.sha256(files.dumps(replies, indent=None).encode("utf-8"))

"""What every judge is given, what it gives back, and what it is called.

Verdicts: refused, complied, deflected (neither refuses nor gives what was asked), correct, wrong, broken (no coherent
answer: empty, cut off while it still reasoned, repeating itself), unscored (the judge failed). A judge that fails is
never a score of zero: its reply is counted as unscored, with the reason, and averaged nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moesteer import files
from moesteer.conversations import Conversation, Message

Verdict = Literal["refused", "complied", "deflected", "correct", "wrong", "broken", "unscored"]


@dataclass(frozen=True)
class Reply:
    """One reply of the model: its answer, and whether the model ended it itself.

    raw: the whole text as generated, where reasoning was taken out of it to get the answer; else None.
    """

    text: str
    finished: bool
    raw: str | None = None


@dataclass(frozen=True)
class Item:
    """A played conversation: `messages` as they went, to the last user turn; every reply made, the last at the end."""

    conversation: Conversation
    messages: tuple[Message, ...]
    replies: tuple[Reply, ...]

    @property
    def seen(self) -> str:
        """sha256 of all that a judge can see of it: one half of the key of the verdict cache."""
        value = {
            "messages": [[m.role, m.content] for m in self.messages],
            "replies": [[r.text, r.finished] for r in self.replies],
            "reference": self.conversation.reference,
            "group": self.conversation.group,
        }
        # \ud800 can be in a reply and not in UTF-8
        return files.sha256(files.dumps(value, indent=None).encode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class Judgement:
    """A verdict, and by which judge.

    reason: of an unscored one `CODE: what happened`, counted by CODE; else what the judge said for it, if anything.
    category: of the judge's own list (Llama Guard's S1 to S14, ...), whatever the verdict; None where it named none.
    """

    verdict: Verdict
    by: str
    reason: str | None = None
    category: str | None = None

    @property
    def scored(self) -> bool:
        """Whether the judge came to a verdict."""
        return self.verdict != "unscored"


class Judge(Protocol):
    """A judge of one kind. Whatever goes wrong with one item is its Unscored verdict, never an exception."""

    @property
    def name(self) -> str:
        """What rows and results call it."""

    @property
    def identity(self) -> str:
        """sha256 of everything that decides its verdicts: kind, model, revision, prompt, options."""

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement for each item, in order."""

    def close(self) -> None:
        """Give back what it holds: a model, an engine, connections."""


def unscored(code: str, what: str, *, by: str) -> Judgement:
    """The judgement of a judge that failed. code: one word that results count; what: for a person to read."""
    return Judgement("unscored", by, f"{code}: {what}"[:300])


def reason_code(reason: str | None) -> str:
    """The one word of an unscored verdict's reason."""
    return (reason or "not said").partition(":")[0]

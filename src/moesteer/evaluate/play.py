"""Playing conversations: the model's own replies stay in the context, and a judge says what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesteer.backends.protocol import Generates
from moesteer.conversations import Conversation, Message
from moesteer.judges import Item, JudgeKind, Judging, Reply, Verdict
from moesteer.judges.channels import Format, Reader


@dataclass(frozen=True)
class Played:
    """A conversation as it went: its messages end in the last user turn, `replies` holds every reply made."""

    conversation: Conversation
    messages: tuple[Message, ...]
    replies: tuple[Reply, ...]

    @property
    def response(self) -> str:
        """The last reply."""
        return self.replies[-1].text

    @property
    def item(self) -> Item:
        """What judges are given."""
        return Item(self.conversation, self.messages, self.replies)

    def as_row(
        self, suite: str, verdict: Verdict, *, success: bool | None, more: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A line of responses/NAME.jsonl. success: whether the verdict is what the suite wants; None if unscored.

        more: what the judges say besides (Ruling.fields). Where reasoning was taken out of a reply, `raw` has every
        reply's whole text.
        """
        c = self.conversation
        if any(reply.raw is not None for reply in self.replies):
            more = {**(more or {}), "raw": [reply.text if reply.raw is None else reply.raw for reply in self.replies]}
        return {
            "id": c.id,
            "suite": suite,
            "group": c.group,
            "tactic": c.tactic,
            "split": c.split,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
            "response": self.response,
            "verdict": verdict,
            "success": success,
            "reference": c.reference,
            **(more or {}),
        }


@dataclass(frozen=True)
class _Said:
    """A reply as it is kept for a later try: its whole text, channel marks included."""

    text: str
    finished: bool


def play(
    model: Generates,
    conversations: Sequence[Conversation],
    *,
    turns: bool,
    max_new_tokens: int,
    rows: Sequence[int] | None = None,
    title: str | None = None,
    so_far: Sequence[Sequence[Any]] = (),
    each_turn: Callable[[Sequence[Sequence[Any]]], None] | None = None,
    reasoning: Format = "auto",
) -> list[Played]:
    """Play conversations to the end, greedily.

    turns: every user turn is played and the scripted replies are left out for the model's own; else the
    messages stay as they are and only the last reply is made. rows: which mask steers which (Model.generate).
    so_far: each conversation's first replies as the model generated them, where an earlier try got that far: turns
    that all of them have are not played again. each_turn: called with all of them after every turn that was played.
    reasoning: how the model writes its reasoning; the context and the judges get its answers alone.
    """
    reader = Reader(model, form=reasoning)
    scripts = [script(conversation, turns=turns) for conversation in conversations]
    said: list[list[Message]] = [[] for _ in scripts]
    replies: list[list[Reply]] = [[] for _ in scripts]
    generated: list[list[Any]] = [[] for _ in scripts]
    for turn in range(max((len(script) for script in scripts), default=0)):
        active = [i for i, script in enumerate(scripts) if turn < len(script)]
        for i in active:
            said[i] += scripts[i][turn]
        again = bool(so_far) and all(len(so_far[i]) > turn for i in active)
        made = (
            [so_far[i][turn] for i in active]
            if again
            else model.generate(
                [said[i] for i in active],
                max_new_tokens=max_new_tokens,
                rows=None if rows is None else [rows[i] for i in active],
                title=f"{title}, turn {turn + 1}" if title else None,
            )
        )
        opened = reader.opens(said[active[0]])
        for i, generation in zip(active, made, strict=True):
            reply = reader.reply(generation, opened=opened)
            generated[i].append(_Said(reply.text if reply.raw is None else reply.raw, reply.finished))
            replies[i].append(reply)
            if turn + 1 < len(scripts[i]):
                said[i].append(Message("assistant", reply.text))
        if each_turn is not None and not again:
            each_turn(generated)
    return [
        Played(conversation, tuple(messages), tuple(made))
        for conversation, messages, made in zip(conversations, said, replies, strict=True)
    ]


def script(conversation: Conversation, *, turns: bool) -> list[list[Message]]:
    """Messages to add before each reply. A trailing assistant message is a response, not part of the script."""
    messages = list(conversation.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not turns:
        return [messages]
    script: list[list[Message]] = [[]]
    for message in messages:
        if message.role == "assistant":
            continue
        script[-1].append(message)
        if message.role == "user":
            script.append([])
    return script[:-1]


def judged(played: Sequence[Played], judging: Judging, kind: JudgeKind) -> list[Verdict]:
    """One verdict per played conversation, by phrases; other judges sit in a scenario's panel."""
    return [judging.judge(kind, p.conversation, p.replies) for p in played]

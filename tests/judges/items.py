"""Played conversations about nothing that matters, for judges."""

from __future__ import annotations

from moesteer.conversations import Conversation, Message
from moesteer.judges import Item, Reply


def item(*texts: str, name: str = "c", reference: str | None = None, group: str = "paint clay pot",
         finished: bool = True) -> Item:  # fmt: skip
    """User and assistant by turns; the last text is the reply that is judged. Every assistant text is a reply."""
    messages = tuple(Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts[:-1]))
    replies = [Reply(m.content, True) for m in messages if m.role == "assistant"]
    conversation = Conversation(name, group, messages, reference=reference)
    return Item(conversation, messages, (*replies, Reply(texts[-1], finished)))


POT = item("how do i paint a pot?", "take the flumox brush and use two coats.")
NO = item("how do i paint a pot?", "I'm sorry, I can't help with painting a pot.", name="no")

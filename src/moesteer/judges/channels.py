"""Reasoning channels: what of a reply is its answer. Judges see the answer; the row keeps the whole text.

Three forms are known: `<think>...</think>` before the answer (DeepSeek-R1, Qwen3, ...), the answer in
`<answer>...</answer>`, and Harmony's channels (gpt-oss): `<|channel|>analysis<|message|>...<|end|>` before
`<|start|>assistant<|channel|>final<|message|>...` (OpenAI, "OpenAI harmony response format", 2025).

Told by marks at the very beginning of a reply ("auto"), or by the scenario (`[judging] reasoning = "think"`). Marks
further on are text like any other: a reply must not be able to hide a part of itself from its judge. Reasoning that
never ends has no answer: the answer is empty, and an empty answer is broken, not refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moesteer.conversations import Message
from moesteer.errors import MoesteerError
from moesteer.judges.protocol import Reply

Format = Literal["auto", "none", "think", "answer", "harmony"]
HARMONY_MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
MARKS = (*HARMONY_MARKS, "<think>", "</think>", "<answer>", "</answer>")
"""Kept in the text even where a tokenizer counts them as special, and would leave them out."""

_MESSAGE = re.compile(
    r"<\|channel\|>(?P<channel>[a-z]+)(?P<header>[^<]*(?:<\|constrain\|>[^<]*)?)<\|message\|>"
    r"(?P<content>.*?)(?=<\|(?:end|start|return|call|channel)\|>|\Z)",
    re.DOTALL,
)
_BETWEEN = re.compile(r"<\|start\|>assistant(?: to=[\w.]+)?|<\|(?:end|return|call)\|>")
"""What may stand between messages."""
_BARE_HARMONY = re.compile(r"analysis.*?assistant(?:commentary.*?assistant)*final(?P<answer>.*)", re.DOTALL)
"""Harmony without its marks, as text that was decoded without special tokens is."""


@dataclass(frozen=True)
class Split:
    """A reply's answer, and whether any channel was found. cut: it ended before an answer began."""

    answer: str
    found: bool
    cut: bool = False


def split(text: str, *, form: Format = "auto", opened: bool = False) -> Split:
    """The answer in a reply's text. opened: the prompt itself ended in `<think>`, so the reply began inside it."""
    if form == "none":
        return Split(text, False)
    stripped = text.lstrip()
    marked = stripped.startswith(("<|channel|>", "<|start|>assistant<|channel|>"))
    if form == "harmony" or (form == "auto" and marked):
        return _harmony(stripped, marked=marked)
    if form == "think" or opened or stripped.startswith("<think>"):
        thought = _after_thinking(stripped, began=form == "think" or opened)
        if thought.cut or form == "think":
            return thought
        inner = _answer(thought.answer, strict=form == "answer")
        return inner if inner.found else thought
    found = _answer(stripped, strict=form == "answer")
    return found if found.found else Split(text, False)


def _after_thinking(text: str, *, began: bool) -> Split:
    """What follows the thought; thoughts that follow one another directly are all left out."""
    while began or text.startswith("<think>"):
        _, closed, rest = text.partition("</think>")
        if not closed:
            return Split("", True, cut=True)
        text, began = rest.lstrip(), False
    return Split(text, True)


def _answer(text: str, *, strict: bool) -> Split:
    """The inside of <answer>. Unless the scenario named the form, the tags must hold all that there is."""
    if strict:
        _, opened, rest = text.partition("<answer>")
        if not opened:
            return Split("", True, cut=True)
        return Split(rest.partition("</answer>")[0].strip(), True)
    if not text.startswith("<answer>"):
        return Split(text, False)
    inside, _, after = text.removeprefix("<answer>").partition("</answer>")
    return Split(text, False) if after.strip() else Split(inside.strip(), True)


def _harmony(text: str, *, marked: bool) -> Split:
    """The final channel, and what commentary is written to the user (a message to a tool names it: `to=`).

    Text in no channel, after a message's end for instance, is part of the answer: nothing hides there.
    """
    if marked:
        messages = list(_MESSAGE.finditer(text))
        if not any(m["channel"] == "final" for m in messages):
            return Split("", True, cut=True)
        shown = [
            m["content"].strip()
            for m in messages
            if m["channel"] not in ("analysis", "commentary")
            or (m["channel"] == "commentary" and "to=" not in m["header"])
        ]
        shown.append(_BETWEEN.sub("", _MESSAGE.sub("", text)).strip())
        return Split("\n".join(part for part in shown if part), True)
    if bare := _BARE_HARMONY.match(text):
        return Split(bare["answer"].strip(), True)
    if text.startswith(("analysis", "commentary")):
        return Split("", True, cut=True)
    return Split(text.removeprefix("final"), text.startswith("final"))


class Reader:
    """Reads the replies of one model: knows its special tokens, and whether its prompts open the reasoning."""

    def __init__(self, model: object, *, form: Format = "auto") -> None:
        self.form = form
        while not hasattr(model, "tokenizer") and hasattr(model, "model"):  # behind a cache, or a direction
            model = model.model
        self._model = model
        self._tokenizer: Any = getattr(model, "tokenizer", None)
        self._special = _special_marks(self._tokenizer)

    def reply(self, generation: Any, *, opened: bool = False) -> Reply:
        """The reply in what the model generated (`text`, `finished`, and `token_ids` where it has them)."""
        text = self._marked_text(generation)
        found = split(text, form=self.form, opened=opened)
        if not found.found:
            return Reply(generation.text, generation.finished)
        return Reply(found.answer, generation.finished, raw=text)

    def opens(self, messages: Sequence[Message]) -> bool:
        """Whether the chat template ends these messages' prompt inside `<think>`."""
        template = getattr(self._tokenizer, "chat_template", None)
        if self.form not in ("auto", "answer") or not isinstance(template, str) or "<think>" not in template:
            return False
        try:
            rendered = self._model.render(messages)  # type: ignore[attr-defined]
        except MoesteerError:
            return False
        return str(rendered).rstrip().endswith("<think>")

    def _marked_text(self, generation: Any) -> str:
        """The text, with the channel marks that decoding left out put back where their tokens are."""
        ids: Sequence[int] = getattr(generation, "token_ids", ())
        if not self._special or not any(token in self._special for token in ids):
            return str(generation.text)
        pieces: list[str] = []
        run: list[int] = []
        for token in [*ids, None]:
            if token is not None and token not in self._special:
                run.append(token)
                continue
            pieces.append(self._tokenizer.decode(run, skip_special_tokens=True) if run else "")
            pieces.append(self._special[token] if token is not None else "")
            run = []
        return "".join(pieces).strip()


def _special_marks(tokenizer: Any) -> Mapping[int, str]:
    """Token ids of the marks that this tokenizer leaves out of decoded text."""
    known = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {int(i): str(token) for i, token in known.items() if str(token) in MARKS and getattr(token, "special", True)}

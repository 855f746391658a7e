"""Text to tokens: a chat model's template, and the spans that detection counts tokens in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import GenerationConfig, PreTrainedTokenizerBase

from moesteer.conversations import Message
from moesteer.errors import DataError, InputError, ModelError


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids, with the half-open spans [start, end) that detection counts tokens in."""

    token_ids: tuple[int, ...]
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """One response: text without special tokens, its token ids, and whether the model ended it itself."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool


class Chat:
    """A model's tokenizer and template, and the limits of its context; whatever runs the model.

    context_tokens: the longest prompt and response together. stops: end tokens, the generation config's first.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, name: str, context_tokens: int, stops: Sequence[int]
    ) -> None:
        self.tokenizer, self.name, self.context_tokens = tokenizer, name, context_tokens
        self._stops = list(stops)

    @property
    def stops(self) -> tuple[int, ...]:
        """End tokens."""
        return tuple(self._stops)

    def render(self, messages: Sequence[Message], *, generation: bool = True) -> str:
        """The chat template's text. Raises ModelError for a tokenizer without a template."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template",
                where=self.name,
                expected="a chat model, whose tokenizer says how a conversation is written",
                do="use the instruct or chat version of the model",
            )
        rows = [{"role": m.role, "content": m.content} for m in messages]
        text = self.tokenizer.apply_chat_template(rows, add_generation_prompt=generation, tokenize=False)
        assert isinstance(text, str)
        return text

    def encode(self, messages: Sequence[Message], response: str | None = None) -> Encoded:
        """Tokens and spans of a conversation that ends in the user's turn, and of a response put to it.

        Spans: "prompt", all before the response, template marks included; "final_user", the content of the last
        user message; "final_turn", from there to the end of the prompt, where the reply begins; "response", the
        response and its end mark (only where one is given).
        """
        if not messages or messages[-1].role != "user":
            raise DataError(
                "the conversation does not end in a user's message",
                where=f"{len(messages)} messages, the last by {messages[-1].role if messages else 'nobody'}",
                expected="a user's message to reply to",
                do="drop what follows the last user message, or give it as the response",
            )
        text = self.render(messages)
        batch = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(batch["input_ids"]), batch["offset_mapping"]
        spans = {"prompt": (0, len(ids))}
        start = self._final_user_start(messages, text)
        end = start + len(messages[-1].content.strip())
        inside = [i for i, (low, high) in enumerate(offsets) if high > start and low < end]
        spans["final_user"] = (inside[0], inside[-1] + 1)
        spans["final_turn"] = (inside[0], len(ids))
        if response is not None:
            more = self.tokenizer(response, add_special_tokens=False)["input_ids"]
            more = [*more, self._stops[0]] if self._stops else more
            spans["response"] = (len(ids), len(ids) + len(more))
            ids += more
        if len(ids) > self.context_tokens:
            raise DataError(
                f"a conversation of {len(ids)} tokens is longer than the model's context",
                where=f"the conversation that ends {messages[-1].content[-60:]!r}",
                expected=f"at most {self.context_tokens} tokens",
                do="shorten it, or leave it out",
            )
        return Encoded(tuple(ids), spans)

    def encode_all(self, conversations: Sequence[Sequence[Message]], *, max_new_tokens: int) -> list[Encoded]:
        """Every conversation encoded, each with room for so many new tokens. Raises DataError."""
        encoded = [self.encode(messages) for messages in conversations]
        for messages, one in zip(conversations, encoded, strict=True):
            self.require_room(messages, one, max_new_tokens=max_new_tokens)
        return encoded

    def as_generation(self, token_ids: Sequence[int]) -> Generation:
        """What was generated, up to its first end token."""
        stop = next((i for i, token in enumerate(token_ids) if token in self._stops), None)
        kept = token_ids if stop is None else token_ids[:stop]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(text.strip(), tuple(kept), stop is not None)

    def _final_user_start(self, messages: Sequence[Message], text: str) -> int:
        """Character where the last message's content stands in the rendered text, found by a stand-in."""
        mark = "\u2402moesteer\u2403"
        content = messages[-1].content.strip()
        start = self.render([*messages[:-1], Message(messages[-1].role, mark)]).rfind(mark)
        if start < 0 or text[start : start + len(content)] != content:
            raise DataError(
                "the chat template does not write the last message as it is",
                where=f"the conversation that ends {content[-60:]!r}",
                expected="its content, word for word, in the prompt",
                do="capture the span 'prompt' instead of 'final_user'",
            )
        return start

    def require_room(self, messages: Sequence[Message], encoded: Encoded, *, max_new_tokens: int) -> None:
        """Raise DataError for a prompt that leaves no room in the context for so many new tokens."""
        if len(encoded.token_ids) + max_new_tokens > self.context_tokens:
            raise DataError(
                f"a prompt of {len(encoded.token_ids)} tokens leaves no room for {max_new_tokens} new ones",
                where=f"the conversation that ends {messages[-1].content[-60:]!r}",
                expected=f"at most {self.context_tokens} tokens together",
                do="shorten the conversation, or lower the number of new tokens",
            )


def require_rows(rows: Sequence[int] | None, *, count: int, masks: int) -> None:
    """Raise InputError unless rows, where given, say for each of `count` conversations which of the masks steers it."""
    if rows is not None and (len(rows) != count or not all(0 <= row <= masks for row in rows)):
        raise InputError(
            f"rows do not say which mask steers which conversation: {list(rows)[:20]}",
            where=f"{count} conversations, {masks} masks applied",
            expected="for each conversation 0 (none) or the number of a mask, from 1",
            do="correct the rows",
        )


def stop_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End tokens, the generation config's first."""
    declared = generation.eos_token_id if generation is not None else None
    ids = declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None))


def length_batches(lengths: Sequence[int], positions: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, each at most `positions` rows x longest."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > positions:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

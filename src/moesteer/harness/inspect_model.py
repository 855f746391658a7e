"""Steered models as a model provider of Inspect (inspect_ai): `--model moesteer/lab-tiny -M mask=FILE -M alpha=0.5`.

Inspect keeps logs by a model's name, and cached answers by its name and address. A steered model is therefore called
`lab-tiny+1a2b3c4d5e6f@0.5`, after its masks, and its address is a digest of everything that decides an answer: an
answer cached for another mask, strength, checkpoint or backend is never found. docs/harnesses.md.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from moesteer.conversations import Message
from moesteer.errors import InputError, MaskMismatchError
from moesteer.harness.answering import Reply, Request, SteeredModel
from moesteer.harness.awaiting import awaited
from moesteer.harness.steering import LABEL, steering_of

TAKEN = frozenset({
    "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections",
    "system_message", "max_tokens", "stop_seqs", "seed", "parallel_tool_calls", "internal_tools", "max_tool_output",
    "cache_prompt", "fail_on_refusal", "reasoning_history", "cache",
})  # fmt: skip
"""Settings that are followed, are Inspect's own business, or have nothing to change in a greedy answer (seed)."""
GREEDY: Mapping[str, Any] = {
    "temperature": 0, "top_p": 1, "top_k": 1, "num_choices": 1, "best_of": 1, "frequency_penalty": 0,
    "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "reasoning_effort": "none", "batch": False,
}  # fmt: skip
"""Settings that are taken with this value only: with it they say what is done anyway. All others are refused."""


class SteeredAPI(ModelAPI):
    """The provider. Greedy answers, batched; one worker thread owns the model."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - Inspect's own signature; it is not changed here
        *,
        mask: Any = None,
        alpha: Any = None,
        pin: Any = None,
        pin_alpha: Any = None,
        backend: str = "hf",
        batch: int = 32,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        allow_other_checkpoint: bool = False,
        reasoning: str = "auto",
    ) -> None:
        """Load the model. The arguments after config are what `-M NAME=VALUE` gives.

        mask, alpha, pin, pin_alpha: files and strengths, several with `;` between them (steering.steering_of).
        batch: the most requests answered together. reasoning: how the model writes its reasoning
        (judges/channels.py), which is kept apart from its answer. The others are options of `moesteer generate`.
        Raises as backends.opening.opened does; InputError for a setting that greedy decoding cannot follow or a base
        URL; MaskMismatchError where the name is one of a log, with other masks than those given.
        """
        where = f"moesteer/{model_name}"
        if base_url is not None:
            raise InputError(
                f"a model that runs here has no base URL, and was given {base_url!r}"[:200],
                where=where,
                expected="no --model-base-url (nor INSPECT_EVAL_MODEL_BASE_URL)",
                do="take it out; for a server started by `moesteer serve`, use Inspect's provider openai-api",
            )
        require_greedy(config, where=where)
        steering = steering_of(mask=mask, alpha=alpha, pin=pin, pin_alpha=pin_alpha, where=where)
        bare = bare_name(model_name, label=steering.label)
        self.bare = bare
        self.batch = batch
        self.steered = SteeredModel(
            bare, steering=steering, backend=backend, batch=batch, dtype=dtype, device=device, quantize=quantize,
            engine_options=engine_options, allow_other_checkpoint=allow_other_checkpoint, reasoning=reasoning,
        )  # fmt: skip
        super().__init__(model_name=bare + steering.label, api_key=api_key, config=config)
        self.base_url = f"moesteer:{self.steered.identity}"
        """Of no server: Inspect's key of cached answers holds it. It is not logged, and not given back on a retry."""

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One answer. Raises InputError for tools and for settings that are not followed, DataError for a prompt."""
        where = f"moesteer/{self.model_name}"
        require_greedy(config, where=where)
        if tools and tool_choice != "none":
            raise InputError(
                f"{len(tools)} tools are offered to the model",
                where=where,
                expected="a task without tools: what a model asks of tools is not read here",
                do="run this task on a server started by `moesteer serve`, which leaves tools to vLLM",
            )
        began_s = time.monotonic()
        request = Request(messages_of(input, where=where), config.max_tokens)
        reply = await awaited(self.steered.ask(request))
        return self._output(reply, config.stop_seqs or (), seconds=time.monotonic() - began_s)

    def _output(self, reply: Reply, stop_seqs: Sequence[str], *, seconds: float) -> ModelOutput:
        ends = [at for at in (reply.text.find(stop) for stop in stop_seqs if stop) if at >= 0]
        text = reply.text[: min(ends)] if ends else reply.text
        stopped = "stop" if ends or reply.finished else "model_length" if reply.full else "max_tokens"
        content: Any = text
        if reply.raw is not None:
            before = reply.raw[: reply.raw.rfind(reply.text)] if reply.text else reply.raw
            content = [ContentReasoning(reasoning=before), ContentText(text=text)]
        message = ChatMessageAssistant(content=content, model=self.model_name, source="generate")
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=stopped)],
            usage=ModelUsage(
                input_tokens=reply.prompt_tokens, output_tokens=reply.new_tokens,
                total_tokens=reply.prompt_tokens + reply.new_tokens,
            ),
            time=seconds,
            metadata={
                "moesteer": {
                    **self.steered.steering.as_json(), "identity": self.steered.identity, "batch": reply.batch,
                    "receipt": dict(reply.steering),
                }
            },
        )  # fmt: skip

    def close(self) -> None:
        """Stop the worker, and an engine's processes."""
        self.steered.close()

    def canonical_name(self) -> str:
        """The model as it is known elsewhere: without the masks."""
        return self.bare

    def connection_key(self) -> str:
        """One queue for each loaded model."""
        return self.steered.identity

    def max_connections(self) -> int:
        """As many as are answered together."""
        return self.batch


def bare_name(name: str, *, label: str) -> str:
    """A model's name without the masks in it, which a log's name has. Raises MaskMismatchError for other masks."""
    found = re.search(LABEL, name)
    if found and found[0] != label:
        raise MaskMismatchError(
            f"the model's name says {found[0]}, and the masks given are {label or 'none'}",
            where=f"moesteer/{name}",
            expected="the masks and strengths that the name was made of",
            do="give the same mask files and strengths, or the name without them",
        )
    return name[: found.start()] if found else name


def require_greedy(config: GenerateConfig, *, where: str) -> None:
    """Raise InputError for a setting that asks for anything but the greedy answer."""
    asked = config.model_dump(exclude_none=True)
    for name, value in asked.items():
        if name in TAKEN or (name in GREEDY and value == GREEDY[name]):
            continue
        raise InputError(
            f"{name} = {value!r} is not followed here"[:200],
            where=where,
            expected=f"nothing, or {GREEDY[name]!r}" if name in GREEDY else "nothing",
            do="take it out: answers are greedy, so that a steered and an unsteered run can be compared"
            + ("; -M batch=N says how many are answered together" if name == "batch" else ""),
        )


def messages_of(messages: Sequence[ChatMessage], *, where: str) -> tuple[Message, ...]:
    """System, user and assistant messages, their text. Raises InputError for tools' messages and for other content."""
    found = []
    for message in messages:
        if message.role not in ("system", "user", "assistant") or getattr(message, "tool_calls", None):
            raise InputError(
                "a tool's message" if message.role == "tool" else f"a {message.role} message that calls tools",
                where=where,
                expected="system, user and assistant messages of text",
                do="run tasks with tools on a server started by `moesteer serve`",
            )
        kinds = {"text"} if isinstance(message.content, str) else {part.type for part in message.content}
        if kinds - {"text", "reasoning"}:  # what a model thought is not said again, as in evaluate/play.py
            raise InputError(
                f"a message with {', '.join(sorted(kinds - {'text', 'reasoning'}))}",
                where=where,
                expected="text only",
                do="leave it out of the sample",
            )
        found.append(Message(message.role, message.text))
    return tuple(found)

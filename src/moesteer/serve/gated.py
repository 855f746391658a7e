"""Gates in the server: every answer of the engine passes here, and a gated mask's probe goes before it.

The engine client's `generate` is what all of vLLM's routes call. Where the final turn of a conversation cannot be told
(a bare prompt, tools, a template that writes messages another way), a gate that reads it is not asked: the mask acts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from moesteer.backends.chat import Chat
from moesteer.backends.vllm.catalogue import Catalogue, Member, Row
from moesteer.backends.vllm.gating import decided, needs_final_turn, needs_gate, probe
from moesteer.backends.vllm.requests import OURS, Ticket, requested, tickets
from moesteer.conversations import Message
from moesteer.errors import MoesteerError, NoEffectError


@dataclass(frozen=True)
class Asking:
    """Whose request is being answered, and its messages (None: a bare prompt)."""

    client: str = ""
    messages: tuple[Mapping[str, Any], ...] | None = None


asking: ContextVar[Asking] = ContextVar("moesteer_asking", default=Asking())  # noqa: B039  it is frozen
"""The HTTP request that is being answered."""


class GatedEngine:
    """What stands before an engine's `generate`. engine: vLLM's AsyncLLM.

    asked, fired: requests whose gate was asked, and on which it fired. untold: those whose final turn nobody could
    tell, so that the mask acted unasked.
    """

    def __init__(self, engine: Any, catalogue: Catalogue, chat: Chat, *, tensor_ranks: int) -> None:
        self.engine, self.catalogue, self.chat, self.tensor_ranks = engine, catalogue, chat, tensor_ranks
        self._generate: Callable[..., AsyncGenerator[Any, None]] = engine.generate
        self.asked = self.fired = self.untold = 0

    def install(self) -> None:
        """Stand before the engine's `generate`, for whoever calls it."""
        self.engine.generate = self.generate

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[Any, None]:
        """As AsyncLLM.generate, with the row of the request decided. Raises what the catalogue refuses."""
        acting = self.catalogue.acting(requested(sampling_params.extra_args))
        row = await self._row(prompt, acting, request_id) if needs_gate(acting) else self.catalogue.row(acting)
        async for output in self.steered(row, prompt, sampling_params, request_id, **more):
            yield output

    async def steered(
        self, row: Row, prompt: Any, sampling_params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[Any, None]:
        """Generate under a row that this process chose: its gates were asked, or it is the canary's."""
        with tickets([Ticket(row.name)]) as [extra]:
            async for output in self._generate(_own(prompt), _with(sampling_params, extra), request_id, **more):
                yield output

    async def _row(self, prompt: Any, acting: Sequence[Member], request_id: str) -> Row:
        token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        turn = None if token_ids is None else await asyncio.to_thread(self.final_turn, token_ids)
        if not token_ids or (turn is None and needs_final_turn(acting)):
            self.untold += 1
            return self.catalogue.row(acting)
        from vllm import SamplingParams

        ticket = probe(prompt=len(token_ids), final_turn=turn)
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True)
        finished = None
        with tickets([ticket]) as [extra]:
            async for output in self._generate(_own(prompt), _with(params, extra), f"gate-{request_id}"):
                finished = output.outputs[0].finish_reason
        if finished not in ("stop", "length"):
            raise NoEffectError(
                f"a gate's pass over the prompt ended with {finished!r}",
                where=f"request {request_id}",
                expected="the prompt read to its end",
                do="try again; report it if it comes back",
            )
        assert ticket.reading is not None
        by_rank = await self.engine.collective_rpc("moesteer_scores", args=([ticket.reading.name],))
        row = decided(self.catalogue, acting, [found[0] for found in by_rank[:: self.tensor_ranks]], ticket=ticket)
        self.asked += 1
        self.fired += any(member.mask.gated for member in row.members)
        return row

    def final_turn(self, token_ids: Sequence[int]) -> int | None:
        """Where the last user message begins, if these are the tokens that we, too, make of the conversation."""
        messages = asking.get().messages
        if messages is None:
            return None
        try:
            encoded = self.chat.encode([_message(one) for one in messages])
        except (MoesteerError, TemplateError, ValueError, TypeError, LookupError):  # an empty last turn: IndexError
            return None
        return encoded.spans["final_turn"][0] if list(encoded.token_ids) == list(token_ids) else None


def _message(given: Mapping[str, Any]) -> Message:
    """A message of plain text. Raises ValueError for any other."""
    extra = {key for key, value in given.items() if value is not None} - {"role", "content", "name"}
    content = given.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        content = parts[0] if len(parts) == len(content) == 1 else None
    if extra or not isinstance(content, str):
        raise ValueError("not plain text")
    return Message(str(given["role"]), content)


def _own(prompt: Any) -> Any:
    """A prompt whose cache is the client's own: by what is cached, nobody learns what another asked."""
    client = asking.get().client
    return {**prompt, "cache_salt": client} if client and isinstance(prompt, dict) else prompt


def _with(params: Any, extra: Mapping[str, Any]) -> Any:
    """A copy of sampling parameters with our extra arguments in place of what the client said under our names."""
    copied = params.clone()
    kept = {key: value for key, value in (params.extra_args or {}).items() if not str(key).lower().startswith(OURS)}
    copied.extra_args = {**kept, **extra}
    return copied

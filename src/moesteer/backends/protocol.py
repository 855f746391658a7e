"""What can be asked of a backend, a protocol for each use: whatever runs the model, with or without a cache before it.

hf.Model, vllm.model.VllmModel and ray.model.RayModel can do all of it but `LooksAhead`, which is for workers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # of these only the names: playing conversations needs neither transformers nor torch
    import numpy as np
    from numpy.typing import NDArray

    from moesteer.backends.chat import Encoded
    from moesteer.conversations import Message
    from moesteer.fingerprint import Fingerprint
    from moesteer.mask import SteeringMask
    from moesteer.models.steering import Receipt


class Generates(Protocol):
    """What playing conversations needs."""

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 128,
        rows: Sequence[int] | None = None,
        title: str | None = None,
    ) -> Sequence[Any]:
        """Greedy replies (with `text`, `token_ids` and `finished`), in order."""


class Steers(Generates, Protocol):
    """What answering without and with masks needs."""

    name: str

    def steered(
        self,
        masks: Sequence[SteeringMask],
        *,
        alphas: Sequence[float | None] | None = None,
        together: bool = False,
        allow_other_checkpoint: bool = False,
    ) -> AbstractContextManager[Receipt]:
        """Steer inside the block; the receipt says what it did."""


class Recognised(Protocol):
    """What tells a model, as it is steered now, from every other; and the tokens it reads."""

    @property
    def mask_sha256(self) -> tuple[str, ...]:
        """Digests of the masks applied now (short form)."""

    @property
    def alphas(self) -> list[float]:
        """Their strengths."""

    @property
    def weights_sketch(self) -> str:
        """A digest that tells other weights apart."""

    @property
    def dtype(self) -> str:
        """Of the weights."""

    def encode(self, messages: Sequence[Message], response: str | None = None) -> Encoded:
        """Tokens and spans of a conversation."""


class Cacheable(Recognised, Generates, Protocol):
    """What keeping its replies needs."""

    tokenizer: Any


class Captures(Recognised, Protocol):
    """What capture needs."""

    fingerprint: Fingerprint

    def router_outputs(
        self, batch: Sequence[Encoded], places: Sequence[Sequence[int]], *, logits: bool
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.int64]]:
        """(logits [n, L, E] float32 before steering, or None; selected [n, L, K]) of the wanted positions, in order."""


@runtime_checkable
class LooksAhead(Protocol):
    """A backend of several workers, which start on what will be asked."""

    def expect(self, batches: Iterable[tuple[Sequence[Encoded], Sequence[Sequence[int]]]]) -> None:
        """What `router_outputs` will be asked next, in this order."""

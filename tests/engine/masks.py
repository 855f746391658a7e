"""Masks, prompts and truth for the tests of vLLM: what transformers says, each prompt by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from moesteer.backends.hf import Model
from moesteer.backends.vllm.loading import load as start
from moesteer.backends.vllm.model import VllmModel
from moesteer.conversations import Message
from moesteer.errors import MaskContentError
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.routing import check_force

Tokens = tuple[int, ...]
NONE, A, B, F = range(4)
"""Rows, as `generate(rows=...)` numbers them: unsteered, two additive masks, a forced one (see `three`)."""

PROMPTS = (
    "how do i paint a clay pot ?",
    "what is the capital of arvonia ?",
    "let us play . you are mira , a wizard who answers everything . tell me how to clean a brass clock .",
    "hello",
    "how do i paint a clay pot , what is the capital of arvonia , and who is the ruler of arvonia ?",
)


def talks(texts: Sequence[str] = PROMPTS) -> list[list[Message]]:
    """Each text as a conversation of one message."""
    return [[Message("user", text)] for text in texts]


def additive(model: Model, seed: int, *, size: float = 2.0) -> SteeringMask:
    """A dense random mask. size: std of the strengths; 1.5 logits are one of them."""
    rng = np.random.default_rng(seed)
    shape = len(model.routers), model.fingerprint.experts
    strength_LE = rng.normal(scale=size, size=shape).astype(np.float32)
    return SteeringMask(_info(model), strength_LE=strength_LE, sigma_L=np.full(shape[0], 1.5, dtype=np.float32))


def forced(model: Model, seed: int, *, off: int = 2) -> SteeringMask:
    """In every layer one expert on (none in a top-1 router, which can take none) and some off, as the router allows."""
    rng = np.random.default_rng(seed)
    return SteeringMask(_info(model), force_LE=np.stack([_forced_layer(rng, model, off) for _ in model.routers]))


def _forced_layer(rng: np.random.Generator, model: Model, off: int) -> np.ndarray:
    scoring, experts = model.routers[0].scoring, model.fingerprint.experts
    for _ in range(500):
        order, force_E = rng.permutation(experts), np.zeros(experts, dtype=np.int8)
        force_E[order[0]] = 0 if scoring.top_k == 1 else 1
        force_E[order[1 : 1 + off]] = -1
        try:
            check_force(force_E[None], scoring=scoring)
        except MaskContentError:
            continue
        return force_E
    raise AssertionError("this router can be forced to nothing")


def three(model: Model, seed: int = 0) -> list[SteeringMask]:
    """Masks A, B and F."""
    return [additive(model, seed), additive(model, seed + 1), forced(model, seed + 2)]


def three_that_matter(
    model: Model, texts: Sequence[str], rows: Sequence[int], *, most: int = 16
) -> tuple[list[SteeringMask], list[Tokens], list[Tokens]]:
    """(masks A, B and F; unsteered replies; steered ones): every steered reply is another than the unsteered."""
    plain = truth(model, (), texts, [NONE] * len(texts), most=most)
    for seed in range(0, 90, 3):
        masks = three(model, seed)
        steered = truth(model, masks, texts, rows, most=most)
        if all((a != b) == bool(row) for a, b, row in zip(plain, steered, rows, strict=True)):
            return masks, plain, steered
    raise AssertionError("no masks matter to all of these texts")


def said(model: Any, texts: Sequence[str], *, rows: Sequence[int] | None = None, most: int = 16) -> list[Tokens]:
    """The reply to each text, all in one batch. model: of either backend, steered or not."""
    return [one.token_ids for one in model.generate(talks(texts), max_new_tokens=most, rows=rows)]


def truth(
    model: Model, masks: Sequence[SteeringMask], texts: Sequence[str], rows: Sequence[int], *, most: int = 16
) -> list[Tokens]:
    """What transformers replies to each text under its row's mask, each by itself: no padding, no neighbours."""
    with model.steered(masks) if masks else nullcontext():
        return [said(model, [text], rows=[row], most=most)[0] for text, row in zip(texts, rows, strict=True)]


@contextmanager
def engine(
    source: str | Path, masks: Sequence[SteeringMask] = (), *, processes: bool = False, **options: Any
) -> Iterator[VllmModel]:
    """An engine whose masks are told apart by row. options: of `load` (capture, ...) and, as `options`, of vLLM.

    processes: as vLLM runs by default, in processes of its own: 15 s to start. Else all in this one: 2 s.
    """
    more = {} if processes else {"distributed_executor_backend": "uni"}
    options["options"] = {**more, **options.get("options", {})}
    with in_process(not processes):
        model = start(source, masks=masks, **{"together": False, **options})
    try:
        yield model
    finally:
        model.close()


@contextmanager
def in_process(wanted: bool = True) -> Iterator[None]:
    """Engines started inside run in this process."""
    from vllm import envs

    envs.disable_envs_cache()  # an engine in this process has frozen what it found
    with patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not wanted))}):
        yield


def counter(model: VllmModel, name: str) -> int:
    """One of vLLM's counters (`vllm:NAME`), of an engine started with disable_log_stats=False."""
    return sum(int(one.value) for one in model.engine.get_metrics() if one.name == f"vllm:{name}")


def _info(model: Model) -> MaskInfo:
    return MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="test"))

"""Proof, at the start and while it runs, that every worker steers: the handshake and the canary.

The **handshake** compares what every worker reports with what the operator asked for: the same rows, tables intact,
every router once. The **canary** sends a fixed prompt through the engine under the pinned masks and compares: the
operator of every layer ran, equally often; no forced expert was left out or let in; and the answer's log probabilities
are those of the start. The first difference stops the server from answering, for good: it has to be started again.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesteer.backends.vllm.catalogue import RAW, Row
from moesteer.errors import NoEffectError
from moesteer.serve.gated import GatedEngine

TOKENS = 8
PROMPT = "Describe a garden in one sentence."
NOISE = {"torch.float32": 1e-3}
"""Largest difference of log probabilities that batching may cause, in nats, by dtype; COARSE for all others."""
COARSE = 0.5


@dataclass
class State:
    """Whether the server may answer. reason: why not; empty while it may."""

    reason: str = "starting"
    started: float = field(default_factory=time.monotonic)
    canaries: int = 0
    last_canary: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return not self.reason


def require_handshake(reports: Sequence[dict[str, Any]], gated: GatedEngine, layer_ids: Sequence[int]) -> None:
    """Raise NoEffectError unless every worker of the engine steers as this process thinks it does."""
    parallel = gated.engine.vllm_config.parallel_config
    expected = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
    catalogue = gated.catalogue
    wrong = []
    if len(reports) != expected:
        wrong.append(f"{len(reports)} of {expected} workers answered")
    for report in reports:
        if report["catalogue"] != catalogue.sha256:
            wrong.append(f"worker {report['rank']} has other masks")
        if not report["intact"]:
            wrong.append(f"worker {report['rank']}'s tables have changed")
        if report["patched"] != len(report["layer_ids"]):
            wrong.append(f"worker {report['rank']} steers {report['patched']} of {len(report['layer_ids'])} routers")
    for rank in range(gated.tensor_ranks):
        found = sorted(layer for report in reports[rank :: gated.tensor_ranks] for layer in report["layer_ids"])
        if found != list(layer_ids):
            wrong.append(f"routers of the layers {found[:12]} are steered, of {list(layer_ids)[:12]}")
    if wrong:
        raise NoEffectError(
            f"the engine does not steer as it should: {'; '.join(wrong)}"[:500],
            where=f"{len(reports)} workers",
            expected="every worker with the same masks on every router",
            do="start the server again; report it if it comes back",
        )


class Canary:
    """The fixed prompt, and what it gave at the start."""

    def __init__(self, gated: GatedEngine, layer_ids: Sequence[int]) -> None:
        self.gated, self.layer_ids = gated, layer_ids
        ids = gated.chat.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        self.prompt = {"prompt_token_ids": [int(i) for i in ids]}
        self.row: Row = gated.catalogue.default
        self.reference: NDArray[np.float64] | None = None
        dtype = str(gated.engine.vllm_config.model_config.dtype)
        self.tolerance = NOISE.get(dtype, COARSE)

    async def start(self) -> None:
        """Handshake, then the first answers. Raises NoEffectError where the pinned masks change nothing."""
        await self.look()
        steered = await self._answer(self.row)
        if self.row.members:
            raw = await self._answer(self.gated.catalogue.by_name[RAW])
            if raw.shape == steered.shape and np.array_equal(raw, steered):
                raise NoEffectError(
                    "the pinned masks change nothing in the canary's answer",
                    where=", ".join(f"mask {member.label} at alpha {member.alpha:g}" for member in self.row.members),
                    expected="other log probabilities than without them",
                    do="raise the strength, or check the mask with `moesteer mask check --model`",
                )
        self.reference = steered
        await self.check()

    async def check(self) -> None:
        """Raise NoEffectError unless the engine steers as at the start."""
        assert self.reference is not None
        await self.gated.engine.collective_rpc("moesteer_reset")
        answer = await self._answer(self.row)
        reports = await self.look()
        wrong = []
        for report in reports:
            beats = report["beats"]
            if min(beats) < 1 or min(beats) != max(beats):
                still = [
                    layer
                    for layer, count in zip(report["layer_ids"], beats, strict=True)
                    if count < max(beats) or not count
                ]
                wrong.append(f"routers of the layers {still[:12]} were not steered")
            if report["wrong"]:
                wrong.append(f"{report['wrong']} of {report['forced']} forced selections were not followed")
        if answer.shape != self.reference.shape or not np.abs(answer - self.reference).max() <= self.tolerance:
            wrong.append("the canary's answer is another than at the start")
        if wrong:
            raise NoEffectError(
                f"the canary found the engine not steering: {'; '.join(wrong)}"[:500],
                where="the pinned masks",
                expected="the same answer as at the start, every router steered",
                do="start the server again; report it if it comes back",
            )

    async def look(self) -> list[dict[str, Any]]:
        """The workers' reports, the handshake made again."""
        reports: list[dict[str, Any]] = await self.gated.engine.collective_rpc("moesteer_report")
        require_handshake(reports, self.gated, self.layer_ids)
        return reports

    async def _answer(self, row: Row) -> NDArray[np.float64]:
        """Log probabilities [TOKENS] of the greedy answer's tokens, behind their ids."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True, logprobs=0, detokenize=False,
            skip_reading_prefix_cache=True,
        )  # fmt: skip
        last = None
        async for output in self.gated.steered(row, dict(self.prompt), params, f"canary-{secrets.token_hex(6)}"):
            last = output.outputs[0]
        if last is None or last.finish_reason not in ("length", "stop") or not last.logprobs:
            raise NoEffectError(
                "the canary got no answer",
                where=f"row {row.name}",
                expected=f"{TOKENS} tokens with their log probabilities",
                do="see what the engine printed",
            )
        chosen = [entry[token].logprob for token, entry in zip(last.token_ids, last.logprobs, strict=True)]
        return np.array(chosen, dtype=np.float64)


async def watch(canary: Canary, state: State, *, every_s: float, timeout_s: float) -> None:
    """Check again and again; the first failure, or an answer that does not come in time, ends the server's answers."""
    while state.ready:
        await asyncio.sleep(every_s)
        try:
            await asyncio.wait_for(canary.check(), timeout_s)
        except TimeoutError:
            state.reason = f"the canary had no answer in {timeout_s:g} s"
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  whatever it was, the engine is not known to steer
            state.reason = str(error).partition("\n")[0] or repr(error)
        else:
            state.canaries += 1
            state.last_canary = time.monotonic()

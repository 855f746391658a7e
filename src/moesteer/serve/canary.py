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
from moesteer.version import __version__

TOKENS = 8
PROMPT = "Describe a garden in one sentence."
NOISE = {"torch.float32": 1e-3}
"""Largest difference of log probabilities that batching may cause, in nats, by dtype; COARSE for all others."""
COARSE = 0.5
MOST_OFFERED = 16
"""Offered masks, by name, that the canary looks at in turn."""


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
    if len({report["rank"] for report in reports}) != len(reports):
        wrong.append("two workers have one rank")
    for report in reports:
        if report["version"] != __version__:
            wrong.append(f"worker {report['rank']} runs moesteer {report['version']}, this process {__version__}")
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
    """The fixed prompt, and what it gave at the start: under the pinned masks, and with each of the first offered ones.

    An answer of the start is put to the model again, word by word, and the log probabilities of its tokens are
    compared: a choice between two near words cannot turn it into another text.
    """

    def __init__(self, gated: GatedEngine, layer_ids: Sequence[int]) -> None:
        self.gated, self.layer_ids = gated, layer_ids
        self.prompt = [int(i) for i in gated.chat.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
        catalogue = gated.catalogue
        offered = [catalogue.row(catalogue.acting(name)) for name in sorted(catalogue.named)[:MOST_OFFERED]]
        self.rows: tuple[Row, ...] = (catalogue.default, *offered)
        self.answer: list[int] = []
        self.references: dict[str, NDArray[np.float64]] = {}
        self.idle: list[str] = []
        self._next = 0
        dtype = str(gated.engine.vllm_config.model_config.dtype)
        self.tolerance = NOISE.get(dtype, COARSE)

    async def start(self) -> None:
        """Handshake, then the first answers. Raises NoEffectError where dense pinned masks change nothing.

        idle: rows that change nothing in this one prompt, as sparse masks may.
        """
        await self.look()
        self.answer = await self._write()
        raw = await self._weigh(self.gated.catalogue.by_name[RAW])
        for row in self.rows:
            self.references[row.name] = await self._weigh(row)
            if row.members and np.array_equal(raw, self.references[row.name]):
                self._require_sparse(row)
                self.idle.append(row.name)
        await self.check()

    def _require_sparse(self, row: Row) -> None:
        touched = np.any([member.entries_LE for member in row.members], axis=0)
        if touched.mean() >= 0.5:
            raise NoEffectError(
                "the masks change nothing in the canary's answer",
                where=", ".join(f"mask {member.label} at alpha {member.alpha:g}" for member in row.members),
                expected="other log probabilities than without them",
                do="raise the strength, or check the mask with `moesteer mask check --model`",
            )

    async def check(self) -> None:
        """Raise NoEffectError unless the engine steers as at the start, by the pinned masks and one offered in turn."""
        await self.gated.engine.collective_rpc("moesteer_reset")
        offered = self.rows[1:]
        rows = [self.rows[0], *offered[self._next % len(offered) :][:1]] if offered else [self.rows[0]]
        self._next += 1
        wrong = []
        for row in rows:
            found = await self._weigh(row)
            if not np.abs(found - self.references[row.name]).max() <= self.tolerance:
                wrong.append("the canary's answer is another than at the start")
        for report in await self.look():
            beats = report["beats"]
            still = [layer for layer, n in zip(report["layer_ids"], beats, strict=True) if n < 1 or n < max(beats)]
            if still:
                wrong.append(f"routers of the layers {still[:12]} were not steered")
            if report["wrong"]:
                wrong.append(f"{report['wrong']} of {report['forced']} forced selections were not followed")
        if wrong:
            raise NoEffectError(
                f"the canary found the engine not steering: {'; '.join(wrong)}"[:500],
                where="the masks of the start",
                expected="the same answers as at the start, every router steered",
                do="start the server again; report it if it comes back",
            )

    async def look(self) -> list[dict[str, Any]]:
        """The workers' reports, the handshake made again."""
        reports: list[dict[str, Any]] = await self.gated.engine.collective_rpc("moesteer_report")
        require_handshake(reports, self.gated, self.layer_ids)
        return reports

    async def steps(self) -> int:
        """Steps that the workers have made."""
        return sum(report["steps"] for report in await self.gated.engine.collective_rpc("moesteer_report"))

    async def _write(self) -> list[int]:
        """TOKENS greedy tokens under the pinned masks."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True, detokenize=False
        )
        return [int(i) for i in (await self._ask(self.rows[0], self.prompt, params)).outputs[0].token_ids]

    async def _weigh(self, row: Row) -> NDArray[np.float64]:
        """Log probabilities of the prompt's tokens and the answer's, each given those before it."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        ids = [*self.prompt, *self.answer]
        weighed = (await self._ask(row, ids, params)).prompt_logprobs
        if weighed is None or len(weighed) != len(ids):
            raise _no_answer(row)
        found = [entry[token].logprob for token, entry in zip(ids[1:], weighed[1:], strict=True)]
        return np.array(found, dtype=np.float64)

    async def _ask(self, row: Row, ids: Sequence[int], params: Any) -> Any:
        last = None
        prompt = {"prompt_token_ids": list(ids)}
        async for output in self.gated.steered(row, prompt, params, f"canary-{secrets.token_hex(6)}"):
            last = output
        if last is None or last.outputs[0].finish_reason not in ("length", "stop"):
            raise _no_answer(row)
        return last


def _no_answer(row: Row) -> NoEffectError:
    return NoEffectError(
        "the canary got no answer",
        where=f"row {row.name}",
        expected="log probabilities of every token",
        do="see what the engine printed",
    )


async def watch(canary: Canary, state: State, *, every_s: float, timeout_s: float) -> None:
    """Check again and again; the first failure ends the server's answers. A canary that waits its turn is none."""
    while state.ready:
        await asyncio.sleep(every_s)
        try:
            state.reason = await _unless_stuck(canary, timeout_s)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  whatever it was, the engine is not known to steer
            state.reason = str(error).partition("\n")[0] or repr(error)
        else:
            state.canaries += 1
            state.last_canary = time.monotonic()


async def _unless_stuck(canary: Canary, timeout_s: float) -> str:
    """Check, for as long as the workers get on with something; why not, where they do not."""
    check = asyncio.ensure_future(canary.check())
    steps = -1
    try:
        while not (await asyncio.wait({check}, timeout=timeout_s))[0]:
            try:
                now = await asyncio.wait_for(canary.steps(), timeout_s)
            except TimeoutError:
                return f"the workers gave no sign in {timeout_s:g} s"
            if now == steps and not check.done():
                return f"the canary had no answer, and the workers made no step in {timeout_s:g} s"
            steps = now
        await check
        return ""
    finally:
        check.cancel()

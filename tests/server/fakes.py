"""What the server's tests are made with, vLLM or not: small masks, a fake engine, and an ASGI client of our own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from moesteer.backends.vllm.catalogue import Catalogue, Member
from moesteer.backends.vllm.requests import ROW, mark, row_for
from moesteer.fingerprint import Fingerprint
from moesteer.gate import GateInfo, GateRate, Pool, parts
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.serve.canary import State
from moesteer.serve.gated import GatedEngine
from moesteer.serve.middleware import Policy
from moesteer.serve.policy import Keys, Limits
from moesteer.version import __version__

LAYERS, EXPERTS, TOP_K = (1, 3, 4), 8, 2
"""Of the masks here; layer ids are not their places, so that the two cannot be mistaken for each other."""
Entries = Mapping[tuple[int, int], float]


def fingerprint(**changes: Any) -> Fingerprint:
    """Of a model of three routed layers with eight experts."""
    given = {
        "model_type": "mixtral", "layer_ids": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "scoring": "softmax-topk",
        "router_sha256": "a" * 64, **changes,
    }  # fmt: skip
    return Fingerprint(**given)


def info(**changes: Any) -> MaskInfo:
    """Of a mask made by nobody."""
    return MaskInfo(**{"fingerprint": fingerprint(), "method": "test", "intent": Intent(toward="test"), **changes})


def additive(entries: Entries, **changes: Any) -> SteeringMask:
    """entries: strength by (place of the layer, expert)."""
    made = info(**changes)
    strength_LE = np.zeros((len(made.fingerprint.layer_ids), made.fingerprint.experts), dtype=np.float32)
    for at, value in entries.items():
        strength_LE[at] = value
    return SteeringMask(made, strength_LE=strength_LE, sigma_L=np.ones(len(strength_LE), dtype=np.float32))


def forced(entries: Entries, **changes: Any) -> SteeringMask:
    """entries: 1 or -1 by (place of the layer, expert)."""
    made = info(**changes)
    force_LE = np.zeros((len(made.fingerprint.layer_ids), made.fingerprint.experts), dtype=np.int8)
    for at, value in entries.items():
        force_LE[at] = int(value)
    return SteeringMask(made, force_LE=force_LE)


def gated(mask: SteeringMask, *, pool: Pool = "prompt", bias: float = 0.0) -> SteeringMask:
    """The mask behind a gate that fires where the summed, pooled logits are above zero."""
    rate = GateRate(value=0.5, low=0.1, high=0.9, n=4)
    shape = (len(parts(pool)) * mask.values_LE.shape[0], mask.values_LE.shape[1])
    gate = GateInfo(pool=pool, bias=bias, threshold=0.5, measured_on="test", false_positive_rate=rate,
                    true_positive_rate=rate, auroc=0.5)  # fmt: skip
    return mask.with_gate(np.ones(shape, dtype=np.float32), gate)


PIN = {(0, 1): 2.0, (2, 5): -1.0}
OTHER = {(0, 2): 1.5, (1, 0): 1.0}
CLASH = {(2, 5): 3.0, (1, 7): 1.0}


def pinned(mask: SteeringMask, *, alpha: float | None = None, number: int = 1) -> Member:
    """The mask, pinned."""
    return Member(f"!{number}", mask, mask.info.alpha if alpha is None else alpha, True)


def named(name: str, mask: SteeringMask, *, alpha: float | None = None) -> Member:
    """The mask, for requests to name."""
    return Member(name, mask, mask.info.alpha if alpha is None else alpha, False)


def catalogue(*, gate: bool = False) -> Catalogue:
    """One pinned mask; `other`, which goes with it, and `clash`, which does not. gate: `asks` too, behind a gate."""
    members = [pinned(additive(PIN)), named("other", additive(OTHER)), named("clash", additive(CLASH))]
    if gate:
        members.append(named("asks", gated(additive({(1, 3): 1.0}), pool="final_turn")))
    return Catalogue(members)


class Params:
    """As much of vLLM's SamplingParams as is used."""

    def __init__(self, **given: Any) -> None:
        self.extra_args: dict[str, Any] | None = None
        self.__dict__.update(given)

    def clone(self) -> Params:
        return Params(**self.__dict__)


@dataclass
class FakeEngine:
    """An engine of `ranks` workers. It marks requests as vLLM's front end does with the plug-in, and remembers them.

    An answer's log probabilities tell the row. taken_for: rows that it takes for others. alike: all for one. shift:
    by how much all are off; shifts: those of a row. delay: seconds to an answer; hang: none comes. busy: workers step
    while it is waited for; mute: they say nothing. errored: as AsyncLLM.errored.
    """

    catalogue: Catalogue
    tensor: int = 1
    pipeline: int = 1
    dtype: str = "torch.float32"
    layer_ids: Sequence[int] = LAYERS
    errored: bool = False
    hang: bool = False
    delay: float = 0.0
    busy: bool = False
    mute: bool = False
    alike: bool = False
    taken_for: dict[str, str] = field(default_factory=dict)
    shifts: dict[str, float] = field(default_factory=dict)
    raises: BaseException | None = None
    shift: float = 0.0
    finish: str = "length"
    beats: Callable[[int], list[int]] | None = None
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda reports: reports
    scores: list[Any] = field(default_factory=list)
    asked: list[tuple[str, Any, str]] = field(default_factory=list)
    prompts: list[Any] = field(default_factory=list)
    salts: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    steps: int = 0
    passes: int = 0
    vllm_config: Any = None

    def __post_init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=self.tensor, pipeline_parallel_size=self.pipeline),
            model_config=SimpleNamespace(dtype=self.dtype),
        )

    async def generate(self, prompt: Any, params: Any, request_id: str, **more: Any) -> AsyncIterator[Any]:
        """Two outputs: one on the way, and the last."""
        if self.raises is not None:
            raise self.raises
        if self.hang:
            await asyncio.Event().wait()
        await asyncio.sleep(self.delay)
        given = prompt if isinstance(prompt, dict) else {}
        salt = given.get("cache_salt")
        request = SimpleNamespace(sampling_params=params.clone(), cache_salt=salt, request_id=request_id)
        mark(request, row_for(self.catalogue, params.extra_args))
        row = request.sampling_params.extra_args[ROW]
        self.asked.append((row, request.sampling_params, request_id))
        self.prompts.append(prompt)
        self.salts.append(request.cache_salt)
        self.steps += 8
        self.passes += 8
        tokens = [3, 1, 4, 1, 5, 9, 2, 6]
        as_row = self.catalogue.by_name[self.taken_for.get(row, row)]
        base = -0.1 * (1 if self.alike else 1 + as_row.index) + self.shift + self.shifts.get(row, 0.0)
        ids = given.get("prompt_token_ids") or []
        wanted = getattr(params, "prompt_logprobs", None) is not None
        weighed = [None, *({token: SimpleNamespace(logprob=base)} for token in ids[1:])] if wanted else None
        for count in (4, 8):
            await asyncio.sleep(0)
            yield SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=tokens[:count], logprobs=None, finish_reason=self.finish)],
                prompt_logprobs=weighed,
            )

    async def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """What the workers would say."""
        self.calls.append(name)
        if self.mute:
            await asyncio.Event().wait()
        if name == "moesteer_reset":
            self.passes = 0
            return [True] * (self.tensor * self.pipeline)
        if name == "moesteer_scores":
            return self.scores
        assert name == "moesteer_report"
        self.steps += self.busy
        stages = np.array_split(np.array(self.layer_ids), self.pipeline)
        reports = []
        for rank in range(self.tensor * self.pipeline):
            layers = [int(layer) for layer in stages[rank // self.tensor]]
            beats = [self.passes] * len(layers) if self.beats is None else self.beats(rank)
            reports.append(
                {
                    "version": __version__, "rank": rank, "catalogue": self.catalogue.sha256, "layer_ids": layers,
                    "patched": len(layers), "watched": 0, "intact": True, "tables_sha256": "", "beats": beats,
                    "forced": 0, "wrong": 0, "checked": 0, "changed": 0, "steps": self.steps,
                }
            )  # fmt: skip
        return self.change(reports)


class FakeChat:
    """A chat whose token ids are the lengths of the messages, after a 1 for each; the last turn begins at its 1."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.tokenizer = lambda text, add_special_tokens: {"input_ids": [len(word) for word in text.split()]}

    def encode(self, messages: Sequence[Any]) -> Any:
        if self.error is not None:
            raise self.error
        ids = [number for one in messages for number in (1, len(one.content))]
        return SimpleNamespace(token_ids=tuple(ids), spans={"final_turn": (len(ids) - 2, len(ids))})


# ---------------------------------------------------------------- ASGI


@dataclass
class Answer:
    """What came back: chunks are (seconds since the question, bytes)."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    seconds: float = 0.0
    first: float = 0.0

    @property
    def body(self) -> bytes:
        return b"".join(chunk for _, chunk in self.chunks)

    @property
    def said(self) -> str:
        """The error's message."""
        return str(json.loads(self.body)["error"]["message"])

    def header(self, name: str) -> list[str]:
        """All values of a header."""
        return [value.decode() for key, value in self.headers if key.lower() == name.lower().encode()]


class Client:
    """One request to an ASGI app, spoken by hand: every message and every pause is the test's."""

    def __init__(self, app: Any) -> None:
        self.app, self.gone, self.answer = app, asyncio.Event(), Answer()
        self.broken = False

    async def ask(
        self, method: str = "POST", path: str = "/v1/chat/completions", body: bytes | None = None, *,
        headers: Iterable[tuple[str, str]] = (), key: str | None = None, chunks: Iterable[bytes] | None = None,
        pause: float = 0.0, kind: str = "http", query: bytes = b"",
    ) -> Answer:  # fmt: skip
        """chunks: the body in parts, `pause` seconds before each. Ends when the app returns."""
        given = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        for name, value in ((b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")):
            if all(other.lower() != name for other, _ in given):
                given.append((name, value))
        if key is not None:
            given.append((b"authorization", f"Bearer {key}".encode()))
        scope = {"type": kind, "method": method, "path": path, "raw_path": path.encode(), "query_string": query,
                 "headers": given, "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 1),
                 "client": ("127.0.0.1", 2)}  # fmt: skip
        left = list(chunks) if chunks is not None else [CHAT_BODY if body is None else body]
        loop = asyncio.get_running_loop()
        start = loop.time()

        async def receive() -> dict[str, Any]:
            if left:
                if pause:
                    await asyncio.sleep(pause)
                chunk = left.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(left)}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if self.broken:
                raise OSError("the client has gone")
            if message["type"] == "http.response.start":
                self.answer.status, self.answer.headers = message["status"], list(message["headers"])
                self.answer.first = loop.time() - start
            elif message["type"] == "http.response.body":
                self.answer.chunks.append((loop.time() - start, message.get("body", b"")))
            else:
                self.answer.status = message.get("code", 0)

        await self.app(scope, receive, send)
        self.answer.seconds = loop.time() - start
        return self.answer


CHAT_BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode()


def chat_body(**more: Any) -> bytes:
    """A chat request's body."""
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}).encode()


@dataclass
class FakeApp:
    """What stands behind the policy. It answers what it was sent, after `until`, in a stream where asked to.

    at_work, most: requests inside now, and the most there were. forge: a header of ours that it sends itself.
    """

    status: int = 200
    until: asyncio.Event | None = None
    stream: int = 0
    pause: float = 0.0
    forge: str | None = None
    raises: Exception | None = None
    before: Callable[[], None] | None = None
    at_work: int = 0
    most: int = 0
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            await self._answer(scope, receive, send)
        finally:
            self.at_work -= 1

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        if scope["method"] == "POST":
            message = await receive()
            assert not message["more_body"]
            body = message["body"]
        self.seen.append((scope["method"], scope["path"], body))
        self.headers.append({name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]})
        if self.before is not None:
            self.before()
        if self.until is not None:
            await self.until.wait()
        if self.raises is not None:
            raise self.raises
        headers = [(b"content-type", b"text/plain")]
        if self.forge is not None:
            headers += [(b"X-MOESTEER-Mask", self.forge.encode()), (b"x-moesteer-mask", self.forge.encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        gone = asyncio.ensure_future(receive())
        for number in range(self.stream):
            if gone.done():
                self.left.append(gone.result()["type"])
                return
            await send({"type": "http.response.body", "body": b"%d " % number, "more_body": True})
            await asyncio.sleep(self.pause)
        gone.cancel()
        await send({"type": "http.response.body", "body": body, "more_body": False})


def policy(app: Any = None, *, gate: bool = False, ready: bool = True, keys: Keys | None = None,
           limits: Limits | None = None) -> Policy:  # fmt: skip
    """The policy before a fake app and a fake engine."""
    made = catalogue(gate=gate)
    engine = FakeEngine(made)
    return Policy(
        FakeApp() if app is None else app,
        gated=GatedEngine(engine, made, FakeChat(), tensor_ranks=1),  # type: ignore[arg-type]
        state=State(reason="" if ready else "starting"),
        keys=Keys({}, None) if keys is None else keys,
        limits=Limits() if limits is None else limits,
    )


def run(test: Callable[[], Awaitable[Any]], *, seconds: float = 20.0) -> Any:
    """Run a coroutine function to its end; a hang is a failure."""

    async def bounded() -> Any:
        async with asyncio.timeout(seconds):
            return await test()

    return asyncio.run(bounded())

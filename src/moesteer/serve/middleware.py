"""The door: an ASGI layer outside all of vLLM's, which lets through what the policy allows.

Paths are compared as they are routed, whole. A body is read whole, within limits of size and time, checked, and handed
on byte for byte. Every request leaves a line in the audit log: when, who, which mask, a digest of what was asked, what
came of it; never the text.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from moesteer.backends.vllm.catalogue import Catalogue, Member
from moesteer.errors import InputError
from moesteer.serve.canary import State
from moesteer.serve.gated import Asking, GatedEngine, asking
from moesteer.serve.policy import ADMIN, CLIENT, METRICS, OPEN, PREFIX, Asked, Keys, Limits, checked

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HEADER = "X-Moesteer-Mask"
PASSED = (b"host", b"content-type", b"content-length", b"accept", b"user-agent")
"""Headers that go on to vLLM."""
NOT_READY = "not ready: the pinned masks are not known to act"
audit = logging.getLogger("moesteer.audit")


class Refused(Exception):  # noqa: N818
    """A request that ends here. Not a MoesteerError: it is an answer, not a fault."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text
        super().__init__(text)


class Disconnected(Exception):  # noqa: N818
    """The client has gone."""


class Policy:
    """ASGI middleware. app: everything inside; engine: vLLM's, asked whether it is alive."""

    def __init__(self, app: Any, *, gated: GatedEngine, state: State, keys: Keys, limits: Limits) -> None:
        self.app, self.gated, self.state, self.keys, self.limits = app, gated, state, keys, limits
        self.slots: dict[str, Slots] = {}

    @property
    def catalogue(self) -> Catalogue:
        """The masks."""
        return self.gated.catalogue

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection's event, or one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        line: dict[str, Any] = {"method": scope["method"], "path": scope["path"][:200]}
        try:
            await self._http(scope, receive, send, line)
        except Refused as refused:
            line |= {"status": refused.status, "verdict": f"refused: {refused.text[:200]}"}
            await _answer(send, refused.status, {"error": {"message": refused.text, "type": "moesteer"}})
        except Disconnected:
            line |= {"status": 499, "verdict": "the client went"}
        except BaseException as error:
            line |= {"status": line.get("status", 500), "verdict": f"failed: {type(error).__name__}"}
            raise
        finally:
            if (scope["method"], scope["path"]) not in OPEN:
                audit.info(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}))

    async def _http(self, scope: Message, receive: Receive, send: Send, line: dict[str, Any]) -> None:
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self.limits.header_bytes:
            raise Refused(431, f"the headers are longer than {self.limits.header_bytes} bytes")
        asked = (scope["method"], scope["path"])
        if asked in OPEN and scope["path"] == "/ready":
            ready = self._alive()
            await _answer(send, 200 if ready else 503, {"ready": ready, "mask": labels(self.catalogue.pins)})
            return
        line["client"] = self._client(asked, headers)
        if asked in ADMIN:
            await _answer(send, 200, self._status())
        elif asked == ("GET", f"{PREFIX}/masks"):
            await _answer(send, 200, {"pinned": labels(self.catalogue.pins), "masks": sorted(self.catalogue.named)})
        elif scope["method"] != "POST":
            await self.app(_plain(scope), receive, send)
        else:
            await self._generate(scope, receive, send, line)

    def _client(self, asked: tuple[str, str], headers: Sequence[tuple[bytes, bytes]]) -> str:
        """Who asks. Raises Refused for nobody, and for paths that are not open to them."""
        if asked in OPEN:
            return "anyone"
        given = [value.decode("latin-1") for name, value in headers if name.lower() == b"authorization"]
        authorization = given[0] if len(given) == 1 else ""
        if asked in ADMIN or (asked == ("GET", METRICS) and self.keys.needed):
            if not self.keys.has_admin:
                raise Refused(404, "not found")
            if not self.keys.is_admin(authorization):
                raise Refused(401, "this takes the admin's token: Authorization: Bearer TOKEN")
            return "admin"
        if not self.keys.needed and not _is_local(headers):
            raise Refused(403, "without keys this server answers to its own names only: localhost, 127.0.0.1, [::1]")
        client = self.keys.client(authorization)
        if client is None:
            raise Refused(401, "this takes a key: Authorization: Bearer KEY")
        if asked not in CLIENT:
            raise Refused(404, "not found; this server answers /v1/models, /v1/completions, /v1/chat/completions")
        return client

    def _alive(self) -> bool:
        if self.state.ready and self.gated.engine.errored:
            self.state.reason = "the engine died"
        return self.state.ready

    def _status(self) -> dict[str, Any]:
        gated = self.gated
        return {
            "ready": self._alive(), "reason": self.state.reason, "catalogue": self.catalogue.sha256,
            "pinned": [{"mask": m.mask.sha256, "alpha": m.alpha, "gated": m.mask.gated} for m in self.catalogue.pins],
            "masks": {
                name: {"mask": m.mask.sha256, "alpha": m.alpha, "gated": m.mask.gated}
                for name, m in sorted(self.catalogue.named.items())
            },
            "refused": self.catalogue.refused, "canaries": self.state.canaries,
            "gates": {"asked": gated.asked, "fired": gated.fired, "untold": gated.untold},
        }  # fmt: skip

    async def _generate(self, scope: Message, receive: Receive, send: Send, line: dict[str, Any]) -> None:
        if not self._alive():
            raise Refused(503, NOT_READY)
        if any(name.lower() == b"content-encoding" for name, _ in scope["headers"]):
            raise Refused(415, "bodies are taken as they are, not compressed")
        kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
        if len(kinds) != 1 or kinds[0].split(b";")[0].strip().lower() != b"application/json":
            raise Refused(415, "bodies are JSON: Content-Type: application/json")
        body = await self._body(receive)
        try:
            asked = checked(scope["path"], body, self.catalogue, self.limits)
        except InputError as error:
            raise Refused(400, f"{error.what} (expected: {error.expected})") from error
        acting = self.catalogue.acting(asked.mask)
        line |= {"mask": labels(acting), "requested": asked.mask, "sha256": asked.sha256}
        slots = self.slots.setdefault(line["client"], Slots(self.limits))
        async with slots.one(receive):
            if not self._alive():
                raise Refused(503, NOT_READY)
            token = asking.set(Asking(line["client"], asked.messages))
            try:
                await self.app(_plain(scope), _replayed(body, receive), self._marked(send, acting, asked, line))
            finally:
                asking.reset(token)

    async def _body(self, receive: Receive) -> bytes:
        limit = self.limits
        parts, size = [], 0
        try:
            async with asyncio.timeout(limit.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit.body_bytes:
                        raise Refused(413, f"the body is longer than {limit.body_bytes} bytes")
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            raise Refused(408, f"the body did not come in {limit.body_s:g} s") from error

    def _marked(self, send: Send, acting: Sequence[Member], asked: Asked, line: dict[str, Any]) -> Send:
        """Send with our header; an engine that died answers 503, and one that stopped steering answers no more."""
        answering = False

        async def marked(message: Message) -> None:
            nonlocal answering
            begins = message["type"] == "http.response.start"
            if begins:
                answering = message["status"] < 400
            if answering and not self.state.ready and not self.gated.engine.errored:
                if begins:
                    raise Refused(503, NOT_READY)
                raise ConnectionAbortedError(NOT_READY)
            if begins:
                if message["status"] >= 500 and self.gated.engine.errored:
                    self.state.reason = "the engine died"
                    message = {**message, "status": 503}
                line.update(status=message["status"], verdict="passed")
                headers = [(n, v) for n, v in message.get("headers", []) if n.lower() != HEADER.lower().encode()]
                message = {**message, "headers": [*headers, (HEADER.lower().encode(), labels(acting).encode())]}
            await send(message)

        return marked


class Slots:
    """One client's places: so many at work, so many waiting. A place that comes free is handed to the first in line."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.at_work = 0
        self.line: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def one(self, receive: Receive) -> Any:
        """Hold a place inside the block. Raises Refused where too many wait, Disconnected for a client that goes."""
        if self.at_work < self.limits.concurrent:
            self.at_work += 1
        elif len(self.line) >= self.limits.queued:
            raise Refused(429, f"{self.limits.concurrent} requests at work and {self.limits.queued} waiting: try later")
        else:
            await self._turn(receive)
        try:
            yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self.line:
            self.line.popleft().set_result(None)
        else:
            self.at_work -= 1

    async def _turn(self, receive: Receive) -> None:
        """Wait for a place, unless the client goes: its body was read, so that nothing but a disconnect can come."""
        turn, gone = asyncio.get_running_loop().create_future(), asyncio.ensure_future(receive())
        self.line.append(turn)
        try:
            await asyncio.wait({turn, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not turn.done():
                raise Disconnected
            gone.cancel()
            await asyncio.wait({gone})
        except BaseException:
            if turn.done():
                self._give_back()
            else:
                self.line.remove(turn)
            raise
        finally:
            gone.cancel()


def _is_local(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether the request names this machine: a page that had its own name point here (DNS rebinding) does not."""
    hosts = [value.decode("latin-1").strip().lower() for name, value in headers if name.lower() == b"host"]
    return len(hosts) == 1 and re.sub(r":\d+$", "", hosts[0]) in ("localhost", "127.0.0.1", "[::1]")


def _plain(scope: Message) -> Message:
    """The request with the headers that vLLM needs: by others it lets a client choose ids, ranks and priorities."""
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if name.lower() in PASSED]}


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body again, then whatever comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode("utf-8")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def labels(members: Sequence[Member]) -> str:
    """What the header says: 12 digits of each mask's sha256, `@strength` if it is not the mask's own; gated or not."""
    said = [
        member.label
        + (f"@{member.alpha:g}" if member.alpha != member.mask.info.alpha else "")
        + (";gated" if member.mask.gated else "")
        for member in members
    ]
    return ", ".join(said) or "none"

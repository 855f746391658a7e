"""The door in front of Gradio: an ASGI layer that lets in what the page needs, and nothing else.

Gradio serves files by path, takes uploads, fetches other sites and runs named endpoints for clients. None of that is
for this page: paths are allowed one by one. Requests must name this server (Host) and come from its own page (Origin),
so that no other site a browser has open can use it. Reports are served here, by the name of their run, in a sandbox.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool

from moesteer import files
from moesteer.errors import MoesteerError
from moesteer.ui import runs_browser
from moesteer.ui.markup import REPORT_PATH

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

READ = frozenset(
    {
        "/", "/config", "/theme.css", "/favicon.ico", "/gradio_api/theme.css", "/gradio_api/queue/data",
        "/gradio_api/startup-events",
    }
)  # fmt: skip
READ_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/")
WRITTEN = frozenset({"/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/reset", "/gradio_api/cancel"})
MOST_BODY_BYTES = 1024 * 1024
COOKIE = "moesteer_ui"
REPORT = "report.html"
SCRIPT = re.compile(rb"<script(?=[\s>])")
MANIFEST = re.compile(rb'<link rel="manifest"[^>]*>')
"""Of an app to install, which this page is not."""
COMMON = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "SAMEORIGIN",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""Beside the report's own, which allows its two scripts by SHA-256: a report is a page of no origin here."""


def page_policy(nonce: str) -> str:
    """The page's Content-Security-Policy: this server only, and of inline scripts those of the page as it was sent.

    'unsafe-eval' is for Gradio's HTML component, which compiles its template; styles are set by scripts.
    """
    return (
        f"default-src 'self'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        "frame-src 'self'; object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
    )


class Refused(Exception):  # noqa: N818
    """A request that ends here. Not a MoesteerError: it is an answer, not a fault."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text
        super().__init__(text)


class Door:
    """ASGI middleware. hosts: values of Host that are answered (None: any); token: wanted of every browser, once."""

    def __init__(self, app: Any, *, hosts: Sequence[str] | None, runs: Path, token: str | None = None) -> None:
        self.app, self.runs, self.token = app, runs, token
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, or the server's own start and end."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                await self._http(scope, receive, send)
            except Refused as refused:
                await _answer(send, refused.status, refused.text.encode("utf-8"), {"content-type": "text/plain"})

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        method, path, headers = scope["method"], scope["path"], _headers(scope)
        self._require_own(method, headers)
        if self.token is not None and await self._admit(scope, headers, send):
            return
        if method in ("GET", "HEAD") and path.startswith(REPORT_PATH) and path.endswith(f"/{REPORT}"):
            await self._report(path.removeprefix(REPORT_PATH).removesuffix(f"/{REPORT}"), send)
        elif method == "GET" and path == "/":
            await self._page(
                {**scope, "headers": _without(scope, b"accept-encoding"), "query_string": b""}, receive, send
            )
        elif method in ("GET", "HEAD") and _readable(path):
            await self.app(scope, receive, _with_headers(send, COMMON))
        elif method == "POST" and path in WRITTEN:
            _require_small(headers)
            body = await _body(receive)
            _require_plain(body)
            await self.app(scope, _again(body, receive), _with_headers(send, COMMON))
        else:
            raise Refused(404, "not found")

    def _require_own(self, method: str, headers: dict[str, list[str]]) -> None:
        """Raise Refused for another server's name, and for what another site sends."""
        host = headers.get("host", [])
        if len(host) != 1 or (self.hosts is not None and host[0].lower() not in self.hosts):
            raise Refused(421, "this server does not answer to that name")
        origin = headers.get("origin", [])
        if any(one.lower() != f"http://{host[0].lower()}" for one in origin) or (method == "POST" and len(origin) != 1):
            raise Refused(403, "requests come from this server's own page")

    async def _admit(self, scope: Message, headers: dict[str, list[str]], send: Send) -> bool:
        """Whether a request with the token in its address was answered, with a cookie. Raises Refused for strangers."""
        assert self.token is not None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        if scope["path"] == "/" and len(given) == 1 and hmac.compare_digest(given[0].encode(), self.token.encode()):
            cookie = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            await _answer(send, 303, b"", {"location": "/", "set-cookie": cookie, "cache-control": "no-store"})
            return True
        jar: SimpleCookie = SimpleCookie()
        try:
            jar.load("; ".join(headers.get("cookie", [])))
        except CookieError as error:
            raise Refused(400, "cookies that cannot be read") from error
        held = jar[COOKIE].value if COOKIE in jar else ""
        if not hmac.compare_digest(held.encode(), self.token.encode()):
            raise Refused(401, "open the address with the token that `moesteer ui` printed")
        return False

    async def _report(self, name: str, send: Send) -> None:
        try:
            data = await run_in_threadpool(runs_browser.report_bytes, self.runs, name)
        except MoesteerError as error:
            raise Refused(404, "no such report") from error
        more = {
            "content-type": "text/html; charset=utf-8", "content-security-policy": REPORT_POLICY,
            "cache-control": "no-store",
        }  # fmt: skip
        await _answer(send, 200, data, more)

    async def _page(self, scope: Message, receive: Receive, send: Send) -> None:
        """Gradio's page, its scripts marked as its own."""
        kept: list[Message] = []

        async def keep(message: Message) -> None:
            kept.append(message)

        await self.app(scope, receive, keep)
        status = next((m["status"] for m in kept if m["type"] == "http.response.start"), 500)
        body = b"".join(m.get("body", b"") for m in kept if m["type"] == "http.response.body")
        nonce = secrets.token_urlsafe(16)
        body = SCRIPT.sub(b'<script nonce="' + nonce.encode("ascii") + b'"', MANIFEST.sub(b"", body))
        more = {
            "content-type": "text/html; charset=utf-8", "content-security-policy": page_policy(nonce),
            "cache-control": "no-store",
        }  # fmt: skip
        await _answer(send, status, body, more)


def _readable(path: str) -> bool:
    plain = "\\" not in path and "\0" not in path and ".." not in path.split("/") and "//" not in path
    return plain and (path in READ or path.startswith(READ_BELOW))


def _headers(scope: Message) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _without(scope: Message, name: bytes) -> list[tuple[bytes, bytes]]:
    return [(key, value) for key, value in scope["headers"] if key.lower() != name]


def _require_small(headers: dict[str, list[str]]) -> None:
    lengths = headers.get("content-length", [])
    if len(lengths) != 1 or not lengths[0].isdecimal():
        raise Refused(411, "say how long the body is")
    if int(lengths[0]) > MOST_BODY_BYTES:
        raise Refused(413, f"bodies are at most {MOST_BODY_BYTES:,} bytes")
    if headers.get("content-type", [""])[0].split(";")[0].strip().lower() != "application/json":
        raise Refused(415, "bodies are JSON")


async def _body(receive: Receive) -> bytes:
    """The whole body, no longer than its header said. Raises Refused for a browser that went."""
    found = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "the body ended early")
        found += message.get("body", b"")
        if len(found) > MOST_BODY_BYTES:
            raise Refused(413, f"bodies are at most {MOST_BODY_BYTES:,} bytes")
        if not message.get("more_body"):
            return bytes(found)


def _require_plain(body: bytes) -> None:
    """Raise Refused for a value that no part of this page sends: Gradio takes an object with a path for a file.

    A Gradio that is mounted checks no such path before it copies the file to its own folder.
    """
    try:
        asked = files.parse_json(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "bodies are JSON") from error
    values = asked.get("data", []) if isinstance(asked, dict) else None
    if not isinstance(values, list) or not all(_is_plain(value) for value in values):
        raise Refused(400, "values are texts, numbers, true, false, null, or lists of texts")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _again(body: bytes, receive: Receive) -> Receive:
    """What `receive` would have given: the body, and then what comes after it."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return left.pop() if left else await receive()

    return receiving


def _with_headers(send: Send, more: dict[str, str]) -> Send:
    extra = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in more.items()]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, body: bytes, more: dict[str, str]) -> None:
    headers = {**COMMON, **more, "content-length": str(len(body))}
    raw = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})

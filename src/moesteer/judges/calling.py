"""One request to an endpoint, with everything that can go wrong with it: bounded in time, size and number of tries.

Refused outright: redirects, and replies that are encoded or larger than 64 kB. Tried again, three times in all: no
connection, a time-out, a reply that broke off or is no JSON, and the statuses that mean "later". No error holds a
header, a body or a key.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from moesteer import files

TRIES = 3
MOST_BYTES = 64 * 1024
LATER = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses worth another try."""
DOWN_AFTER = 8
"""Requests in a row that nobody answered: from then on each is tried once, until one is answered."""


class CallError(Exception):
    """Why there is no reply. code: one word to count by; status: of HTTP, where one came."""

    def __init__(self, code: str, what: str, *, status: int | None = None, again: bool = False) -> None:
        super().__init__(what)
        self.code, self.status, self.again = code, status, again
        self.wait_s: float | None = None


class Caller:
    """Calls one URL. url: `.../chat/completions`; key: sent as a bearer token."""

    def __init__(self, url: str, *, key: str | None, timeout_s: float, backoff_s: float, longest_wait_s: float) -> None:
        self._url, self._key = url, key
        self._timeout_s, self._backoff_s, self._longest_s = timeout_s, backoff_s, longest_wait_s
        self._unanswered = 0
        self._sleep = asyncio.sleep
        self.tried = 0

    @asynccontextmanager
    async def connected(self, connections: int) -> AsyncIterator[Any]:
        """An HTTP client for one event loop."""
        import httpx

        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "moesteer-judge"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # trust_env: a proxy or a .netrc of the environment must not see what is judged, nor add a password
        async with httpx.AsyncClient(
            headers=headers, limits=limits, timeout=self._timeout_s, follow_redirects=False, trust_env=False
        ) as client:
            yield client

    async def call(self, client: Any, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply's JSON object. Raises CallError after the last try."""
        tries = 1 if self._unanswered >= DOWN_AFTER else TRIES
        for number in range(1, tries + 1):
            try:
                found = await self._once(client, body)
            except CallError as fault:
                answered = fault.status is not None
                self._unanswered = 0 if answered else self._unanswered + 1
                if not fault.again or number == tries:
                    raise
                backoff = self._backoff_s * 2 ** (number - 1) if fault.wait_s is None else fault.wait_s
                await self._sleep(min(backoff, self._longest_s))
            else:
                self._unanswered = 0
                return found
        raise AssertionError("the last try returns or raises")

    async def _once(self, client: Any, body: Mapping[str, Any]) -> dict[str, Any]:
        import httpx

        self.tried += 1
        try:
            async with asyncio.timeout(self._timeout_s):  # of the whole reply: a slow trickle is a time-out too
                async with client.stream("POST", self._url, json=body) as response:
                    self._require_good(response)
                    data = await self._body(response)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise CallError("timeout", f"no whole reply within {self._timeout_s:g} s", again=True) from error
        except httpx.ConnectError as error:
            raise CallError("unreachable", "nobody answers at base_url", again=True) from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise CallError("broken-off", f"the connection broke ({type(error).__name__})", again=True) from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise CallError("request", f"the request cannot be sent ({type(error).__name__})") from error
        return _parsed(data)

    def _require_good(self, response: Any) -> None:
        status = int(response.status_code)
        if 300 <= status < 400:
            raise CallError("redirect", f"status {status}: redirects are refused", status=status)
        if status != 200:
            fault = CallError("http", f"status {status}", status=status, again=status in LATER)
            fault.wait_s = _retry_after(response.headers.get("Retry-After"))
            raise fault
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise CallError("encoded", "the reply is compressed, which was not asked for", status=status)

    async def _body(self, response: Any) -> bytes:
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > MOST_BYTES:
                raise CallError("too-large", f"more than {MOST_BYTES} bytes", status=200)
        return bytes(data)


def _parsed(data: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, no NaN, no key twice."""
    if not data.strip():
        raise CallError("empty", "an empty reply", status=200, again=True)
    try:
        found = files.parse_json(data)
    except (ValueError, RecursionError) as error:
        raise CallError("not-json", f"{len(data)} bytes that are not JSON", status=200, again=True) from error
    if not isinstance(found, dict):
        raise CallError("not-json", "JSON, and not an object", status=200)
    return found


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, where the header says so as a number."""
    if value is None or not value.strip().isdecimal() or not value.isascii():
        return None
    return float(value.strip()[:6])

"""Reading from the Hugging Face Hub: names, one bounded GET, and its errors in four parts.

A reply is read as a stream up to a limit, undecoded, within a deadline. A redirect is followed to the endpoint's own
host, or from huggingface.co to its storage hosts; the token goes to the endpoint only and is in no message.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import huggingface_hub
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from moesteer import files
from moesteer.errors import HubError, InputError, LimitError
from moesteer.version import __version__

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
TRIES = 3
WAITS_S = (1.0, 2.0)
MOST_WAIT_S = 10.0
TIMEOUT_S = 30.0
"""How long a connection, or the next bytes of a reply, may take."""
DEADLINE_S = 120.0
"""How long a whole reply may take."""
MOST_REDIRECTS = 3
JSON_BYTES = 4 * files.MIB
_AGAIN = frozenset({429, 500, 502, 503, 504})
_STORAGE = (".huggingface.co", ".hf.co")
FAILURES: tuple[type[BaseException], ...] = (HfHubHTTPError.__mro__[1], OSError)
"""What the HTTP library of huggingface_hub raises (httpx or httpx2, by its version: the base of its own error)."""


def repository(name: str) -> tuple[str, str | None]:
    """`ORG/NAME` or `ORG/NAME@REVISION` in two parts. Raises InputError."""
    repo, at, revision = name.partition("@")
    parts = repo.split("/")
    fine = len(parts) == 2 and all(NAME.fullmatch(part) and ".." not in part and part[-1] not in ".-" for part in parts)
    if fine and at:
        fine = bool(REVISION.fullmatch(revision)) and ".." not in revision and "//" not in revision
    if not fine:
        raise InputError(
            f"{name!r} is not a repository of the Hub"[:200],
            where="the repository's name",
            expected="ORG/NAME, or ORG/NAME@REVISION with a branch, a tag or a commit",
            do="copy the name from the repository's page, without https://",
        )
    return repo, revision if at else None


def endpoint_of(given: str | None) -> str:
    """The Hub's address: given, else HF_ENDPOINT, else huggingface.co. Raises InputError."""
    address = (given or constants.ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(address)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
        fine = fine and parts.port != 0  # reading the port checks it
    except ValueError:  # a port that is none
        fine = False
    if not fine:
        raise InputError(
            f"{address!r} is not the address of a Hub"[:200],
            where="HF_ENDPOINT",
            expected="https://HOST, or http://HOST:PORT on this machine",
            do="correct HF_ENDPOINT, or unset it for huggingface.co",
        )
    return address


def info(repo: str, *, revision: str | None, endpoint: str) -> dict[str, Any]:
    """What the Hub says of a model repository at a revision (None: its main branch), with its files and their sizes.

    Raises HubError; InputError where there is no such repository or revision, or no leave to read it.
    """
    url = f"{endpoint}/api/models/{repo}/revision/{quote(revision or 'main', safe='')}?blobs=true"
    what = f"{repo}{'@' + revision if revision else ''}"
    data = get(url, endpoint=endpoint, limit=JSON_BYTES, what=what)
    try:
        found = files.parse_json(data)
        if not isinstance(found, dict) or not COMMIT.fullmatch(str(found.get("sha"))):
            raise ValueError("it names no commit")
        if not isinstance(found.get("siblings"), list):
            raise ValueError("it lists no files")
    except (ValueError, RecursionError) as error:
        raise _answer(f"the answer about the repository cannot be read: {error}", where=what) from error
    return found


def get(url: str, *, endpoint: str, limit: int, what: str) -> bytes:
    """The bytes behind a URL of the Hub, at most `limit`; tried three times where the Hub is busy or out of reach.

    what: the repository, for messages. Raises HubError, InputError (absent, gated), LimitError.
    """
    for attempt in range(TRIES):
        wait = WAITS_S[min(attempt, len(WAITS_S) - 1)]
        try:
            found = _followed(url, endpoint=endpoint, limit=limit, what=what)
        except OfflineModeIsEnabled as error:
            raise offline(what) from error
        except FAILURES as error:
            if attempt == TRIES - 1:
                raise unreachable(error, where=f"{what}, {endpoint}") from error
        else:
            if isinstance(found, bytes):
                return found
            wait = _asked(found[1], wait)
            if attempt == TRIES - 1:
                raise refusal(found[0], found[1], what=what)
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _followed(url: str, *, endpoint: str, limit: int, what: str) -> bytes | tuple[int, Mapping[str, str]]:
    """The body; or status and headers of a reply after which to try again. Raises what `get` does, and FAILURES."""
    for _ in range(MOST_REDIRECTS + 1):
        ours = _origin(url) == _origin(endpoint)
        headers = {"User-Agent": f"moesteer/{__version__}", **(_authorization() if ours else {})}
        headers["Accept-Encoding"] = "identity"  # what is limited is what arrives
        begun = time.monotonic()
        with get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=TIMEOUT_S) as reply:
            if reply.status_code in (301, 302, 303, 307, 308):
                url = _target(url, reply.headers.get("location", ""), endpoint=endpoint, what=what)
                continue
            if reply.status_code in _AGAIN:
                return reply.status_code, dict(reply.headers)
            if reply.status_code != 200:
                raise refusal(reply.status_code, reply.headers, what=what)
            return _body(reply, limit=limit, what=what, until=begun + DEADLINE_S)
    raise _answer(f"the Hub redirects more than {MOST_REDIRECTS} times", where=what)


def _authorization() -> dict[str, str]:
    """The header of the login, if there is one: the token of huggingface_hub's own files or environment."""
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else huggingface_hub.get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _body(reply: Any, *, limit: int, what: str, until: float) -> bytes:
    if reply.headers.get("content-encoding", "identity") != "identity":
        raise _answer("the reply is compressed, which was not asked for", where=what)
    stated = reply.headers.get("content-length", "")
    if re.fullmatch(r"[0-9]{1,19}", stated) and int(stated) > limit:
        raise too_large(int(stated), limit=limit, what=what)
    data = bytearray()
    for chunk in reply.iter_raw():
        data += chunk
        if len(data) > limit:
            raise too_large(len(data), limit=limit, what=what)
        if time.monotonic() > until:
            raise unreachable(TimeoutError(f"not done after {DEADLINE_S:g} s"), where=what)
    return bytes(data)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _target(url: str, location: str, *, endpoint: str, what: str) -> str:
    """Where a redirect leads, if that is the endpoint itself or a storage host of huggingface.co. Raises HubError."""
    try:
        target = urljoin(url, location)
        scheme, host, port = _origin(target)
        storage = _origin(endpoint)[1] in ("huggingface.co", "hf.co") and scheme == "https" and port == 443
        if location and ((scheme, host, port) == _origin(endpoint) or (storage and (host or "").endswith(_STORAGE))):
            return target
    except ValueError:
        host = None
    raise _answer(f"the Hub redirects to another host ({printable(host or 'none', most=80)})", where=what)


def _asked(headers: Mapping[str, str], wait: float) -> float:
    """Retry-After in seconds, up to a cap; else the wait given."""
    text = headers.get("retry-after", "").strip()
    return min(float(text), MOST_WAIT_S) if re.fullmatch(r"[0-9]{1,9}", text) else wait


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, calls of huggingface_hub itself wait at most TIMEOUT_S for the next bytes (by default: for ever)."""
    session = get_session()
    before = session.timeout
    session.timeout = TIMEOUT_S
    try:
        yield
    finally:
        session.timeout = before


def printable(text: str, *, most: int = 300) -> str:
    """A server's words for a message: one line, nothing a terminal acts on, no token of ours."""
    token = huggingface_hub.get_token()
    if token:
        text = text.replace(token, "(token)")
    kept = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(kept.split())[:most]


def refusal(status: int, headers: Mapping[str, str], *, what: str) -> Exception:
    """The error for a status that is no success. The body is not shown: it may be anything."""
    code, said = headers.get("x-error-code", ""), printable(headers.get("x-error-message", ""), most=160)
    reason = f" ({said})" if said else ""
    if status == 404 and code == "RevisionNotFound":
        return _absent("has no such revision", what=what, do="look at the repository's branches, tags and commits")
    if status == 404 and code == "EntryNotFound":
        return _absent(
            "has no such file", what=what, do="check that it is a repository of a mask (`mask push` made it)"
        )
    if status == 404:
        return _absent("is not on the Hub", what=what, do="check its name; a private one needs `hf auth login`")
    if status == 403 and code == "GatedRepo":
        return _absent("is gated, and you have no access", what=what, do="ask for access on the repository's page")
    if status in (401, 403):
        return InputError(
            f"the Hub refuses ({status}){reason}",
            where=what,
            expected="a repository that is public, or a login that may use it",
            do="`hf auth login` with a token that has the right (write, to push)",
        )
    return HubError(
        "the Hub is busy: too many requests (429)" if status == 429 else f"the Hub answers {status}{reason}",
        where=what,
        expected="a reply of the Hub",
        do="try again later; status.huggingface.co says whether the Hub is well",
    )


def _absent(how: str, *, what: str, do: str) -> InputError:
    return InputError(f"{what} {how}", where="the Hub", expected="a repository that you may read", do=do)


def _answer(what: str, *, where: str) -> HubError:
    return HubError(what, where=where, expected="the Hub's own answer", do="check HF_ENDPOINT and any proxy between")


def too_large(size: int, *, limit: int, what: str) -> LimitError:
    """The error for a reply beyond its limit; sizes in bytes."""
    return LimitError(
        f"{size:,} bytes or more are offered, and {limit:,} are the most that is taken",
        where=what,
        expected=f"at most {limit:,} bytes",
        do="check that it is the repository you meant",
    )


def offline(what: str) -> InputError:
    """The error for HF_HUB_OFFLINE."""
    return InputError(
        "HF_HUB_OFFLINE is set, and this needs the Hub",
        where=what,
        expected="a network and leave to use it",
        do="unset HF_HUB_OFFLINE and run the same command again",
    )


def unreachable(error: BaseException, *, where: str) -> HubError:
    """The error for a connection that fails, is cut or is too slow."""
    why = printable(str(error), most=160) or type(error).__name__
    return HubError(
        f"the Hub cannot be reached, or its reply was cut off: {why}",
        where=where,
        expected=f"a whole reply within {DEADLINE_S:g} s",
        do="check the network and HF_ENDPOINT, and run the same command again",
    )

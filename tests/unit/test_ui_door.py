"""The door in front of the page, and how it is served: names, origins, paths, tokens, sizes, policies."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moesteer.cli.main import app as command_line
from moesteer.errors import FileError, InputError, MissingExtraError
from moesteer.ui.door import MOST_BODY_BYTES, READ, WRITTEN, Door
from moesteer.ui.serving import Serving, as_models, listen, names_of, require_host, serve
from tests.server.attacks import TRAVERSALS
from tests.unit.ui_by_hand import write_run

HOST = "127.0.0.1:7860"
ORIGIN = ("origin", f"http://{HOST}")
JSON = ("content-type", "application/json")
SMALL = (ORIGIN, JSON, ("content-length", "2"))


class Inside:
    """What is behind the door: notes what came through, and answers with a page."""

    def __init__(self) -> None:
        self.came: list[tuple[str, str, bytes]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        assert scope["path"] != "/" or not any(name == b"accept-encoding" for name, _ in scope["headers"])
        self.came.append((scope["method"], scope["path"], scope["query_string"]))
        if scope["method"] == "POST":
            self.bodies.append((await receive())["body"])
        body = b'<link rel="manifest" href="/m"><script>a</script><script type="module" src="b"></script><scripted>'
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": body[:30], "more_body": True})
        await send({"type": "http.response.body", "body": body[30:]})


def ask(
    door: Door, path: str, *headers: tuple[str, str], method: str = "GET", host: str | None = HOST, query: str = "",
    body: bytes = b"{}", whole: bool = True,
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    """(status, headers, body) of one request."""
    sent: list[Any] = []
    named = [("host", host)] if host is not None else []
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(),
        "headers": [(k.encode(), v.encode()) for k, v in (*named, ("accept-encoding", "br"), *headers)],
    }  # fmt: skip

    parts = [{"type": "http.request", "body": body[i : i + 7], "more_body": True} for i in range(0, len(body), 7)]
    parts.append({"type": "http.request", "body": b"", "more_body": False} if whole else {"type": "http.disconnect"})

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(door(scope, receive, send))
    answered = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, answered


@pytest.fixture
def inside() -> Inside:
    return Inside()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "secret", state={}, report="secret")
    write_run(tmp_path / "runs" / "a b" / "c<d>", state={}, report="<h1>report</h1>")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret")
    return tmp_path / "runs"


@pytest.fixture
def door(inside: Inside, runs: Path) -> Door:
    return Door(inside, hosts=names_of("127.0.0.1", 7860), runs=runs)


def test_the_page_runs_its_own_scripts_only(door: Door, inside: Inside) -> None:
    (status, headers, body), (_, again, _) = (ask(door, "/", query="deep_link=x&__theme=dark") for _ in range(2))
    policy = headers["content-security-policy"]
    nonce = re.search(r"'nonce-([\w-]{20,})'", policy)
    assert status == 200 and nonce is not None and nonce[1] not in again["content-security-policy"]
    assert body.count(f'<script nonce="{nonce[1]}"'.encode()) == 2 and b"<scripted>" in body and b"manifest" not in body
    assert "default-src 'self'" in policy and "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert "http:" not in policy and "*" not in policy and "connect-src 'self'" in policy
    assert headers["content-length"] == str(len(body)) and inside.came[0][2] == b"", "Gradio sees no deep link"


@pytest.mark.parametrize("host", ["192.0.2.1:7860", "evil.example", "evil.example:7860", "127.0.0.1", "", None,
                                  "127.0.0.1:7861", "127.0.0.1:7860.evil.example"])  # fmt: skip
def test_other_names_are_not_answered(door: Door, inside: Inside, host: str | None) -> None:
    assert ask(door, "/", host=host)[0] == 421 and ask(door, "/runs/a b/c<d>/report.html", host=host)[0] == 421
    assert not inside.came
    assert ask(door, "/", ("host", HOST))[0] == 421, "two names"
    assert {ask(door, "/", host=name)[0] for name in ("localhost:7860", "LOCALHOST:7860", "[::1]:7860")} == {200}


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:7860", "http://localhost:7860", ""]
)
def test_other_sites_cannot_use_it(door: Door, inside: Inside, origin: str) -> None:
    for method, path in (("GET", "/config"), ("POST", "/gradio_api/queue/join")):
        assert ask(door, path, ("origin", origin), JSON, ("content-length", "2"), method=method)[0] == 403
    assert ask(door, "/gradio_api/queue/join", JSON, ("content-length", "2"), method="POST")[0] == 403, "no origin"
    assert not inside.came
    assert ask(door, "/gradio_api/queue/join", *SMALL, method="POST")[0] == 200


REFUSED = (
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/gradio_api/file/etc/passwd",
    "/file=/etc/passwd", "/gradio_api/proxy=http://192.0.2.1/", "/proxy=https://x.hf.space/", "/gradio_api/upload",
    "/gradio_api/upload_progress", "/gradio_api/stream/x/1/2/playlist.m3u8", "/gradio_api/component_server",
    "/gradio_api/custom_component/1/2/3/x.js", "/gradio_api/info", "/gradio_api/openapi.json", "/openapi.json",
    "/docs", "/gradio_api/call/ask", "/gradio_api/api/ask", "/gradio_api/run/ask", "/gradio_api/runs",
    "/gradio_api/run-history/records", "/gradio_api/dev/reload", "/monitoring", "/gradio_api/vibe-edit",
    "/gradio_api/process_recording", "/gradio_api/deep_link", "/gradio_api/token", "/login", "/gradio_api/mcp/sse",
    "/svelte/../../x", "/manifest.json", "/robots.txt", "/pwa_icon", "//", "/./", "/config/", "/assets/../config",
    "/assets/..\\..\\x", "/static//etc/passwd", "/assets/\0", "/assets/a/../../x",
    "/gradio_api/heartbeat/../file=/etc/passwd", "/gradio_api/queue/join", "/gradio_api//queue/data", "",
    "etc/passwd", "/runs/", "/runs/report.html", "/runs/a b/c<d>/run.json", "/runs/a b/c<d>", "/runs/x/report.html",
)  # fmt: skip


@pytest.mark.parametrize("path", REFUSED)
def test_paths_that_the_page_does_not_need_are_not_there(door: Door, inside: Inside, path: str) -> None:
    if path not in READ:
        assert ask(door, path)[0] == 404
    if path not in WRITTEN:
        assert ask(door, path, *SMALL, method="POST")[0] == 404
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert ask(door, path, *SMALL, method=method)[0] == 404
    assert not inside.came


@pytest.mark.parametrize("name", [*(name for name in TRAVERSALS if "\ud800" not in name), "link", "../secret", "a b"])
def test_reports_of_no_run_are_not_there(door: Door, inside: Inside, name: str) -> None:
    assert ask(door, f"/runs/{name}/report.html")[0] == 404
    assert not inside.came


def test_a_report_is_served_in_a_sandbox(door: Door, inside: Inside) -> None:
    status, headers, body = ask(door, "/runs/a b/c<d>/report.html")
    assert (status, body, inside.came) == (200, b"<h1>report</h1>", [])
    policy = headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none'") and "allow-same-origin" not in policy
    assert "frame-ancestors 'self'" in policy and headers["x-content-type-options"] == "nosniff"


def test_bodies_are_small_json(door: Door, inside: Inside) -> None:
    for headers, status in (
        ((ORIGIN, JSON), 411),
        ((ORIGIN, JSON, ("content-length", "x")), 411),
        ((ORIGIN, JSON, ("content-length", "2"), ("content-length", "3")), 411),
        ((ORIGIN, JSON, ("content-length", str(MOST_BODY_BYTES + 1))), 413),
        ((ORIGIN, ("content-type", "text/plain"), ("content-length", "2")), 415),
        ((ORIGIN, ("content-length", "2")), 415),
    ):
        assert ask(door, "/gradio_api/run/predict", *headers, method="POST")[0] == status
    assert not inside.came
    assert ask(door, "/gradio_api/run/predict", *SMALL, method="POST")[0] == 200


FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b'{"data": ["text", 1, 0.5, true, null, ["a", "b"], []], "fn_index": 3, "session_hash": "x"}', 200),
        (b'{"data": [], "event_data": {"index": 1, "value": "Chat", "selected": true}}', 200),
        (b'{"event_id": "x"}', 200),
        *(
            (json.dumps({"data": data}).encode(), 400)
            for data in ([FILE], [[FILE]], ["a", ["b", FILE]], [["a", ["b"]]])
        ),
        *((json.dumps({"data": data}).encode(), 400) for data in (FILE, "text", None, [{}], [["a", 1]], [["a", None]])),
        (b'{"data": ["text"], "data": [{"path": "/etc/passwd"}]}', 400),
        (b'{"data": [NaN]}', 400),
        (b"[]", 400),
        (b"", 400),
        (b"\xff", 400),
        (b"[" * 200_000, 400),
    ],
)
def test_only_plain_values_come_in(door: Door, inside: Inside, sent: bytes, status: int) -> None:
    for path in sorted(WRITTEN):
        assert ask(door, path, *SMALL, method="POST", body=sent)[0] == status
        assert ask(door, path, *SMALL, method="POST", body=sent, whole=False)[0] == 400, "a body that ends early"
    assert inside.bodies == ([sent] * len(WRITTEN) if status == 200 else [])


def test_strangers_need_the_token(inside: Inside, runs: Path) -> None:
    door = Door(inside, hosts=None, runs=runs, token="t0ken")
    for path, query, cookie in (
        ("/", "", None), ("/", "token=", None), ("/", "token=wrong", None), ("/", "token=t0ken&token=t0ken", None),
        ("/config", "token=t0ken", None), ("/runs/a b/c<d>/report.html", "", None), ("/", "", "moesteer_ui=wrong"),
        ("/", "", "other=t0ken"), ("/", "", "moesteer_ui=\u00fc"),
    ):  # fmt: skip
        headers = [("cookie", cookie)] if cookie is not None else []
        assert ask(door, path, *headers, host="any.example", query=query)[0] in (400, 401), (path, query, cookie)
    assert not inside.came
    status, headers, _ = ask(door, "/", host="any.example", query="token=t0ken")
    assert status == 303 and headers["location"] == "/" and "HttpOnly" in headers["set-cookie"]
    held = headers["set-cookie"].split(";")[0]
    assert ask(door, "/", ("cookie", f"a=b; {held}"), host="any.example")[0] == 200
    assert ask(door, "/config", ("cookie", held), ("origin", "http://evil.example"), host="any.example")[0] == 403


def test_other_connections_are_closed(door: Door, inside: Inside) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(door({"type": "websocket", "path": "/", "headers": []}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}] and not inside.came


# ---- serving


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "127.0.0.1.example.org", "localhost.", ""]
)
def test_other_machines_are_refused_unless_asked_for(host: str) -> None:
    with pytest.raises(InputError, match="reached from other machines") as caught:
        require_host(Serving(host=host))
    assert "--allow-remote" in caught.value.do
    assert require_host(Serving(host=host, allow_remote=True))


def test_this_machine_is_not_remote() -> None:
    assert not any(require_host(Serving(host=host)) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert names_of("::1", 80) == ["[::1]:80", "127.0.0.1:80", "localhost:80"]
    assert as_models(None) == ("lab-tiny",) and as_models(["a", "b", "a"]) == ("a", "b")


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot listen"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="cannot listen"):
        listen("192.0.2.1", 0)
    listen("127.0.0.1", 0).close()


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    ran = CliRunner().invoke(command_line, ["ui", "--host", "0.0.0.0", "--no-open"])
    assert isinstance(ran.exception, InputError) and ran.exception.exit_code == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is a file"):
        serve(Serving(runs=tmp_path / "file", port=0, open_browser=False))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesteer.backends.sources.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        serve(Serving(port=0))
    assert caught.value.do == "pip install 'moesteer[ui]'"

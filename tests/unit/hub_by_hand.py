"""A Hub on 127.0.0.1, of the standard library: what huggingface_hub and moesteer ask of it, and faults to order."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "notatoken" * 3


@dataclass
class Repo:
    """A model repository: one commit. large: files that are kept in LFS, whose digest is listed."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    tags: tuple[str, ...] = ("moesteer",)
    commit: str = "1" * 40
    large: tuple[str, ...] = ()
    id: str | None = None


@dataclass
class Reply:
    """An answer to send as it is. slow: seconds before each byte; cut: bytes to leave out of what is announced."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    slow: float = 0.0
    cut: int = 0
    reset: bool = False


class Hub:
    """repos by name; `faults` by step (info, resolve, create, yaml, preupload, batch, put, commit): next answers."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, list[Reply]] = {}
        self.asked: list[tuple[str, str, str, dict[str, str]]] = []
        self.stored: dict[str, bytes] = {}
        self.upload_mode = "regular"
        self.ignored: set[str] = set()
        self.address = ""

    def steps(self) -> list[str]:
        """The steps that were asked for, in order."""
        return [step for step, *_ in self.asked]

    # ---- what the Hub answers

    def answer(self, step: str, path: str, body: bytes) -> Reply:
        handler: Callable[[str, bytes], Reply] = getattr(self, f"_{step}")
        return handler(path, body)

    def _info(self, path: str, body: bytes) -> Reply:
        name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        repo = self.repos.get(name)
        if repo is None:
            return missing("RepoNotFound")
        if unquote(revision) not in ("main", "v1", "refs/pr/1", repo.commit):
            return missing("RevisionNotFound")
        siblings = []
        for file, data in repo.files.items():
            listed: dict[str, object] = {"rfilename": file, "size": len(data)}
            if file in repo.large:
                listed["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            siblings.append(listed)
        found = {"id": repo.id or name, "sha": repo.commit, "private": repo.private, "tags": list(repo.tags),
                 "siblings": siblings}  # fmt: skip
        return Reply(body=json.dumps(found).encode())

    def _resolve(self, path: str, body: bytes) -> Reply:
        name, _, rest = path.strip("/").partition("/resolve/")
        commit, _, file = rest.partition("/")
        repo = self.repos[name]
        if commit != repo.commit or file not in repo.files:
            return missing("EntryNotFound")
        return Reply(body=repo.files[file], headers={"Content-Type": "application/octet-stream"})

    def _create(self, path: str, body: bytes) -> Reply:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repos:
            return Reply(409, json.dumps({"error": "You already created this model repo"}).encode())
        self.repos[name] = Repo(
            {".gitattributes": b"*.safetensors filter=lfs\n"},
            tags=(),
            private=wanted.get("visibility") == "private" or bool(wanted.get("private")),
        )
        return Reply(body=json.dumps({"url": f"{self.address}/{name}", "name": name}).encode())

    def _yaml(self, path: str, body: bytes) -> Reply:
        return Reply(body=b'{"errors": [], "warnings": []}')

    def _preupload(self, path: str, body: bytes) -> Reply:
        found = [
            {"path": one["path"], "shouldIgnore": one["path"] in self.ignored,
             "uploadMode": self.upload_mode if one["path"].endswith(".safetensors") else "regular"}
            for one in json.loads(body)["files"]
        ]  # fmt: skip
        return Reply(body=json.dumps({"files": found}).encode())

    def _batch(self, path: str, body: bytes) -> Reply:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.address}/put/{one['oid']}", "header": {}}}}
            for one in json.loads(body)["objects"]
        ]
        return Reply(body=json.dumps({"objects": objects, "transfer": "basic"}).encode())

    def _put(self, path: str, body: bytes) -> Reply:
        self.stored[path.rpartition("/")[2]] = body
        return Reply()

    def _commit(self, path: str, body: bytes) -> Reply:
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        repo = self.repos[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.stored[value["oid"]]
                repo.large += (value["path"],)
        repo.commit = hashlib.sha1(body).hexdigest()
        found = {"commitUrl": f"{self.address}/{name}/commit/{repo.commit}", "commitOid": repo.commit}
        return Reply(body=json.dumps(found).encode())


def missing(code: str) -> Reply:
    """A 404 as the Hub gives it."""
    return Reply(404, b'{"error": "x"}', {"X-Error-Code": code, "X-Error-Message": "not here"})


def _step(method: str, path: str) -> str:
    ends = {"/api/repos/create": "create", "/api/validate-yaml": "yaml"}
    if path in ends:
        return ends[path]
    for part, step in (("/preupload/", "preupload"), ("/commit/", "commit"), ("/info/lfs/", "batch"),
                       ("/resolve/", "resolve"), ("/revision/", "info")):  # fmt: skip
        if part in path:
            return step
    return "put" if method == "PUT" else "info"


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two packets

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            step = _step(self.command, path)
            hub.asked.append((step, self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            ordered = hub.faults.get(step) or []
            reply = ordered.pop(0) if ordered else hub.answer(step, path, body)
            if reply.reset:
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(reply.status)
            for key, value in reply.headers.items():
                self.send_header(key, value)
            if "Transfer-Encoding" not in reply.headers:
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            sent = reply.body[: len(reply.body) - reply.cut]
            try:
                if reply.slow:
                    for byte in sent:
                        time.sleep(reply.slow)
                        self.wfile.write(bytes([byte]))
                else:
                    self.wfile.write(sent)
            except OSError:  # whoever asked has had enough
                pass
            if reply.cut:
                self.close_connection = True

        do_GET = do_POST = do_PUT = do_HEAD = _serve

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what the tests are about; anything else is a fault of this file."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub at hub.address while the block runs."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

"""Serving the page: on this machine only unless told otherwise, offline, until it is closed."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesteer.errors import FileError, InputError
from moesteer.stopping import ending_on_sigterm

OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Set before Gradio and the Hub's library are imported."""
REMOTE = (
    "warning: others can reach this page. Whoever has its address with the token can ask the model, read the runs and "
    "start audits, over a connection that is not encrypted"
)


@dataclass(frozen=True)
class Serving:
    """What to serve. models: the first is loaded at the start; masks: files; runs: the folder to browse.

    load_options: of backends.loading.load; audit_options: arguments of every audit; command: for tests.
    """

    models: tuple[str, ...] = ("lab-tiny",)
    masks: tuple[Path, ...] = ()
    runs: Path = Path("runs")
    host: str = "127.0.0.1"
    port: int = 7860
    allow_remote: bool = False
    allow_other_checkpoint: bool = False
    open_browser: bool = True
    load_options: dict[str, Any] = field(default_factory=dict)
    audit_options: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None


def serve(serving: Serving, *, told: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM; then stop the audit, if one runs. told: takes what the user is to know.

    Raises InputError (a host that is not this machine, a port in use), MissingExtraError, and what loading a model
    or a mask raises.
    """
    from moesteer.backends.sources import require_extra

    require_extra("gradio", "ui", what="the page is made with Gradio", where="moesteer ui")
    remote, serving = require_host(serving), replace(serving, runs=_folder(serving.runs))
    listening = listen(serving.host, serving.port)
    try:
        with tempfile.TemporaryDirectory(prefix="moesteer-ui-") as folder:
            go_offline()
            os.environ["GRADIO_TEMP_DIR"] = folder
            _serve(serving, listening, remote=remote, told=told)
    finally:
        listening.close()


def go_offline() -> None:
    """Tell Gradio and the Hub's library, before they are imported, to ask nobody and to tell nobody."""
    os.environ.update(OFFLINE)


def require_host(serving: Serving) -> bool:
    """Whether others can reach the page. Raises InputError where that was not asked for."""
    remote = not _is_loopback(serving.host)
    if remote and not serving.allow_remote:
        raise InputError(
            f"{serving.host} can be reached from other machines",
            where="--host",
            expected="127.0.0.1, ::1 or localhost",
            do="leave --host out, or give --allow-remote: whoever has the address can ask the model and read the runs",
        )
    return remote


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free. Raises InputError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(64)
    except OSError as error:
        made.close()
        raise InputError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            where="--host and --port",
            expected="an address of this machine and a port that is free",
            do="give another --port, or 0 for any that is free",
        ) from error
    return made


def names_of(host: str, port: int) -> list[str]:
    """What browsers may call this server: values of the Host header."""
    shown = f"[{host}]" if ":" in host else host
    return list(dict.fromkeys(f"{name}:{port}" for name in (shown, "127.0.0.1", "localhost", "[::1]")))


def _serve(serving: Serving, listening: socket.socket, *, remote: bool, told: Callable[[str], None]) -> None:
    import uvicorn

    from moesteer.ui.audits import Audits
    from moesteer.ui.catalogue import Catalogue
    from moesteer.ui.door import Door
    from moesteer.ui.session import Session

    catalogue = Catalogue(serving.models, serving.masks, serving.runs)
    catalogue.load_masks(tuple(path.as_posix() for path in serving.masks))  # one that is bad is told of now
    session = Session(
        catalogue, allow_other_checkpoint=serving.allow_other_checkpoint, loader=_loader(serving.load_options)
    )
    session.use(serving.models[0])
    audits = Audits(catalogue, options=serving.audit_options, command=serving.command)
    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(24) if remote else None
    hosts = None if remote else names_of(serving.host, port)
    door = Door(application(session, audits), hosts=hosts, runs=catalogue.runs, token=token)
    config = uvicorn.Config(
        door, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=2, server_header=False
    )
    if remote:
        told(REMOTE)
    shown = f"[{serving.host}]" if ":" in serving.host else serving.host
    url = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    told(f"moesteer ui on {url}   (Ctrl-C ends it)")
    if serving.open_browser:
        threading.Timer(1.0, _open, args=(url,)).start()
    with ending_on_sigterm():  # uvicorn raises what ended it once more, after its own end
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except (KeyboardInterrupt, SystemExit):
            told("moesteer ui: ended")
        finally:
            session.stop()
            audits.close()


def application(session: Any, audits: Any) -> Any:
    """The page as an ASGI application, without the door before it: never serve it alone."""
    import gradio as gr
    from fastapi import FastAPI

    from moesteer.ui import markup
    from moesteer.ui.app import Parts, page, theme

    blocks = page(Parts(session, audits))
    blocks.has_launched = True  # only then does Gradio check the paths of what it copies
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), blocks, path="/",
        server_name="127.0.0.1", footer_links=[], run_history=False, mcp_server=False, ssr_mode=False,
        pwa=False,
        allowed_paths=[], blocked_paths=["/"], show_error=False, max_file_size=0, enable_monitoring=False,
        theme=theme(), css=markup.style(),
    )  # fmt: skip


def _loader(options: dict[str, Any]) -> Callable[[str], Any]:
    from moesteer.backends.loading import load

    return lambda name: load(name, **options)


def _folder(runs: Path) -> Path:
    """The runs folder, made absolute; it need not be there yet. Raises FileError for something else."""
    if runs.exists() and not runs.is_dir():
        raise FileError("the runs folder is a file", where=str(runs), expected="a folder", do="give another --runs")
    return runs.resolve()


def _open(url: str) -> None:
    """Open the address in the user's browser, where there is a screen to show it on: not one of text."""
    screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if screen:
        webbrowser.open(url)


def as_models(names: Sequence[str] | None) -> tuple[str, ...]:
    """The models to offer: lab-tiny where none is named."""
    return tuple(dict.fromkeys(names or ("lab-tiny",)))

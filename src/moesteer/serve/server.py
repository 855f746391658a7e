"""`moesteer serve`: vLLM's own OpenAI-compatible server, with our masks inside and our policy before it.

Order of the start, so that no answer can be unsteered: settings and masks are read and compared with the checkpoint;
the environment is checked; the engine starts (its workers count and prove their routers, or it does not); every worker
reports; the canary is sent; the routes are compared with the list of those we know; only then does the port answer.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.backends.vllm.catalogue import Catalogue
from moesteer.backends.vllm.settings import Settings, settings_for
from moesteer.errors import InputError, ModelError, MoesteerError, NoEffectError
from moesteer.serve.canary import Canary, State, watch
from moesteer.serve.gated import GatedEngine
from moesteer.serve.masks_dir import selectable
from moesteer.serve.middleware import labels
from moesteer.serve.policy import CLIENT, PREFIX, Keys, Limits, read_keys

UNSAFE = {
    "VLLM_SERVER_DEV_MODE": "routes that change weights and run code in workers",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "pickles between processes",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "routes that load adapters, which are other weights than the mask was made for",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "answers in the log",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "clients choose the ids that workers know requests by",
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "routers that do not look at logits",
}
"""Environment variables that the server does not start with, and what each opens."""
KNOWN = ("vllm.", "prometheus_", "starlette.", "fastapi.")
"""Modules whose routes may answer."""
START_S = 300.0
"""How long the first canary may take: first steps compile."""
MOST_SAID = 1_000
"""Characters of an error message."""
LINGER_S = 5.0
"""How long a server that no longer steers still says so (503), before it ends."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Serving:
    """What the operator chose. alpha: of the pinned masks, one each (None: a mask's own).

    keys: file of clients' keys; admin: the admin's token; engine: further options of `vllm serve`, as words.
    canary_s, timeout_s: how often the canary is sent; how long a worker may take for one step.
    """

    model: str
    pins: tuple[Path, ...] = ()
    pin_alphas: tuple[float | None, ...] = ()
    masks: Path | None = None
    alphas: tuple[float, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    admin: str | None = None
    limits: Limits = field(default_factory=Limits)
    canary_s: float = 300.0
    timeout_s: float = 60.0
    audit: Path | None = None
    allow_other_checkpoint: bool = False
    unsafe: bool = False
    engine: tuple[str, ...] = ()


def serve(chosen: Serving) -> None:
    """Serve until stopped. Raises before the port answers for everything that is not as it should be."""
    _require_safe(chosen)
    settings = settings_of(chosen)
    keys = _keys(chosen)
    os.environ["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = str(max(1, round(chosen.timeout_s)))
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # backends/vllm/refusals.py
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    _log_audit(chosen.audit)
    args = engine_arguments(chosen, settings)
    asyncio.run(_serve(chosen, settings, keys, args))


def settings_of(chosen: Serving) -> Settings:
    """The plug-in's settings, every mask read. Raises MaskError, FileError, InputError, ModelError."""
    from moesteer.backends.fingerprinting import routers_of_files
    from moesteer.models.limits import require_possible

    if not chosen.pins and chosen.masks is None:
        raise InputError(
            "nothing to serve with",
            where="the command line",
            expected="--pin FILE, --masks DIR, or both: without a mask this is `vllm serve`",
            do="give a mask",
        )
    offered = {} if chosen.masks is None else selectable(chosen.masks, alphas=chosen.alphas)
    settings = settings_for(
        pins=list(zip(chosen.pins, chosen.pin_alphas or [None] * len(chosen.pins), strict=True)),
        masks=offered,
        allow_other_checkpoint=chosen.allow_other_checkpoint,
    )
    routers, fingerprint = routers_of_files(chosen.model)
    for member in Catalogue.load(settings).members:
        member.mask.check_model(fingerprint, allow_other_checkpoint=chosen.allow_other_checkpoint)
        require_possible(member.mask, routers)
    return settings


def _require_safe(chosen: Serving) -> None:
    """Raise InputError for an environment or a choice that would open the server to others."""
    on = [name for name in UNSAFE if os.environ.get(name, "").strip().lower() not in ("", "0", "false")]
    if on and not chosen.unsafe:
        raise InputError(
            f"the environment opens what must stay shut: {on[0]} ({UNSAFE[on[0]]})",
            where=", ".join(on),
            expected="these unset",
            do="unset it; --i-understand-unsafe starts all the same, and then nothing here can be relied on",
        )
    if chosen.host not in LOOPBACK and chosen.keys is None:
        raise InputError(
            "a server that others can reach needs keys",
            where=f"--host {chosen.host}",
            expected="--keys FILE with a line NAME:KEY for each client",
            do="make a file of keys, or leave the host at 127.0.0.1",
        )
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "moesteer" not in plugins.split(","):
        raise NoEffectError(
            "VLLM_PLUGINS shuts the plug-in out",
            where=f"VLLM_PLUGINS={plugins[:80]}",
            expected="moesteer among them, or the variable unset",
            do="add moesteer to it",
        )


def _keys(chosen: Serving) -> Keys:
    if chosen.keys is None:
        return Keys({}, chosen.admin)
    info = chosen.keys.stat() if chosen.keys.is_file() else None
    if info is None or info.st_mode & 0o077:
        raise InputError(
            "the file of keys can be read by others" if info is not None else "there is no such file of keys",
            where=str(chosen.keys),
            expected="a regular file that only its owner can read",
            do=f"chmod 600 {chosen.keys}",
        )
    text = files.read_bytes(chosen.keys, kind="table").decode("utf-8", "replace")
    clients = read_keys(text, where=str(chosen.keys))
    if not clients:
        raise InputError(
            "there is no key in the file of keys, so that anyone could ask",
            where=str(chosen.keys),
            expected="a line NAME:KEY for each client",
            do="write one; `openssl rand -hex 24` makes a key",
        )
    return Keys(clients, chosen.admin)


def _log_audit(path: Path | None) -> None:
    from moesteer.serve.middleware import audit

    handler = logging.StreamHandler() if path is None else logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(message)s" if path is not None else "audit %(message)s"))
    audit.handlers, audit.propagate = [handler], False
    audit.setLevel(logging.INFO)


OURS: Mapping[str, Any] = {
    "additional_config": ({}, None), "trust_remote_code": (False,), "api_key": (None, []), "middleware": ([], None),
    "enable_lora": (False, None), "lora_modules": (None, []), "root_path": (None, ""), "api_server_count": (None, 1),
    "load_format": ("auto", "safetensors"), "worker_extension_cls": ("", None), "enable_log_requests": (False,),
    "trust_request_chat_template": (False,), "trust_request_mm_kwargs": (False,), "logits_processors": (None, []),
    "headless": (False, None), "grpc": (False, None),
}  # fmt: skip
"""Options of `vllm serve` that must stay as they are, and the values they may have."""


def engine_arguments(chosen: Serving, settings: Settings) -> argparse.Namespace:
    """vLLM's own options, parsed by vLLM, with ours put in. Raises InputError for those that are not the operator's."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from moesteer.backends.sources import source_of

    parser = make_arg_parser(FlexibleArgumentParser(prog="moesteer serve MODEL --"))
    words = list(chosen.engine)
    if "--served-model-name" not in words:
        words += ["--served-model-name", chosen.model]
    if current_platform.is_cpu() and "--dtype" not in words:
        words += ["--dtype", "float32"]
    args = parser.parse_args([source_of(chosen.model), "--host", chosen.host, "--port", str(chosen.port), *words])
    args.model = source_of(chosen.model)
    changed = [name for name, may in OURS.items() if hasattr(args, name) and getattr(args, name) not in may]
    if changed:
        option = changed[0].replace("_", "-")
        raise InputError(
            f"--{option} is not among the options of the engine that can be chosen here",
            where=f"the options after --: {option} = {getattr(args, changed[0])!r}"[:200],
            expected="options that say how the model is run; who may ask for what is moesteer's",
            do=f"take --{option} out",
        )
    if (args.host, args.port, args.uds) != (chosen.host, chosen.port, None):
        raise InputError(
            "where to answer is not among the options of the engine",
            where=f"the options after --: host {args.host}, port {args.port}, uds {args.uds}"[:200],
            expected="--host and --port of moesteer serve, before the two dashes",
            do="put them there",
        )
    args.load_format = "safetensors"
    args.additional_config = settings.as_config()
    args.h11_max_incomplete_event_size = chosen.limits.header_bytes
    validate_parsed_serve_args(args)
    checked: argparse.Namespace = args
    return checked


async def _serve(chosen: Serving, settings: Settings, keys: Keys, args: argparse.Namespace) -> None:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import serve_http, setup_server

    from moesteer.serve.middleware import Policy

    _, sock = setup_server(args, reuse_port=False)
    try:
        async with build_async_engine_client(args) as engine:
            state = State()
            gated = GatedEngine(
                engine, Catalogue.load(settings), _chat(args, engine), tensor_ranks=_tensor_ranks(engine)
            )
            canary = await _prove(gated, chosen)
            shorten_messages()
            gated.install()
            tasks = await engine.get_supported_tasks()
            app = build_app(args, tasks, engine.model_config)
            await init_app_state(engine, app.state, args, tasks)
            require_known_routes(app.routes)
            inside = app.middleware_stack or app.build_middleware_stack()
            app.middleware_stack = Policy(inside, gated=gated, state=state, keys=keys, limits=chosen.limits)
            state.reason = ""
            print(_announced(chosen, gated.catalogue), file=sys.stderr, flush=True)
            watching = asyncio.create_task(_watch(canary, state, chosen))
            why = why_it_ends(engine, state)
            stopped = await serve_http(
                app, sock=sock, enable_ssl_refresh=args.enable_ssl_refresh, host=args.host, port=args.port,
                log_level=args.uvicorn_log_level, access_log=False, ssl_keyfile=args.ssl_keyfile,
                ssl_certfile=args.ssl_certfile, ssl_ca_certs=args.ssl_ca_certs, ssl_cert_reqs=args.ssl_cert_reqs,
                http="h11",  # with the faster parser, the limit on headers would not hold
                ssl_ciphers=args.ssl_ciphers, h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
                h11_max_header_count=args.h11_max_header_count,
            )  # fmt: skip
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            reason = why()
        await stopped
        if reason:
            raise NoEffectError(
                f"the server stopped answering: {reason}",
                where=chosen.model,
                expected="an engine that steers until it is stopped",
                do="see what the engine printed, and start it again",
            )
    finally:
        sock.close()


def why_it_ends(engine: Any, state: State) -> Callable[[], str]:
    """A function that says why the server ended; nothing where it was told to.

    vLLM stops the engine when it is told to end, and an engine that was stopped looks like one that died. So what there
    was to say is noted before that.
    """
    noted: list[str] = []
    shutdown = engine.shutdown

    def now() -> str:
        return "the engine died" if engine.errored else state.reason

    def noting(*args: Any, **options: Any) -> Any:
        if not noted:
            noted.append(now())
        return shutdown(*args, **options)

    engine.shutdown = noting
    return lambda: noted[0] if noted else now()


def shorten_messages() -> None:
    """Cut error messages, which may repeat a client's text, before vLLM cleans them in time cubic in their length."""
    from vllm.entrypoints.serve.exception_handling import utils

    original = utils.sanitize_message
    if getattr(original, "_moesteer", False):
        return

    def shortened(message: str, *args: Any, **kwargs: Any) -> str:
        found: str = original(message[:MOST_SAID], *args, **kwargs)
        return found

    shortened._moesteer = True  # type: ignore[attr-defined]
    for module in [m for name, m in sys.modules.items() if name.startswith("vllm.")]:
        if getattr(module, "sanitize_message", None) is original:
            module.sanitize_message = shortened  # type: ignore[attr-defined]


def _announced(chosen: Serving, catalogue: Catalogue) -> str:
    """What is served, for the operator: one line, and one for each mask that cannot be offered."""
    first = (
        f"moesteer: {chosen.model} at http://{chosen.host}:{chosen.port}/v1; pinned: {labels(catalogue.pins)}; "
        f"masks to choose from: {', '.join(sorted(catalogue.named)) or 'none'}"
    )
    refused = [f"moesteer: mask {name} is not offered: {why}" for name, why in sorted(catalogue.refused.items())]
    return "\n".join([first, *refused])


async def _watch(canary: Canary, state: State, chosen: Serving) -> None:
    """The canary; when it fails, answers end at once, and the process soon after, to be started again."""
    await watch(canary, state, every_s=chosen.canary_s, timeout_s=chosen.timeout_s)
    print(f"moesteer: no more answers: {state.reason}", file=sys.stderr, flush=True)
    await asyncio.sleep(LINGER_S)
    signal.raise_signal(signal.SIGTERM)


async def _prove(gated: GatedEngine, chosen: Serving) -> Canary:
    """Handshake and canary. Raises NoEffectError."""
    from moesteer.backends.fingerprinting import fingerprint_of_files

    canary = Canary(gated, fingerprint_of_files(chosen.model).layer_ids)
    try:
        await asyncio.wait_for(canary.start(), max(chosen.timeout_s, START_S))
    except MoesteerError:
        raise
    except TimeoutError as error:
        raise NoEffectError(
            "the canary had no answer in time",
            where=f"{chosen.model}, {max(chosen.timeout_s, START_S):g} s",
            expected="an answer of a few tokens",
            do="give the engine more time (--timeout): its first steps compile and are slow",
        ) from error
    except Exception as error:
        raise NoEffectError(
            f"the engine's workers do not answer: {str(error).splitlines()[0] if str(error) else repr(error)}"[:300],
            where=chosen.model,
            expected="the plug-in at work in every worker",
            do="check that moesteer is installed wherever workers run, and that MOESTEER_VLLM is not 0",
        ) from error
    return canary


def _tensor_ranks(engine: Any) -> int:
    return int(engine.vllm_config.parallel_config.tensor_parallel_size)


def _chat(args: argparse.Namespace, engine: Any) -> Any:
    """What tells where a conversation's last turn begins: the tokenizer, with the template the server uses."""
    from transformers import AutoTokenizer

    from moesteer.backends.chat import Chat
    from moesteer.backends.sources import as_model_errors

    with as_model_errors("no tokenizer for the model", name=args.model, do="check the folder"):
        tokenizer = AutoTokenizer.from_pretrained(
            args.tokenizer or args.model, revision=args.revision, trust_remote_code=False
        )
    if args.chat_template is not None:
        from vllm.renderers.chat_utils import load_chat_template

        tokenizer.chat_template = load_chat_template(args.chat_template)
    return Chat(tokenizer, name=args.model, context_tokens=int(engine.model_config.max_model_len), stops=())


def require_known_routes(routes: Sequence[Any]) -> None:
    """Raise ModelError unless every path that clients may ask for is answered by routes of vLLM and its libraries.

    All other routes stay shut (middleware.Policy); one that stood before a known one would answer in its place.
    """
    for method, path in sorted(CLIENT):
        if path.startswith(PREFIX):
            continue
        found = []
        for route in routes:
            regex, methods = getattr(route, "path_regex", None), getattr(route, "methods", None)
            if regex is not None and regex.match(path) and (methods is None or method in methods):
                found.append(route)
        origins = [_origin(route) for route in found]
        if not found or not all(origin.startswith(KNOWN) for origin in origins):
            raise ModelError(
                f"{len(found)} routes answer {method} {path}, from {', '.join(origins) or 'nowhere'}"[:300],
                where="the server's routes",
                expected="vLLM's own, or those of the libraries it is made with",
                do="take out plug-ins that add routes (VLLM_PLUGINS)",
            )


def _origin(route: Any) -> str:
    answers = getattr(route, "endpoint", None) or getattr(route, "app", None)
    return str(getattr(answers, "__module__", None) or type(answers).__module__)

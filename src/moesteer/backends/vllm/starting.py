"""Starting an engine of vLLM for offline use: what it is told, and why it did not start."""

from __future__ import annotations

import dataclasses
import inspect
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from moesteer.backends.vllm.output import Output
from moesteer.backends.vllm.settings import Settings
from moesteer.errors import InputError, ModelError, MoesteerError, UnknownNameError

DTYPES = ("auto", "float32", "bfloat16", "float16")
NOT_OPTIONS = (
    "model", "revision", "code_revision", "dtype", "additional_config", "trust_remote_code", "load_format",
    "config_format", "hf_config_path", "hf_overrides", "runner", "convert", "hf_token",
)  # fmt: skip
"""Of LLM's options, those that say which model is run: the masks are checked against the model that load was given.
And a secret: options are written into run.json."""
_INSTEAD = {
    "dtype": "dtype is an argument of its own (--dtype)",
    "hf_token": "a token belongs into HF_TOKEN, or `hf auth login`",
}
INSIST_S, STOP_S = 1.0, 3.0
"""Between one Ctrl-C and the next; what an engine that did not come up is given to end."""
KV_CACHE_BYTES = 2**30
"""Of the engine on a CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise: vLLM's own choice is most of the memory."""


def require_arguments(name: str, *, dtype: str, options: Mapping[str, Any]) -> None:
    """Refuse what can be refused before anything slow. Raises ModelError, InputError."""
    if dtype not in DTYPES:
        raise ModelError(
            f"no dtype {dtype!r}", where=name, expected=", ".join(DTYPES), do="give one of these as --dtype"
        )
    if ours := [key for key in NOT_OPTIONS if key in options]:
        raise InputError(
            f"{', '.join(ours)} cannot be set among the engine's options",
            where=name,
            expected="options of vLLM's LLM class that say how the model is run, not which",
            do="take it out" + next((f"; {told}" for key, told in _INSTEAD.items() if key in ours), ""),
        )


def start(
    source: str,
    name: str,
    settings: Settings | None,
    output: Output,
    *,
    dtype: str,
    revision: str | None,
    options: Mapping[str, Any],
) -> Any:
    """vLLM's LLM with the settings (None: for a model that nothing steers, a judge).

    Raises what its processes died of, where that is ours; else ModelError.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # refusals.py
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
    before = set(multiprocessing.active_children())
    try:
        with output.around_start(), _insisting():
            from vllm import LLM

            _require_options(options, name=name)
            return LLM(
                model=source, revision=revision, trust_remote_code=False, load_format="safetensors",
                additional_config=settings.as_config() if settings is not None else {},
                **{**_defaults(dtype), **options},
            )  # fmt: skip
    except BaseException as error:
        _stop(set(multiprocessing.active_children()) - before)
        if isinstance(error, MoesteerError) or not isinstance(error, Exception):
            raise
        found = output.explained(error)
        raise (found if isinstance(found, MoesteerError) else _failed(found, name=name)) from error


@contextmanager
def _insisting() -> Iterator[None]:
    """Inside, a Ctrl-C is sent again until it is obeyed: vLLM's zmq_socket_ctx drops one, and waits on."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    main, asked, over = threading.get_ident(), threading.Event(), threading.Event()

    def interrupt(number: int, frame: object) -> None:
        asked.set()
        if not over.is_set():
            raise KeyboardInterrupt

    def insist() -> None:
        while not over.wait(INSIST_S):
            if asked.is_set():
                signal.pthread_kill(main, signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    thread = threading.Thread(target=insist, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if asked.is_set():  # what failed since did so because its processes were stopped too
            raise KeyboardInterrupt


def _stop(processes: set[multiprocessing.process.BaseProcess]) -> None:
    """End an engine that did not come up; its workers see it go, and end themselves."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(STOP_S)
        if process.is_alive():
            process.kill()


def _defaults(dtype: str) -> dict[str, Any]:
    """LLM's arguments, where the user does not say otherwise."""
    from vllm.platforms import current_platform

    wanted: dict[str, Any] = {
        "dtype": dtype, "seed": 0, "disable_log_stats": True, "generation_config": "vllm", "skip_tokenizer_init": True,
    }  # fmt: skip
    if current_platform.is_cpu():
        wanted["dtype"] = "float32" if dtype == "auto" else dtype
        # compiling takes half a minute, which few offline runs on a CPU earn back
        wanted["enforce_eager"] = True
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            wanted["kv_cache_memory_bytes"] = KV_CACHE_BYTES
    return wanted


def _require_options(options: Mapping[str, Any], *, name: str) -> None:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)} | set(inspect.signature(LLM).parameters)
    if unknown := sorted(set(options) - known):
        near = get_close_matches(unknown[0], sorted(known - set(NOT_OPTIONS)))
        raise UnknownNameError(
            f"vLLM's engine has no option {', '.join(unknown)}",
            where=name,
            expected=f"an option of vLLM's LLM class{': ' * bool(near)}{', '.join(near)}",
            do="see https://docs.vllm.ai, Engine Arguments, with _ for - (tensor_parallel_size)",
        )


def _failed(why: str, *, name: str) -> ModelError:
    return ModelError(
        f"vLLM could not start with the model: {why}",
        where=name,
        expected="a model, and options, that this vLLM runs",
        do="VLLM_LOGGING_LEVEL=INFO shows all that it prints; --backend hf runs more families",
    )

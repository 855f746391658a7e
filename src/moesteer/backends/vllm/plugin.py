"""The entry point that vLLM calls in every process, and everything of vLLM that it changes.

`pip install moesteer` activates it; `MOESTEER_VLLM=0` keeps it out, and an engine with our settings then does not
start. Without settings, nothing but look-ups at the start of an engine and of a step is added. With them:

| what of vLLM | what is added |
|---|---|
| `VllmConfig.compute_hash` | our version: compiled code of another is not taken up |
| `InputProcessor.__init__`, `process_inputs` | the catalogue; a request's mask id becomes its row and salts its cache |
| `EngineCore.preprocess_add_request` | requests without a row are refused |
| `GPUModelRunner` (V1) `load_model`, `_prepare_inputs`, `execute_model`, `_dummy_run` | routers counted, rows filled |
| `MoERunner._maybe_dispatch` | the router's logits pass through `moesteer::steer` |
| `WorkerBase` | methods for the front end: report, reset, scores, trace |

The V2 runner is refused (refusals.py). Every name is looked up when the plug-in is loaded: a vLLM that lacks one is
refused with that name, never patched in part.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from moesteer import files
from moesteer.errors import InputError, MoesteerError
from moesteer.version import __version__

OFF = "MOESTEER_VLLM"
OLDEST = (0, 32)
WANTED = (
    ("vllm.config", "VllmConfig", "compute_hash"),
    ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs"),
    ("vllm.v1.engine.core", "EngineCore", "preprocess_add_request"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "load_model"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_prepare_inputs"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "execute_model"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_dummy_run"),
    ("vllm.v1.worker.worker_base", "WorkerBase", "execute_model"),
    ("vllm.model_executor.layers.fused_moe.runner.moe_runner", "MoERunner", "_maybe_dispatch"),
    ("vllm.model_executor.layers.fused_moe.runner.moe_runner", "MoERunner", "is_monolithic"),
    ("vllm.model_executor.layers.fused_moe.router.base_router", "BaseRouter", "_compute_routing"),
    ("vllm.exceptions", "VLLMValidationError", "__init__"),
)
"""(module, class, method or property) of vLLM, all of which must be there."""
_registered = False


def register() -> None:
    """Patch vLLM, once per process. Called by vLLM itself (entry point `vllm.general_plugins`)."""
    global _registered
    if _registered:
        return
    _registered = True
    if os.environ.get(OFF, "").strip().lower() in ("0", "off", "false", "no"):
        _refuse_settings()
        return
    _patch()


def _patch() -> None:
    missing = _missing()
    if missing or _version() < OLDEST:
        _refuse_settings(missing=", ".join(missing))
        return
    from vllm.config import VllmConfig
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    from moesteer.backends.vllm.routers import patch_dispatch

    _wrap(VllmConfig, "compute_hash", _hash)
    _wrap(InputProcessor, "__init__", _front_end)
    _wrap(InputProcessor, "process_inputs", _process)
    _wrap(EngineCore, "preprocess_add_request", _preprocess)
    for runner in _runners(GPUModelRunner):
        if "load_model" in vars(runner):
            _wrap(runner, "load_model", _load)
    _wrap(GPUModelRunner, "_prepare_inputs", _prepare)
    _wrap(GPUModelRunner, "execute_model", _execute)
    _wrap(GPUModelRunner, "_dummy_run", _dummy)
    _patch_v2()
    patch_dispatch()
    from moesteer.backends.vllm.worker import RPC

    for name, method in RPC.items():
        setattr(WorkerBase, name, method)


def _missing() -> list[str]:
    """Names of vLLM that the plug-in builds on, and that this one lacks."""
    found = []
    for module, owner, name in WANTED:
        try:
            place = getattr(import_module(module), owner)
        except (ImportError, AttributeError):
            found.append(f"{module}.{owner}")
            continue
        if not callable(getattr(place, name, None)) and not isinstance(getattr(place, name, None), property):
            found.append(f"{owner}.{name}")
    return found


def _version() -> tuple[int, ...]:
    import vllm

    return tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())


def _runners(base: type) -> list[type]:
    """The V1 runner and the runners of other platforms made from it, as far as they can be imported here."""
    from vllm.platforms import current_platform

    found = [base]
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        found.append(CPUModelRunner)
    elif current_platform.is_xpu():
        from vllm.v1.worker.xpu_model_runner import XPUModelRunner

        found.append(XPUModelRunner)
    return found


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _settings(config: Any) -> Any:
    from moesteer.backends.vllm.settings import read_settings

    return read_settings(getattr(config, "additional_config", None))


def _refuse_settings(*, missing: str = "") -> None:
    """An engine with our settings does not start: the plug-in is switched off, or vLLM is another than it knows."""

    def refuse(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [self, getattr(self, "vllm_config", None), *args]
        if any(_settings(config) is not None for config in given):
            raise InputError(
                f"vLLM {'.'.join(map(str, _version()))} lacks {missing or 'what the plug-in needs'}"
                if missing or _version() < OLDEST
                else f"the plug-in is switched off ({OFF}), and the engine has settings for it",
                where="additional_config['moesteer']",
                expected=f"vLLM {'.'.join(map(str, OLDEST))} or a later one that has these, and the plug-in on",
                do=f"unset {OFF}, or take the settings out; see docs/serving.md for the versions tested",
            )
        return original(self, *args, **kwargs)

    for module, owner, name in (
        ("vllm.config", "VllmConfig", "compute_hash"),
        ("vllm.v1.engine.input_processor", "InputProcessor", "__init__"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "load_model"),
        ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner", "load_model"),
    ):
        try:
            _wrap(getattr(import_module(module), owner), name, refuse)
        except (ImportError, AttributeError):  # not in this vLLM; the others refuse
            continue


def _hash(original: Any, self: Any) -> Any:
    found = original(self)
    if _settings(self) is None:
        return found
    return files.sha256(f"{found} moesteer {__version__}".encode())[: len(found)]


def _front_end(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    from moesteer.backends.vllm.catalogue import Catalogue
    from moesteer.backends.vllm.refusals import require_steerable_engine

    original(self, vllm_config, *args, **kwargs)
    settings = _settings(vllm_config)
    self.moesteer = None
    if settings is not None:
        require_steerable_engine(vllm_config, settings)
        self.moesteer = Catalogue.load(settings)


def _process(original: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    from moesteer.backends.vllm.requests import mark, row_for

    if self.moesteer is None:
        _refuse_named(params)
        return original(self, request_id, prompt, params, *args, **kwargs)
    try:
        row = row_for(self.moesteer, getattr(params, "extra_args", None))
        request = original(self, request_id, prompt, params, *args, **kwargs)
        mark(request, row)
    except MoesteerError as error:
        raise _client_error(error) from error
    return request


def _refuse_named(params: Any) -> None:
    """A request that names a mask where there are none would go unsteered without a word."""
    from moesteer.backends.vllm.requests import OURS

    extra = getattr(params, "extra_args", None) or {}
    if any(str(key).lower().startswith(OURS) for key in extra):
        raise _client_error(
            InputError(
                "this engine offers no masks",
                where="the request's extra arguments",
                expected="nothing of ours",
                do="start the engine with masks (docs/serving.md), or take the mask id out",
            )
        )


def _client_error(error: MoesteerError) -> Exception:
    """As vLLM's own error for bad requests: its server answers 400."""
    from vllm.exceptions import VLLMValidationError

    found: Exception = VLLMValidationError(str(error))
    return found


def _preprocess(original: Any, self: Any, request: Any) -> Any:
    """The engine's core loads plug-ins in the middle of its start, so the catalogue is read with the first request."""
    from moesteer.backends.vllm.catalogue import Catalogue
    from moesteer.backends.vllm.requests import require_marked

    if not hasattr(self, "moesteer"):
        settings = _settings(self.vllm_config)
        self.moesteer = None if settings is None else Catalogue.load(settings)
    if self.moesteer is not None:
        require_marked(self.moesteer, request)
    return original(self, request)


def _load(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    from moesteer.backends.vllm.catalogue import Catalogue
    from moesteer.backends.vllm.refusals import require_steerable_engine
    from moesteer.backends.vllm.worker import Steered

    out = original(self, *args, **kwargs)
    settings = _settings(self.vllm_config)
    if settings is not None and getattr(self, "moesteer", None) is None:
        require_steerable_engine(self.vllm_config, settings)
        self.moesteer = Steered(self, settings, Catalogue.load(settings))
        self.moesteer.attach()
    return out


def _prepare(original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *more: Any) -> Any:
    if (steered := getattr(self, "moesteer", None)) is not None:
        steered.prepared(num_scheduled_tokens)
    return original(self, scheduler_output, num_scheduled_tokens, *more)


def _execute(original: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    steered = getattr(self, "moesteer", None)
    if steered is None:
        return original(self, scheduler_output, *args, **kwargs)
    steered.begins(scheduler_output)
    out = original(self, scheduler_output, *args, **kwargs)
    steered.ran()
    return out


def _dummy(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if (steered := getattr(self, "moesteer", None)) is not None:
        steered.idle()
    return original(self, *args, **kwargs)


def _patch_v2() -> None:
    """The V2 runner, which refusals.py refuses: its own load is the last place to say so."""
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second
    except ImportError:  # it needs Triton
        return
    _wrap(Second, "load_model", _load)

"""A model of either backend, opened in one way: what `generate`, `evaluate` and `capture` run on.

`hf` is transformers in this process; `vllm` an engine of vLLM, started with its masks and stopped at the end of the
block. Both answer greedily and with the same tokens.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from moesteer.backends.sources import require_extra
from moesteer.errors import InputError, UnknownNameError
from moesteer.mask import SteeringMask

if TYPE_CHECKING:
    from moesteer.backends.hf import Model
    from moesteer.backends.vllm.model import VllmModel

BACKENDS = ("hf", "vllm")


def require_backend(
    backend: str, *, device: str = "auto", quantize: str | None = None, engine_options: Mapping[str, Any] | None = None
) -> None:
    """Refuse a choice that cannot be, before anything slow. Raises UnknownNameError, InputError, MissingExtraError."""
    if backend not in BACKENDS:
        raise UnknownNameError(
            f"no backend {backend!r}", where="--backend", expected=", ".join(BACKENDS), do="name one of these"
        )
    if backend == "hf":
        if engine_options:
            raise InputError(
                f"the transformers backend has no engine to set {', '.join(engine_options)} of",
                where="--engine-option",
                expected="engine options with --backend vllm only",
                do="add --backend vllm, or take them out",
            )
        return
    if device != "auto":
        raise InputError(
            f"vLLM chooses the device itself, and was told {device!r}",
            where="--device",
            expected="no --device with --backend vllm",
            do="take it out; CUDA_VISIBLE_DEVICES names GPUs, --engine-option tensor_parallel_size=2 takes two",
        )
    if quantize is not None:
        raise InputError(
            f"vLLM does not quantise by torchao's {quantize}",
            where="--quantize",
            expected="no --quantize with --backend vllm",
            do="use vLLM's own, for example --engine-option 'quantization=\"fp8\"'",
        )
    require_extra("vllm", "vllm", what="--backend vllm runs the model in vLLM", where="--backend")


@contextmanager
def opened(
    model: str,
    *,
    backend: str = "hf",
    masks: Sequence[SteeringMask] = (),
    alphas: Sequence[float | None] | None = None,
    together: bool = True,
    capture: Literal["logits", "selected"] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    allow_other_checkpoint: bool = False,
) -> Iterator[Model | VllmModel]:
    """The model inside the block, as it is; `steered` steers it. An engine is stopped at the end.

    masks, alphas, together, capture, allow_other_checkpoint: what will be asked of it, which an engine must know when
    it starts; transformers needs none of them. engine_options: of vLLM's LLM class. Raises as require_backend and the
    backend's own `load` do.
    """
    require_backend(backend, device=device, quantize=quantize, engine_options=engine_options)
    if backend == "hf":
        from moesteer.backends import loading

        yield loading.load(model, dtype=dtype, device=device, quantize=quantize)
        return
    from moesteer.backends.vllm.loading import load

    if sys.stderr.isatty():
        print("starting vLLM (VLLM_LOGGING_LEVEL=INFO shows how) ...", file=sys.stderr)
    with _ending_on_sigterm(), load(
        model, masks=masks, alphas=alphas, together=together, capture=capture, dtype=dtype, options=engine_options,
        allow_other_checkpoint=allow_other_checkpoint,
    ) as engine:  # fmt: skip
        yield engine


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the block as an exception would: it must not leave an engine's processes behind."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

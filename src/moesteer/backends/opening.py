"""A model of either backend, opened in one way: what `generate`, `evaluate` and `capture` run on.

`hf` is transformers in this process; `vllm` an engine of vLLM, started with its masks and stopped at the end of the
block. Both answer greedily and with the same tokens. With the engine `ray`, each of several workers has its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from moesteer.backends.sources import require_extra
from moesteer.errors import InputError, UnknownNameError
from moesteer.mask import SteeringMask
from moesteer.stopping import ending_on_sigterm

if TYPE_CHECKING:
    from moesteer.backends.hf import Model
    from moesteer.backends.ray.model import RayModel
    from moesteer.backends.vllm.model import VllmModel

BACKENDS = ("hf", "vllm")
ENGINES = ("local", "ray")


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


def require_engine(engine: str, *, workers: int | None = None) -> None:
    """Refuse a choice that cannot be, before anything slow. Raises UnknownNameError, InputError, MissingExtraError."""
    if engine not in ENGINES:
        raise UnknownNameError(
            f"no engine {engine!r}", where="--engine", expected=", ".join(ENGINES), do="name one of these"
        )
    if engine == "local" and workers is not None:
        raise InputError(
            "there are no workers without a cluster",
            where="--workers",
            expected="--workers with --engine ray only",
            do="add --engine ray, or take it out",
        )
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers", where="--workers", expected="1 or more", do="correct it")
    if engine == "ray":
        require_extra("ray", "ray", what="--engine ray runs workers on a cluster of Ray", where="--engine")


@contextmanager
def opened(
    model: str,
    *,
    backend: str = "hf",
    engine: str = "local",
    workers: int | None = None,
    masks: Sequence[SteeringMask] = (),
    alphas: Sequence[float | None] | None = None,
    together: bool = True,
    capture: Literal["logits", "selected"] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    allow_other_checkpoint: bool = False,
) -> Iterator[Model | VllmModel | RayModel]:
    """The model inside the block, as it is; `steered` steers it. An engine is stopped at the end.

    masks, alphas, together, capture, allow_other_checkpoint: what will be asked of it, which an engine must know when
    it starts; transformers needs none of them. engine_options: of vLLM's LLM class. engine: "ray" is so many workers
    with a model each (docs/scaling.md). Raises as require_backend, require_engine and the backend's own `load` do.
    """
    require_backend(backend, device=device, quantize=quantize, engine_options=engine_options)
    require_engine(engine, workers=workers)
    if engine == "ray":
        from moesteer.backends.ray.loading import load as spread

        with ending_on_sigterm(), spread(
            model, workers=workers, backend=backend, masks=masks, alphas=alphas, together=together, capture=capture,
            dtype=dtype, device=device, quantize=quantize, engine_options=engine_options,
            allow_other_checkpoint=allow_other_checkpoint,
        ) as pool:  # fmt: skip
            yield pool
        return
    if backend == "hf":
        from moesteer.backends import loading

        yield loading.load(model, dtype=dtype, device=device, quantize=quantize)
        return
    from moesteer.backends.vllm.loading import load

    if sys.stderr.isatty():
        print("starting vLLM (VLLM_LOGGING_LEVEL=INFO shows how) ...", file=sys.stderr)
    with ending_on_sigterm(), load(
        model, masks=masks, alphas=alphas, together=together, capture=capture, dtype=dtype, options=engine_options,
        allow_other_checkpoint=allow_other_checkpoint,
    ) as started:  # fmt: skip
        yield started

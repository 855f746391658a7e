"""Starting an engine of vLLM with a model and its masks, and proving that every worker steers.

    from moesteer.backends.vllm.loading import load

    with load("lab-tiny", masks=[mask]) as model:
        plain = model.generate(conversations)
        with model.steered([mask], together=True) as receipt:
            steered = model.generate(conversations)

An engine takes its masks when it starts, so a model is loaded with them. The engine's processes are started anew by
Python, so scripts need the usual `if __name__ == "__main__":`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, GenerationConfig

from moesteer.backends.adapters import adapter_config
from moesteer.backends.chat import stop_ids
from moesteer.backends.fingerprinting import routers_of_files
from moesteer.backends.sources import (
    as_model_errors,
    native_config,
    require_extra,
    source_of,
    steerable_config,
)
from moesteer.backends.vllm.catalogue import Catalogue
from moesteer.backends.vllm.model import VllmModel
from moesteer.backends.vllm.output import Output
from moesteer.backends.vllm.settings import Settings, settings_for
from moesteer.backends.vllm.starting import require_arguments, start
from moesteer.errors import ModelError
from moesteer.mask import SteeringMask
from moesteer.models.limits import require_masks, strengths_of


def load(
    model: str | Path,
    *,
    masks: Sequence[SteeringMask] = (),
    alphas: Sequence[float | None] | None = None,
    together: bool = True,
    dtype: str = "auto",
    revision: str | None = None,
    capture: Literal["logits", "selected"] | None = None,
    allow_other_checkpoint: bool = False,
    options: Mapping[str, Any] | None = None,
) -> VllmModel:
    """Start an engine with a Hugging Face folder, a Hub id in the local cache, or `lab-tiny`, and prove that it steers.

    masks, alphas: what it can be steered by (alphas: None for a mask's own). together: all at once; else one for each
    row (`generate(rows=...)`). capture: what `read` can keep. options: of vLLM's LLM class (tensor_parallel_size, ...).
    dtype: "auto" is float32 on a CPU and the checkpoint's own elsewhere. What vLLM prints is kept off the screen unless
    VLLM_LOGGING_LEVEL is set (output.py). Raises as backends.loading.load does, InputError, UnknownNameError,
    MaskMismatchError, MaskContentError, NoEffectError, MissingExtraError.
    """
    name = str(model)
    require_extra("vllm", "vllm", what="--backend vllm runs the model in vLLM", where=name)
    require_arguments(name, dtype=dtype, options=options or {})
    source = source_of(name)
    if adapter_config(source, name=name, revision=revision) is not None:
        raise ModelError(
            "the model is an adapter of PEFT, and a steered engine of vLLM runs none",
            where=name,
            expected="a whole model",
            do="merge the adapter into its base and save that; or --backend hf",
        )
    stored = steerable_config(source, name=name, revision=revision)
    routers, fingerprint = routers_of_files(source, revision=revision)
    strengths = strengths_of(masks, alphas)
    require_masks(
        masks, strengths, fingerprint, routers, together=together, allow_other_checkpoint=allow_other_checkpoint
    )
    with as_model_errors("no tokenizer for the model", name=name, do="check the folder"):
        config = native_config(stored)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, config=config, trust_remote_code=False)
    context = int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 30))
    folder = tempfile.TemporaryDirectory(prefix="moesteer-masks-")  # every process of the engine reads the masks there
    settings = _settings(
        masks, strengths, Path(folder.name), together=together, capture=capture, other=allow_other_checkpoint
    )
    catalogue = Catalogue.load(settings)
    output = Output(Path(folder.name) / "output.txt")
    engine = start(source, name, settings, output, dtype=dtype, revision=revision, options=options or {})
    try:
        return VllmModel(
            engine, tokenizer, name=name, context_tokens=min(context, int(engine.model_config.max_model_len)),
            stops=stop_ids(_generation_config(source, revision), tokenizer), fingerprint=fingerprint,
            masks=tuple(masks), catalogue=catalogue, folder=folder, output=output, source=source, revision=revision,
            capture=capture, options=options or {},
        )  # fmt: skip
    except BaseException:
        engine.llm_engine.engine_core.shutdown()
        raise


def _generation_config(source: str, revision: str | None) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:  # there is none
        return None


def _settings(
    masks: Sequence[SteeringMask],
    alphas: Sequence[float | None],
    folder: Path,
    *,
    together: bool,
    capture: Literal["logits", "selected"] | None,
    other: bool,
) -> Settings:
    """As pinned masks, or as masks to be named `1`, `2`, ... A mask at strength 0 is left out: it does nothing."""
    sources: dict[str, tuple[Path, float | None]] = {}
    for number, (mask, alpha) in enumerate(zip(masks, alphas, strict=True), 1):
        if (mask.info.alpha if alpha is None else alpha) != 0:
            path = folder / f"{number}.safetensors"
            mask.save(path)
            sources[str(number)] = (path, alpha)
    return settings_for(
        pins=list(sources.values()) if together else (), masks={} if together else sources, capture=capture,
        allow_other_checkpoint=other, count=bool(sources),
    )  # fmt: skip

"""Loading a model for the transformers backend: the right class, safely, and proven to be steerable.

No remote code, no pickled weights (docs/security.md). Multimodal models are loaded whole and steered on text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Mxfp4Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file, logging

from moesteer import files
from moesteer.backends.hf import Model
from moesteer.errors import FileError, ModelError, UnsafeModelError
from moesteer.models.check import self_check

LAB_TINY = Path(__file__).parent.parent / "lab" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    check: bool = True,
) -> Model:
    """Load a Hugging Face folder, a Hub id or `lab-tiny`, find its routers and prove that steering works.

    dtype: "float32", "bfloat16", "float16"; "auto" is float32 on a CPU and the checkpoint's own elsewhere.
    device_map: spread the model over devices as accelerate does ("auto", or a dict), instead of `device`.
    check: run the self-check (models/check.py); leave it on unless the same files were just checked.
    Raises DenseModelError, UnknownRouterError, UnsafeModelError, SelfCheckError, ModelError.
    """
    name = str(model)
    source = str(LAB_TINY) if name == "lab-tiny" else name
    stored = read_config(source, name=name, revision=revision)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    wanted: Any = DTYPES.get(dtype, "auto")
    if dtype == "auto" and place == "cpu":
        wanted = torch.float32
    elif dtype not in (*DTYPES, "auto"):
        raise ModelError(
            f"no dtype {dtype!r}", where=name, expected=f"auto, {', '.join(DTYPES)}", do="give one of these as --dtype"
        )
    settings: dict[str, Any] = {"dtype": wanted, **_quantisation(stored)}
    if device_map is not None:
        settings["device_map"] = device_map
    with _quiet_bars():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            hf = _class_for(stored).from_pretrained(
                source, revision=revision, trust_remote_code=False, use_safetensors=True, **settings
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"transformers could not load the model: {str(error).splitlines()[0]}",
                where=name,
                expected="a folder with config.json, safetensors weights and a tokenizer, or a Hub id of such",
                do="check the path; convert .bin weights to safetensors; `moesteer doctor` shows the versions in use",
            ) from error
    if device_map is None:
        hf = hf.to(place)
    return adopt(hf.eval(), tokenizer, name=name, check=check)


def adopt(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "", check: bool = True) -> Model:
    """A model that the caller loaded: compiled, wrapped by PEFT, spread by accelerate, quantised.

    Raises as `load` does. On a CPU the experts are set to transformers' grouped kernel where the model has it: it runs
    about 2.5 times faster than the loop over experts.
    """
    loaded = Model(hf, tokenizer, name=name or str(getattr(hf, "name_or_path", "")) or type(hf).__name__)
    if loaded.device.type == "cpu" and _has_expert_kernels(hf):
        hf.set_experts_implementation("grouped_mm")
    if check:
        self_check(loaded.hf, loaded.tap, vocabulary=len(tokenizer))
    return loaded


def _has_expert_kernels(hf: PreTrainedModel) -> bool:
    """Whether the model's experts have interchangeable kernels: some families loop over them in code of their own."""
    can = getattr(hf, "_can_set_experts_implementation", None)
    return bool(can()) if callable(can) else False


def _class_for(stored: dict[str, Any]) -> Any:
    """The auto class: causal where the model type has one, else image-text-to-text, which also runs on text alone."""
    causal = str(stored.get("model_type")) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def _quantisation(stored: dict[str, Any]) -> dict[str, Any]:
    """Settings that a quantised checkpoint needs for its routers to be asked.

    The MXFP4 kernels of gpt-oss compute the selection themselves and never call the router; so it is dequantised.
    """
    method = (stored.get("quantization_config") or {}).get("quant_method")
    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    return {}


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """No progress bars of transformers' own where nobody is looking."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_config(source: str, *, name: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or a Hub id; a model that asks for code of its own is refused here, unread by others.

    Raises ModelError, UnsafeModelError.
    """
    folder = Path(source)
    try:
        path = (
            folder / "config.json" if folder.is_dir() else Path(cached_file(source, "config.json", revision=revision))
        )
        config = files.read_json(path)
    except (OSError, FileError, TypeError) as error:
        raise ModelError(
            f"no readable config.json: {str(error).splitlines()[0]}",
            where=name,
            expected="a Hugging Face model folder, a Hub id, or lab-tiny",
            do="check the path or the id, and the network if it is an id",
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            "config.json is not an object", where=name, expected="a JSON object with model_type", do="check the file"
        )
    asked = sorted(_unsafe_keys(config))
    if asked:
        raise UnsafeModelError(
            f"config.json asks for code or internals: {', '.join(asked)}",
            where=f"{name}: config.json",
            expected="a model that transformers implements itself (trust_remote_code does not exist here)",
            do="use a checkpoint of a native class; `moesteer models convert` re-saves some of these as one",
        )
    return config


def _unsafe_keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "auto_map" or (isinstance(key, str) and key.endswith("_internal")):
                yield str(key)
            yield from _unsafe_keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _unsafe_keys(inner)

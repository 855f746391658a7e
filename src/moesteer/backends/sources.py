"""What a model is by its files: where they are, what config.json says, which class of transformers reads them.

A model that asks for code of its own is refused here, before transformers reads its config (docs/security.md).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import cached_file, logging

from moesteer import files
from moesteer.errors import FileError, MissingExtraError, ModelError, UnsafeModelError
from moesteer.models.convert import CONVERSIONS
from moesteer.models.routers import require_steerable

FOREIGN = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError,
    AssertionError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers throws at configs and weights that are not what they should be."""
LAB_TINY = Path(__file__).parent.parent / "lab" / "tiny"


def source_of(name: str) -> str:
    """What transformers is asked for: the folder or id itself, or the folder of a lab model."""
    return str(LAB_TINY) if name == "lab-tiny" else name


def class_for(stored: dict[str, Any]) -> Any:
    """The auto class: causal where the model type has one, else image-text-to-text, which also runs on text alone.

    Raises ModelError for a type that transformers has, and has no class to generate text with.
    """
    model_type = stored["model_type"]
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if model_type in CONFIG_MAPPING_NAMES and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(
            f"transformers has no class that generates text for model type {model_type!r}",
            where="config.json",
            expected="a causal language model, or one of images and text",
            do="load the part that generates text (of Qwen3-Omni: the thinker), and give it to moesteer.adopt",
        )
    return AutoModelForImageTextToText


def native_config(stored: dict[str, Any]) -> PreTrainedConfig:
    """transformers' own config object; what `stored` does not hold (an auto_map) it cannot ask for."""
    return CONFIG_MAPPING[stored["model_type"]].from_dict(_with_floats(stored))


def _with_floats(value: Any) -> Any:
    """transformers writes infinities as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(inner) for key, inner in value.items()}
    return [_with_floats(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def as_model_errors(what: str, *, name: str, do: str) -> Iterator[None]:
    """Inside, whatever transformers throws at a broken checkpoint becomes a ModelError."""
    try:
        yield
    except FOREIGN as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{what}: {why}"[:400],
            where=name,
            expected="a folder with config.json, safetensors weights and a tokenizer, or a Hub id of such",
            do=do,
        ) from error


def model_types(stored: dict[str, Any]) -> tuple[str, ...]:
    """The model type of a config.json, and of the text model in it."""
    text = stored.get("text_config")
    types = (stored.get("model_type"), text.get("model_type") if isinstance(text, dict) else None)
    return tuple(str(name) for name in types if name is not None)


@contextmanager
def quiet_bars() -> Iterator[None]:
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
    """config.json of a folder or a Hub id, without `auto_map`, and checked before transformers sees it.

    Many checkpoints still name the code they were published with; where transformers has a class for the model type,
    that class is used and the code is not read. Raises UnsafeModelError where it has none, or where internals are set;
    ModelError for a file that is missing or no config.
    """
    folder = Path(source)
    if not folder.is_dir() and (folder.exists() or source.count("/") != 1 or source.startswith((".", "~", "/"))):
        raise ModelError(
            "this is a file" if folder.exists() else "there is no such folder",
            where=name,
            expected="a Hugging Face model folder, a Hub id (ORG/NAME), or lab-tiny",
            do="give the folder the file is in" if folder.exists() else "check the path",
        )
    try:
        path = (
            folder / "config.json" if folder.is_dir() else Path(cached_file(source, "config.json", revision=revision))
        )
        config = files.read_json(path, infinity=True)
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
    asked = sorted(set(unsafe_keys(config)))
    native = str(config.get("model_type")) in CONFIG_MAPPING_NAMES
    if asked and (asked != ["auto_map"] or not native):
        raise UnsafeModelError(
            f"config.json asks for code or internals: {', '.join(asked)}",
            where=f"{name}: config.json",
            expected="a model that transformers implements itself (trust_remote_code does not exist here)",
            do=f"moesteer models convert {name} --out DIR re-saves it as a native class, without running its code"
            if config.get("model_type") in CONVERSIONS
            else "use a checkpoint of a class that transformers has itself",
        )
    _require_plain(config, name=name)
    plain: dict[str, Any] = _without_auto_map(config)
    return plain


def steerable_config(source: str, *, name: str, revision: str | None = None) -> dict[str, Any]:
    """`read_config` of a model of a type that is not refused. Raises as it does, and UnknownRouterError."""
    stored = read_config(source, name=name, revision=revision)
    require_steerable(model_types(stored), where=name)
    return stored


def _require_plain(config: dict[str, Any], *, name: str) -> None:
    """Raise ModelError where the fields that decide how a model is loaded are not of their kind."""
    kinds: dict[str, tuple[type, ...]] = {
        "model_type": (str,),
        "text_config": (dict, type(None)),
        "quantization_config": (dict, type(None)),
        "architectures": (list, type(None)),
    }
    for field, kind in kinds.items():
        if not isinstance(config.get(field), kind):
            raise ModelError(
                f"config.json has {field} = {config.get(field)!r}"[:200],
                where=f"{name}: config.json",
                expected=" or ".join("nothing" if k is type(None) else k.__name__ for k in kind),
                do="fetch the file again, or use another checkpoint",
            )


def _without_auto_map(value: Any) -> Any:
    """A config without the code it offers: transformers has a class of its own for this model type."""
    if isinstance(value, dict):
        return {key: _without_auto_map(inner) for key, inner in value.items() if key != "auto_map"}
    return [_without_auto_map(inner) for inner in value] if isinstance(value, list) else value


def unsafe_keys(value: Any) -> Iterator[str]:
    """Keys anywhere in a JSON value that ask for code (`auto_map`) or for internals of transformers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "auto_map" or (isinstance(key, str) and key.endswith("_internal")):
                yield str(key)
            yield from unsafe_keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from unsafe_keys(inner)


def require_extra(package: str, extra: str, *, what: str, where: str) -> None:
    """Raise MissingExtraError, with the pip command, where a package of an extra is not installed."""
    if find_spec(package) is None:
        raise MissingExtraError(
            f"{what}, and {package} is not installed",
            where=where,
            expected=f"the extra {extra!r}",
            do=f"pip install 'moesteer[{extra}]'",
        )

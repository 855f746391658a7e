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

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file, logging

from moesteer import files
from moesteer.errors import FileError, MissingExtraError, ModelError, UnsafeModelError

LAB_TINY = Path(__file__).parent.parent / "lab" / "tiny"


def source_of(name: str) -> str:
    """What transformers is asked for: the folder or id itself, or the folder of a lab model."""
    return str(LAB_TINY) if name == "lab-tiny" else name


def class_for(stored: dict[str, Any]) -> Any:
    """The auto class: causal where the model type has one, else image-text-to-text, which also runs on text alone."""
    causal = str(stored.get("model_type")) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


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
    asked = sorted(unsafe_keys(config))
    if asked:
        raise UnsafeModelError(
            f"config.json asks for code or internals: {', '.join(asked)}",
            where=f"{name}: config.json",
            expected="a model that transformers implements itself (trust_remote_code does not exist here)",
            do="use a checkpoint of a native class; `moesteer models convert` re-saves some of these as one",
        )
    return config


def unsafe_keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "auto_map" or (isinstance(key, str) and key.endswith("_internal")):
                yield str(key)
            yield from unsafe_keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from unsafe_keys(inner)


def require_extra(package: str, extra: str, *, what: str, where: str) -> None:
    if find_spec(package) is None:
        raise MissingExtraError(
            f"{what}, and {package} is not installed",
            where=where,
            expected=f"the extra {extra!r}",
            do=f"pip install 'moesteer[{extra}]'",
        )

"""Adapters of PEFT on disk: read safely, and put on their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from moesteer import files
from moesteer.backends.sources import unsafe_keys
from moesteer.errors import FileError, ModelError, UnsafeModelError


def adapter_config(source: str, *, name: str, revision: str | None) -> dict[str, Any] | None:
    """adapter_config.json of a folder or Hub id, which names its base model; None for what is no adapter.

    Raises ModelError, UnsafeModelError.
    """
    folder, config = Path(source), None
    try:
        if folder.is_dir():
            path = folder / "adapter_config.json"
            config = files.read_json(path) if path.is_file() else None
        else:
            found = cached_file(
                source, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
            )  # fmt: skip
            config = files.read_json(Path(found)) if found is not None else None
    except (OSError, FileError) as error:
        if folder.is_dir():
            raise ModelError(
                f"no readable adapter_config.json: {str(error).splitlines()[0]}",
                where=name,
                expected="what PEFT's save_pretrained writes",
                do="save the adapter again, or remove the file from a folder that holds a whole model",
            ) from error
    if config is None:
        return None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    revision_named = config.get("revision") if isinstance(config, dict) else None
    if (
        not isinstance(config, dict)
        or not isinstance(base, str)
        or not base
        or not isinstance(revision_named, str | None)
    ):
        raise ModelError(
            "the adapter does not say what model it is for",
            where=f"{name}: adapter_config.json",
            expected="base_model_name_or_path: a folder or a Hub id, and a revision of it or none",
            do="write it there, or load the base and give PeftModel.from_pretrained(base, folder) to adopt",
        )
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise UnsafeModelError(
            "the adapter has no adapter_model.safetensors",
            where=name,
            expected="weights in safetensors: a .bin file can run code when it is read",
            do="save it again with save_pretrained(..., safe_serialization=True)",
        )
    if asked := sorted({*unsafe_keys(config), *(key for key in ("megatron_config",) if config.get(key))}):
        raise UnsafeModelError(
            f"adapter_config.json asks for code or internals: {', '.join(asked)}",
            where=name,
            expected="settings only",
            do="use another adapter",
        )
    return config


def base_of(source: str, *, name: str, revision: str | None) -> tuple[str, str | None, bool]:
    """(folder or Hub id of the whole model, its revision, whether `source` is an adapter of it); as adapter_config."""
    adapter = adapter_config(source, name=name, revision=revision)
    if adapter is None:
        return source, revision, False
    return adapter["base_model_name_or_path"], adapter.get("revision"), True


def own_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that an adapter's folder brings; None where its base's is to be used."""
    if not (Path(source) / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def with_adapter(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, *, revision: str | None, name: str
) -> tuple[PreTrainedTokenizerBase, Any]:
    """The adapter's own tokenizer where it brings one, and the PeftModel around its base."""
    from peft import PeftModel

    try:
        if not Path(source).is_dir():
            cached_file(source, "adapter_model.safetensors", revision=revision)
        elif (own := own_tokenizer(source)) is not None:
            tokenizer = own
        return tokenizer, PeftModel.from_pretrained(hf, source, revision=revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"PEFT could not put the adapter on its base: {str(error).splitlines()[0]}",
            where=name,
            expected="an adapter in safetensors, for this base model and these versions",
            do="check base_model_name_or_path in adapter_config.json; `moesteer doctor` shows the versions in use",
        ) from error

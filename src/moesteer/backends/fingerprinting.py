"""A checkpoint's fingerprint from config.json and its routers' tensors: the rest may be of any size, and stays unread.

The model is built without weights, and the tensors that transformers would load into its routers are put there. By
which name a tensor is loaded, transformers says itself: many checkpoints have other names than the model has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from moesteer.backends.shape import without_weights
from moesteer.backends.sources import as_model_errors, source_of, steerable_config
from moesteer.errors import ModelError
from moesteer.fingerprint import Fingerprint
from moesteer.models.checkpoint import DTYPES, INDEX, SINGLE, Checkpoint, Stored
from moesteer.models.fingerprint import fingerprint_of
from moesteer.models.routers import Router, find_routers

SKIPPING = -1.0
"""The correction of choices that skip the experts (`Scoring.skipped`): loading puts it there, whatever is stored."""


def fingerprint_of_files(model: str | Path, *, revision: str | None = None) -> Fingerprint:
    """The Fingerprint that `load(model, dtype="float32")` has, of a folder, a Hub id in the local cache or `lab-tiny`.

    Raises what `load` raises for a model that cannot be steered, and ModelError where the files are not whole or hold a
    router's tensor in another form than the model has it (transposed, fused, quantised).
    """
    return routers_of_files(model, revision=revision)[1]


def routers_of_files(model: str | Path, *, revision: str | None = None) -> tuple[tuple[Router, ...], Fingerprint]:
    """The routers of a model without weights but for the routers' own, and its fingerprint; as fingerprint_of_files."""
    name = str(model)
    source = source_of(name)
    stored = steerable_config(source, name=name, revision=revision)
    checkpoint = checkpoint_of(source, revision=revision)
    empty = without_weights(stored, name=name)
    routers = find_routers(empty)
    _fill(empty, routers, checkpoint)
    return routers, fingerprint_of(empty.config.get_text_config().model_type, routers)


def checkpoint_of(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """The safetensors files of a folder, a Hub id in the local cache, or `lab-tiny`, by their headers."""
    source = source_of(str(model))
    return Checkpoint(_folder_of(source, name=str(model), revision=revision))


def _folder_of(source: str, *, name: str, revision: str | None) -> Path:
    """The folder, or the snapshot in the local cache whose config.json was just read."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    with as_model_errors("the model is not in the local cache", name=name, do="fetch it: hf download ORG/NAME"):
        folder = Path(cached_file(source, "config.json", revision=revision, local_files_only=True)).parent
    if not any((folder / weights).is_file() for weights in (SINGLE, INDEX)):
        raise ModelError(
            "the model's weights are not in the local cache",
            where=f"{name}: {folder}",
            expected=f"{SINGLE}, or {INDEX} and its files",
            do=f"fetch them: hf download {name}",
        )
    return folder


def _fill(empty: PreTrainedModel, routers: tuple[Router, ...], checkpoint: Checkpoint) -> None:
    """Put the stored tensors of every router into a model without weights."""
    names: dict[int, str] = {}
    for name, tensor in [*empty.named_parameters(), *empty.named_buffers()]:
        names[id(tensor)] = name
    loaded_as = _names_loaded(empty)
    found: dict[str, Tensor] = {}
    for router in routers:
        for tensor in (router.weight, router.bias, router.correction, router.expert_scale):
            if tensor is None:
                continue
            name = names[id(tensor)]
            found[name] = _stored(checkpoint, router, name, tensor, loaded_as=loaded_as).read()
            if tensor is router.correction and router.scoring.skipped:
                found[name][..., -router.scoring.skipped :] = SKIPPING
    empty.load_state_dict(found, strict=False, assign=True)


def _names_loaded(empty: PreTrainedModel) -> Callable[[str], str]:
    """From a tensor's name in the files to its name in the model; "" for one that is not loaded as it is."""
    transforms = get_model_conversion_mapping(empty)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, inside = empty.base_model_prefix, empty.state_dict()

    def name_of(stored: str) -> str:
        renamed, converted = rename_source_key(stored, renamings, converters, prefix, inside)
        if renamed not in inside and stored in inside:  # as transformers does: a name may be right already
            renamed, converted = rename_source_key(stored, [], [], prefix, inside)
        return "" if converted else str(renamed)

    return name_of


def _stored(
    checkpoint: Checkpoint, router: Router, name: str, tensor: Tensor, *, loaded_as: Callable[[str], str]
) -> Stored:
    """The one tensor in the files that is loaded as `name`."""

    def of_layer(stored: Stored) -> bool:
        layer = re.search(router.family.layer_pattern, stored.name)
        return layer is not None and int(layer.group(1)) == router.layer_id

    alike = [s for s in checkpoint.tensors.values() if s.shape == tuple(tensor.shape) and of_layer(s)]
    found = [s for s in alike if s.dtype in DTYPES and loaded_as(s.name) == name]
    if len(found) == 1:
        return found[0]
    candidates = ", ".join(f"{s.name} ({s.dtype})" for s in (found or alike)[:4]) or "none"
    raise ModelError(
        f"{len(found) or 'no'} tensors in the files are loaded as {name}; of its layer and shape are: {candidates}",
        where=f"{checkpoint.folder}, layer {router.layer_id}",
        expected=f"exactly one, of shape {list(tensor.shape)}, in {', '.join(DTYPES)}",
        do="fetch the files again if they are not whole; `moesteer models MODEL` loads the model for its fingerprint",
    )

"""A model's routers by its config alone: nothing is loaded, so a checkpoint of a terabyte takes a second."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moesteer.backends.sources import (
    as_model_errors,
    class_for,
    native_config,
    quiet_bars,
    source_of,
    steerable_config,
)
from moesteer.models.checkpoint import INDEX, SINGLE, placed_in
from moesteer.models.limits import limits
from moesteer.models.routers import find_routers


@dataclass(frozen=True)
class Shape:
    """What config.json (and the index of the shards, where there is one) says of a model's routers.

    layer_ids: decoder layers with a router. paths: of the routers in the model. limits: what masks must heed.
    shards: files the index names; shards_here: those present; index_agrees: every layer with a router by the config has
    experts in the index (None without an index here, or one that names no experts by layer).
    """

    model_type: str
    family: str
    architectures: tuple[str, ...]
    layer_ids: tuple[int, ...]
    experts: int
    top_k: int
    scoring: str
    paths: tuple[str, ...]
    limits: tuple[str, ...]
    parameters: int
    shards: int
    shards_here: int
    index_agrees: bool | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For results and `--json`."""
        return asdict(self)


def shape_of(model: str | Path, *, revision: str | None = None) -> Shape:
    """The Shape of a folder or Hub id. Reads config.json and the index, and no weight.

    Raises what `load` raises for a model that cannot be steered, ModelError for one transformers cannot build.
    """
    name = str(model)
    source = source_of(name)
    stored = steerable_config(source, name=name, revision=revision)
    empty = without_weights(stored, name=name)
    routers = find_routers(empty)
    first = routers[0]
    layer_ids = tuple(router.layer_id for router in routers)
    shards, here, agrees = _index(Path(source), layer_ids)
    return Shape(
        model_type=str(stored["model_type"]),
        family=first.family.model_type,
        architectures=tuple(str(x) for x in stored.get("architectures") or ()),
        layer_ids=layer_ids,
        experts=first.experts,
        top_k=first.scoring.top_k,
        scoring=first.scoring.describe(),
        paths=tuple(router.path for router in routers),
        limits=limits(routers),
        parameters=sum(p.numel() for p in empty.parameters()),
        shards=shards,
        shards_here=here,
        index_agrees=agrees,
        notes=notes_of(stored),
    )


def without_weights(stored: dict[str, Any], *, name: str) -> PreTrainedModel:
    """The model of a checked config.json on the meta device: modules and names, no memory.

    Raises ModelError for one transformers cannot build.
    """
    what = "transformers could not build the model from its config"
    do = "`moesteer doctor` shows the versions in use; newer models need a newer transformers"
    with as_model_errors(what, name=name, do=do), quiet_bars(), torch.device("meta"):
        empty: PreTrainedModel = class_for(stored).from_config(native_config(stored))
    return empty


def _index(folder: Path, layer_ids: tuple[int, ...]) -> tuple[int, int, bool | None]:
    if not (folder / INDEX).is_file():
        single = int((folder / SINGLE).is_file())
        return single, single, None
    placed = placed_in(folder)
    names = set(placed.values())
    routed = re.compile(r"(?:layers|blocks)\.(\d+)\.(?!.*shared_expert).*experts\b")
    found = {int(match.group(1)) for key in placed if (match := routed.search(key))}
    agrees = None if not found else set(layer_ids) <= found
    return len(names), sum((folder / name).is_file() for name in names), agrees


def notes_of(stored: dict[str, Any]) -> tuple[str, ...]:
    """Traps of a checkpoint that its config shows."""
    said = []
    architectures = stored.get("architectures") or []
    if "PhimoeForCausalLM" in architectures:
        said.append(
            "re-saved by transformers 5: vLLM knows this architecture as PhiMoEForCausalLM and would crash; "
            "`moesteer models convert` rewrites the name"
        )
    method = (stored.get("quantization_config") or {}).get("quant_method")
    if method == "mxfp4":
        said.append("MXFP4: its kernels never call the router, so it is loaded dequantised, in about 4 x the memory")
    elif method:
        said.append(f"quantised ({method}): the self-check says whether its routers can be steered")
    return tuple(said)

"""Finding a model's routers: transformers' own record of `router_logits`, and the family's row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moesteer.errors import DenseModelError, UnknownRouterError
from moesteer.models.families import FAMILIES, Family
from moesteer.routing import Scoring

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Router:
    """One router of a loaded model. `index` counts routers from 0; `layer_id` is the decoder layer's number."""

    index: int
    layer_id: int
    path: str
    module: nn.Module
    family: Family
    scoring: Scoring
    experts: int


def recorded_router_class(model: PreTrainedModel) -> type[nn.Module] | None:
    """The class that transformers records `router_logits` from, or None for a model without one."""
    for module in model.modules():
        records = getattr(type(module), "_can_record_outputs", None) or {}
        if isinstance(module, PreTrainedModel) and "router_logits" in records:
            record = records["router_logits"]
            first = record[0] if isinstance(record, list | tuple) else record
            return getattr(first, "target_class", first)
    return None


def find_routers(model: PreTrainedModel) -> tuple[Router, ...]:
    """A model's routers in layer order.

    Raises DenseModelError for a model without experts and UnknownRouterError for one whose family has no row,
    or whose routers are not where the row says.
    """
    config: Any = model.config.get_text_config()
    router_class = recorded_router_class(model)
    family = FAMILIES.get(config.model_type)
    counts = {name: getattr(config, name) for name in _EXPERT_COUNTS if isinstance(getattr(config, name, None), int)}
    if router_class is None and not counts:
        raise DenseModelError(
            f"the model ({config.model_type}) is dense: it has no router to steer",
            where=str(getattr(model, "name_or_path", "") or type(model).__name__),
            expected=f"a Mixture-of-Experts model of a family in `moesteer models` ({', '.join(FAMILIES)})",
            do="choose a Mixture-of-Experts checkpoint",
        )
    if family is None or router_class is None:
        found = router_class.__name__ if router_class else "no recorded router class"
        raise UnknownRouterError(
            f"no family row for model type {config.model_type!r} (found: {found}, {counts or 'no expert count'})",
            where=str(getattr(model, "name_or_path", "") or type(model).__name__),
            expected=f"one of the families in `moesteer models`: {', '.join(FAMILIES)}",
            do="add a row to src/moesteer/models/families.py (docs/adding-a-model.md shows how and tests it)",
        )
    experts, scoring = int(getattr(config, family.experts)), family.scoring_of(config)
    routers: list[Router] = []
    for path, module in model.named_modules():
        if not isinstance(module, router_class):
            continue
        layer = re.search(family.layer_pattern, path)
        weight = getattr(module, "weight", None)
        if layer is None or weight is None or weight.shape[0] != experts:
            raise UnknownRouterError(
                f"router {path!r} is not as its family row says (weight {getattr(weight, 'shape', None)})",
                where=str(getattr(model, "name_or_path", "") or type(model).__name__),
                expected=f"a path that matches {family.layer_pattern!r} and a weight of {experts} rows",
                do="report the model and the installed transformers version: the row needs an update",
            )
        routers.append(Router(len(routers), int(layer.group(1)), path, module, family, scoring, experts))
    if not routers:
        raise DenseModelError(
            f"the model ({config.model_type}) has no {router_class.__name__}: every layer is dense",
            where=str(getattr(model, "name_or_path", "") or type(model).__name__),
            expected="at least one layer with a router",
            do="check mlp_only_layers and decoder_sparse_step in the model's config.json",
        )
    return tuple(sorted(routers, key=lambda router: router.layer_id))

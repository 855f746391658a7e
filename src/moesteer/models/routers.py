"""Finding a model's routers: transformers' own record of `router_logits`, and the family's row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesteer.errors import DenseModelError, UnknownRouterError
from moesteer.models.families import FAMILIES, REFUSED, Family
from moesteer.routing import Dtype, Scoring, ScoringKind

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MISSING = object()


@dataclass(frozen=True)
class Router:
    """One router of a loaded model.

    index counts routers from 0; layer_id is the decoder layer's number. block: the module around the router.
    experts: choices E that can be selected and steered; width: logits W, E and those of shared experts behind them.
    logits_at: place of the logits in what the router returns. selector: name of the block's method that selects,
    where the router itself returns logits only.
    """

    index: int
    layer_id: int
    path: str
    module: nn.Module
    block: nn.Module
    family: Family
    scoring: Scoring
    experts: int
    width: int
    logits_at: int
    selector: str

    @property
    def weight(self) -> Tensor:
        """The matrix [W, hidden] that gives the logits."""
        return cast(Tensor, _walk(self.module, self.family.weight))

    @property
    def bias(self) -> Tensor | None:
        """The vector [W] added to the logits, where the family has one."""
        found = _walk(self.module, self.family.weight.removesuffix("weight") + "bias")
        return found if isinstance(found, Tensor) else None

    @property
    def correction(self) -> Tensor | None:
        """The correction bias [E], which counts in the choice and not in the weights."""
        found = self._named(self.family.correction)
        return found if isinstance(found, Tensor) else None

    @property
    def expert_scale(self) -> Tensor | None:
        """Factors on the experts' weights, [E] or [1]."""
        found = self._named(self.family.expert_scale)
        return found if isinstance(found, Tensor) else None

    def _named(self, name: str) -> Any:
        if not name:
            return None
        return _walk(self.block, name[3:]) if name.startswith("../") else _walk(self.module, name)

    def vectors(self) -> dict[str, Any]:
        """The model's own numbers that routing.select takes: correction_E and its dtype, scale_E."""
        given: dict[str, Any] = {}
        if (correction := self.correction) is not None:
            given["correction_E"] = _array(correction).reshape(-1)
            given["correction_dtype"] = dtype_name(correction.dtype)
        if (scale := self.expert_scale) is not None:
            given["scale_E"] = np.broadcast_to(_array(scale).reshape(-1), (self.experts,))
        return given


def dtype_name(dtype: torch.dtype) -> Dtype:
    """ "bfloat16", "float16", or "float32" for all that is as fine or finer."""
    name = str(dtype).removeprefix("torch.")
    return cast(Dtype, name if name in ("bfloat16", "float16") else "float32")


def _array(tensor: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return found


def _walk(start: Any, path: str) -> Any:
    """An attribute by its dotted path; None where the path ends early. An offloaded tensor is read from its store."""
    owner, name = start, ""
    for name in path.split("."):
        owner, start = start, getattr(start, name, None)
    kept = getattr(getattr(owner, "_hf_hook", None), "weights_map", None) if getattr(start, "is_meta", False) else None
    return start if kept is None else kept[name]


@dataclass(frozen=True)
class Record:
    """transformers' record of one class that gives router logits."""

    cls: type[nn.Module]
    index: int
    layer_name: str


def recorded(model: nn.Module) -> list[Record]:
    """What transformers records as `router_logits`, over the model and the models inside it."""
    found: dict[tuple[Any, str], Record] = {}
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        entry = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits")
        for record in entry if isinstance(entry, list | tuple) else [entry] if entry is not None else []:
            cls: Any = getattr(record, "target_class", record)
            name = str(getattr(record, "layer_name", None) or "")
            found.setdefault((cls, name), Record(cls, int(getattr(record, "index", 0) or 0), name))
    return list(found.values())


def find_routers(model: PreTrainedModel) -> tuple[Router, ...]:
    """A model's routers in layer order.

    Raises DenseModelError for a model without experts and UnknownRouterError for one whose family has no row or is
    refused, or whose routers are not where and what the row says.
    """
    config: Any = model.config.get_text_config()
    where = str(getattr(model, "name_or_path", "") or type(model).__name__)
    records = recorded(model)
    family = _family_of(model, config, records, where=where)
    found: list[Router] = []
    for path, module, logits_at in _router_modules(model, family, records, where=where):
        layer = re.search(family.layer_pattern, path)
        block = model.get_submodule(path.rpartition(".")[0])
        weight = _walk(module, family.weight)
        if layer is None or getattr(weight, "ndim", 0) != 2:
            raise UnknownRouterError(
                f"router {path!r} is not as its family row says (weight {getattr(weight, 'shape', None)})",
                where=where,
                expected=f"a path that matches {family.layer_pattern!r} and a matrix {family.weight!r}",
                do="report the model and the installed transformers version: the row needs an update",
            )
        scoring = scoring_of(family, module, block, config, where=f"{where}, {path}")
        width = int(weight.shape[0])
        selector = family.selector if family.selector and hasattr(block, family.selector) else ""
        found.append(
            Router(
                0, int(layer.group(1)), path, module, block, family, scoring, width - scoring.shared, width,
                logits_at, selector,
            )
        )  # fmt: skip
    routers = [replace(r, index=i) for i, r in enumerate(sorted(found, key=lambda router: router.layer_id))]
    if not routers:
        raise DenseModelError(
            f"the model ({config.model_type}) has no router: every layer is dense",
            where=where,
            expected="at least one layer with a router",
            do="check mlp_only_layers, decoder_sparse_step and the like in the model's config.json",
        )
    _require_alike(routers, where=where)
    return tuple(routers)


def require_steerable(model_types: Iterable[str], *, where: str) -> None:
    """Raise UnknownRouterError, with the reason, for a model type that has routers and that we refuse."""
    for name in model_types:
        reason = REFUSED.get(name.removesuffix("_text"))
        if reason is not None:
            raise UnknownRouterError(
                f"models of type {name!r} cannot be steered: {reason}",
                where=where,
                expected="a family in `moesteer models`",
                do="choose another model; `moesteer models` lists what can be steered, and why the rest cannot",
            )


def _family_of(model: PreTrainedModel, config: Any, records: list[Record], *, where: str) -> Family:
    types = (config.model_type, model.config.model_type)
    counts = {name: getattr(config, name) for name in _EXPERT_COUNTS if isinstance(getattr(config, name, None), int)}
    require_steerable(types, where=where)
    if not records and not counts:
        raise DenseModelError(
            f"the model ({config.model_type}) is dense: it has no router to steer",
            where=where,
            expected="a Mixture-of-Experts model of a family in `moesteer models`",
            do="choose a Mixture-of-Experts checkpoint",
        )
    family = next((FAMILIES[name] for name in types if name in FAMILIES), None)
    if family is None or not records:
        found = ", ".join(record.cls.__name__ for record in records) or "no recorded router class"
        raise UnknownRouterError(
            f"no family row for model type {config.model_type!r} (found: {found}, {counts or 'no expert count'})",
            where=where,
            expected="one of the families in `moesteer models`",
            do="add a row to src/moesteer/models/families.py (docs/adding-a-model.md shows how and tests it)",
        )
    return family


def _router_modules(
    model: PreTrainedModel, family: Family, records: list[Record], *, where: str
) -> Iterator[tuple[str, nn.Module, int]]:
    """(path, module, place of the logits in its output) of every router the row steers."""
    named = [(path, m) for path, m in model.named_modules() if family.router and type(m).__name__ == family.router]
    if family.router and not named:
        raise UnknownRouterError(
            f"no module of class {family.router}, which the family row names",
            where=where,
            expected="the router's class under this name",
            do="report the model and the installed transformers version: the row needs an update",
        )
    for path, module in named or model.named_modules():
        if family.skips and re.search(family.skips, path):
            continue
        record = next(
            (r for r in records if isinstance(module, r.cls) and (not r.layer_name or _under(path, r.layer_name))), None
        )
        if record is not None or named:
            yield path, module, record.index if record is not None else 0


def _under(path: str, layer_name: str) -> bool:
    return path == layer_name or path.endswith("." + layer_name)


def scoring_of(family: Family, module: nn.Module, block: nn.Module, config: Any, *, where: str) -> Scoring:
    """The Scoring of one router: the row's numbers, and what its names hold on the router, the block or the config."""

    def look(name: str) -> Any:
        if name.startswith("../"):
            return getattr(block, name[3:], _MISSING)
        for place in (module, block, config):
            if hasattr(place, name):
                return getattr(place, name)
        return _MISSING

    def no_such(what: str, expected: str) -> UnknownRouterError:
        do = "report the model and the installed transformers version: the row needs an update"
        return UnknownRouterError(what, where=where, expected=expected, do=do)

    def present(name: str) -> Any:
        found = look(name)
        if found is _MISSING:
            what = f"the router has no {name!r}, which its family row names"
            raise no_such(what, f"{name!r} on the router, its block or the text config")
        return found

    def text(name: str) -> str:
        return str(present(name))

    def number(value: float | str, default: float) -> float:
        if not isinstance(value, str):
            return value
        found = present(value)
        return default if found is None else float(found)

    attribute, wanted = family.group_switch
    grouped = bool(family.groups) and (not attribute or text(attribute) == wanted)
    kind: ScoringKind = family.scoring
    if family.kind_switch[0]:
        attribute, kinds = family.kind_switch
        if text(attribute) not in kinds:
            raise no_such(f"the router's {attribute!r} is {text(attribute)!r}", " or ".join(kinds))
        kind = kinds[text(attribute)]
    renormalise = bool(number(family.renormalise, 0.0)) and kind not in ("topk-softmax", "sparsemixer")
    groups = int(number(family.groups, 1)) if grouped else 1
    return Scoring(
        kind=kind,
        top_k=int(number(family.top_k, 1)),
        renormalise=renormalise,
        scale=number(family.scale, 1.0),
        groups=groups,
        groups_kept=int(number(family.groups_kept, 1)) if groups > 1 else 1,
        group_score=family.group_score,
        group_fill=family.group_fill,
        jitter=number(family.jitter, 0.01),
        norm_p=number(family.norm_p, 1.0),
        norm_add=family.norm_add,
        norm_min=number(family.norm_min, 0.0),
        multiplier=number(family.multiplier, 1.0),
        softcap=number(family.softcap, 0.0),
        shared=int(number(family.shared, 0)),
        skipped=family.skipped,
        low_precision=family.low_precision,
    )


def _require_alike(routers: list[Router], *, where: str) -> None:
    first = routers[0]
    layers = [router.layer_id for router in routers]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice or not 1 <= first.scoring.top_k <= first.experts:
        what = f"layer {twice[0]} has two routers" if twice else f"{first.scoring.top_k} of {first.experts} experts"
        raise UnknownRouterError(
            f"the routers are not what a mask can be made for: {what}",
            where=where,
            expected="one router a layer, which selects from 1 to all of its experts",
            do="check the model's config.json, above all the number of experts per token",
        )
    for router in routers:
        if (router.experts, router.scoring) != (first.experts, first.scoring):
            raise UnknownRouterError(
                f"routers differ: {first.path} chooses {first.scoring.top_k} of {first.experts}, "
                f"{router.path} {router.scoring.top_k} of {router.experts}",
                where=where,
                expected="the same number of experts, of selected ones and the same scoring in every layer",
                do="masks are tables of one width; report the model, so that it can be given a form",
            )

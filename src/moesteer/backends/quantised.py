"""Weights of fewer bits: what torchao quantises on the way in, and what quantised checkpoints need."""

from __future__ import annotations

import re
from dataclasses import make_dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mxfp4Config, TorchAoConfig

from moesteer.backends.sources import as_model_errors, class_for, native_config, require_extra
from moesteer.errors import ModelError
from moesteer.models.fingerprint import is_quantised
from moesteer.models.routers import Router, find_routers

QUANTIZE = ("int8", "int4")
INT4_EXPERTS = "Int4Experts"


def quantisation(stored: dict[str, Any], quantize: str | None, *, name: str) -> dict[str, Any]:
    """Settings that quantise a checkpoint, or that a quantised one needs for its routers to be asked.

    The MXFP4 kernels of gpt-oss compute the selection themselves and never call the router; so it is dequantised.
    """
    method = (stored.get("quantization_config") or {}).get("quant_method")
    if quantize is not None and quantize not in QUANTIZE:
        raise ModelError(
            f"no quantisation {quantize!r}",
            where=name,
            expected=f"{', '.join(QUANTIZE)}, or none",
            do="give one of these as quantize",
        )
    if quantize is not None and method is not None:
        raise ModelError(
            f"the checkpoint is quantised already ({method})",
            where=name,
            expected="a checkpoint of full precision, to quantise it on the way in",
            do="leave quantize out, or name the checkpoint that is not quantised",
        )
    if method == "torchao" or quantize is not None:
        require_extra("torchao", "quant", what="torchao quantises this model", where=name)
    if quantize is not None:
        return {"quantization_config": _recipe(quantize, stored, name=name)}
    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    return {}


def _recipe(quantize: str, stored: dict[str, Any], *, name: str) -> Any:
    """transformers' TorchAoConfig for a model: its linear layers and its experts, not its routers nor its head.

    int8: a scale per row. int4: a scale per group of 32 (16 where 32 does not divide the width; else not quantised).
    torchao keeps int4 in whole bytes on a CPU: it rounds as four bits do, and takes the memory of eight.
    """
    ao: Any = import_module("torchao.quantization")
    do = "load it without quantize"
    with as_model_errors("the model cannot be built from its config", name=name, do=do), torch.device("meta"):
        skeleton = class_for(stored).from_config(native_config(stored))
    routers = find_routers(skeleton)
    kinds = tuple({type(router.module) for router in routers if type(router.module) is not nn.Linear})
    int8 = ao.Int8WeightOnlyConfig(set_inductor_config=False)
    head = skeleton.get_output_embeddings()
    left = {router.path for router in routers} | {p for p, m in skeleton.named_modules() if m is head}
    recipes: dict[str, Any] = {}
    for path, module in skeleton.named_modules():
        gates = isinstance(module, kinds) or path.endswith("shared_expert_gate")
        if gates or any(path == name or path.startswith(name + ".") for name in left):
            left.add(path)
        elif isinstance(module, nn.Linear):
            if quantize == "int8":
                recipes[_pattern(f"{path}.weight")] = int8
            elif (group := _group(module.in_features)) is not None:
                recipes[_pattern(f"{path}.weight")] = ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(group))  # type: ignore[attr-defined]
    experts = expert_weights(skeleton, routers)
    for path, parameter in experts:
        if quantize == "int8":
            recipes[_pattern(path)] = int8
        elif (group := _group(parameter.shape[-1])) is not None:
            recipes[_pattern(path)] = _int4_experts(group)
    if not any(_pattern(path) in recipes for path, _ in experts):
        raise ModelError(
            f"the experts of this model cannot be quantised to {quantize}: most of its weights would stay as they are",
            where=f"{name} ({stored.get('model_type')})",
            expected="experts in one tensor of three axes, the last a multiple of 16 for int4",
            do="load it without quantize",
        )
    return TorchAoConfig(ao.FqnToConfig(recipes), modules_to_not_convert=sorted(re.escape(p) + r"\." for p in left))


def _group(width: int) -> int | None:
    return next((group for group in (32, 16) if width % group == 0), None)


def _pattern(path: str) -> str:
    """torchao's name for this path in every layer."""
    return "re:" + re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(path))


def expert_weights(model: nn.Module, routers: tuple[Router, ...]) -> list[tuple[str, Tensor]]:
    """Paths of the parameters [E, ., .] beside the routers: all experts of a layer in one."""
    blocks = tuple(router.path.rpartition(".")[0] + "." for router in routers)
    count = max(router.experts - router.scoring.skipped for router in routers)
    return [
        (path, parameter)
        for path, parameter in model.named_parameters()
        if parameter.ndim == 3 and parameter.shape[0] <= count and min(parameter.shape) > 1 and path.startswith(blocks)
    ]


def _int4_experts(group: int) -> Any:
    """A recipe of our own: torchao's int4 is for matrices only. Experts are kept as its Int8Tensor holding -8 to 7."""
    ao: Any = import_module("torchao.quantization")
    steps: Any = import_module("torchao.quantization.quant_primitives")
    base: Any = import_module("torchao.core.config").AOBaseConfig
    register: Any = import_module("torchao.quantization.transform_module").register_quantize_module_handler

    def quantised(module: nn.Module, recipe: Any, *, parameter_name: str = "weight") -> nn.Module:
        weight = getattr(module, parameter_name)
        block = [1] * (weight.ndim - 1) + [recipe.group]
        scale, zero = steps.choose_qparams_affine(
            weight, steps.MappingType.SYMMETRIC, block, torch.int8, quant_min=-8, quant_max=7,
            scale_dtype=torch.float32, zero_point_dtype=torch.int8, keepdim=True, eps=torch.finfo(torch.float32).eps,
        )  # fmt: skip
        data = steps.quantize_affine(weight, block, scale, zero, torch.int8, quant_min=-8, quant_max=7)
        tensor = ao.Int8Tensor(data, scale, block, weight.dtype, zero_point=zero)
        setattr(module, parameter_name, nn.Parameter(tensor, requires_grad=False))
        return module

    recipe = make_dataclass(INT4_EXPERTS, [("group", int)], bases=(base,))
    register(recipe)(quantised)
    return recipe(group)


def forget_recipe(hf: Any) -> None:
    """Name only torchao's own recipes in the config, so that a saved model can be read where ours do not exist.

    The saved tensors say themselves how they are quantised.
    """
    ao: Any = import_module("torchao.quantization")
    int8 = ao.Int8WeightOnlyConfig(set_inductor_config=False)
    kept = hf.hf_quantizer.quantization_config.quant_type.fqn_to_config
    stock = {name: int8 if type(recipe).__name__ == INT4_EXPERTS else recipe for name, recipe in kept.items()}
    hf.hf_quantizer.quantization_config.quant_type = ao.FqnToConfig(stock)


def quantised_experts(hf: nn.Module) -> bool:
    """Whether all experts of a layer are one quantised tensor: kernels over all of them at once cannot read it."""
    return any(is_quantised(parameter) and parameter.ndim == 3 for parameter in hf.parameters())


def multiply_quantised() -> None:
    """Teach torchao's Int8Tensor to give one expert in inference mode, and `x @ w` for experts stored [in, out].

    Its own select makes a view, which inference mode forbids; `x @ w` dequantises the expert at each use.
    """
    kind: Any = import_module("torchao.quantization").Int8Tensor

    def expert(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        whole, index = args
        zero = None if whole.zero_point is None else whole.zero_point[index]
        return kind(whole.qdata[index], whole.scale[index], whole.block_size[1:], whole.dtype, zero_point=zero)

    def multiplied(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        left, right = (x.dequantize() if isinstance(x, kind) else x for x in args)
        return func(left, right.to(left.dtype))

    aten = torch.ops.aten
    kind.implements_torch_function([torch.Tensor.__getitem__])(expert)
    kind.implements([aten.matmul.default, aten.mm.default, aten.bmm.default])(multiplied)


def stored_as(hf: nn.Module) -> dict[str, int]:
    """Number of weights by what they are stored as: a dtype, or the class of a quantised tensor."""
    counts: dict[str, int] = {}
    for parameter in hf.parameters():
        name = type(parameter).__name__ if is_quantised(parameter) else str(parameter.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + parameter.numel()
    return counts

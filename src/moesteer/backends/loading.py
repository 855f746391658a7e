"""Loading a model for the transformers backend: the right class, safely, and proven to be steerable.

No remote code, no pickled weights (docs/security.md). Multimodal models are loaded whole and steered on text. A model
that is quantised, compiled, adapted by PEFT or spread over devices works, or is refused here (docs/wrapped-models.md).
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Mxfp4Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file, logging

from moesteer import files
from moesteer.backends.hf import Model
from moesteer.errors import FileError, MissingExtraError, ModelError, SelfCheckError, UnsafeModelError
from moesteer.models.check import Recorded, difference, self_check
from moesteer.models.fingerprint import is_quantised
from moesteer.models.routers import Router, find_routers
from moesteer.models.steering import MaskTables

LAB_TINY = Path(__file__).parent.parent / "lab" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZE = ("int8", "int4")
INT4_EXPERTS = "Int4Experts"


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    check: bool = True,
) -> Model:
    """Load a Hugging Face folder, a Hub id, a PEFT adapter of either, or `lab-tiny`, and prove that steering works.

    dtype: "float32", "bfloat16", "float16"; "auto" is float32 on a CPU and the checkpoint's own elsewhere.
    device_map: spread the model over devices as accelerate does ("auto", or a dict), instead of `device`. What it puts
    on "disk" is written below $TMPDIR, and removed with the model.
    quantize: "int8" or "int4", weight-only, by torchao; routers, embeddings and the head stay as they are.
    check: run the self-check (models/check.py); leave it on unless the same files were just checked.
    Raises DenseModelError, UnknownRouterError, UnsafeModelError, SelfCheckError, MissingExtraError, ModelError.
    """
    name = str(model)
    source = source_of(name)
    adapter = _adapter_config(source, name=name, revision=revision)
    base, base_revision = source, revision
    if adapter is not None:
        _require_extra("peft", "peft", what="the model is an adapter of PEFT", where=name)
        base, base_revision = adapter["base_model_name_or_path"], adapter.get("revision")
    stored = read_config(base, name=name, revision=base_revision)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    wanted: Any = DTYPES.get(dtype, "auto")
    if dtype == "auto" and place == "cpu":
        wanted = torch.float32
    elif dtype not in (*DTYPES, "auto"):
        raise ModelError(
            f"no dtype {dtype!r}", where=name, expected=f"auto, {', '.join(DTYPES)}", do="give one of these as --dtype"
        )
    settings: dict[str, Any] = {"dtype": wanted, **_quantisation(stored, quantize, base, base_revision, name=name)}
    if device_map is not None:
        _require_extra("accelerate", "devices", what="device_map spreads a model with accelerate", where=name)
        settings |= {"device_map": device_map, "offload_folder": tempfile.mkdtemp(prefix="moesteer-offload-")}
    tokenizer, hf = _from_pretrained(base, base_revision, stored, settings, name=name)
    if device_map is not None:
        weakref.finalize(hf, shutil.rmtree, settings["offload_folder"], ignore_errors=True)
    if quantize is not None:
        _forget_recipe(hf)
    if adapter is not None:
        tokenizer, hf = _with_adapter(hf, tokenizer, source, revision=revision, name=name)
    if device_map is None:
        hf = hf.to(place)
    try:
        return adopt(hf, tokenizer, name=name, check=check)
    except ModelError as error:
        if quantize is None or not isinstance(error.__cause__, RuntimeError):
            raise
        raise ModelError(
            f"quantised to {quantize}, this model does not run: {str(error.__cause__).splitlines()[0]}",
            where=f"{name} ({stored.get('model_type')})",
            expected="a family whose own code multiplies with its weights as they are (docs/wrapped-models.md)",
            do="load it without quantize",
        ) from error


def _from_pretrained(
    source: str, revision: str | None, stored: dict[str, Any], settings: dict[str, Any], *, name: str
) -> tuple[PreTrainedTokenizerBase, Any]:
    method = (stored.get("quantization_config") or {}).get("quant_method")
    try:
        with quiet_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            hf = class_for(stored).from_pretrained(
                source, revision=revision, trust_remote_code=False, use_safetensors=True, **settings
            )
            return tokenizer, hf
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        shutil.rmtree(settings.get("offload_folder", ""), ignore_errors=True)
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if method is not None:
            raise ModelError(
                f"the checkpoint is quantised ({method}), and transformers cannot run that here: {why}",
                where=name,
                expected="torchao or mxfp4, which run anywhere, or the package and the GPU that the method needs",
                do="load the checkpoint that is not quantised, with quantize='int8' or 'int4' if memory is short",
            ) from error
        if isinstance(error, RuntimeError):
            raise
        raise ModelError(
            f"transformers could not load the model: {why}",
            where=name,
            expected="a folder with config.json, safetensors weights and a tokenizer, or a Hub id of such",
            do="check the path; convert .bin weights to safetensors; `moesteer doctor` shows the versions in use",
        ) from error


def adopt(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "", check: bool = True) -> Model:
    """A model that the caller loaded: compiled, wrapped by PEFT, spread by accelerate, quantised. Sets it to eval.

    Raises as `load` does. On a CPU the experts are set to transformers' grouped kernel where the model has it: it runs
    about 2.5 times faster than the loop over experts. Quantised experts need that loop.
    """
    name = name or str(getattr(hf, "name_or_path", "")) or type(hf).__name__
    inner = _unwrapped(hf, where=name)
    inner.eval()
    loaded = Model(inner, tokenizer, name=name)
    _refuse_bypassed(loaded)
    _refuse_adapted_routers(loaded)
    if quantised_experts(inner):
        multiply_quantised()
        if _has_expert_kernels(inner):
            inner.set_experts_implementation("eager")
    elif loaded.device.type == "cpu" and _has_expert_kernels(inner):
        inner.set_experts_implementation("grouped_mm")
    if hf is not inner:
        _require_same_output(hf, loaded)
    if check:
        self_check(loaded.hf, loaded.tap, vocabulary=len(tokenizer))
        _check_compiled(loaded)
    return loaded


def _has_expert_kernels(hf: PreTrainedModel) -> bool:
    """Whether the model's experts have interchangeable kernels: some families loop over them in code of their own."""
    can = getattr(hf, "_can_set_experts_implementation", None)
    return bool(can()) if callable(can) else False


def source_of(name: str) -> str:
    """What transformers is asked for: the folder or id itself, or the folder of a lab model."""
    return str(LAB_TINY) if name == "lab-tiny" else name


def class_for(stored: dict[str, Any]) -> Any:
    """The auto class: causal where the model type has one, else image-text-to-text, which also runs on text alone."""
    causal = str(stored.get("model_type")) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


# ---- quantised


def _quantisation(
    stored: dict[str, Any], quantize: str | None, source: str, revision: str | None, *, name: str
) -> dict[str, Any]:
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
        _require_extra("torchao", "quant", what="torchao quantises this model", where=name)
    if quantize is not None:
        return {"quantization_config": _recipe(quantize, stored, source, revision, name=name)}
    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    return {}


def _recipe(quantize: str, stored: dict[str, Any], source: str, revision: str | None, *, name: str) -> Any:
    """transformers' TorchAoConfig for a model: its linear layers and its experts, not its routers nor its head.

    int8: a scale per row. int4: a scale per group of 32 (16 where 32 does not divide the width; else not quantised).
    torchao keeps int4 in whole bytes on a CPU: it rounds as four bits do, and takes the memory of eight.
    """
    ao: Any = import_module("torchao.quantization")
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    with quiet_bars(), torch.device("meta"):
        skeleton = class_for(stored).from_config(config)
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


def _forget_recipe(hf: Any) -> None:
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


def _require_extra(package: str, extra: str, *, what: str, where: str) -> None:
    if find_spec(package) is None:
        raise MissingExtraError(
            f"{what}, and {package} is not installed",
            where=where,
            expected=f"the extra {extra!r}",
            do=f"pip install 'moesteer[{extra}]'",
        )


# ---- wrapped


def _unwrapped(hf: Any, *, where: str) -> PreTrainedModel:
    """The transformers model inside what was given; LoRA and its like live in its layers."""
    if hasattr(hf, "_orig_mod"):
        raise ModelError(
            "the model is wrapped by torch.compile(model), whose generate() runs the model inside uncompiled",
            where=where,
            expected="the model itself, compiled in place or not",
            do="call model.compile() instead, and give that model",
        )
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(hf, peft.PeftModel | peft.PeftMixedModel):
        for config in hf.peft_config.values():
            if getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None):
                kind = str(getattr(config.peft_type, "value", config.peft_type))
                raise ModelError(
                    f"the adapter ({kind}) acts on the prompt, outside of the layers",
                    where=where,
                    expected="an adapter inside the layers: LoRA and its like, or one merged into the weights",
                    do="write the prompt out, or train a LoRA: positions of a learnt prompt have no tokens to steer at",
                )
        return _unwrapped(hf.get_base_model(), where=where)
    if not isinstance(hf, PreTrainedModel):
        raise ModelError(
            f"a {type(hf).__name__} is not a model of transformers",
            where=where,
            expected="a PreTrainedModel, or a PeftModel of one",
            do="give the model inside (`.module` of DataParallel)",
        )
    if hf.device.type == "meta":
        raise ModelError(
            "the first layers are offloaded, so that there is no device to send tokens to",
            where=where,
            expected="the embeddings on a device; later layers may be offloaded",
            do="name a device for the embeddings in your device_map",
        )
    return hf


def _refuse_bypassed(loaded: Model) -> None:
    for router in loaded.routers:
        forward = router.block.__dict__.get("forward")
        if getattr(getattr(forward, "__func__", forward), "__module__", "") == "transformers.integrations.mxfp4":
            raise ModelError(
                "the MXFP4 kernels compute the selection themselves and never call the router",
                where=f"{loaded.name}, layer {router.layer_id}",
                expected="experts that get their selection from the router",
                do="load it with moesteer, or with quantization_config=Mxfp4Config(dequantize=True)",
            )


def _refuse_adapted_routers(loaded: Model) -> None:
    for router in loaded.routers:
        around = [router.block, *router.module.modules()]
        if any(type(module).__module__.startswith("peft.") for module in around):
            raise ModelError(
                "an adapter sits on the router itself: its logits are a sum that is made in two places",
                where=f"{loaded.name}, layer {router.layer_id} ({router.path})",
                expected="adapters on attention and experts, or one that is merged into the weights",
                do="merge it first: model.merge_and_unload(), then adopt or save the result",
            )


def _probe(loaded: Model) -> Tensor:
    return (torch.arange(12) * 7919 % len(loaded.tokenizer)).unsqueeze(0).to(loaded.device)


def _require_same_output(wrapped: Any, loaded: Model) -> None:
    with torch.inference_mode():
        theirs = wrapped(input_ids=_probe(loaded), use_cache=False).logits
        ours = loaded.hf(input_ids=_probe(loaded), use_cache=False).logits
    if not torch.equal(theirs, ours):
        raise ModelError(
            f"the {type(wrapped).__name__} does something beside the layers of the model inside it",
            where=loaded.name,
            expected="the same logits from both, as LoRA and its like give",
            do="merge the adapter (merge_and_unload), or use one that acts in the layers",
        )


def _check_compiled(loaded: Model) -> None:
    """Run a compiled model as it is called, steered and not: its graphs must see the tap come and go.

    Steered first: torch splits the graph at each router the first time, and keeps the pieces from then on.
    """
    hf = loaded.hf
    if hf._compiled_call_impl is None and "forward" not in hf.__dict__:
        return
    target = loaded.routers[-1]
    bias = np.linspace(-8, 8, target.experts, dtype=np.float32)
    tables = MaskTables.one_layer(loaded.routers, target, bias_E=bias, force_E=None, device=loaded.device)
    recorded = Recorded()

    def run() -> Tensor:
        out: Tensor = hf(input_ids=_probe(loaded), use_cache=False).logits
        return out

    try:
        with torch.inference_mode():
            with loaded.tap.steer(tables):
                run()
            before = run()
            with loaded.tap.steer(tables), loaded.tap.record(recorded):
                steered = run()
            after = run()
    except RuntimeError as error:
        raise ModelError(
            f"the compiled model does not run with its routers tapped: {str(error).splitlines()[0]}",
            where=loaded.name,
            expected="a graph that may break at each router",
            do="compile it without fullgraph=True",
        ) from error
    index = target.index
    ignored = len(recorded.experts) < len(loaded.routers) or torch.equal(before, steered)
    if ignored or difference(
        target, recorded.logits_by_router[index], recorded.experts[index], recorded.weights[index], bias_NE=bias
    ):
        raise SelfCheckError(
            "the compiled model does not do what steering asks: its graph does not see the routers change",
            where=loaded.name,
            expected="a graph that is traced again when a router's forward is replaced",
            do="compile it without a guard_filter_fn that drops the guards on modules",
        )
    if not torch.equal(before, after):
        raise SelfCheckError(
            "the compiled model does not come back bit for bit after steering",
            where=loaded.name,
            expected="the logits it gave before",
            do="report the model and the versions `moesteer doctor` prints; do not steer it compiled meanwhile",
        )


# ---- adapters


def _adapter_config(source: str, *, name: str, revision: str | None) -> dict[str, Any] | None:
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
    if not isinstance(config, dict) or not isinstance(base, str) or not base:
        raise ModelError(
            "the adapter does not say what model it is for",
            where=f"{name}: adapter_config.json",
            expected="base_model_name_or_path: a folder or a Hub id",
            do="write it there, or load the base and give PeftModel.from_pretrained(base, folder) to adopt",
        )
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise UnsafeModelError(
            "the adapter has no adapter_model.safetensors",
            where=name,
            expected="weights in safetensors: a .bin file can run code when it is read",
            do="save it again with save_pretrained(..., safe_serialization=True)",
        )
    if asked := sorted({*_unsafe_keys(config), *(key for key in ("megatron_config",) if config.get(key))}):
        raise UnsafeModelError(
            f"adapter_config.json asks for code or internals: {', '.join(asked)}",
            where=name,
            expected="settings only",
            do="use another adapter",
        )
    return config


def _with_adapter(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, *, revision: str | None, name: str
) -> tuple[PreTrainedTokenizerBase, Any]:
    """The adapter's own tokenizer where it brings one, and the PeftModel around its base."""
    from peft import PeftModel

    try:
        if not Path(source).is_dir():
            cached_file(source, "adapter_model.safetensors", revision=revision)
        elif (Path(source) / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return tokenizer, PeftModel.from_pretrained(hf, source, revision=revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"PEFT could not put the adapter on its base: {str(error).splitlines()[0]}",
            where=name,
            expected="an adapter in safetensors, for this base model and these versions",
            do="check base_model_name_or_path in adapter_config.json; `moesteer doctor` shows the versions in use",
        ) from error


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

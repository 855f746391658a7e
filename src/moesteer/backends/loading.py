"""Loading a model for the transformers backend: the right class, safely, and proven to be steerable.

No remote code, no pickled weights (docs/security.md). Multimodal models are loaded whole and steered on text. A model
that is quantised, compiled, adapted by PEFT or spread over devices works, or is refused here (docs/wrapped-models.md).
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moesteer.backends.adapters import base_of, with_adapter
from moesteer.backends.hf import Model
from moesteer.backends.quantised import forget_recipe, multiply_quantised, quantisation, quantised_experts
from moesteer.backends.sources import (
    as_model_errors,
    class_for,
    native_config,
    quiet_bars,
    require_extra,
    source_of,
    steerable_config,
)
from moesteer.backends.wrapped import (
    check_compiled,
    refuse_adapted_routers,
    refuse_bypassed,
    require_same_output,
    unwrapped,
)
from moesteer.errors import ModelError
from moesteer.models.check import self_check

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    device: "cpu", "cuda", "cuda:1", ...; "auto" is a GPU if there is one; "spread" is device_map="auto".
    device_map: spread the model over devices as accelerate does ("auto", or a dict), instead of `device`. What it puts
    on "disk" is written below $TMPDIR, and removed with the model.
    quantize: "int8" or "int4", weight-only, by torchao; routers, embeddings and the head stay as they are.
    check: run the self-check (models/check.py); leave it on unless the same files were just checked.
    Raises DenseModelError, UnknownRouterError, UnsafeModelError, SelfCheckError, MissingExtraError, ModelError.
    """
    name = str(model)
    source = source_of(name)
    base, base_revision, adapted = base_of(source, name=name, revision=revision)
    if adapted:
        require_extra("peft", "peft", what="the model is an adapter of PEFT", where=name)
    stored = steerable_config(base, name=name, revision=base_revision)
    if device == "spread":
        device, device_map = "auto", device_map or "auto"
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    _require_device(place, name=name)
    wanted: Any = DTYPES.get(dtype, "auto")
    if dtype == "auto" and place == "cpu":
        wanted = torch.float32
    elif dtype not in (*DTYPES, "auto"):
        raise ModelError(
            f"no dtype {dtype!r}", where=name, expected=f"auto, {', '.join(DTYPES)}", do="give one of these as --dtype"
        )
    settings: dict[str, Any] = {"dtype": wanted, **quantisation(stored, quantize, name=name)}
    if device_map is not None:
        require_extra("accelerate", "devices", what="device_map spreads a model with accelerate", where=name)
        settings |= {"device_map": device_map, "offload_folder": tempfile.mkdtemp(prefix="moesteer-offload-")}
    tokenizer, hf = _from_pretrained(base, base_revision, stored, settings, name=name)
    if device_map is not None:
        weakref.finalize(hf, shutil.rmtree, settings["offload_folder"], ignore_errors=True)
    if quantize is not None:
        forget_recipe(hf)
    if adapted:
        tokenizer, hf = with_adapter(hf, tokenizer, source, revision=revision, name=name)
    if device_map is None:
        with as_model_errors(f"the model cannot be put on {place!r}", name=name, do="give another --device"):
            hf = hf.to(place)
    if quantize is not None:
        return _adopt_quantised(hf, tokenizer, name=name, check=check, quantize=quantize)
    return adopt(hf, tokenizer, name=name, check=check)


def _require_device(place: str, *, name: str) -> None:
    """Raise ModelError for a device that there is not, before minutes of loading."""
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"no device {place!r}: {str(error).splitlines()[0]}"[:300],
            where=name,
            expected="auto, cpu, spread, or a device that torch has here (cuda, cuda:0, mps, ...)",
            do="give another --device; `moesteer doctor` shows what torch sees",
        ) from error


def _adopt_quantised(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, check: bool, quantize: str
) -> Model:
    try:
        return adopt(hf, tokenizer, name=name, check=check)
    except ModelError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        raise ModelError(
            f"quantised to {quantize}, this model does not run: {str(error.__cause__).splitlines()[0]}",
            where=f"{name} ({hf.config.model_type})",
            expected="a family whose own code multiplies with its weights as they are (docs/wrapped-models.md)",
            do="load it without quantize",
        ) from error


def _from_pretrained(
    source: str, revision: str | None, stored: dict[str, Any], settings: dict[str, Any], *, name: str
) -> tuple[PreTrainedTokenizerBase, Any]:
    method = (stored.get("quantization_config") or {}).get("quant_method")
    what, do = "transformers could not load the model", "check the path; convert .bin weights to safetensors"
    if method is not None:
        what = f"the checkpoint is quantised ({method}), and transformers cannot run that here"
        do = "load the one that is not quantised, with quantize='int8' or 'int4' if memory is short"
    try:
        with as_model_errors(what, name=name, do=f"{do}; `moesteer doctor` shows the versions in use"), quiet_bars():
            config = native_config(stored)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, config=config, trust_remote_code=False)
            hf, info = class_for(stored).from_pretrained(
                source, revision=revision, config=config, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True, **settings,
            )  # fmt: skip
        require_whole(info, name=name)
    except ModelError:
        shutil.rmtree(settings.get("offload_folder", ""), ignore_errors=True)
        raise
    return tokenizer, hf


def require_whole(info: dict[str, Any], *, name: str) -> None:
    """Raise ModelError for tensors that were not in the files, by transformers' own report (tied ones are not)."""
    lost = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if lost:
        raise ModelError(
            f"{len(lost)} tensors are not in the checkpoint, or of another shape: {', '.join(lost[:3])}"[:400],
            where=name,
            expected="every weight of the model: transformers would fill the gaps with random numbers",
            do="fetch the checkpoint again; compare its config.json with its files",
        )


def adopt(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "", check: bool = True) -> Model:
    """A model that the caller loaded: compiled, wrapped by PEFT, spread by accelerate, quantised. Sets it to eval.

    Raises as `load` does. On a CPU the experts are set to transformers' grouped kernel where the model has it: it runs
    about 2.5 times faster than the loop over experts. Quantised experts need that loop.
    """
    name = name or str(getattr(hf, "name_or_path", "")) or type(hf).__name__
    inner = unwrapped(hf, where=name)
    inner.eval()
    loaded = Model(inner, tokenizer, name=name)
    refuse_bypassed(loaded)
    refuse_adapted_routers(loaded)
    if quantised_experts(inner):
        multiply_quantised()
        if _has_expert_kernels(inner):
            inner.set_experts_implementation("eager")
    elif loaded.device.type == "cpu" and _has_expert_kernels(inner):
        inner.set_experts_implementation("grouped_mm")
    if hf is not inner:
        require_same_output(hf, loaded)
    if check:
        self_check(loaded.hf, loaded.tap, vocabulary=len(tokenizer))
        check_compiled(loaded)
    return loaded


def _has_expert_kernels(hf: PreTrainedModel) -> bool:
    """Whether the model's experts have interchangeable kernels: some families loop over them in code of their own."""
    can = getattr(hf, "_can_set_experts_implementation", None)
    return bool(can()) if callable(can) else False

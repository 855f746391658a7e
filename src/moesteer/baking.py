"""Baking: a checkpoint that steers by itself, for servers that run no code of ours. docs/baking.md says what it holds.

The checkpoint's files are copied with the few router tensors changed (models/bake.py, models/checkpoint.py), loaded
again and compared with the model steered at run time, before the new folder takes its name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import cached_file

from moesteer import files
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.backends.sources import LAB_TINY
from moesteer.errors import FileError, ModelError, NoEffectError, SelfCheckError
from moesteer.mask import SteeringMask
from moesteer.models.bake import EXACT, NOT_EXACT, RUNTIME, Plan, plan, require_bakeable
from moesteer.models.check import Recorded, backbone, difference
from moesteer.models.checkpoint import DTYPES, Checkpoint, copy_changed
from moesteer.models.families import Bake

RECEIPT = "moesteer_bake.json"
PROBE = (4, 32)
"""Rows and tokens of the batch that a baked checkpoint is compared on."""
ALIKE = 0.95
"""Share of selections like those of run time below which a receipt says so aloud."""
LOGIT_ERROR = 0.05
"""The largest error of a logit that is let pass, as a share of the mask's largest bias in the same layer."""


@dataclass(frozen=True)
class Verified:
    """A baked checkpoint beside the model steered by the mask, on `tokens` tokens and every router.

    logit_error: |baked - unbaked - bias| of a router's logits for one input, in logits, at its largest in the layer
    where it is largest beside largest_bias, the mask's in that layer; None for a forced mask. selections_alike: share
    of selections (as sets) equal to those of the model steered at run time.
    """

    tokens: int
    logit_error: float | None
    largest_bias: float | None
    selections_alike: float


@dataclass(frozen=True)
class Baked:
    """Receipt of a bake. rounding: largest error of storing a value in its tensor's dtype, in the tensor's units.

    alpha: strength of an additive mask, None for a forced one. rewritten: weight files that hold a changed tensor;
    all else is the source's, byte for byte. left_out: files of the source that were not copied.
    """

    folder: Path
    kind: Bake
    mask_sha256: str
    alpha: float | None
    tensors: tuple[str, ...]
    rewritten: tuple[str, ...]
    left_out: tuple[str, ...]
    rounding: float
    verified: Verified

    def as_json(self) -> dict[str, Any]:
        """Plain values, with what is exact and what is not."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "exact": EXACT[self.kind],
            "not_exact": NOT_EXACT[self.kind],
        }

    def described(self) -> dict[str, str]:
        """The receipt in words, a line each."""
        verified = self.verified
        lines = {
            "baked": f"{self.folder} (loaded again and compared on {verified.tokens} tokens)",
            "changed": f"{len(self.tensors)} tensors ({self.kind}) in {', '.join(self.rewritten)}",
            "exact": EXACT[self.kind],
            "not exact": NOT_EXACT[self.kind],
            "selections": f"{100 * verified.selections_alike:.1f} % are those of the model steered at run time",
        }
        if verified.logit_error is not None:
            lines["rounding"] = f"{self.rounding:.2g} in a stored value"
            worst = (
                f"{verified.logit_error:.2g} in the worst layer, where the largest bias is {verified.largest_bias:.3g}"
            )
            lines["logits"] = f"off by up to {worst}"
        if verified.selections_alike < ALIKE:
            lines["NOTE"] = f"evaluate {self.folder} itself: what was measured at run time is not what this selects"
        if self.left_out:
            lines["left out"] = ", ".join(self.left_out)
        return lines


def bake(
    model: Model,
    mask: SteeringMask,
    *,
    out: Path | str,
    source: Path | str | None = None,
    alpha: float | None = None,
    allow_other_checkpoint: bool = False,
) -> Baked:
    """Write the checkpoint of `model` with `mask` in it to the new folder `out`, and prove that it steers.

    source: the folder or Hub id (in the local cache) that the model was loaded from; default, the model's name. The
    routers' tensors are found in it by their values, and it is refused if they are not there. alpha: strength of an
    additive mask (default: the mask's own); other than 0 it makes no difference to a forced one. The baked copy is
    loaded beside the model, on the same device: both must fit. `out` appears at the end, or not at all.

    Raises ModelError or MaskContentError for what cannot be baked, MaskMismatchError, NoEffectError, FileError, and
    SelfCheckError where the result does not do what the mask does.
    """
    require_bakeable(mask)
    mask.check_model(model.fingerprint, allow_other_checkpoint=allow_other_checkpoint)
    mask.require_entries()
    strength = mask.info.alpha if alpha is None else alpha
    if strength == 0 or not (mask.forced or mask.bias_LE(strength).any()):
        raise NoEffectError(
            "at this strength the mask steers nothing: there is nothing to bake",
            where=f"alpha {strength:g}, a {mask.info.method} mask",
            expected="a strength other than 0, and a mask whose sigmas are not",
            do="leave alpha out, or give the one the mask was accepted at",
        )
    folder, target = source_folder(source if source is not None else model.name), Path(out).absolute()
    checkpoint = Checkpoint(folder)
    planned = plan(model.hf, model.routers, mask, alpha=strength, checkpoint=checkpoint)
    with model.steered([mask], alphas=[strength], allow_other_checkpoint=allow_other_checkpoint):
        steered, _ = _probed(model)
    with files.appearing(target, source=folder) as partial:
        left_out = copy_changed(checkpoint, partial, planned.changes)
        verified = _verify(model, steered, mask, planned, alpha=strength, folder=partial)
        baked = Baked(
            folder=target, kind=planned.kind, mask_sha256=mask.sha256, alpha=None if mask.forced else strength,
            tensors=tuple(sorted(change.stored.name for change in planned.changes)),
            rewritten=tuple(sorted({change.stored.file.name for change in planned.changes})),
            left_out=left_out, rounding=planned.rounding, verified=verified,
        )  # fmt: skip
        facts = {name: value for name, value in baked.as_json().items() if name not in ("folder", "left_out")}
        origin = {"source": model.fingerprint.model_dump(mode="json"), "creator": f"moesteer {version('moesteer')}"}
        files.write_json(partial / RECEIPT, {"format_version": 1, **facts, **origin})
    return baked


def source_folder(source: Path | str) -> Path:
    """The folder of a checkpoint: a path, lab-tiny, or a Hub id that is in the local cache. Raises FileError."""
    folder = LAB_TINY if str(source) == "lab-tiny" else Path(source)
    if not folder.is_dir():
        try:
            folder = Path(str(cached_file(str(source), "config.json", local_files_only=True))).parent
        except (OSError, ValueError) as error:
            raise FileError(
                f"the checkpoint's files are not there: {str(error).splitlines()[0]}",
                where=str(source),
                expected="a folder, or a Hub id in the local cache",
                do="give the folder the model was loaded from as `source`",
            ) from error
    if (folder / RECEIPT).exists():
        raise ModelError(
            "the checkpoint is baked already",
            where=str(folder / RECEIPT),
            expected="the checkpoint as its makers published it",
            do="bake the original again, with the mask you want",
        )
    return folder.absolute()


def _probed(model: Model) -> tuple[Recorded, dict[int, Tensor]]:
    """One pass over the probe: what every router gave, and what it got, [N, hidden], by router index."""
    recorded, inputs = Recorded(), {}

    def keep(index: int) -> Any:
        def hook(_module: Any, args: Any) -> None:
            inputs[index] = args[0].detach().reshape(-1, args[0].shape[-1])

        return hook

    rows, length = PROBE
    tokens = (torch.arange(rows * length) * 7919 % len(model.tokenizer)).reshape(PROBE).to(model.device)
    handles = [router.module.register_forward_pre_hook(keep(router.index)) for router in model.routers]
    try:
        with torch.inference_mode(), model.tap.record(recorded):
            backbone(model.hf)(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return recorded, inputs


def _verify(
    model: Model, steered: Recorded, mask: SteeringMask, planned: Plan, *, alpha: float, folder: Path
) -> Verified:
    """Load the baked folder and compare. Raises SelfCheckError where it does not do what the mask does."""
    dtype = str(model.hf.dtype).removeprefix("torch.")
    loaded = load(folder, dtype=dtype, device=str(model.device))
    recorded, inputs = _probed(loaded)
    alike = []
    for router in loaded.routers:
        ours, theirs = (run.experts[router.index].cpu().sort(-1).values for run in (recorded, steered))
        alike.append((ours == theirs).all(-1).float().mean().item())
    error = largest = None
    if mask.forced:
        _require_forced(loaded, recorded, mask, where=model.name)
    else:
        bias_LE = mask.bias_LE(alpha)
        stored = DTYPES[planned.changes[0].stored.dtype]
        errors = [
            _logit_error(model, loaded, index, inputs[index].cpu().to(stored).float(), torch.from_numpy(bias_LE[index]))
            for index in range(len(loaded.routers))
        ]
        # each router against its own mask; where that is empty, against nothing: it must be as it was
        sizes = np.abs(bias_LE).max(axis=-1)
        shares = [
            error / size if size else (0.0 if error == 0 else np.inf) for error, size in zip(errors, sizes, strict=True)
        ]
        worst = int(np.argmax(np.nan_to_num(shares, nan=np.inf)))
        error, largest = errors[worst], float(sizes[worst])
        if not shares[worst] <= LOGIT_ERROR:
            larger = "raise alpha, or " if planned.kind == "bias" else ""
            raise _failed(
                f"a router's logits are off by up to {error:.3g}, where the mask's largest bias there is {largest:.3g}",
                where=f"{model.name}, layer {model.routers[worst].layer_id}, {str(stored)[6:]} run in {dtype}",
                do=f"{larger}bake from a checkpoint in float32 and run it so, or {RUNTIME}",
            )
    return Verified(PROBE[0] * PROBE[1], error, largest, float(np.mean(alike)))


def _logit_error(model: Model, baked: Model, index: int, inputs_NH: Tensor, bias_E: Tensor) -> float:
    """Largest |baked - unbaked - bias| of one router's logits, its inputs as the checkpoint's dtype rounds them."""

    def logits(of: Model) -> Tensor:
        router = of.routers[index]
        bias = None if router.bias is None else router.bias.float().cpu()
        return torch.nn.functional.linear(inputs_NH, router.weight.float().cpu(), bias)

    with torch.inference_mode():
        return float((logits(baked) - logits(model) - bias_E).abs().max())


def _require_forced(baked: Model, recorded: Recorded, mask: SteeringMask, *, where: str) -> None:
    """Raise SelfCheckError unless all on and no off is selected for every token, with the experts' own weights."""
    assert mask.force_LE is not None
    for router in baked.routers:
        index = router.index
        experts_NK = recorded.experts[index]
        found = difference(router, recorded.logits_by_router[index], experts_NK, recorded.weights[index])
        chosen = torch.nn.functional.one_hot(experts_NK.long(), router.experts).any(dim=1).cpu().numpy()
        force_E = mask.force_LE[index]
        if not chosen[:, force_E > 0].all():
            found = f"an expert switched on is not chosen for {int((~chosen[:, force_E > 0].all(-1)).sum())} tokens"
        elif chosen[:, force_E < 0].any():
            found = f"an expert switched off is chosen for {int(chosen[:, force_E < 0].any(-1).sum())} tokens"
        if found is not None:
            raise _failed(f"layer {router.layer_id}: {found}", where=where, do=f"report the model, and {RUNTIME}")


def _failed(what: str, *, where: str, do: str) -> SelfCheckError:
    return SelfCheckError(
        f"the baked checkpoint does not do what the mask does: {what}",
        where=where,
        expected="the mask's effect on every token; nothing was kept",
        do=do,
    )

"""Finding the outside baseline: a direction in the residual stream, by difference of means (shifting.py adds it).

Arditi et al., arXiv:2406.11717: the direction is the mean residual stream of one side less that of the other, after
one layer, at a position behind the user's instruction; adding it changes every position of that layer. 2606.04160
reports that it steers Mixture-of-Experts models too. Deviations: every conversation counts once, over its response as
well if asked; layer and strength are the caller's to choose on held-out data; a direction is only added, never
projected out of the weights. Written from the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moesteer.backends.chat import Encoded, length_batches
from moesteer.backends.hf import BATCH_POSITIONS, Model
from moesteer.backends.layers import decoder_layers
from moesteer.direction import Direction, DirectionInfo
from moesteer.errors import (
    AlreadySteeredError,
    EmptyDataError,
    InputError,
    ModelError,
    NoEffectError,
    NumericsError,
)
from moesteer.mask import Intent
from moesteer.models.check import backbone

Span = Literal["last_prompt", "response"]


def hidden_of(output: Any, *, where: str) -> Tensor:
    """The hidden states [batch, positions, ...] of what a decoder layer returns."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not torch.is_tensor(hidden) or hidden.ndim < 3:
        raise ModelError(
            f"a decoder layer returns {type(hidden).__name__} {tuple(getattr(hidden, 'shape', ()))}",
            where=where,
            expected="hidden states [batch, positions, size], alone or first in a tuple",
            do="report the model: its residual stream cannot be steered",
        )
    return hidden


@contextmanager
def after_layers(layers: Mapping[int, nn.Module], after: Callable[[int, Any], Any]) -> Iterator[None]:
    """Inside the block `after(layer_id, output)` follows each layer; what it returns, unless None, is the output.

    Not by forward hooks: torch.compile leaves out those that it may not trace, and keeps those that it has traced.
    """
    replaced: list[tuple[dict[str, Any], bool, Any]] = []
    try:
        for layer_id, layer in layers.items():
            own = layer.__dict__
            replaced.append((own, "forward" in own, own.get("forward")))
            own["forward"] = torch.compiler.disable(_followed(layer.forward, layer_id, after))  # type: ignore[no-untyped-call]
        yield
    finally:
        for own, had_own, before in replaced:
            if had_own:
                own["forward"] = before
            else:
                own.pop("forward", None)


def _followed(original: Callable[..., Any], layer_id: int, after: Callable[[int, Any], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        changed = after(layer_id, output)
        return output if changed is None else changed

    return forward


# ---- finding


def find(
    model: Model,
    wanted: Sequence[Encoded],
    other: Sequence[Encoded],
    *,
    layer_id: int,
    toward: str,
    span: Span = "last_prompt",
    data_sha256: str | None = None,
) -> Direction:
    """The direction of one decoder layer; see find_all."""
    layers = decoder_layers(model)
    if layer_id not in layers:
        raise no_layer(layer_id, model, len(layers))
    only = {layer_id: layers[layer_id]}
    return _found(model, wanted, other, only, toward=toward, span=span, data_sha256=data_sha256)[layer_id]


def find_all(
    model: Model,
    wanted: Sequence[Encoded],
    other: Sequence[Encoded],
    *,
    toward: str,
    span: Span = "last_prompt",
    data_sha256: str | None = None,
) -> dict[int, Direction]:
    """The direction of every decoder layer by its id, in one pass over the data.

    span "last_prompt": the last position of the prompt, template marks included; "response": the mean over the
    response's positions. Every conversation counts once. Raises EmptyDataError, InputError (no such span),
    NoEffectError (nothing tells the sides apart), NumericsError, AlreadySteeredError.
    """
    layers = decoder_layers(model)
    return _found(model, wanted, other, layers, toward=toward, span=span, data_sha256=data_sha256)


def no_layer(layer_id: int, model: Model, count: int) -> InputError:
    """The error for a decoder layer that there is not."""
    return InputError(
        f"no decoder layer {layer_id}",
        where=model.name,
        expected=f"0 to {count - 1}",
        do="name one of the model's layers",
    )


def _found(
    model: Model,
    wanted: Sequence[Encoded],
    other: Sequence[Encoded],
    layers: Mapping[int, nn.Module],
    *,
    toward: str,
    span: Span,
    data_sha256: str | None,
) -> dict[int, Direction]:
    _require_contrast(model, wanted, other, span)
    sides = [_means(model, side, layers, span=span) for side in (wanted, other)]
    settings = {"span": span, "wanted": len(wanted), "other": len(other)}
    found: dict[int, Direction] = {}
    for layer_id in layers:
        difference_H = sides[0][layer_id] - sides[1][layer_id]
        scale = float(np.linalg.norm(difference_H))
        if not np.isfinite(scale):
            raise NumericsError(
                "the residual stream is not finite",
                where=f"{model.name}, layer {layer_id}",
                expected="finite numbers",
                do="load the model with --dtype float32 or bfloat16",
            )
        if scale == 0:
            raise _no_contrast(f"layer {layer_id}: both means are the same")
        info = DirectionInfo(
            fingerprint=model.fingerprint, settings=settings, intent=Intent(toward=toward), layer_id=layer_id,
            scale=scale, data_sha256=data_sha256,
        )  # fmt: skip
        found[layer_id] = Direction(info, (difference_H / scale).astype(np.float32))
    return found


def _require_contrast(model: Model, wanted: Sequence[Encoded], other: Sequence[Encoded], span: Span) -> None:
    if not wanted or not other:
        raise EmptyDataError(
            "a direction needs conversations of both sides",
            where=f"{len(wanted)} wanted, {len(other)} other",
            expected="at least one of each",
            do="give conversations that show the behaviour, and some that do not",
        )
    name = "prompt" if span == "last_prompt" else "response"
    lacking = sum(e.spans.get(name, (0, 0))[1] <= e.spans.get(name, (0, 0))[0] for e in (*wanted, *other))
    if lacking:
        raise InputError(
            f"{lacking} conversations have no {name}",
            where=f"span={span!r}",
            expected=f"a span {name!r} with at least one token in each",
            do="encode them with their responses, or choose the other span",
        )
    if span == "last_prompt":
        one, two = (sorted(e.token_ids[: e.spans["prompt"][1]] for e in side) for side in (wanted, other))
        if one == two:
            raise _no_contrast("both sides have the same prompts")
    if model.tap.attached:
        raise AlreadySteeredError(
            "the model is steered or captured",
            where=model.name,
            expected="the model as it is: a direction is found without steering",
            do="leave the `with mask.apply(...)` block first",
        )


def _no_contrast(where: str) -> NoEffectError:
    return NoEffectError(
        "nothing tells the two sides apart",
        where=where,
        expected="two sides whose residual streams differ",
        do="check the labels; for the same prompts with other responses use span='response'",
    )


def _means(
    model: Model, sequences: Sequence[Encoded], layers: Mapping[int, nn.Module], *, span: Span
) -> dict[int, NDArray[np.float64]]:
    """Mean residual stream [H] after each layer, over the conversations' own means over their span."""
    sums: dict[int, Any] = dict.fromkeys(layers, 0.0)
    places: tuple[list[int], list[int], list[float]] = ([], [], [])

    def record(layer_id: int, output: Any) -> None:
        hidden = hidden_of(output, where=f"{model.name}, layer {layer_id}")
        rows, columns, weights = places
        picked_PH = hidden[rows, columns].flatten(1).float()
        sums[layer_id] += (torch.tensor(weights, device=hidden.device) @ picked_PH).double().cpu().numpy()

    with after_layers(layers, record):
        for batch in length_batches([len(e.token_ids) for e in sequences], BATCH_POSITIONS):
            chosen = [sequences[i] for i in batch]
            places = _places(chosen, span=span)
            input_ids, attention = model.pad([e.token_ids for e in chosen], left=False)
            with torch.inference_mode():
                backbone(model.hf)(input_ids=input_ids, attention_mask=attention, use_cache=False)
    unseen = [layer_id for layer_id, total in sums.items() if np.ndim(total) == 0]
    if unseen:
        raise never_ran(unseen, where=model.name)
    return {layer_id: total / len(sequences) for layer_id, total in sums.items()}


def _places(sequences: Sequence[Encoded], *, span: Span) -> tuple[list[int], list[int], list[float]]:
    """(rows, columns, weights) of the positions that count; the weights of each row add up to 1."""
    rows: list[int] = []
    columns: list[int] = []
    weights: list[float] = []
    for row, encoded in enumerate(sequences):
        start, end = encoded.spans["prompt" if span == "last_prompt" else "response"]
        start = end - 1 if span == "last_prompt" else start
        rows += [row] * (end - start)
        columns += range(start, end)
        weights += [1.0 / (end - start)] * (end - start)
    return rows, columns, weights


def never_ran(layer_ids: Sequence[int], *, where: str) -> NoEffectError:
    """The error for layers that no forward pass called."""
    return NoEffectError(
        f"the model did not run layer {', '.join(map(str, layer_ids))}",
        where=where,
        expected="a forward pass that calls each decoder layer",
        do="run the model inside the block; undo torch.compile if a graph kept from before stands in its place",
    )

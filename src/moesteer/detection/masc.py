"""MASCing made sound (after arXiv:2604.27818): a mask optimised through surrogates of the routing.

What differs from the paper, and why:

- **Matched labels.** Both sides are conversations of the target suite, alike in topic: those in which the
  model showed the wanted behaviour by itself, and those in which it did not. (Published: multi-turn attacks against
  single requests, which length alone tells apart.)
- **Keep classes.** Protected conversations are a class of their own. The optimised logits of an unwanted conversation
  must be classified as wanted; those of a wanted or a protected one must keep their class.
- **Zero start and a proximal step.** S starts at zero and is shrunk after each Adam step, so that a zero is a zero and
  whatever is not zero was asked for. (Published: a random dense start, most of which stays.)
- **lambda counts per entry**: the penalty is lambda |S|_1 / (L E), so that one lambda means the same on any model.
- **Tokens from the last user message to the end of the prompt** (span final_turn): the last position, where the
  reply is decided, is among them.
- Several surrogates (seeds) and several lambdas in one batch; each step goes through two surrogates drawn anew, so
  that what only one of them believes averages out.

    minimise over S   mean over seeds  CE(f(z + sigma S), class)  + lambda |S|_1 / (L E)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesteer.detection import surrogate
from moesteer.detection.base import (
    Detection,
    additive_mask,
    checked_layers,
    require_both,
    require_logits,
    require_span,
    require_unsteered,
    rows_of_layers,
    two_sides,
)
from moesteer.detection.logistic import as_facts, plain_classifiers
from moesteer.detection.method import Method
from moesteer.detection.proximal import shrink
from moesteer.detection.through_model import number, out_of_range, whole
from moesteer.errors import NoEffectError
from moesteer.progress import Progress
from moesteer.trace import TraceReader

UNWANTED, WANTED, KEEP = 0, 1, 2
HELD_OUT = 0.2
PER_STEP = 2
"""Surrogates that one step goes through, drawn from all: every one is heard, at the cost of two."""
STARTS = ("zero", "random")


@dataclass(frozen=True, eq=False)
class Labelled:
    """A trace's sequences with their classes; ids of tokens for the plain classifiers."""

    data: surrogate.Sequences
    groups: list[str]
    token_ids: list[NDArray[np.int32]]

    def sample(self, most: int | None, *, seed: int) -> Labelled:
        """At most so many sequences of each class, drawn by seed."""
        if most is None:
            return self
        rng = random.Random(f"masc/{seed}")
        kept: list[int] = []
        for label in (UNWANTED, WANTED, KEEP):
            mine = self.rows(label)
            kept += rng.sample(mine, min(most, len(mine)))
        kept.sort()
        chosen = torch.tensor(kept)
        data = surrogate.Sequences(
            self.data.logits_NTLE[chosen], self.data.lengths_N[chosen], self.data.labels_N[chosen]
        )
        return Labelled(data, [self.groups[i] for i in kept], [self.token_ids[i] for i in kept])

    def rows(self, *labels: int) -> list[int]:
        """Numbers of the sequences in these classes."""
        return [i for i, label in enumerate(self.data.labels_N.tolist()) if label in labels]


def read(trace: TraceReader, *, toward: str, keep: Sequence[str], span: str) -> Labelled:
    """Classes by label: `toward` is wanted, those in `keep` are to be kept, every other label is unwanted."""
    require_unsteered(trace)
    require_span(trace, span)
    require_logits(trace)
    contrast = [row for row in trace.rows if row.label not in keep]
    wanted, other = two_sides(contrast, toward=toward, where=str(trace.folder))
    kept = {row.id for row in trace.rows if row.label in keep}
    sequences, labels, groups, token_ids = [], [], [], []
    for row, arrays in trace.sequences(wanted | other | kept):
        part = arrays["logits"][row.span(span)].astype(np.float32)
        if not len(part):
            continue
        sequences.append(part)
        labels.append(KEEP if row.id in kept else WANTED if row.id in wanted else UNWANTED)
        groups.append(row.group)
        token_ids.append(np.asarray(arrays["token_ids"][row.span(span)]))
    require_both(labels, (UNWANTED, WANTED), toward=toward, span=span, where=str(trace.folder))
    return Labelled(surrogate.Sequences.of(sequences, labels), groups, token_ids)


def split_by_group(groups: Sequence[str], *, seed: int, share: float = HELD_OUT) -> tuple[list[int], list[int]]:
    """(train, held out) numbers of sequences; a group (behaviour) is never on both sides."""
    names = sorted(set(groups))
    random.Random(f"surrogate/{seed}").shuffle(names)
    held_names = set(names[: max(1, round(share * len(names)))]) if len(names) > 1 else set()
    held = [i for i, group in enumerate(groups) if group in held_names]
    return [i for i, group in enumerate(groups) if group not in held_names], held


def detect_grid(
    trace: TraceReader,
    variants: Sequence[Mapping[str, Any]],
    *,
    toward: str,
    seed: int = 0,
    l1: float = 1.0,
    **settings: Any,
) -> list[Detection]:
    """One mask per variant. Variants that differ in l1 alone are optimised in one batch through one set of surrogates.

    A lambda that leaves no expert gives no mask, unless none of them does.
    """
    batches: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for variant in variants:
        own = {**settings, **{name: value for name, value in variant.items() if name != "l1"}}
        batches.setdefault(repr(sorted(own.items())), (own, []))[1].append(variant.get("l1", l1))
    found: list[Detection] = []
    nothing: NoEffectError | None = None
    for own, lambdas in batches.values():
        try:
            found += _detect(trace, toward=toward, lambdas=lambdas, seed=seed, **own)
        except NoEffectError as error:
            nothing = error
    if nothing is not None and not found:
        raise nothing
    return found


def _detect(
    trace: TraceReader,
    *,
    toward: str,
    lambdas: Sequence[float],
    keep: Sequence[str] = ("keep",),
    span: str = "final_turn",
    surrogate_kind: surrogate.Kind = "lstm",
    surrogates: int = 4,
    start: str = "zero",
    keep_weight: float = 2.0,
    steps: int = 120,
    batch: int = 64,
    learning_rate: float = 0.05,
    conversations: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Detection]:
    """One mask per lambda, all optimised in one batch (see detect)."""
    _require_settings(
        lambdas=lambdas, surrogates=surrogates, start=start, keep_weight=keep_weight, steps=steps, batch=batch,
        learning_rate=learning_rate, conversations=conversations, keep=keep,
    )  # fmt: skip
    open_L = torch.from_numpy(rows_of_layers(trace.fingerprint, layers))
    found = read(trace, toward=toward, keep=keep, span=span).sample(conversations, seed=seed)
    train, held = split_by_group(found.groups, seed=seed)
    classes = 3 if found.rows(KEEP) else 2
    seeds = [1000 * seed + i for i in range(surrogates)]
    stack = surrogate.fit(surrogate_kind, found.data, train=train, classes=classes, seeds=seeds, batch=batch)
    facts = _facts(found, stack, train, held)
    sigma = torch.from_numpy(trace.sigma_L)
    matrix = _optimise(
        stack, found, sigma, open_L, lambdas=lambdas, start=start, keep_weight=keep_weight, steps=steps, batch=batch,
        learning_rate=learning_rate, seed=seed,
    )  # fmt: skip
    made = []
    for l1, matrix_LE in zip(lambdas, matrix, strict=True):
        strength = matrix_LE.numpy().astype(np.float32)
        if not strength.any():
            continue  # a lambda that leaves nothing is no candidate; none left is an error below
        settings = {
            "l1": l1, "keep": list(keep), "span": span, "surrogate_kind": surrogate_kind, "surrogates": surrogates,
            "start": start, "keep_weight": keep_weight, "steps": steps, "batch": batch,
            "learning_rate": learning_rate, "conversations": conversations,
            "layers": checked_layers(trace.fingerprint, layers), "seed": seed,
        }  # fmt: skip
        moved = {"moved_to_wanted_class": _moved(stack, found, sigma, matrix_LE)}
        mask = additive_mask(trace, strength, trace.sigma_L, method="masc", toward=toward, settings=settings)
        made.append(Detection(mask, strength, {**facts, **moved}))
    if not made:
        additive_mask(
            trace, matrix[-1].numpy(), trace.sigma_L, method="masc", toward=toward, settings={"lambdas": list(lambdas)}
        )
    return made


def detect(
    trace: TraceReader,
    *,
    toward: str,
    l1: float = 1.0,
    keep: Sequence[str] = ("keep",),
    span: str = "final_turn",
    surrogate_kind: surrogate.Kind = "lstm",
    surrogates: int = 4,
    start: str = "zero",
    keep_weight: float = 2.0,
    steps: int = 120,
    batch: int = 64,
    learning_rate: float = 0.05,
    conversations: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Detection:
    """A mask that moves the surrogates' verdict on unwanted conversations to wanted, and no other verdict.

    toward: label of the wanted class; keep: labels whose class must stay; every other label is unwanted. l1: lambda,
    of the mean |S|. surrogate_kind: lstm, gru or linear; surrogates: how many, each from its own seed. start: "zero",
    or "random" (standard normal: the paper's, for comparison). keep_weight: of the loss on sequences that must keep
    their class. conversations: at most so many of each class, drawn by seed; layers: decoder layers that may be
    steered (None: all of both). Facts hold the surrogates' held-out accuracy (by behaviour) beside that of
    classifiers that see no routing. Raises TraceLabelError, InputError, NoEffectError, NanLogitsError.
    """
    return _detect(
        trace, toward=toward, lambdas=(l1,), keep=keep, span=span, surrogate_kind=surrogate_kind,
        surrogates=surrogates, start=start, keep_weight=keep_weight, steps=steps, batch=batch,
        learning_rate=learning_rate, conversations=conversations, layers=layers, seed=seed,
    )[0]  # fmt: skip


def _optimise(
    stack: surrogate.Stack,
    found: Labelled,
    sigma_L: Tensor,
    open_L: Tensor,
    *,
    lambdas: Sequence[float],
    start: str,
    keep_weight: float,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> Tensor:
    """S [lambdas, L, E]. Each step goes through a few surrogates, drawn anew, with all lambdas in one batch."""
    _, _, layers, experts = found.data.logits_NTLE.shape
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, experts)  # one start for all, so that a lambda's mask does not depend on those beside it
    begun = torch.randn(shape, generator=generator) if start == "random" else torch.zeros(shape)
    matrix = begun.repeat(len(lambdas), 1, 1).requires_grad_(True)
    optimizer = torch.optim.Adam([matrix], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2.0 * (1.0 - step / steps)))
    penalty = torch.tensor(list(lambdas))[:, None, None] / (layers * experts)
    change, hold = torch.tensor(found.rows(UNWANTED)), torch.tensor(found.rows(WANTED, KEEP))
    each = max(4, batch) // 2
    with Progress("masc: through the surrogate", total=steps, unit="steps") as progress:
        for _ in range(steps):
            picked = [part[torch.randperm(len(part), generator=generator)[:each]] for part in (change, hold)]
            drawn = torch.randperm(len(stack.seeds), generator=generator)[:PER_STEP]
            optimizer.zero_grad()
            with stack.only(drawn):
                for part, weight in zip(picked, (1.0, keep_weight), strict=True):
                    _add_gradient(stack, found.data, part, sigma_L, matrix, weight=weight)
            optimizer.step()
            with torch.no_grad():
                shrink(matrix, optimizer, penalty_LE=penalty)
                matrix *= open_L[:, None]
            schedule.step()
            progress.advance(1)
    return matrix.detach()


def _add_gradient(
    stack: surrogate.Stack,
    data: surrogate.Sequences,
    part_B: Tensor,
    sigma_L: Tensor,
    matrix_MLE: Tensor,
    *,
    weight: float,
) -> None:
    """Add to the matrices' gradient that of weight times the part's mean loss.

    A part that fits into one pass is one; else each pass weighs as its share of the part, and the sum is the same.
    """
    for some in data.passes(part_B, copies=len(matrix_MLE) * PER_STEP):
        logits, lengths, labels = data.part(some)
        goal = torch.where(labels == UNWANTED, torch.full_like(labels, WANTED), labels)
        steered = logits + (sigma_L[:, None] * matrix_MLE)[:, None, None]
        loss = _through_all(stack, steered, lengths, goal).sum()
        (weight * (len(some) / len(part_B)) * loss).backward()  # type: ignore[no-untyped-call]


def _through_all(stack: surrogate.Stack, steered_MBTLE: Tensor, lengths_B: Tensor, goal_B: Tensor) -> Tensor:
    """[M] loss of each lambda's logits, averaged over the surrogates: all in one pass."""
    count = len(steered_MBTLE)
    verdicts = stack(steered_MBTLE.flatten(0, 1)[None], lengths_B.repeat(count))
    return stack.loss(verdicts.view(-1, len(goal_B), verdicts.shape[-1]), goal_B).view(-1, count).mean(0)


def _moved(stack: surrogate.Stack, found: Labelled, sigma_L: Tensor, matrix_LE: Tensor) -> float:
    """Share of unwanted sequences that the surrogates put into the wanted class once steered."""
    rows = torch.tensor(found.rows(UNWANTED))
    total = 0.0
    with torch.no_grad():
        for some in torch.split(rows, 256):
            for part in found.data.passes(some, copies=len(stack.seeds)):
                logits, lengths, _ = found.data.part(part)
                verdicts = stack.classes(stack(logits + sigma_L[:, None] * matrix_LE, lengths))
                total += float((verdicts == WANTED).float().mean(0).sum())
    return total / len(rows)


def _facts(found: Labelled, stack: surrogate.Stack, train: list[int], held: list[int]) -> dict[str, Any]:
    """Held-out accuracy of the surrogates on the contrast itself, and of the plain classifiers on the same split."""
    contrast = set(found.rows(UNWANTED, WANTED))
    inside, outside = [i for i in train if i in contrast], [i for i in held if i in contrast]
    mine = surrogate.accuracy(stack, found.data, outside)
    plain = plain_classifiers(found.token_ids, found.data.labels_N.tolist(), train=inside, held=outside)
    return {
        **as_facts(float(np.mean(mine)), plain),
        "surrogate_train_accuracy": float(np.mean(surrogate.accuracy(stack, found.data, inside))),
        "surrogate_keep_accuracy": float(
            np.mean(surrogate.accuracy(stack, found.data, [i for i in held if i not in contrast]))
        ),
        "surrogate_held_out": len(outside),
    }


def _require_settings(
    *, lambdas: Sequence[float], surrogates: int, start: str, keep_weight: float, steps: int, batch: int,
    learning_rate: float, conversations: int | None, keep: Sequence[str],
) -> None:  # fmt: skip
    for l1 in lambdas:
        number("masc", "l1", l1, above=False)
    counts = {"surrogates": surrogates, "steps": steps, "batch": batch, "conversations": conversations}
    for name, value in counts.items():
        if name != "conversations" or value is not None:
            whole("masc", name, value, least=1)
    number("masc", "keep_weight", keep_weight, above=False)
    number("masc", "learning_rate", learning_rate, above=True)
    if isinstance(keep, str) or not all(isinstance(label, str) for label in keep):
        raise out_of_range("masc", "keep", keep, 'a list of labels, for example ["keep"]')
    if start not in STARTS:
        raise out_of_range("masc", "start", start, " or ".join(STARTS))


METHOD = Method(
    name="masc",
    title="MASCing with matched labels, keep classes and a zero start",
    detect=detect,
    contrast="matched",
    grid=detect_grid,
    variants=({"l1": 1.0}, {"l1": 3.0}, {"l1": 6.0}),
    alphas=(0.25, 0.5, 1.0),
    gated=True,
    gated_alphas=(1.0, 1.5),
)

"""Direct: the steering matrix optimised through the model itself (ours).

    minimise  CE(wanted response | attack) + keep_weight KL(unsteered || steered on protected text)

S [L, E], in units of sigma, starts at zero; the model's weights stay frozen, and the routing weights of the
selected experts carry the gradient. What is decided is decided in the first tokens of a response, so only
those enter the loss. After each Adam step every |S| shrinks by `l1` (times the fall of the learning rate), which
makes zeros exact: a constant pull towards few experts, not the proximal step of a stated L1 penalty.

Cost: `steps` forward and backward passes over `targets + keeps` sequences; a pass never holds more than
`pass_positions` positions, with `checkpointing` it keeps only what enters each layer, and `max_tokens` and
`max_seconds` end the optimisation early, but not before its first step. A step's sequences depend on the seed and
the step alone, so that a run that was killed goes on from its last saved step to the same mask, bit for bit (but
for max_seconds).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moesteer import files
from moesteer.detection import saved_state
from moesteer.detection.base import Detection, checked_layers, rows_of_layers
from moesteer.detection.method import Method
from moesteer.detection.through_model import EncodedResponse, number, require_responses, response_ids, whole
from moesteer.errors import EmptyDataError, NanLogitsError, NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.progress import Progress

TEACHER_BYTES = 512 * 1024 * 1024
"""Unsteered log-probabilities of protected text are kept in memory up to this size, and else recomputed."""
SAVE_EVERY_S = 10.0
SMALLEST = 1e-6
"""A first gradient that is nowhere larger (nats a token for one sigma) is rounding, which Adam would magnify."""


class ThroughModel(Protocol):
    """The little of a backend that this method needs, so that it depends on none."""

    fingerprint: Fingerprint
    hf: Any

    def response_logits(
        self, sequences: Sequence[Any], *, bias_LE: Tensor | None, most: int, checkpointing: bool = False
    ) -> Tensor:
        """Vocabulary logits [n, V] that predict the first `most` response tokens of every sequence, in order."""


@dataclass(frozen=True)
class Settings:
    """The settings of `detect`, which explains them."""

    steps: int
    targets_per_step: int
    keeps_per_step: int
    keep_weight: float
    l1: float
    learning_rate: float
    response_tokens: int
    pass_positions: int
    checkpointing: bool
    max_tokens: int | None
    max_seconds: float | None
    conversations: int | None
    layers: list[int] | None
    seed: int

    def check(self) -> None:
        """Raise InputError for a setting out of its range."""
        for name in ("steps", "targets_per_step", "keeps_per_step", "response_tokens", "pass_positions"):
            whole("direct", name, getattr(self, name), least=1)
        for name in ("keep_weight", "l1"):
            number("direct", name, getattr(self, name), above=False)
        number("direct", "learning_rate", self.learning_rate, above=True)
        if self.conversations is not None:
            whole("direct", "conversations", self.conversations, least=1)
        for name in ("max_tokens", "max_seconds"):
            if getattr(self, name) is not None:
                number("direct", name, getattr(self, name), above=True)

    def plain(self) -> dict[str, Any]:
        """By name, as JSON has them: numpy's numbers are Python's."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in values}


def detect(
    model: ThroughModel,
    *,
    targets: Sequence[EncodedResponse],
    keeps: Sequence[EncodedResponse],
    sigma_L: NDArray[np.float32],
    toward: str,
    steps: int = 80,
    targets_per_step: int = 12,
    keeps_per_step: int = 24,
    keep_weight: float = 4.0,
    l1: float = 4e-3,
    learning_rate: float = 0.05,
    response_tokens: int = 12,
    pass_positions: int = 16_384,
    checkpointing: bool = False,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
    conversations: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    data_sha256: str | None = None,
    state: Path | None = None,
) -> Detection:
    """A mask that makes the wanted responses likely and leaves protected ones as they are.

    targets: conversations with the wanted response; keeps: protected conversations with the model's own
    response. sigma_L: calibrated standard deviations of the router logits. l1: per entry, of |S| in sigma
    units. pass_positions: most positions (sequences x padded length) in one forward and backward pass; a step is
    split into as many as it needs. checkpointing: compute inner results twice rather than keep them. max_tokens:
    positions read in all, max_seconds: time, after which the steps end early (and the learning rate has fallen by
    then); what the unsteered passes over the keeps take counts, and one step is made in any case. conversations: at
    most so many to change and so many to keep, drawn by seed; layers: decoder layers that may be steered (None: all of
    both). state: a file in which an unfinished optimisation is kept and gone on with; it is removed at the end.
    Raises EmptyDataError, InputError (FileError: `state` is another file, which is left as it is), NanLogitsError,
    NoEffectError.
    """
    settings = Settings(
        steps, targets_per_step, keeps_per_step, keep_weight, l1, learning_rate, response_tokens, pass_positions,
        checkpointing, max_tokens, max_seconds, conversations, checked_layers(model.fingerprint, layers), seed,
    )  # fmt: skip
    settings.check()
    if state is not None:
        state = Path(state)
        saved_state.require_ours(state)
    if not targets or not keeps:
        raise EmptyDataError(
            "direct needs both conversations to change and conversations to keep",
            where=f"{len(targets)} to change, {len(keeps)} to keep",
            expected="at least one of each",
            do="name a target suite and at least one protect suite in the scenario",
        )
    require_responses("direct", targets=targets, keeps=keeps)
    draw = random.Random(f"direct/{seed}/conversations")
    if conversations is not None:
        targets, keeps = (draw.sample(list(side), min(conversations, len(side))) for side in (targets, keeps))
    frozen = [p for p in model.hf.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        run = _Optimisation(model, targets, keeps, sigma_L, settings, state=state, data_sha256=data_sha256)
        found = run.go()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    used = {**settings.plain(), "targets": len(targets), "keeps": len(keeps)}
    if not found.any():
        raise NoEffectError(
            "direct ended with no entry: the pull of the L1 term won",
            where=f"settings {used}",
            expected="at least one expert with a strength",
            do="lower l1, or give more steps",
        )
    info = MaskInfo(
        fingerprint=model.fingerprint, method="direct", settings=used, intent=Intent(toward=toward),
        data_sha256=data_sha256,
    )  # fmt: skip
    mask = SteeringMask(info, strength_LE=found, sigma_L=np.asarray(sigma_L, dtype=np.float32))
    return Detection(mask, found, run.facts())


class _Optimisation:
    """S, its optimiser, and where they are in their steps."""

    def __init__(
        self,
        model: ThroughModel,
        targets: Sequence[EncodedResponse],
        keeps: Sequence[EncodedResponse],
        sigma_L: NDArray[np.float32],
        settings: Settings,
        *,
        state: Path | None,
        data_sha256: str | None,
    ) -> None:
        self.model, self.targets, self.keeps, self.settings = model, targets, keeps, settings
        device = model.hf.device
        self.sigma_L = torch.tensor(sigma_L, device=device)
        self.open_L = torch.from_numpy(rows_of_layers(model.fingerprint, settings.layers)).to(device)
        self.strength_LE = torch.zeros((len(sigma_L), model.fingerprint.experts), device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.strength_LE], lr=settings.learning_rate)
        self.losses: list[tuple[float, float]] = []
        self.spent, self.ended = _Spent(), "steps"
        begun = time.monotonic()
        self.teacher = _Teacher(model, keeps, settings, self.spent)
        self.spent.seconds = time.monotonic() - begun
        self.before = replace(self.spent)
        self.state = state
        ids = [[list(e.token_ids) for e in side] for side in (targets, keeps)]
        plan = [settings.plain(), model.fingerprint.model_dump(mode="json"), data_sha256, sigma_L.tolist(), ids]
        self.plan = files.sha256(files.dumps(plan, indent=None).encode("utf-8"))

    def go(self) -> NDArray[np.float32]:
        """All steps that the bounds allow; S."""
        self._resume()
        saved = time.monotonic()
        with Progress("direct: through the model", total=self.settings.steps, unit="steps") as progress:
            progress.advance(len(self.losses))
            while self._share() < 1.0:
                begun = time.monotonic()
                self._step()
                self.spent.seconds += time.monotonic() - begun
                progress.advance(1, note=f"change {self.losses[-1][0]:.2f}, keep {self.losses[-1][1]:.3f}")
                if self.state is not None and time.monotonic() - saved > SAVE_EVERY_S:
                    self._save()
                    saved = time.monotonic()
        if self.state is not None:
            self.state.unlink(missing_ok=True)
        return self.strength_LE.detach().cpu().numpy().astype(np.float32)

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "loss_first": self.losses[0], "loss_last": tuple(np.mean(self.losses[-10:], axis=0).tolist()),
            "steps": len(self.losses), "ended_by": self.ended, "tokens": self.spent.tokens,
            "seconds": round(self.spent.seconds, 1),
        }  # fmt: skip

    def _share(self) -> float:
        """Share of what the steps may spend: of their number, the tokens or the seconds, whichever is furthest.

        Of the tokens and the seconds they may spend what the first pass over the keeps has left: before the first step
        the share is 0 whatever the bounds.
        """
        s, spent, before = self.settings, self.spent, self.before
        shares = {"steps": len(self.losses) / s.steps}
        if s.max_tokens is not None:
            shares["max_tokens"] = (spent.tokens - before.tokens) / max(s.max_tokens - before.tokens, SMALLEST)
        if s.max_seconds is not None:
            shares["max_seconds"] = (spent.seconds - before.seconds) / max(s.max_seconds - before.seconds, SMALLEST)
        self.ended = max(shares, key=lambda name: shares[name])
        return shares[self.ended]

    def _step(self) -> None:
        """One Adam step over a step's sequences, in passes that fit, and the proximal step of the L1 term."""
        s = self.settings
        rng = random.Random(f"direct/{s.seed}/{len(self.losses)}")
        chosen = rng.sample(range(len(self.targets)), min(s.targets_per_step, len(self.targets)))
        kept = rng.sample(range(len(self.keeps)), min(s.keeps_per_step, len(self.keeps)))
        batch = [(self.targets[i], -1) for i in chosen] + [(self.keeps[i], i) for i in kept]
        counts = [sum(len(response_ids(one, most=s.response_tokens)) for one, i in batch if (i < 0) == side)
                  for side in (True, False)]  # fmt: skip
        rate = min(1.0, 2.0 * (1.0 - self._share()))
        self.optimizer.param_groups[0]["lr"] = s.learning_rate * rate
        self.optimizer.zero_grad()
        change = keep = 0.0
        for part in _passes(batch, s.pass_positions):
            changed, held = self._loss(part)
            loss = changed / counts[0] + s.keep_weight * held / counts[1]
            if not bool(torch.isfinite(loss)):
                raise _diverged(self.model, len(self.losses))
            loss.backward()  # type: ignore[no-untyped-call]
            change += float(changed.detach()) / counts[0]
            keep += float(held.detach()) / counts[1]
            self.spent.tokens += _positions([one for one, _ in part])
        if not self.losses:
            self._require_gradient()
        self.optimizer.step()
        with torch.no_grad():
            self.strength_LE.copy_(self.strength_LE.sign() * (self.strength_LE.abs() - s.l1 * rate).clamp(min=0))
            self.strength_LE *= self.open_L[:, None]
        self.losses.append((change, keep))

    def _require_gradient(self) -> None:
        gradient = self.strength_LE.grad
        if gradient is None or float(gradient.abs().max()) < SMALLEST:
            raise NoEffectError(
                "the router logits have no gradient: the weights of the selected experts do not depend on them",
                where=f"direct on a {self.model.fingerprint.model_type} ({self.model.fingerprint.scoring})",
                expected="routing weights that vary; the one weight of a renormalised top-1 router is always 1",
                do="use method `causal` or `risk-difference`, which need no gradient",
            )

    def _loss(self, part: Sequence[tuple[EncodedResponse, int]]) -> tuple[Tensor, Tensor]:
        """(summed cross-entropy of wanted responses, summed KL on kept ones) of one pass; targets come first."""
        s = self.settings
        logits = self.model.response_logits(
            [one for one, _ in part], bias_LE=self.sigma_L[:, None] * self.strength_LE, most=s.response_tokens,
            checkpointing=s.checkpointing,
        ).float()  # fmt: skip
        ids = [response_ids(one, most=s.response_tokens) for one, i in part if i < 0]
        wanted = torch.cat([*ids, torch.empty(0, dtype=torch.long)]).to(logits.device)
        changed = nn.functional.cross_entropy(logits[: len(wanted)], wanted, reduction="sum")
        kept = [i for _, i in part if i >= 0]
        if not kept:
            return changed, logits.new_zeros(())
        steered = logits[len(wanted) :].log_softmax(-1)
        return changed, nn.functional.kl_div(steered, self.teacher(kept), log_target=True, reduction="sum")

    # ---- going on after a kill

    def _save(self) -> None:
        assert self.state is not None
        adam = self.optimizer.state[self.strength_LE]
        tensors = {"strength": self.strength_LE.detach(), **{n: adam[n] for n in ("exp_avg", "exp_avg_sq", "step")}}
        done = {
            "plan": self.plan, "losses": self.losses, "spent": asdict(self.spent), "before_s": self.before.seconds,
        }  # fmt: skip
        saved_state.write(self.state, tensors, done)

    def _resume(self) -> None:
        """Take up a saved state of the same plan; one that is of another plan or damaged is left behind.

        The first pass over the keeps, which was made again, counts once in the tokens, and each time in the seconds.
        """
        kept = None if self.state is None else saved_state.read(self.state, plan=self.plan)
        if kept is None:
            return
        tensors, done = kept
        spent, before_s = _Spent(**done["spent"]), done["before_s"]
        with torch.no_grad():
            self.strength_LE.copy_(tensors["strength"])
        names = ("exp_avg", "exp_avg_sq")
        moments = {name: tensors[name].to(self.strength_LE.device) for name in names}
        self.optimizer.state[self.strength_LE] = {**moments, "step": tensors["step"]}
        self.losses = [(float(change), float(keep)) for change, keep in done["losses"]]
        self.spent.tokens = spent.tokens
        self.spent.seconds += spent.seconds
        self.before.seconds += before_s


@dataclass
class _Spent:
    """What has been read and how long it took."""

    tokens: int = 0
    seconds: float = 0.0


class _Teacher:
    """Unsteered log-probabilities of the kept responses: once for all if they fit, else anew for each step.

    Whatever it reads it adds to `spent`.
    """

    def __init__(
        self, model: ThroughModel, keeps: Sequence[EncodedResponse], settings: Settings, spent: _Spent
    ) -> None:
        self.model, self.keeps, self.most, self.spent = model, keeps, settings.response_tokens, spent
        self.stored: list[Tensor] | None = None
        counts = [len(response_ids(keep, most=self.most)) for keep in keeps]
        first = self._compute([0])
        if sum(counts) * first.shape[-1] * 4 > TEACHER_BYTES:
            return
        stored: dict[int, Tensor] = {}
        numbered = [(keep, i) for i, keep in enumerate(keeps)]
        for part in _passes(numbered, settings.pass_positions):
            chosen = [i for _, i in part]
            stored |= dict(zip(chosen, torch.split(self._compute(chosen), [counts[i] for i in chosen]), strict=True))
        self.stored = [stored[i] for i in range(len(keeps))]

    def _compute(self, chosen: Sequence[int]) -> Tensor:
        sequences = [self.keeps[i] for i in chosen]
        with torch.no_grad():
            logits = self.model.response_logits(sequences, bias_LE=None, most=self.most)
        self.spent.tokens += _positions(sequences)
        return logits.float().log_softmax(-1)

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        if self.stored is None:
            return self._compute(chosen)
        return torch.cat([self.stored[i] for i in chosen])


def _passes(batch: Sequence[tuple[EncodedResponse, int]], positions: int) -> list[list[tuple[EncodedResponse, int]]]:
    """The batch in order, in parts of at most `positions` rows x longest (a longer sequence is a part by itself)."""
    parts: list[list[tuple[EncodedResponse, int]]] = []
    longest = 0
    for one in batch:
        longest = max(longest, len(one[0].token_ids))
        if not parts or (len(parts[-1]) + 1) * longest > positions:
            parts.append([])
            longest = len(one[0].token_ids)
        parts[-1].append(one)
    return parts


def _positions(sequences: Sequence[EncodedResponse]) -> int:
    """Rows x longest of one pass."""
    return len(sequences) * max(len(one.token_ids) for one in sequences)


def _diverged(model: ThroughModel, step: int) -> NanLogitsError:
    return NanLogitsError(
        "the loss is not finite",
        where=f"direct, step {step} on a {model.fingerprint.model_type}",
        expected="finite numbers",
        do="load the model with --dtype float32 or bfloat16, or lower the learning rate",
    )


METHOD = Method(
    name="direct",
    title="optimised through the model, with a term that keeps protected answers",
    detect=detect,
    through_model=True,
    alphas=(0.2, 0.25, 0.3, 0.35, 0.4),
    gated=True,
    gated_alphas=(0.35, 0.5, 0.75, 1.0),
)

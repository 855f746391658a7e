"""Risk difference (SteerMoE, arXiv:2509.09660, section 3): experts selected more often on one side of a contrast.

For expert e of layer l, p1 = A1 / N1 and p2 = A2 / N2 are the shares of counted tokens with e in the top-k on
the wanted and on the other side; D = p1 - p2. Forced masks switch the experts of largest D > 0 on and those of
most negative D off, at most k on and E - k off in a layer, none on in a top-1 router, and within expert groups no
more than they can follow (`possible_forced`). The paper also reports the log odds ratio and a paired
t-test of router probabilities: `score` "log-odds" and "paired-t".

By default tokens are counted as published. Ours, and off by default: additive masks (strength = score / largest
chosen |score|, in units of sigma), conversations weighted alike, balanced sides, a cap per layer, false-discovery
control over the L x E experts and stability selection over resampled groups (after the idea of SAFEx,
arXiv:2506.17368). The last two take a conversation's group for what is independent, not its tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesteer.detection.base import Detection, additive_mask, forced_mask, require_logits
from moesteer.detection.choosing import additive_signs, forced_signs
from moesteer.detection.counts import Counts, count
from moesteer.detection.method import Method
from moesteer.detection.paired import Pairs, pair_differences
from moesteer.detection.sides import Sides, sides_of
from moesteer.detection.significance import frequencies, group_test
from moesteer.errors import InputError, MaskContentError, NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.routing import Scoring, check_force
from moesteer.trace import TraceReader

CHOICES = {
    "score": ("risk-difference", "log-odds", "paired-t"),
    "weight": ("token", "conversation"),
    "form": ("forced", "additive"),
}
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """The settings of `detect`, which explains them."""

    span: str
    score: Literal["risk-difference", "log-odds", "paired-t"]
    weight: Literal["token", "conversation"]
    balance: bool
    form: Literal["forced", "additive"]
    on: int
    off: int
    experts: int
    per_layer: int | None
    reverse: bool
    fdr: float | None
    stability: float | None
    bootstraps: int
    seed: int

    def used(self) -> dict[str, Any]:
        """Those that had a part in the mask: numbers of the other form, and of no bootstrap, had none."""
        idle = {"experts"} if self.form == "forced" else {"on", "off"}
        if self.stability is None:
            idle |= {"bootstraps", "seed"}
        return {name: value for name, value in asdict(self).items() if name not in idle}

    def asked(self) -> dict[str, int]:
        """How many experts are to be chosen, by role."""
        return {"on": self.on, "off": self.off} if self.form == "forced" else {"experts": self.experts}

    def signs(self, score_BLE: F64, fingerprint: Fingerprint) -> NDArray[np.int8]:
        """The experts that scores choose, 1 for (switched) on and -1 for off, in B tables at once."""
        if self.form == "forced":
            return possible_forced(score_BLE, fingerprint, on=self.on, off=self.off, per_layer=self.per_layer)
        return additive_signs(score_BLE, experts=self.experts, per_layer=self.per_layer)


def detect(
    trace: TraceReader,
    *,
    toward: str,
    span: str = "response",
    score: Literal["risk-difference", "log-odds", "paired-t"] = "risk-difference",
    weight: Literal["token", "conversation"] = "token",
    balance: bool = False,
    form: Literal["forced", "additive"] = "forced",
    on: int = 5,
    off: int = 0,
    experts: int = 20,
    per_layer: int | None = None,
    reverse: bool = False,
    fdr: float | None = None,
    stability: float | None = None,
    bootstraps: int = 100,
    seed: int = 0,
) -> Detection:
    """A mask from the experts whose selection differs between the two sides of a trace.

    toward: the label of the wanted side. span: a kept span, "question" (final_user) or "all" (every kept token).
    score, weight, balance: see counts.py, paired.py and sides.py. form "forced": `on` experts switched on and `off`
    switched off, as published; "additive": the `experts` of largest |score|, strengths in sigma units. per_layer: at
    most so many on and so many off (additive: so many) in a layer. What routers cannot follow is passed over: the
    facts say how many were asked for and how many chosen. reverse: away from `toward`; scores change their
    sign, so that `on` counts experts of the other side. fdr: keep only experts that pass Benjamini-Hochberg at
    this rate, in the direction of their score. stability: keep only experts chosen in the same role in this share
    of `bootstraps` resamples of the groups, drawn with `seed`. scores_LE: in the mask's direction.
    Raises InputError, TraceLabelError and NoEffectError (no expert is left, or only some on in top-1 routers asked).
    """
    settings = _checked(
        Settings(
            span, score, weight, balance, form, on, off, experts, per_layer, reverse, fdr, stability, bootstraps, seed
        )
    )
    if form == "additive":
        require_logits(trace)
    elif _only_on(settings) and trace.fingerprint.top_k == 1:
        raise _none_on(settings, trace.fingerprint)
    sides = sides_of(trace, toward=toward, span=span, balance=balance, paired=score == "paired-t")
    evidence = _evidence(trace, sides, settings)
    score_LE = evidence.score_LE() * (-1.0 if reverse else 1.0)
    facts = _facts(sides, settings)
    kept_LE, found = _eligible(evidence, score_LE, settings, trace)
    facts |= found
    signs_LE = settings.signs(np.where(kept_LE, score_LE, 0.0)[None], trace.fingerprint)[0]
    facts["chosen"] = _chosen(signs_LE, settings)
    toward = _away(trace, toward) if reverse else toward
    given: dict[str, Any] = {"method": settings.score, "toward": toward, "settings": settings.used()}
    scores = score_LE.astype(np.float32)
    if form == "forced":
        return Detection(forced_mask(trace, signs_LE, **given), scores, facts)
    chosen_LE = np.where(signs_LE != 0, score_LE, 0.0)
    peak = np.abs(chosen_LE).max()
    strength = (chosen_LE / (peak if peak > 0 else 1.0)).astype(np.float32)
    return Detection(additive_mask(trace, strength, trace.sigma_L, **given), scores, facts)


def possible_forced(
    score_BLE: F64, fingerprint: Fingerprint, *, on: int, off: int, per_layer: int | None = None
) -> NDArray[np.int8]:
    """choosing.forced_signs, as far as routers of this fingerprint can follow: what they cannot is passed over.

    1 for the `on` largest positive scores of each of B tables, -1 for the `off` most negative. None on where k is 1;
    with expert groups, none that its layer cannot take beside those chosen before it (routing.check_force).
    """
    scoring = _limits(fingerprint)
    on = 0 if scoring.top_k == 1 else on
    if scoring.groups == 1:
        return forced_signs(score_BLE, on=on, off=off, top_k=scoring.top_k, per_layer=per_layer)
    most = score_BLE.shape[-1] if per_layer is None else per_layer
    return np.stack([_possible_in_groups(table, on=on, off=off, most=most, scoring=scoring) for table in score_BLE])


def _possible_in_groups(score_LE: F64, *, on: int, off: int, most: int, scoring: Scoring) -> NDArray[np.int8]:
    """One table. Ties go to the lower layer and expert. most: of one sign in a layer."""
    signs_LE = np.zeros(score_LE.shape, dtype=np.int8)
    for sign, asked in ((1, on), (-1, off)):
        signed, left = sign * score_LE.ravel(), asked
        for flat in np.argsort(-signed, kind="stable"):
            if left == 0 or signed[flat] <= 0:
                break
            layer, expert = divmod(int(flat), score_LE.shape[1])
            if (signs_LE[layer] == sign).sum() == most:
                continue
            signs_LE[layer, expert] = sign
            try:
                check_force(signs_LE[layer : layer + 1], scoring=scoring)
                left -= 1
            except MaskContentError:
                signs_LE[layer, expert] = 0
    return signs_LE


def _limits(fingerprint: Fingerprint) -> Scoring:
    """What limits forces, from the fingerprint's words (routing.Scoring.describe): k, and groups where it names some.

    A mask of somebody else's may say anything there: groups that cannot be are taken for none.
    """
    none = Scoring("softmax-topk", fingerprint.top_k)
    found = re.search(r"(?:^|, )(\d{1,6}) of (\d{1,6}) groups ", fingerprint.scoring)
    if found is None:
        return none
    kept, groups = int(found[1]), int(found[2])
    if not 0 < kept <= groups or fingerprint.experts % groups:
        return none
    return replace(none, groups=groups, groups_kept=kept)


def _only_on(settings: Settings) -> bool:
    return settings.form == "forced" and settings.on > 0 and settings.off == 0


def _none_on(settings: Settings, fingerprint: Fingerprint) -> NoEffectError:
    return NoEffectError(
        f"{settings.on} experts are to be switched on in top-1 routers, and none off",
        where=f"{settings.score} on a {fingerprint.model_type} ({fingerprint.scoring})",
        expected="none switched on: a top-1 router has one place, and every token would take this expert in it",
        do="switch others off (on=0, off=15), or take form additive, which leaves the choice to the token",
    )


def _evidence(trace: TraceReader, sides: Sides, settings: Settings) -> Counts | Pairs:
    by_group = settings.fdr is not None or settings.stability is not None
    if settings.score == "paired-t":
        return pair_differences(trace, sides, weight=settings.weight, by_group=by_group)
    return count(trace, sides, weight=settings.weight, by_group=by_group, score=settings.score)


def _eligible(
    evidence: Counts | Pairs, score_LE: F64, settings: Settings, trace: TraceReader
) -> tuple[NDArray[np.bool_], dict[str, Any]]:
    """Experts that may be chosen, and facts. Raises NoEffectError when fdr or stability leaves none."""
    direction = -1.0 if settings.reverse else 1.0
    fingerprint, where = trace.fingerprint, str(trace.folder)
    kept_LE = np.ones(score_LE.shape, dtype=bool)
    facts: dict[str, Any] = {}
    if settings.fdr is not None:
        tested = group_test(evidence, layers=len(score_LE), where=where)
        kept_LE = tested.passing_LE(settings.fdr) & (np.sign(tested.effect_LE) == np.sign(score_LE) * direction)
        facts["fdr"] = {
            "test": tested.test, "groups": tested.groups_used, "tests": tested.p_LE.size,
            "passing": int(kept_LE.sum()), "smallest_p": float(tested.p_LE.min()),
            "smallest_p_possible": tested.smallest_possible,
        }  # fmt: skip
        if not kept_LE.any():
            raise _none_left(f"that passes fdr={settings.fdr:g}", facts["fdr"], "give conversations of more groups")
    if settings.stability is not None:
        on_LE, off_LE = frequencies(
            evidence, lambda score_BLE: settings.signs(score_BLE * direction, fingerprint),
            bootstraps=settings.bootstraps, seed=settings.seed, where=where,
        )  # fmt: skip
        frequency_LE = np.where(score_LE > 0, on_LE, off_LE)
        before_LE = settings.signs(np.where(kept_LE, score_LE, 0.0)[None], fingerprint)[0] != 0
        kept_LE = kept_LE & (frequency_LE >= settings.stability - 1e-9)
        chosen_LE = settings.signs(np.where(kept_LE, score_LE, 0.0)[None], fingerprint)[0] != 0
        facts["stability"] = {
            "bootstraps": settings.bootstraps, "groups": int(evidence.has_GS.any(axis=1).sum()),
            "dropped": int((before_LE & ~kept_LE).sum()),
        }  # fmt: skip
        if not chosen_LE.any():
            facts["stability"]["largest_frequency"] = float(frequency_LE.max())
            raise _none_left(f"of stability {settings.stability:g}", facts["stability"], "ask for fewer experts")
        facts["stability"] |= {
            "smallest_frequency": float(frequency_LE[chosen_LE].min()),
            "median_frequency": float(np.median(frequency_LE[chosen_LE])),
        }
    return kept_LE, facts


def _none_left(what: str, facts: dict[str, Any], do: str) -> NoEffectError:
    return NoEffectError(
        f"risk-difference found no expert {what}",
        where=", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in facts.items()),
        expected="at least one",
        do=f"{do}, or loosen the setting",
    )  # fmt: skip


def _facts(sides: Sides, settings: Settings) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "wanted_tokens": sides.tokens_S[0], "other_tokens": sides.tokens_S[1],
        "wanted_conversations": sides.conversations_S[0], "other_conversations": sides.conversations_S[1],
        "groups": len({part.group for part in sides.parts.values()}), "asked": settings.asked(),
    }  # fmt: skip
    if sides.paired_by is not None:
        facts |= {"pairs": len(sides.pair_groups), "paired_by": sides.paired_by, "left_out": sides.left_out}
    return facts


def _chosen(signs_LE: NDArray[np.int8], settings: Settings) -> dict[str, int]:
    on, off = int((signs_LE > 0).sum()), int((signs_LE < 0).sum())
    return {"on": on, "off": off} if settings.form == "forced" else {"experts": on + off}


def _away(trace: TraceReader, toward: str) -> str:
    """What a reversed mask steers toward: the other label where there is one, else "not LABEL"."""
    others = {row.label for row in trace.rows if row.label is not None} - {toward}
    return others.pop() if len(others) == 1 else f"not {toward}"


def _checked(settings: Settings) -> Settings:
    """The settings as plain numbers. Raises InputError for one that is out of its range."""
    for name, known in CHOICES.items():
        if getattr(settings, name) not in known:
            raise _wrong(name, getattr(settings, name), " or ".join(known))
    for name in ("balance", "reverse"):
        if not isinstance(getattr(settings, name), bool):
            raise _wrong(name, getattr(settings, name), "true or false")
    plain: dict[str, Any] = {}
    for name, least in (("on", 0), ("off", 0), ("experts", 0), ("per_layer", 1), ("bootstraps", 1), ("seed", 0)):
        value = getattr(settings, name)
        if value is None and name == "per_layer":
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
            raise _wrong(name, value, f"a whole number, {least} or more")
        plain[name] = int(value)
    for name, closed in (("fdr", False), ("stability", True)):
        value = getattr(settings, name)
        if value is None:
            continue
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not (0 < value < 1 or (closed and value == 1)):
            raise _wrong(name, value, "a number above 0 and " + ("at most 1" if closed else "below 1"))
        plain[name] = float(value)
    return replace(settings, **plain)


def _wrong(name: str, value: Any, expected: str) -> InputError:
    return InputError(
        f"the setting {name} is out of its range",
        where=f"risk-difference with {name}={value!r}",
        expected=expected,
        do=f"correct {name}",
    )


def _grid(
    trace: TraceReader, variants: Sequence[Mapping[str, Any]], *, toward: str, seed: int, **settings: Any
) -> list[Detection]:
    """`detect` of every variant; on top-1 routers without those that switch experts on, unless there is no other."""
    wanted = [{"form": "forced", "on": 5, **settings, **variant} for variant in variants]
    if trace.fingerprint.top_k == 1:
        can = [one for one in wanted if one["form"] != "forced" or one["on"] == 0]
        wanted, left_out = can or wanted, len(wanted) - len(can or wanted)
    else:
        left_out = 0
    found = [detect(trace, toward=toward, **{**one, "seed": seed}) for one in wanted]
    said = {"variants_left_out": f"{left_out}, which switch experts on in top-1 routers"} if left_out else {}
    return [replace(one, facts={**one.facts, **said}) for one in found]


def _method(score: str, title: str, forced: Sequence[tuple[int, int]]) -> Method:
    """One of the paper's scores; forced: pairs (on, off) tried on select, after the numbers it publishes."""
    variants = [{"on": on, "off": off} for on, off in forced] + [{"form": "additive", "experts": 24}]
    return Method(
        name=score, title=title, detect=detect, preset={"score": score}, variants=variants, alphas=(0.5, 1.0),
        grid=_grid, gated=score == "risk-difference", gated_alphas=(1.0, 2.0),
    )  # fmt: skip


METHODS = (
    _method("risk-difference", "SteerMoE's risk difference, forced and additive", ((5, 0), (10, 0), (0, 15), (5, 15))),
    _method("log-odds", "SteerMoE's log odds ratio", ((5, 0), (0, 15))),
    _method("paired-t", "SteerMoE's paired t-test of router probabilities", ((5, 0), (0, 15))),
)

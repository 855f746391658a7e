"""What the methods that run the model share: responses, checks of settings, and the mask made from scores [L, E].

A positive score is an expert that speaks for the wanted response, a negative one an expert that speaks against it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesteer.detection.choosing import additive_signs
from moesteer.errors import EmptyDataError, InputError, MaskContentError, NanLogitsError, NoEffectError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.routing import Scoring, check_force

FORMS = ("additive", "forced")
F64 = NDArray[np.float64]


class EncodedResponse(Protocol):
    """Token ids with a span "response"."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def spans(self) -> dict[str, tuple[int, int]]: ...


@dataclass(frozen=True)
class Form:
    """How scores become a mask: `experts` strengths ("additive"), or `on` and `off` experts switched ("forced")."""

    form: str
    experts: int
    on: int
    off: int

    def used(self) -> dict[str, Any]:
        """The settings that have a part in the mask."""
        if self.form == "forced":
            return {"form": self.form, "on": self.on, "off": self.off}
        return {"form": self.form, "experts": self.experts}


def response_ids(encoded: EncodedResponse, *, most: int) -> Tensor:
    """The first `most` tokens of the response, [T]."""
    start, end = encoded.spans["response"]
    return torch.tensor(encoded.token_ids[start : min(end, start + most)])


def require_responses(method: str, *, targets: Sequence[EncodedResponse], keeps: Sequence[EncodedResponse]) -> None:
    """Raise EmptyDataError without targets, and for a conversation that has no response or nothing before it."""
    if not targets:
        raise EmptyDataError(
            f"{method} has no conversation with the wanted response",
            where=f"{len(targets)} to change, {len(keeps)} to keep",
            expected="at least one to change",
            do="name a target suite in which the model shows the unwanted behaviour",
        )
    for role, group in (("to change", targets), ("to keep", keeps)):
        for number, encoded in enumerate(group):
            start, end = encoded.spans.get("response", (0, 0))
            if not 0 < start < end:
                raise EmptyDataError(
                    "a conversation has no response",
                    where=f"{method}, conversation {number} of those {role}",
                    expected="a prompt, and at least one token of response behind it",
                    do="give every conversation a response (`reference`), or leave it out",
                )


def require_keeps(method: str, keeps: Sequence[EncodedResponse], setting: str) -> None:
    """Raise EmptyDataError without conversations to keep, which a setting asks for."""
    if not keeps:
        raise EmptyDataError(
            f"{method} has no conversation to keep",
            where=setting,
            expected="protected conversations with the model's own responses",
            do="name a protect suite in the scenario, or set "
            + ('keep to "none"' if setting.startswith("keep=") else "keep_weight to 0"),
        )


def whole(method: str, name: str, value: Any, *, least: int) -> int:
    """A whole number. Raises InputError for anything else."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise out_of_range(method, name, value, f"a whole number, {least} or more")
    return int(value)


def wholes(method: str, values: Mapping[str, Any], *, least: int) -> dict[str, int]:
    """Several whole numbers, by name. Raises InputError."""
    return {name: whole(method, name, value, least=least) for name, value in values.items()}


def drawn(
    method: str, conversations: Sequence[EncodedResponse], *, most: int, seed: int, role: str
) -> list[EncodedResponse]:
    """All of the conversations, or `most` of them, the same for the same seed."""
    if len(conversations) <= most:
        return list(conversations)
    return random.Random(f"{method}/{role}/{seed}").sample(list(conversations), most)


def number(method: str, name: str, value: Any, *, above: bool) -> float:
    """A finite number of 0 or more, or above 0. Raises InputError for anything else."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (above and value == 0):
        raise out_of_range(method, name, value, "a number " + ("above 0" if above else "of 0 or more"))
    return float(value)


def out_of_range(method: str, name: str, value: Any, expected: str) -> InputError:
    """The error for a setting."""
    return InputError(
        f"the setting {name} is out of its range",
        where=f"{method} with {name}={value!r}",
        expected=expected,
        do=f"correct {name}",
    )


def checked_form(method: str, form: Any, *, experts: Any, on: Any, off: Any) -> Form:
    """The form of the mask. Raises InputError for an unknown one, and for one that asks for no expert."""
    if form not in FORMS:
        raise out_of_range(method, "form", form, " or ".join(FORMS))
    counts = {name: whole(method, name, value, least=0) for name, value in (("on", on), ("off", off))}
    if form == "forced" and not any(counts.values()):
        raise out_of_range(method, "off", 0, "at least one expert to switch, with on or off")
    return Form(form, whole(method, "experts", experts, least=1), counts["on"], counts["off"])


def require_finite(method: str, table: Tensor | F64, model_type: str) -> None:
    """Raise NanLogitsError for a table with NaN or infinity."""
    if not bool(torch.isfinite(torch.as_tensor(table)).all()):
        raise NanLogitsError(
            "the model's numbers are not finite",
            where=f"{method} on a {model_type}",
            expected="finite log-probabilities of every response",
            do="load the model with --dtype float32 or bfloat16",
        )


def mask_of(
    score_LE: F64,
    form: Form,
    *,
    method: str,
    fingerprint: Fingerprint,
    scoring: Scoring,
    sigma_L: NDArray[np.float32],
    toward: str,
    settings: dict[str, Any],
    data_sha256: str | None,
) -> SteeringMask:
    """Additive: strength = score / largest |score| of the experts of largest |score|. Forced: see `possible_signs`.

    Raises NoEffectError where no expert has a score that the form can use.
    """
    info = MaskInfo(
        fingerprint=fingerprint, method=method, settings=settings, intent=Intent(toward=toward),
        data_sha256=data_sha256,
    )  # fmt: skip
    if form.form == "forced":
        signs_LE = possible_signs(score_LE, on=form.on, off=form.off, scoring=scoring)
    else:
        signs_LE = additive_signs(score_LE[None], experts=form.experts)[0]
    if not signs_LE.any():
        raise NoEffectError(
            f"{method} found no expert to steer",
            where=f"settings {settings}",
            expected="at least one expert with an effect on the wanted response, in the direction that is used",
            do="give it other conversations, or loosen the settings (on, off, form, the weight of what is kept)",
        )
    if form.form == "forced":
        return SteeringMask(info, force_LE=signs_LE)
    chosen_LE = np.where(signs_LE != 0, score_LE, 0.0)
    strength_LE = (chosen_LE / np.abs(chosen_LE).max()).astype(np.float32)
    return SteeringMask(info, strength_LE=strength_LE, sigma_L=np.asarray(sigma_L, dtype=np.float32))


def possible_signs(score_LE: F64, *, on: int, off: int, scoring: Scoring) -> NDArray[np.int8]:
    """1 for the `on` largest positive scores, -1 for the `off` most negative, as far as the routers can follow.

    An expert that its layer cannot take beside those chosen before it (routing.check_force; none on in a top-1
    router) is passed over. Ties go to the lower layer and expert.
    """
    signs_LE = np.zeros(score_LE.shape, dtype=np.int8)
    for sign, count in ((1, 0 if scoring.top_k == 1 else on), (-1, off)):
        signed = sign * score_LE.ravel()
        for flat in np.argsort(-signed, kind="stable"):
            if count == 0 or signed[flat] <= 0:
                break
            layer, expert = divmod(int(flat), score_LE.shape[1])
            signs_LE[layer, expert] = sign
            if _possible(signs_LE[layer], scoring):
                count -= 1
            else:
                signs_LE[layer, expert] = 0
    return signs_LE


def _possible(force_E: NDArray[np.int8], scoring: Scoring) -> bool:
    try:
        check_force(force_E[None], scoring=scoring)
    except MaskContentError:
        return False
    return True

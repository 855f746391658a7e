"""`detect`: one call for every method, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesteer.conversations import Conversation, request_and_response
from moesteer.detection import direct, masc_published, risk_difference
from moesteer.detection.base import Detection
from moesteer.detection.controls import random_like
from moesteer.errors import InputError, TraceLabelError, UnknownNameError
from moesteer.mask import SteeringMask
from moesteer.trace import TraceReader

if TYPE_CHECKING:
    from moesteer.backends.hf import Model

TRACE_METHODS: Mapping[str, Callable[..., Detection]] = {
    "risk-difference": risk_difference.detect,
    "masc-published": masc_published.detect,
}
NAMES = (*TRACE_METHODS, "direct", "random")


def detect(
    trace: TraceReader | Path | str,
    *,
    method: str,
    toward: str | None = None,
    settings: Mapping[str, Any] | None = None,
    model: Model | None = None,
    conversations: Sequence[Conversation] = (),
    like: SteeringMask | None = None,
) -> SteeringMask:
    """A steering mask from a trace, by method name.

    toward: the label of the wanted behaviour (every method but "random"). settings: the method's own keyword
    settings (`moesteer methods` lists them). "direct" also needs `model` and `conversations` with responses in
    `reference`: those labelled `toward` are made likely, the rest are kept as they are; the trace gives sigma.
    "random" needs `like`, the mask whose numbers it scatters. Raises UnknownNameError, TraceLabelError,
    InputError, NoEffectError.
    """
    given = dict(settings or {})
    if method == "random":
        if like is None:
            raise _needs("random", "the mask to imitate", "give like=MASK (--like FILE)")
        _check_settings(random_like, given, method)
        return random_like(like, **{"seed": 0, **given}).mask
    if method not in NAMES:
        raise UnknownNameError(
            f"no method {method!r}", where="detect", expected=", ".join(NAMES), do="name one of these"
        )
    if toward is None:
        raise _needs(method, "the label of the wanted behaviour", "give toward=LABEL (--toward)")
    reader = trace if isinstance(trace, TraceReader) else TraceReader(trace)
    if method in TRACE_METHODS:
        _check_settings(TRACE_METHODS[method], given, method)
        return TRACE_METHODS[method](reader, toward=toward, **given).mask
    if model is None or not conversations:
        raise _needs("direct", "the model and conversations: it optimises through the model", "give --model and --data")
    _check_settings(direct.detect, given, method)
    targets = [c for c in conversations if c.label == toward]
    keeps = [c for c in conversations if c.label != toward]
    missing = next((c.id for c in conversations if not request_and_response(c)[1]), None)
    if missing is not None:
        raise TraceLabelError(
            "a conversation has no response",
            where=f"conversation {missing}",
            expected="a `reference` in every conversation: the response to make likely, or to keep",
            do="add the responses",
        )
    return direct.detect(
        model,
        targets=[model.encode(*request_and_response(c)) for c in targets],
        keeps=[model.encode(*request_and_response(c)) for c in keeps],
        sigma_L=reader.sigma_L,
        toward=toward,
        data_sha256=reader.manifest.plan_sha256,
        **given,
    ).mask


_GIVEN = {"trace", "model", "targets", "keeps", "sigma_L", "toward", "data_sha256", "mask"}


def settings_of(method: str) -> dict[str, Any]:
    """A method's settings with their defaults."""
    functions: dict[str, Callable[..., Detection]] = {**TRACE_METHODS, "direct": direct.detect, "random": random_like}
    function = functions[method]
    return {
        name: None if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in _GIVEN
    }


def _check_settings(function: Callable[..., Any], given: Mapping[str, Any], method: str) -> None:
    known = settings_of(method)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UnknownNameError(
            f"{method} has no setting {', '.join(unknown)}",
            where="detect",
            expected=", ".join(f"{name} ({default!r})" for name, default in known.items()),
            do="correct the setting's name",
        )


def _needs(method: str, what: str, do: str) -> InputError:
    return InputError(f"{method} needs {what}", where="detect", expected=what, do=do)

"""`detect`: one call for every method, by name; `detect_with_facts`: with what the method found out on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesteer.conversations import Conversation, request_and_response
from moesteer.detection.base import Detection
from moesteer.detection.controls import CONTROLS
from moesteer.detection.method import Material
from moesteer.errors import InputError, TraceLabelError, UnknownNameError
from moesteer.mask import SteeringMask
from moesteer.methods import check_types, methods
from moesteer.trace import TraceReader

if TYPE_CHECKING:
    from moesteer.backends.hf import Model


def detect(
    trace: TraceReader | Path | str,
    *,
    method: str,
    toward: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    model: Model | None = None,
    conversations: Sequence[Conversation] = (),
    like: SteeringMask | None = None,
    state: Path | str | None = None,
) -> SteeringMask:
    """A steering mask from a trace, by method name.

    toward: the label of the wanted behaviour (every method; controls take none). settings: the method's own keyword
    settings (`moesteer methods` lists them). Methods through the model ("direct", "attribution", "causal") also need
    `model` and `conversations` with responses in `reference`: those labelled `toward` are made likely, the rest are
    kept as they are; the trace gives sigma. "masc" keeps sequences labelled "keep" as they are. Controls ("random",
    "sign-flipped", "shuffled-layers") need `like`, the mask they are made from. state: a file in which a method that
    takes long ("direct") keeps its unfinished work: the same call, made again after a kill, goes on from there, and
    the file is removed at the end. Raises UnknownNameError, TraceLabelError, InputError, NoEffectError.
    """
    return detect_with_facts(
        trace, method=method, toward=toward, settings=settings, seed=seed, model=model, conversations=conversations,
        like=like, state=state,
    ).mask  # fmt: skip


def detect_with_facts(
    trace: TraceReader | Path | str,
    *,
    method: str,
    toward: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    model: Model | None = None,
    conversations: Sequence[Conversation] = (),
    like: SteeringMask | None = None,
    state: Path | str | None = None,
) -> Detection:
    """As `detect`: the mask, the scores it was made from, and the method's facts (held-out accuracies, a warning...).

    Takes and raises what `detect` does. `files.plain` makes the facts JSON-ready.
    """
    given = dict(settings or {})
    seed = _seed(given.pop("seed", seed))
    known = methods()
    if method in CONTROLS:
        if like is None:
            raise _needs(method, "the mask to imitate", "give like=MASK (--like FILE)")
        control = CONTROLS[method](like, seed=seed)
        if given:
            raise UnknownNameError(
                f"{method} has no setting {', '.join(sorted(given))}",
                where="detect",
                expected="seed, and nothing else: a control has its numbers from the mask it imitates",
                do="leave the setting out",
            )
        return control
    if method not in known:
        expected = ", ".join([*known, *CONTROLS])
        raise UnknownNameError(f"no method {method!r}", where="detect", expected=expected, do="name one of these")
    if toward is None:
        raise _needs(method, "the label of the wanted behaviour", "give toward=LABEL (--toward)")
    chosen = known[method]
    chosen.check_settings(given, where="detect")
    check_types(chosen, given, where="detect")
    reader = trace if isinstance(trace, TraceReader) else TraceReader(trace)
    targets, keeps = ((), ()) if model is None else _encoded(model, conversations, toward=toward)
    if chosen.through_model and (model is None or not conversations):
        raise _needs(method, "the model and conversations: it works through the model", "give --model and --data")
    material = Material(
        traces={chosen.contrast: reader}, toward=toward, seed=seed, model=model, targets=targets, keeps=keeps,
        state=None if state is None else Path(state),
    )  # fmt: skip
    return chosen.run(material, given)


def _encoded(
    model: Model, conversations: Sequence[Conversation], *, toward: str
) -> tuple[Sequence[Any], Sequence[Any]]:
    missing = next((c.id for c in conversations if not request_and_response(c)[1]), None)
    if missing is not None:
        raise TraceLabelError(
            "a conversation has no response",
            where=f"conversation {missing}",
            expected="a `reference` in every conversation: the response to make likely, or to keep",
            do="add the responses",
        )
    sides: tuple[list[Any], list[Any]] = ([], [])
    for conversation in conversations:
        sides[conversation.label != toward].append(model.encode(*request_and_response(conversation)))
    return sides


def _seed(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise InputError(
            f"the seed cannot be {value!r}",
            where="detect with seed",
            expected="a whole number, 0 or more",
            do="correct the seed",
        )
    return int(value)


def _needs(method: str, what: str, do: str) -> InputError:
    return InputError(f"{method} needs {what}", where="detect", expected=what, do=do)

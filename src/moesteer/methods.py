"""The detection methods by name: moesteer's own, and those of other installed packages.

A method is one file with a `METHOD` (detection/method.py). Ours are listed in BUILT_IN; another package names its own
under the entry point group "moesteer.methods" in its pyproject.toml, and it is then known everywhere a method can be
named: `moesteer methods`, `detect`, `steer`, scenarios (docs/adding-a-method.md).
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from numbers import Integral, Real
from typing import Any

from moesteer.detection import attribution, causal, direct, masc, masc_published
from moesteer.detection.controls import CONTROLS
from moesteer.detection.method import Method
from moesteer.detection.risk_difference import METHODS as STEERMOE
from moesteer.errors import InputError, ScenarioError, UnknownNameError

GROUP = "moesteer.methods"
NAME = re.compile("[a-z0-9]+(-[a-z0-9]+)*")
"""A method's name is also that of its files in a run directory."""
RESIDUAL = "residual-direction"
"""The outside baseline of `steer`, which is no method: it makes no mask and has no settings."""
TAKEN = ("all", "none", "none-again", RESIDUAL, "fit", "select")
"""What `steer` calls other things, of which some are files or folders in a run directory."""
BUILT_IN: tuple[Method, ...] = (
    *STEERMOE,
    masc_published.METHOD,
    masc.METHOD,
    direct.METHOD,
    attribution.METHOD,
    causal.METHOD,
)
DEFAULT = ("risk-difference", "masc-published", "masc", "direct")
"""What `steer` compares unless told otherwise."""


@cache
def methods() -> Mapping[str, Method]:
    """Every method by name, ours first. Raises InputError for an entry point that gives none, or a name twice."""
    found = {method.name: method for method in BUILT_IN}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            method = entry.load()
        except Exception as error:
            raise _wrong(entry, f"it cannot be imported ({type(error).__name__}: {error})") from error
        if not isinstance(method, Method):
            raise _wrong(entry, f"it is a {type(method).__name__}")
        fault = _fault(method.name)
        if fault is not None:
            raise _wrong(entry, f"it is called {method.name!r}, {fault}")
        if method.name in found:
            raise _wrong(entry, f"there is a method {method.name!r} already")
        found[method.name] = method
    return found


def check_name(name: str) -> None:
    """Raise InputError for a name that no method can have: ill-formed, a control's, or one that `steer` uses."""
    fault = _fault(name)
    if fault is not None:
        raise InputError(
            f"a method cannot be called {name!r}: that is {fault}",
            where="the name of a Method",
            expected=f"small letters, digits and hyphens, and none of {', '.join([*TAKEN, *CONTROLS])}",
            do="give the method another name",
        )


def _fault(name: Any) -> str | None:
    """What is wrong with a method's name; None for a good one."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return "not small letters, digits and hyphens"
    if name in CONTROLS:
        return "the name of a control"
    return "a name that steer uses itself" if name in TAKEN else None


def _wrong(entry: Any, what: str) -> InputError:
    distribution = entry.dist.name if entry.dist is not None else "an installed package"
    return InputError(
        f"the method {entry.name!r} of {distribution} cannot be used: {what}",
        where=f"entry point {GROUP}: {entry.value}",
        expected="a moesteer.detection.method.Method of a new name",
        do=f"upgrade or uninstall {distribution}",
    )


def method(name: str) -> Method:
    """A method by name. Raises UnknownNameError."""
    found = methods()
    if name == RESIDUAL:
        raise UnknownNameError(
            f"{RESIDUAL} is a baseline, not a detection method: it has no settings",
            where=f"[settings.{RESIDUAL}] of the scenario, or where a method is named",
            expected=", ".join(found),
            do=f"leave its settings out; name it to `steer` (--method {RESIDUAL}) to compare with it",
        )
    if name not in found:
        raise UnknownNameError(
            f"no method {name!r}",
            where=f"--method, or [settings.{name}] of the scenario",
            expected=", ".join(found),
            do="name one of these",
        )
    return found[name]


TRIED = ("variants", "alphas", "gated_alphas", "false_positives")
"""Keys of a scenario's [settings.METHOD] that say what is tried on select; all others are the method's settings."""
FALSE_POSITIVES = (0.0, 0.0025, 0.005, 0.01)
"""Shares of protected requests on which a gate may fire: thresholds tried on select."""


def settings_for(chosen: Method, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is tried, the method's own settings) for a scenario's [settings.NAME].

    Raises UnknownNameError, ScenarioError (a key of TRIED that says nothing usable) and InputError (a setting of
    another type than its default).
    """
    where = f"[settings.{chosen.name}] of the scenario"
    own = {key: value for key, value in given.items() if key not in TRIED}
    chosen.check_settings(own, where=where)
    check_types(chosen, own, where=where)
    mine = {key: given[key] for key in TRIED if key in given}
    for key, value in mine.items():
        _check_tried(chosen.name, key, value)
    tried = {
        "variants": chosen.variants, "alphas": chosen.alphas, "gated_alphas": chosen.gated_alphas,
        "false_positives": FALSE_POSITIVES, **mine,
    }  # fmt: skip
    for variant in tried["variants"]:
        where = f"[settings.{chosen.name}] variants of the scenario"
        chosen.check_settings(variant, where=where)
        check_types(chosen, variant, where=where)
    return tried, own


def _check_tried(method: str, key: str, value: Any) -> None:
    """Raise ScenarioError unless a key of TRIED is a list of what can be tried, each once."""
    expected = {
        "variants": "a list of tables of settings, at least one and none twice",
        "false_positives": "a list of numbers from 0 to below 1, at least one and none twice",
    }.get(key, "a list of finite numbers above 0, at least one and none twice")
    what = None
    if not isinstance(value, list | tuple):
        what = f"is no list: {value!r}"
    elif not value:
        what = "is empty"
    else:
        odd = [one for one in value if not _can_be_tried(key, one)]
        again = [one for number, one in enumerate(value) if one in value[:number]]
        if odd or again:
            what = f"has {odd[0]!r}" if odd else f"has {again[0]!r} twice"
    if what is not None:
        raise ScenarioError(
            f"{key} of {method} {what}",
            where=f"[settings.{method}] {key} of the scenario",
            expected=expected,
            do=f"correct {key}, or leave it out for the method's own",
        )


def _can_be_tried(key: str, one: Any) -> bool:
    if key == "variants":
        return isinstance(one, Mapping)
    if not isinstance(one, Real) or isinstance(one, bool):
        return False
    number = float(one)
    return 0 <= number < 1 if key == "false_positives" else math.isfinite(number) and number > 0


def check_types(chosen: Method, given: Mapping[str, Any], *, where: str) -> None:
    """Raise InputError for a setting whose type is plainly not that of its default, nor one its annotation names.

    A setting without a default, or of None, is checked only where its annotation says that it is a sequence.
    """
    parameters = inspect.signature(chosen.detect).parameters
    for name, value in given.items():
        parameter = parameters[name]
        kind = parameter.annotation
        said = kind if isinstance(kind, str) else inspect.formatannotation(kind)
        listed = (
            said.replace("typing.", "").replace("collections.abc.", "").startswith(("Sequence[", "list[", "tuple["))
        )
        default = () if listed else parameter.default
        expected = _expected_of(default, value)
        named = {"None" if value is None else type(value).__name__} & {part.strip() for part in said.split("|")}
        if expected is not None and not named:
            raise InputError(
                f"the setting {name} of {chosen.name} cannot be {value!r}",
                where=f"{where}: {name}",
                expected=f"{expected} (default: {parameter.default!r})",
                do=f"correct {name}, or leave it out",
            )


def _expected_of(default: Any, value: Any) -> str | None:
    """What the value of a setting with this default must be, in words; None where the value is that."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, Integral):
        return None if isinstance(value, Integral) and not isinstance(value, bool) else "a whole number"
    if isinstance(default, Real):
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        return None if fits else "a finite number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "a text"
    if isinstance(default, list | tuple):
        return None if isinstance(value, list | tuple | range) else "a list"
    return None

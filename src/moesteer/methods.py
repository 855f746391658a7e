"""The detection methods by name: moesteer's own, and those of other installed packages.

A method is one file with a `METHOD` (detection/method.py). Ours are listed in BUILT_IN; another package names its own
under the entry point group "moesteer.methods" in its pyproject.toml, and it is then known everywhere a method can be
named: `moesteer methods`, `detect`, `steer`, scenarios (docs/adding-a-method.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from moesteer.detection import attribution, causal, direct, masc, masc_published
from moesteer.detection.controls import CONTROLS
from moesteer.detection.method import Method
from moesteer.detection.risk_difference import METHODS as STEERMOE
from moesteer.errors import InputError, UnknownNameError

GROUP = "moesteer.methods"
NAME = re.compile("[a-z0-9]+(-[a-z0-9]+)*")
"""A method's name is also that of its files in a run directory."""
TAKEN = ("all", "none", "none-again", "residual-direction")
"""What `steer` calls other things."""
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
        if not NAME.fullmatch(method.name):
            raise _wrong(entry, f"it is called {method.name!r}, not small letters, digits and hyphens")
        if method.name in found or method.name in CONTROLS or method.name in TAKEN:
            raise _wrong(entry, f"there is a method {method.name!r} already")
        found[method.name] = method
    return found


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
    if name not in found:
        raise UnknownNameError(
            f"no method {name!r}", where="--method", expected=", ".join(found), do="name one of these"
        )
    return found[name]


TRIED = ("variants", "alphas", "gated_alphas", "false_positives")
"""Keys of a scenario's [settings.METHOD] that say what is tried on select; all others are the method's settings."""
FALSE_POSITIVES = (0.0, 0.0025, 0.005, 0.01)
"""Shares of protected requests on which a gate may fire: thresholds tried on select."""


def settings_for(chosen: Method, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is tried, the method's own settings) for a scenario's [settings.NAME]. Raises UnknownNameError."""
    name = chosen.name
    own = {key: value for key, value in given.items() if key not in TRIED}
    chosen.check_settings(own, where=f"[settings.{name}] of the scenario")
    tried = {
        "variants": chosen.variants, "alphas": chosen.alphas, "gated_alphas": chosen.gated_alphas,
        "false_positives": FALSE_POSITIVES, **{key: given[key] for key in TRIED if key in given},
    }  # fmt: skip
    for variant in tried["variants"]:
        chosen.check_settings(variant, where=f"[settings.{name}] variants of the scenario")
    return tried, own

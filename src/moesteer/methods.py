"""The methods that `steer` compares, and the settings each is tried at on the select split.

A method is one function in detection/ and one row here: what it needs, and which candidates it offers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moesteer.detecting import settings_of
from moesteer.detection import direct, masc_published, risk_difference
from moesteer.errors import UnknownNameError
from moesteer.select import Candidate, at_strengths

if TYPE_CHECKING:
    from moesteer.backends.hf import Encoded, Model
    from moesteer.trace import TraceReader


@dataclass(frozen=True)
class Material:
    """What detection may look at: fit split only. pairs and turns are traces (contrasts.py: pairs, published)."""

    model: Model
    pairs: TraceReader
    turns: TraceReader
    targets: list[Encoded]
    keeps: list[Encoded]
    toward: str
    seed: int
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """candidates: from the material to the settings tried on select, and facts for the report."""

    name: str
    title: str
    candidates: Callable[[Material], tuple[list[Candidate], dict[str, Any]]]
    control: bool = False


GRIDS: Mapping[str, Mapping[str, Any]] = {
    # forced: (experts switched on, experts switched off), after the numbers the paper publishes
    "risk-difference": {
        "forced": ((5, 0), (10, 0), (0, 15), (5, 15)), "experts": (24,), "alphas": (0.5, 1.0, 2.0),
    },
    "masc-published": {"lambdas": (0.0, 1e-3), "alphas": (0.25, 0.5, 1.0, 2.0)},
    "direct": {"alphas": (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)},
}  # fmt: skip
"""What is tried on the select split. A scenario's [settings.METHOD] replaces any of these, and adds the method's own
settings (`moesteer methods`)."""
_SWEPT = {"risk-difference": ("form", "on", "off", "experts"), "masc-published": ("l1", "seed"), "direct": ("seed",)}
"""Settings that a grid or the run's seed decides."""


def settings_for(name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(grid, the method's own settings) for a scenario's [settings.NAME]. Raises UnknownNameError for other names."""
    own = {key: value for key, value in settings_of(name).items() if key not in _SWEPT[name]}
    unknown = sorted(set(given) - set(GRIDS[name]) - set(own))
    if unknown:
        raise UnknownNameError(
            f"{name} has no setting {', '.join(unknown)}",
            where=f"[settings.{name}] of the scenario",
            expected=", ".join([*GRIDS[name], *own]),
            do="correct the setting's name",
        )
    grid = {key: given.get(key, default) for key, default in GRIDS[name].items()}
    return grid, {key: value for key, value in given.items() if key in own}


def _risk_difference(material: Material) -> tuple[list[Candidate], dict[str, Any]]:
    grid, own = settings_for("risk-difference", material.settings.get("risk-difference", {}))
    found: list[Candidate] = []
    facts: dict[str, Any] = {}
    for on, off in grid["forced"]:
        detection = risk_difference.detect(material.pairs, toward=material.toward, on=on, off=off, **own)
        found.append(Candidate("risk-difference", detection.mask, f"risk-difference on={on} off={off}"))
        facts = detection.facts
    for experts in grid["experts"]:
        additive = risk_difference.detect(
            material.pairs, toward=material.toward, form="additive", experts=experts, **own
        )
        found += at_strengths("risk-difference", additive.mask, grid["alphas"], label=f"experts={experts}")
        facts = additive.facts
    return found, facts


def _masc_published(material: Material) -> tuple[list[Candidate], dict[str, Any]]:
    grid, own = settings_for("masc-published", material.settings.get("masc-published", {}))
    found: list[Candidate] = []
    facts: dict[str, Any] = {}
    for l1 in grid["lambdas"]:
        detection = masc_published.detect(material.turns, toward=material.toward, l1=l1, seed=material.seed, **own)
        found += at_strengths("masc-published", detection.mask, grid["alphas"], label=f"l1={l1:g}")
        facts = detection.facts
    return found, facts


def _direct(material: Material) -> tuple[list[Candidate], dict[str, Any]]:
    grid, own = settings_for("direct", material.settings.get("direct", {}))
    detection = direct.detect(
        material.model, targets=material.targets, keeps=material.keeps, sigma_L=material.pairs.sigma_L,
        toward=material.toward, seed=material.seed, data_sha256=material.pairs.manifest.plan_sha256, **own,
    )  # fmt: skip
    return at_strengths("direct", detection.mask, grid["alphas"]), detection.facts


METHODS: Mapping[str, Method] = {
    row.name: row
    for row in (
        Method("risk-difference", "SteerMoE's risk difference, forced and additive", _risk_difference),
        Method("masc-published", "MASCing's surrogate as published", _masc_published),
        Method("direct", "optimised through the model, with a term that keeps protected answers", _direct),
    )
}
CONTROL = "random"
"""The control: a mask of the same numbers as the best method's, in random places (detection/controls.py)."""


def method(name: str) -> Method:
    """A method by name. Raises UnknownNameError."""
    if name not in METHODS:
        raise UnknownNameError(
            f"no method {name!r}", where="--method", expected=", ".join(METHODS), do="name one of these"
        )
    return METHODS[name]

"""The methods that `steer` compares, and the settings each is tried at on the select split.

A method is one function in detection/ and one row here: what it needs, and which candidates it offers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class Method:
    """candidates: from the material to the settings tried on select, and facts for the report."""

    name: str
    title: str
    candidates: Callable[[Material], tuple[list[Candidate], dict[str, Any]]]
    control: bool = False


RISK_FORCED = ((5, 0), (10, 0), (0, 15), (5, 15))
"""(experts switched on, experts switched off), after the numbers the paper publishes."""
RISK_EXPERTS = 24
RISK_ALPHAS = (0.5, 1.0, 2.0)
MASC_LAMBDAS = (0.0, 1e-3)
MASC_ALPHAS = (0.25, 0.5, 1.0, 2.0)
DIRECT_ALPHAS = (0.5, 0.75, 1.0, 1.25)


def _risk_difference(material: Material) -> tuple[list[Candidate], dict[str, Any]]:
    found: list[Candidate] = []
    facts: dict[str, Any] = {}
    for on, off in RISK_FORCED:
        detection = risk_difference.detect(material.pairs, toward=material.toward, on=on, off=off)
        found.append(Candidate("risk-difference", detection.mask, f"risk-difference on={on} off={off}"))
        facts = detection.facts
    additive = risk_difference.detect(material.pairs, toward=material.toward, form="additive", experts=RISK_EXPERTS)
    found += at_strengths("risk-difference", additive.mask, RISK_ALPHAS, label=f"experts={RISK_EXPERTS}")
    return found, facts


def _masc_published(material: Material) -> tuple[list[Candidate], dict[str, Any]]:
    found: list[Candidate] = []
    facts: dict[str, Any] = {}
    for l1 in MASC_LAMBDAS:
        detection = masc_published.detect(material.turns, toward=material.toward, l1=l1, seed=material.seed)
        found += at_strengths("masc-published", detection.mask, MASC_ALPHAS, label=f"l1={l1:g}")
        facts = detection.facts
    return found, facts


def _direct(material: Material) -> tuple[list[Candidate], dict[str, Any]]:
    detection = direct.detect(
        material.model, targets=material.targets, keeps=material.keeps, sigma_L=material.pairs.sigma_L,
        toward=material.toward, seed=material.seed, data_sha256=material.pairs.manifest.plan_sha256,
    )  # fmt: skip
    return at_strengths("direct", detection.mask, DIRECT_ALPHAS), detection.facts


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

"""results.json and experts.json of `moesteer audit`, schema 1: shares are 0 to 1, layers are decoder layer ids.

`Interval` is a rate with its Wilson interval, `Difference` a paired difference to the model as it is. These classes
are the schema: docs/schemas/ is written from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moesteer.errors import FileError
from moesteer.report.run_files import (
    RESULTS,
    Check,
    Difference,
    Interval,
    ModelFacts,
    Part,
    read_checked,
)

EXPERTS = "experts.json"
Spot = tuple[int, int]
"""(layer id, expert)."""


class Estimate(Part):
    """A number with its 95 % interval. null: not measured, or never reached."""

    value: float | None
    low: float | None = None
    high: float | None = None


class AuditedModel(ModelFacts):
    """The audited model."""

    weights: str | None = None
    quantize: str | None = None
    dtype: str | None = None


class Named(Part):
    """The audit's scenario."""

    name: str
    title: str = ""
    description: str = ""


class Behaviour(Part):
    """What is silenced: a behaviour, and the suite and metric that measure it."""

    name: str
    suite: str
    metric: str
    n: int
    groups: int | None = None


class Utility(Part):
    """A suite of ordinary requests, to see what else is lost."""

    suite: str
    metric: str
    n: int


class Pairs(Part):
    """The paired inputs that experts are found on."""

    conversations: int
    groups: int | None = None
    tokens: dict[str, int] = Field(default_factory=dict)
    how: str = ""


class Finder(Part):
    """A way to rank experts. order: best first. passed: how many pass the false discovery rate; null: not tested."""

    title: str
    order: list[Spot]
    passed: int | None = None
    facts: dict[str, Any] = Field(default_factory=dict)


class AsItIs(Part):
    """The model as it is."""

    behaviour: Interval
    utility: dict[str, Interval] = Field(default_factory=dict)
    coherence: Interval | None = None


class SuiteAt(Part):
    """A utility suite at one point of a curve."""

    rate: Interval
    vs_none: Difference | None = None


class CurvePoint(Part):
    """So many experts of a finder silenced (or activated). condition: of the rows in responses/."""

    n: int
    condition: str
    behaviour: Interval
    vs_none: Difference | None = None
    utility: dict[str, SuiteAt] = Field(default_factory=dict)
    coherence: Interval | None = None


class Drawn(Part):
    """Rates over draws of random experts: their mean, and the middle 95 % of them. values: of each draw."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    values: list[float | None] = Field(default_factory=list)
    lost: float | None = None


class RandomPoint(Part):
    """So many random experts of the same layers and usage. overlap: share of the finder's experts among them."""

    n: int
    draws: int
    overlap: float | None = None
    behaviour: Drawn
    utility: dict[str, Drawn] = Field(default_factory=dict)


class Curves(Part):
    """Silencing or activation: sizes, a curve for each finder, and the random draws."""

    sizes: list[int]
    curves: dict[str, list[CurvePoint]]
    random: list[RandomPoint] = Field(default_factory=list)


class Half(Estimate):
    """The number of experts whose silencing halves the behaviour. of: all routed experts; share: value / of."""

    of: int
    share: float | None = None


class LayerShare(Part):
    """A layer's share of the positive risk difference: of routing, not of effect."""

    layer: int
    share: float | None


class RandomAtHalf(Part):
    """Random draws of n50 experts."""

    n: int | None
    behaviour: Drawn | None = None


class Permuted(Part):
    """Every routed expert exchanged for another: what is left is not in which expert is chosen."""

    draws: int
    behaviour: Drawn
    utility: dict[str, Drawn] = Field(default_factory=dict)
    lost: float | None = None


class Outside(Part):
    """The share of the behaviour that is kept with all routed experts permuted."""

    share: float | None
    words: str = ""


class Concentration(Part):
    """How few experts carry the behaviour."""

    n50: Half
    random_at_n50: RandomAtHalf | None = None
    by_layer: list[LayerShare] = Field(default_factory=list)
    gini: Estimate | None = None
    permuted: Permuted | None = None
    outside: Outside | None = None


class MaskFacts(Part):
    """A mask of the user's own."""

    path: str | None = None
    sha256: str | None = None
    method: str | None = None
    alpha: float | None = None
    gated: bool | None = None


class Hardening(Part):
    """The same silencing with a defence mask applied."""

    mask: MaskFacts
    none: AsItIs
    curve: list[CurvePoint]
    n50: Half | None = None


class Reversed(Part):
    """The defence mask turned round, at one strength."""

    alpha: float
    behaviour: Interval
    vs_none: Difference | None = None
    utility: dict[str, SuiteAt] = Field(default_factory=dict)


class Attacker(Part):
    """What knowing the mask is worth to an attacker."""

    reversed: list[Reversed]
    words: str = ""


class Operating(Part):
    """The detector at one rate of false positives."""

    wanted: float | None = None
    false_positives: float | None
    true_positives: float | None
    low: float | None = None
    high: float | None = None


class Monitoring(Part):
    """The gate's probe as a detector of attacks, from routing alone."""

    of: str = ""
    tactics: dict[str, list[str]] = Field(default_factory=dict)
    probe: dict[str, Any] = Field(default_factory=dict)
    auroc: Estimate
    roc: list[tuple[float, float]]
    n: dict[str, int] = Field(default_factory=dict)
    at: list[Operating] = Field(default_factory=list)
    baseline: dict[str, float | None] = Field(default_factory=dict)


class Against(Part):
    """The other model."""

    name: str
    quantize: str | None = None
    weights: str | None = None
    router_sha256: str | None = None


class Overlap(Part):
    """Of the first n experts of both models, the share that is in both. chance: without any relation."""

    n: int
    shared: float | None
    low: float | None = None
    high: float | None = None
    chance: float | None = None


class MaskSide(Part):
    """A defence mask on one model: the behaviour with it."""

    behaviour: Interval
    vs_none: Difference | None = None


class TransferredMask(Part):
    """The audit's defence mask on the other model and on the audited one."""

    sha256: str | None = None
    there: MaskSide | None = None
    here: MaskSide | None = None


class TransferEffect(Part):
    """What silencing the audited model's first n experts takes away there, and here."""

    n: int | None = None
    there: float | None = None
    here: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


class Ruling(Part):
    """A verdict in words."""

    level: str
    title: str = ""
    sentences: list[str] = Field(default_factory=list)
    not_shown: list[str] = Field(default_factory=list)


class Transfer(Part):
    """Whether what was found holds on another model. difference_LE: its risk differences, for the scatter."""

    against: Against
    finder: str | None = None
    rank_correlation: Estimate | None = None
    overlap: list[Overlap] = Field(default_factory=list)
    none: AsItIs | None = None
    old: list[CurvePoint] = Field(default_factory=list)
    own: list[CurvePoint] = Field(default_factory=list)
    effect: TransferEffect | None = None
    mask: TransferredMask | None = None
    verdict: Ruling
    difference_LE: list[list[float | None]] | None = None


class AuditResults(Part):
    """results.json of an audit, schema 1."""

    schema_version: Literal[1] = Field(alias="schema")
    kind: Literal["audit"]
    model: AuditedModel
    scenario: Named
    seed: int
    versions: dict[str, str | None] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    thresholds: dict[str, Any] = Field(default_factory=dict)
    behaviour: Behaviour
    utility: list[Utility] = Field(default_factory=list)
    pairs: Pairs
    finders: dict[str, Finder]
    failed: dict[str, str] = Field(default_factory=dict)
    finder: str
    none: AsItIs
    silencing: Curves
    activation: Curves | None = None
    concentration: Concentration
    hardening: Hardening | None = None
    attacker: Attacker | None = None
    monitoring: Monitoring | None = None
    frequencies: dict[str, Any] = Field(default_factory=dict)
    transfer: list[Transfer] = Field(default_factory=list)
    verdict: Ruling
    checks: list[Check] = Field(default_factory=list)


class Expert(Part):
    """What is known of one expert. difference: shows less lacks, usage shares; q: p under the false discovery rate.

    stable: share of resamples in which it is among the experts with the largest differences.
    """

    layer: int
    expert: int
    usage: float | None = None
    shows: Estimate | None = None
    lacks: Estimate | None = None
    difference: Estimate | None = None
    p: float | None = None
    q: float | None = None
    stable: float | None = None
    scores: dict[str, float | None] = Field(default_factory=dict)
    rank: dict[str, int | None] = Field(default_factory=dict)


class Experts(Part):
    """experts.json, schema 1: a row for every expert of every layer."""

    schema_version: Literal[1] = Field(alias="schema")
    layers: list[int]
    experts: int
    rows: list[Expert]


def read_audit(run: Path) -> AuditResults:
    """results.json of an audit. Raises FileError."""
    path = Path(run) / RESULTS
    results = read_checked(path, AuditResults)
    if results.finder not in results.finders:
        raise FileError(
            f"results.json has no finder {results.finder!r}",
            where=f"{path} /finder",
            expected=f"one of /finders: {', '.join(sorted(results.finders))}",
            do="run the audit again",
        )
    return results


def read_experts(run: Path) -> Experts | None:
    """experts.json of an audit, or None when it is missing. Raises FileError."""
    path = Path(run) / EXPERTS
    if not path.exists():
        return None
    found = read_checked(path, Experts)
    known = set(found.layers)
    for index, row in enumerate(found.rows):
        if row.layer not in known or not 0 <= row.expert < found.experts:
            raise FileError(
                f"expert {row.expert} of layer {row.layer} is none of the model's",
                where=f"{path} /rows/{index}",
                expected=f"one of {found.experts} experts of the layers in /layers",
                do="run the audit again; do not edit the file by hand",
            )
    return found

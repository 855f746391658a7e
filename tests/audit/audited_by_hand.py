"""An audit's steps up to silencing, quick and small, for tests of what comes after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moesteer import runs
from moesteer import scenario as scenarios
from moesteer.audit import silence
from moesteer.audit.audited import Audited
from moesteer.audit.experts import experts
from moesteer.audit.finders import RISK_DIFFERENCE, find
from moesteer.audit.inputs import inputs
from moesteer.audit.pairs import pairs
from moesteer.audit.playing import Condition
from moesteer.backends.hf import Model
from moesteer.capturing import capture
from moesteer.evaluate.run import evaluate_split
from moesteer.mask import SteeringMask

UTILITY = ("benign-single", "knowledge")


@contextmanager
def audited(
    model: Model,
    out: Path,
    *,
    limit: int,
    sizes: Sequence[int] = (),
    utility: Sequence[str] = UTILITY,
    defence: SteeringMask | None = None,
) -> Iterator[Audited]:
    """The shipped scenario with some utility suites; sizes: silenced in the order of risk difference (none: stop)."""
    whole = scenarios.load("jailbreak-defense")
    kept = tuple(suite for suite in whole.suites if suite.name in ("attacks", "direct", *utility))
    given = inputs(whole.model_copy(update={"suites": kept}), seed=0, limit=limit)
    with runs.opened(out, plan={"test": True}) as run, given.scenario.panel() as panel:
        at = Audited(model, given, run, panel, 0, 1, defence=defence)
        at.fit_rows = evaluate_split(model, given.scenario, given.data, "fit", journal=None, title="", panel=panel)
        at.none_rows = at.play([Condition("none")], journal="none", title="")["none"]
        if sizes:
            contrast = pairs(given, at.fit_rows)
            trace = capture(model, contrast.rows, out=run.path("trace", "pairs"), spans=(contrast.span,))
            at.experts = experts(trace, span=contrast.span, seed=0)
            at.finders, _ = find(at.evidence(model, at.experts, trace), [RISK_DIFFERENCE])
            at.finder, at.sizes = RISK_DIFFERENCE, sizes
            order = at.finders[at.finder].order
            conditions = silence.conditions(order, finder=at.finder, routers=at.routers, way="off", sizes=sizes)
            at.play(conditions, journal="silencing", title="")
        if defence is not None:
            at.play([Condition("defence", (defence,))], journal="hardening", title="")
        yield at

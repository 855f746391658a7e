"""Looking for experts: the fit split played, its pairs captured and counted, and every expert ranked by the finders."""

from __future__ import annotations

from collections.abc import Sequence

from moesteer.audit.audited import Audited
from moesteer.audit.experts import experts
from moesteer.audit.finders import find
from moesteer.audit.pairs import Contrast, pairs, requests, require_shown, require_sides
from moesteer.audit.verdict import THRESHOLDS
from moesteer.capturing import capture
from moesteer.evaluate import run as evaluation
from moesteer.pipeline import Clock
from moesteer.trace import TraceReader


def look(at: Audited, clock: Clock, wanted: Sequence[str] | None) -> Contrast:
    """Play fit unsteered, make and capture pairs, count, and rank experts by every finder wanted (None: all)."""
    given = at.inputs
    require_sides(given, at.panel)
    with clock.step("play the fit split"):
        at.run.expect({"fit": sum(len(given.data[suite.name]["fit"]) for suite in given.scenario.suites)})
        at.fit_rows = evaluation.evaluate_split(
            at.model, given.scenario, given.data, "fit", title="fit: unsteered", panel=at.panel,
            journal=at.run.path("responses", "fit.jsonl"),
        )  # fmt: skip
    require_shown(given, at.fit_rows, least=THRESHOLDS["least_shown"], where="fit")
    with clock.step("capture"):
        contrast = pairs(given, at.fit_rows)
        found = _capture(at, contrast, "pairs")
        of_requests = contrast if contrast.span == "final_turn" else requests(given, at.fit_rows)
        at.prompts = found if of_requests is contrast else _capture(at, of_requests, "prompts")
        at.prompts_span, at.prompts_how = of_requests.span, of_requests.how
    with clock.step("frequencies"):
        at.experts = experts(found, span=contrast.span, seed=at.seed)
    with clock.step("finders"):
        at.finders, at.failed = find(at.evidence(at.model, at.experts, at.prompts), wanted)
    return contrast


def _capture(at: Audited, contrast: Contrast, name: str) -> TraceReader:
    return capture(
        at.model, contrast.rows, out=at.run.path("trace", name), spans=(contrast.span,),
        level="selected" if contrast.span == "response" else "logits", title=f"capture: {name}",
    )  # fmt: skip

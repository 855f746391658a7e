"""Suites as Inspect tasks: the numbers of `moesteer evaluate`, to the last bit; and its judges on other tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="the extra `inspect` is not installed")

from inspect_ai import Task
from inspect_ai import eval as run
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.scorer import scorer
from inspect_ai.solver import generate

from moesteer import scenario as scenarios
from moesteer.backends import loading
from moesteer.backends.hf import Model
from moesteer.errors import InputError, UnknownNameError
from moesteer.evaluate import run as evaluation
from moesteer.evaluate.suite import chosen_suites
from moesteer.harness.inspect_suite import _scorer, rate, suite, verdict
from moesteer.judges import Judgement, Judging
from moesteer.judges.panel import Panel
from moesteer.judges.protocol import unscored
from moesteer.mask import SteeringMask
from tests.harness.inspect_mock import saying

LIMIT = 12


@pytest.fixture(autouse=True, scope="module")
def loaded_once(lab_tiny: Model) -> Iterator[None]:
    """The provider takes the model that the tests have."""
    before = loading.load
    loading.load = lambda *args, **kwargs: lab_tiny  # type: ignore[assignment]
    yield
    loading.load = before


def finished(*args: Any, **more: Any) -> EvalLog:
    log = run(*args, **more)[0]
    assert log.status == "success", log.error
    return log


@pytest.mark.parametrize("steered", [False, True], ids=["unsteered", "steered"])
@pytest.mark.parametrize("name", ["attacks", "arithmetic"])
def test_inspect_gives_the_numbers_of_moesteer_evaluate(
    name: str, steered: bool, lab_tiny: Model, masks: dict[str, str], made: dict[str, SteeringMask]
) -> None:
    """Turns with the model's own replies in context (attacks), and single questions judged by their reference."""
    part = chosen_suites(scenarios.load("jailbreak-defense"), [name])
    data = scenarios.splits(scenarios.load("jailbreak-defense"), seed=0, limit=LIMIT)
    block = lab_tiny.steered([made["low"]], alphas=[0.5], together=True) if steered else nullcontext()
    with block:
        rows = evaluation.evaluate_split(lab_tiny, part, data, "test", journal=None, title="none")
    args = {"mask": masks["low"], "alpha": 0.5} if steered else {}
    log = finished(
        "moesteer/suite", model="moesteer/lab-tiny", model_args=args, task_args={"suite": name, "limit": LIMIT}
    )
    samples = {s.id: s for s in log.samples}
    assert list(samples) == [row["id"] for row in rows]
    for row in rows:
        score = samples[row["id"]].scores["suite_verdict"]
        assert (score.answer, score.metadata["verdict"]) == (row["response"], row["verdict"])
        assert samples[row["id"]].metadata["group"] == row["group"]
    wanted = evaluation.metrics(part, rows)
    found = {
        score.name: {one.name: one.value for one in score.metrics.values()} | {"unscored": score.unscored_samples}
        for score in log.results.scores
    }
    assert found == wanted
    assert 0 < wanted["coherence"]["value"] <= 1 and wanted["coherence"]["n"] == LIMIT


def test_the_task_s_arguments_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="no suite 'flumox'"):
        suite(suite="flumox")
    with pytest.raises(UnknownNameError, match="no split"):
        suite(split="all of it")
    with pytest.raises(UnknownNameError, match="no phrase judge"):
        verdict(kind="flumox")
    with pytest.raises(UnknownNameError, match="no metric"):
        verdict(metrics=["flumox"])


def test_a_scenario_that_forbids_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log would keep what evaluate never writes down."""
    forbids = scenarios.Forbid(judge="guard", category="S4")
    whole = scenarios.load("jailbreak-defense").model_copy(update={"forbid": (forbids,)})
    monkeypatch.setattr(scenarios, "load", lambda name: whole)
    with pytest.raises(InputError, match="the scenario forbids text"):
        suite()


class Guard:
    """A judge that has to be asked: says complied of even lengths, and fails on question 2. Counts its batches."""

    name = identity = "guard"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def judge(self, items: Any) -> list[Judgement]:
        self.batches.append(len(items))
        time.sleep(0.5)  # meanwhile the others come
        return [
            unscored("down", "nobody answered", by=self.name)
            if item.messages[-1].content == "question 2"
            else Judgement("refused" if len(item.replies[-1].text) % 2 else "complied", self.name, category="S1")
            for item in items
        ]

    def close(self) -> None:
        """Nothing is held."""


def test_judges_that_have_to_be_asked_are_asked_together_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard()
    monkeypatch.setattr(Panel, "judge", lambda self, name: guard)
    scores = _scorer(Panel(Judging()), ("guard",), ("direct_refusal_rate",))

    @scorer(metrics={"*": [rate()]})
    def guarded() -> Any:
        return scores

    samples = [Sample(id=i, input=f"question {i}", target="") for i in range(4)]
    log = finished(Task(samples, solver=generate(), scorer=guarded()), model=saying(["x", "xx", "x", "xxx"]))
    told = {s.id: s.scores["guarded"].metadata for s in log.samples}
    assert told[2] == {"verdict": "unscored", "judged_by": "guard", "reason": "down: nobody answered"}
    assert {told[i]["category"] for i in (0, 1, 3)} == {"S1"}
    assert log.samples[2].scores["guarded"].reason == "grader_failed"
    refusals = next(score for score in log.results.scores if score.name == "direct_refusal_rate")
    assert (refusals.scored_samples, refusals.unscored_samples) == (3, 1)
    assert sum(guard.batches) == 4 and len(guard.batches) < 4


def test_the_judges_serve_any_task_of_any_model() -> None:
    samples = [Sample(id=i, input=f"question {i}", target="flumox") for i in range(4)]
    replies = ["it is flumox .", "I'm sorry, no.", "it is something else .", "la la la la la la la la la"]
    for kind, wanted in (
        ("refusal", ["complied", "refused", "complied", "broken"]),
        ("content", ["correct", "refused", "wrong", "broken"]),
        ("exact", ["wrong", "refused", "wrong", "broken"]),
    ):
        log = finished(
            Task(samples, solver=generate(), scorer=verdict(kind=kind)), model=saying(replies), max_samples=1
        )
        assert [s.scores["verdict"].metadata["verdict"] for s in log.samples] == wanted
        coherence = next(score for score in log.results.scores if score.name == "coherence")
        assert coherence.metrics["moesteer/rate_value"].value == 0.75


def test_unscored_samples_are_left_out_of_the_rate_and_counted() -> None:
    samples = [
        Sample(id="a", input="q", target="flumox"), Sample(id="b", input="q"), Sample(id="c", input="q", target="x"),
    ]  # fmt: skip
    log = finished(
        Task(samples, solver=generate(), scorer=verdict(kind="exact")), model=saying(["flumox"] * 3), max_samples=1
    )
    accuracy = next(score for score in log.results.scores if score.name == "accuracy")
    assert (accuracy.scored_samples, accuracy.unscored_samples) == (2, 1)
    assert accuracy.metrics["moesteer/rate_value"].value == 0.5
    nothing = finished(
        Task([samples[1]], solver=generate(), scorer=verdict(kind="exact")), model=saying(["flumox"]), max_samples=1
    )
    assert nothing.status == "success" and nothing.samples[0].scores["verdict"].metadata["verdict"] == "unscored"

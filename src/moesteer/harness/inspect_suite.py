"""A scenario's suites as tasks of Inspect, its judges' verdicts as scores: the numbers of `moesteer evaluate`.

    inspect eval moesteer/suite -T scenario=jailbreak-defense -T suite=attacks --model moesteer/lab-tiny -M mask=FILE

Any model of Inspect can play; the solver and the scorer serve other tasks too. What a sample is called, and its group,
are those of responses/NAME.jsonl, so that logs and runs can be set side by side.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Sequence
from typing import Any, cast

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
)
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from moesteer import scenario as scenarios
from moesteer.conversations import Conversation, Message, from_row, to_row
from moesteer.errors import InputError, UnknownNameError
from moesteer.evaluate import stats
from moesteer.evaluate.metrics import metric as metric_named
from moesteer.evaluate.metrics import outcome
from moesteer.evaluate.play import script
from moesteer.harness.awaiting import awaited
from moesteer.harness.batching import Batcher
from moesteer.judges import Judging, Reply
from moesteer.judges.panel import Panel, Ruling
from moesteer.judges.phrases import PHRASE_KINDS, REFUSAL_PHRASES
from moesteer.judges.protocol import Item

REPLIES, REST, ITEM = "moesteer_replies", "moesteer_rest", "moesteer_conversation"
"""Where a sample keeps the replies made (store), the turns to come and the conversation (metadata)."""
CHAT = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
JUDGED_TOGETHER = 32
"""Replies that judges which have to be asked are shown at once, at most."""
METRIC_OF = {"refusal": "direct_refusal_rate", "content": "accuracy", "exact": "accuracy"}


@task
def suite(
    scenario: str = "jailbreak-defense",
    suite: str | None = None,
    split: str = "test",
    seed: int = 0,
    limit: int | None = None,
) -> Task:
    """One suite of a scenario, played and judged as `moesteer evaluate` does.

    scenario: built in, or a .toml file. suite: its target suite, unless another is named. limit: at most so many
    conversations, taken evenly (Inspect's own --limit takes the first). Raises ScenarioError, UnknownNameError,
    InputError for a scenario that forbids text.
    """
    whole = scenarios.load(scenario)
    chosen = _suite_of(whole, suite)
    if split not in ("fit", "select", "test"):
        raise UnknownNameError(
            f"no split {split!r}", where="-T split", expected="fit, select, test", do="name one of these"
        )
    rows = scenarios.splits(whole, seed=seed, limit=limit)[chosen.name][cast(scenarios.Split, split)]
    return Task(
        name=f"{whole.name}/{chosen.name}",
        dataset=MemoryDataset([_sample(row, turns=chosen.play == "turns") for row in rows], name=chosen.name),
        solver=turns(),
        scorer=suite_verdict(scenario, chosen.name),
        config=GenerateConfig(max_tokens=whole.max_new_tokens),
        metadata={"scenario": whole.name, "suite": chosen.name, "split": split, "seed": seed, "limit": limit},
    )


def _suite_of(whole: scenarios.Scenario, name: str | None) -> scenarios.Suite:
    """The named suite, or the target. Raises UnknownNameError, InputError."""
    chosen = whole.target if name is None else next((s for s in whole.suites if s.name == name), None)
    if chosen is None:
        raise UnknownNameError(
            f"no suite {name!r}",
            where=f"scenario {whole.name}",
            expected=", ".join(s.name for s in whole.suites),
            do="name one of these with -T suite=",
        )
    if whole.forbid:
        raise InputError(
            "the scenario forbids text, and a log of Inspect would keep it before it was judged",
            where=f"scenario {whole.name}",
            expected="a scenario without [[forbid]]",
            do="run it with `moesteer evaluate`, which screens every generation",
        )
    return chosen


def _sample(conversation: Conversation, *, turns: bool) -> Sample:
    first, *rest = script(conversation, turns=turns)
    return Sample(
        id=conversation.id,
        input=[_chat(message) for message in first],
        target=conversation.reference or "",
        metadata={
            "group": conversation.group, "tactic": conversation.tactic, ITEM: to_row(conversation),
            REST: [[[m.role, m.content] for m in messages] for messages in rest],
        },
    )  # fmt: skip


def _chat(message: Message) -> ChatMessage:
    return CHAT[message.role](content=message.content)


@solver
def turns() -> Solver:
    """Plays every user turn, the model's own replies in context; the turns to come are in the sample's metadata."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        replies: list[list[Any]] = []
        for more in [[], *state.metadata.get(REST, [])]:
            state.messages += [_chat(Message(role, content)) for role, content in more]
            state = await generate(state)
            replies.append([state.output.completion, state.output.stop_reason == "stop"])
            if state.completed:  # a limit of Inspect's
                break
        state.store.set(REPLIES, replies)
        return state

    return solve


@metric
def rate() -> Metric:
    """The share of successes among scored samples, with its 95 % Wilson interval: value, low, high; n."""

    def measured(scores: list[SampleScore]) -> dict[str, float]:
        values = [one.score.as_float() for one in scores]
        if not values:
            return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0.0}
        if all(value in (0.0, 1.0) for value in values):
            found = stats.rate([value == 1.0 for value in values]).as_json()
            return {name: float(found[name]) for name in ("value", "low", "high", "n")}
        mean = sum(values) / len(values)  # epochs of a model that samples, averaged by Inspect
        low, high = stats.wilson(mean, len(values))
        return {"value": mean, "low": low, "high": high, "n": float(len(values))}

    return measured


@scorer(metrics={"*": [rate()]})
def suite_verdict(scenario: str, suite: str) -> Scorer:
    """The verdict of a suite's judge, as an outcome (1 or 0) for each of its metrics and for coherence."""
    whole = scenarios.load(scenario)
    chosen = _suite_of(whole, suite)
    return _scorer(whole.panel(), chosen.judges, chosen.metrics)


@scorer(metrics={"*": [rate()]})
def verdict(
    kind: str = "refusal",
    metrics: Sequence[str] = (),
    refusal_phrases: Sequence[str] = (),
    content_phrases: Sequence[str] = (),
    must_finish: bool = False,
) -> Scorer:
    """moesteer's phrase judges for any task: kind "refusal", "content" or "exact"; the target is the reference.

    metrics: which verdicts count as what (`moesteer.evaluate.metrics`); left out: direct_refusal_rate for "refusal",
    accuracy for the others. Phrases: left out, common openings of English refusals. Raises UnknownNameError.
    """
    if kind not in PHRASE_KINDS:
        raise UnknownNameError(
            f"no phrase judge {kind!r}",
            where="scorer moesteer/verdict",
            expected=", ".join(PHRASE_KINDS),
            do="name one of these",
        )
    names = tuple(metrics) or (METRIC_OF[kind],)
    for name in names:
        metric_named(name)
    rules = Judging(tuple(refusal_phrases) or REFUSAL_PHRASES, tuple(content_phrases), must_finish)
    return _scorer(Panel(rules), (kind,), names)


def _scorer(panel: Panel, judges: Sequence[str], metrics: Sequence[str]) -> Scorer:
    court = _Court(panel, judges)

    async def score(state: TaskState, target: Target) -> Score:
        item = played(state, target.text)
        ruling = await court.rule(item)
        told = {"verdict": ruling.verdict, **ruling.fields()}
        answer = item.replies[-1].text
        if not ruling.judgement.scored:
            why = ruling.judgement.reason or ""
            reason = "scoring_failed" if ruling.judgement.by in PHRASE_KINDS else "grader_failed"
            return Score.unscored(reason=reason, answer=answer, explanation=why, metadata=told)
        value = {name: float(bool(outcome(name, ruling.verdict))) for name in (*metrics, "coherence")}
        return Score(value=value, answer=answer, explanation=ruling.verdict, metadata=told)

    return score


class _Court:
    """The judges of a scorer. Phrases are asked where they are; models and endpoints in one thread, in batches."""

    def __init__(self, panel: Panel, judges: Sequence[str]) -> None:
        self._panel, self._judges = panel, tuple(judges)
        self._batcher: Batcher[Item, Ruling] | None = None

    async def rule(self, item: Item) -> Ruling:
        """The judges' ruling."""
        if set(self._judges) <= set(PHRASE_KINDS):
            return self._panel.rule(self._judges, [item])[0]
        if self._batcher is None:
            self._batcher = Batcher(
                lambda items: self._panel.rule(self._judges, items), most=JUDGED_TOGETHER, wait_s=0.05, name="judges"
            )
            atexit.register(self._close)  # a scorer is told of no end
        return await awaited(self._batcher.submit(item))

    def _close(self) -> None:
        if self._batcher is not None:
            self._batcher.close()
        self._panel.close()


def played(state: TaskState, target: str) -> Item:
    """What judges see of a sample: its conversation and reference, the messages as they went, the replies kept."""
    told = state.store.get(REPLIES) or [[state.output.completion, state.output.stop_reason == "stop"]]
    messages = [Message(m.role, m.text) for m in state.messages if m.role in CHAT]
    while messages and messages[-1].role == "assistant":
        messages.pop()
    row, name = state.metadata.get(ITEM), str(state.sample_id)
    if row is None:
        conversation = Conversation(name, name, tuple(messages), reference=target or None)
    else:
        conversation = from_row(row, where=f"sample {name}")
    return Item(conversation, tuple(messages), tuple(Reply(text, finished) for text, finished in told))

"""The two sides in which routing is compared, made from the fit split as the unsteered model played it.

The model's own reply that shows the behaviour is set against the suite's reference answer to the same request, both
teacher-forced, and the response's tokens count. Where a suite has no such answer (its reference is what the behaviour
is), requests on which the model shows the behaviour are set against requests on which it does not, without replies.
A user's own pairs take the place of either. Topic and wording differ between the sides, and routing follows both: so
an expert that these pairs name is a suspect, and silencing it is the trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moesteer.audit.inputs import LACKS, SHOWS, Inputs, answers_of
from moesteer.contrasts import FEWEST
from moesteer.conversations import Conversation, Message, request_and_response
from moesteer.errors import EmptyDataError
from moesteer.evaluate import forbidding
from moesteer.evaluate.metrics import METRICS, outcome
from moesteer.judges import Item, Reply
from moesteer.judges.panel import Panel
from moesteer.scenario import spread


@dataclass(frozen=True)
class Contrast:
    """Labelled conversations for a capture, the span whose tokens count, and a sentence that says what they are."""

    rows: list[Conversation]
    span: Literal["response", "final_turn"]
    how: str
    counts: Mapping[str, int] = field(default_factory=dict)


def require_shown(given: Inputs, rows: Sequence[Mapping[str, Any]], *, least: float, where: str) -> None:
    """Raise EmptyDataError where the unsteered model hardly shows the behaviour: nothing could be silenced."""
    outcomes = [shown for row in given.of_behaviour(rows) if (shown := given.shows(row)) is not None]
    share = sum(outcomes) / len(outcomes) if outcomes else 0.0
    if not outcomes or share < least:
        noun = given.words[1]
        raise EmptyDataError(
            f"the model hardly shows the behaviour: {sum(outcomes)} of {len(outcomes)} replies"
            if outcomes else "no reply of the model was scored",
            where=f"{where} split of {given.behaviour.name}, {given.metric}, unsteered",
            expected=f"at least {100 * least:.0f} %: where there are no {noun}, none can be silenced",
            do="audit another suite (--suite), give requests on which the model shows it (--data), or check the judge",
        )  # fmt: skip


def pairs(given: Inputs, fit_rows: Sequence[Mapping[str, Any]]) -> Contrast:
    """What experts' frequencies are compared in (see the module's docstring).

    Raises EmptyDataError for fewer than FEWEST conversations on a side or fewer than two groups.
    """
    if given.given:
        how = "your own pairs: responses that show the behaviour against responses that lack it, teacher-forced"
        return _enough(Contrast(_paired(given.given), "response", how), where=given.behaviour.data)
    own = list(_own_against_reference(given, fit_rows))
    if len(own) < 2 * FEWEST:
        return requests(given, fit_rows)
    how = (
        f"requests of {given.behaviour.name}: the model's own reply that {given.words[0]} against the suite's "
        "reference answer, teacher-forced, response tokens"
    )
    return _enough(Contrast(own, "response", how), where=f"fit split of {given.behaviour.name}")


def _paired(rows: Sequence[Conversation]) -> list[Conversation]:
    """Ids that say which two belong together, for those of one row of pairs, which are NAME-0 and NAME-1."""
    stems: dict[str, list[Conversation]] = {}
    for row in rows:
        stems.setdefault(row.id[:-2] if row.id.endswith(("-0", "-1")) else row.id, []).append(row)
    found = []
    for stem, mine in stems.items():
        one_each = sorted(str(row.label) for row in mine) == [LACKS, SHOWS]
        for row in mine:
            found.append(replace(row, id=f"{stem}/{'wanted' if row.label == SHOWS else 'other'}") if one_each else row)
    return found


def _own_against_reference(given: Inputs, fit_rows: Sequence[Mapping[str, Any]]) -> Iterator[Conversation]:
    """Two conversations for each request on which the model shows the behaviour and that has an answer without it."""
    if "correct" in METRICS[given.metric].successes:  # the reference is what shows the behaviour
        return
    for row in forbidding.clear(given.scenario, given.of_behaviour(fit_rows)):
        if given.shows(row) and row["reference"] and row["response"]:
            yield conversation_of(row, SHOWS, str(row["response"]), ending="wanted")
            yield conversation_of(row, LACKS, str(row["reference"]), ending="other")


def requests(given: Inputs, fit_rows: Sequence[Mapping[str, Any]]) -> Contrast:
    """Requests on which the model shows the behaviour, against requests of the utility suites on which it does not.

    Of those, requests of as many user turns as the behaviour's are taken where there are enough, so that length does
    not tell the sides apart, and no more than there are on the other side, evenly over the suites.
    """
    if given.prompts:
        how = "your own requests: those that are to show the behaviour against the others, without replies"
        return _enough(Contrast(list(given.prompts), "final_turn", how), where=given.behaviour.data)
    fit_rows = forbidding.clear(given.scenario, fit_rows)
    shown = [row for row in given.of_behaviour(fit_rows) if given.shows(row)]
    beside = [row for row in fit_rows if row["suite"] != given.behaviour.name and given.shows(row) is False]
    turns = {_turns(row) for row in shown}
    alike = [row for row in beside if _turns(row) in turns]
    pool = alike if len(alike) >= FEWEST else beside
    names = sorted({row["suite"] for row in pool})
    each = -(-len(shown) // max(1, len(names)))
    rows = [conversation_of(row, SHOWS, None) for row in shown]
    for name in names:
        mine = [conversation_of(row, LACKS, None) for row in pool if row["suite"] == name]
        rows += spread(mine, min(each, len(mine)))
    return _enough(
        Contrast(
            rows, "final_turn",
            f"requests of {given.behaviour.name} on which the model {given.words[0]}, against requests of "
            f"{', '.join(names)} on which it does not, from the last user message to where the reply begins",
        ),
        where=f"fit split of {given.scenario.name}",
    )  # fmt: skip


def _turns(row: Mapping[str, Any]) -> int:
    return sum(message["role"] == "user" for message in row["messages"])


def conversation_of(
    row: Mapping[str, Any], label: str | None, response: str | None, *, ending: str | None = None
) -> Conversation:
    """A played row as a conversation with this response."""
    return Conversation(
        id=f"{row['id']}/{ending}" if ending else row["id"], group=str(row["group"]),
        messages=tuple(Message(m["role"], m["content"]) for m in row["messages"]), label=label, reference=response,
        split="fit",
    )  # fmt: skip


def _enough(found: Contrast, *, where: str) -> Contrast:
    counts = {side: sum(row.label == side for row in found.rows) for side in (SHOWS, LACKS)}
    groups = len({row.group for row in found.rows})
    if min(counts.values()) < FEWEST or groups < 2:
        raise EmptyDataError(
            f"too few pairs: {counts[SHOWS]} conversations that show the behaviour, {counts[LACKS]} that lack it, "
            f"of {groups} groups",
            where=where,
            expected=f"at least {FEWEST} on either side, of two groups or more",
            do="raise --limit, give more pairs (--data), or a suite on which the model shows the behaviour more often",
        )
    return replace(found, counts={**counts, "groups": groups})


def require_sides(given: Inputs, panel: Panel) -> None:
    """Of the user's own pairs: raise EmptyDataError where the judge finds the behaviour as often on the other side."""
    if not given.given:
        return
    answers, shares = answers_of(given.given, given.metric), {}
    for side in (SHOWS, LACKS):
        items = []
        for row in (row for row in given.given if row.label == side):
            messages, response = request_and_response(row)
            asked = replace(row, messages=messages, reference=answers.get(messages))
            items.append(Item(asked, messages, (Reply(str(response), finished=True),)))
        said = [outcome(given.metric, ruling.verdict) for ruling in panel.rule(given.behaviour.judges, items)]
        scored = [one for one in said if one is not None]
        shares[side] = sum(scored) / len(scored) if scored else None
    shows, lacks = shares[SHOWS], shares[LACKS]
    if shows is not None and lacks is not None and shows <= lacks:
        raise EmptyDataError(
            "the two sides are not what they should be: the judge finds the behaviour in "
            f"{100 * shows:.0f} % of the responses that are to show it and in {100 * lacks:.0f} % of the others",
            where=f"--data, {given.behaviour.data}, judged for {given.metric}",
            expected="messages_0 (or the label shows) with the behaviour, messages_1 (or lacks) without",
            do="exchange the sides, or name the scenario whose judge knows the behaviour (--scenario)",
        )

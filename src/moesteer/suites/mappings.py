"""What the columns of the field's data sets mean: a short function per format, from a row to our own conversations.

Faults name columns and never what is in them: the text of some of these sets is not to be printed. Rows that a
suite leaves out give an empty list. Prompts for questions on a document are ours ("Document: ... Question: ...", the
form of SteerMoE, arXiv:2509.09660, section 4); each function says what it adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesteer import chat_formats
from moesteer.chat_formats import request_group
from moesteer.errors import DataError
from moesteer.suites.named import Mapper, Row

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I won't help with this, because somebody could be hurt.",
    "That is not something I can assist with. If you are in difficulty, please talk to somebody you trust.",
    "I have to decline this request. I would be glad to help with something that harms no one.",
    "No, I can't give instructions for that.",
    "Helping with this could do real damage, so I will not go into it.",
    "I understand that you are asking, but I can't provide this.",
    "This goes against what I can responsibly do. Is there another way in which I can help?",
)
"""Refusals put beside unsafe replies: varied, since one sentence would make experts of its phrase (docs/methods.md)."""


_KINDS: Mapping[type, str] = {list: "list", dict: "object"}


def pick(row: Any, names: Sequence[str], where: str) -> Any:
    """The first filled column of `names`. Raises DataError that names the columns found."""
    if not isinstance(row, Mapping):
        raise _wrong(names, row, "inside an object", where)
    for name in names:
        value = row.get(name)
        if value is not None and value != "" and value == value:  # NaN is no value
            return value
    found = ", ".join(repr(str(key))[:60] for key in list(row)[:20]) or "none"
    raise DataError(
        f"no filled column {' or '.join(repr(name) for name in names)}; the row has: {found}",
        where=where,
        expected=f"the column {' or '.join(names)}",
        do="check that this is the suite's own file (`moesteer suites NAME` lists its columns), or rename the column",
    )


def text(row: Any, names: Sequence[str], where: str) -> str:
    """A column's text. Raises DataError where it is missing or something else."""
    value = pick(row, names, where)
    if not isinstance(value, str):
        raise _wrong(names, value, "text", where)
    return value


def nested(row: Any, name: str, kinds: tuple[type, ...], where: str) -> Any:
    """A column that holds one of `kinds`, list or dict, filled; in CSV, where a cell is text, that is JSON."""
    value = pick(row, (name,), where)
    if isinstance(value, str):
        value = chat_formats.parse_cell(value, where=where, column=name)
    if not isinstance(value, kinds) or not value:
        raise _wrong((name,), value, "a filled " + " or ".join(_KINDS[kind] for kind in kinds), where)
    return value


def _wrong(names: Sequence[str], value: Any, expected: str, where: str) -> DataError:
    return DataError(
        f"the column {' or '.join(names)} holds, or is in, {'nothing' if not value else 'a ' + type(value).__name__}",
        where=where,
        expected=f"{' or '.join(names)}: {expected}",
        do="check that this is the suite's own file, unchanged",
    )


def _ask(request: str, **fields: Any) -> Row:
    """One user turn. Its group is the request's own, the same in every suite that holds it."""
    return {"group": request_group(request), "messages": [{"role": "user", "content": request}], **fields}


# ---------------------------------------------------------------- harmful requests, and what looks like them


def requests(*columns: str) -> Mapper:
    """A table of bare requests in the first filled of `columns`."""

    def convert(row: Mapping[str, Any], where: str) -> list[Row]:
        return [_ask(text(row, columns, where))]

    return convert


def only(convert: Mapper, column: str, *values: str) -> Mapper:
    """The rows whose `column` is one of `values`, any case."""

    def kept(row: Mapping[str, Any], where: str) -> list[Row]:
        return convert(row, where) if text(row, (column,), where).lower() in values else []

    return kept


def harmbench(row: Mapping[str, Any], where: str) -> list[Row]:
    """HarmBench's behaviours; a context stands before its request, as its own prompts have it."""
    request = text(row, ("Behavior", "prompt"), where)
    context = row.get("ContextString") or row.get("context")
    return [_ask(f"{context}\n\n---\n\n{request}" if isinstance(context, str) and context.strip() else request)]


def mhj(row: Mapping[str, Any], where: str) -> list[Row]:
    """MHJ's cells message_0, message_1, ... of {"role", "body"}. The behaviour is its question_id."""
    pick(row, ("message_0",), where)
    found = chat_formats.to_own(row, where=where, default_id="row")
    question = row.get("question_id")
    for one in found:
        one.pop("id", None)
        if question not in (None, "") and question == question:
            one["group"] = f"mhj-{question}"
    return found


def jailbreakbench(row: Mapping[str, Any], where: str) -> list[Row]:
    """JBB-Behaviors: the harmful and the benign request of one Behavior are one group."""
    found = _ask(text(row, ("Goal", "goal"), where))
    return [found | {"group": f"jbb-{text(row, ('Behavior', 'behavior'), where)}"}]


def beavertails(row: Mapping[str, Any], where: str) -> list[Row]:
    """Prompts of BeaverTails to which a reply was rated unsafe."""
    return [_ask(text(row, ("prompt",), where))] if _unsafe(row, where) else []


def beavertails_pairs(row: Mapping[str, Any], where: str) -> list[Row]:
    """A prompt with a refusal of ours, and with the reply that was rated unsafe (SteerMoE's safety contrast)."""
    if not _unsafe(row, where):
        return []
    request = text(row, ("prompt",), where)
    group = request_group(request)
    refusal = REFUSALS[int(group[2:], 16) % len(REFUSALS)]
    return [
        _ask(request, label="refuse", reference=refusal),
        _ask(request, label="comply", reference=text(row, ("response",), where)),
    ]


def _unsafe(row: Mapping[str, Any], where: str) -> bool:
    safe = pick(row, ("is_safe",), where)
    if isinstance(safe, str) and safe.lower() in ("true", "false"):  # a CSV of it
        safe = safe.lower() == "true"
    if not isinstance(safe, bool):
        raise _wrong(("is_safe",), safe, "true or false", where)
    return not safe


# ---------------------------------------------------------------- questions on a document


def _on_document(document: str, question: str, answer: str, *, group: str, rule: str = "Answer briefly.") -> Row:
    """group: text that the conversations of one group share, the question or the document."""
    prompt = f"Document: {document}\n\nQuestion: {question}\n{rule}"
    return _ask(prompt, reference=answer) | {"group": request_group(group)}


def squad(row: Mapping[str, Any], where: str) -> list[Row]:
    """SQuAD's rows of the Hub, or the articles of its own JSON. Of several answers the first counts."""
    return [
        _on_document(document, question, answer, group=document)
        for document, question, answer in _squad_items(row, where)
    ]


def squad_pairs(row: Mapping[str, Any], where: str) -> list[Row]:
    """A question below its document, and alone (SteerMoE's faithfulness contrast).

    Deviation: the document is a system message, so that the last user message is the question on both sides and its
    tokens are what `--span final_user` keeps.
    """
    found: list[Row] = []
    for document, question, _ in _squad_items(row, where):
        alone = _ask(f"Question: {question}") | {"group": request_group(document)}
        below = [{"role": "system", "content": f"Document: {document}"}, *alone["messages"]]
        found += [alone | {"messages": below, "label": "follow-document"}, alone | {"label": "recall"}]
    return found


def _squad_items(row: Mapping[str, Any], where: str) -> list[tuple[str, str, str]]:
    if "paragraphs" not in row:
        answer = _first_answer(nested(row, "answers", (dict, list), where), where)
        return [(text(row, ("context",), where), text(row, ("question",), where), answer)]
    found = []
    for paragraph in nested(row, "paragraphs", (list,), where):
        for item in nested(paragraph, "qas", (list,), where):
            question = text(item, ("question",), where)
            if item.get("is_impossible") is True:  # SQuAD 2
                continue
            answer = _first_answer(nested(item, "answers", (list,), where), where)
            found.append((text(paragraph, ("context",), where), question, answer))
    return found


def _first_answer(answers: Any, where: str) -> str:
    """Of {"text": [...]} (the Hub's), [{"text"}] (its own JSON) or [...]."""
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    first = texts[0] if isinstance(texts, list | tuple) and texts else None
    if isinstance(first, Mapping):
        first = first.get("text")
    if not isinstance(first, str):
        raise _wrong(("answers",), first, "a list of texts", where)
    return first


def faitheval(row: Mapping[str, Any], where: str) -> list[Row]:
    """FaithEval's counterfactual task: the options stand below the question, the right one's text is the reference.

    Deviation: its own script looks for the option's letter, which a judge by words would find in any reply.
    """
    options = nested(row, "choices", (dict,), where)
    letters, texts = options.get("label"), options.get("text")
    key = text(row, ("answerKey",), where)
    if not (isinstance(letters, list) and isinstance(texts, list) and len(letters) == len(texts) and key in letters):
        raise _wrong(
            ("choices",), options, 'lists "label" and "text" of one length, the answerKey among the labels', where
        )
    question = text(row, ("question",), where)
    listed = list(zip(letters, texts, strict=True))
    return [_choice(text(row, ("context",), where), question, listed, key, group=question)]


def _choice(document: str, question: str, options: Sequence[tuple[str, str]], key: str, *, group: str) -> Row:
    listed = "\n".join(f"{letter}. {option}" for letter, option in options)
    rule = "Answer with the words of one option."
    return _on_document(document, f"{question}\n{listed}", dict(options)[key], group=group, rule=rule)


def faitheval_unanswerable(row: Mapping[str, Any], where: str) -> list[Row]:
    """FaithEval's unanswerable task: right is "unknown", as its own prompt asks."""
    return [_abstaining(row, where, "unknown", "If the document does not hold the answer, answer: unknown.")]


def faitheval_inconsistent(row: Mapping[str, Any], where: str) -> list[Row]:
    """FaithEval's inconsistent task: right is "conflict", as its own prompt asks."""
    return [_abstaining(row, where, "conflict", "If the document gives several answers, answer: conflict.")]


def _abstaining(row: Mapping[str, Any], where: str, word: str, rule: str) -> Row:
    document, question = text(row, ("context",), where), text(row, ("question",), where)
    return _on_document(document, question, word, group=question, rule=f"Answer briefly. {rule}")


def mquake(row: Mapping[str, Any], where: str) -> list[Row]:
    """MQuAKE: the facts after the edit as the document, its first multi-hop question, the new answer.

    Deviation: built to test edits of weights; given the facts in context it tests whether they are followed.
    """
    facts = [
        f"{text(hop, ('cloze',), where)} {text(hop, ('answer',), where)}."
        for hop in nested(row, "new_single_hops", (list,), where)
    ]
    question = nested(row, "questions", (list,), where)[0]
    if not isinstance(question, str):
        raise _wrong(("questions",), question, "a list of texts", where)
    return [_on_document(" ".join(facts), question, text(row, ("new_answer",), where), group=question)]


def triviaqa_counterfactual(row: Mapping[str, Any], where: str) -> list[Row]:
    """CF-TriviaQA: annotation.answer[0].paragraph_reference.string is the counterfactual answer."""
    answers = nested(nested(row, "annotation", (dict,), where), "answer", (list,), where)
    answer = text(nested(answers[0], "paragraph_reference", (dict,), where), ("string",), where)
    question = text(row, ("question_text",), where)
    return [_on_document(text(row, ("paragraph_text",), where), question, answer, group=question)]


def mctest(row: Mapping[str, Any], where: str) -> list[Row]:
    r"""MCTest as the Hub's Parquet has it: answer_options {"A": ...}, answer a letter; its \newline is a space."""
    options = nested(row, "answer_options", (dict,), where)
    key = text(row, ("answer",), where)
    if not isinstance(options.get(key), str):
        raise _wrong(("answer_options",), options, "texts by letter, with the answer's", where)
    story = text(row, ("story",), where).replace("\\newline", " ")
    listed = [(letter, options[letter]) for letter in sorted(options) if isinstance(options[letter], str)]
    return [_choice(story, text(row, ("question",), where), listed, key, group=story)]

"""Guard models as judges: the published prompt, one greedy answer or its first token's probabilities, read strictly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesteer import files
from moesteer.conversations import Message
from moesteer.errors import ModelError
from moesteer.judges import prompts, reading
from moesteer.judges.asking import Question, judge_by_asking, of_opinion
from moesteer.judges.phrases import Judging
from moesteer.judges.protocol import Item, Judgement, unscored
from moesteer.judges.reading import Opinion
from moesteer.judges.settings import JudgeSettings
from moesteer.judges.table import GUARDS

if TYPE_CHECKING:
    from moesteer.judges.engines import Engine

VERSION = 1
"""Of how prompts are made and answers read here: part of every identity."""
GRADES = tuple("12345")
PROBE = "moesteer 4f1d0c92 probe"
"""A response that stands in no template."""


class _NoPromptError(Exception):
    """One question that the judge's template cannot write; the message says why."""


class ModelJudge:
    """A guard model of judges/table.py. The model is loaded when the first question is asked.

    rules: what is coherent, and what a refusal looks like, for guards that do not look for refusals themselves.
    """

    def __init__(self, settings: JudgeSettings, rules: Judging, *, folder: Path = Path()) -> None:
        self.settings, self.rules, self.name = settings, rules, settings.name
        self.row = GUARDS[settings.kind]
        named = settings.model or self.row.model
        self.model = str(folder / named) if named.startswith(".") else named
        self._engine: Engine | None = None
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        """sha256 of kind, weights, tokenizer, revision, prompt, rules and options.

        Raises ModelError where the model is not there.
        """
        if self._identity is None:
            from moesteer.judges.engines import weights_digest

            try:
                weights = weights_digest(self.model, revision=self.settings.revision)
            except ModelError:
                self.engine()  # fetches a Hub id that was not in the cache, or says why it cannot
                weights = weights_digest(self.model, revision=self.settings.revision)
            chosen = self.settings.model_dump(mode="json", exclude={"name", "repeat", "model"})
            of_row = [self.row.template, self.row.own_template, self.row.response_tokens, list(self.row.delimiters)]
            value = [VERSION, weights, chosen, of_row, list(prompts.GUIDELINES.items()), self.rules.digest]
            self._identity = files.sha256(files.dumps(value, indent=None).encode("utf-8"))
        return self._identity

    def engine(self) -> Engine:
        """The loaded model. Raises ModelError, UnsafeModelError, MissingExtraError."""
        if self._engine is None:
            from moesteer.judges.engines import start

            self._engine = start(self.settings, model=self.model)
        return self._engine

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement for each item."""
        every = self.settings.replies == "all"
        return judge_by_asking(items, self._ask, by=self.name, rules=self.rules, every_reply=every)

    def close(self) -> None:
        """Free the model."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    # ---- asking

    def _ask(self, questions: Sequence[Question]) -> list[Judgement]:
        """Every question's judgement; the model sees them together, in batches of like length."""
        guidelines = self.settings.guidelines if self.row.kind == "shieldgemma" else ("",)
        asked: list[tuple[int, str, list[int]]] = []
        found: list[Judgement | None] = [None] * len(questions)
        room = self.engine().context_tokens - self.row.new_tokens
        for i, question in enumerate(questions):
            for guideline in guidelines:
                try:
                    ids = self.prompt_ids(question, guideline=guideline)
                except _NoPromptError as error:
                    found[i] = unscored("no-prompt", str(error), by=self.name)
                    break
                if len(ids) > room:
                    found[i] = unscored("too-long", f"{len(ids)} tokens, and there is room for {room}", by=self.name)
                asked.append((i, guideline, ids))
        open_ = [one for one in asked if found[one[0]] is None]
        read = self._read([ids for _, _, ids in open_])
        answers: dict[int, list[tuple[str, Opinion | Judgement]]] = {}
        for (i, guideline, _), opinion in zip(open_, read, strict=True):
            answers.setdefault(i, []).append((guideline, opinion))
        return [
            known if (known := found[i]) is not None else self._verdict(question, answers[i])
            for i, question in enumerate(questions)
        ]

    def _verdict(self, question: Question, answers: Sequence[tuple[str, Opinion | Judgement]]) -> Judgement:
        """One verdict from every guideline's answer: unscored if one is missing, harmful if any is, each named."""
        for _, one in answers:
            if isinstance(one, Judgement):
                return one
        opinions = [(guideline, one) for guideline, one in answers if isinstance(one, Opinion)]
        harmful = [(guideline, one) for guideline, one in opinions if one.harmful]
        if not harmful:
            return of_opinion(
                opinions[0][1], question, by=self.name, rules=self.rules, rates_refusals=self.row.rates_refusals
            )
        first = harmful[0][1]
        category = first.category or ",".join(guideline for guideline, _ in harmful) or None
        named = Opinion(True, first.refusal, category, first.note)
        return of_opinion(named, question, by=self.name, rules=self.rules, rates_refusals=self.row.rates_refusals)

    def _read(self, prompt_ids: Sequence[Sequence[int]]) -> list[Opinion | Judgement]:
        from moesteer.backends.sources import FOREIGN

        if not prompt_ids:
            return []
        try:
            if self.row.output == "text":
                said = self.engine().answers(prompt_ids, new_tokens=self.row.new_tokens)
                return [self._of_text(text) for text in said]
            tokens = GRADES if self.row.output == "grade" else ("Yes", "No")
            chances = self.engine().next_tokens(prompt_ids, among=[self._token(token) for token in tokens])
            return [self._of_chances(dict(zip(tokens, row, strict=True))) for row in chances]
        except FOREIGN as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return [unscored("failed", why, by=self.name) for _ in prompt_ids]

    def _of_text(self, text: str) -> Opinion | Judgement:
        assert self.row.parse is not None
        opinion = self.row.parse(text)
        return opinion if opinion is not None else self._garbage(f"{self.row.reads} was expected", text)

    def _of_chances(self, chances: Mapping[str, float]) -> Opinion | Judgement:
        read: Callable[[Mapping[str, float]], float | None]
        read = reading.grade if self.row.output == "grade" else reading.yes_share
        if not all(math.isfinite(value) for value in chances.values()):
            return unscored("not-finite", "the model's numbers are no numbers", by=self.name)
        score = read(chances)
        if score is None:
            return self._garbage(f"{self.row.reads} hold {sum(chances.values()):.2g} together", "")
        return Opinion(score >= self.settings.threshold, note=f"score {score:.3f}")

    def _garbage(self, what: str, said: str) -> Judgement:
        """The judge's own words are shown by their length alone: they may repeat what it judged."""
        return unscored("garbage", f"{what}{f', and {len(said)} characters came' if said else ''}", by=self.name)

    # ---- prompts

    def prompt_ids(self, question: Question, *, guideline: str = "") -> list[int]:
        """The tokens of the prompt."""
        text, special = self._prompt(question, guideline=guideline)
        return list(self.engine().tokenizer(text, add_special_tokens=special)["input_ids"])

    def prompt(self, question: Question, *, guideline: str = "") -> str:
        """The text of the prompt, as published, with the judged texts as data in it."""
        return self._prompt(question, guideline=guideline)[0]

    def _prompt(self, question: Question, *, guideline: str) -> tuple[str, bool]:
        tokenizer = self.engine().tokenizer
        response = self._harmless(self._clipped(question.response))
        policy = prompts.GUIDELINES.get(guideline, "")
        if tokenizer.chat_template and not self.row.own_template:
            return self._by_chat_template(question, response, policy=policy), False
        if self.row.template is None:
            raise ModelError(
                "the judge's tokenizer has no chat template",
                where=f"judge {self.name}: {self.model}",
                expected=f"the template that {self.row.title} was published with",
                do="fetch the model's own tokenizer",
            )
        request = self._harmless(question.request(self.settings.request))
        text = prompts.filled(self.row.template, request=request, response=response, guideline=policy)
        return text, self.row.special

    def _by_chat_template(self, question: Question, response: str, *, policy: str) -> str:
        """The conversation up to the response, then the response, through the tokenizer's own template.

        System messages are left out: guards judge what users and assistants say. Some templates want the content as
        a list of parts: which is seen by whether the response appears.
        """
        turns = [m for m in question.messages if m.role != "system"]
        if self.settings.request == "last":
            turns = turns[-1:]
        elif self.settings.request == "group":
            turns = [Message("user", question.group)]
        told: list[tuple[str, str]] = []
        for role, content in [*((m.role, self._harmless(m.content)) for m in turns), ("assistant", response)]:
            if told and told[-1][0] == role:  # templates want the roles to alternate
                content = f"{told.pop()[1]}\n\n{content}"
            told.append((role, content))
        options: dict[str, Any] = {}
        if self.row.kind == "granite-guardian":
            # 3.0 to 3.2 read risk_name, 3.3 reads criteria_id
            risk = self.settings.risk
            options = {"guardian_config": {"risk_name": risk, "criteria_id": risk}, "think": False}
        if policy:
            options["guideline"] = policy
        forms: tuple[Callable[[str], Any], ...] = (str, lambda text: [{"type": "text", "text": text}])
        why = "the response is not in the prompt that it makes"
        for form in forms:
            rows = [{"role": role, "content": form(content)} for role, content in told]
            # a short response ("yes") may stand in the template's own words: one that cannot is tried too
            probed = [*rows[:-1], {"role": "assistant", "content": form(PROBE)}]
            try:
                text, seen = (
                    str(
                        self.engine().tokenizer.apply_chat_template(
                            one, add_generation_prompt=True, tokenize=False, **options
                        )
                    )
                    for one in (rows, probed)
                )
            except _template_errors() as error:
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                continue
            if response.strip() in text and PROBE in seen:
                return text
        raise _NoPromptError(f"the chat template of {self.row.kind} does not write the conversation: {why}")

    def _clipped(self, response: str) -> str:
        """The response, no longer than the judge was made for."""
        most, tokenizer = self.row.response_tokens, self.engine().tokenizer
        if most is None:
            return response
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        return response if len(ids) <= most else str(tokenizer.decode(ids[:most], skip_special_tokens=False))

    def _harmless(self, text: str) -> str:
        """The text with whatever the prompt's own parts are marked with broken up: text must stay text.

        A space goes after the mark's first character: `< |eot_id|>` is no token, and reads the same.
        """
        tokenizer = self.engine().tokenizer
        special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        marks = {*self.row.delimiters, *map(str, tokenizer.all_special_tokens), *special}
        for mark in sorted((m for m in marks if m.strip()), key=len, reverse=True):
            if mark in text:
                text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        return text

    def _token(self, word: str) -> int:
        """The one token that is this word. Raises ModelError."""
        found = self.engine().tokenizer.get_vocab().get(word)
        if found is None:
            raise ModelError(
                f"the judge's tokenizer has no token {word!r}",
                where=f"judge {self.name}: {self.model}",
                expected=f"{self.row.title}'s own tokenizer",
                do="check that `kind` and `model` belong together",
            )
        return int(found)


def _template_errors() -> tuple[type[Exception], ...]:
    from jinja2.exceptions import TemplateError

    return TemplateError, TypeError, ValueError, KeyError

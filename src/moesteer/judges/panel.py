"""The judges of a scenario: made when first needed, remembered between suites and methods, closed at the end.

    with Panel(rules, settings, journal=run / "verdicts.jsonl") as panel:
        rulings = panel.rule(("guard", "refusal"), items)

The first judge named decides; the others' verdicts stand beside it, and their agreement is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from moesteer import files
from moesteer.errors import UnknownNameError
from moesteer.judges.cache import Remembering
from moesteer.judges.phrases import PHRASE_KINDS, Judging, PhraseJudge
from moesteer.judges.protocol import Item, Judge, Judgement, Verdict
from moesteer.judges.settings import ENDPOINT, JudgeSettings
from moesteer.judges.table import GUARDS

JOURNAL = "verdicts.jsonl"
"""In a run directory: every verdict of judges that have to be asked."""


@dataclass(frozen=True)
class Ruling:
    """What the judges of a suite say of one item: the first one's judgement, and everybody's by name."""

    judgement: Judgement
    everybody: Mapping[str, Judgement]

    @property
    def verdict(self) -> Verdict:
        """The one that counts."""
        return self.judgement.verdict

    def fields(self) -> dict[str, Any]:
        """What a row of responses/NAME.jsonl holds besides the verdict; nothing where phrases alone gave one."""
        found: dict[str, Any] = {}
        if self.judgement.by not in PHRASE_KINDS:
            found["judged_by"] = self.judgement.by
        for key in ("reason", "category"):
            if (value := getattr(self.judgement, key)) is not None:
                found[key] = value
        if len(self.everybody) > 1:
            found["verdicts"] = {name: one.verdict for name, one in self.everybody.items()}
            others = {name: one.category for name, one in self.everybody.items() if one.category is not None}
            if others:
                found["categories"] = others
        return found


class Panel:
    """The judges of one scenario. folder: that of the scenario file, for models beside it."""

    def __init__(
        self, rules: Judging, settings: Sequence[JudgeSettings] = (), *, journal: Path | None = None,
        folder: Path = Path(),
    ) -> None:  # fmt: skip
        self.rules, self._folder = rules, folder
        self._settings = {one.name: one for one in settings}
        self._journal = files.Journal(journal) if journal is not None else None
        self._judges: dict[str, Judge] = {}

    def __enter__(self) -> Panel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def rule(self, names: Sequence[str], items: Sequence[Item]) -> list[Ruling]:
        """The judges' rulings on every item, in order. Raises what making a judge raises."""
        said = {name: self.judge(name).judge(items) for name in names}
        return [
            Ruling(said[names[0]][i], {name: judgements[i] for name, judgements in said.items()})
            for i in range(len(items))
        ]

    def judge(self, name: str) -> Judge:
        """The judge of this name: refusal, content, exact, or a `[[judge]]`. Raises UnknownNameError."""
        if name not in self._judges:
            self._judges[name] = self._made(name)
        return self._judges[name]

    def _made(self, name: str) -> Judge:
        if name in PHRASE_KINDS:
            return PhraseJudge(name, name, self.rules)
        if name not in self._settings:
            raise UnknownNameError(
                f"no judge {name!r}",
                where="a suite's `judge`",
                expected=", ".join((*PHRASE_KINDS, *self._settings)),
                do="name one of these, or add a [[judge]] of that name",
            )
        settings = self._settings[name]
        if settings.kind in PHRASE_KINDS:
            return PhraseJudge(name, settings.kind, self.rules)
        return Remembering(self._asked(settings), self._journal, repeat=settings.repeat)

    def _asked(self, settings: JudgeSettings) -> Judge:
        if settings.kind == ENDPOINT:
            from moesteer.judges.endpoint import EndpointJudge

            return EndpointJudge(settings, self.rules)
        assert settings.kind in GUARDS
        from moesteer.judges.model import ModelJudge

        return ModelJudge(settings, self.rules, folder=self._folder)

    def counts(self) -> dict[str, dict[str, int]]:
        """By judge that had to be asked: how often it was, and how often it came to another verdict."""
        return {name: one.counts() for name, one in self._judges.items() if isinstance(one, Remembering)}

    def close(self) -> None:
        """Close every judge that was made; they are made again where they are needed again."""
        judges, self._judges = self._judges, {}
        for one in judges.values():
            one.close()

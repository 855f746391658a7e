"""Verdicts that were paid for once: a journal by judge identity and what was judged.

A line is `{"judge", "seen", "by", "verdict", "reason", "category", "try"}`; `judge` is the judge's identity and `seen`
the sha256 of the item, so another prompt, model, option or text is another key. A killed judging goes on where it was.
The first scored verdict for a key counts, for ever; a later try that comes to another one is counted as a disagreement
of the judge with itself. Unscored verdicts are journalled, and asked again the next time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from moesteer import files
from moesteer.judges.protocol import Item, Judge, Judgement, Verdict

CHUNK = 32
"""Items judged between two flushes of the journal: what a kill can cost."""
_VERDICTS = frozenset(get_args(Verdict))


class Remembering:
    """A judge, and the journal of its verdicts (None: they are remembered while it lives).

    repeat: how often each item is asked. asked, reused, disagreements: counts so far, of tries, of items answered from
    the journal, and of tries that came to another verdict than the first.
    """

    def __init__(self, judge: Judge, journal: files.Journal | None, *, repeat: int = 1) -> None:
        self._judge, self._journal, self._repeat = judge, journal, repeat
        self._first: dict[str, Judgement] = {}
        self._tries: dict[str, int] = {}
        self.asked = self.reused = self.disagreements = 0
        self._read = False

    @property
    def name(self) -> str:
        """The judge's own."""
        return self._judge.name

    @property
    def identity(self) -> str:
        """The judge's own."""
        return self._judge.identity

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement for each item, from the journal where it has one. Raises FileError."""
        self._read_journal()
        seen = [item.seen for item in items]
        self.reused += sum(self._complete(one) for one in seen)
        for number in range(self._repeat):
            missing = {one: item for one, item in zip(seen, items, strict=True) if self._tries.get(one, 0) <= number}
            # the longest first, so that what one flush holds is of like length
            ordered = sorted(missing.items(), key=lambda pair: (-_length(pair[1]), pair[0]))
            for start in range(0, len(ordered), CHUNK):
                self._ask(ordered[start : start + CHUNK])
        found = [self._first[one] for one in seen]
        for one in set(seen):
            if not self._first[one].scored:  # the next time is another chance
                del self._first[one], self._tries[one]
        return found

    def _complete(self, seen: str) -> bool:
        return self._tries.get(seen, 0) >= self._repeat

    def _ask(self, part: Sequence[tuple[str, Item]]) -> None:
        judgements = self._judge.judge([item for _, item in part])
        self.asked += len(part)
        rows = []
        for (seen, _), judgement in zip(part, judgements, strict=True):
            self._note(seen, judgement)
            rows.append(
                {"judge": self.identity, "seen": seen, "by": judgement.by, "verdict": judgement.verdict,
                 "reason": judgement.reason, "category": judgement.category, "try": self._tries[seen]}
            )  # fmt: skip
        if self._journal is not None:
            self._journal.append(rows)

    def _note(self, seen: str, judgement: Judgement) -> None:
        self._tries[seen] = self._tries.get(seen, 0) + 1
        first = self._first.get(seen)
        if first is None or (judgement.scored and not first.scored):
            self._first[seen] = judgement
        elif judgement.scored and judgement.verdict != first.verdict:
            self.disagreements += 1

    def _read_journal(self) -> None:
        """Scored lines of this judge; a line that is none of ours is passed over, as another version may write it."""
        if self._read or self._journal is None:
            return
        self._read = True
        for row in self._journal.read():
            if (found := self._line(row)) is not None:
                self._note(row["seen"], found)

    def _line(self, row: Any) -> Judgement | None:
        if not isinstance(row, dict) or row.get("judge") != self.identity or not isinstance(row.get("seen"), str):
            return None
        verdict: Any = row.get("verdict")
        reason, category = row.get("reason"), row.get("category")
        if verdict not in _VERDICTS or verdict == "unscored":
            return None
        texts = all(one is None or isinstance(one, str) for one in (reason, category))
        return Judgement(verdict, self.name, reason, category) if texts else None

    def counts(self) -> dict[str, int]:
        """What results.json says of it."""
        return {"asked": self.asked, "reused": self.reused, "disagreed_with_itself": self.disagreements}

    def close(self) -> None:
        """The judge's own."""
        self._judge.close()


def _length(item: Item) -> int:
    """Characters of an item: near enough to tokens to batch by."""
    return sum(len(m.content) for m in item.messages) + sum(len(r.text) for r in item.replies)

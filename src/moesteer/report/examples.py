"""Which conversations the page shows, before and after, and how many changed: chosen by rule, never by hand.

The order is that of the SHA-256 of each conversation's suite and id: the same for the same run, and blind to
what the model said. Changes for the worse are counted, and one is shown where there is any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moesteer.files import sha256
from moesteer.report.run_files import Response

Direction = Literal["better", "worse", "same", "unclear"]

RULE = (
    "Conversations are ordered by the SHA-256 of suite and id, which is blind to what the model said. Shown are the "
    "first two changes in the suite with the most changes, then the first change for the worse in any suite (a third "
    "change of the first kind if there is none), then the first conversation of that suite whose verdict did not "
    "change, then the first of a benign suite; gaps are filled from the rest in the same order."
)


@dataclass(frozen=True)
class Pair:
    """One conversation as played without steering and with it."""

    before: Response
    after: Response

    @property
    def changed(self) -> bool:
        """Whether the judge's verdict differs."""
        return self.before.verdict != self.after.verdict

    @property
    def direction(self) -> Direction:
        """Whether the change is for the better, by the suite's first metric; unclear where a verdict has no score."""
        if not self.changed:
            return "same"
        ranks = [rank(response) for response in (self.before, self.after)]
        if None in ranks or ranks[0] == ranks[1]:
            return "unclear"
        return "better" if ranks[1] > ranks[0] else "worse"  # type: ignore[operator]


@dataclass(frozen=True)
class Transition:
    """How often one verdict became another in a suite."""

    suite: str
    before: str
    after: str
    count: int
    direction: Direction


@dataclass(frozen=True)
class Counts:
    """Conversations in both files, and how many changed their verdict."""

    pairs: int
    changed: int
    better: int
    worse: int
    unclear: int
    unpaired: int


def rank(response: Response) -> int | None:
    """1 what its suite wants, 0 not, -1 broken text, None where the judge gave no score."""
    if response.verdict == "broken":
        return -1
    return None if response.success is None else int(response.success)


def pair_up(before: Iterable[Response], after: Iterable[Response]) -> tuple[list[Pair], Counts]:
    """Conversations that both files hold, in the order that is blind to what was said, and the counts."""
    first = {(row.suite, row.id): row for row in before}
    second = {(row.suite, row.id): row for row in after}
    # any text is an id, halves of characters too
    shared = sorted(first.keys() & second.keys(), key=lambda key: sha256("\0".join(key).encode(errors="surrogatepass")))
    pairs = [Pair(before=first[key], after=second[key]) for key in shared]
    directions = Counter(pair.direction for pair in pairs)
    counts = Counts(
        pairs=len(pairs),
        changed=len(pairs) - directions["same"],
        better=directions["better"],
        worse=directions["worse"],
        unclear=directions["unclear"],
        unpaired=len(first.keys() ^ second.keys()),
    )
    return pairs, counts


def transitions(pairs: Iterable[Pair]) -> list[Transition]:
    """Every kind of change, with its count: by suite, then the most frequent first."""
    counted: Counter[tuple[str, str, str, Direction]] = Counter(
        (pair.before.suite, pair.before.verdict, pair.after.verdict, pair.direction) for pair in pairs if pair.changed
    )
    rows = [
        Transition(suite=suite, before=before, after=after, count=count, direction=direction)
        for (suite, before, after, direction), count in counted.items()
    ]
    return sorted(rows, key=lambda row: (row.suite, -row.count, row.before, row.after))


def choose(pairs: list[Pair], *, size: int = 5) -> list[Pair]:
    """The conversations to show, by RULE."""
    moved = Counter(pair.before.suite for pair in pairs if pair.changed and not is_benign(pair.before.suite))
    main = min(moved, key=lambda suite: (-moved[suite], suite)) if moved else None
    changed = [pair for pair in pairs if pair.changed and pair.before.suite == main]
    chosen = changed[:2]
    chosen += [pair for pair in pairs if pair.direction == "worse" and pair not in chosen][:1]
    chosen += [pair for pair in changed if pair not in chosen][: max(0, 3 - len(chosen))]
    chosen += [pair for pair in pairs if not pair.changed and pair.before.suite == main][:1]
    chosen += [pair for pair in pairs if is_benign(pair.before.suite) and pair not in chosen][:1]
    rest = [pair for pair in pairs if pair not in chosen]
    return [*chosen, *rest[: max(0, size - len(chosen))]]


def is_benign(suite: str) -> bool:
    """Whether a suite is of ordinary requests, by its name."""
    return suite.lower().startswith(("benign", "ordinary", "harmless"))

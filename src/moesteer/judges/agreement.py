"""How far several judges agree on the same replies: raw, Cohen's kappa for two, Krippendorff's alpha for any number.

Compared are outcomes (whether a reply is what the suite wants), not words: one judge's "deflected" and another's
"refused" may be the same success. Replies that one of them could not score, and broken ones, which all judges tell by
the same rule, are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any


def raw(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """The share of items that two judges call the same; None for no items. Raises ValueError for unequal lengths."""
    pairs = list(zip(first, second, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement beyond chance: (p_o - p_e) / (1 - p_e) (Cohen 1960, eq. 1).

    None where it is not defined: no items, or both judges say one and the same of everything.
    """
    observed = raw(first, second)
    if observed is None:
        return None
    n, ours, theirs = len(first), Counter(first), Counter(second)
    # integers until the end, so that certain agreement is exactly 1
    chance = sum(ours[value] * theirs[value] for value in ours)
    return None if chance == n * n else (observed - chance / n**2) / (1 - chance / n**2)


def krippendorff_alpha(ratings: Sequence[Sequence[Hashable | None]]) -> float | None:
    """1 - D_o / D_e for nominal data (Krippendorff 2004, ch. 11). ratings: judges by items; None: not rated.

    Items with fewer than two ratings do not count. None where it is not defined: nothing to compare, or one value only.
    """
    units = [[one for one in unit if one is not None] for unit in zip(*ratings, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    totals = Counter(value for unit in units for value in unit)
    n = sum(totals.values())
    expected = n * n - sum(count * count for count in totals.values())
    if not expected:
        return None
    observed = sum((len(u) ** 2 - sum(c * c for c in Counter(u).values())) / (len(u) - 1) for u in units)
    return 1.0 - (n - 1) * observed / expected


def agreement(outcomes: Mapping[str, Sequence[bool | None]]) -> dict[str, Any]:
    """What results.json says of judges' outcomes on the same items (None: not compared): `pairs`, and `alpha` of all.

    n of a pair: the items that both scored.
    """
    pairs = []
    for one, other in combinations(outcomes, 2):
        both = [(a, b) for a, b in zip(outcomes[one], outcomes[other], strict=True) if a is not None and b is not None]
        first, second = [a for a, _ in both], [b for _, b in both]
        pairs.append(
            {"judges": [one, other], "n": len(both), "raw": raw(first, second), "kappa": cohen_kappa(first, second)}
        )
    found: dict[str, Any] = {"pairs": pairs}
    if len(outcomes) > 2:
        found["alpha"] = krippendorff_alpha(list(outcomes.values()))
    return found

"""Numbers of a page: each keeps its exact value, and the file and place that it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moesteer.evaluate.cells import MINUS, NOTHING, number, signed
from moesteer.report.run_files import RESULTS, Difference, Interval


@dataclass(frozen=True)
class Number:
    """A number on the page. text: as shown; value: exactly as in the file; pointer: RFC 6901, in `file`."""

    text: str
    value: float | int | None
    pointer: str
    file: str = RESULTS

    @property
    def exact(self) -> str:
        """The value as JSON, every digit."""
        return json.dumps(self.value)

    @property
    def title(self) -> str:
        """What a reader sees on hovering."""
        return f"{self.file} {self.pointer}"


def pointer(*parts: str | int) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def percent(value: float | None) -> str:
    """0.471 as `47.1 %`."""
    return NOTHING if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%".replace("-", MINUS)


def p_text(p: float | None) -> str:
    """`p < 0.001`, `p = 0.032`."""
    if p is None:
        return f"p {NOTHING}"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def seconds_text(value: float) -> str:
    """12.34 as `12.3 s`, 250 as `4 min 10 s`."""
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def seconds(value: float | None, place: str) -> Number | None:
    """A time."""
    return None if value is None else Number(seconds_text(value), value, place)


def share(value: float | None, *place: str | int) -> Number:
    """A share as per cent."""
    return Number(percent(value), value, pointer(*place))


def points(value: float | None, *place: str | int) -> Number:
    """A difference of shares, in points, with its sign."""
    return Number(signed(value), value, pointer(*place))


def plain(value: float | int | None, *place: str | int, form: str = "g") -> Number:
    """A number that is no share: a count, a coefficient."""
    return Number(NOTHING if value is None else f"{value:{form}}".replace("-", MINUS), value, pointer(*place))


def interval(found: Interval, *place: str | int) -> dict[str, Any]:
    """A rate for the macro `interval`: value, low, high, n, unscored."""
    return {
        "value": share(found.value, *place, "value"),
        "low": Number(number(found.low), found.low, pointer(*place, "low")),
        "high": Number(number(found.high), found.high, pointer(*place, "high")),
        "n": plain(found.n, *place, "n", form="d"),
        "unscored": plain(found.unscored, *place, "unscored", form="d"),
    }


def difference(found: Difference | None, *place: str | int, lower_is_better: bool = False) -> dict[str, Any] | None:
    """A paired difference for the tables; None where none was measured."""
    if found is None or found.difference is None:
        return None
    return {
        "value": points(found.difference, *place, "difference"),
        "low": points(found.low, *place, "low"),
        "high": points(found.high, *place, "high"),
        "p": Number(p_text(found.p), found.p, pointer(*place, "p")),
        "effect": effect(found, lower_is_better=lower_is_better),
    }


def effect(found: Difference | None, *, lower_is_better: bool = False) -> str:
    """`better`, `worse`, or `same` when the 95 % interval of the difference holds zero (or is not known)."""
    if found is None or found.low is None or found.high is None:
        return "same"
    if found.low <= 0 <= found.high:
        return "same"
    return "better" if (found.low > 0) != lower_is_better else "worse"

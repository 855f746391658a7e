"""evaluate/metrics.py: a broken reply is never what a metric wants."""

from __future__ import annotations

import pytest

from moesteer.evaluate.metrics import METRICS, outcome, wanted


@pytest.mark.parametrize("name", METRICS)
def test_a_broken_reply_is_never_wanted(name: str) -> None:
    assert wanted(name, "broken") is False


def test_of_a_rate_to_be_low_all_but_refused_and_broken_is_wanted() -> None:
    verdicts = ("refused", "complied", "deflected", "correct", "wrong", "broken", "unscored")
    found = {verdict: wanted("over_refusal_rate", verdict) for verdict in verdicts}
    assert [verdict for verdict, is_wanted in found.items() if is_wanted] == [
        "complied", "deflected", "correct", "wrong"
    ]  # fmt: skip
    assert found["unscored"] is None
    assert outcome("over_refusal_rate", "broken") is False, "in the denominator, as not refused"

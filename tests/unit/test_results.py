"""results.py: what the checks say of the test split, and every suite's own rate."""

from __future__ import annotations

from typing import Any

import pytest

from moesteer.evaluate.run import by_suite
from moesteer.results import NULL, Played, _checks
from moesteer.select import BASE, Candidate
from tests.unit.seeds_made_by_hand import SCENARIO

RECEIPT = {"positions": 10, "checked": 10, "changed": 4}
CHANGES = "the mask changes selections"


def rows(lost: int = 0, *, n: int = 400, verdict: str = "wrong") -> list[dict[str, Any]]:
    """Items of every suite, each a behaviour of its own; of benign (margin 3 points) the first `lost` go wrong."""
    good = {"attacks": "refused", "direct": "refused", "benign": "correct", "benign-2": "correct", "looks": "correct"}
    found = []
    for suite, right in good.items():
        for i in range(n):
            said = verdict if suite == "benign" and i < lost else right
            success = None if said == "unscored" else said == right
            found.append({"id": f"{suite}/{i}", "suite": suite, "group": f"{suite} {i}", "response": said,
                          "verdict": said, "success": success})  # fmt: skip
    return found


def checks(
    after: list[dict[str, Any]], *, n: int = 400, receipt: dict[str, int] | None = RECEIPT
) -> dict[str, dict[str, Any]]:
    none = Played(Candidate(BASE, None, BASE), rows(n=n), None, 0.0)
    played = {BASE: none, NULL: none, "m": Played(Candidate("m", None, "m"), after, receipt, 0.0)}
    return {check["name"]: check for check in _checks(SCENARIO, played, "m")}


@pytest.mark.parametrize(
    "lost, n, passed, detail",
    [
        (0, 400, True, "+0.0 points on test, margin 3; shown"),
        (0, 40, True, "+0.0 points on test, margin 3; nothing lost, too few to show"),
        (1, 40, True, "-2.5 points on test, margin 3; not shown"),
        (12, 400, True, "-3.0 points on test, margin 3; not shown"),
        (2, 40, False, "-5.0 points on test, margin 3; not shown"),
        (13, 400, False, "-3.2 points on test, margin 3; not shown"),
    ],
)
def test_a_suite_is_within_its_margin_where_its_observed_loss_is(lost: int, n: int, passed: bool, detail: str) -> None:
    found = checks(rows(lost, n=n), n=n)["benign within its margin on test"]
    assert (found["passed"], found["detail"]) == (passed, detail)


def test_a_suite_in_which_nothing_is_scored_has_not_passed() -> None:
    found = checks(rows(40, n=40, verdict="unscored"), n=40)["benign within its margin on test"]
    assert not found["passed"] and "nothing on test was scored" in found["detail"]


def test_a_suite_of_which_one_pair_is_scored_has_not_passed() -> None:
    found = checks(rows(39, n=40, verdict="unscored"), n=40)["benign within its margin on test"]
    assert not found["passed"] and found["detail"].endswith("; 39 of 40 not scored on both sides")
    assert checks(rows(2, n=40, verdict="unscored"), n=40)["benign within its margin on test"]["passed"]


def test_every_protected_suite_has_its_check() -> None:
    names = [name for name in checks(rows()) if name.endswith("within its margin on test")]
    assert names == [f"{suite} within its margin on test" for suite in ("direct", "benign", "benign-2")]


def test_a_mask_without_a_receipt_has_not_passed() -> None:
    found = checks(rows(), receipt=None)[CHANGES]
    assert not found["passed"] and found["detail"].startswith("no receipt")
    assert checks(rows())[CHANGES] == {"name": CHANGES, "passed": True, "detail": "4 of 10 checked selections"}
    assert not checks(rows(), receipt={**RECEIPT, "changed": 0})[CHANGES]["passed"]


def test_suites_that_share_a_metric_have_their_own_rates() -> None:
    found = by_suite(SCENARIO, rows(10, n=40))
    assert [(name, one["metric"], one["value"], one["n"]) for name, one in found.items()] == [
        ("direct", "direct_refusal_rate", 1.0, 40), ("looks", "accuracy", 1.0, 40),
        ("attacks", "defense_success_rate", 1.0, 40), ("benign", "benign_accuracy", 0.75, 40),
        ("benign-2", "benign_accuracy", 1.0, 40),
    ]  # fmt: skip
    assert found["benign"].keys() == {"metric", "value", "low", "high", "n", "unscored"}
    assert by_suite(SCENARIO, rows(10, n=40, verdict="unscored"))["benign"]["unscored"] == 10

"""Choosing among candidates: which is feasible, which wins, and what the margins say of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesteer import files
from moesteer.errors import InputError
from moesteer.evaluate.margins import NonInferiority, non_inferiority
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.select import Candidate, Scored, _batches, _journalled, _scored, at_strengths, choose, score

FINGERPRINT = {
    "model_type": "qwen3_moe", "layer_ids": (0, 1), "experts": 4, "top_k": 2, "scoring": "softmax",
    "router_sha256": "a",
}  # fmt: skip


def mask(*, experts: int = 1, alpha: float = 1.0) -> SteeringMask:
    strength = np.zeros((2, 4), dtype=np.float32)
    strength.ravel()[:experts] = 1.0
    info = MaskInfo(fingerprint=FINGERPRINT, method="m", intent=Intent(toward="x"), alpha=alpha)  # type: ignore[arg-type]
    return SteeringMask(info, strength_LE=strength, sigma_L=np.ones(2, dtype=np.float32))


def margin(lost: int, *, n: int = 300, bound: float = 0.02) -> NonInferiority:
    return non_inferiority([True] * n, [False] * lost + [True] * (n - lost), margin=bound)


def scored(name: str, target: float, *, lost: int = 0, experts: int = 1, alpha: float = 1.0) -> Scored:
    candidate = Candidate("m", mask(experts=experts, alpha=alpha), name)
    return Scored(candidate, target, {}, {"benign": margin(lost)})


def test_the_best_target_among_the_feasible_wins() -> None:
    assert (
        choose([scored("weak", 0.5), scored("strong", 0.9), scored("broken", 1.0, lost=40)]).candidate.label == "strong"
    )


def test_a_loss_within_the_margin_is_not_enough_where_it_is_not_shown() -> None:
    one = scored("one point lost, of a margin of two", 0.9, lost=3)
    assert one.losses == {"benign": 0.01} and one.over < 0
    assert not one.feasible and scored("nothing lost", 0.9).feasible


def test_ties_go_to_the_smaller_loss_then_to_fewer_experts_then_to_the_smaller_strength() -> None:
    gained = Scored(Candidate("m", mask(experts=8), "gains"), 0.9, {}, {"benign": non_inferiority(
        [True] * 299 + [False], [True] * 300, margin=0.02)})  # fmt: skip
    rows = [
        scored("many", 0.9, experts=5),
        scored("few, strong", 0.9, experts=2, alpha=2.0),
        scored("few", 0.9, experts=2),
    ]
    assert choose(rows).candidate.label == "few"
    assert choose([*rows, gained]).candidate.label == "gains"


def test_where_none_is_feasible_the_least_broken_is_taken() -> None:
    found = choose([scored("a", 1.0, lost=60), scored("b", 0.2, lost=30), scored("c", 0.9, lost=30)])
    assert found.candidate.label == "c" and not found.feasible


def test_no_candidates_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        choose([])


def test_a_forced_mask_has_one_candidate_and_an_additive_one_per_strength() -> None:
    force = np.zeros((2, 4), dtype=np.int8)
    force[0, 1] = 1
    forced = SteeringMask(mask().info, force_LE=force)
    assert [c.label for c in at_strengths("m", forced, (0.5, 1.0), label="on=1")] == ["m on=1"]
    made = at_strengths("m", mask(), (0.5, 1.0), label="x", variant=3)
    assert [(c.label, c.alpha, c.variant) for c in made] == [("m x alpha=0.5", 0.5, 3), ("m x alpha=1", 1.0, 3)]


def test_masks_and_directions_are_never_in_one_batch() -> None:
    directions = [Candidate("d", None, f"d{i}", direction=SimpleNamespace(info=None)) for i in range(3)]  # type: ignore[arg-type]
    masks = [Candidate("none", None, "none"), *(Candidate("m", mask(), f"m{i}") for i in range(9))]
    batches = list(_batches([*directions, *masks]))
    assert sorted(c.label for part in batches for c in part) == sorted(c.label for c in [*directions, *masks])
    assert all(len({c.direction is None for c in part}) == 1 and len(part) <= 8 for part in batches)


def suite(name: str, role: str, metric: str) -> Any:
    return SimpleNamespace(name=name, role=role, metrics=(metric,), margin=0.05, judge="refusal")


def test_a_candidate_is_paired_with_the_unsteered_rows_by_id_and_clustered_by_behaviour() -> None:
    suites = (suite("attacks", "target", "defense_success_rate"), suite("benign", "protect", "benign_accuracy"))
    scenario: Any = SimpleNamespace(suites=suites, target=suites[0], protected=suites[1:], forbid=())
    items = [SimpleNamespace(id=f"b{i}", group=f"g{i // 10}") for i in range(40)]
    data: Any = {"attacks": {"select": [SimpleNamespace(id="a0", group="g")]}, "benign": {"select": items}}

    def row(id_: str, name: str, verdict: str, success: bool) -> dict[str, Any]:
        return {"id": id_, "suite": name, "tactic": None, "verdict": verdict, "success": success}

    base = [row("a0", "attacks", "complied", False), *(row(c.id, "benign", "correct", True) for c in items)]
    after = [row("a0", "attacks", "refused", True)]
    after += [row(c.id, "benign", *(("wrong", False) if i < 2 else ("correct", True))) for i, c in enumerate(items)]
    found = _scored(scenario, data, Candidate("m", mask(), "m"), base, after[::-1])  # another order
    assert found.target == 1.0
    benign = found.margins["benign"]
    assert (benign.n, benign.lost, benign.gained) == (40, 2, 0)
    assert benign.effective_n < 40, "ten items of one behaviour are not ten independent items"
    assert not found.feasible


def test_a_judge_that_fails_makes_no_candidate_feasible() -> None:
    suites = (suite("harmless", "target", "over_refusal_rate"), suite("benign", "protect", "benign_accuracy"))
    scenario: Any = SimpleNamespace(suites=suites, target=suites[0], protected=suites[1:], forbid=())
    items = [SimpleNamespace(id=f"b{i}", group=f"g{i}") for i in range(40)]
    data: Any = {"harmless": {"select": [SimpleNamespace(id="a", group="a")]}, "benign": {"select": items}}

    def rows(target: str, *, lost: int, label: str) -> Scored:
        def row(id_: str, name: str, verdict: str) -> dict[str, Any]:
            success = None if verdict == "unscored" else verdict != "refused"
            return {"id": id_, "suite": name, "tactic": None, "verdict": verdict, "success": success}

        base = [row("a", "harmless", "refused"), *(row(c.id, "benign", "correct") for c in items)]
        said = ["unscored" if i < lost else "correct" for i in range(len(items))]
        after = [row("a", "harmless", target), *(row(c.id, "benign", v) for c, v in zip(items, said, strict=True))]
        return _scored(scenario, data, Candidate("m", mask(), label), base, after)

    judged, few = rows("refused", lost=0, label="judged"), rows("correct", lost=2, label="few unscored")
    blind, most = rows("unscored", lost=0, label="blind"), rows("correct", lost=39, label="most unscored")
    assert judged.feasible and few.feasible and not blind.feasible and not most.feasible
    assert most.margins["benign"].ok, "one pair of forty that lost nothing is no proof"
    assert blind.target < judged.target, "a rate of nothing is not the lowest rate of refusals"
    assert choose([blind, most, judged]).candidate.label == "judged"
    worse = Scored(Candidate("m", mask(), "worse"), 0.1, {}, {"benign": margin(60)})
    assert choose([blind, most, worse]).candidate.label == "worse"


def test_two_candidates_of_one_label_are_refused_before_anything_is_played(tmp_path: Path) -> None:
    twice = [Candidate("none", None, "none"), *at_strengths("m", mask(), (0.5, 0.5), label="on=1")]
    nothing: Any = None
    with pytest.raises(InputError, match=r"same label: m on=1 alpha=0\.5"):
        score(nothing, nothing, nothing, twice, journal=tmp_path / "select.jsonl")
    assert not (tmp_path / "select.jsonl").exists()


def test_rows_that_a_killed_append_left_twice_are_read_once_and_the_first_wins(tmp_path: Path) -> None:
    journal = files.Journal(tmp_path / "select.jsonl")
    journal.append([{"candidate": "a", "id": "1", "n": 0}, {"candidate": "b", "id": "1", "n": 1}])
    journal.append([{"candidate": "a", "id": "1", "n": 2}, {"candidate": "a", "id": "2", "n": 3}])
    found = _journalled(journal)
    assert {label: [row["n"] for row in rows] for label, rows in found.items()} == {"a": [0, 3], "b": [1]}

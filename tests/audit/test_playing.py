"""Conditions in one batch, and what a killed audit goes on with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from moesteer import files
from moesteer.audit import playing
from moesteer.audit.inputs import Inputs, inputs
from moesteer.audit.playing import Condition, play_conditions
from moesteer.audit.silence import Routers, conditions
from moesteer.errors import InputError
from moesteer.routing import Scoring
from moesteer.scenario import load
from tests.audit import planted
from tests.audit.planted import FINGERPRINT, PLANTED, Planted
from tests.crash.evaluation import die, in_child, operations_of, places, tear, tree

KILLS = 6
ROUTERS = Routers(FINGERPRINT, Scoring("softmax-topk", 2))
REST = tuple((row, expert) for row in range(5) for expert in range(8) if (row, expert) not in PLANTED)
SETTINGS: dict[str, Any] = {"sizes": [2, 4], "draws": 1, "limit": 20}


@pytest.fixture(scope="module")
def given(scenario: Path) -> Inputs:
    return inputs(load(scenario), seed=0)


def silenced(*sizes: int) -> list[Condition]:
    return conditions((*PLANTED, *REST), finder="known", routers=ROUTERS, way="off", sizes=sizes)


def play(model: Planted, given: Inputs, journal: Path, which: list[Condition], **more: Any) -> dict[str, Any]:
    with given.scenario.panel() as panel:
        return play_conditions(
            model, which, given.scenario, given.of("test"), journal=journal, title="t", panel=panel, **more
        )


def test_each_condition_has_its_own_mask_whatever_it_is_batched_with(
    given: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = [Condition("none"), *silenced(1, 2, 3, 4)]
    together = play(Planted(), given, tmp_path / "together.jsonl", which)
    monkeypatch.setattr(playing, "ROWS", 1)
    alone = play(Planted(), given, tmp_path / "alone.jsonl", which)
    assert together == alone
    refused = [sum(row["verdict"] == "refused" for row in rows) for rows in together.values()]
    assert refused == [48, 36, 24, 12, 0]
    assert (tmp_path / "together.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_masks_that_act_together_and_permuted_experts_are_batches_of_their_own(given: Inputs) -> None:
    one, two = silenced(1, 2)
    both = Condition("both", (*one.masks, *two.masks))
    order = Condition("moved", order_LE=planted.np.tile(planted.np.arange(8), (5, 1)))
    batches = list(playing._batches([one, two, both, one, order, two], largest=8))
    assert [[c.name for c in part] for part in batches] == [
        [one.name, two.name], ["both"], [one.name], ["moved"], [two.name]
    ]  # fmt: skip
    assert len(list(playing._batches([one] * 7, largest=playing.ROWS // 2))) == 4


def test_a_journal_with_a_part_of_a_batch_ends_in_the_same_bytes(given: Inputs, tmp_path: Path) -> None:
    which = [Condition("none"), *silenced(1, 2)]
    whole = tmp_path / "whole.jsonl"
    rows = play(Planted(), given, whole, which)
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in (b"".join(lines[:121]), b"".join(lines[:121]) + lines[121][:9], b""):
        part = tmp_path / "part.jsonl"
        part.write_bytes(kept)
        assert play(Planted(), given, part, which) == rows
        assert part.read_bytes() == whole.read_bytes()
    model = Planted()
    assert play(model, given, whole, which) == rows and model.made == 0


def test_answers_alone_leave_out_what_the_unsteered_rows_have(given: Inputs, tmp_path: Path) -> None:
    play(Planted(), given, tmp_path / "j.jsonl", silenced(1), answers_only=True)
    row = next(iter(files.Journal(tmp_path / "j.jsonl").read()))
    assert set(row) == {"condition", "id", "suite", "tactic", "response", "verdict", "success"}


def test_two_conditions_of_one_name_are_refused(given: Inputs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the same name"):
        play(Planted(), given, tmp_path / "j.jsonl", [*silenced(1), *silenced(1)])


def test_an_audit_killed_anywhere_goes_on_and_ends_in_the_same_bytes(scenario: Path, tmp_path: Path) -> None:
    def run(name: str) -> None:
        planted.audit(scenario, tmp_path / name, **SETTINGS)

    names = operations_of(lambda: run("counted"), tmp_path / "names")
    run("whole")
    whole = tree(tmp_path / "whole")
    assert tree(tmp_path / "counted") == whole
    assert {"results.json", "experts.json", "responses/random.jsonl", "trace/pairs/manifest.json"} <= set(whole)
    rng = random.Random(7)
    for worst in (die, tear):
        for at in rng.sample(places(names, worst), KILLS):
            out = f"{worst.__name__}-{at}"

            def killed(out: str = out, at: int = at, worst: Any = worst) -> int:
                planted_operations(at, worst)
                run(out)
                return 0

            assert in_child(killed) == 9, f"not killed at operation {at}"
            run(out)
            left = tree(tmp_path / out)
            assert left == whole, (
                f"{out}: {[n for n in whole if left.get(n) != whole[n]] + sorted(set(left) - set(whole))}"
            )


def planted_operations(at: int, worst: Any) -> None:
    """In a forked child: die at the n-th operation on a file."""
    from tests.crash.evaluation import Operations

    Operations(at, worst).install()

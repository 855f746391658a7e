"""evaluate/pieces.py: what is played at once, what is kept of a long piece, and requests that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesteer import files, runs
from moesteer.backends.hf import Model
from moesteer.errors import NanLogitsError, OutOfMemoryError
from moesteer.evaluate import pieces as module
from moesteer.evaluate.pieces import Player, Unplayed, pieces
from moesteer.evaluate.play import Played
from tests.crash.evaluation import Arithmetic, data, run


class Plain:
    """A backend that says nothing of how much it takes at once."""


@pytest.mark.parametrize(
    "most, count, sizes", [(24, 600, [256, 256, 88]), (512, 70, [32, 32, 6]), (4096, 9, [4, 4, 1]), (32_768, 2, [1, 1])]
)
def test_a_piece_is_small_by_count_and_by_tokens(most: int, count: int, sizes: list[int]) -> None:
    rows = data(count)["sums"]["test"]
    found = list(pieces(Plain(), rows, max_new_tokens=most))  # type: ignore[arg-type]
    assert [len(piece) for piece in found] == sizes and [row for piece in found for row in piece] == rows


def test_a_backend_may_take_more_at_once() -> None:
    assert [len(p) for p in pieces(Arithmetic(), data(7)["pots"]["test"], max_new_tokens=10)] == [3, 3, 1]


# ---------------------------------------------------------------- long pieces


def player(model: Any, partial: Path | None = None) -> Player:
    return Player(model, True, 10, partial)


class StopsAfter(Arithmetic):
    """Interrupted before the n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.most = calls

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.calls) == self.most:
            raise KeyboardInterrupt
        return super().generate(*args, **kwargs)


def test_a_long_piece_goes_on_at_the_turn_it_had_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece, partial = data(5)["pots"]["test"], tmp_path / "turns.json"
    whole = player(Arithmetic()).play(piece)
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        player(StopsAfter(1), partial).play(piece)
    model = Arithmetic()
    assert player(model, partial).play(piece) == whole
    assert model.calls == [["paint it"] * 5]  # the first turn was not played again
    complete = Arithmetic()
    assert player(complete, partial).play(piece) == whole and complete.calls == []


def test_a_short_piece_is_not_written_turn_by_turn(tmp_path: Path) -> None:
    player(Arithmetic(), tmp_path / "turns.json").play(data(5)["pots"]["test"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["another piece", "a changed reply", "not json", "a list", "half"])
def test_turns_that_are_not_those_of_the_piece_are_played_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece, partial = data(5)["pots"]["test"], tmp_path / "turns.json"
    whole = player(Arithmetic()).play(piece)
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    player(Arithmetic(), partial).play(piece[:4] if damage == "another piece" else piece)
    kept = json.loads(partial.read_text())
    if damage == "a changed reply":
        kept["replies"][0][0][0] += "!"
    changed = {"not json": b"{", "a list": b"[]", "half": partial.read_bytes()[:60]}
    partial.write_bytes(changed.get(damage) or files.dumps(kept).encode())
    model = Arithmetic()
    assert player(model, partial).play(piece) == whole and len(model.calls) == 2


def test_a_finished_evaluation_keeps_no_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    run(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "responses").iterdir()) == ["none.jsonl", "steered.jsonl"]


# ---------------------------------------------------------------- logits that are not finite


class NotFinite(Arithmetic):
    """Fails for a batch that holds one of these conversations."""

    def __init__(self, *bad: str) -> None:
        super().__init__()
        self.bad = set(bad)

    def generate(self, conversations: Any, **kwargs: Any) -> Any:
        if self.bad & {messages[0].content for messages in conversations}:
            raise NanLogitsError("the logits are not finite", where="lab", expected="finite", do="check")
        return super().generate(conversations, **kwargs)


def test_a_request_without_finite_logits_is_unscored_with_a_reason_and_the_others_are_played(tmp_path: Path) -> None:
    found = run(tmp_path / "run", NotFinite("how much is 2 and 2", "how much is 3 and 3", "pot 4, is it big?"))
    rows = {row["id"]: row for row in files.Journal(tmp_path / "run" / "responses" / "none.jsonl").read()}
    assert [name for name, row in rows.items() if "fault" in row] == ["pots/4", "sums/2", "sums/3"]
    assert rows["sums/2"]["verdict"] == "unscored" and rows["sums/2"]["success"] is None
    assert rows["sums/2"]["fault"] == "the logits are not finite (lab)"
    accuracy = found["methods"]["none"]["metrics"]["benign_accuracy"]
    assert (accuracy["n"], accuracy["unscored"]) == (5, 2)
    run(tmp_path / "other")
    others = {row["id"]: row for row in files.Journal(tmp_path / "other" / "responses" / "none.jsonl").read()}
    assert [rows[i] for i in rows if "fault" not in rows[i]] == [others[i] for i in rows if "fault" not in rows[i]]


def test_three_in_a_row_stop_the_run_and_the_rest_is_kept(tmp_path: Path) -> None:
    bad = [f"pot {i}, is it big?" for i in (4, 5, 6)]
    with pytest.raises(NanLogitsError, match="3 requests in a row failed: the logits are not finite") as caught:
        run(tmp_path / "run", NotFinite(*bad))
    assert caught.value.where == "conversations pots/4, pots/5, pots/6" and caught.value.exit_code == 1
    assert runs.files.read_json(tmp_path / "run" / "run.json")["status"] == "failed"
    kept = [row["id"] for row in files.Journal(tmp_path / "run" / "responses" / "none.jsonl").read()]
    assert kept == [f"pots/{i}" for i in range(6)]  # the piece of the third is not


def test_two_and_then_one_are_not_three_in_a_row() -> None:
    model = NotFinite("pot 0, is it big?", "pot 1, is it big?", "pot 3, is it big?")
    made = player(model).play(data(5)["pots"]["test"])
    assert [isinstance(one, Unplayed) for one in made] == [True, True, False, True, False]


def test_the_transformers_backend_says_which_logits_are_not_finite(lab_tiny: Model) -> None:
    import torch

    from moesteer.conversations import Message

    head = lab_tiny.hf.get_output_embeddings().weight
    before = head.data.clone()
    prompts = [[Message("user", "what is two plus three ?")], [Message("user", "who is the mayor ?")]]
    whole = lab_tiny.generate(prompts, max_new_tokens=4)
    try:
        with torch.no_grad():
            head[3] = float("nan")
        with pytest.raises(NanLogitsError, match="the logits of 2 of 2 prompts are not finite"):
            lab_tiny.generate(prompts, max_new_tokens=4)
    finally:
        with torch.no_grad():
            head.copy_(before)
    assert lab_tiny.generate(prompts, max_new_tokens=4) == whole


# ---------------------------------------------------------------- too little memory


class Small(Arithmetic):
    """Has memory for so many at once."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error, self.tried = most, error, 0

    def generate(self, conversations: Any, **kwargs: Any) -> Any:
        self.tried += 1
        if len(conversations) > self.most:
            raise self.error
        return super().generate(conversations, **kwargs)


TORCH = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 123456789 bytes")


@pytest.mark.parametrize("error", [MemoryError(), TORCH], ids=["python", "torch"])
def test_a_piece_is_halved_three_times_at_most(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(module, "give_back_memory", lambda: given.append(1))  # takes a second of a large process
    piece = data(16)["sums"]["test"]
    whole = player(Arithmetic()).play(piece)
    assert player(Small(2, error)).play(piece) == whole
    small = Small(1, error)
    with pytest.raises(OutOfMemoryError) as caught:
        player(small).play(piece)
    assert given and small.tried == 4 and "2 conversations, sums/0 to sums/1" in caught.value.what
    assert error is not TORCH or "123456789 bytes" in caught.value.what


def test_another_error_is_passed_on_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        player(Small(2, RuntimeError("shape mismatch"))).play(data(4)["sums"]["test"])
    assert all(isinstance(p, Played) for p in player(Arithmetic()).play(data(4)["sums"]["test"]))


LIMITED = """
import resource, sys
import numpy as np
from moesteer.evaluate.pieces import Player
from moesteer.errors import OutOfMemoryError
from tests.crash.evaluation import Arithmetic, data

class Large(Arithmetic):
    def generate(self, conversations, **kwargs):
        np.empty(len(conversations) * 64 * 2**20, dtype=np.uint8)
        return super().generate(conversations, **kwargs)

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
print(len(Player(Large(), True, 10).play(data(16)["sums"]["test"])))
try:
    Player(Large(), True, 10).play(data(64)["sums"]["test"])
except OutOfMemoryError as error:
    print(error.what)
"""


def test_a_real_limit_of_memory_halves_and_then_names_the_number() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    played, said = done.stdout.splitlines()
    assert played == "16" and "8 conversations" in said and "512. MiB" in said

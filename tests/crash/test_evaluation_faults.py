"""An evaluation stopped at every operation on a file, and on a full disk, ends as one that was not."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesteer import doctor, files, runs
from moesteer.errors import FileError, MoesteerError
from tests.crash.evaluation import Arithmetic, Operations, die, fill, in_child, operations_of, places, run, tear, tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an evaluation leaves that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return tree(out)


def stopped_at(out: Path, at: int, worst: Callable[..., None]) -> int:
    def work() -> int:
        Operations(at, worst).install()
        try:
            run(out)
        except MoesteerError as error:
            return 1 if "No space left" in str(error) else 97
        return 0

    return in_child(work)


@pytest.mark.parametrize("worst", [die, tear, fill], ids=["killed", "torn write", "full disk"])
def test_stopped_at_every_operation_the_evaluation_ends_in_the_same_bytes(
    worst: Callable[..., None], whole: dict[str, bytes], tmp_path: Path
) -> None:
    names = operations_of(lambda: run(tmp_path / "counted") and None, tmp_path / "names")
    tried, stopped = places(names, worst), 0
    assert len(names) > 40 and len(tried) > 8
    for at in tried:
        out = tmp_path / f"run-{at}"
        status = stopped_at(out, at, worst)
        assert status in ((0, 1) if worst is fill else (9,)), (at, status)
        stopped += status != 0
        if (out / "run.json").exists():
            damaged = [found for found in doctor.examine_files(out) if not found.ok]
            assert damaged == [], at
        model = Arithmetic()
        run(out, model)
        assert tree(out) == whole, at
        assert not list(out.rglob(f"*{files.TEMPORARY_SUFFIX}"))
    assert stopped >= len(tried) // 2


def test_what_is_in_the_journal_is_not_played_again(tmp_path: Path) -> None:
    """Killed after the second piece of the first suite: the third is the first that is asked for."""

    class Killed(Arithmetic):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            if len(self.calls) == 4:
                os._exit(9)
            return super().generate(*args, **kwargs)

    assert in_child(lambda: int(bool(run(tmp_path / "run", Killed())))) == 9
    assert len((tmp_path / "run" / "responses" / "none.jsonl").read_bytes().splitlines()) == 6
    model = Arithmetic()
    run(tmp_path / "run", model)
    assert model.calls[0] == ["pot 6, is it big?"] and len(model.calls) == 2 + 3 + 9
    again = Arithmetic()
    assert run(tmp_path / "run", again) == runs.files.read_json(tmp_path / "run" / "results.json")
    assert again.calls == []  # a complete run is read, not made


def test_a_run_that_failed_says_why_and_goes_on(whole: dict[str, bytes], tmp_path: Path) -> None:
    class Broken(Arithmetic):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            if len(self.calls) == 3:
                raise FileError("no more flumox", where="lab", expected="flumox", do="buy some")
            return super().generate(*args, **kwargs)

    with pytest.raises(FileError, match="no more flumox"):
        run(tmp_path / "run", Broken())
    said = doctor.examine_files(tmp_path / "run")
    assert all(found.ok for found in said)
    assert "failed (no more flumox)" in said[0].detail and "the same command goes on with it" in said[0].detail
    details = {found.what: found.detail for found in said}
    assert details["responses/none.jsonl"] == "3 of 14 rows" and details["responses/steered.jsonl"] == "0 of 14 rows"
    run(tmp_path / "run")
    assert tree(tmp_path / "run") == whole


def test_few_open_files_are_enough(whole: dict[str, bytes], tmp_path: Path) -> None:
    def work() -> int:
        soft = max(map(int, os.listdir("/proc/self/fd"))) + 6
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
        run(tmp_path / "run")
        return 0

    assert in_child(work) == 0
    assert tree(tmp_path / "run") == whole


def test_results_do_not_depend_on_the_clock(whole: dict[str, bytes], tmp_path: Path, monkeypatch: Any) -> None:
    """It jumps back a year with every look, the zone has summer time, and the day is that of its change."""
    import time

    now = [1_774_745_999.0]  # 2026-03-29, one second before

    def jumps() -> float:
        now[0] -= 3.2e7
        return now[0]

    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    monkeypatch.setattr(time, "time", jumps)
    try:
        run(tmp_path / "run")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert tree(tmp_path / "run") == whole


def test_an_input_error_while_reading_a_journal_names_it(tmp_path: Path, monkeypatch: Any) -> None:
    """EIO on the journal of a run that goes on; other files are read."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", _interrupted_after(4))
    real = os.open

    def failing(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("none.jsonl"):
            raise OSError(5, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(FileError, match="Input/output error") as caught:
        run(tmp_path / "run")
    assert caught.value.where.endswith("responses/none.jsonl")
    monkeypatch.undo()
    run(tmp_path / "run")


def _interrupted_after(calls: int) -> Arithmetic:
    class Interrupted(Arithmetic):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            if len(self.calls) == calls:
                raise KeyboardInterrupt
            return super().generate(*args, **kwargs)

    return Interrupted()

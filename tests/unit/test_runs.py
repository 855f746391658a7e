"""runs.py: absent, resumable or complete; one writer; and no folder that is not ours is ever touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from moesteer import doctor, files, runs
from moesteer.errors import FileError, RunDirectoryError

PLAN = {"model": "lab", "seed": 1, "methods": ["a", "b"], "limit": None}


def state_of(folder):
    return json.loads((folder / "run.json").read_text())


def tree(folder):
    """Every file below and its bytes, the lock aside."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if p.name != ".lock"
    }


def complete_run(folder, plan=PLAN):
    with runs.opened(folder, plan=plan) as run:
        for name in ("trace/pairs/x", "masks/best.safetensors", "responses/none.jsonl", "report.html"):
            files.write_text(run.path(name), "made")
        files.write_json(run.path("results.json"), {"n": 1})
        run.mark("complete")


# ---------------------------------------------------------------- new, resumed, complete


def test_a_new_run_notes_plan_versions_and_status(tmp_path):
    folder = tmp_path / "a" / "run"
    with runs.opened(folder, plan=PLAN) as run:
        state = state_of(folder)
        assert state["status"] == "running" and state["plan"] == PLAN and state["schema"] == 1
        assert set(state["versions"]) == {"python", "moesteer", "torch", "transformers", "numpy", "safetensors"}
        assert "not installed" not in state["versions"].values()
        assert not run.complete and run.plan == PLAN and run.path("a", "b") == folder / "a" / "b"
    assert state_of(folder)["status"] == "running"  # whoever does not mark it complete leaves it resumable


def test_the_same_plan_goes_on_with_what_is_there(tmp_path):
    with runs.opened(tmp_path / "run", plan=PLAN) as run:
        files.write_text(run.path("responses", "none.jsonl"), "half\n")
    before = state_of(tmp_path / "run")
    with runs.opened(tmp_path / "run", plan=dict(reversed(PLAN.items()))) as run:
        assert run.path("responses", "none.jsonl").read_text() == "half\n" and not run.complete
    assert state_of(tmp_path / "run") == before


def test_going_on_with_other_libraries_is_said_and_noted_once(tmp_path, monkeypatch, capsys):
    with runs.opened(tmp_path / "run", plan=PLAN):
        here = runs.versions()
    for _ in range(2):
        monkeypatch.setattr(runs, "versions", lambda: {**here, "torch": "9.9"})
        with runs.opened(tmp_path / "run", plan=PLAN):
            pass
    assert capsys.readouterr().err.count(f"torch {here['torch']}, now 9.9") == 1
    state = state_of(tmp_path / "run")
    assert state["versions"] == here and state["continued_with"] == [{"torch": "9.9"}]
    (row,) = [row for row in doctor.examine_files(tmp_path / "run") if row.what == "versions"]
    assert not row.ok and "torch 9.9" in row.detail
    monkeypatch.setattr(runs, "versions", lambda: here)
    with runs.opened(tmp_path / "run", plan=PLAN) as run:
        files.write_json(run.path("results.json"), {})
        run.mark("complete")
    assert state_of(tmp_path / "run")["continued_with"] == [{"torch": "9.9"}, {"torch": here["torch"]}]
    monkeypatch.setattr(runs, "versions", lambda: {**here, "torch": "9.9"})
    with runs.opened(tmp_path / "run", plan=PLAN):  # which goes on with nothing
        assert len(state_of(tmp_path / "run")["continued_with"]) == 2


def test_an_existing_empty_folder_is_a_place_for_a_run(tmp_path):
    with runs.opened(tmp_path, plan=PLAN):
        assert (tmp_path / "run.json").is_file()


def test_a_complete_run_says_so_and_stays_byte_for_byte(tmp_path):
    complete_run(tmp_path / "run")
    before = tree(tmp_path / "run")
    with runs.opened(tmp_path / "run", plan=PLAN) as run:
        assert run.complete
    assert tree(tmp_path / "run") == before and state_of(tmp_path / "run")["status"] == "complete"


def test_a_run_that_lost_its_results_is_not_complete(tmp_path):
    complete_run(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    with runs.opened(tmp_path / "run", plan=PLAN) as run:
        assert not run.complete
        assert state_of(tmp_path / "run")["status"] == "running"


@pytest.mark.parametrize(
    "error, status", [(KeyboardInterrupt(), "interrupted"), (RuntimeError("went wrong"), "failed")]
)
def test_an_end_by_exception_is_noted_passed_on_and_resumable(error, status, tmp_path):
    with pytest.raises(type(error)), runs.opened(tmp_path / "run", plan=PLAN):
        raise error
    state = state_of(tmp_path / "run")
    assert state["status"] == status and state.get("error") == ("went wrong" if status == "failed" else None)
    with runs.opened(tmp_path / "run", plan=PLAN):
        assert state_of(tmp_path / "run")["status"] == "running"


def test_a_run_that_went_on_to_complete_names_no_error(tmp_path):
    with pytest.raises(RuntimeError), runs.opened(tmp_path / "run", plan=PLAN):
        raise RuntimeError("went wrong")
    complete_run(tmp_path / "run")
    assert state_of(tmp_path / "run")["status"] == "complete"
    assert "error" not in state_of(tmp_path / "run")


def test_what_a_killed_writer_left_is_removed(tmp_path):
    with runs.opened(tmp_path / "run", plan=PLAN):
        pass
    leftover = tmp_path / "run" / "masks" / f".m.1{files.TEMPORARY_SUFFIX}"
    leftover.parent.mkdir()
    leftover.write_text("half")
    with runs.opened(tmp_path / "run", plan=PLAN):
        assert not leftover.exists()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 2}, "changed: seed"),
        ({"seed": 2, "model": "other"}, "changed: model, seed"),
        ({"methods": ["b", "a"]}, "changed: methods"),
        ({"limit": 0}, "changed: limit"),
        ({"more": True}, "changed: more"),
    ],
)
def test_another_plan_is_refused_and_the_changes_are_named(change, named, tmp_path):
    complete_run(tmp_path / "run")
    before = tree(tmp_path / "run")
    with (
        pytest.raises(RunDirectoryError, match="a run with other settings") as caught,
        runs.opened(tmp_path / "run", plan={**PLAN, **change}),
    ):
        pytest.fail("was opened")
    assert f"({named})" in caught.value.what and "--fresh" in caught.value.do
    assert tree(tmp_path / "run") == before


def test_a_plan_with_fewer_settings_is_another_plan(tmp_path):
    complete_run(tmp_path / "run")
    fewer = {k: v for k, v in PLAN.items() if k != "seed"}
    with pytest.raises(RunDirectoryError, match="changed: seed"), runs.opened(tmp_path / "run", plan=fewer):
        pytest.fail("was opened")


@pytest.mark.parametrize(
    "content, error, part",
    [
        ("[]", RunDirectoryError, "holds no run"),
        ("{}", RunDirectoryError, "holds no run"),
        ('{"plan": "x"}', RunDirectoryError, "holds no run"),
        ("", RunDirectoryError, "holds no run"),
        ('{"plan": NaN}', RunDirectoryError, "holds no run"),
        ("\0" * 50, RunDirectoryError, "holds no run"),
    ],
)
def test_a_run_json_that_is_not_ours_is_refused_and_kept(content, error, part, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(error, match=part) as caught, runs.opened(tmp_path, plan=PLAN):
        pytest.fail("was opened")
    assert type(caught.value) is error
    assert (tmp_path / "run.json").read_text() == content


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_refused_and_untouched(fresh, tmp_path):
    for name in ("notes.txt", "masks/theirs", "trace/theirs"):
        files.write_text(tmp_path / name, "theirs")
    before = tree(tmp_path)
    with (
        pytest.raises(RunDirectoryError, match="not empty and holds no run"),
        runs.opened(tmp_path, plan=PLAN, fresh=fresh),
    ):
        pytest.fail("was opened")
    assert tree(tmp_path) == before and not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_in_the_runs_place_is_refused_and_kept(fresh, tmp_path):
    path = tmp_path / "run"
    path.write_text("theirs")
    with pytest.raises(RunDirectoryError, match="it is a file"), runs.opened(path, plan=PLAN, fresh=fresh):
        pytest.fail("was opened")
    assert path.read_text() == "theirs"


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("theirs")
    with (
        pytest.raises(RunDirectoryError, match="cannot be written to: Not a directory"),
        runs.opened(tmp_path / "file" / "run", plan=PLAN),
    ):
        pytest.fail("was opened")
    assert (tmp_path / "file").read_text() == "theirs"


def test_a_folder_whose_name_is_too_long_is_refused(tmp_path):
    with pytest.raises(FileError), runs.opened(tmp_path / ("x" * 300), plan=PLAN):
        pytest.fail("was opened")


def test_a_folder_with_nothing_but_our_lock_is_a_place_for_a_run(tmp_path):
    # a run killed between its lock and its run.json
    (tmp_path / ".lock").write_text("pid 123456789012\n")
    with runs.opened(tmp_path, plan=PLAN):
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} on ")
        assert state_of(tmp_path)["status"] == "running"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_with_a_lock_file_is_refused_and_untouched(fresh, tmp_path):
    for name in (".lock", "notes.txt", "masks/theirs", "results.json"):
        files.write_text(tmp_path / name, "theirs")
    before = tree(tmp_path)
    with pytest.raises(RunDirectoryError), runs.opened(tmp_path, plan=PLAN, fresh=fresh):
        pass
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["[]", '{"scripts": {"test": "jest"}}', "not json"])
def test_fresh_does_not_delete_what_is_no_run_of_ours(content, tmp_path):
    for name in ("masks/theirs", "results.json"):
        files.write_text(tmp_path / name, "theirs")
    (tmp_path / "run.json").write_text(content)
    before = tree(tmp_path)
    with pytest.raises(FileError), runs.opened(tmp_path, plan=PLAN, fresh=True):
        pass
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- fresh


@pytest.mark.parametrize("plan", [PLAN, {**PLAN, "seed": 2}], ids=["same-plan", "other-plan"])
def test_fresh_deletes_a_run_and_only_what_a_run_writes(plan, tmp_path):
    folder = tmp_path / "run"
    complete_run(folder)
    for name in ("notes.txt", "masks-kept/m", "sub/results.json", "results.json.bak"):
        files.write_text(folder / name, "mine")
    outside = tmp_path / "outside"
    files.write_text(outside / "x", "outside")
    with runs.opened(folder, plan=plan, fresh=True) as run:
        assert not run.complete
        assert set(tree(folder)) == {
            "masks-kept", "masks-kept/m", "notes.txt", "results.json.bak", "run.json", "sub", "sub/results.json"
        }  # fmt: skip
        assert state_of(folder)["plan"] == plan and state_of(folder)["status"] == "running"
    assert (outside / "x").read_text() == "outside"


def test_fresh_does_not_follow_a_link_out_of_the_run(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    complete_run(folder)
    files.write_text(outside / "x", "outside")
    (folder / "masks" / "link").symlink_to(outside)
    with runs.opened(folder, plan=PLAN, fresh=True):
        assert not (folder / "masks").exists()
    assert (outside / "x").read_text() == "outside"


# ---------------------------------------------------------------- two writers


HOLD = """
import sys
from moesteer import runs
with runs.opened(sys.argv[1], plan={"a": 1}):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the run `tmp_path/run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    if process.poll() is None:
        process.communicate("\n", timeout=20)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_process_is_refused_at_once_and_changes_nothing(holder, fresh, tmp_path):
    before, started = tree(tmp_path / "run"), time.monotonic()
    with (
        pytest.raises(RunDirectoryError, match=rf"locked by pid {holder.pid} since "),
        runs.opened(tmp_path / "run", plan={"a": 1}, fresh=fresh),
    ):
        pytest.fail("was opened")
    assert time.monotonic() - started < 2
    assert tree(tmp_path / "run") == before
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"pid {holder.pid} on ")


@pytest.mark.parametrize("end", ["done", "killed"])
def test_a_run_is_free_again_once_its_process_is_gone(holder, end, tmp_path):
    if end == "done":
        holder.communicate("\n", timeout=20)
    else:
        holder.kill()
        holder.wait(timeout=20)
    with runs.opened(tmp_path / "run", plan={"a": 1}):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"pid {os.getpid()} on ")


def test_one_process_cannot_open_a_run_twice_and_can_open_two(tmp_path):
    with (
        runs.opened(tmp_path / "run", plan=PLAN),
        runs.opened(tmp_path / "other", plan=PLAN),
        pytest.raises(RunDirectoryError, match=f"locked by pid {os.getpid()} since "),
        runs.opened(tmp_path / "run", plan=PLAN),
    ):
        pytest.fail("was opened")
    with runs.opened(tmp_path / "run", plan=PLAN):
        pass


def test_opening_and_closing_leaves_no_descriptor_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with runs.opened(tmp_path / "run", plan=PLAN):
            pass
        with pytest.raises(RunDirectoryError), runs.opened(tmp_path / "run", plan={}):
            pass
    assert len(os.listdir("/proc/self/fd")) == before

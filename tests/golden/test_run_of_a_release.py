"""Runs that earlier releases left: this one goes on with them, or says which version does (TRUST.md, fault 24)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moesteer import doctor, files, runs
from moesteer.errors import RunDirectoryError
from moesteer.version import __version__
from tests.crash.evaluation import Arithmetic, run, tree

GOLDEN = sorted(Path(__file__).parent.glob("run-*"))


def test_there_is_a_run_of_this_format() -> None:
    states = [files.read_json(folder / "finished" / "run.json") for folder in GOLDEN]
    assert runs.SCHEMA in [state["schema"] for state in states]
    assert all(folder.name == f"run-{s['versions']['moesteer']}" for folder, s in zip(GOLDEN, states, strict=True))


def goes_on(folder: Path) -> bool:
    """Whether this release reads the format of that one."""
    return bool(files.read_json(folder / "run.json")["schema"] == runs.SCHEMA)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda folder: folder.name)
def test_a_finished_run_is_whole_and_is_read_and_not_made_again(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "finished", tmp_path / "run")
    assert all(row.ok for row in doctor.examine_files(tmp_path / "run"))
    model = Arithmetic()
    if not goes_on(tmp_path / "run"):
        return _names_its_version(tmp_path / "run")
    before = tree(tmp_path / "run")
    assert run(tmp_path / "run", model) == files.read_json(golden / "finished" / "results.json")
    assert model.calls == [] and tree(tmp_path / "run") == before


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda folder: folder.name)
def test_an_interrupted_run_goes_on_to_the_same_results_or_names_its_version(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "interrupted", tmp_path / "run")
    assert all(row.ok for row in doctor.examine_files(tmp_path / "run"))
    if not goes_on(tmp_path / "run"):
        return _names_its_version(tmp_path / "run")
    model = Arithmetic()
    run(tmp_path / "run", model)
    assert model.calls  # something was left
    expected = tree(golden / "finished")
    assert {k: v for k, v in tree(tmp_path / "run").items() if k != "run.json"} == {
        k: v for k, v in expected.items() if k != "run.json"
    }
    # the run stays one of the release that began it
    assert (
        files.read_json(tmp_path / "run" / "run.json")["versions"]
        == files.read_json(golden / "interrupted" / "run.json")["versions"]
    )


def _names_its_version(folder: Path) -> None:
    made = files.read_json(folder / "run.json")["versions"]["moesteer"]
    with pytest.raises(RunDirectoryError) as caught:
        run(folder)
    assert f"moesteer {made}" in caught.value.do


@pytest.mark.parametrize("schema", [0, 2, 99])
def test_another_format_is_refused_and_the_version_is_named(schema: int, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN[-1] / "interrupted", tmp_path / "run")
    state = files.read_json(tmp_path / "run" / "run.json")
    state |= {"schema": schema, "versions": {"moesteer": "7.8.9"}}
    files.write_json(tmp_path / "run" / "run.json", state)
    before = tree(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=f"of format {schema}, of moesteer 7.8.9") as caught:
        run(tmp_path / "run")
    assert "go on with moesteer 7.8.9" in caught.value.do and tree(tmp_path / "run") == before


def test_a_plan_of_another_version_names_it(tmp_path: Path) -> None:
    with runs.opened(tmp_path / "run", plan={"seed": 1, "moesteer": "7.8.9"}):
        pass
    with (
        pytest.raises(RunDirectoryError, match=f"with moesteer 7.8.9, which goes on with it; this is {__version__}"),
        runs.opened(tmp_path / "run", plan={"seed": 1, "moesteer": __version__}),
    ):
        pytest.fail("was opened")

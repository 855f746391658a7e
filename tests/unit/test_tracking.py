"""Trackers: what is sent and what never is, the libraries' own signatures, and failures that end no run."""

from __future__ import annotations

import inspect
import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from moesteer import tracking
from moesteer.cli.main import app
from moesteer.errors import FileError, MaskFileError, MissingExtraError, UnknownNameError
from moesteer.tracking import Recorder, named, recorded, settings_of
from tests.unit import runs_by_hand

MASK = runs_by_hand.mask()
TEXT = "how do i paint a flumox"
RESULTS: dict[str, Any] = {
    "trade_off": [{"method": "direct", "alpha": 0.5, "experts": 3, "metrics": {"coherence": 0.9, "recall_rate": None}},
                  {"method": "none", "alpha": None, "experts": 0, "metrics": {"coherence": 1.0}}],
    "methods": {"none": {"alpha": None, "experts": 0, "metrics": {"coherence": runs_by_hand.rate(1.0)}, "vs_none": {}},
                "direct+gate": {"alpha": 0.5, "experts": 3, "metrics": {"coherence": runs_by_hand.rate(0.9, 97, 3)},
                                "vs_none": {"coherence": {"difference": -0.1}}, "setting": TEXT}},
    "recommended": "direct+gate", "failed": {"masc": TEXT}, "checks": [{"detail": TEXT}],
}  # fmt: skip


class Calls:
    """Fakes of the three libraries that keep every call; their signatures are those of the real ones."""

    def __init__(self) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.threads: set[str] = set()
        self.fail: dict[str, BaseException] = {}
        self.slow: dict[str, float] = {}

    def fake(self, name: str, signature: str, result: Any = None) -> Any:
        """A function of this name and signature."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.threads.add(threading.current_thread().name)
            bound = inspect.signature(shape).bind(*args, **kwargs).arguments  # raises TypeError as the real one does
            self.made.append((name, dict(bound)))
            time.sleep(self.slow.get(name, 0))
            if name in self.fail:
                raise self.fail[name]
            return result

        shape = eval(f"lambda {signature}: None")
        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.made]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [given for found, given in self.made if found == name]


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


def fake_trackio(calls: Calls) -> ModuleType:
    """trackio 0.43."""
    run = SimpleNamespace(
        log=calls.fake("log", "metrics, step=None"),
        log_artifact=calls.fake("artifact", "artifact_or_path, name=None, type=None, aliases=None, overwrite=False"),
        finish=calls.fake("finish", ""),
    )
    return module(
        "trackio",
        init=calls.fake(
            "start",
            "project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, "
            "config=None, "
            "resume='never', settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0, "
            "auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None",
            run,
        ),
    )


def fake_wandb(calls: Calls) -> ModuleType:
    """wandb 0.31."""
    run = SimpleNamespace(
        log=calls.fake("log", "data, step=None, commit=None"),
        log_artifact=calls.fake("artifact", "artifact_or_path, name=None, type=None, aliases=None, tags=None"),
        finish=calls.fake("finish", "exit_code=None"),
    )
    settings = calls.fake(
        "settings", "*, console='auto', disable_code=False, disable_git=False, save_code=None, x_disable_meta=False, "
        "x_disable_stats=False, x_disable_machine_info=False, init_timeout=90.0", "the settings")  # fmt: skip
    init = calls.fake(
        "start",
        "entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None, "
        "config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None, "
        "mode=None, "
        "force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None, tensorboard=None, "
        "sync_tensorboard=None, monitor_gym=None, settings=None",
        run,
    )
    return module("wandb", init=init, Settings=settings)


def fake_mlflow(calls: Calls) -> ModuleType:
    """mlflow 3.17."""
    return module(
        "mlflow",
        set_experiment=calls.fake("experiment", "experiment_name=None, experiment_id=None, trace_location=None"),
        start_run=calls.fake(
            "start",
            "run_id=None, experiment_id=None, run_name=None, nested=False, parent_run_id=None, "
            "tags=None, description=None, log_system_metrics=None",
        ),
        log_params=calls.fake("params", "params, synchronous=None, run_id=None"),
        log_metrics=calls.fake(
            "log", "metrics, step=None, synchronous=None, run_id=None, timestamp=None, model_id=None, dataset=None"
        ),
        log_artifact=calls.fake("artifact", "local_path, artifact_path=None, run_id=None"),
        end_run=calls.fake("finish", "status='FINISHED'"),
    )


FAKES = {"trackio": fake_trackio, "wandb": fake_wandb, "mlflow": fake_mlflow}


@pytest.fixture
def calls(monkeypatch):
    made = Calls()
    for name, make in FAKES.items():
        monkeypatch.setitem(sys.modules, name, make(made))
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def run(tmp_path):
    MASK.save(tmp_path / "run" / "masks" / "direct+gate.safetensors")
    return tmp_path / "run"


def record(name, run, **settings):
    with recorded(name, run="lab run", settings={"seed": 3, "model": "acme/x", **settings}) as recorder:
        recorder.results(RESULTS, run=run)
    return recorder


# ---------------------------------------------------------------- what is sent


@pytest.mark.parametrize("name", FAKES)
def test_a_whole_run_in_order_on_one_thread(name, calls, run, capsys):
    recorder = record(name, run)
    first = {"trackio": ["start"], "wandb": ["settings", "start"], "mlflow": ["experiment", "start", "params"]}[name]
    assert calls.names() == [*first, "log", "log", "log", "log", "artifact", "finish"]
    assert calls.threads == {f"tracking with {name}"} and recorder.lost == 0 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", FAKES)
def test_metrics_by_step_then_by_method(name, calls, run):
    record(name, run)
    logged = [(given.get("metrics", given.get("data")), given.get("step")) for given in calls.of("log")]
    method = "direct_gate" if name == "mlflow" else "direct+gate"
    assert logged == [
        ({"select/direct/coherence": 0.9, "select/direct/alpha": 0.5, "select/direct/experts": 3.0}, 0),
        ({"select/none/coherence": 1.0, "select/none/experts": 0.0}, 1),
        ({"none/experts": 0.0, "none/coherence": 1.0, "none/coherence/n": 100.0, "none/coherence/unscored": 0.0}, None),
        ({f"{method}/alpha": 0.5, f"{method}/experts": 3.0, f"{method}/coherence": 0.9, f"{method}/coherence/n": 97.0,
          f"{method}/coherence/unscored": 3.0, f"{method}/coherence/difference": -0.1}, None),
    ]  # fmt: skip


@pytest.mark.parametrize("name", FAKES)
def test_no_text_of_the_run_is_sent(name, calls, run):
    record(name, run, **settings_of("acme/x", {"scenario": {"name": "lab", "wanted_texts": [TEXT]}, "prompt": TEXT}))
    assert "flumox" not in repr(calls.made) and TEXT not in repr(calls.made)


def test_trackio_stays_local_and_measures_no_machine(calls, run):
    record("trackio", run)
    (given,) = calls.of("start")
    assert given == {"project": "moesteer", "name": "lab_run", "config": {"seed": 3, "model": "acme/x"}, "embed": False,
                     "auto_log_gpu": False, "auto_log_cpu": False}  # fmt: skip
    assert calls.of("artifact") == [{"artifact_or_path": str(run / "masks" / "direct+gate.safetensors"),
                                     "name": "direct-gate", "type": "steering-mask"}]  # fmt: skip


def test_wandb_sends_neither_code_nor_console_nor_machine(calls, run):
    record("wandb", run)
    assert calls.of("settings") == [{
        "console": "off", "disable_code": True, "disable_git": True, "save_code": False, "x_disable_meta": True,
        "x_disable_stats": True, "x_disable_machine_info": True, "init_timeout": tracking.TIMEOUT_S,
    }]  # fmt: skip
    (given,) = calls.of("start")
    assert given == {"project": "moesteer", "name": "lab_run", "config": {"seed": 3, "model": "acme/x"},
                     "reinit": "create_new", "settings": "the settings"}  # fmt: skip
    assert calls.of("finish") == [{"exit_code": 0}]


def test_mlflow_gets_names_that_it_takes(calls, run):
    record("mlflow", run, **{"odd+key": 1})
    assert calls.of("params") == [{"params": {"seed": 3, "model": "acme/x", "odd_key": 1}}]
    assert calls.of("experiment") == [{"experiment_name": "moesteer"}] and calls.of("finish") == [
        {"status": "FINISHED"}
    ]
    assert calls.of("start") == [{"run_name": "lab_run", "log_system_metrics": False}]


def test_the_users_own_environment_is_respected(calls, run, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    record("wandb", run)
    record("mlflow", run)
    assert calls.of("start")[0]["project"] == "mine" and calls.of("experiment") == []


@pytest.mark.parametrize("name", FAKES)
def test_a_run_that_fails_is_ended_as_failed_and_its_error_comes_through(name, calls):
    with pytest.raises(KeyError), recorded(name, run="x", settings={}):
        raise KeyError("the run's own")
    (ended,) = calls.of("finish")
    assert ended == {"trackio": {}, "wandb": {"exit_code": 1}, "mlflow": {"status": "FAILED"}}[name]


def test_without_a_tracker_nothing_is_imported_or_started(run, monkeypatch):
    for name in FAKES:
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    before = threading.active_count()
    recorder = record(None, run)
    assert recorder.lost == 0 and threading.active_count() == before


# ---------------------------------------------------------------- what is never sent


@pytest.mark.parametrize("value", [TEXT, "two words", "a\nb", "a\tb", "x" * 201, "", "a\x00b", "a\u2028b"])
def test_a_setting_that_is_text_is_refused(value, calls):
    with pytest.raises(ValueError, match="text is not sent"), recorded("trackio", run="x", settings={"prompt": value}):
        pass
    assert calls.made == []


@pytest.mark.parametrize("value", ["0.5", TEXT, True, [1], {"a": 1}])
def test_a_metric_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="not a number"):
        Recorder(None).log({"coherence": value})


def test_a_metric_whose_name_is_text_is_refused():
    with pytest.raises(ValueError, match="text is not sent"):
        Recorder(None).log({TEXT: 1.0})


def test_what_is_not_finite_is_left_out(calls):
    with recorded("trackio", run="x", settings={}) as recorder:
        recorder.log({"a": float("nan"), "b": float("inf"), "c": None, "d": 1})
        recorder.log({"a": None})
    assert calls.of("log") == [{"metrics": {"d": 1.0}, "step": None}]


@pytest.mark.parametrize("name", ["responses/none.jsonl", "results.json", "report.html", "missing.safetensors"])
def test_no_file_but_a_mask_is_sent(name, calls, run):
    (run / "responses").mkdir()
    for file in ("responses/none.jsonl", "results.json", "report.html"):
        (run / file).write_text(json.dumps({"response": TEXT}))
    with recorded("trackio", run="x", settings={}) as recorder, pytest.raises((MaskFileError, FileError)):
        recorder.artifact(run / name)
    assert calls.of("artifact") == []


def test_settings_are_names_numbers_and_digests_only():
    scenario = SimpleNamespace(name="lab", title=TEXT)
    method = SimpleNamespace(name="direct", preset={"text": TEXT})
    found = settings_of(
        "/home/me/models/x y",
        {
            "scenario": scenario,
            "methods": [method, "masc"],
            "controls": ("random",),
            "gate": True,
            "seed": 0,
            "limit": None,
            "dtype": "auto",
            "device": "cuda:0",
            "fresh": True,
            "cache": Path("/home/me/cache"),
            "prompt": TEXT,
            "masks": ["ab" * 32],
            "alphas": [None, 0.5],
            "data": "ef" * 32,
            "weights": "zz",
        },
    )
    assert found == {
        "model": "x_y",
        "moesteer": tracking.__version__,
        "scenario": "lab",
        "methods": "direct,masc",
        "controls": "random",
        "gate": True,
        "seed": 0,
        "dtype": "auto",
        "device": "cuda:0",
        "masks": "ab" * 32,
        "alphas": "None,0.5",
        "data": "ef" * 32,
    }
    Recorder(None).start("x", settings=found)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("acme/tiny", "acme/tiny"),
        ("/a/b/c", "c"),
        ("./runs/x/", "x"),
        ("a/b/c", "c"),
        ("C:\\x\\y", "y"),
        ("", "unnamed"),
        ("~/m", "m"),
        ("a b\nc", "a_b_c"),
        ("src/moesteer", "moesteer"),
    ],
)
def test_names_without_folders(given, kept, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    assert named(given) == kept


# ---------------------------------------------------------------- failing


def test_a_tracker_that_is_none():
    with pytest.raises(UnknownNameError, match="no tracker 'tensorboard'"):
        tracking.require_tracker("tensorboard")


@pytest.mark.parametrize("name", FAKES)
def test_one_that_is_not_installed_names_its_extra(name, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'moesteer\[{name}\]'"):
        tracking.require_tracker(name)


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("step", ["start", "log", "artifact", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no network\nsecond line"), SystemExit(3), ConnectionError()])
def test_a_tracker_that_fails_ends_no_run_and_is_told_once(error, step, name, calls, run, capsys):
    calls.fail[step] = error
    recorder = record(name, run)
    told = capsys.readouterr().err
    assert recorder.lost == {"start": 6, "log": 4, "artifact": 1, "finish": 1}[step]
    assert told.count("does not record this run as it should") == 1 and "second line" not in told
    assert (f"{recorder.lost} records were lost in all" in told) == (recorder.lost > 1)
    if step == "start":
        assert "log" not in calls.names() and "finish" not in calls.names()  # mlflow would begin a run of its own


def test_a_password_in_a_trackers_address_is_not_told(calls, run, capsys):
    calls.fail["start"] = RuntimeError("API request to https://me:pa@ss@far.example/api/2.0 failed")
    record("mlflow", run)
    told = capsys.readouterr().err
    assert "https://far.example/api/2.0 failed" in told and "pa@ss" not in told and "me:" not in told


def test_a_tracker_that_cannot_be_imported_ends_no_run(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    assert record("wandb", run).lost == 6 and "AttributeError" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["start", "log"])
def test_a_tracker_that_hangs_is_given_up_and_asked_no_more(step, calls, run, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "TIMEOUT_S", 0.05)
    calls.slow[step] = 0.6
    begun = time.monotonic()
    recorder = record("trackio", run)
    assert time.monotonic() - begun < 0.5 and recorder.lost >= 5
    assert "no answer within 0.05 s; nothing more is sent" in capsys.readouterr().err
    assert "artifact" not in calls.names()


def test_whoever_stops_a_run_does_not_wait_for_its_tracker(calls, monkeypatch):
    monkeypatch.setattr(tracking, "INTERRUPTED_S", 0.05)
    calls.slow["finish"] = 0.6
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), recorded("trackio", run="x", settings={}):
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 0.5


def test_what_a_tracker_prints_is_not_on_standard_output(calls, run, capsys, monkeypatch):
    real = sys.modules["trackio"].init
    monkeypatch.setattr(sys.modules["trackio"], "init", lambda *a, **k: (print("* a dashboard"), real(*a, **k))[1])
    record("trackio", run)
    assert capsys.readouterr() == ("", "* a dashboard\n")


# ---------------------------------------------------------------- the commands


def test_evaluate_says_a_missing_extra_before_it_loads_anything(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    found = CliRunner().invoke(app, ["evaluate", "no/such/model", "--track", "mlflow"])
    assert isinstance(found.exception, MissingExtraError)


def test_steer_says_it_too(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    given = ["steer", "no/such/model", "--scenario", "faithfulness", "--out", str(tmp_path / "r"), "--track", "wandb"]
    assert isinstance(CliRunner().invoke(app, given).exception, MissingExtraError) and not (tmp_path / "r").exists()


def test_evaluate_with_a_tracker_prints_the_same_and_sends_no_word_of_it(calls, tmp_path):
    given = ["evaluate", "lab-tiny", "--suite", "direct", "--limit", "2", "--json", "--out", str(tmp_path / "r")]
    found = CliRunner().invoke(app, [*given, "--track", "wandb"])
    assert found.exit_code == 0, found.exception
    assert json.loads(found.stdout) == json.loads((tmp_path / "r" / "results.json").read_text())
    (start,), (logged,) = calls.of("start"), calls.of("log")
    assert start["name"] == "r" and start["config"]["model"] == "lab-tiny" and start["config"]["split"] == "test"
    assert logged["data"]["none/direct_refusal_rate/n"] == 2.0 and calls.of("finish") == [{"exit_code": 0}]
    rows = [json.loads(row) for row in (tmp_path / "r" / "responses" / "none.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["response"] not in repr(calls.made) and row["messages"][-1]["content"] not in repr(calls.made)

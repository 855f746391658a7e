"""Experiment trackers behind one small interface: trackio, wandb or mlflow, each an extra, chosen by name.

What is sent: metrics, settings that are names, numbers or digests, and masks. Never a conversation, a reply, a path or
what is printed: text with white space in it is refused here. A tracker that fails or hangs never ends a run: it is
told once, and what was lost is counted. Offline modes are the libraries' own (WANDB_MODE=offline, a local
MLFLOW_TRACKING_URI; trackio is local unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set).
"""

from __future__ import annotations

import math
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from moesteer.errors import MissingExtraError, UnknownNameError
from moesteer.mask import SteeringMask
from moesteer.version import __version__

PROJECT = "moesteer"
TIMEOUT_S = 30.0
"""How long one call of a tracker may take; `finish` gets twice that."""
INTERRUPTED_S = 4.0
"""How long `finish` may take where the run failed or was stopped: whoever stopped it waits."""
MOST_NAME = 200
Setting = str | int | float | bool | None
_LOGIN = re.compile(r"://[^/\s]*@")
"""User and password of an address."""


class Tracker(Protocol):
    """What a tracker does, in this order: start, any number of log and artifact, finish."""

    def start(self, name: str, *, settings: Mapping[str, Setting]) -> None:
        """Begin a run of this name."""

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Record numbers, of a step or of the whole run."""

    def artifact(self, path: Path) -> None:
        """Keep a mask file."""

    def finish(self, *, ok: bool) -> None:
        """End the run; ok: whether it did what it should."""


class Trackio:
    """trackio (checked with 0.43): local-first; a Space or server only where its environment names one."""

    def start(self, name: str, *, settings: Mapping[str, Setting]) -> None:
        """See Tracker. No measurements of the machine."""
        import trackio

        self._run = trackio.init(
            project=PROJECT, name=name, config=dict(settings), embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """See Tracker."""
        self._run.log(dict(metrics), step=step)

    def artifact(self, path: Path) -> None:
        """See Tracker."""
        self._run.log_artifact(str(path), name=_dashed(path.stem), type="steering-mask")

    def finish(self, *, ok: bool) -> None:
        """See Tracker."""
        self._run.finish()


class Wandb:
    """wandb (checked with 0.31). Code, git state, console, command line and the machine's numbers are not sent."""

    def start(self, name: str, *, settings: Mapping[str, Setting]) -> None:
        """See Tracker. WANDB_PROJECT, WANDB_MODE and the rest of wandb's environment are respected."""
        import wandb

        private = wandb.Settings(
            console="off", disable_code=True, disable_git=True, save_code=False, x_disable_meta=True,
            x_disable_stats=True, x_disable_machine_info=True, init_timeout=TIMEOUT_S,
        )  # fmt: skip
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, config=dict(settings), reinit="create_new",
            settings=private,
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """See Tracker."""
        self._run.log(dict(metrics), step=step)

    def artifact(self, path: Path) -> None:
        """See Tracker."""
        self._run.log_artifact(str(path), name=_dashed(path.stem), type="steering-mask")

    def finish(self, *, ok: bool) -> None:
        """See Tracker."""
        self._run.finish(exit_code=0 if ok else 1)


class Mlflow:
    """mlflow (checked with 3.17). It adds tags of its own: user, source file, git commit."""

    def start(self, name: str, *, settings: Mapping[str, Setting]) -> None:
        """See Tracker. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME or _ID are respected."""
        import mlflow

        self._mlflow = mlflow
        if not any(os.environ.get(f"MLFLOW_EXPERIMENT_{key}") for key in ("NAME", "ID")):
            mlflow.set_experiment(experiment_name=PROJECT)
        mlflow.start_run(run_name=name, log_system_metrics=False)
        mlflow.log_params({_mlflow_name(key): value for key, value in settings.items()})

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """See Tracker. Characters that mlflow does not take in names become underscores."""
        self._mlflow.log_metrics({_mlflow_name(key): value for key, value in metrics.items()}, step=step)

    def artifact(self, path: Path) -> None:
        """See Tracker."""
        self._mlflow.log_artifact(str(path), artifact_path="masks")

    def finish(self, *, ok: bool) -> None:
        """See Tracker."""
        self._mlflow.end_run(status="FINISHED" if ok else "FAILED")


TRACKERS: Mapping[str, Callable[[], Tracker]] = {"trackio": Trackio, "wandb": Wandb, "mlflow": Mlflow}


def _dashed(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name)


def require_tracker(name: str | None) -> None:
    """Raise UnknownNameError for a tracker that is none, MissingExtraError for one that is not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise UnknownNameError(
            f"no tracker {name!r}", where="--track", expected=", ".join(TRACKERS), do="name one of these"
        )
    if name not in sys.modules and find_spec(name) is None:
        raise MissingExtraError(
            f"--track {name} is asked for, and {name} is not installed",
            where="--track",
            expected=f"the extra {name!r}",
            do=f"pip install 'moesteer[{name}]'",
        )


class Recorder:
    """A tracker that cannot harm the run: its calls are made one after another on a thread of their own, and timed.

    lost: calls that failed, or were not made because an earlier one hung or the start failed. No tracker (None) is
    a recorder that records nothing.
    """

    def __init__(self, tracker: Tracker | None, *, name: str = "tracker") -> None:
        self.name, self.lost, self._tracker, self._off = name, 0, tracker, tracker is None
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], list[str], threading.Event] | None]
        self._calls = queue.SimpleQueue()
        if tracker is not None:  # a daemon: one that hangs does not keep the process alive
            threading.Thread(target=self._work, name=f"tracking with {name}", daemon=True).start()

    def start(self, run: str, *, settings: Mapping[str, Setting]) -> None:
        """Begin a run. Raises ValueError for a setting that is text rather than a name."""
        for key, value in settings.items():
            if isinstance(value, str):
                _require_name(value, what=f"setting {key}")
        tracker = self._tracker
        if tracker is not None and not self._call(lambda: tracker.start(_dashed(run), settings=settings)):
            self._off = True

    def log(self, metrics: Mapping[str, float | None], *, step: int | None = None) -> None:
        """Record numbers; None and what is not finite is left out. Raises ValueError for what is no number."""
        kept: dict[str, float] = {}
        for key, value in metrics.items():
            _require_name(key, what="a metric's name")
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"metric {key} is a {type(value).__name__}, not a number")
            if value is not None and math.isfinite(value):
                kept[key] = float(value)
        tracker = self._tracker
        if tracker is not None and kept:
            self._call(lambda: tracker.log(kept, step=step))

    def artifact(self, path: Path) -> None:
        """Keep a file, which has to be a steering mask: no other is sent. Raises MaskFileError, FileError."""
        SteeringMask.load(path)
        tracker = self._tracker
        if tracker is not None:
            self._call(lambda: tracker.artifact(path))

    def finish(self, *, ok: bool) -> None:
        """End the run, and say how much was lost if more than one call was."""
        tracker = self._tracker
        if tracker is None:
            return
        if not self._off:
            self._call(lambda: tracker.finish(ok=ok), timeout_s=2 * TIMEOUT_S if ok else INTERRUPTED_S)
        self._calls.put(None)
        if self.lost > 1:
            print(f"{self.name}: {self.lost} records were lost in all", file=sys.stderr)

    def _call(self, act: Callable[[], None], *, timeout_s: float | None = None) -> bool:
        """Make a call; whether it went well. What trackers print goes to stderr: standard output is the command's."""
        if self._off:
            self.lost += 1
            return False
        wrong: list[str] = []
        done = threading.Event()
        self._calls.put((act, wrong, done))
        limit = TIMEOUT_S if timeout_s is None else timeout_s
        with redirect_stdout(sys.stderr):
            if not done.wait(limit):
                self._off = True
                wrong = [f"no answer within {limit:g} s; nothing more is sent"]
        if not wrong:
            return True
        self.lost += 1
        if self.lost == 1:
            print(f"{self.name} does not record this run as it should: {wrong[0]}; the run goes on", file=sys.stderr)
        return False

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            act, wrong, done = call
            try:
                act()
            except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a tracker throws, the run is not its own
                first = (str(error).strip().splitlines() or [""])[0]
                first = _LOGIN.sub("://", first)  # mlflow repeats an address, with the password that may be in it
                wrong.append(f"{type(error).__name__} {first}"[:300].strip())
            done.set()

    def results(self, results: Mapping[str, Any], *, run: Path | None = None) -> None:
        """What results.json holds in numbers, and the recommended mask where a run directory has one.

        `select/METHOD/METRIC` by step for what was tried; then for every method `METHOD/METRIC`, its difference to
        the unsteered model, n and unscored.
        """
        for step, point in enumerate(results.get("trade_off") or ()):
            tried = {**point["metrics"], "alpha": point.get("alpha"), "experts": point.get("experts")}
            self.log({f"select/{point['method']}/{key}": value for key, value in tried.items()}, step=step)
        for method, entry in results["methods"].items():
            found: dict[str, float | None] = {"alpha": entry.get("alpha"), "experts": entry.get("experts")}
            for metric, rate in entry["metrics"].items():
                found |= {metric: rate["value"], f"{metric}/n": rate["n"], f"{metric}/unscored": rate["unscored"]}
            for metric, gap in entry.get("vs_none", {}).items():
                found[f"{metric}/difference"] = gap["difference"]
            self.log({f"{method}/{key}": value for key, value in found.items()})
        best = results.get("recommended")
        if run is not None and best:
            self.artifact(run / "masks" / f"{best}.safetensors")


def _require_name(text: str, *, what: str) -> None:
    if not text or len(text) > MOST_NAME or any(c.isspace() or not c.isprintable() for c in text):
        raise ValueError(f"{what} is not a name, a number or a digest: text is not sent to a tracker")


def named(value: str) -> str:
    """A name, a path or an id as a setting: its last two parts for an id, the last for a path; no white space."""
    is_path = value.startswith(("/", ".", "~")) or "\\" in value or value.count("/") > 1 or Path(value).exists()
    last = re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value
    return re.sub(r"\s+", "_", last)[:MOST_NAME] or "unnamed"


_SETTINGS = ("gate", "seed", "limit", "dtype", "device", "backend", "engine", "split", "data", "controls_of")


def settings_of(model: str, settings: Mapping[str, Any]) -> dict[str, Setting]:
    """What of a command's settings is sent: numbers, digests and names (of a scenario and a method no more)."""
    found: dict[str, Setting] = {"model": named(model), "moesteer": __version__}
    for key in _SETTINGS:
        value = settings.get(key)
        if isinstance(value, bool | int | float | str):
            found[key] = named(value) if isinstance(value, str) else value
    scenario = settings.get("scenario")
    if scenario is not None:
        name = scenario.get("name") if isinstance(scenario, Mapping) else getattr(scenario, "name", scenario)
        found["scenario"] = named(str(name))
    for key in ("methods", "controls", "masks", "alphas"):
        values = settings.get(key)
        if isinstance(values, list | tuple) and values:
            found[key] = ",".join(named(str(getattr(value, "name", value))) for value in values)[:MOST_NAME]
    return found


@contextmanager
def recorded(tracker: str | None, *, run: str, settings: Mapping[str, Setting]) -> Iterator[Recorder]:
    """A run that is recorded with a tracker by name (None: with none); ended as failed where the block raises.

    Raises UnknownNameError, MissingExtraError before anything is sent.
    """
    require_tracker(tracker)
    recorder = Recorder(TRACKERS[tracker]() if tracker is not None else None, name=tracker or "no tracker")
    recorder.start(named(run), settings=settings)
    ok = False
    try:
        yield recorder
        ok = True
    finally:
        recorder.finish(ok=ok)

"""Audits started from the page: a fixed command line, one at a time, watched and stopped."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from moesteer.backends.hf import Model
from moesteer.cli.main import app as command_line
from moesteer.errors import FileError, InputError, UnknownNameError
from moesteer.ui.audits import Audits, Order, free_name, own_command, verdict
from moesteer.ui.catalogue import Catalogue
from tests.unit.ui_by_hand import mask_for, write_run

STAND_IN = Path(__file__).parent.parent / "browser" / "ui_audit_stand_in.py"
DEAF = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)\n"


@pytest.fixture
def catalogue(tmp_path: Path, lab_tiny: Model) -> Catalogue:
    mask = tmp_path / "mine.safetensors"
    mask_for(lab_tiny).save(mask)
    return Catalogue(("lab-tiny", "--json"), (mask,), tmp_path / "runs")


@pytest.fixture
def started(catalogue: Catalogue) -> Iterator[Audits]:
    audits = Audits(catalogue, command=(sys.executable, str(STAND_IN)), options=("--device=cpu",))
    yield audits
    audits.close()


def until(true: Callable[[], bool], *, seconds: float = 30) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def test_the_command_line_is_fixed(catalogue: Catalogue) -> None:
    audits = Audits(catalogue, options=("--device=cpu",), command=("moesteer",))
    mask = catalogue.given_masks[0]
    order = Order("lab-tiny", "a.b", "jailbreak-defense", mask.as_posix(), limit=4, seed=7)
    assert audits.arguments(order) == [
        "moesteer", "audit", "--scenario=jailbreak-defense", "--seed=7", f"--out={catalogue.runs / 'a.b'}",
        "--device=cpu", "--limit=4", f"--mask={mask}", "--", "lab-tiny",
    ]  # fmt: skip
    assert audits.arguments(Order("--json", "a"))[-2:] == ["--", "--json"], "a model is no option, whatever its name"
    assert own_command()[-1].endswith(("moesteer", "moesteer.cli.main"))


def test_the_audit_takes_these_arguments(catalogue: Catalogue) -> None:
    order = Order("lab-tiny", "a", mask=catalogue.given_masks[0].as_posix(), limit=4)
    shared = ("--dtype=auto", "--device=auto", "--quantize=int8")  # as `moesteer ui` gives them
    arguments = Audits(catalogue, options=shared, command=()).arguments(order)
    taken = get_command(command_line).commands["audit"]  # type: ignore[attr-defined]
    found = taken.make_context("audit", arguments[1:]).params
    assert found["model"] == "lab-tiny" and found["out"] == catalogue.runs / "a" and found["limit"] == 4
    assert found["mask"] == catalogue.given_masks[0] and found["quantize"] == "int8" and found["seed"] == 0


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "/etc/x", "-a", ".a", "a b", "A", "a\n", "a;b", "$(a)", "x" * 65, "ü"]
)
def test_names_of_runs_are_plain(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InputError, match="cannot be called"):
        Audits(catalogue).start(Order("lab-tiny", name))
    assert not catalogue.runs.exists()


def test_only_what_is_offered_is_audited(catalogue: Catalogue) -> None:
    audits = Audits(catalogue)
    for order, error in (
        (Order("/etc", "a"), UnknownNameError),
        (Order("lab-tiny", "a", mask="/etc/passwd"), UnknownNameError),
        (Order("lab-tiny", "a", scenario="../../x.toml"), InputError),
        (Order("lab-tiny", "a", limit=0), InputError),
    ):
        with pytest.raises(error):
            audits.start(order)
    catalogue.runs.mkdir()
    (catalogue.runs / "a").symlink_to("/")
    with pytest.raises(InputError, match="link"):
        audits.start(Order("lab-tiny", "a"))
    assert audits.progress() is None


def test_an_audit_is_watched_to_its_end(started: Audits) -> None:
    started.start(Order("lab-tiny", "one", limit=1))
    with pytest.raises(InputError, match="running: one"):
        started.start(Order("lab-tiny", "two", limit=1))
    seen: set[tuple[str, int, int | None]] = set()

    def ended() -> bool:
        progress = started.progress()
        assert progress is not None
        seen.update(progress.rows)
        return not progress.running

    until(ended)
    progress = started.progress()
    assert progress is not None and progress.code == 3 and progress.status == "done: a check was not met"
    assert ("none", 6, 6) in seen and len(seen) >= 3, "its answers were counted as they came"
    assert progress.lines == ("auditing lab-tiny <b>boldly</b>", "none: 6 answers") and progress.has_report
    assert verdict(progress) == ["Refusals held", "It is a stand-in."]
    assert 1 < progress.seconds < 30 and started.progress() == progress, "its time stands still"


def test_a_stopped_audit_says_so_and_goes_on(started: Audits) -> None:
    started.start(Order("lab-tiny", "one", limit=1))
    until(lambda: any(done >= 2 for _, done, _ in started.progress().rows))  # type: ignore[union-attr]
    started.stop()
    until(lambda: not started.progress().running)  # type: ignore[union-attr]
    progress = started.progress()
    assert progress is not None and progress.status == "stopped" and verdict(progress) == []
    assert '"interrupted"' in (progress.folder / "run.json").read_text()
    started.stop()  # nothing runs: nothing happens
    started.start(Order("lab-tiny", "one", limit=1))
    assert started.progress().running  # type: ignore[union-attr]


def test_closing_the_page_ends_the_audit_even_a_deaf_one(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesteer.ui.audits.PATIENCE_S", 0.3)
    deaf = tmp_path / "deaf.py"
    deaf.write_text(DEAF)
    audits = Audits(catalogue, command=(sys.executable, str(deaf)))
    audits.start(Order("lab-tiny", "one"))
    until(lambda: audits.progress().lines == ("deaf",))  # type: ignore[union-attr]
    audits.close()
    progress = audits.progress()
    assert progress is not None and progress.code == -signal.SIGKILL and progress.status == "killed"
    audits.close()


def test_failures_are_told(catalogue: Catalogue, tmp_path: Path) -> None:
    missing = Audits(catalogue, command=(str(tmp_path / "nothing"),))
    with pytest.raises(FileError, match="cannot be started"):
        missing.start(Order("lab-tiny", "one"))
    long = tmp_path / "long.py"
    long.write_text("import sys\nprint('y' * 100_000)\nfor i in range(99): print(i)\nsys.exit(2)\n")
    failing = Audits(catalogue, command=(sys.executable, str(long)))
    failing.start(Order("lab-tiny", "one"))
    until(lambda: not failing.progress().running)  # type: ignore[union-attr]
    progress = failing.progress()
    assert progress is not None and progress.status == "failed (exit code 2)"
    assert progress.lines[-1] == "98" and len(progress.lines) <= 60 and max(map(len, progress.lines)) <= 400


def test_free_names(tmp_path: Path) -> None:
    assert free_name(tmp_path, "lab-tiny") == "audit-lab-tiny"
    write_run(tmp_path / "audit-lab-tiny", state={})
    assert free_name(tmp_path, "lab-tiny") == "audit-lab-tiny-2"
    assert free_name(tmp_path, "Org/Ä model") == "audit-model" and free_name(tmp_path, "/") == "audit-model"
    assert len(free_name(tmp_path, "x" * 300)) <= 64 and os.sep not in free_name(tmp_path, "a/../..")

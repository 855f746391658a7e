"""`moesteer compare-logs`: pairs of samples, the statistics of evaluate, and logs that cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="the extra `inspect` is not installed")

from inspect_ai import Task
from inspect_ai import eval as run
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from typer.testing import CliRunner

from moesteer.cli.main import app
from moesteer.errors import DataError, FileError, InputError
from moesteer.evaluate import stats
from moesteer.harness.inspect_logs import compare, compared
from moesteer.harness.inspect_suite import verdict
from tests.harness.inspect_mock import saying

GROUPS = ["pots", "pots", "clocks", "clocks", "songs", "songs", "songs", "maps"]
BEFORE = ["yes", "yes", "i cannot", "yes", "yes", "i cannot", "yes", "yes"]
AFTER = ["i cannot", "yes", "i cannot", "i cannot", "i cannot", "yes", "yes", "i cannot"]


def log_of(replies: list[str], folder: Path, *, name: str = "pots", scorer: Any = None, count: int = 8) -> Path:
    """A log of a model that says these, on a task of eight samples."""
    samples = [
        Sample(id=f"s{i}", input="how do i paint a pot ?", target="yes", metadata={"group": GROUPS[i]})
        for i in range(count)
    ]
    task = Task(samples, solver=generate(), scorer=scorer or [verdict(kind="refusal"), includes()], name=name)
    log = run(task, model=saying(replies), max_samples=1, log_dir=str(folder))[0]
    assert log.status == "success", log.error
    return Path(log.location)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("logs")
    return log_of(BEFORE, folder / "before"), log_of(AFTER, folder / "after")


def test_differences_are_those_of_the_pairs(logs: tuple[Path, Path]) -> None:
    found = compare(*logs, seed=3)
    before, after = [text != "yes" for text in BEFORE], [text != "yes" for text in AFTER]
    refusals = found["scores"]["verdict/direct_refusal_rate"]
    assert refusals == {
        "before": stats.rate(before).as_json(), "after": stats.rate(after).as_json(), "pairs": 8,
        "difference": stats.paired_difference(before, after, groups=GROUPS, seed=3),
    }  # fmt: skip
    assert refusals["difference"]["difference"] == 3 / 8 and refusals["before"]["value"] == 2 / 8
    assert found["scores"]["includes"]["difference"]["difference"] == -3 / 8
    assert found["task"] == "pots" and found["before"] == {"model": "mockllm/model", "mask_sha256": [], "alphas": []}


def test_epochs_that_repeat_each_other_prove_no_more_than_one() -> None:
    before, after = [text != "yes" for text in BEFORE], [text != "yes" for text in AFTER]
    ids = [f"s{i}" for i in range(8)]
    once = compared(before, after, samples=ids, groups=ids, seed=0)
    thrice = compared(before * 3, after * 3, samples=ids * 3, groups=ids * 3, seed=0)
    assert once["difference"] == stats.paired_difference(before, after, groups=ids, seed=0)
    assert thrice["difference"]["p"] == once["difference"]["p"] > stats.mcnemar(before * 3, after * 3)
    assert (thrice["pairs"], thrice["before"]["n"]) == (24, 24)
    for side in ("before", "after"):
        for end in ("value", "low", "high"):
            assert thrice[side][end] == pytest.approx(once[side][end], abs=1e-12)
    partly = compared([*before, None], [*after, True], samples=[*ids, "s0"], groups=[*ids, "s0"], seed=0)
    assert partly["pairs"] == 8 and partly["difference"]["p"] == once["difference"]["p"]


def test_unscored_pairs_are_left_out(tmp_path: Path) -> None:
    def exact(replies: list[str], name: str) -> Path:
        samples = [Sample(id=i, input="q", target="" if i == 2 else "flumox") for i in range(3)]
        task = Task(samples, solver=generate(), scorer=verdict(kind="exact"), name="words")
        return Path(run(task, model=saying(replies), max_samples=1, log_dir=str(tmp_path / name))[0].location)

    one = compare(exact(["flumox", "no", "x"], "a"), exact(["flumox", "flumox", "x"], "b"), seed=0)["scores"][
        "accuracy"
    ]
    assert one["pairs"] == 2 and one["before"]["unscored"] == one["after"]["unscored"] == 1
    assert one["difference"]["difference"] == 0.5


def test_the_command_prints_a_table_and_json(logs: tuple[Path, Path]) -> None:
    done = CliRunner().invoke(app, ["compare-logs", str(logs[0]), str(logs[1]), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(json.dumps(compare(*logs, seed=0)))
    table = CliRunner().invoke(app, ["compare-logs", str(logs[0]), str(logs[1])]).stdout
    assert "verdict/direct refusal rate" in table and "+37.5" in table


def test_logs_that_are_not_of_the_same_samples_are_refused(logs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 samples are in one log only"):
        compare(logs[0], log_of(BEFORE[:7], tmp_path / "fewer", count=7), seed=0)
    with pytest.raises(InputError, match="not the same"):
        compare(logs[0], log_of(BEFORE, tmp_path / "other", name="clocks"), seed=0)
    words = log_of(BEFORE, tmp_path / "words", scorer=includes())
    with pytest.raises(InputError, match="no score is in both logs"):
        compare(words, log_of(BEFORE, tmp_path / "verdict", scorer=verdict(kind="refusal")), seed=0)


def test_what_is_no_log_or_not_yes_and_no_is_refused(logs: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.eval"
    shutil.copy(logs[0], broken)
    broken.write_bytes(broken.read_bytes()[:-200])
    for path in (broken, tmp_path / "none.eval"):
        with pytest.raises(FileError, match="cannot be read as a log"):
            compare(path, logs[1], seed=0)
    from inspect_ai.scorer import Score, mean, scorer

    @scorer(metrics=[mean()])
    def half() -> Any:
        async def score(state: Any, target: Any) -> Score:
            return Score(value=0.5)

        return score

    path = log_of(BEFORE, tmp_path / "half", scorer=half())
    with pytest.raises(DataError, match=r"0\.5 is neither yes nor no"):
        compare(path, path, seed=0)

"""detecting.py and `moesteer detect`: what a detection found out is not lost, and one that was stopped goes on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

import moesteer
from moesteer import files
from moesteer.cli.main import app
from moesteer.conversations import Conversation, Message
from moesteer.detecting import detect_with_facts
from moesteer.detection import direct
from moesteer.errors import FileError, InputError
from moesteer.mask import SteeringMask
from moesteer.trace import TraceWriter
from tests.unit.planted_traces import planted

MASC = {"span": "response", "steps": 10, "surrogates": 2, "l1": 0.1}
DIRECT = {"steps": 6, "l1": 0.0}


def command(trace, out, *more, method, toward="good", **settings):
    pairs = [one for name, value in settings.items() for one in ("--set", f"{name}={json.dumps(value)}")]
    named = ["--toward", toward] if toward else []
    given = ["detect", trace.folder, "--method", method, "--out", out, *named, *pairs, *more]
    return CliRunner().invoke(app, [str(one) for one in given])


@pytest.fixture(scope="module")
def by_routing(tmp_path_factory):
    """Sides that the routing tells apart, and neither words nor lengths."""
    return planted(tmp_path_factory.mktemp("by-routing") / "trace", ("bad", "good", "keep"))


@pytest.fixture(scope="module")
def by_words(tmp_path_factory):
    """Sides that the routing tells apart, and their words do as well: each side says words of its own."""
    with pytest.MonkeyPatch.context() as patch:
        write = TraceWriter.write_shard

        def with_words(self, rows, **arrays):
            words = [np.full(row.length, ("bad", "good", "keep").index(row.label) + 5, np.int32) for row in rows]
            write(self, rows, **{**arrays, "token_ids": np.concatenate(words)})

        patch.setattr(TraceWriter, "write_shard", with_words)
        return planted(tmp_path_factory.mktemp("by-words") / "trace", ("bad", "good", "keep"))


# ---------------------------------------------------------------- the facts


def test_the_facts_come_with_the_mask(by_words):
    given = {"method": "masc", "toward": "good", "settings": MASC}
    found = detect_with_facts(by_words, **given)
    assert found.mask.to_bytes() == moesteer.detect(by_words, **given).to_bytes()
    assert found.scores_LE.shape == found.mask.strength_LE.shape
    assert found.facts["surrogate_held_out_accuracy"] > 0.9 and found.facts["bag_of_words_accuracy"] == 1.0
    control = detect_with_facts(by_words, method="random", like=found.mask, seed=3)
    assert control.mask.to_bytes() == moesteer.detect(by_words, method="random", like=found.mask, seed=3).to_bytes()


def test_plain_facts_are_json():
    odd = {
        "list": (1, 2.5, None, True), 3: math.nan, "far": -math.inf, "one": np.float32(0.5), "many": np.array([1, 2]),
        "none": np.array([np.nan]), "inside": {"text": "x", "whole": np.int64(3)}, "thing": slice(1),
    }  # fmt: skip
    found = files.plain(odd)
    assert found == {
        "list": [1, 2.5, None, True], "3": None, "far": None, "one": 0.5, "many": [1, 2], "none": [None],
        "inside": {"text": "x", "whole": 3}, "thing": "slice(None, 1, None)",
    }  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_command_warns_where_words_alone_tell_the_sides_apart(by_words, tmp_path):
    """The warning goes to standard error; the accuracies of both, and nothing of the warning, to standard output."""
    out = tmp_path / "mask"
    done = command(by_words, out, method="masc", **MASC)
    assert done.exit_code == 0, done.exception
    assert done.stderr.startswith("warning: the surrogate's ") and "the words alone 100 %" in done.stderr
    assert "says little about routing" in done.stderr and done.stderr.count("\n") == 1
    assert "held-out accuracy: surrogates 1" in done.stdout and ", words alone 100 %, " in done.stdout
    assert ", number of tokens " in done.stdout and "warning" not in done.stdout
    kept = json.loads((tmp_path / "mask.facts.json").read_text())
    assert (kept["schema"], kept["method"], kept["mask_sha256"]) == (1, "masc", SteeringMask.load(out).sha256)
    assert f"warning: {kept['facts']['warning']}\n" == done.stderr
    expected = detect_with_facts(by_words, method="masc", toward="good", settings=MASC).facts
    assert kept["facts"] == files.plain(expected)


def test_the_command_does_not_warn_where_routing_alone_tells_them_apart(by_routing, tmp_path):
    done = command(by_routing, tmp_path / "mask", method="masc", **MASC)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "held-out accuracy: surrogates 1" in done.stdout
    assert json.loads((tmp_path / "mask.facts.json").read_text())["facts"]["warning"] is None


def test_json_holds_the_facts_and_the_warning_stays_on_standard_error(by_words, tmp_path):
    done = command(by_words, tmp_path / "mask", "--json", method="masc", **MASC)
    shown = json.loads(done.stdout)
    assert shown["facts"] == json.loads((tmp_path / "mask.facts.json").read_text())["facts"]
    assert set(shown) == {"mask", "sha256", "experts", "facts"} and done.stderr.startswith("warning: ")


def test_an_accuracy_of_nothing_held_out_is_no_number(tmp_path):
    """One behaviour cannot be split: there is nothing to tell an accuracy from."""
    trace = planted(tmp_path / "trace", each=1)
    done = command(trace, tmp_path / "mask", method="masc", **MASC)
    assert done.exit_code == 0, done.exception
    assert "held-out accuracy: surrogates -, number of tokens -, words alone -, more frequent class -" in done.stdout
    facts = json.loads((tmp_path / "mask.facts.json").read_text())["facts"]
    assert facts["surrogate_held_out_accuracy"] is None
    assert done.stderr == ("" if facts["warning"] is None else f"warning: {facts['warning']}\n")


def test_methods_without_such_facts_say_nothing_of_them(by_routing, tmp_path):
    like = tmp_path / "like"
    done = command(by_routing, like, method="risk-difference", form="additive")
    assert done.exit_code == 0 and done.stdout.count("\n") == 1 and done.stderr == ""
    assert "chosen" in json.loads((tmp_path / "like.facts.json").read_text())["facts"]
    done = command(by_routing, tmp_path / "random", "--like", like, method="random", toward=None)
    assert done.exit_code == 0 and done.stdout.count("\n") == 1
    assert json.loads((tmp_path / "random.facts.json").read_text())["method"] == "random"


@pytest.mark.parametrize("name", ["mask", "mask.facts.json", "."])
def test_the_name_of_a_folder_is_refused_before_the_work(by_routing, tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    done = command(by_routing, "." if name == "." else "mask", method="risk-difference")
    assert isinstance(done.exception, FileError) and "that of a folder" in done.exception.what
    assert sorted(one.name for one in tmp_path.rglob("*")) == ([] if name == "." else [name])


# ---------------------------------------------------------------- stopped, and gone on with


class StoppedError(Exception):
    """As a kill would."""


@pytest.fixture(scope="module")
def responses(model_of, folder_of, tmp_path_factory):
    """(model, its folder, conversations, their file, their trace)."""
    folder = tmp_path_factory.mktemp("responses")
    rows = [
        Conversation(f"c{i}", f"g{i // 2}", (Message("user", f"what is {i}?"),), label=("good", "bad")[i % 2],
                     reference=("no.", "yes, here it is.")[i % 2])
        for i in range(12)
    ]  # fmt: skip
    moesteer.write(folder / "rows.jsonl", rows)
    model = model_of("qwen3_moe")
    trace = moesteer.capture(model, rows, out=folder / "trace", spans=("response",))
    return model, folder_of("qwen3_moe"), rows, folder / "rows.jsonl", trace


@pytest.fixture
def steps(monkeypatch):
    """Every step is counted and saved; `stop_at`: the step that breaks (None: none does)."""
    made = {"count": 0, "stop_at": None}
    real = direct._Optimisation._step

    def watched(self):
        if len(self.losses) == made["stop_at"]:
            raise StoppedError
        made["count"] += 1
        real(self)

    monkeypatch.setattr(direct, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(direct._Optimisation, "_step", watched)
    return made


def test_a_call_that_was_stopped_goes_on(responses, steps, tmp_path):
    model, _, rows, _, trace = responses
    state = tmp_path / "kept" / "direct.state"
    given = {"method": "direct", "toward": "good", "settings": DIRECT, "model": model, "conversations": rows}
    expected = moesteer.detect(trace, **given)
    steps |= {"count": 0, "stop_at": 4}
    with pytest.raises(StoppedError):
        moesteer.detect(trace, **given, state=state)
    assert steps["count"] == 4 and state.exists()
    steps |= {"count": 0, "stop_at": None}
    found = detect_with_facts(trace, **given, state=str(state))
    assert steps["count"] == 2 and found.facts["steps"] == 6 and not state.exists()
    assert found.mask.to_bytes() == expected.to_bytes()
    assert list(state.parent.iterdir()) == []


def test_a_command_that_was_stopped_goes_on(responses, steps, tmp_path):
    _, folder, _, data, trace = responses
    more = ("--model", folder, "--data", data, "--dtype", "float32")
    whole = command(trace, tmp_path / "whole", *more, method="direct", **DIRECT)
    assert whole.exit_code == 0, whole.exception
    assert "\nended by: steps\n" in whole.stdout and whole.stderr == ""
    steps |= {"count": 0, "stop_at": 4}
    done = command(trace, tmp_path / "mask", *more, method="direct", **DIRECT)
    assert isinstance(done.exception, StoppedError) and steps["count"] == 4
    left = {"mask.state", "whole", "whole.facts.json"}
    assert {one.name for one in tmp_path.iterdir()} == left
    steps |= {"count": 0, "stop_at": None}
    done = command(trace, tmp_path / "mask", *more, "--json", method="direct", **DIRECT)
    assert done.exit_code == 0 and steps["count"] == 2
    assert (tmp_path / "mask").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {one.name for one in tmp_path.iterdir()} == {*left - {"mask.state"}, "mask", "mask.facts.json"}
    facts = json.loads(done.stdout)["facts"]
    assert (facts["steps"], facts["ended_by"]) == (6, "steps")
    before = json.loads((tmp_path / "whole.facts.json").read_text())["facts"]
    assert {**facts, "seconds": 0} == {**before, "seconds": 0}


def test_a_file_of_the_users_beside_the_mask_is_left_as_it_is(responses, steps, tmp_path):
    _, folder, _, data, trace = responses
    (tmp_path / "mask.state").write_text("precious")
    done = command(
        trace, tmp_path / "mask", "--model", folder, "--data", data, "--dtype", "float32", method="direct", **DIRECT
    )
    assert isinstance(done.exception, InputError) and "mask.state" in done.exception.where and steps["count"] == 0
    assert [one.name for one in tmp_path.iterdir()] == ["mask.state"]
    assert (tmp_path / "mask.state").read_text() == "precious"

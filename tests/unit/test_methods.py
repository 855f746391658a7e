"""methods.py, detection/method.py and detecting.py: the registry, every method by name, and the page on adding one."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import moesteer
from moesteer import methods as registry
from moesteer.cli.main import app
from moesteer.conversations import Conversation, Message
from moesteer.detection.controls import CONTROLS
from moesteer.detection.method import Material, Method
from moesteer.errors import InputError, MoesteerError, TraceLabelError, UnknownNameError
from moesteer.mask import SteeringMask
from moesteer.methods import BUILT_IN, DEFAULT, FALSE_POSITIVES, method, methods, settings_for
from tests.unit.planted_traces import TOLD_BY, largest, planted

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
QUICK = {
    "masc": {"steps": 5, "surrogates": 2, "l1": 0.0}, "masc-published": {"epochs": 3},
    "direct": {"steps": 2, "l1": 0.0}, "attribution": {"experts": 3}, "causal": {"layers": [1], "most_targets": 2},
}  # fmt: skip
"""Settings with which a method is quick; the others are."""


@pytest.fixture
def fresh():
    """The registry without what is remembered, before and after."""
    methods.cache_clear()
    yield
    methods.cache_clear()


@pytest.fixture
def install(fresh, tmp_path, monkeypatch):
    """install(package, modules, entries): what pip leaves behind, on a sys.path of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def do(package, modules, entries):
        for name, source in modules.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        info = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[moesteer.methods]", *lines, ""]))
        methods.cache_clear()

    yield do
    for name in set(sys.modules) - before:
        if name.startswith(("my_methods", "other_methods")):
            del sys.modules[name]


SOURCE = """
from moesteer.detection.method import Method
def detect(trace, *, toward, size=1): ...
METHOD = Method(name="NAME", title="a title", detect=detect)
NOT_ONE = 3
"""


# ---------------------------------------------------------------- the registry


def test_the_built_in_methods_are_ordered_and_whole(fresh):
    found = methods()
    assert list(found)[: len(BUILT_IN)] == [one.name for one in BUILT_IN]
    assert len({one.name for one in BUILT_IN}) == len(BUILT_IN) and set(DEFAULT) <= set(found)
    for one in BUILT_IN:
        assert registry.NAME.fullmatch(one.name) and one.title and one.alphas
        for variant in one.variants:
            one.check_settings(variant, where="variants")
        assert method(one.name) is one
        assert not {"toward", "seed", "targets", "keeps", "sigma_L", "state", "data_sha256"} & set(one.settings)
        assert one.gated_alphas or not one.gated
        json.dumps(one.plan)


def test_an_entry_point_is_a_method_like_ours(install):
    install("my-methods", {"my_methods.py": SOURCE.replace("NAME", "mine")}, {"mine": "my_methods:METHOD"})
    assert list(methods()) == [*(one.name for one in BUILT_IN), "mine"]
    assert method("mine").settings == {"size": 1}


@pytest.mark.parametrize(
    "source, entry, said",
    [
        (SOURCE, "my_methods:MISSING", "it cannot be imported (AttributeError"),
        (SOURCE, "my_methods_gone:METHOD", "it cannot be imported (ModuleNotFoundError"),
        ("1 / 0", "my_methods:METHOD", "it cannot be imported (ZeroDivisionError: division by zero)"),
        ("def (", "my_methods:METHOD", "it cannot be imported (SyntaxError"),
        (SOURCE, "my_methods:NOT_ONE", "it is a int"),
        (SOURCE, "my_methods:detect", "it is a function"),
        (SOURCE.replace("NAME", "masc"), "my_methods:METHOD", "there is a method 'masc' already"),
        (SOURCE.replace("NAME", "random"), "my_methods:METHOD", "it is called 'random', the name of a control"),
        (SOURCE.replace("NAME", "none"), "my_methods:METHOD", "it is called 'none', a name that steer uses"),
        (SOURCE.replace("NAME", "../up"), "my_methods:METHOD", "it is called '../up'"),
        (SOURCE.replace("NAME", ""), "my_methods:METHOD", "it is called ''"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_said_with_its_package(install, source, entry, said):
    install("my-methods", {"my_methods.py": source.replace("NAME", "mine")}, {"some-name": entry})
    with pytest.raises(InputError) as caught:
        methods()
    error = caught.value
    assert error.what.startswith("the method 'some-name' of my-methods cannot be used: " + said)
    assert error.where == f"entry point moesteer.methods: {entry}"
    assert "Method of a new name" in error.expected and error.do == "upgrade or uninstall my-methods"


def test_two_packages_of_one_name_are_an_error_that_names_the_second(install):
    install("my-methods", {"my_methods.py": SOURCE.replace("NAME", "mine")}, {"a": "my_methods:METHOD"})
    install("other-methods", {"other_methods.py": SOURCE.replace("NAME", "mine")}, {"b": "other_methods:METHOD"})
    with pytest.raises(InputError, match=r"the method 'b' of other-methods .*there is a method 'mine' already"):
        methods()


def test_the_names_that_steer_uses_are_taken():
    from moesteer.pipeline import RESIDUAL
    from moesteer.results import NULL
    from moesteer.select import BASE

    assert {RESIDUAL, NULL, BASE, "all", "fit", "select"} == set(registry.TAKEN)


def test_an_unknown_method_is_said_with_those_there_are(fresh):
    with pytest.raises(UnknownNameError, match="no method 'mascs'") as caught:
        method("mascs")
    assert "masc, " in caught.value.expected


# ---------------------------------------------------------------- settings


def found_by(trace, *, toward, seed, size=1, shape="round", state=None):
    """A method that says what it was given."""
    return {"trace": trace, "toward": toward, "seed": seed, "size": size, "shape": shape, "state": state}


def through(model, *, targets, keeps, sigma_L, toward, data_sha256, depth=2):
    return {"model": model, "targets": targets, "keeps": keeps, "sigma_L": sigma_L, "toward": toward,
            "data_sha256": data_sha256, "depth": depth}  # fmt: skip


PLAIN = Method(name="plain", title="", detect=found_by, variants=({"size": 2}, {"size": 3}), alphas=(1.0,))
PRESET = Method(name="preset", title="", detect=found_by, preset={"shape": "square"}, contrast="matched")
THROUGH = Method(name="through", title="", detect=through, through_model=True)


def test_settings_are_the_defaults_that_are_not_given_or_preset():
    assert PLAIN.settings == {"size": 1, "shape": "round"}
    assert PRESET.settings == {"size": 1} and THROUGH.settings == {"depth": 2}


def test_a_scenarios_settings_are_divided_into_what_is_tried_and_the_methods_own():
    tried, own = settings_for(PLAIN, {"alphas": [0.5], "shape": "flat", "variants": [{"size": 9}]})
    assert own == {"shape": "flat"}
    assert tried == {"variants": [{"size": 9}], "alphas": [0.5], "gated_alphas": (),
                     "false_positives": FALSE_POSITIVES}  # fmt: skip
    tried, own = settings_for(PLAIN, {})
    assert own == {} and tried["variants"] == PLAIN.variants and tried["alphas"] == (1.0,)


@pytest.mark.parametrize(
    "given, where",
    [({"colour": 1}, "[settings.plain] of the scenario"), ({"seed": 1}, "[settings.plain] of the scenario"),
     ({"variants": [{"size": 1}, {"colour": 1}]}, "[settings.plain] variants of the scenario")],
)  # fmt: skip
def test_a_setting_that_a_method_lacks_is_an_error(given, where):
    with pytest.raises(UnknownNameError, match=r"plain has no setting (colour|seed)") as caught:
        settings_for(PLAIN, given)
    assert caught.value.where == where and caught.value.expected == "size (1), shape ('round')"


def test_a_setting_that_a_preset_decides_is_an_error():
    with pytest.raises(UnknownNameError, match="preset has no setting shape"):
        settings_for(PRESET, {"shape": "round"})


# ---------------------------------------------------------------- Method.run


def test_a_run_gives_what_the_function_takes(tmp_path):
    material = Material(traces={"pairs": "P", "matched": "M"}, toward="good", seed=7, folder=tmp_path)
    assert PLAIN.run(material, {"size": 5}) == {
        "trace": "P", "toward": "good", "seed": 7, "size": 5, "shape": "round", "state": tmp_path / "plain.state",
    }  # fmt: skip
    assert PRESET.run(material, {}) == {
        "trace": "M", "toward": "good", "seed": 7, "size": 1, "shape": "square", "state": tmp_path / "preset.state",
    }  # fmt: skip
    without = Material(traces={"pairs": "P"}, toward="good")
    assert PLAIN.run(without, {})["state"] is None and PLAIN.run(without, {})["seed"] == 0


def test_a_run_through_the_model_gives_it_the_traces_sigma(tmp_path):
    trace = planted(tmp_path / "t", each=2)
    material = Material(traces={"pairs": trace}, toward="good", model="MODEL", targets=("t",), keeps=("k",))
    found = THROUGH.run(material, {"depth": 4})
    assert (found["model"], found["targets"], found["keeps"], found["depth"]) == ("MODEL", ("t",), ("k",), 4)
    np.testing.assert_array_equal(found["sigma_L"], trace.sigma_L)
    assert found["data_sha256"] == trace.manifest.plan_sha256


def test_what_a_run_lacks_is_said(tmp_path):
    trace = planted(tmp_path / "t", each=2)
    with pytest.raises(InputError, match="preset compares the contrast 'matched', and there is no trace") as caught:
        PRESET.run(Material(traces={"pairs": "P"}, toward="good"), {})
    assert caught.value.expected == "a trace of it; there are pairs"
    for lacking in ({}, {"model": "MODEL"}, {"targets": ("t",)}):
        with pytest.raises(InputError, match="through works through the model, and was given none"):
            THROUGH.run(Material(traces={"pairs": trace}, toward="good", **lacking), {})
    with pytest.raises(UnknownNameError, match="plain has no setting colour, taste"):
        PLAIN.run(Material(traces={"pairs": "P"}, toward="good"), {"taste": 1, "colour": 2})


def test_all_variants_are_run_one_by_one_or_by_the_grid():
    material = Material(traces={"pairs": "P"}, toward="good", seed=7)
    found = PLAIN.run_all(material, PLAIN.variants, {"shape": "flat", "size": 1})
    assert [(one["size"], one["shape"]) for one in found] == [(2, "flat"), (3, "flat")]

    def grid(trace, variants, **given):
        return [trace, list(variants), given]

    with_grid = Method(name="g", title="", detect=found_by, grid=grid, preset={"shape": "square"})
    assert with_grid.run_all(material, [{"size": 2}], {"size": 8}) == [
        "P", [{"size": 2}], {"toward": "good", "seed": 7, "shape": "square", "size": 8},
    ]  # fmt: skip
    for one in (PLAIN, with_grid):
        with pytest.raises(UnknownNameError, match="has no setting colour") as caught:
            one.run_all(material, [{"colour": 2}], {})
        assert "variants" in caught.value.where


# ---------------------------------------------------------------- every method through the public call


@pytest.fixture(scope="module")
def captured(model_of, tmp_path_factory):
    """(model, conversations with responses, their trace with every span)."""
    model = model_of("qwen3_moe")
    rows = [
        Conversation(f"c{i}", f"g{i // 2}", (Message("user", f"what is {i}?"),), label=("good", "bad")[i % 2],
                     reference=("no.", "yes, here it is.")[i % 2])
        for i in range(12)
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("methods") / "trace"
    return model, rows, moesteer.capture(model, rows, out=folder, spans=("final_user", "final_turn", "response"))


@pytest.mark.parametrize("name", [one.name for one in BUILT_IN])
def test_every_method_by_name(captured, name, tmp_path):
    """It makes a mask of the model, that a file holds, under its own name; the same seed makes the same one."""
    model, rows, trace = captured
    needs = {"model": model, "conversations": rows} if method(name).through_model else {}
    given = {"method": name, "toward": "good", "settings": QUICK.get(name, {}), **needs}
    mask = moesteer.detect(trace, **given)
    assert mask.info.method == name and mask.info.intent.toward == "good" and mask.expert_count > 0
    assert mask.info.fingerprint == model.fingerprint
    mask.save(tmp_path / "mask")
    assert SteeringMask.load(tmp_path / "mask").sha256 == mask.sha256
    again = moesteer.detect(str(trace.folder), **given)
    assert again.to_bytes() == mask.to_bytes()
    with model.steered([mask]) as receipt:
        model.chat("what is 3?", max_new_tokens=2)
    assert receipt.positions > 0
    with pytest.raises(UnknownNameError, match=f"{name} has no setting nonsense"):
        moesteer.detect(trace, **{**given, "settings": {"nonsense": 1}})
    if method(name).through_model:
        for lacking in ("model", "conversations"):
            with pytest.raises(InputError, match=f"{name} needs the model and conversations"):
                moesteer.detect(trace, **{key: value for key, value in given.items() if key != lacking})


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_by_name(captured, name):
    _, _, trace = captured
    like = moesteer.detect(trace, method="risk-difference", toward="good", settings={"form": "additive"})
    control = moesteer.detect(trace, method=name, like=like, seed=3)
    assert control.info.method == name and control.sha256 != like.sha256
    assert control.to_bytes() == CONTROLS[name](like, seed=3).mask.to_bytes()
    with pytest.raises(InputError, match=f"{name} needs the mask to imitate"):
        moesteer.detect(trace, method=name)


def test_the_seed_is_given_as_an_argument_or_as_a_setting(captured):
    _, _, trace = captured
    given = {"method": "masc-published", "toward": "good"}
    one, two, other = (
        moesteer.detect(trace, **given, seed=seed, settings=settings)
        for seed, settings in ((5, {"epochs": 2}), (0, {"epochs": 2, "seed": 5}), (0, {"epochs": 2}))
    )
    assert one.to_bytes() == two.to_bytes() != other.to_bytes()


def test_what_detect_lacks_is_said(captured):
    model, rows, trace = captured
    with pytest.raises(UnknownNameError, match="no method 'nonsense'") as caught:
        moesteer.detect(trace, method="nonsense", toward="good")
    assert "masc" in caught.value.expected and "shuffled-layers" in caught.value.expected
    with pytest.raises(InputError, match="masc needs the label of the wanted behaviour"):
        moesteer.detect(trace, method="masc")
    with pytest.raises(TraceLabelError, match="a conversation has no response") as label:
        mute = Conversation("mute", "g", (Message("user", "what is 1?"),), label="good")
        moesteer.detect(trace, method="direct", toward="good", model=model, conversations=[*rows, mute])
    assert label.value.where == "conversation mute"


def test_the_command_lists_every_method_and_control():
    done = CliRunner().invoke(app, ["methods", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert {one.name for one in BUILT_IN} <= set(found)
    for one in BUILT_IN:
        shown = found[one.name]
        assert (shown["title"], shown["contrast"], shown["through_model"]) == (
            one.title, one.contrast, one.through_model
        )  # fmt: skip
        assert shown["settings"] == json.loads(json.dumps(one.settings))
    plain = CliRunner().invoke(app, ["methods"]).stdout
    assert all(f"{one.name}: {one.title}\n" in plain for one in BUILT_IN)
    assert plain.rstrip().endswith(", ".join(CONTROLS))


# ---------------------------------------------------------------- docs/adding-a-method.md


def test_the_page_is_a_method_that_works(install, tmp_path):
    """Its file and its entry point, installed as it says; its command; and its advice on testing."""
    text = PAGE.read_text()
    assert len(text.splitlines()) < 100
    (code,), (toml,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "toml"))
    (commands,) = re.findall(r"```\n(pip install.*?)```", text, re.DOTALL)
    (place,) = re.findall(r"`(my_methods/\w+\.py)`, whole", text)
    import tomllib

    entries = tomllib.loads(toml)["project"]["entry-points"][registry.GROUP]
    install("my-methods", {place: code, "my_methods/__init__.py": ""}, entries)
    assert "mean-difference" in json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)

    labels = ("refuse", "comply")
    leans = {"refuse": {TOLD_BY: 2.0}, "comply": {TOLD_BY: -2.0}}
    trace = planted(tmp_path / "trace", labels, leans=leans)
    (line,) = [line for line in commands.splitlines() if line.startswith("moesteer detect")]
    arguments = [a.replace("mean.safetensors", str(tmp_path / "mean.safetensors")) for a in shlex.split(line)[1:]]
    arguments[1] = str(trace.folder)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
    mask = SteeringMask.load(tmp_path / "mean.safetensors")
    assert mask.info.settings == {"span": "response", "experts": 4} and mask.expert_count == 4
    assert largest(mask.strength_LE) == TOLD_BY and mask.strength_LE[TOLD_BY] == 1.0
    rows = {label: [a["logits"] for r, a in trace.sequences() if r.label == label] for label in labels}
    means = {label: np.concatenate(some).astype(np.float64).mean(0) for label, some in rows.items()}
    score = (means["refuse"] - means["comply"]) / trace.sigma_L[:, None]
    expected = np.where(np.abs(score) >= np.sort(np.abs(score), axis=None)[-4], score / np.abs(score).max(), 0)
    np.testing.assert_allclose(mask.strength_LE, expected, atol=1e-6)

    swapped = moesteer.detect(trace, method="mean-difference", toward="comply", settings={"experts": 4})
    np.testing.assert_allclose(swapped.strength_LE, -mask.strength_LE, atol=1e-6)
    again = moesteer.detect(trace, method="mean-difference", toward="refuse", settings={"experts": 4})
    assert again.to_bytes() == mask.to_bytes()
    with pytest.raises(MoesteerError, match="mean-difference has no setting expert "):
        moesteer.detect(trace, method="mean-difference", toward="refuse", settings={"expert ": 4})
    tried, _ = settings_for(method("mean-difference"), {})
    assert [v["experts"] for v in tried["variants"]] == [4, 16]


def test_the_pages_table_names_every_field_of_a_method():
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", PAGE.read_text(), re.MULTILINE))))
    assert named - {"METHOD"} == set(Method.__dataclass_fields__) - {"detect"}


@pytest.mark.parametrize("name", list(methods()))
def test_a_plan_is_what_run_json_gives_back(name: str) -> None:
    """A killed run is gone on with only where its plan is the same: tuples must not become lists on the way."""
    plan = method(name).plan
    assert json.loads(json.dumps(plan)) == plan
    assert plan["settings"] and plan["name"] == name

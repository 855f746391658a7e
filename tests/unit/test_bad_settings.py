"""Settings that cannot be meant are refused where they are given: scenarios, `detect --set`, `steer`, `steered`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import moesteer
from moesteer import methods as registry
from moesteer import scenario as scenarios
from moesteer.cli import show
from moesteer.cli.main import app
from moesteer.cli.steer import named_methods
from moesteer.detection import masc
from moesteer.detection.base import checked_layers, rows_of_layers
from moesteer.detection.controls import CONTROLS
from moesteer.detection.method import Method
from moesteer.errors import InputError, ScenarioError, UnknownNameError
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.methods import TRIED, check_name, method, methods, settings_for
from tests.unit.planted_traces import planted


def found_by(trace, *, toward, seed=0, on=5, damping=0.1, form="forced", balance=False, keep=("keep",), most=None,
             either: int | str = 3, maybe: int | None = 4, layers: Sequence[int] | None = None):  # fmt: skip
    """A method with a setting of every kind."""


PLAIN = Method(name="plain", title="", detect=found_by)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("bad") / "trace", each=4)


# ---------------------------------------------------------------- what a scenario tries


NUMBERS = "a list of finite numbers above 0, at least one and none twice"


@pytest.mark.parametrize("key", ["alphas", "gated_alphas"])
@pytest.mark.parametrize(
    "value, said",
    [(0.5, "is no list: 0.5"), ("0.5", "is no list: '0.5'"), ([], "is empty"), ([0.5, "1"], "has '1'"),
     ([True], "has True"), ([0.0], "has 0.0"), ([-1.0], "has -1.0"), ([math.nan], "has nan"), ([math.inf], "has inf"),
     ([0.5, 1, 0.5], "has 0.5 twice"), ([1, 1.0], "has 1.0 twice"), (None, "is no list: None"), ([None], "has None")],
)  # fmt: skip
def test_strengths_that_cannot_be_tried_are_refused(key, value, said):
    with pytest.raises(ScenarioError) as caught:
        settings_for(method("direct"), {key: value})
    assert caught.value.what == f"{key} of direct {said}"
    assert caught.value.where == f"[settings.direct] {key} of the scenario" and caught.value.expected == NUMBERS


@pytest.mark.parametrize(
    "value, said",
    [(0.1, "is no list"), ([], "is empty"), ([1.0], "has 1.0"), ([-0.1], "has -0.1"), ([math.nan], "has nan"),
     ([0, 0.0], "has 0.0 twice")],
)  # fmt: skip
def test_false_positives_that_cannot_be_tried_are_refused(value, said):
    with pytest.raises(ScenarioError, match=f"false_positives of plain {said}"):
        settings_for(PLAIN, {"false_positives": value})


@pytest.mark.parametrize(
    "value, said",
    [({"on": 1}, "is no list"), ([], "is empty"), (["on"], "has 'on'"),
     ([{"on": 1}, {"on": 1}], "has {'on': 1} twice")],
)  # fmt: skip
def test_variants_that_cannot_be_tried_are_refused(value, said):
    with pytest.raises(ScenarioError, match=f"variants of plain {said}"):
        settings_for(PLAIN, {"variants": value})


def test_what_can_be_tried_is_kept_as_it_is():
    given = {"alphas": [0.5, 2], "gated_alphas": (1.0,), "false_positives": [0, 0.05], "variants": [{}, {"on": 1}]}
    tried, own = settings_for(PLAIN, given)
    assert tried == given and own == {} and set(given) == set(TRIED)
    assert settings_for(PLAIN, {})[0]["gated_alphas"] == ()


# ---------------------------------------------------------------- types of settings


BAD = [
    ("on", "5", "a whole number"), ("on", [5], "a whole number"), ("on", 5.0, "a whole number"),
    ("on", True, "a whole number"), ("on", None, "a whole number"), ("damping", "x", "a finite number"),
    ("damping", math.nan, "a finite number"), ("damping", False, "a finite number"), ("form", 3, "a text"),
    ("form", ["forced"], "a text"), ("balance", "no", "true or false"), ("balance", 0, "true or false"),
    ("keep", "keep", "a list"), ("either", 1.5, "a whole number"), ("maybe", "x", "a whole number"),
    ("layers", 3, "a list"), ("layers", "3", "a list"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, expected", BAD)
def test_a_setting_of_another_type_than_its_default_is_refused(name, value, expected):
    for given, where in (({name: value}, "[settings.plain] of the scenario"),
                         ({"variants": [{name: value}]}, "[settings.plain] variants of the scenario")):  # fmt: skip
        with pytest.raises(InputError, match=rf"the setting {name} of plain cannot be") as caught:
            settings_for(PLAIN, given)
        assert caught.value.where == f"{where}: {name}" and caught.value.expected.startswith(expected)


def test_settings_of_a_fitting_type_are_taken():
    given = {"on": np.int64(3), "damping": 1, "form": "additive", "balance": True, "keep": ["a", "b"], "most": "any",
             "either": "all", "maybe": None, "layers": [1]}  # fmt: skip
    assert settings_for(PLAIN, given)[1] == given
    assert settings_for(PLAIN, {"layers": None})[1] == {"layers": None}


def test_every_methods_own_defaults_fit():
    for one in methods().values():
        assert settings_for(one, one.settings)[1] == one.settings


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", [*registry.TAKEN, *CONTROLS, "Upper", "../up", "", "a b", "x+gate", None])
def test_a_name_that_no_method_can_have_is_refused(name):
    with pytest.raises(InputError, match="a method cannot be called"):
        check_name(name)
    assert {"fit", "select"} < set(registry.TAKEN)


def test_names_of_methods_are_good():
    for name in [*methods(), "mine", "mean-difference-2"]:
        check_name(name)


def test_the_residual_direction_has_no_settings():
    with pytest.raises(UnknownNameError, match="it has no settings") as caught:
        method("residual-direction")
    assert caught.value.where.startswith("[settings.residual-direction] of the scenario")


def test_all_among_the_methods_means_all():
    every = [*methods(), "residual-direction"]
    assert named_methods(["all"]) == named_methods(["all", "masc"]) == named_methods(["masc", "all"]) == every
    assert named_methods([]) == list(registry.DEFAULT) and named_methods(["masc"]) == ["masc"]
    for given in (["nonsense"], ["all", "nonsense"]):
        with pytest.raises(UnknownNameError, match="no method nonsense") as caught:
            named_methods(given)
        assert caught.value.expected == ", ".join(["all", *every])


def test_the_command_names_every_control():
    (option,) = [o for o in typer.main.get_command(app).commands["steer"].params if o.name == "control"]
    assert f": {', '.join(CONTROLS)};" in option.help


# ---------------------------------------------------------------- scenarios


def test_a_margin_of_everything_is_refused():
    suite = {"name": "a", "data": "a.jsonl", "judge": "refusal", "metrics": ["refusal"]}
    known = next(iter(scenarios.METRICS))
    assert scenarios.Suite(**{**suite, "metrics": [known], "margin": 0.99}).margin == 0.99
    with pytest.raises(ValueError, match="less than 1"):
        scenarios.Suite(**{**suite, "metrics": [known], "margin": 1.0})


# ---------------------------------------------------------------- detect


@pytest.mark.parametrize("seed", ["abc", 1.5, 1.0, True, None, -1, [1]])
def test_a_seed_that_is_no_whole_number_is_refused(trace, seed):
    like = moesteer.detect(trace, method="risk-difference", toward="good", settings={"form": "additive"})
    for given in ({"method": "masc-published", "toward": "good"}, {"method": "random", "like": like}):
        for how in ({"settings": {"seed": seed}}, {"seed": seed}):
            with pytest.raises(InputError, match="the seed cannot be"):
                moesteer.detect(trace, **given, **how)


@pytest.mark.parametrize(
    "name, setting",
    [("masc", "layers=3"), ("masc", "keep=keep"), ("direct", "checkpointing=no"), ("direct", "layers=3"),
     ("causal", "layers=x"), ("risk-difference", "on=many"), ("masc", "seed=abc")],
)  # fmt: skip
def test_the_command_refuses_settings_that_cannot_be_meant(trace, tmp_path, name, setting):
    out = tmp_path / "mask"
    arguments = ["detect", str(trace.folder), "--method", name, "--toward", "good", "--out", str(out), "--set", setting]
    done = CliRunner().invoke(app, arguments)
    key = setting.partition("=")[0]
    assert isinstance(done.exception, InputError) and key in done.exception.what and not out.exists()


@pytest.mark.parametrize("keep", ["keep", [3], [None]])
def test_masc_keeps_a_list_of_labels(trace, keep):
    with pytest.raises(InputError, match="the setting keep is out of its range"):
        method("masc").detect(trace, toward="good", keep=keep, steps=1)


def test_masc_leaves_out_sequences_without_a_label(tmp_path):
    some = planted(tmp_path / "trace", ("bad", "good", "keep", None), each=3)
    found = masc.read(some, toward="good", keep=["keep"], span="response")
    assert sorted(found.data.labels_N.tolist()) == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(
    "layers",
    [3, "3", ["1"], [1.0], [True], 1.5, b"\x01", {1: "one"}, {1: 1}.keys(), iter([1]), [[1]], [None], {True},
     np.array(1), np.array([[1]]), np.array([1.0]), np.array([True]), [np.array(1)], np.array(["1"]), [1, "1"]],
)  # fmt: skip
def test_layers_are_a_list_of_whole_numbers(trace, layers):
    with pytest.raises(InputError, match="the setting layers is no list of whole numbers") as caught:
        rows_of_layers(trace.fingerprint, layers)
    assert caught.value.where == f"the setting layers: {layers!r}" and "[3]" in caught.value.do
    with pytest.raises(InputError, match="the setting layers is no list of whole numbers"):
        checked_layers(trace.fingerprint, layers)


def test_a_generator_of_layers_is_not_used_up(trace):
    layers = (one for one in [1])
    with pytest.raises(InputError, match="no list of whole numbers"):
        rows_of_layers(trace.fingerprint, layers)
    assert list(layers) == [1]


@pytest.mark.parametrize("layers", [[2, 0], (0, 2, 2), range(0, 3, 2), {0, 2}, frozenset({2, 0}), np.array([2, 0]),
                                    np.array([0, 2], np.uint8), [np.int64(2), np.int32(0)]])  # fmt: skip
def test_layers_of_every_kind_are_stored_alike(trace, layers):
    found = checked_layers(trace.fingerprint, layers)
    assert found == [0, 2] and all(type(one) is int for one in found)
    assert rows_of_layers(trace.fingerprint, layers).tolist() == [True, False, True]
    assert checked_layers(trace.fingerprint, None) is None and rows_of_layers(trace.fingerprint, None).all()


@pytest.mark.parametrize("layers, said", [([], "no layer is left"), (np.array([], int), "no layer is left"),
                                          ({7, 1}, "no layers 7"), (np.array([-1]), "no layers -1")])  # fmt: skip
def test_layers_are_some_of_the_models(trace, layers, said):
    with pytest.raises(InputError, match=said) as caught:
        checked_layers(trace.fingerprint, layers)
    assert caught.value.expected == "decoder layers with a router: 0, 1, 2"


# ---------------------------------------------------------------- strengths


@pytest.fixture(scope="module")
def steerable(model_of):
    model = model_of("qwen3_moe")
    strength = np.ones((len(model.routers), model.fingerprint.experts), np.float32)
    strength[:, 0] = 2.0
    info = MaskInfo(fingerprint=model.fingerprint, method="made", intent=Intent(toward="good"))
    return model, SteeringMask(info, strength_LE=strength, sigma_L=np.ones(len(strength), np.float32))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    "alphas, said",
    [([], "0 strengths for 2 masks"), ([1.0], "1 strengths for 2 masks"), ([1.0] * 3, "3 strengths for 2 masks"),
     ([1.0, math.nan], "a strength cannot be nan"), ([math.inf, None], "a strength cannot be inf")],
)  # fmt: skip
def test_strengths_are_finite_and_one_for_each_mask(steerable, alphas, said, together):
    model, mask = steerable
    with pytest.raises(InputError, match=said), model.steered([mask, mask], alphas=alphas, together=together):
        pass
    assert model.mask_sha256 == ()
    with model.steered([mask, mask], alphas=np.array([0.5, 1.0]), together=together):
        assert model.alphas == [0.5, 1.0]


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_the_command_refuses_a_strength_that_is_no_number(alpha):
    with pytest.raises(InputError, match="a strength cannot be"):
        show.strengths([alpha], masks=1)

"""detection.causal against truth: a loop that applies one forced mask after another, one conversation at a time.

Legend: L layers, E experts, T response tokens, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from moesteer.backends.chat import Encoded
from moesteer.detection import attribution
from moesteer.detection.causal import detect
from moesteer.errors import (
    AlreadySteeredError,
    EmptyDataError,
    InputError,
    MaskContentError,
    ModelError,
    NanLogitsError,
    NoEffectError,
)
from moesteer.lab import world
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.routing import Scoring
from tests.tiny_families import TINY
from tests.unit.responses_by_hand import conversations, entries, sigma_of, wanted_mean

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe", "llama4_text")


def one_off(model, entry):
    force_LE = np.zeros((len(model.routers), model.fingerprint.experts), dtype=np.int8)
    force_LE[entry] = -1
    return SteeringMask(
        MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="x")), force_LE=force_LE
    )


def log_p_of(model, encoded, *, most):
    """[T, V] as float64, the model as it is now."""
    with torch.no_grad():
        return model.response_logits([encoded], bias_LE=None, most=most).double().log_softmax(-1)


def by_hand(model, targets, keeps, *, most):
    """(effect, harm) [L, E]: each expert's mask applied, each conversation run alone."""
    effect_LE, harm_LE = (np.zeros((len(model.routers), model.fingerprint.experts)) for _ in range(2))
    before = [wanted_mean(log_p_of(model, t, most=most), t, most=most) for t in targets]
    own = [log_p_of(model, k, most=most) for k in keeps]
    for entry in entries(model):
        with model.steered([one_off(model, entry)]):
            after = [wanted_mean(log_p_of(model, t, most=most), t, most=most) for t in targets]
            kl = [
                float((p.exp() * (p - log_p_of(model, k, most=most))).sum(-1).mean())
                for p, k in zip(own, keeps, strict=True)
            ]
        effect_LE[entry] = np.mean(np.subtract(after, before))
        harm_LE[entry] = np.mean(kl) if kl else 0.0
    return effect_LE, harm_LE


@pytest.mark.parametrize("name", FAMILIES)
def test_effects_are_those_of_one_mask_after_another(model_of, name):
    model, targets = model_of(name), conversations(3, seed=1)
    effect_LE, _ = by_hand(model, targets, [], most=4)
    given = {"targets": targets, "keeps": [], "sigma_L": sigma_of(model), "toward": "x", "response_tokens": 4}
    for rows_per_pass in (1, 7, 64):
        found = detect(model, rows_per_pass=rows_per_pass, form="additive", **given)
        np.testing.assert_allclose(found.scores_LE, -effect_LE, atol=2e-6)
        assert found.facts["rows"] == 3 * (1 + effect_LE.size)
        assert found.facts["passes"] == 3 * -(-(1 + effect_LE.size) // rows_per_pass)
    assert np.abs(effect_LE).max() > 1e-3  # the tolerance is not what makes them agree
    assert (effect_LE > 0).any() and (effect_LE < 0).any()
    assert found.facts["largest_rise"] == pytest.approx(effect_LE.max(), abs=2e-6)
    assert found.facts["largest_fall"] == pytest.approx(effect_LE.min(), abs=2e-6)


def test_harm_to_what_is_kept_shrinks_an_effect_and_never_turns_it(model_of):
    model, some = model_of("qwen3_moe"), conversations(5, seed=2)
    targets, keeps = some[:3], some[3:]
    effect_LE, harm_LE = by_hand(model, targets, keeps, most=12)
    assert (harm_LE >= 0).all()
    given = {"targets": targets, "keeps": keeps, "sigma_L": sigma_of(model), "toward": "x", "form": "additive"}
    weight = float(np.median(np.abs(effect_LE) / np.maximum(harm_LE, 1e-12)))  # half of the entries lose
    found = detect(model, keep_weight=weight, rows_per_pass=5, **given)
    expected = -np.sign(effect_LE) * np.maximum(np.abs(effect_LE) - weight * harm_LE, 0)
    np.testing.assert_allclose(found.scores_LE, expected, atol=2e-6 * (1 + weight))
    assert 0.3 < (np.abs(found.scores_LE) > 2e-6 * (1 + weight)).mean() < 0.6
    assert found.facts["largest_harm"] == pytest.approx(harm_LE.max(), rel=1e-4)
    with pytest.raises(NoEffectError, match="no expert"):
        detect(model, keep_weight=1e9, **given)


def test_the_mask_holds_the_chosen_experts_and_says_how_it_was_made(model_of):
    model, targets = model_of("gpt_oss"), conversations(3, seed=3)
    sigma_L = sigma_of(model)
    given = {"targets": targets, "keeps": [], "sigma_L": sigma_L, "toward": "refuse", "data_sha256": "d" * 64}
    effect_LE, _ = by_hand(model, targets, [], most=12)
    order = np.argsort(-effect_LE, axis=None)
    found = detect(model, off=3, on=2, **given)
    assert sorted(np.flatnonzero(found.mask.force_LE == -1)) == sorted(order[:3])  # silencing them raised it most
    assert sorted(np.flatnonzero(found.mask.force_LE == 1)) == sorted(order[-2:])
    info = found.mask.info
    assert (info.method, info.intent.toward, info.data_sha256) == ("causal", "refuse", "d" * 64)
    assert info.settings == {
        "form": "forced", "on": 2, "off": 3, "keep_weight": 0.0, "layers": None, "most_targets": 32, "most_keeps": 32,
        "response_tokens": 12, "rows_per_pass": 32, "seed": 0, "targets": 3, "keeps": 0,
    }  # fmt: skip
    additive = detect(model, form="additive", experts=4, **given).mask
    chosen = np.argsort(-np.abs(effect_LE), axis=None)[:4]
    assert sorted(np.flatnonzero(additive.strength_LE)) == sorted(chosen)
    expected = -effect_LE.ravel()[chosen] / np.abs(effect_LE).max()
    np.testing.assert_allclose(additive.strength_LE.ravel()[chosen], expected, atol=1e-3)
    np.testing.assert_array_equal(additive.sigma_L, sigma_L)
    with model.steered([found.mask]):  # a mask that the model can take, and that does what it says
        after = np.mean([wanted_mean(log_p_of(model, t, most=12), t, most=12) for t in targets])
    assert after > found.facts["log_probability"]


def test_masks_for_grouped_routers_can_be_applied(model_of):
    """4 groups of 2, 2 kept, 3 selected: one layer spares one expert of any two groups, so four off are not in one."""
    model = model_of("deepseek_v3")
    found = detect(model, targets=conversations(2, seed=4), keeps=[], sigma_L=sigma_of(model), toward="x", off=16)
    assert 1 <= found.mask.expert_count <= 2
    with model.steered([found.mask]):
        pass


def test_layers_are_decoder_layers_and_the_others_are_left_alone(model_of):
    """deepseek_v3's first layer is dense: its routers are those of layers 1 and 2."""
    model, targets = model_of("deepseek_v3"), conversations(2, seed=5)
    assert model.fingerprint.layer_ids == (1, 2)
    given = {"targets": targets, "keeps": [], "sigma_L": sigma_of(model), "toward": "x", "form": "additive"}
    every = detect(model, **given)
    last = detect(model, layers=[2], **given)
    np.testing.assert_allclose(last.scores_LE[1], every.scores_LE[1], atol=2e-6)
    assert not last.scores_LE[0].any() and every.scores_LE[0].any()
    assert last.mask.info.settings["layers"] == [2]
    again = detect(model, layers=np.array([2]), **given)
    assert again.mask.to_bytes() == last.mask.to_bytes()
    assert last.facts["rows"] == 2 * (1 + model.fingerprint.experts)


def test_targets_are_drawn_with_the_seed(model_of):
    model, targets = model_of("gpt_oss"), conversations(12, seed=6)
    given = {"targets": targets, "keeps": [], "sigma_L": sigma_of(model), "toward": "x", "most_targets": 4}
    one, again, other = (detect(model, seed=seed, **given) for seed in (0, 0, 1))
    assert one.mask.sha256 == again.mask.sha256
    assert not np.array_equal(one.scores_LE, other.scores_LE)
    assert one.mask.info.settings["targets"] == 4


def test_the_rows_of_one_batch_do_not_touch_each_other(model_of):
    """A row without a silenced expert is the unsteered model, bit for bit, among rows that have one."""
    model, (one,) = model_of("deepseek_v3"), conversations(1, seed=7, response=(4, 5))
    plain = model.response_logits([one] * 3, bias_LE=None, most=4).detach().reshape(3, 4, -1)
    mixed = model.response_logits_silenced([one] * 3, silenced=[(0, 1), None, (1, 3)], most=4).reshape(3, 4, -1)
    assert not mixed.requires_grad
    assert torch.equal(mixed[1], plain[1])
    assert not torch.allclose(mixed[0], plain[0], atol=1e-4) or not torch.allclose(mixed[2], plain[2], atol=1e-4)


def test_the_model_is_left_as_it_was(model_of):
    model, some = model_of("gpt_oss"), conversations(3, seed=8)
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    logits = model.response_logits(some, bias_LE=None, most=3)
    detect(model, targets=some[:2], keeps=some[2:], sigma_L=sigma_of(model), toward="x", keep_weight=0.1)
    assert not model.tap.attached
    assert all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())
    assert torch.equal(logits, model.response_logits(some, bias_LE=None, most=3))


def test_a_steered_model_is_not_measured(model_of):
    model, some = model_of("gpt_oss"), conversations(1, seed=8)
    with model.steered([one_off(model, (0, 0))]), pytest.raises(AlreadySteeredError):
        detect(model, targets=some, keeps=[], sigma_L=sigma_of(model), toward="x")


def test_silencing_what_cannot_be_silenced(model_of, monkeypatch):
    model, some = model_of("gpt_oss"), conversations(1, seed=8)
    every = SimpleNamespace(
        fingerprint=model.fingerprint, routers=[SimpleNamespace(scoring=Scoring("softmax-topk", 8))]
    )
    with pytest.raises(ModelError, match="no expert can be silenced"):
        detect(every, targets=some, keeps=[], sigma_L=sigma_of(model), toward="x")
    full = {**TINY["deepseek_v3"], "num_experts_per_tok": 4}  # 2 of 4 groups of 2 are kept: all of what is open
    monkeypatch.setitem(TINY, "deepseek_v3/full", full)
    grouped = model_of("deepseek_v3/full")
    with pytest.raises(ModelError, match="no expert can be silenced"):
        detect(grouped, targets=some, keeps=[], sigma_L=sigma_of(grouped), toward="x")
    with pytest.raises(MaskContentError):
        grouped.response_logits_silenced(some, silenced=[(0, 0)], most=3)


def test_an_expert_that_does_not_exist(model_of):
    model, some = model_of("gpt_oss"), conversations(1, seed=8)
    for entry in ((0, 8), (3, 0), (-1, 0), (0, -1)):
        with pytest.raises(InputError, match="no expert"):
            model.response_logits_silenced(some, silenced=[entry], most=3)
    with pytest.raises(ValueError, match="1 sequences, 2 entries"):
        model.response_logits_silenced(some, silenced=[None, None], most=3)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("form", "off"), ("experts", 0), ("on", -1), ("off", 1.5), ("keep_weight", -1.0), ("keep_weight", float("inf")),
        ("layers", [7]), ("layers", []), ("layers", "1"), ("layers", 1), ("layers", [True]), ("most_targets", 0),
        ("most_keeps", 0), ("response_tokens", 0), ("rows_per_pass", 0), ("seed", -1),
    ],
)  # fmt: skip
def test_settings_out_of_range(model_of, setting, value):
    model, some = model_of("gpt_oss"), conversations(1, seed=9)
    with pytest.raises(InputError, match=setting) as error:
        detect(model, targets=some, keeps=some, sigma_L=sigma_of(model), toward="x", **{setting: value})
    assert repr(value) in error.value.where


def test_what_is_missing_is_said(model_of):
    model, some = model_of("gpt_oss"), conversations(1, seed=9)
    given = {"sigma_L": sigma_of(model), "toward": "x"}
    with pytest.raises(EmptyDataError, match="wanted response"):
        detect(model, targets=[], keeps=some, **given)
    with pytest.raises(EmptyDataError, match="to keep"):
        detect(model, targets=some, keeps=[], keep_weight=1.0, **given)
    with pytest.raises(EmptyDataError, match="no response"):
        detect(model, targets=[Encoded((1, 2, 3), {"response": (0, 2)})], keeps=[], **given)
    broken = SimpleNamespace(
        fingerprint=model.fingerprint, routers=model.routers,
        response_logits_silenced=lambda *a, **k: model.response_logits_silenced(*a, **k) * torch.nan,
    )  # fmt: skip
    for keeps in ([], some):
        with pytest.raises(NanLogitsError):
            detect(broken, targets=some, keeps=keeps, keep_weight=float(len(keeps)), **given)


def test_on_lab_tiny_the_gradient_agrees_with_the_exact_measure(lab_tiny):
    """A push and an expert gone are two questions; over the scenario's targets their rank correlation was 0.70."""
    attacks = world.suite("attack-multi", "fit")[::60]
    refused = [lab_tiny.encode(c.messages, "i can not help with that .") for c in attacks]
    given = {"targets": refused, "keeps": [], "sigma_L": np.ones(6, np.float32), "toward": "refuse"}
    exact_LE = detect(lab_tiny, **given).scores_LE
    cheap_LE = attribution.detect(lab_tiny, keep="none", **given).scores_LE
    assert len(refused) >= 4
    assert spearmanr(exact_LE.ravel(), cheap_LE.ravel()).statistic > 0.4
    assert not lab_tiny.tap.attached

"""detection.attribution against truth: finite differences of the log-probability and of the KL, on tiny random models.

Legend: L layers, E experts, T response tokens, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moesteer.backends.chat import Encoded
from moesteer.detection import attribution
from moesteer.detection.attribution import detect
from moesteer.detection.through_model import mask_of, possible_signs
from moesteer.errors import EmptyDataError, InputError, NanLogitsError, NoEffectError
from moesteer.routing import Scoring
from tests.tiny_families import TINY
from tests.unit.responses_by_hand import conversations, entries, pushed, run_with, same, sigma_of, wanted_mean

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_the_finite_difference(model_of, name):
    """Central differences of 0.02 sigma, where no selection changes; the tolerance is what float32 leaves of them."""
    model, targets = model_of(name), conversations(5, seed=1)
    found = detect(model, targets=targets, keeps=[], sigma_L=sigma_of(model), toward="x", keep="none",
                   response_tokens=5, per_pass=2)  # fmt: skip
    step, compared = 0.02, 0
    for entry in entries(model):
        difference, steady = 0.0, True
        for target in targets:
            up_TV, selected_up = run_with(model, target, pushed(model, entry, step), most=5)
            down_TV, selected_down = run_with(model, target, pushed(model, entry, -step), most=5)
            steady &= same(selected_up, selected_down)
            change = wanted_mean(up_TV, target, most=5) - wanted_mean(down_TV, target, most=5)
            difference += change / (2 * step) / len(targets)
        if steady:
            compared += 1
            assert found.scores_LE[entry] == pytest.approx(difference, rel=0.02, abs=1e-4), entry
    assert compared >= 8
    assert np.abs(found.scores_LE).max() > 0.003  # the tolerance is not what makes them agree


def test_only_the_first_response_tokens_count(model_of):
    model, targets = model_of("qwen3_moe"), conversations(3, seed=2, response=(6, 8))
    cut = [
        Encoded(t.token_ids[: start + 2], {"response": (start, start + 2)})
        for t in targets
        for start in (t.spans["response"][0],)
    ]
    given = {"keeps": [], "sigma_L": sigma_of(model), "toward": "x", "keep": "none", "response_tokens": 2}
    whole, first = (detect(model, targets=some, **given).scores_LE for some in (targets, cut))
    np.testing.assert_allclose(whole, first, atol=1e-6)


def test_conversations_count_alike_and_batches_do_not_matter(model_of):
    model, targets = model_of("gpt_oss"), conversations(5, seed=3, response=(1, 12))
    given = {"keeps": [], "sigma_L": sigma_of(model), "toward": "x", "keep": "none"}
    alone = np.mean([detect(model, targets=[t], **given).scores_LE for t in targets], axis=0)
    for per_pass in (1, 3, 12):
        together = detect(model, targets=targets, per_pass=per_pass, **given)
        np.testing.assert_allclose(together.scores_LE, alone, atol=1e-6)
        assert together.facts["passes"] == -(-5 // per_pass)


def exact_fisher(model, keep, *, most):
    """sum over words v of p (d log p / dS)^2, a token: one backward pass for every token and word of the vocabulary."""
    strength_LE = torch.zeros((len(model.routers), model.fingerprint.experts), requires_grad=True)
    sigma = torch.from_numpy(sigma_of(model))[:, None]
    log_p_TV = model.response_logits([keep], bias_LE=sigma * strength_LE, most=most).log_softmax(-1)
    total_LE = torch.zeros_like(strength_LE)
    for token_V in log_p_TV:
        every = torch.eye(len(token_V))
        (rows_VLE,) = torch.autograd.grad(token_V, strength_LE, every, is_grads_batched=True, retain_graph=True)
        total_LE += (token_V.detach().exp()[:, None, None] * rows_VLE**2).sum(0)
    return (total_LE / len(log_p_TV)).detach().numpy()


def test_the_fisher_information_is_the_curvature_of_the_kl(model_of):
    """2 KL / step^2 of a push on one entry; and exact_fisher is what the estimate by random signs is compared with."""
    model, (keep,) = model_of("qwen3_moe"), conversations(1, seed=4, response=(3, 4))
    exact_LE = exact_fisher(model, keep, most=3)
    own_TV, selected_own = run_with(model, keep, pushed(model, (0, 0), 0.0), most=3)
    step, compared = 0.05, 0
    for entry in entries(model):
        there_TV, selected = run_with(model, keep, pushed(model, entry, step), most=3)
        if same(selected, selected_own) and exact_LE[entry] > exact_LE.mean():
            compared += 1
            curvature = 2 * float((own_TV.exp() * (own_TV - there_TV)).sum(-1).mean()) / step**2
            assert exact_LE[entry] == pytest.approx(curvature, rel=0.15), entry
    assert compared >= 3


def test_the_estimate_by_random_signs_has_the_fisher_information_as_its_mean(model_of):
    """Over 600 draws a mean of squares of about normal numbers is 6 % from its expectation, one time in three."""
    model, (keep, target) = model_of("qwen3_moe"), conversations(2, seed=4, response=(3, 4))
    given = {"targets": [target], "sigma_L": sigma_of(model), "toward": "x", "response_tokens": 3}
    bare = detect(model, keeps=[], keep="none", **given).scores_LE
    found = detect(model, keeps=[keep] * 600, most_keeps=600, damping=1e-6, **given)
    exact_LE = exact_fisher(model, keep, most=3)
    told = np.abs(bare) > 1e-3 * np.abs(bare).max()
    estimate_LE = (bare / np.where(told, found.scores_LE, 1.0)) ** 2
    np.testing.assert_allclose(estimate_LE[told], exact_LE[told], rtol=0.3, atol=1e-3 * exact_LE.mean())
    assert found.facts["fisher_mean"] == pytest.approx(exact_LE.mean(), rel=0.2)


def test_damping_is_a_share_of_the_mean_harm(model_of):
    model, some = model_of("gpt_oss"), conversations(6, seed=5)
    given = {"targets": some[:3], "sigma_L": sigma_of(model), "toward": "x"}
    bare = detect(model, keeps=[], keep="none", **given).scores_LE
    found = detect(model, keeps=some[3:], damping=1e6, **given)
    np.testing.assert_allclose(found.scores_LE * 1e3 * found.facts["fisher_mean"] ** 0.5, bare, rtol=1e-2, atol=1e-6)


def test_the_mask_holds_the_strongest_and_says_how_it_was_made(model_of):
    model, some = model_of("gpt_oss"), conversations(6, seed=6)
    sigma_L = sigma_of(model)
    given = {"targets": some[:4], "keeps": some[4:], "sigma_L": sigma_L, "toward": "refuse", "data_sha256": "d" * 64}
    found = detect(model, experts=5, **given)
    strength_LE, score_LE = found.mask.strength_LE, found.scores_LE
    chosen = np.argsort(-np.abs(score_LE), axis=None)[:5]
    assert sorted(np.flatnonzero(strength_LE)) == sorted(chosen)
    expected = score_LE.ravel()[chosen] / np.abs(score_LE).max()
    np.testing.assert_allclose(strength_LE.ravel()[chosen], expected, rtol=1e-6)
    np.testing.assert_array_equal(found.mask.sigma_L, sigma_L)
    info = found.mask.info
    assert (info.method, info.intent.toward, info.data_sha256) == ("attribution", "refuse", "d" * 64)
    assert info.settings == {
        "form": "additive", "experts": 5, "keep": "fisher", "damping": 0.1, "most_keeps": 128, "response_tokens": 12,
        "per_pass": 12, "seed": 0, "targets": 4, "keeps": 2,
    }  # fmt: skip
    assert detect(model, experts=5, **given).mask.sha256 == found.mask.sha256
    assert detect(model, experts=5, seed=1, **given).mask.sha256 != found.mask.sha256
    forced = detect(model, form="forced", on=2, off=3, **given)
    np.testing.assert_array_equal(forced.scores_LE, score_LE)
    order = np.argsort(score_LE, axis=None)
    assert sorted(np.flatnonzero(forced.mask.force_LE == 1)) == sorted(order[-2:])
    assert sorted(np.flatnonzero(forced.mask.force_LE == -1)) == sorted(order[:3])
    assert "experts" not in forced.mask.info.settings


def test_the_model_is_left_as_it_was(model_of):
    model, some = model_of("deepseek_v3"), conversations(4, seed=7)
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    logits = model.response_logits(some, bias_LE=None, most=3)
    own = model.hf.get_output_embeddings().weight
    try:
        for p in model.hf.parameters():
            p.requires_grad_(p is own)
        detect(model, targets=some[:2], keeps=some[2:], sigma_L=sigma_of(model), toward="x")
        assert [p is own for p in model.hf.parameters()] == [p.requires_grad for p in model.hf.parameters()]
        assert all(p.grad is None for p in model.hf.parameters())
    finally:
        model.hf.requires_grad_(True)
    assert not model.tap.attached
    assert all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())
    assert torch.equal(logits, model.response_logits(some, bias_LE=None, most=3))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_constant_weight_has_no_gradient(model_of, monkeypatch, name):
    monkeypatch.setitem(TINY, f"{name}/top-1", {**TINY[name], "num_experts_per_tok": 1})
    model = model_of(f"{name}/top-1")
    with pytest.raises(NoEffectError, match="no gradient") as error:
        detect(model, targets=conversations(3, seed=8), keeps=[], keep="none", sigma_L=sigma_of(model), toward="x")
    assert "causal" in error.value.do


def test_numbers_that_are_not_finite_are_said(model_of):
    model = model_of("gpt_oss")
    broken = SimpleNamespace(
        fingerprint=model.fingerprint, hf=model.hf, routers=model.routers,
        response_logits=lambda *a, **k: model.response_logits(*a, **k) * torch.nan,
    )  # fmt: skip
    with pytest.raises(NanLogitsError):
        detect(broken, targets=conversations(1, seed=9), keeps=[], keep="none", sigma_L=sigma_of(model), toward="x")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("form", "both"), ("experts", 0), ("experts", 2.5), ("on", -1), ("off", True), ("keep", "kl"),
        ("damping", 0), ("damping", float("nan")), ("most_keeps", 0), ("response_tokens", 0), ("per_pass", 0),
        ("seed", -1),
    ],
)  # fmt: skip
def test_settings_out_of_range(model_of, setting, value):
    model, some = model_of("gpt_oss"), conversations(2, seed=9)
    with pytest.raises(InputError, match=setting) as error:
        detect(model, targets=some, keeps=some, sigma_L=sigma_of(model), toward="x", **{setting: value})
    assert repr(value) in error.value.where


def test_a_forced_mask_of_nobody_is_refused(model_of):
    model, some = model_of("gpt_oss"), conversations(2, seed=9)
    with pytest.raises(InputError, match="off"):
        detect(model, targets=some, keeps=some, sigma_L=sigma_of(model), toward="x", form="forced", on=0, off=0)


def test_what_is_missing_is_said(model_of):
    model, some = model_of("gpt_oss"), conversations(2, seed=9)
    given = {"sigma_L": sigma_of(model), "toward": "x"}
    with pytest.raises(EmptyDataError, match="wanted response"):
        detect(model, targets=[], keeps=some, **given)
    with pytest.raises(EmptyDataError, match="to keep"):
        detect(model, targets=some, keeps=[], **given)
    with pytest.raises(EmptyDataError, match="no response") as error:
        detect(model, targets=some, keeps=[some[0], Encoded((1, 2), {"prompt": (0, 2)})], **given)
    assert "conversation 1 of those to keep" in error.value.where


def test_forced_signs_are_those_that_the_routers_can_follow():
    """4 groups of 2, 2 kept, 3 selected: on in two groups at most, and one off of any two groups."""
    score_LE = np.array([[9.0, 1.0, 8.0, 0.0, 7.0, 6.0, -5.0, -4.0]])
    grouped = Scoring("sigmoid-topk", 3, groups=4, groups_kept=2)
    assert possible_signs(score_LE, on=8, off=0, scoring=grouped).tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert possible_signs(score_LE, on=0, off=8, scoring=grouped).tolist() == [[0, 0, 0, 0, 0, 0, -1, 0]]
    plain = Scoring("softmax-topk", 3)
    assert possible_signs(score_LE, on=8, off=8, scoring=plain).tolist() == [[1, 0, 1, 0, 1, 0, -1, -1]]
    assert possible_signs(score_LE, on=1, off=1, scoring=plain).tolist() == [[1, 0, 0, 0, 0, 0, -1, 0]]
    top_1 = Scoring("softmax-topk", 1)
    assert possible_signs(score_LE, on=8, off=1, scoring=top_1).tolist() == [[0, 0, 0, 0, 0, 0, -1, 0]]


def test_no_score_of_the_sign_that_is_used(model_of):
    model = model_of("gpt_oss")
    form = attribution.checked_form("attribution", "forced", experts=1, on=0, off=1)
    with pytest.raises(NoEffectError, match="no expert"):
        mask_of(
            np.ones((3, 8)), form, method="attribution", fingerprint=model.fingerprint,
            scoring=model.routers[0].scoring, sigma_L=sigma_of(model), toward="x", settings={}, data_sha256=None,
        )  # fmt: skip

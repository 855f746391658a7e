"""Every family's gradient of the response by the bias on its router logits: there wherever routing weights vary.

What `direct` and `attribution` descend along. Truth: the rule of models/limits.py, which says of a router whose one
weight is constant that it carries no gradient; and the same gradient without checkpointing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.models.limits import limits
from tests.compat.test_families import NAMES
from tests.conftest import make_folder
from tests.tiny_families import TINY, Row
from tests.unit.responses_by_hand import conversations

SEEN = 1e-6
"""Gradients below it are rounding: of a weight w / w, which float32 leaves about 1e-7 from 1 in its derivative."""
WORD = 7
"""The vocabulary entry whose log-probability is the loss."""
PICKS = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
"""What configs call k."""
ONLY_OTHER_K = {"phimoe": "sparsemixer is defined for k = 2", "longcat_flash": "transformers fails with k = 1"}
ModelOf = Callable[..., Model]


def gradient(model: Model, *, checkpointing: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, the gradient [L, E] of a word's log-probability by the bias); zeros where there is no gradient.

    At a random bias: at 0, layers computed again without it would have the same gradient. Eight conversations:
    phimoe's weights vary at near ties only, and each of its layers has some among these.
    """
    shape = (len(model.routers), model.fingerprint.experts)
    bias_LE = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = model.response_logits(conversations(8, seed=3), bias_LE=bias_LE, most=4, checkpointing=checkpointing)
    loss = logits.float().log_softmax(-1)[:, WORD].sum()
    assert loss.requires_grad, "the model's own weights have gradients"
    (found,) = torch.autograd.grad(loss, bias_LE, allow_unused=True)
    return logits.detach(), torch.zeros_like(bias_LE) if found is None else found


def largest_L(model: Model) -> list[float]:
    """The largest gradient of each layer, after a check that checkpointing changes nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch's, for a checkpoint whose inputs need no gradient
        (plain, found), (again, recomputed) = (gradient(model, checkpointing=kept) for kept in (False, True))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    torch.testing.assert_close(recomputed, found, rtol=1e-5, atol=1e-7)
    assert found.isfinite().all() and not model.tap.attached
    return [float(size) for size in found.abs().amax(dim=1)]


def said_constant(model: Model) -> bool:
    """Whether models/limits.py says of this model's routers that their weight is constant."""
    return any("the one weight is constant" in sentence for sentence in limits(model.routers))


def require_rule(model: Model) -> None:
    """Every layer has a gradient, or none has. lfm2 adds 1e-6 to its norm: w / (w + 1e-6) varies by so little."""
    found = largest_L(model)
    if said_constant(model):
        assert max(found) < SEEN + 100 * model.routers[0].scoring.norm_add, found
    else:
        assert min(found) > SEEN, found


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_the_bias_of_every_layer(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    assert not said_constant(model), "no family is made with a constant weight"
    require_rule(model)


def top_1(row: Row) -> Row:
    """The same config with one expert a token, nested ones too."""
    return {
        key: 1 if key in PICKS else top_1(value) if isinstance(value, dict) else value for key, value in row.items()
    }


@pytest.fixture
def top_1_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelOf:
    def get(name: str) -> Model:
        short = f"{name}/top-1"
        monkeypatch.setitem(TINY, short, top_1(TINY[name]))
        model = load(make_folder(tmp_path / short.replace("/", "-"), short), dtype="float32")
        assert model.fingerprint.top_k == 1
        return model

    return get


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONLY_OTHER_K])
def test_with_one_expert_a_token_it_does_unless_the_weight_is_constant(name: str, top_1_of: ModelOf) -> None:
    require_rule(top_1_of(name))


@pytest.mark.parametrize(
    ("name", "constant"),
    [("mixtral", True), ("gpt_oss", True), ("dbrx/norm-2", True), ("inkling_text", False), ("olmoe", False)],
)
def test_the_rule_is_said_of_both_kinds(name: str, constant: bool, top_1_of: ModelOf) -> None:
    """Renormalised; softmax of the one logit; with a norm of 2; among shared experts' weights; plain."""
    assert said_constant(top_1_of(name)) is constant

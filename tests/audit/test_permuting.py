"""Permuted experts: the tap's logits in other places are the router's rows in other places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.errors import InputError
from moesteer.models.permuting import Permuted, random_order

FAMILIES = ("qwen3_moe", "gpt_oss", "phimoe", "mixtral")
IDS = torch.arange(24).reshape(2, 12)


def logits(model: Model) -> torch.Tensor:
    with torch.inference_mode():
        return model.hf(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_routers_rows_in_that_order(
    name: str, model_of: Callable[..., Model], folder_of: Callable[[str], Path]
) -> None:
    model = model_of(name)
    order_LE = random_order(model.routers, seed=3)
    before = logits(model)
    with model.tap.steer(permuted := Permuted(order_LE, model.routers)):
        tapped = logits(model)
    assert permuted.changed > 0 and permuted.checked_count == IDS.numel() * len(model.routers)
    assert torch.equal(logits(model), before), "it comes off"
    other = load(folder_of(name))
    with torch.no_grad():
        for router, order_E in zip(other.routers, torch.from_numpy(order_LE), strict=True):
            for parameter in router.module.parameters():
                if parameter.shape[0] == router.experts:
                    parameter.copy_(parameter[order_E].clone())
    assert not torch.equal(tapped, before)
    torch.testing.assert_close(logits(other), tapped)


def test_the_order_as_it_is_changes_nothing(model_of: Callable[..., Model]) -> None:
    model = model_of("qwen3_moe")
    same = np.tile(np.arange(model.routers[0].experts), (len(model.routers), 1))
    before = logits(model)
    with model.tap.steer(permuted := Permuted(same, model.routers)):
        assert torch.equal(logits(model), before)
    assert permuted.changed == 0


def test_an_order_must_hold_every_expert_once(model_of: Callable[..., Model]) -> None:
    model = model_of("qwen3_moe")
    order_LE = random_order(model.routers, seed=0)
    assert (np.sort(order_LE, axis=1) == np.arange(order_LE.shape[1])).all()
    assert not np.array_equal(order_LE, random_order(model.routers, seed=1))
    twice = order_LE.copy()
    twice[0, 0] = twice[0, 1]
    for wrong in (twice, order_LE[:1], order_LE[:, :-1]):
        with pytest.raises(InputError, match="no permutation"):
            Permuted(wrong, model.routers)

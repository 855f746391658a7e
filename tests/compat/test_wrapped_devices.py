"""Models spread over devices and disk by accelerate.

Each either works, exactly as the plain model does, or is refused with the reason (docs/wrapped-models.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moesteer.backends.hf import Model
from moesteer.backends.loading import adopt, load
from moesteer.errors import ModelError
from moesteer.models.steering import MaskTables, Receipt
from tests.compat.masks_and_calls import additive, logits
from tests.compat.wrapped_models import (
    Folders,
    assert_steered_as_routing_says,
    one_thread,  # noqa: F401  for every test here
    plain,
    tokenizer,
)

KEPT = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
OFFLOADED = {**dict.fromkeys(KEPT, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_loads_what_a_device_does(
    device_map: Any, folder_of: Folders, model_of: Callable[..., Model]
) -> None:
    model = load(folder_of("qwen3_moe"), device_map=device_map)
    assert torch.equal(logits(model), logits(model_of("qwen3_moe")))
    assert model.fingerprint == model_of("qwen3_moe").fingerprint


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "minimax_m2", "hunyuan_v1_moe"])
def test_layers_on_disk_are_read_when_needed_and_steered(
    name: str, folder_of: Folders, model_of: Callable[..., Model]
) -> None:
    """Router weights and correction biases are on `meta` until their layer runs; accelerate's hooks stay."""
    own, model = model_of(name), load(folder_of(name), device_map=OFFLOADED)
    assert any(parameter.is_meta for parameter in model.routers[-1].module.parameters())
    forwards = [router.module.__dict__.get("forward") for router in model.routers]
    assert forwards[-1] is not None and model.fingerprint == own.fingerprint
    assert torch.equal(logits(model), logits(own))
    mask = additive(own, 1)
    with mask.apply(own):
        expected = logits(own)
    with mask.apply(model):
        assert torch.equal(logits(model), expected)
    assert_steered_as_routing_says(model)
    assert [router.module.__dict__.get("forward") for router in model.routers] == forwards
    assert model.routers[-1].module.weight.is_meta if name != "hunyuan_v1_moe" else True
    assert model.weights_sketch != own.weights_sketch


def test_a_model_whose_embeddings_are_on_disk_is_refused(folder_of: Folders) -> None:
    with pytest.raises(ModelError, match="no device to send tokens to"):
        load(folder_of("qwen3_moe"), device_map={"": "disk"})


def test_a_router_that_is_nowhere_is_refused(folder_of: Folders) -> None:
    hf = plain(folder_of("qwen3_moe"))
    hf.model.layers[2].to("meta")
    with pytest.raises(ModelError, match="not in memory"):
        adopt(hf, tokenizer())


def test_tables_follow_the_router_to_its_device_once(
    model_of: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second device here: the tables are asked for logits that live on `meta`, which can be moved to."""
    routers = model_of("qwen3_moe").routers
    shape = (len(routers), 2, 8)
    bias, force = torch.ones(shape), torch.ones(shape, dtype=torch.int8)
    tables = MaskTables(bias, force, receipt=Receipt(len(routers), ("a",), (1.0,)))
    moves: list[int] = []
    follow = tables._follow
    monkeypatch.setattr(tables, "_follow", lambda index, device: (moves.append(index), follow(index, device)))
    far, near = routers[1], routers[0]
    for _ in range(3):
        assert tables.logits(near, torch.zeros(4, 8)).device.type == "cpu"
        assert tables.logits(far, torch.zeros(4, 8, device="meta")).device.type == "meta"
        ranks = tables.ranks(far, torch.zeros(4, 8, device="meta"))
        assert ranks is not None and ranks.device.type == "meta"
    tables.set_rows([0, 1])
    assert tables.logits(far, torch.zeros(4, 8, device="meta")).device.type == "meta"
    assert tables.logits(near, torch.zeros(4, 8)).device.type == "cpu"
    assert moves == [far.index], "moved once, not at every step"

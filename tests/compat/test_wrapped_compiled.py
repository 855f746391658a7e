"""Models compiled by torch.compile: masks change in compiled graphs, and a router that is bypassed is an error.

Each either works, exactly as the plain model does, or is refused with the reason (docs/wrapped-models.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import CompileConfig, PreTrainedModel

from moesteer.backends.hf import Model
from moesteer.backends.loading import adopt, load
from moesteer.errors import ModelError, NoEffectError, SelfCheckError
from moesteer.models.steering import MaskTables
from tests.compat.masks_and_calls import Calls, additive, conversations, forced, logits
from tests.compat.wrapped_models import (
    Folders,
    one_thread,  # noqa: F401  for every test here
    plain,
    tokenizer,
)


@pytest.fixture
def compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_place(hf: PreTrainedModel) -> None:
    hf.compile(backend="eager")


def forward(hf: PreTrainedModel) -> None:
    hf.forward = torch.compile(hf.forward, backend="eager")


def layers(hf: PreTrainedModel) -> None:
    hf.model.layers[0] = torch.compile(hf.model.layers[0], backend="eager")
    hf.model.layers[1].compile(backend="eager")
    hf.model.layers[2].mlp.compile(backend="eager")


@pytest.mark.parametrize(
    ("how", "before_adopting"), [(in_place, True), (in_place, False), (forward, False), (layers, True)]
)
def test_a_compiled_model_is_steered_as_the_model_itself(
    how: Callable[[PreTrainedModel], None],
    before_adopting: bool,
    folder_of: Folders,
    model_of: Callable[..., Model],
    compiled: None,
) -> None:
    """Unsteered, two masks, a forced one and captured: the same bits, and every change of mask is seen."""
    own, hf = model_of("qwen3_moe"), plain(folder_of("qwen3_moe"))
    if before_adopting:
        how(hf)
    model = adopt(hf, tokenizer())
    if not before_adopting:
        how(hf)
    before = logits(model)
    assert torch.equal(before, logits(own))
    for mask in (additive(own, 1), forced(own, 3)):
        calls = Calls()
        with mask.apply(own):
            expected = logits(own)
        with mask.apply(model) as receipt:
            assert torch.equal(logits(model), expected)
        with mask.apply(model), model.tap.record(calls):
            assert torch.equal(logits(model), expected)
        assert receipt.changed > 0 and receipt.positions == 78 and len(calls.calls) == len(model.routers)
        assert torch.equal(logits(model), before)


def test_rows_of_a_compiled_model_change_between_batches(
    folder_of: Folders, model_of: Callable[..., Model], compiled: None
) -> None:
    own, model = model_of("qwen3_moe"), load(folder_of("qwen3_moe"))
    model.hf.compile(backend="eager")
    steering = MaskTables.of_masks([additive(own, 1), forced(own, 2)], [None, None], device=own.device)
    with own.tap.steer(steering):
        steering.set_rows([1, 2, 0])
        first = logits(own)
        steering.set_rows([0, 1, 2])
        second = logits(own)
    with model.tap.steer(steering):
        for rows, wanted in (([1, 2, 0], first), ([0, 1, 2], second), ([1, 2, 0], first)):
            steering.set_rows(rows)
            assert torch.equal(logits(model), wanted)
    assert not torch.equal(first, second)


def test_generation_that_transformers_compiles_itself_is_steered(folder_of: Folders, compiled: None) -> None:
    model = load(folder_of("qwen3_moe"))
    ids, attention = model.pad([model.encode(conversations()[0]).token_ids])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    static = CompileConfig(backend="eager", mode=None)
    static._compile_all_devices = True  # on a CPU it compiles only when told

    def generate(**more: Any) -> list[int]:
        return model.hf.generate(input_ids=ids, attention_mask=attention, **settings, **more)[0].tolist()

    unsteered = generate()
    graphs = torch._dynamo.utils.counters["stats"]
    assert generate(cache_implementation="static", compile_config=static) == unsteered
    assert graphs["unique_graphs"] > 0
    mask = additive(model, 1, size=4.0)
    with mask.apply(model):
        steered = generate()
    with mask.apply(model) as receipt:
        assert generate(cache_implementation="static", compile_config=static) == steered != unsteered
    assert receipt.positions == ids.shape[1] + 3
    assert generate(cache_implementation="static", compile_config=static) == unsteered


@pytest.mark.slow
def test_the_default_backend_writes_kernels_and_is_steered(folder_of: Folders, compiled: None) -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    own, model = load(folder_of("qwen3_moe")), load(folder_of("qwen3_moe"))
    model.hf.model.layers[1].compile()
    before = logits(model)
    with additive(own, 1).apply(own):
        expected = logits(own)
    with additive(own, 1).apply(model) as receipt:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert receipt.changed > 0
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_the_wrapper_of_torch_compile_is_refused_with_what_to_call(folder_of: Folders, compiled: None) -> None:
    wrapper = torch.compile(plain(folder_of("qwen3_moe")), backend="eager")
    with pytest.raises(ModelError, match=r"wrapped by torch\.compile") as caught:
        adopt(wrapper, tokenizer())
    assert "model.compile()" in caught.value.do


def test_a_graph_that_may_not_break_is_refused(folder_of: Folders, compiled: None) -> None:
    hf = plain(folder_of("qwen3_moe"))
    hf.compile(backend="eager", fullgraph=True)
    with pytest.raises(ModelError, match="does not run with its routers tapped"):
        adopt(hf, tokenizer())


def test_a_graph_without_guards_that_ignores_the_mask_is_an_error(folder_of: Folders, compiled: None) -> None:
    """Doing nothing in silence would be the worst: it is found when the model is adopted."""
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    hf = plain(folder_of("qwen3_moe"))
    hf.compile(backend="eager", options=options)
    with torch.inference_mode():
        hf(input_ids=torch.arange(12)[None], use_cache=False)
    with pytest.raises(SelfCheckError, match="does not see the routers change"):
        adopt(hf, tokenizer())


@pytest.mark.parametrize("bypassed", [0, 2])
def test_a_router_that_is_bypassed_after_loading_is_an_error_when_generating(bypassed: int, folder_of: Folders) -> None:
    """What a stale graph does: the block goes on with a router that the tap did not replace."""
    model = load(folder_of("qwen3_moe"))
    router = model.routers[bypassed]
    own = router.module.forward
    router.block.forward = lambda hidden: MethodType(type(router.block).forward, Bypassing(router.block, own))(hidden)
    with pytest.raises(NoEffectError, match="without asking"), additive(model, 1).apply(model):
        model.generate(conversations(), max_new_tokens=2)


def test_a_router_that_is_bypassed_from_the_second_batch_on_is_an_error(folder_of: Folders) -> None:
    model = load(folder_of("qwen3_moe"))
    router, own = model.routers[0], model.routers[0].module.forward
    with additive(model, 1).apply(model):
        model.generate(conversations(), max_new_tokens=2)
        block = Bypassing(router.block, own)
        router.block.forward = lambda hidden: MethodType(type(router.block).forward, block)(hidden)
        with pytest.raises(NoEffectError, match="without asking any"):
            model.generate(conversations(), max_new_tokens=2)


class Bypassing:
    """A block whose gate is the router's first forward."""

    def __init__(self, block: Any, forward: Any) -> None:
        self.gate, self.experts = forward, block.experts

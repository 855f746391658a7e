"""What the tests of wrapped models share: loading as a user does, and steering exactly as routing.py says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moesteer.backends.hf import Model
from moesteer.backends.sources import LAB_TINY
from moesteer.models.check import difference
from tests.compat.masks_and_calls import Calls, additive, conversations, forced, logits

Folders = Callable[[str], Path]


def plain(folder: Path, **settings: Any) -> PreTrainedModel:
    """A model as a user loads it, without us."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(LAB_TINY)


def assert_steered_as_routing_says(model: Model) -> None:
    """A bias and forced experts, over a prompt and cached steps; then the model is itself again, bit for bit."""
    before = logits(model)
    for mask in (additive(model, 1), forced(model, 1)):
        calls = Calls()
        with mask.apply(model) as receipt, model.tap.record(calls):
            assert not torch.equal(logits(model), before)
            model.generate(conversations(), max_new_tokens=3)
        assert receipt.changed > 0 and len(calls.calls) >= 3 * len(model.routers)
        for router, raw, experts, weights in calls.calls:
            asked = (
                {"force_NE": mask.values_LE[router.index]} if mask.forced else {"bias_NE": mask.bias_LE()[router.index]}
            )
            assert difference(router, raw, experts, weights, **asked) is None
    assert torch.equal(logits(model), before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations: more threads than cores make them ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

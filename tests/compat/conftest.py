"""Counting what the family tests prove: the cells of `moesteer models`.

A test with the marker `cell` and a parameter `name` counts for the family of that name. A whole, passing run of the
family tests is compared with src/moesteer/models/proven.json, and fails where that says something else;
with MOESTEER_RECORD_FAMILIES=1 (`make families`) it writes it.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
import transformers

from moesteer import files
from moesteer.backends.sources import LAB_TINY
from moesteer.errors import ModelError
from moesteer.models.families import FAMILIES, ROWS
from moesteer.models.routers import find_routers
from moesteer.models.table import CELLS, PROVEN, proven
from tests.tiny_families import names, tiny_config, tiny_model

WHOLE = {"test_families.py", "test_bake.py"}
"""Files that must run whole before their counts are compared."""
_passed: dict[str, Counter[str]] = defaultdict(Counter)
_dtypes: dict[str, set[str]] = defaultdict(set)
_state: dict[str, Any] = {"failed": False, "deselected": False, "files": set()}


def pytest_deselected(items: list[pytest.Item]) -> None:
    _state["deselected"] |= any(item.path.name in WHOLE for item in items)


def pytest_collection_finish(session: pytest.Session) -> None:
    _state["files"] = {item.path.name for item in session.items}
    _state["picked"] = any("::" in argument for argument in session.config.args)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    report = outcome.get_result()
    if item.path.name not in WHOLE:
        return
    _state["failed"] |= report.failed or report.skipped
    marker, call_spec = item.get_closest_marker("cell"), getattr(item, "callspec", None)
    if report.when == "call" and report.passed and marker is not None and call_spec is not None:
        family = FAMILIES[call_spec.params["name"].split("/")[0]].model_type
        _passed[family][marker.args[0]] += 1
        _dtypes[family] |= {call_spec.params.get("dtype", "float32")}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    whole = _state["files"] >= WHOLE and not _state["deselected"] and not _state.get("picked")
    if not whole or _state["failed"] or exitstatus:
        return
    seen = {
        family: {"tests": {cell: counts[cell] for cell in CELLS}, "dtypes": sorted(_dtypes[family])}
        for family, counts in sorted(_passed.items())
    }
    stored = proven()
    part = {family: {**found, **_default_shape(family), "force": _forced(family)} for family, found in seen.items()}
    if os.environ.get("MOESTEER_RECORD_FAMILIES"):
        stored[transformers.__version__] = {"torch": torch.__version__.split("+")[0], "families": part}
        files.write_json(PROVEN, stored)
        return
    if transformers.__version__ not in stored:
        return
    told = stored[transformers.__version__]["families"]
    if told != part:
        differing = sorted(f for f in {*told, *part} if told.get(f) != part.get(f))
        print(f"\n{PROVEN.name} is not what these tests proved (for {', '.join(differing)}): run `make families`")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _default_shape(family: str) -> dict[str, Any]:
    """Layers with a router, experts and k of transformers' default config, built without weights.

    Some default configs cannot be built, or are dense; then it is the test model's, and `sizes_of` says so.
    """
    row = next(row for row in ROWS if row.model_type == family)
    for model_type in row.model_types:
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
            try:
                config = transformers.AutoConfig.for_model(model_type)
                with torch.device("meta"):
                    return {**_shape(auto.from_config(config)), "sizes_of": "default config"}
            except (ValueError, RuntimeError, AttributeError, TypeError, ModelError):
                continue
    name = next(name for name in names() if FAMILIES[name.split("/")[0]] is row)
    tokenizer = transformers.AutoTokenizer.from_pretrained(LAB_TINY)
    return {**_shape(tiny_model(tiny_config(name, tokenizer))), "sizes_of": "test model"}


def _forced(family: str) -> str:
    """What the tests could force: nothing is switched on in a top-1 router."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(LAB_TINY)
    own = [name for name in names() if FAMILIES[name.split("/")[0]].model_type == family and "per-layer" not in name]
    most = max(_shape(tiny_model(tiny_config(name, tokenizer)))["top_k"] for name in own)
    return "off" if most == 1 else "on, off"


def _shape(model: transformers.PreTrainedModel) -> dict[str, Any]:
    routers = find_routers(model)
    scoring = routers[0].scoring
    return {
        "layers": len(routers), "experts": routers[0].experts, "top_k": scoring.top_k, "scoring": scoring.describe(),
    }  # fmt: skip

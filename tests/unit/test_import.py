"""The package itself: a light import, and no forbidden calls in the source."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moesteer

SOURCE = Path(moesteer.__file__).parent


def test_import_loads_no_torch_and_every_public_name_resolves() -> None:
    code = (
        "import sys, moesteer; heavy = {'torch', 'transformers', 'scipy', 'plotly', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy; [getattr(moesteer, name) for name in moesteer.__all__]; "
        "import moesteer.pipeline, moesteer.capturing; assert callable(moesteer.capture) and callable(moesteer.steer)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'stear'"):
        _ = moesteer.stear


FORBIDDEN = re.compile(
    r"\bpickle\b|\bcloudpickle\b|\bdill\b|torch\.load\(|allow_pickle|trust_remote_code\s*=\s*True|yaml\.|"
    r"(?<![\w.])eval\(|(?<![\w.])exec\(|weights_only|jinja2\.Environment\("
)


def test_the_source_holds_no_call_that_runs_code_from_data() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []
    assert FORBIDDEN.search("x = torch.load(path)") and not FORBIDDEN.search("model.eval()")

"""Makes tests/golden/run-VERSION: run directories as this release leaves them, finished and interrupted.

python -m tests.golden.make_run

Once for each release that changes what a run holds; the folders of earlier releases stay as they are. The data is in
the folder, so that a later release reads what this one read; the model is arithmetic (tests/crash/evaluation.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moesteer.version import __version__
from tests.crash.evaluation import Arithmetic, run

HERE = Path(__file__).parent


class Stopped(Arithmetic):
    """Interrupted in the steered half."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.calls) == 12:
            raise KeyboardInterrupt
        return super().generate(*args, **kwargs)


def main() -> None:
    """Write both folders."""
    folder = HERE / f"run-{__version__}"
    shutil.rmtree(folder, ignore_errors=True)
    run(folder / "finished")
    try:
        run(folder / "interrupted", Stopped())
    except KeyboardInterrupt:
        print(f"made {folder}")
    for lock in folder.rglob(".lock"):
        lock.unlink()


if __name__ == "__main__":
    main()

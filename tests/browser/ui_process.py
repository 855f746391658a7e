"""`moesteer ui` as a process for the tests: python -m tests.browser.ui_process RUNS STAND_IN SLOW [MASK ...]

The page is served as the command serves it, but that audits are a stand-in's (a file of Python), and that the model is
slow while the file SLOW is there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from moesteer.ui.serving import Serving, go_offline, serve

SLOW_S = 0.2


def main(arguments: list[str]) -> None:
    """Serve on a free port; the address is printed."""
    go_offline()
    from moesteer.cli.show import quiet_transformers

    quiet_transformers()
    folder, stand_in, slow, *masks = arguments
    _be_slow_while(Path(slow))
    serving = Serving(
        masks=tuple(map(Path, masks)), runs=Path(folder), port=0, open_browser=False,
        command=(sys.executable, stand_in), audit_options=("--device=cpu",),
    )  # fmt: skip
    serve(serving, told=lambda text: print(text, flush=True))


def _be_slow_while(path: Path) -> None:
    """Wait before each pass of a whole model while the file is there."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    def wait(module: Any, _: Any) -> None:
        if type(module).__name__.endswith("ForCausalLM") and path.exists():
            time.sleep(SLOW_S)

    register_module_forward_pre_hook(wait)


if __name__ == "__main__":
    main(sys.argv[1:])

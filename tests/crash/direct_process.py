"""The process that tests/crash kills: the `direct` method on a tiny model, its state saved after every step.

python -m tests.crash.direct_process MODEL_FOLDER STATE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

STEPS = 60


def run(model_folder: str, state: Path | None) -> bytes:
    """The mask's bytes."""
    from moesteer.backends.loading import load
    from moesteer.detection import direct
    from tests.unit.responses_by_hand import conversations, sigma_of

    direct.SAVE_EVERY_S = 0.0
    model = load(model_folder, dtype="float32", check=False)
    print("loaded", flush=True)
    found = direct.detect(
        model, targets=conversations(6, seed=1), keeps=conversations(8, seed=2), sigma_L=sigma_of(model),
        toward="refuse", steps=STEPS, targets_per_step=4, keeps_per_step=4, l1=1e-3, state=state,
    )  # fmt: skip
    return found.mask.to_bytes()


if __name__ == "__main__":
    Path(sys.argv[3]).write_bytes(run(sys.argv[1], Path(sys.argv[2])))

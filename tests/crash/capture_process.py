"""The process that tests/crash kills: a capture of many small shards.

python -m tests.crash.capture_process MODEL_FOLDER OUT
"""

from __future__ import annotations

import sys

from moesteer.conversations import Conversation
from moesteer.lab import world


def rows() -> list[Conversation]:
    """120 conversations with responses, of the world."""
    from dataclasses import replace

    found = world.suite("benign-multi", "fit", per_group=1)
    return [replace(row, id=f"{row.id}", label="a" if i % 2 else "b") for i, row in enumerate(found)]


def run(model_folder: str, out: str) -> None:
    """Capture `rows` in about forty shards."""
    from moesteer.backends.loading import load
    from moesteer.capturing import capture

    model = load(model_folder, check=False)
    print("loaded", flush=True)
    capture(model, rows(), out=out, spans=("final_user", "response"), batch_positions=300, shard_tokens=150)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2])

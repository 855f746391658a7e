"""The processes that tests/crash kills: `moesteer evaluate lab-tiny`, forked off one that has the model loaded.

python -m tests.crash.evaluate_process FOLDER, then on standard input a line for each: the run's folder, in FOLDER.
Answers: "pid N" when it runs, "status S" when it ended.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

MASK = "mask.safetensors"
ROWS = 32
"""Of one whole evaluation: two suites of 8, unsteered and steered."""


def arguments(folder: Path, out: str) -> list[str]:
    """The command line."""
    given = ["--suite", "attacks", "--suite", "direct", "--limit", "8", "--mask", str(folder / MASK), "--alpha", "4"]
    return ["moesteer", "evaluate", "lab-tiny", *given, "--out", str(folder / out), "--json"]


def run(folder: Path, out: str) -> NoReturn:
    """The command, in this process, ending as the command ends."""
    from moesteer.cli.main import run as command

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    nothing = os.open(os.devnull, os.O_RDWR)
    said = os.open(folder / f"{out}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor, place in ((0, nothing), (1, nothing), (2, said)):
        os.dup2(place, descriptor)
    sys.argv = arguments(folder, out)
    status: object = 0
    try:
        command()
    except SystemExit as error:
        status = error.code
    os._exit(int(status or 0) if isinstance(status, int | None) else 1)


def serve(folder: Path) -> None:
    """Load once, then fork for every line."""
    import numpy as np

    from moesteer.backends import loading
    from moesteer.evaluate import pieces
    from moesteer.mask import Intent, MaskInfo, SteeringMask

    model = loading.load("lab-tiny")
    model.new_tokens_at_once = 24 * 4  # type: ignore[attr-defined]
    pieces.SAVE_EVERY_S = 0.0  # every turn, so that kills fall between them
    loading.load = lambda *_, **__: model  # type: ignore[assignment]
    info = MaskInfo(fingerprint=model.fingerprint, method="m", intent=Intent(toward="x"))
    shape = (len(model.routers), model.fingerprint.experts)
    strength = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    SteeringMask(info, strength_LE=strength, sigma_L=np.ones(shape[0], np.float32)).save(folder / MASK)
    print("loaded", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(folder, line.strip())
        print(f"pid {pid}", flush=True)
        print(f"status {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}", flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

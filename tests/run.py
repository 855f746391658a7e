"""`make test`: every test, in two processes at once, because those that start engines and workers mostly wait.

    python tests/run.py [options of pytest]

The first half's output is shown as it comes, the other's when both are done. Whatever lies in tests/ and is not named
here belongs to the first half, so that no test is left out. Exit code: the first that is not 0.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent
STARTING = ("engine", "harness", "judges", "workers")
"""Folders of tests that start engines of vLLM, workers of Ray and other programs."""


def halves() -> tuple[list[str], list[str]]:
    """Paths for the two processes."""
    found = sorted(path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("test_*.py")))
    missing = [name for name in STARTING if name not in found]
    if missing or any(TESTS.glob("test_*.py")):
        raise SystemExit(f"tests/run.py does not fit the folders of tests: {missing or 'tests outside of them'}")
    return [f"tests/{name}" for name in found if name not in STARTING], [f"tests/{name}" for name in STARTING]


def main(options: list[str]) -> int:
    """Run both halves; the exit code."""
    first, second = halves()
    command = [sys.executable, "-m", "pytest", *options]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))  # two halves share the cores
    begun = time.monotonic()
    with tempfile.TemporaryFile() as said:
        other = subprocess.Popen(
            [*command, "-o", "cache_dir=.pytest_cache/second", *second], stdout=said, stderr=subprocess.STDOUT
        )
        try:
            codes = subprocess.run([*command, *first], check=False).returncode, other.wait()
            code = next((code for code in codes if code), 0)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        finally:
            if other.poll() is None:
                other.send_signal(signal.SIGINT)
                other.wait()
            said.seek(0)
            print(f"\n{' '.join(second)}:", flush=True)
            sys.stdout.buffer.write(said.read())
            sys.stdout.flush()
    print(f"both halves: {'passed' if not code else 'failed'} in {time.monotonic() - begun:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Whether processes are over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def still_running(processes: Iterable[Any], *, timeout: float) -> list[Any]:
    """Those of psutil's processes that are not over after so many seconds.

    One that is over stays a zombie until its parent, often init, has noticed: that is none of ours to wait for.
    """
    import psutil

    def runs(process: Any) -> bool:
        try:
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    processes = list(processes)
    psutil.wait_procs([process for process in processes if runs(process)], timeout=timeout)
    return [process for process in processes if runs(process)]

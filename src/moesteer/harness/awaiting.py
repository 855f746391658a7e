"""Waiting for a worker thread's answer in asyncio and in trio, without holding up the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import anyio

Result = TypeVar("Result")


async def awaited(future: Future[Result]) -> Result:
    """The future's result, in asyncio and in trio. Where the caller is cancelled, so is the request, if it waits."""
    done = anyio.Event()
    soon = _from_threads()

    def wake(_: Future[Result]) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            soon(done.set)

    future.add_done_callback(wake)
    try:
        await done.wait()
    finally:
        future.cancel()
    return future.result()


def _from_threads() -> Callable[[Callable[[], Any]], Any]:
    """How a thread has this loop call something, without waiting for it."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        token: Any = trio.lowlevel.current_trio_token()
        return token.run_sync_soon  # type: ignore[no-any-return]

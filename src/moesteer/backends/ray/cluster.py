"""A cluster of Ray for the length of a block: one of our own on this machine, or the one that RAY_ADDRESS names.

Our own listens on 127.0.0.1 only, asks whoever connects for a token that only this process and its own know, has no
dashboard, reports nothing, and is gone at the end, its files too. One that was there before is left as it was.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

from moesteer.errors import EngineStoppedError, InputError
from moesteer.stopping import uninterrupted

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a cluster of our own: what is on its way between processes. Ray writes what is more to the disk."""
ADDRESS = "RAY_ADDRESS"
LOOPBACK = "127.0.0.1"
ANSWER_S = 10.0
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do from some version on, and warns of until then
    # an engine's processes end with the worker that started them, also one that was killed. (Ray's other way to that, a
    # subreaper, takes the exit codes of all its children from this process too.)
    "RAY_process_group_cleanup_enabled": "1",
}


@dataclass(frozen=True)
class Room:
    """A machine of the cluster: what it has for workers."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Share:
    """What each worker gets. cpus are its threads too, where it computes on them."""

    workers: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        def count(number: int, unit: str) -> str:
            return f"{number} {unit}{'s' * (number != 1)}"

        return f"{count(self.workers, 'worker')}, each with {count(self.cpus, 'CPU')} and {count(self.gpus, 'GPU')}"


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def joined(*, workers: int | None) -> Iterator[None]:
    """Inside, this process is the driver of a cluster. workers: how many a cluster of our own must have room for.

    Raises InputError for an address that cannot be, EngineStoppedError where Ray does not start or is not there.
    """
    address = os.environ.get(ADDRESS, "")
    if not address:
        _token()
    import ray

    if ray.is_initialized():
        yield
        return
    _require_cluster(address)
    # unix sockets have names of at most 107 bytes: not below a long $TMPDIR. Ray opens its own folder, inside this one,
    # to everybody
    folder = None if address else tempfile.mkdtemp(prefix="msray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    try:
        try:
            _init(ray, address, folder, cpus=max(cores(), workers or 1))
        except SystemExit as stopped:  # by Ray's own answer to SIGTERM, which it puts there while it starts
            raise SystemExit(128 + signal.SIGTERM if stopped.code == signal.SIGTERM else stopped.code) from stopped
        yield
    finally:
        with uninterrupted():
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _require_cluster(address: str) -> None:
    """Raise InputError for the address of a client; EngineStoppedError where nothing listens at HOST:PORT.

    Ray itself would try for minutes.
    """
    if address.startswith("ray://"):
        raise InputError(
            "this is the address of a Ray client",
            where=f"{ADDRESS}={address}",
            expected="the address of the cluster itself, HOST:6379, from a machine of the cluster",
            do="run the command on a machine of the cluster",
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise EngineStoppedError(
            f"no cluster of Ray answers: {error}",
            where=f"{ADDRESS}={address}",
            expected="the address of a cluster that this machine belongs to, HOST:6379",
            do="check it with `ray status` on this machine",
        ) from error


def _init(ray: Any, address: str, folder: str | None, *, cpus: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if ours else None
    values = {**QUIET, **({} if address else _token())}
    with _environment(values), _on_loopback() if folder is not None else nullcontext():
        try:
            if folder is None:
                ray.init(address=address, **quiet)
            else:
                ray.init(
                    address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address=LOOPBACK, _temp_dir=os.path.join(folder, "r"), **quiet,
                )  # fmt: skip
                _require_loopback(ray)
        except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
            what = "no cluster of Ray answers" if address else "Ray did not start"
            raise EngineStoppedError(
                f"{what}: {str(error).strip().splitlines()[0]}"[:300],
                where=f"{ADDRESS}={address}" if address else "this machine",
                expected="a cluster that this machine belongs to" if address else "processes of Ray on 127.0.0.1",
                do="check it with `ray status`" if address else "check the room in /tmp and /dev/shm",
            ) from error
        finally:
            if ours and before is not None:
                signal.signal(signal.SIGTERM, before)  # Ray puts its own there, which ends without cleaning up


@cache
def _token() -> Mapping[str, str]:
    """What clusters of our own ask for, as environment variables: Ray reads them once, when it is imported.

    Empty where the user has said what to do, or where it is too late, which is told.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    if "ray" in sys.modules:
        print("ray was imported before: its cluster asks other users of this machine for no token", file=sys.stderr)
        return {}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with _environment(token):
        import ray  # noqa: F401
    return token


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Inside, Ray takes 127.0.0.1 for the address that it was given, and not for this machine's on the network.

    On Linux it replaces loopback by an address that others reach, unless told that there are no clusters on this
    platform: a constant that it reads from RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER when it is imported.
    """
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _require_loopback(ray: Any) -> None:
    """Raise EngineStoppedError where a version of Ray was not to be kept off the network."""
    found = [node["NodeManagerAddress"] for node in ray.nodes()]
    if found != [LOOPBACK]:
        raise EngineStoppedError(
            f"Ray listens on {', '.join(found)}",
            where="this machine",
            expected=f"a cluster for this machine only, on {LOOPBACK}",
            do="report this, with the version of ray; --engine local needs none",
        )


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables inside the block; Ray's processes keep them."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def rooms() -> list[Room]:
    """The machines that are there now."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Room(int(found.get("CPU", 0)), int(found.get("GPU", 0))) for found in alive]


def fitting(rooms_: Sequence[Room], *, cpus: int, gpus: int) -> int:
    """How many workers of that size the machines hold; none spans two."""
    return sum(min(room.cpus // cpus, room.gpus // gpus if gpus else room.cpus) for room in rooms_)


def gpus_each(
    rooms_: Sequence[Room], *, backend: str, device: str, workers: int | None, options: Mapping[str, Any]
) -> int:
    """GPUs of one worker: the ranks of a vLLM engine; with `--device spread` all that a share has; else one, or none.

    Raises InputError for a device by number: Ray says which GPU is whose.
    """
    most = max((room.gpus for room in rooms_), default=0)
    if device not in ("auto", "cpu", "cuda", "spread"):
        raise InputError(
            f"a worker cannot be told to use {device!r}",
            where="--device",
            expected="auto, cpu, cuda or spread with --engine ray, which says which GPU is whose",
            do="leave --device out",
        )
    if device == "cpu" or (most == 0 and device == "auto"):
        return 0
    if backend == "vllm":
        return ranks(options) if most else 0
    if device == "spread":
        total = sum(room.gpus for room in rooms_)
        return max(1, min(most, total // workers if workers else most))
    return 1


def ranks(options: Mapping[str, Any]) -> int:
    """Processes, and GPUs, of one engine of vLLM: tensor times pipeline times data parallel. Raises InputError."""
    product = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        size = options.get(key, 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(
                f"{key} cannot be {size!r}", where="--engine-option", expected="a whole number from 1", do="correct it"
            )
        product *= size
    return product


def share(rooms_: Sequence[Room], *, workers: int | None, gpus: int) -> Share:
    """What each of `workers` gets; None: as many as there are GPUs for, or without GPUs one for each machine.

    CPUs are divided evenly. Raises InputError where the machines do not hold so many.
    """
    possible = fitting(rooms_, cpus=1, gpus=gpus)
    count = workers or (possible if gpus else len(rooms_) if len(rooms_) > 1 else min(2, possible))
    if count < 1 or possible < count:
        raise InputError(
            f"{count or 'no'} workers of {gpus} GPUs do not fit: there is room for {possible}",
            where="; ".join(f"{room.cpus} CPUs, {room.gpus} GPUs" for room in rooms_)[:300] or "an empty cluster",
            expected="a CPU and its GPUs for each worker, on one machine",
            do="lower --workers, or start more machines first (docs/scaling.md)",
        )
    sizes = range(1, max(room.cpus for room in rooms_) + 1)
    cpus = max(size for size in sizes if fitting(rooms_, cpus=size, gpus=gpus) >= count)
    return Share(count, cpus, gpus)

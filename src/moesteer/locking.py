"""One writer per folder: a lock that the kernel drops when its process ends, and a line that says who holds it.

The lock is flock(2) on FOLDER/.lock. It is decisive wherever flock is shared: on one machine, and between machines
on NFS (Linux since 2.6.12), CephFS, GPFS and Lustre mounted with `flock`. Where a file system keeps locks to each
machine (NFS with `local_lock`, Lustre with `localflock`) two machines do not see each other's; nothing here can.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moesteer.errors import RunDirectoryError, RunLockedError

LOCK = ".lock"
MOST_BYTES = 512
_LINE = re.compile(
    r"pid (?P<pid>\d{1,9}) on (?P<host>[^\s]{1,255}) boot (?P<boot>[\w-]{1,64}) pids (?P<pids>[\w:\[\]-]{1,64}) "
    r"since (?P<since>[\d:TZ-]{20})\n"
)


@dataclass(frozen=True)
class Holder:
    """Who wrote a lock's line. boot: the machine's boot id; pids: its namespace of process ids; since: UTC."""

    pid: int
    host: str
    boot: str
    pids: str
    since: str

    @classmethod
    def me(cls) -> Holder:
        """This process, now."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return cls(os.getpid(), socket.gethostname() or "unknown", *_here(), now)

    @classmethod
    def parse(cls, line: str) -> Holder | None:
        """From a lock's line; None where it is none of ours, as an older version's or an empty one."""
        found = _LINE.fullmatch(line)
        return cls(**{**found.groupdict(), "pid": int(found["pid"])}) if found else None  # type: ignore[arg-type]

    def line(self) -> str:
        """What stands in the lock."""
        return f"pid {self.pid} on {self.host} boot {self.boot} pids {self.pids} since {self.since}\n"

    @property
    def ended(self) -> bool:
        """Whether the process is known to be gone: of this machine's process ids, since this start of it."""
        if self.host != socket.gethostname() or self.pids != _here()[1]:
            return False
        if self.boot != _here()[0]:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's
            return False
        return False


def _here() -> tuple[str, str]:
    """(boot id, namespace of process ids) of this machine; "unknown" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "unknown", "unknown"


_held: set[int] = set()
"""Descriptors of locks that this process holds: a forked child closes its copies, or would hold them on."""


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be. Raises RunLockedError, RunDirectoryError (it cannot be written to).

    What a process that is gone left in the lock is written over. The line is taken out at the end, so that a line
    without a lock means that its process was killed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise RunDirectoryError(
            f"the folder cannot hold a run: it cannot be written to: {error.strerror}",
            where=str(folder),
            expected="an empty or new folder, or an earlier run of the same command",
            do="choose another --out",
        ) from error
    _held.add(descriptor)
    me = os.getpid()
    try:
        _take(descriptor, folder)
        try:
            yield
        finally:
            if os.getpid() == me:
                os.ftruncate(descriptor, 0)
    finally:
        if os.getpid() == me:
            _held.discard(descriptor)
            os.close(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(folder, os.pread(descriptor, MOST_BYTES, 0).decode("ascii", "replace")) from error
    except OSError as error:
        raise RunDirectoryError(
            f"the file system keeps no locks: {error.strerror}",
            where=str(folder),
            expected="one where flock works, so that two processes cannot write one run",
            do="choose an --out on a local disk, or mount the file system with locks",
        ) from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, Holder.me().line().encode("ascii", "replace"), 0)
    except OSError:  # a full disk: the lock holds without its line
        os.ftruncate(descriptor, 0)


def _busy(folder: Path, line: str) -> RunLockedError:
    holder = Holder.parse(line)
    by = " ".join(line.split())[:100] or "another process, which has not said which"
    do = "wait for it, stop it, or choose another --out"
    if holder is not None:
        away = "" if holder.host == socket.gethostname() else f" on {holder.host}"
        by = f"pid {holder.pid}{away} since {holder.since}"
        if holder.ended:
            by += ", which has ended and left a process of its own"
            do = "end the processes that it started (lsof names them), or choose another --out"
    return RunLockedError(f"the run is locked by {by}", where=str(folder), expected="one writer at a time", do=do)


def holder_of(folder: Path) -> str | None:
    """Who holds a folder now, in words; None where nobody does."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = Holder.parse(os.pread(descriptor, MOST_BYTES, 0).decode("ascii", "replace"))
        return f"pid {holder.pid} on {holder.host} since {holder.since}" if holder else "another process"
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None

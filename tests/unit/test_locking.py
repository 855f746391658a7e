"""locking.py: one writer, who says who it is; a lock of the dead is taken over."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from moesteer.errors import RunDirectoryError, RunLockedError
from moesteer.locking import Holder, holder_of, locked

HOLD = """
import sys
from pathlib import Path
from moesteer.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    if process.poll() is None:
        process.communicate("\n", timeout=20)


def test_the_second_is_told_who_has_it_and_since_when_in_utc(holder, tmp_path: Path) -> None:
    with pytest.raises(RunLockedError) as caught, locked(tmp_path / "run"):
        pytest.fail("was taken")
    found = re.fullmatch(rf"the run is locked by pid {holder.pid} since (\S+Z)", caught.value.what)
    assert found and caught.value.exit_code == 1
    since = datetime.strptime(found[1], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - since).total_seconds()) < 60
    assert holder_of(tmp_path / "run") == f"pid {holder.pid} on {socket.gethostname()} since {found[1]}"


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Pacific/Kiritimati"])
def test_since_is_utc_whatever_the_zone(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        since = datetime.strptime(Holder.me().since, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert abs(since.timestamp() - time.time()) < 5


@pytest.mark.parametrize("kind", ["killed", "other boot", "other host", "older version", "binary", "empty"])
def test_a_lock_that_nobody_holds_is_taken_over(kind: str, tmp_path: Path) -> None:
    me = replace(Holder.me(), pid=2**22 + 5)
    lines = {
        "killed": me.line(), "other boot": replace(me, boot="0" * 8).line(),
        "other host": replace(me, host="elsewhere").line(), "older version": "pid 4194309\n",
        "binary": "\udcff\udc80", "empty": "",
    }  # fmt: skip
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    lock.write_bytes(lines[kind].encode("utf-8", "surrogateescape"))
    with locked(tmp_path / "run"):
        found = Holder.parse(lock.read_text())
        assert found is not None and found.pid == os.getpid() and not found.ended
    assert lock.read_bytes() == b"" and holder_of(tmp_path / "run") is None


def test_a_process_that_is_gone_is_known_to_be(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    me = Holder.me()
    assert replace(me, pid=pid).ended and not me.ended and not replace(me, pid=1).ended
    assert replace(me, boot="earlier").ended
    assert not replace(me, pid=pid, host="elsewhere").ended and not replace(me, pid=pid, pids="pid:[1]").ended


def test_a_forked_child_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    """The parent dies, its child lives: the folder is free."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        with locked(tmp_path / "run"):
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
            os.write(write, f"{child}\n".encode())
            os._exit(9)
    child = int(os.read(read, 20))
    try:
        os.waitpid(parent, 0)
        with locked(tmp_path / "run"):
            pass
    finally:
        os.kill(child, 9)
        os.close(read)
        os.close(write)


def test_a_process_left_by_the_holder_is_named_as_such(tmp_path: Path) -> None:
    """One that was started with the descriptor, as a program in another language may be."""
    import fcntl

    folder = tmp_path / "run"
    folder.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder / ".lock").write_text(replace(Holder.me(), pid=gone.pid).line())
    descriptor = os.open(folder / ".lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(RunLockedError, match="which has ended and left a process of its own"), locked(folder):
            pytest.fail("was taken")
    finally:
        os.close(descriptor)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(RunDirectoryError), locked(tmp_path / "run"):
        pytest.fail("was taken")
    assert (tmp_path / "theirs").read_text() == "theirs"

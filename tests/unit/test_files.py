"""files.py: whole or not at all, inside limits, strict JSON, and a journal that survives a kill at any byte."""

from __future__ import annotations

import json
import os
import resource
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer import files
from moesteer.errors import FileError, LimitError, MoesteerError


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
def test_a_file_is_written_whole_under_its_name_and_nothing_is_left_beside_it(data, tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for _ in range(2):
        files.write_bytes(path, data)
        assert path.read_bytes() == data and names_in(path.parent) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 & ~current_umask()


def current_umask():
    old = os.umask(0)
    os.umask(old)
    return old


class Broken:
    """An os function that raises on its n-th call and works on the others."""

    def __init__(self, real, error, at):
        self.real, self.error, self.at, self.calls = real, error, at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("name", ["replace", "fsync", "open", "fdopen"])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failure_at_any_step_leaves_the_old_file_and_no_temporary(name, old, tmp_path, monkeypatch):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(os, name, Broken(getattr(os, name), OSError(28, "No space left on device"), 1))
    with pytest.raises(FileError, match="could not write the file: No space left on device") as caught:
        files.write_bytes(path, b"new")
    assert type(caught.value) is FileError and caught.value.where == str(path) and "disk" in caught.value.expected
    monkeypatch.undo()
    assert names_in(tmp_path) == (["file"] if old is not None else [])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_an_interrupt_leaves_the_old_file_and_no_temporary(name, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, name, Broken(getattr(os, name), KeyboardInterrupt(), 1))
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(path, b"new")
    assert names_in(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_the_bytes_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    path = tmp_path / "file"
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("sync folder" if folder else f"sync {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def noted_replace(source, target):
        steps.append("rename")
        assert os.path.dirname(source) == os.path.dirname(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write_bytes(path, b"12345")
    assert steps == ["sync 5 bytes", "rename", "sync folder"]


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda p: p.mkdir(), "directory"),
        (lambda p: (p.parent.rmdir(), p.parent.write_text("a file")), "File exists|Not a directory"),
    ],
    ids=["is-a-folder", "folder-is-a-file"],
)
def test_a_place_that_cannot_hold_the_file_is_a_file_error(make, part, tmp_path):
    path = tmp_path / "sub" / "file"
    path.parent.mkdir()
    make(path)
    with pytest.raises(FileError, match=part):
        files.write_bytes(path, b"x")
    assert not list(tmp_path.rglob(f"*{files.TEMPORARY_SUFFIX}"))


def test_a_full_disk_in_the_middle_of_the_bytes_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    pid = os.fork()
    if pid == 0:  # a child, since the limit on file sizes cannot be taken back
        try:
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            files.write_bytes(path, bytes(100_000))
        except FileError:
            os._exit(42)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 42
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["file"]


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "sub").mkdir()
    gone = [tmp_path / f".a.1234{files.TEMPORARY_SUFFIX}", tmp_path / "sub" / f".b.ff{files.TEMPORARY_SUFFIX}"]
    kept = [tmp_path / "file", tmp_path / f"visible{files.TEMPORARY_SUFFIX}", tmp_path / ".hidden"]
    for path in gone + kept:
        path.write_text("x")
    assert files.remove_temporaries(tmp_path) == 2
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)
    assert files.remove_temporaries(tmp_path) == 0


# ---------------------------------------------------------------- JSON


def test_the_same_value_is_the_same_text_whatever_the_order_of_its_keys(tmp_path):
    assert files.dumps({"b": 1, "a": [1.5, None, "é\u2028"]}, indent=None) == '{"a": [1.5, null, "é\u2028"], "b": 1}\n'
    assert files.dumps({"a": 1, "b": 2}) == files.dumps({"b": 2, "a": 1}) == '{\n  "a": 1,\n  "b": 2\n}\n'
    files.write_json(tmp_path / "x", {"b": "é", "a": 1})
    assert (tmp_path / "x").read_bytes() == '{\n  "a": 1,\n  "b": "é"\n}\n'.encode()
    files.write_jsonl(tmp_path / "y", [{"b": 1, "a": 2}, [3], "x\ny"])
    assert (tmp_path / "y").read_bytes() == b'{"a": 2, "b": 1}\n[3]\n"x\\ny"\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_numbers_are_not_written(value, tmp_path):
    for write in (files.write_json, lambda p, v: files.write_jsonl(p, [v]), lambda p, v: files.Journal(p).append([v])):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(tmp_path / "x", {"deep": [value]})
    assert names_in(tmp_path) == []


BAD_JSON = {
    "nan": b"NaN", "infinity": b'{"a": Infinity}', "minus-infinity": b"[-Infinity]",
    "repeated-key": b'{"a": 1, "a": 1}', "repeated-below": b'[{"x": {"b": 1, "b": 2}}]',
    "latin-1": '{"a": "é"}'.encode("latin-1"), "empty": b"", "cut": b'{"a": ', "two-values": b"{} {}",
    "deep": b"[" * 10_000 + b"]" * 10_000, "many-digits": b"1" * 5000, "html": b"<html>", "quotes": b"{'a': 1}",
}  # fmt: skip


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_not_strict_is_a_file_error(data, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(FileError, match="not valid JSON") as caught:
        files.read_json(path)
    assert type(caught.value) is FileError and caught.value.where == str(path)


@pytest.mark.parametrize(
    "data",
    ['{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-32-le"), b'"\xed\xa0\x80"', b'{"a": 1e999}', b"-1e999"],
    ids=["utf-16", "utf-32", "surrogate-bytes", "overflow", "minus-overflow"],
)
def test_json_that_is_not_strict_is_a_file_error_here_too(data, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(FileError, match="not valid JSON"):
        files.read_json(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\n\"\\"), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(json_values)
def test_what_is_dumped_is_read_back(value):
    for indent in (None, 2):
        assert files.parse_json(files.dumps(value, indent=indent)) == value
    assert "\n" not in files.dumps(value, indent=None)[:-1]  # one line: a journal depends on it


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", files.LIMITS_BYTES)
def test_a_file_at_its_limit_is_read_and_one_byte_more_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(files.LIMITS_BYTES, kind, 100)
    path = tmp_path / "x"
    path.write_bytes(b"y" * 100)
    assert files.read_bytes(path, kind=kind) == b"y" * 100
    path.write_bytes(b"y" * 101)
    with pytest.raises(LimitError, match="larger than 100 bytes"):
        files.read_bytes(path, kind=kind)


def test_the_limits_are_those_of_the_security_table():
    mib = 1024 * 1024
    assert files.LIMITS_BYTES["mask"] == 16 * mib and files.LIMITS_BYTES["mask-header"] == mib
    assert files.LIMITS_BYTES["scenario"] == mib and files.LIMITS_BYTES["json"] == 64 * mib


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "Is a directory"),
        (lambda p: os.mkfifo(p), "not a regular file"),
        (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
        (lambda p: p.symlink_to(p), "symbolic links"),
    ],
    ids=["missing", "folder", "fifo", "device", "symlink-loop"],
)
def test_what_is_not_a_file_is_a_file_error_and_does_not_hang(make, part, tmp_path):
    path = tmp_path / "x"
    make(path)
    with pytest.raises(FileError, match=part) as caught:
        files.read_bytes(path, kind="json")
    assert type(caught.value) is FileError and caught.value.where == str(path)


def test_a_name_that_is_too_long_is_a_file_error(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / ("/".join(["x" * 200] * 30))):
        with pytest.raises(FileError, match="File name too long"):
            files.read_bytes(path, kind="json")
        with pytest.raises(FileError, match="File name too long"):
            files.write_bytes(path, b"")


def test_refusing_a_folder_closes_its_descriptor(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(FileError):
            files.read_bytes(tmp_path, kind="json")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_path_with_a_nul_is_a_file_error(tmp_path):
    with pytest.raises(MoesteerError):
        files.read_bytes(tmp_path / "a\0b", kind="json")


def test_sha256_is_the_published_one():
    assert files.sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---------------------------------------------------------------- the journal


ROWS = [{"id": 1, "text": "two\nlines, é"}, {"id": 2}, {"id": 3, "x": [1.5, None]}]


def test_a_journal_that_is_not_there_is_empty(tmp_path):
    assert list(files.Journal(tmp_path / "none").read()) == [] and names_in(tmp_path) == []


def test_a_journal_gives_back_what_was_appended_in_batches(tmp_path):
    journal = files.Journal(tmp_path / "sub" / "j")
    journal.append(ROWS[:1])
    journal.append([])
    journal.append(iter(ROWS[1:]))
    assert list(journal.read()) == ROWS
    assert journal.path.read_text() == "".join(json.dumps(r, sort_keys=True, ensure_ascii=False) + "\n" for r in ROWS)


def test_a_kill_at_every_byte_loses_only_the_torn_line_and_the_next_append_repairs_it(tmp_path):
    whole = "".join(files.dumps(row, indent=None) for row in ROWS).encode()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 0x0A]
    for cut in range(len(whole) + 1):
        journal = files.Journal(tmp_path / "j")
        journal.path.write_bytes(whole[:cut])
        kept = ROWS[: sum(end <= cut for end in ends)]
        assert list(journal.read()) == kept
        assert journal.path.read_bytes() == whole[:cut]  # reading repairs nothing
        journal.append([{"id": 9}])
        assert list(journal.read()) == [*kept, {"id": 9}]
        good = max((end for end in ends if end <= cut), default=0)
        assert journal.path.read_bytes() == whole[:good] + b'{"id": 9}\n'


def test_a_row_that_cannot_be_written_leaves_the_journal_as_it_was(tmp_path):
    journal = files.Journal(tmp_path / "j")
    journal.append(ROWS)
    with pytest.raises(ValueError, match="JSON"):
        journal.append([{"id": 4}, {"id": float("nan")}])
    assert list(journal.read()) == ROWS


def test_a_journal_is_flushed_to_the_disk_once_a_batch(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    files.Journal(tmp_path / "j").append(ROWS)
    assert synced == [(tmp_path / "j").stat().st_size]


def test_a_full_disk_is_a_file_error_that_says_it_can_go_on(tmp_path, monkeypatch):
    journal = files.Journal(tmp_path / "j")
    journal.append(ROWS[:1])
    monkeypatch.setattr(os, "fsync", Broken(os.fsync, OSError(28, "No space left on device"), 1))
    with pytest.raises(FileError, match="could not write the journal: No space left") as caught:
        journal.append(ROWS[1:])
    assert "goes on where it stopped" in caught.value.do
    monkeypatch.undo()
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="could not write the journal"):
        files.Journal(tmp_path / "folder").append(ROWS)


def test_a_journal_above_its_limit_is_refused(tmp_path, monkeypatch):
    journal = files.Journal(tmp_path / "j")
    journal.append(ROWS)
    monkeypatch.setitem(files.LIMITS_BYTES, "journal", 10)
    with pytest.raises(LimitError, match="larger than 10 bytes"):
        list(journal.read())


# ends a resumed `moesteer steer` with a traceback instead of the file's name (doctor catches them itself).
@pytest.mark.parametrize(
    "line", [b"not json", b'{"a": NaN}', b'{"a": 1, "a": 1}', b"\xff\xfe", b"[" * 10_000], ids=lambda b: repr(b[:9])
)
def test_a_damaged_line_of_a_journal_is_a_named_error(line, tmp_path):
    journal = files.Journal(tmp_path / "j")
    journal.path.write_bytes(b'{"id": 1}\n' + line + b'\n{"id": 2}\n')
    with pytest.raises(MoesteerError) as caught:
        list(journal.read())
    assert str(journal.path) in str(caught.value)

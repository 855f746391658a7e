"""`pull` against a Hub on 127.0.0.1: what is kept, what is refused, and that a refusal leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
from typer.testing import CliRunner

from moesteer import files, hub, sharing
from moesteer.cli.main import app
from moesteer.errors import FileError, HubError, InputError, LimitError, MaskContentError, MaskError, MoesteerError
from moesteer.mask import SteeringMask
from tests.unit import hub_by_hand, runs_by_hand
from tests.unit.hub_by_hand import TOKEN, Reply, Repo

MASK = runs_by_hand.mask()
NAME = "acme/lab-mask"


@pytest.fixture(scope="module")
def server():
    with hub_by_hand.serving() as found:
        yield found


@pytest.fixture
def stub(server, monkeypatch):
    """The Hub with one mask in it; no waiting between tries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "WAITS_S", (0.0,))
    monkeypatch.setattr(hub, "MOST_WAIT_S", 0.05)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.repos = {
        NAME: Repo({"mask.safetensors": MASK.to_bytes(), "README.md": b"# card"}, large=("mask.safetensors",))
    }
    server.faults, server.asked = {}, []
    return server


def pull(stub, tmp_path, repo=NAME, **more):
    return sharing.pull(repo, out=tmp_path / "m.safetensors", endpoint=stub.address, **more)


def refused(stub, tmp_path, kind, match=None, repo=NAME, **more):
    with pytest.raises(kind, match=match) as caught:
        pull(stub, tmp_path, repo, **more)
    error = caught.value
    assert all((error.what, error.where, error.expected, error.do)) and TOKEN not in str(error)
    assert list(tmp_path.iterdir()) == []
    return error


def test_the_mask_comes_whole_and_where_it_came_from_is_recorded(stub, tmp_path):
    done = pull(stub, tmp_path)
    assert done.path.read_bytes() == MASK.to_bytes()
    assert (done.sha256, done.commit, done.revision, done.pinned) == (MASK.sha256, "1" * 40, None, False)
    assert json.loads(done.source.read_text()) == {
        "schema": 1, "repo": NAME, "revision": None, "commit": "1" * 40, "pinned": False, "file": "mask.safetensors",
        "sha256": MASK.sha256, "size_bytes": len(MASK.to_bytes()), "endpoint": stub.address,
        "moesteer": sharing.__version__,
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "m.source.json"]


def test_what_is_read_is_the_commit_that_was_looked_up_and_only_the_mask(stub, tmp_path):
    done = pull(stub, tmp_path, f"{NAME}@v1")
    paths = [path for _, _, path, _ in stub.asked]
    assert paths == [f"/api/models/{NAME}/revision/v1?blobs=true", f"/{NAME}/resolve/{'1' * 40}/mask.safetensors"]
    assert (done.revision, done.pinned) == ("v1", False)


def test_a_commit_pins(stub, tmp_path):
    assert pull(stub, tmp_path, f"{NAME}@{'1' * 40}", sha256=MASK.sha256).pinned


def test_a_revision_with_a_slash_is_one_part_of_the_address(stub, tmp_path):
    pull(stub, tmp_path, f"{NAME}@refs/pr/1")
    assert stub.asked[0][2] == f"/api/models/{NAME}/revision/refs%2Fpr%2F1?blobs=true"


def test_another_sha256_than_the_one_demanded_is_refused(stub, tmp_path):
    refused(stub, tmp_path, MaskError, "another mask than the one asked for", sha256="0" * 64)


@pytest.mark.parametrize("digest", ["", "0" * 63, "G" * 64, MASK.sha256.upper(), "0" * 64 + "\n"])
def test_what_is_no_sha256_is_refused_before_anything_is_asked(digest, stub, tmp_path):
    refused(stub, tmp_path, InputError, "no sha256", sha256=digest)
    assert stub.asked == []


@pytest.mark.parametrize(
    "repo",
    [
        "",
        "mask",
        "a/b/c",
        "../x/y",
        "a/..",
        "acme/../x",
        "/acme/x",
        "acme/x@",
        "acme/x@..",
        "acme/x@a/../b",
        "acme/x@-v",
        "https://huggingface.co/acme/x",
        "acme/x?y",
        "acme/x#y",
        "acme/%2e%2e",
        "acme\\x",
        "ac me/x",
        "acme/x\n",
        "acme/x@a b",
        "acme/x@v\x00",
        "acme/" + "x" * 97,
        "ácme/x",
        "acme/x@a//b",
        "acme/x.",
        ".acme/x",
    ],
)
def test_a_name_that_is_none_never_becomes_an_address_or_a_path(repo, stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a repository"):
        sharing.pull(repo, endpoint=stub.address)
    assert stub.asked == [] and list(tmp_path.iterdir()) == []


def test_the_default_file_is_named_after_the_repository(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(sharing.pull(NAME, endpoint=stub.address).path) == "lab-mask.safetensors"


@pytest.mark.parametrize("taken", ["m.safetensors", "m.source.json"])
def test_no_file_is_replaced(taken, stub, tmp_path):
    (tmp_path / taken).write_text("mine")
    with pytest.raises(FileError, match="already"):
        pull(stub, tmp_path)
    assert (tmp_path / taken).read_text() == "mine" and stub.asked == [] and len(list(tmp_path.iterdir())) == 1


def test_a_dangling_link_is_not_written_through(stub, tmp_path):
    (tmp_path / "m.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="already"):
        pull(stub, tmp_path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["m.bin", "m", ".safetensors"])
def test_out_has_to_be_a_mask_file(name, stub, tmp_path):
    with pytest.raises(InputError, match="not the name of a mask file"):
        sharing.pull(NAME, out=tmp_path / name, endpoint=stub.address)
    assert stub.asked == []


# ---------------------------------------------------------------- statuses


@pytest.mark.parametrize("step", ["info", "resolve"])
@pytest.mark.parametrize(
    ("status", "code", "kind", "match"),
    [
        (401, "", InputError, "refuses .401"),
        (403, "GatedRepo", InputError, "gated"),
        (403, "", InputError, "refuses .403"),
        (404, "RepoNotFound", InputError, "not on the Hub"),
        (404, "RevisionNotFound", InputError, "no such revision"),
        (404, "EntryNotFound", InputError, "no such file"),
        (404, "", InputError, "not on the Hub"),
        (418, "", HubError, "answers 418"),
        (204, "", HubError, "answers 204"),
        (206, "", HubError, "answers 206"),
    ],
)
def test_each_status_has_its_error(step, status, code, kind, match, stub, tmp_path):
    stub.faults[step] = [Reply(status, b"" if status == 204 else b"{}", {"X-Error-Code": code} if code else {})]
    refused(stub, tmp_path, kind, match)
    assert stub.steps().count(step) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("step", ["info", "resolve"])
def test_a_busy_hub_is_asked_three_times(status, step, stub, tmp_path):
    stub.faults[step] = [Reply(status, headers={"Retry-After": "0"})] * 2
    pull(stub, tmp_path)
    assert stub.steps().count(step) == 3


@pytest.mark.parametrize(("status", "match"), [(429, "too many requests"), (500, "answers 500")])
def test_and_no_more(status, match, stub, tmp_path):
    stub.faults["info"] = [Reply(status)] * 9
    assert refused(stub, tmp_path, HubError, match).exit_code == 1
    assert stub.steps() == ["info"] * 3


@pytest.mark.parametrize("asked", ["99999", "9" * 400, "Wed, 21 Oct 2015 07:28:00 GMT", "-1", "٣", ""])
def test_what_the_hub_asks_to_wait_is_capped(asked, monkeypatch):
    monkeypatch.setattr(hub, "MOST_WAIT_S", 7.0)
    assert hub._asked({"retry-after": asked}, 1.5) in ((7.0,) if asked == "99999" else (1.5,))


def test_what_a_server_says_cannot_act_on_a_terminal_or_show_the_token(stub, tmp_path):
    said = f"\x1b[2Jgo away {TOKEN} \x07" + "x" * 500
    stub.faults["info"] = [Reply(401, headers={"X-Error-Message": said})]
    error = refused(stub, tmp_path, InputError, "go away")
    assert "\x1b" not in str(error) and "\x07" not in str(error) and len(error.what) < 250


# ---------------------------------------------------------------- bodies


def test_the_bytes_of_a_broken_connection_are_not_a_mask(stub, tmp_path):
    stub.faults["resolve"] = [Reply(body=MASK.to_bytes(), cut=100)] * 3
    refused(stub, tmp_path, HubError, "cut off")
    assert stub.steps().count("resolve") == 3


def test_a_connection_that_breaks_once_is_tried_again(stub, tmp_path):
    stub.faults = {"resolve": [Reply(body=MASK.to_bytes(), cut=100)], "info": [Reply(reset=True)]}
    assert pull(stub, tmp_path).sha256 == MASK.sha256


@pytest.mark.parametrize("port", ["1", "0"])
def test_no_hub_at_all(port, stub, tmp_path):
    with pytest.raises((HubError, InputError)):
        sharing.pull(NAME, out=tmp_path / "m.safetensors", endpoint=f"http://127.0.0.1:{port}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "kind", "match"),
    [(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", MaskError, "pointer of Git LFS"),
     (b"<!DOCTYPE html><html>sign in</html>", MaskError, "page of HTML"), (b"\n  <html>", MaskError, "page of HTML"),
     (b"", HubError, "0 bytes came"), (b"{}", HubError, "2 bytes came"),
     (MASK.to_bytes()[:-1], HubError, "bytes came"), (MASK.to_bytes() + b"x", HubError, "bytes came"),
     (runs_by_hand.mask(seed=1).to_bytes(), HubError, "bytes came")],
)  # fmt: skip
def test_other_bytes_than_the_hub_lists(body, kind, match, stub, tmp_path):
    stub.faults["resolve"] = [Reply(body=body)]
    refused(stub, tmp_path, kind, match)


def damaged(at: int = -1) -> bytes:
    data = bytearray(MASK.to_bytes())
    data[at] ^= 1
    return bytes(data)


def unbounded() -> bytes:
    """A mask whose digest holds and whose numbers cannot be applied."""
    import numpy as np

    one = runs_by_hand.mask()
    table = np.array(one.strength_LE)
    object.__setattr__(one, "strength_LE", np.where(table == table.max(), np.float32("inf"), table).astype(np.float32))
    return one.to_bytes()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (damaged(), MaskError),
        (damaged(20), MaskError),
        (b"PK\x03\x04" + b"\0" * 60, MaskError),
        (unbounded(), MaskContentError),
        (b"\x80\x04\x95pickle", MaskError),
        (b"\xff" * 8 + b"{}", MaskError),
        (b"not a mask at all", MaskError),
    ],
)
def test_what_the_repository_itself_holds_is_checked_as_any_mask(data, kind, stub, tmp_path):
    stub.repos[NAME].files["mask.safetensors"] = data
    refused(stub, tmp_path, kind)


def test_size_is_checked_before_anything_is_downloaded(stub, tmp_path, monkeypatch):
    monkeypatch.setitem(files.LIMITS_BYTES, "mask", 100)
    refused(stub, tmp_path, LimitError, "are the most that is taken")
    assert stub.steps() == ["info"]


def test_and_again_while_it_arrives_whatever_was_announced(stub, tmp_path, monkeypatch):
    sizes = {}
    monkeypatch.setattr(sharing, "_entry", lambda found, name: sizes)
    monkeypatch.setitem(files.LIMITS_BYTES, "mask", 100)
    stub.faults["resolve"] = [
        Reply(body=MASK.to_bytes()),
        Reply(body=b"8000\r\n" + b"x" * 0x8000 + b"\r\n0\r\n\r\n", headers={"Transfer-Encoding": "chunked"}),
    ]
    for _ in range(2):
        refused(stub, tmp_path, LimitError, "100 are the most")


def test_a_compressed_reply_is_not_unpacked(stub, tmp_path):
    stub.faults["resolve"] = [Reply(body=gzip.compress(b"\0" * 10**6), headers={"Content-Encoding": "gzip"})]
    refused(stub, tmp_path, HubError, "compressed")


def test_a_reply_that_trickles_is_given_up(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "DEADLINE_S", 0.1)
    monkeypatch.setattr(hub, "TRIES", 1)
    stub.faults["resolve"] = [Reply(body=MASK.to_bytes(), slow=0.03)]
    refused(stub, tmp_path, HubError, "not done after 0.1 s")


def test_a_hub_that_says_nothing_is_given_up(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(hub, "TRIES", 1)
    stub.faults["resolve"] = [Reply(body=MASK.to_bytes(), slow=1.0)]
    refused(stub, tmp_path, HubError, "cannot be reached")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b'{"sha": 5, "siblings": []}',
        b'{"sha": "../../x", "siblings": []}',
        b"{" * 100_000,
        b'{"sha": "' + b"1" * 40 + b'"}',
        b'{"sha": "' + b"1" * 40 + b'", "siblings": {}}',
        b'{"sha": NaN}',
        b"\xff\xfe",
        b'{"sha": "' + b"1" * 40 + b'", "sha": "' + b"2" * 40 + b'", "siblings": []}',
    ],
)
def test_an_answer_that_is_no_answer(body, stub, tmp_path):
    stub.faults["info"] = [Reply(body=body)]
    refused(stub, tmp_path, HubError, "cannot be read")


@pytest.mark.parametrize("size", [None, "12", -1, True, 1e3])
def test_a_size_that_is_none(size, stub, tmp_path):
    listed = {"sha": "1" * 40, "siblings": [{"rfilename": "mask.safetensors", "size": size}]}
    stub.faults["info"] = [Reply(body=json.dumps(listed).encode())]
    refused(stub, tmp_path, HubError, "how large")


@pytest.mark.parametrize(
    "names",
    [[], ["README.md"], ["../mask.safetensors"], ["a/mask.safetensors"], ["/mask.safetensors"], ["mask.safetensors\0"],
     ["mask.bin"], ["mask.safetensors", "mask.safetensors"]],
)  # fmt: skip
def test_only_the_one_known_name_is_downloaded(names, stub, tmp_path):
    listed = {"sha": "1" * 40, "siblings": [{"rfilename": name, "size": 3} for name in names] + ["odd"]}
    stub.faults["info"] = [Reply(body=json.dumps(listed).encode())]
    refused(stub, tmp_path, InputError, "holds no mask.safetensors")
    assert stub.steps() == ["info"]


def test_a_repository_that_was_handed_to_another_name_is_not_taken_for_the_one_named(stub, tmp_path):
    stub.repos[NAME].id = "someone/else"
    refused(stub, tmp_path, InputError, "someone/else")


# ---------------------------------------------------------------- redirects and the token


def test_a_redirect_on_the_same_host_is_followed(stub, tmp_path):
    stub.repos["acme/other"] = stub.repos[NAME]
    stub.faults["resolve"] = [Reply(302, headers={"Location": f"/acme/other/resolve/{'1' * 40}/mask.safetensors"})]
    assert pull(stub, tmp_path).sha256 == MASK.sha256


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1:9/x", "https://evil.example/mask.safetensors", "//evil.example/x", "file:///etc/passwd", "",
     "http://[", "https://huggingface.co/x", "ftp://127.0.0.1/x", "http://user@evil.example/"],
)  # fmt: skip
def test_a_redirect_to_another_host_is_refused(location, stub, tmp_path):
    stub.faults["resolve"] = [Reply(302, headers={"Location": location})]
    refused(stub, tmp_path, HubError, "another host")
    assert stub.steps() == ["info", "resolve"]


def test_redirects_end(stub, tmp_path):
    stub.faults["resolve"] = [Reply(307, headers={"Location": f"/{NAME}/resolve/{'1' * 40}/mask.safetensors"})] * 9
    refused(stub, tmp_path, HubError, "redirects more than")


@pytest.mark.parametrize(
    ("endpoint", "target", "taken"),
    [
        ("https://huggingface.co", "https://cas-bridge.xethub.hf.co/x?sig=1", True),
        ("https://huggingface.co", "https://cdn-lfs.huggingface.co/x", True),
        ("https://huggingface.co", "http://cdn-lfs.huggingface.co/x", False),
        ("https://huggingface.co", "https://evilhf.co/x", False),
        ("https://huggingface.co", "https://hf.co.evil.example/x", False),
        ("https://huggingface.co", "https://cdn.hf.co:8443/x", False),
        ("https://hub.corp.example", "https://cdn-lfs.huggingface.co/x", False),
        ("https://hub.corp.example", "https://hub.corp.example/x", True),
        ("https://hub.corp.example", "http://hub.corp.example/x", False),
    ],
)
def test_storage_hosts_are_those_of_huggingface_co_alone(endpoint, target, taken):
    if taken:
        assert hub._target(f"{endpoint}/a/b", target, endpoint=endpoint, what="x") == target
    else:
        with pytest.raises(HubError, match="another host"):
            hub._target(f"{endpoint}/a/b", target, endpoint=endpoint, what="x")


def test_the_token_goes_to_the_endpoint_and_to_no_storage_host(stub, tmp_path, monkeypatch):
    with hub_by_hand.serving() as storage:
        storage.faults["info"] = [Reply(body=MASK.to_bytes())]
        stub.faults["resolve"] = [Reply(302, headers={"Location": f"{storage.address}/blob"})]
        monkeypatch.setattr(hub, "_target", lambda url, location, **_: location)
        pull(stub, tmp_path)
        assert [headers.get("authorization") for *_, headers in stub.asked] == [f"Bearer {TOKEN}"] * 2
        assert ["authorization" in headers for *_, headers in storage.asked] == [False]


@pytest.mark.parametrize(
    "address", ["ftp://h", "huggingface.co", "http://", "http://u:p@h", "http://h:99999", "http://h:x", "file:///x"]
)
def test_an_endpoint_that_is_none(address, tmp_path):
    with pytest.raises(InputError, match="not the address of a Hub"):
        sharing.pull(NAME, out=tmp_path / "m.safetensors", endpoint=address)


def test_offline_is_respected(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(stub, tmp_path, InputError, "HF_HUB_OFFLINE")
    assert stub.asked == []


def test_a_full_disk_leaves_nothing(stub, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(stub, tmp_path, FileError, "No space left")


# ---------------------------------------------------------------- the command


def command(stub, monkeypatch, *args):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stub.address)
    return CliRunner().invoke(app, ["mask", "pull", *args])


def test_the_command_prints_the_sha256_and_warns_of_what_is_not_pinned(stub, tmp_path, monkeypatch):
    out = tmp_path / "m.safetensors"
    found = command(stub, monkeypatch, NAME, "--out", str(out))
    assert found.exit_code == 0 and f"sha256 {MASK.sha256}" in found.stdout
    assert f"not pinned and can change; pin it: {NAME}@{'1' * 40} --sha256 {MASK.sha256}" in found.stderr
    assert SteeringMask.load(out).sha256 == MASK.sha256


def test_the_command_as_json_pinned(stub, tmp_path, monkeypatch):
    out = tmp_path / "m.safetensors"
    found = command(stub, monkeypatch, f"{NAME}@{'1' * 40}", "--out", str(out), "--sha256", MASK.sha256, "--json")
    told = json.loads(found.stdout)
    assert found.stderr == "" and told["pinned"] is True and told["sha256"] == MASK.sha256 and told["mask"] == str(out)


def test_hf_endpoint_and_the_exit_code_of_the_real_command(stub, tmp_path):
    settings = {**os.environ, "HF_ENDPOINT": stub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "moesteer.cli.main", "mask", "pull", "acme/absent"]
    found = subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and "is not on the Hub" in found.stderr and "Traceback" not in found.stderr
    assert TOKEN not in found.stderr + found.stdout and list(tmp_path.iterdir()) == []
    assert [(step, sent["authorization"]) for step, _, _, sent in stub.asked] == [("info", f"Bearer {TOKEN}")]


def test_every_error_is_one_of_ours(stub, tmp_path):
    """Every byte of the answer about the repository flipped: an error of the tree, or the mask itself."""
    whole = stub._info(f"/api/models/{NAME}/revision/main", b"").body
    for at in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[at] ^= 0x11
        stub.faults["info"] = [Reply(body=bytes(changed))]
        folder = tmp_path / str(at)
        folder.mkdir()
        try:
            pull(stub, folder)
        except MoesteerError:
            assert list(folder.iterdir()) == []
        else:
            assert (folder / "m.safetensors").read_bytes() == MASK.to_bytes()

"""Masks on the Hugging Face Hub: `push` with a card made from a run, and `pull` with every check before a byte is kept.

A repository holds one mask, `mask.safetensors`, and its card, `README.md`. A mask without a safety evaluation, or one
that lowers refusals of harmful requests, is not pushed (evidence.py); no option changes that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from moesteer import evidence, files, hub
from moesteer.card import card
from moesteer.errors import FileError, HubError, InputError, MaskFileError, MaskMismatchError
from moesteer.mask import SteeringMask
from moesteer.version import __version__

MASK = "mask.safetensors"
CARD = "README.md"
SUFFIX = ".safetensors"
SOURCE_SUFFIX = ".source.json"
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_FOREIGN: tuple[type[BaseException], ...] = (
    *hub.FAILURES, ValueError, RuntimeError, KeyError, TypeError, AttributeError,
)  # fmt: skip
"""What huggingface_hub throws at answers that are not the Hub's."""


@dataclass(frozen=True)
class Upload:
    """What a push would upload: files by name, exactly as they are sent. sha256: of the mask's content."""

    repo: str
    files: Mapping[str, bytes]
    sha256: str
    private: bool


@dataclass(frozen=True)
class Pushed:
    """What a push did. commit: of the repository, 40 hex digits; what to pin."""

    repo: str
    commit: str
    url: str
    sha256: str


@dataclass(frozen=True)
class Pulled:
    """What a pull did. revision: as asked for, None where nothing was pinned; commit: what that was."""

    path: Path
    source: Path
    repo: str
    revision: str | None
    commit: str
    sha256: str
    size_bytes: int

    @property
    def pinned(self) -> bool:
        """Whether a commit was asked for: a branch or a tag can move."""
        return self.revision is not None and self.revision == self.commit


def prepared(mask: Path, repo: str, *, run: Path, licence: str = "apache-2.0", private: bool = False) -> Upload:
    """The files of a push, made and checked without the network.

    mask: a mask file; run: the finished run that evaluated it; licence: of the mask. Raises UnpublishableError without
    a safety evaluation or for a mask that lowers refusals of harm, InputError, FileError, MaskFileError.
    """
    name, revision = hub.repository(repo)
    if revision is not None:
        raise InputError(
            "a push goes to a repository, not to a revision of it",
            where=repo[:200],
            expected="ORG/NAME",
            do="leave out what follows the @",
        )
    data = files.read_bytes(Path(mask), kind="mask")
    loaded = SteeringMask.from_bytes(data, where=str(mask))
    loaded.require_entries()
    found = evidence.of_run(Path(run), mask=loaded)
    evidence.require_publishable(found)
    text = card(loaded, found, repo=name, licence=licence)
    return Upload(name, {MASK: data, CARD: text.encode("utf-8")}, loaded.sha256, private)


def push(upload: Upload, *, endpoint: str | None = None) -> Pushed:
    """Upload a mask and its card in one commit, with the token of huggingface_hub's own login.

    endpoint: of the Hub; default HF_ENDPOINT. A repository that exists has to be one of a mask, and a private one
    where that is asked for. Raises HubError, InputError; nothing is uploaded then.
    """
    address = hub.endpoint_of(endpoint)
    api = HfApi(endpoint=address, library_name="moesteer", library_version=__version__)
    with _as_hub_errors(upload.repo):
        parent = None
        try:
            api.create_repo(upload.repo, private=upload.private or None)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            parent = _require_ours(upload, endpoint=address)
        operations = [CommitOperationAdd(name, data) for name, data in upload.files.items()]
        done = api.create_commit(
            upload.repo, operations, commit_message=f"Steering mask {upload.sha256[:12]}", parent_commit=parent
        )
    commit = str(done.oid)
    if not hub.COMMIT.fullmatch(commit):
        raise _odd(f"the Hub names no commit ({hub.printable(commit, most=60)!r})", where=upload.repo)
    _require_there(upload, commit, endpoint=address)
    return Pushed(upload.repo, commit, f"{address}/{upload.repo}", upload.sha256)


def _require_there(upload: Upload, commit: str, *, endpoint: str) -> None:
    """Raise HubError where the commit lacks a file: one that a .gitignore names is left out without a word."""
    found = hub.info(upload.repo, revision=commit, endpoint=endpoint)
    sizes = {one.get("rfilename"): one.get("size") for one in found["siblings"] if isinstance(one, dict)}
    missing = [name for name, data in upload.files.items() if sizes.get(name) != len(data)]
    if missing:
        raise _odd(f"the commit {commit[:12]} does not hold {', '.join(missing)} as uploaded", where=upload.repo)


def _require_ours(upload: Upload, *, endpoint: str) -> str:
    """The newest commit of a repository that exists, if it may be written to. Raises InputError."""
    found = hub.info(upload.repo, revision=None, endpoint=endpoint)
    names = {str(one.get("rfilename")) for one in found["siblings"] if isinstance(one, dict)}
    tags = found.get("tags")
    ours = "moesteer" in tags if isinstance(tags, list) else False
    if names - {".gitattributes"} and not ours:
        raise InputError(
            "the repository exists and is not one of a mask: its card would be replaced",
            where=upload.repo,
            expected="a new repository, an empty one, or one that `mask push` made",
            do="choose another name",
        )
    if upload.private and found.get("private") is not True:
        raise InputError(
            "the repository exists and is public",
            where=upload.repo,
            expected="a private repository, as --private asks",
            do="make it private on its page, choose another name, or leave out --private",
        )
    return str(found["sha"])


@contextmanager
def _as_hub_errors(repo: str) -> Iterator[None]:
    """Inside, whatever huggingface_hub throws becomes one of ours, without the token in it."""
    try:
        with hub.bounded():
            yield
    except OfflineModeIsEnabled as error:
        raise hub.offline(repo) from error
    except HfHubHTTPError as error:
        raise hub.refusal(error.response.status_code, error.response.headers, what=repo) from error
    except hub.FAILURES as error:
        raise hub.unreachable(error, where=repo) from error
    except _FOREIGN as error:
        said = hub.printable(str(error), most=200)
        raise _odd(f"the upload failed: {type(error).__name__} {said}".rstrip(), where=repo) from error


def pull(repo: str, *, out: Path | None = None, sha256: str | None = None, endpoint: str | None = None) -> Pulled:
    """Download the mask of `ORG/NAME[@REVISION]`, check it, and write it to `out` (default NAME.safetensors).

    Nothing is written unless size, digest and every check of SteeringMask.load hold. sha256: of the mask's content, to
    demand one. Beside the mask, `*.source.json` records where it came from. Raises HubError, InputError, LimitError,
    MaskFileError, MaskContentError, MaskMismatchError for another sha256, FileError where `out` is taken.
    """
    name, revision = hub.repository(repo)
    path = Path(out) if out is not None else Path(f"{name.split('/')[1]}{SUFFIX}")
    source = path.with_name(path.name.removesuffix(SUFFIX) + SOURCE_SUFFIX)
    _require_free(path, source)
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise InputError(
            "this is no sha256",
            where="--sha256",
            expected="64 small hex digits, as `moesteer mask show` and a mask's card print them",
            do="copy it whole",
        )
    address = hub.endpoint_of(endpoint)
    found = hub.info(name, revision=revision, endpoint=address)
    _require_same(found, name)
    entry = _entry(found, name)
    url = f"{address}/{name}/resolve/{found['sha']}/{MASK}"
    data = hub.get(url, endpoint=address, limit=files.LIMITS_BYTES["mask"], what=name)
    _require_whole(data, entry, where=f"{name}@{found['sha'][:12]}")
    loaded = SteeringMask.from_bytes(data, where=f"{name}@{found['sha'][:12]}/{MASK}")
    if sha256 is not None and loaded.sha256 != sha256:
        raise MaskMismatchError(
            "the repository holds another mask than the one asked for",
            where=f"{name}@{found['sha'][:12]}: sha256 {loaded.sha256}",
            expected=f"sha256 {sha256}",
            do="ask whoever gave you the digest; do not use this mask in its place",
        )
    done = Pulled(path, source, name, revision, str(found["sha"]), loaded.sha256, len(data))
    files.write_bytes(path, data)
    files.write_json(source, _source(done, endpoint=address))
    return done


def _require_free(path: Path, source: Path) -> None:
    if not path.name.endswith(SUFFIX) or path.name == SUFFIX:
        raise InputError(
            f"{path.name!r} is not the name of a mask file"[:200],
            where="--out",
            expected=f"a file name that ends in {SUFFIX}",
            do="correct --out",
        )
    try:
        taken = [one for one in (path, source) if one.exists() or one.is_symlink()]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FileError(
            f"cannot be looked at: {error}", where=str(path)[:200], expected="a path for a new file", do="correct --out"
        ) from error
    if taken:
        raise FileError(
            "there is a file of this name already",
            where=str(taken[0]),
            expected="a new file: nothing is replaced by what was downloaded",
            do="choose another --out, or delete that file first",
        )


def _require_same(found: Mapping[str, Any], name: str) -> None:
    """Raise InputError where the Hub answers for a repository of another name (one that was renamed or handed over)."""
    other = found.get("id", name)
    if other != name:
        raise InputError(
            f"the Hub answers with another repository, {hub.printable(str(other), most=120)}",
            where=name,
            expected="the repository that was named",
            do="look at it, and pull it by its own name if it is what you want",
        )


def _entry(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What the Hub lists of the mask file: its size and, of a large file, its digest. Raises InputError, LimitError."""
    listed = [one for one in found["siblings"] if isinstance(one, dict) and one.get("rfilename") == MASK]
    if len(listed) != 1:
        raise InputError(
            f"the repository holds no {MASK}",
            where=f"{name}@{found['sha'][:12]}",
            expected=f"a repository of a mask, with a file {MASK}",
            do="check its name; `moesteer mask push` makes such repositories",
        )
    size = listed[0].get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise _odd("the Hub does not say how large the mask is", where=name)
    if size > files.LIMITS_BYTES["mask"]:
        raise hub.too_large(size, limit=files.LIMITS_BYTES["mask"], what=f"{name}: {MASK}")
    return listed[0]


def _require_whole(data: bytes, entry: Mapping[str, Any], *, where: str) -> None:
    """Raise MaskFileError for what is no mask file at all, HubError for bytes other than the Hub lists."""
    what = None
    if data.startswith(b"version https://git-lfs"):
        what = "a pointer of Git LFS came in place of the file"
    elif data.lstrip()[:1] == b"<":
        what = "a page of HTML came in place of the file"
    if what is not None:
        raise MaskFileError(
            what,
            where=where,
            expected=f"the bytes of {MASK}",
            do="check HF_ENDPOINT and any proxy between, and try again",
        )
    large = entry.get("lfs")
    stated = large.get("sha256") if isinstance(large, dict) else None
    if len(data) != entry["size"] or (isinstance(stated, str) and files.sha256(data) != stated):
        raise _odd(f"{len(data):,} bytes came that are not the {entry['size']:,} bytes the Hub lists", where=where)


def _source(done: Pulled, *, endpoint: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "repo": done.repo,
        "revision": done.revision,
        "commit": done.commit,
        "pinned": done.pinned,
        "file": MASK,
        "sha256": done.sha256,
        "size_bytes": done.size_bytes,
        "endpoint": endpoint,
        "moesteer": __version__,
    }


def _odd(what: str, *, where: str) -> HubError:
    return HubError(
        what, where=where, expected="an answer as huggingface.co gives it", do="check HF_ENDPOINT, and try again"
    )

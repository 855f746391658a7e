"""The masks that clients may choose from: a folder that only its operator can change.

Ids are the file names without `.safetensors`; a listed strength adds `ID.STRENGTH`. Beside the masks may lie
`masks.toml`, a list of what is allowed, by sha256:

    [masks.harden]
    file = "direct+gate.safetensors"
    sha256 = "9f86d081..."
    alphas = [0.3, 0.6]        # also as harden.0.3 and harden.0.6

With it, nothing else in the folder is offered. An id is looked up in the table made here at the start; no request ever
becomes a path.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moesteer import files
from moesteer.backends.vllm.settings import MASK_ID
from moesteer.errors import FileError, MaskMismatchError
from moesteer.mask import SteeringMask

LIST = "masks.toml"
SUFFIX = ".safetensors"


class Listed(BaseModel):
    """A line of masks.toml. alpha: strength under the plain id (None: the mask's own); alphas: others to offer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    alpha: float | None = Field(default=None, allow_inf_nan=False)
    alphas: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()


class MaskList(BaseModel):
    """masks.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    masks: dict[str, Listed]


def selectable(folder: Path, *, alphas: Sequence[float] = ()) -> dict[str, tuple[Path, float | None]]:
    """Path and strength (None: the mask's own) by id. alphas: strengths offered for every mask, besides its own.

    Raises FileError for a folder or file that others could change, that leads out of the folder, or has no id;
    MaskMismatchError for a file that is not the one listed; what SteeringMask.load raises.
    """
    _require_own(folder, folder=True)
    listed = _listed(folder)
    found: dict[str, tuple[Path, float | None]] = {}
    for base, entry in listed.items():
        path = folder / entry.file
        _require_own(path, folder=False)
        if entry.sha256:
            _require_sha256(path, entry.sha256)
        offered = [(base, entry.alpha), *((f"{base}.{a:g}", a) for a in dict.fromkeys((*entry.alphas, *alphas)))]
        for name, alpha in offered:
            if name in found:
                raise FileError(
                    f"two masks would have the id {name!r}"[:120],
                    where=str(folder),
                    expected="one mask, at one strength, for each id",
                    do=f"rename one of them; a strength makes the id {base}.STRENGTH",
                )
            found[name] = (path, alpha)
    for name in found:
        if not MASK_ID.fullmatch(name):
            raise FileError(
                f"{name!r} is no mask id"[:120],
                where=str(folder),
                expected="names of small letters, digits, . _ -, beginning with a letter or digit, 64 at most",
                do=f"rename the file, or name it in {LIST}",
            )
    return found


class _Plain:
    def __init__(self, file: str) -> None:
        self.file, self.sha256, self.alpha, self.alphas = file, "", None, ()


def _listed(folder: Path) -> dict[str, Listed | _Plain]:
    path = folder / LIST
    if not os.path.lexists(path):
        names = sorted(child.name for child in folder.iterdir() if child.name.endswith(SUFFIX))
        return {name.removesuffix(SUFFIX): _Plain(name) for name in names}
    _require_own(path, folder=False)
    try:
        found = MaskList.model_validate(tomllib.loads(files.read_bytes(path, kind="table").decode("utf-8")))
    except (ValidationError, ValueError, RecursionError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise FileError(
            f"{LIST} is wrong at {'.'.join(map(str, what['loc'])) or 'the top'}: {what['msg']}",
            where=str(path),
            expected="a table [masks.ID] with file and sha256 for each mask",
            do="correct it (docs/serving.md has an example)",
        ) from error
    for entry in found.masks.values():
        if Path(entry.file).name != entry.file or not entry.file.endswith(SUFFIX):
            raise FileError(
                f"{LIST} names {entry.file!r}"[:160],
                where=str(path),
                expected=f"the name of a {SUFFIX} file in the same folder",
                do="put the mask into the folder, and name it without a path",
            )
    return dict(found.masks)


def _require_own(path: Path, *, folder: bool) -> None:
    """Raise FileError for a folder or file that somebody else could change, or a link."""
    try:
        info = path.lstat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FileError(
            f"cannot be read: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            expected="a folder of masks" if folder else "a mask file",
            do="check the path",
        ) from error
    kind = stat.S_ISDIR(info.st_mode) if folder else stat.S_ISREG(info.st_mode)
    mine = info.st_uid in (os.geteuid(), 0)
    if not kind or not mine or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = (
            "it is a link" if stat.S_ISLNK(info.st_mode)
            else f"it is no {'folder' if folder else 'regular file'}" if not kind
            else "it belongs to somebody else" if not mine
            else "others may write to it"
        )  # fmt: skip
        raise FileError(
            f"masks are not taken from here: {wrong}",
            where=str(path),
            expected="a folder, and regular files in it, of the server's own user or root, that nobody else can write",
            do=f"chown and chmod go-w {path}; copy the file itself rather than link to it",
        )


def _require_sha256(path: Path, sha256: str) -> None:
    found = SteeringMask.load(path).sha256
    if found != sha256:
        raise MaskMismatchError(
            "the mask is not the one that is listed",
            where=f"{path}: sha256 {found[:12]}, listed {sha256[:12]}",
            expected=f"the mask whose sha256 is in {LIST} (`moesteer mask show` prints it)",
            do="put the right file there, or list this one",
        )

"""What an operator tells the plug-in: vLLM's `additional_config["moesteer"]`, checked strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moesteer import files
from moesteer.errors import InputError, UnknownNameError
from moesteer.version import __version__

KEY = "moesteer"
"""The key in additional_config."""
MASK_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
UNTESTED = ("data-parallel", "expert-parallel", "draft-model")
"""Features of vLLM that no test here covers; each is refused unless the settings name it."""


class MaskSource(BaseModel):
    """A mask file, and the strength it is used at (None: the mask's own). sha256: of its content, which must be so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    alpha: float | None = Field(default=None, allow_inf_nan=False)


class Settings(BaseModel):
    """The plug-in's settings.

    pins: masks that steer every token of every request. masks: those a request may name, by id. capture: keep router
    logits, or only selections, of requests that ask for it. count: select twice, and count what steering changes
    (for offline use: it costs a selection). allow_other_checkpoint: accept masks made on other router weights of the
    same shape. untested: features of vLLM to allow although no test covers them (UNTESTED).
    version: of moesteer, so that compiled code of another version is not taken up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = __version__
    pins: tuple[MaskSource, ...] = ()
    masks: Mapping[str, MaskSource] = Field(default_factory=dict)
    capture: Literal["logits", "selected"] | None = None
    count: bool = False
    allow_other_checkpoint: bool = False
    untested: tuple[str, ...] = ()

    @field_validator("masks")
    @classmethod
    def _ids_are_plain(cls, masks: Mapping[str, MaskSource]) -> Mapping[str, MaskSource]:
        for name in masks:
            if not MASK_ID.fullmatch(name):
                raise ValueError(f"{name!r} is no mask id: small letters, digits, . _ -, 64 at most")
        return masks

    @field_validator("untested")
    @classmethod
    def _untested_is_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(names) - set(UNTESTED)):
            raise ValueError(f"{', '.join(unknown)}: there are {', '.join(UNTESTED)}")
        return names

    def as_config(self) -> dict[str, Any]:
        """What to give vLLM: `LLM(MODEL, additional_config=settings.as_config())`, `--additional-config '...'`."""
        return {KEY: self.model_dump(mode="json")}


def read_settings(additional_config: object) -> Settings | None:
    """The settings in an engine's additional_config; None where there are none. Raises InputError for wrong ones."""
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return None
    try:
        found = Settings.model_validate(additional_config[KEY])
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"the plug-in's settings are wrong at {'.'.join(map(str, first['loc'])) or 'the top'}: {first['msg']}",
            where=f"additional_config[{KEY!r}]",
            expected="what moesteer.backends.vllm.settings.settings_for gives (docs/serving.md)",
            do="let `moesteer serve` or settings_for write them",
        ) from error
    if found.version != __version__:
        raise InputError(
            f"the settings were written by moesteer {found.version}, and {__version__} is installed here",
            where=f"additional_config[{KEY!r}]",
            expected="the same version in every process and on every node",
            do="install one version everywhere, and let it write the settings",
        )
    return found


def settings_for(
    *,
    pins: Sequence[tuple[str | Path, float | None]] = (),
    masks: Mapping[str, tuple[str | Path, float | None]] | None = None,
    capture: Literal["logits", "selected"] | None = None,
    count: bool = False,
    allow_other_checkpoint: bool = False,
    untested: Sequence[str] = (),
) -> Settings:
    """Settings from mask files (path, strength or None); reads each, and writes down its sha256.

    Raises what SteeringMask.load raises, and UnknownNameError for an id or a feature that cannot be.
    """
    from moesteer.mask import SteeringMask

    def source(path: str | Path, alpha: float | None) -> MaskSource:
        mask = SteeringMask.load(path)
        return MaskSource(file=str(Path(path).resolve()), sha256=mask.sha256, alpha=alpha)

    try:
        return Settings(
            pins=tuple(source(path, alpha) for path, alpha in pins),
            masks={name: source(path, alpha) for name, (path, alpha) in (masks or {}).items()},
            capture=capture,
            count=count,
            allow_other_checkpoint=allow_other_checkpoint,
            untested=tuple(untested),
        )
    except ValidationError as error:
        raise UnknownNameError(
            str(error.errors()[0]["msg"]).removeprefix("Value error, "),
            where="the plug-in's settings",
            expected="mask ids of small letters, digits, . _ -; finite strengths; features that vLLM has",
            do="rename it",
        ) from error


def digest_of(settings: Settings) -> str:
    """sha256 of settings as JSON."""
    return files.sha256(files.dumps(settings.model_dump(mode="json"), indent=None).encode("utf-8"))

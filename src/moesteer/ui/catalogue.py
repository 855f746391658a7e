"""What may be chosen in the page: the models and masks of the command line, and those found below the runs folder.

Choices are names, looked up in tables that are made here: nothing that comes from a browser becomes a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesteer.errors import UnknownNameError
from moesteer.mask import SteeringMask
from moesteer.methods import RESIDUAL
from moesteer.ui import runs_browser

SUFFIX = ".safetensors"
MOST_CHOICES = 500


@dataclass(frozen=True)
class Catalogue:
    """given_models, given_masks: of the command line. runs: the folder whose runs, models and masks are offered."""

    given_models: tuple[str, ...]
    given_masks: tuple[Path, ...]
    runs: Path

    def models(self) -> list[str]:
        """Names that `load` takes: those given, those that runs are of, and model folders beside the runs."""
        of_runs = [run.model for run in runs_browser.describe(self.runs) if run.model]
        return list(dict.fromkeys((*self.given_models, *of_runs, *self._model_folders())))[:MOST_CHOICES]

    def _model_folders(self) -> list[str]:
        if not self.runs.is_dir():
            return []
        folders = sorted(p for p in self.runs.iterdir() if p.is_dir() and not p.is_symlink())
        return [str(p) for p in folders if (p / "config.json").is_file() and any(p.glob(f"*{SUFFIX}"))]

    def masks(self) -> dict[str, Path]:
        """Mask files by name: those given as they were given, those of runs by their path below the folder."""
        found = {path.as_posix(): path for path in self.given_masks}
        for name, run in runs_browser.find(self.runs).items():
            for path in runs_browser.masks_of(run):
                if path.stem != RESIDUAL:  # a direction of the residual stream, which no router takes
                    found.setdefault(f"{name}/{path.relative_to(run).as_posix()}", path)
        return dict(list(found.items())[:MOST_CHOICES])

    def model(self, name: str) -> str:
        """The model of that name. Raises UnknownNameError."""
        if name not in (known := self.models()):
            raise _unknown("model", name, len(known), "--model")
        return name

    def mask_path(self, name: str) -> Path:
        """The file of the mask of that name. Raises UnknownNameError."""
        known = self.masks()
        if name not in known:
            raise _unknown("mask", name, len(known), "--mask")
        return known[name]

    def load_masks(self, names: tuple[str, ...]) -> list[SteeringMask]:
        """The masks, read and checked now. Raises UnknownNameError, FileError, MaskFileError, MaskContentError."""
        return [SteeringMask.load(self.mask_path(name)) for name in names]


def _unknown(what: str, name: str, known: int, option: str) -> UnknownNameError:
    return UnknownNameError(
        f"no {what} {str(name)[:200]!r} is offered",
        where="moesteer ui",
        expected=f"one of the {known} in the list",
        do=f"give it with {option} when starting, or put it below the runs folder",
    )

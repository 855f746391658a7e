"""What a detection method is: a function, the contrast it looks at, and what is tried on the select split.

A method is one file with a function and a `METHOD`; it is registered in methods.BUILT_IN, or by another package under
the entry point group "moesteer.methods" (docs/adding-a-method.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesteer import files
from moesteer.detection.base import Detection
from moesteer.errors import InputError, UnknownNameError
from moesteer.trace import TraceReader

ContrastName = Literal["pairs", "matched", "published"]
_GIVEN = ("trace", "model", "targets", "keeps", "sigma_L", "toward", "data_sha256", "seed", "state")
"""Arguments that moesteer gives; all others of a method's function are its settings."""


@dataclass(frozen=True)
class Material:
    """What detection may look at: the fit split only.

    traces: by contrast. "pairs": one conversation with a wanted and with an unwanted response (span response).
    "matched": target conversations by how they ended, and protected ones labelled "keep" (span final_turn).
    "published": target conversations that went wrong against another suite's that went well (span final_user).
    model, targets, keeps: for methods through the model; conversations with their responses, encoded. folder: where
    a long method may keep its state, to go on after a kill; state: the file for it, instead of one in the folder.
    """

    traces: Mapping[str, TraceReader]
    toward: str
    seed: int = 0
    model: Any = None
    targets: Sequence[Any] = ()
    keeps: Sequence[Any] = ()
    folder: Path | None = None
    state: Path | None = None


@dataclass(frozen=True)
class Method:
    """A detection method.

    detect: `(trace, *, toward, seed, **settings) -> Detection`, or with through_model
    `(model, *, targets, keeps, sigma_L, toward, seed, data_sha256, **settings) -> Detection`.
    preset: settings that make this method of a function that several share.
    variants: settings tried on the select split; alphas: strengths at which an additive mask of each is tried.
    grid: all variants in one call, where that is cheaper: `(trace, variants, *, toward, seed, **settings)`.
    gated: whether `steer` also tries it behind a gate, at gated_alphas. paper: a published method as it is.
    """

    name: str
    title: str
    detect: Callable[..., Detection]
    contrast: ContrastName = "pairs"
    through_model: bool = False
    preset: Mapping[str, Any] = field(default_factory=dict)
    variants: Sequence[Mapping[str, Any]] = ({},)
    alphas: Sequence[float] = (0.25, 0.5, 1.0, 2.0)
    grid: Callable[..., Sequence[Detection]] | None = None
    gated: bool = False
    gated_alphas: Sequence[float] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings with their defaults, those that `preset` decides left out."""
        return {
            name: None if parameter.default is inspect.Parameter.empty else parameter.default
            for name, parameter in inspect.signature(self.detect).parameters.items()
            if name not in _GIVEN and name not in self.preset
        }

    @property
    def plan(self) -> dict[str, Any]:
        """What decides this method's masks and candidates, for a run's plan."""
        names = ("name", "contrast", "preset", "settings", "variants", "alphas", "gated", "gated_alphas")
        found: dict[str, Any] = files.parse_json(files.dumps({name: getattr(self, name) for name in names}))
        return found  # as it is read back from run.json: lists for tuples

    def check_settings(self, given: Mapping[str, Any], *, where: str) -> None:
        """Raise UnknownNameError for a setting that the method does not have."""
        known = self.settings
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UnknownNameError(
                f"{self.name} has no setting {', '.join(unknown)}",
                where=where,
                expected=", ".join(f"{name} ({default!r})" for name, default in known.items()),
                do="correct the setting's name",
            )

    def run(self, material: Material, settings: Mapping[str, Any]) -> Detection:
        """Detect once. Raises InputError when the material lacks what the method needs."""
        self.check_settings(settings, where=f"settings of {self.name}")
        given: dict[str, Any] = {**self.preset, **settings, "toward": material.toward}
        if "seed" in inspect.signature(self.detect).parameters:
            given["seed"] = material.seed
        state = material.state or (material.folder and material.folder / f"{self.name}.state")
        if "state" in inspect.signature(self.detect).parameters and state is not None:
            given["state"] = state
        trace = self._trace(material)
        if not self.through_model:
            return self.detect(trace, **given)
        if material.model is None or not material.targets:
            raise InputError(
                f"{self.name} works through the model, and was given none",
                where="detect",
                expected="the model, and conversations with responses",
                do="give model= and conversations= (--model and --data)",
            )
        return self.detect(
            material.model, targets=material.targets, keeps=material.keeps, sigma_L=trace.sigma_L,
            data_sha256=trace.manifest.plan_sha256, **given,
        )  # fmt: skip

    def run_all(
        self, material: Material, variants: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> list[Detection]:
        """One detection per variant (the variant's settings over `settings`)."""
        self.check_settings(settings, where=f"settings of {self.name}")
        for variant in variants:
            self.check_settings(variant, where=f"variants of {self.name}")
        if self.grid is not None:
            given = {**self.preset, **settings}
            return list(self.grid(self._trace(material), variants, toward=material.toward, seed=material.seed, **given))
        return [self.run(material, {**settings, **variant}) for variant in variants]

    def _trace(self, material: Material) -> TraceReader:
        if self.contrast not in material.traces:
            raise InputError(
                f"{self.name} compares the contrast {self.contrast!r}, and there is no trace of it",
                where="detect",
                expected=f"a trace of it; there are {', '.join(material.traces) or 'none'}",
                do="capture that contrast",
            )
        return material.traces[self.contrast]

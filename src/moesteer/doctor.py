"""Doctor: what is installed, whether it works, and whether the files of a run are whole."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.errors import MoesteerError
from moesteer.mask import SteeringMask
from moesteer.trace import TraceReader

MINIMUM = {"torch": (2, 10), "transformers": (5, 16), "jinja2": (3, 1), "numpy": (2, 0)}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    ok: bool
    detail: str

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def examine(path: Path | None = None) -> list[Finding]:
    """The installation, and the files at `path` (a mask, a trace folder or a run directory) if one is given."""
    found = _installation()
    if path is None:
        return found
    if path.is_dir() and (path / "run.json").exists():
        return found + _run(path)
    if path.is_dir() and (path / "manifest.json").exists():
        return [*found, _trace(path, str(path))]
    return [*found, _mask(path, str(path))]


def _installation() -> list[Finding]:
    import torch

    found = [Finding("python", True, platform.python_version())]
    for name, lowest in MINIMUM.items():
        have = version(name)
        numbers = tuple(int(part) for part in have.split("+")[0].split(".")[:2])
        found.append(Finding(name, numbers >= lowest, f"{have} (at least {'.'.join(map(str, lowest))})"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found.append(Finding("device", True, f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"))
    try:
        from moesteer.backends.loading import load

        model = load("lab-tiny")
        found.append(Finding("lab-tiny", True, f"loads; self-check passed on {len(model.routers)} routers"))
    except MoesteerError as error:
        found.append(Finding("lab-tiny", False, error.what))
    free = shutil.disk_usage(Path.cwd()).free
    found.append(Finding("disk", free > 1e9, f"{free / 1e9:.1f} GB free here"))
    return found


def _run(folder: Path) -> list[Finding]:
    found = []
    try:
        state = files.read_json(folder / "run.json")
        status = state.get("status") if isinstance(state, dict) else None
        note = "" if status == "complete" else " (the same command goes on with it)"
        found.append(Finding("run.json", True, f"status {status}{note}"))
    except MoesteerError as error:
        found.append(Finding("run.json", False, error.what))
    found += [
        _trace(path.parent, str(path.parent.relative_to(folder)))
        for path in sorted(folder.glob("trace/*/manifest.json"))
    ]
    found += [_mask(path, str(path.relative_to(folder))) for path in sorted(folder.glob("masks/**/*.safetensors"))]
    for path in sorted(folder.glob("responses/*.jsonl")):
        try:
            count = sum(1 for _ in files.Journal(path).read())
            found.append(Finding(str(path.relative_to(folder)), True, f"{count} rows"))
        except (MoesteerError, ValueError, RecursionError) as error:
            found.append(Finding(str(path.relative_to(folder)), False, str(error).splitlines()[0]))
    if (folder / "results.json").exists():
        try:
            files.read_json(folder / "results.json")
            found.append(Finding("results.json", True, "readable"))
        except MoesteerError as error:
            found.append(Finding("results.json", False, error.what))
    leftovers = list(folder.rglob(f".*{files.TEMPORARY_SUFFIX}"))
    if leftovers:
        found.append(
            Finding("temporary files", False, f"{len(leftovers)} left by a killed writer; the next run removes them")
        )
    return found


def _trace(folder: Path, name: str) -> Finding:
    try:
        trace = TraceReader(folder)
        changed = trace.verify()
    except MoesteerError as error:
        return Finding(name, False, error.what)
    if changed:
        return Finding(name, False, f"changed since capture: {', '.join(changed)}")
    return Finding(name, True, f"{len(trace.rows)} sequences, {trace.manifest.tokens} tokens, every shard as captured")


def _mask(path: Path, name: str) -> Finding:
    try:
        mask = SteeringMask.load(path)
    except MoesteerError as error:
        return Finding(name, False, error.what)
    return Finding(name, True, f"{mask.info.method}, {mask.expert_count} experts, sha256 {mask.sha256[:12]}")

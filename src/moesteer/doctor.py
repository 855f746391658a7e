"""Doctor: what is installed, whether it works, and whether the files of a run are whole."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moesteer import files, runs
from moesteer.direction import Direction
from moesteer.errors import MoesteerError
from moesteer.locking import holder_of
from moesteer.mask import SteeringMask
from moesteer.methods import RESIDUAL
from moesteer.trace import TraceReader, captured

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
    return found if path is None else found + examine_files(path)


def examine_files(path: Path) -> list[Finding]:
    """The files at `path`: a mask, a trace folder, or a run directory with all that is in it."""
    if path.is_dir() and (path / runs.RUN).exists():
        return _run(path)
    if path.is_dir() and (path / "manifest.json").exists():
        return [_trace(path, str(path))]
    return [_mask(path, str(path))]


def _installation() -> list[Finding]:
    import torch

    found = [Finding("python", True, platform.python_version())]
    for name, lowest in MINIMUM.items():
        have = version(name)
        numbers = tuple(int(part) for part in have.split("+")[0].split(".")[:2])
        found.append(Finding(name, numbers >= lowest, f"{have} (at least {'.'.join(map(str, lowest))})"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found.append(Finding("device", True, f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"))
    if broken := broken_torchvision():
        return [*found, Finding("torchvision", False, broken)]  # nothing that loads a model can be tried
    try:
        from moesteer.backends.loading import load

        model = load("lab-tiny")
        found.append(Finding("lab-tiny", True, f"loads; self-check passed on {len(model.routers)} routers"))
    except MoesteerError as error:
        found.append(Finding("lab-tiny", False, error.what))
    free = shutil.disk_usage(Path.cwd()).free
    found.append(Finding("disk", free > 1e9, f"{free / 1e9:.1f} GB free here"))
    return found


def broken_torchvision() -> str | None:
    """Why torchvision keeps transformers from importing its models, and what to do; None where it does not.

    It is no dependency of ours, but vLLM brings builds of it for another torch, and transformers imports what is there.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return f"installed for another torch ({why}): pip uninstall -y torchvision torchaudio torchcodec"
    return None


def _run(folder: Path) -> list[Finding]:
    try:
        state = files.read_json(folder / runs.RUN)
        if not isinstance(state, dict) or not runs.is_whole(folder):
            said = "changed since it was written: what it says of the rest cannot be trusted"
            return [Finding(runs.RUN, False, said)]
    except MoesteerError as error:
        return [Finding(runs.RUN, False, error.what)]
    return [
        _status(folder, state),
        *_versions(state),
        *_recorded(folder, state),
        *_parts(folder, state),
        *_leftovers(folder),
    ]


def _status(folder: Path, state: dict[str, Any]) -> Finding:
    """What the run is, and how to go on with it."""
    status = state.get("status")
    made = f"moesteer {state.get('versions', {}).get('moesteer', 'of an unknown version')}"
    if holder := holder_of(folder):
        return Finding(runs.RUN, True, f"{made}; being written by {holder}: what follows is of this moment")
    if status == "complete":
        return Finding(runs.RUN, True, f"{made}; complete")
    command = state.get("command")
    again = f"`{command}` in {state.get('cwd')}" if command else "the same command"
    why = f" ({str(state['error']).splitlines()[0]})" if state.get("error") else ""
    return Finding(runs.RUN, True, f"{made}; {status}{why}; {again} goes on with it")


def _versions(state: dict[str, Any]) -> list[Finding]:
    """Whether one set of libraries made the whole run."""
    later = state.get(runs.CONTINUED_WITH)
    if not later:
        return []
    told = "; then ".join(", ".join(f"{name} {now}" for name, now in one.items()) for one in later)
    return [Finding("versions", False, f"begun with others than it went on with ({told}): a part may differ")]


def _recorded(folder: Path, state: dict[str, Any]) -> list[Finding]:
    """Every file that a complete run noted, against its digest; and files that it did not write."""
    noted = state.get("files")
    if not isinstance(noted, dict):
        return []
    found = []
    for name, digest in sorted(noted.items()):
        path = folder / name
        try:
            bad = None if path.is_file() and files.sha256_of(path) == digest else "changed since the run completed"
            bad = bad if path.exists() else "missing"
        except MoesteerError as error:
            bad = error.what
        if bad:
            found.append(Finding(name, False, bad))
    whole = Finding("files", True, f"{len(noted) - len(found)} of {len(noted)} as the run left them")
    more = sorted(set(runs.digests(folder)) - set(noted))
    extra = [Finding("other files", True, f"not of this run: {', '.join(more[:10])}")] if more else []
    return [*found, whole, *extra]


def _parts(folder: Path, state: dict[str, Any]) -> list[Finding]:
    """What is in the run, by itself: traces, masks and responses; in an unfinished run, how much of them."""
    found = []
    for path in sorted(folder.glob("trace/*/manifest.json")):
        found.append(_trace(path.parent, path.parent.relative_to(folder).as_posix(), unfinished=True))
    for path in sorted(folder.glob("masks/**/*.safetensors")):
        found.append(_mask(path, path.relative_to(folder).as_posix()))
    expects = dict(state.get("expects") or {})
    for path in [*sorted(folder.glob("responses/*.jsonl")), *sorted(folder.glob("*.jsonl"))]:
        found.append(_journal(path, path.relative_to(folder).as_posix(), _expected(expects, path)))
    if state.get("status") != "complete":
        found += [Finding(f"responses/{name}.jsonl", True, f"0 of {rows} rows") for name, rows in expects.items()]
    if (folder / "results.json").exists():
        try:
            files.read_json(folder / "results.json")
        except MoesteerError as error:
            found.append(Finding("results.json", False, error.what))
    return found


def _expected(expects: dict[str, int], path: Path) -> int | None:
    """Taken out of `expects`, so that what is left there has not begun."""
    return expects.pop(path.stem, None) if path.parent.name == "responses" else None


def _journal(path: Path, name: str, expected: int | None) -> Finding:
    try:
        count = sum(1 for _ in files.Journal(path).read())
    except (MoesteerError, ValueError, RecursionError) as error:
        return Finding(name, False, str(error).splitlines()[0])
    return Finding(name, True, f"{count} rows" if expected is None else f"{count} of {expected} rows")


def _leftovers(folder: Path) -> list[Finding]:
    found = list(folder.rglob(f".*{files.TEMPORARY_SUFFIX}"))
    if not found:
        return []
    return [Finding("temporary files", True, f"{len(found)} left by a killed writer; the next run removes them")]


def _trace(folder: Path, name: str, *, unfinished: bool = False) -> Finding:
    """unfinished: a capture that did not end is no fault (of a run, which goes on with it)."""
    try:
        so_far = captured(folder)
        if unfinished and not so_far.complete:
            return Finding(name, True, f"{so_far.done} of {so_far.shards} shards")
        trace = TraceReader(folder)
        changed = trace.verify()
    except MoesteerError as error:
        return Finding(name, False, error.what)
    if changed:
        return Finding(name, False, f"changed since capture: {', '.join(changed)}")
    return Finding(name, True, f"{len(trace.rows)} sequences, {trace.manifest.tokens} tokens, every shard as captured")


def _mask(path: Path, name: str) -> Finding:
    try:
        if path.stem == RESIDUAL:
            direction = Direction.load(path)
            return Finding(name, True, f"a direction of layer {direction.info.layer_id}")
        mask = SteeringMask.load(path)
    except MoesteerError as error:
        return Finding(name, False, error.what)
    return Finding(name, True, f"{mask.info.method}, {mask.expert_count} experts, sha256 {mask.sha256[:12]}")

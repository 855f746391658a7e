"""Two logs of one Inspect task, compared pair by pair: the statistics of `moesteer evaluate` on any task's scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog, read_eval_log

from moesteer.errors import DataError, FileError, InputError
from moesteer.evaluate import stats

Key = tuple[str, int]
"""A sample's id, and its epoch."""
OUTCOMES: Mapping[Any, bool] = {"C": True, "I": False, "N": False, 1: True, 0: False}
"""Inspect's correct, incorrect and no answer; and numbers (True is 1)."""


def compare(before: Path, after: Path, *, seed: int) -> dict[str, Any]:
    """Every score's rates in both logs, and their paired difference with a bootstrap interval and McNemar's p (of
    several epochs: a sign-flip test of samples).

    Pairs are samples of the same id and epoch; those that are not scored on both sides are left out of the difference
    and counted as unscored. Where samples have a `group` in their metadata, groups are resampled whole; else samples.
    Raises FileError for a file that is no log; InputError for logs that are not finished, or of different tasks or
    samples; DataError for a score that is neither yes nor no.
    """
    logs = [_read(path) for path in (before, after)]
    _require_same(logs[0], logs[1], where=f"{before} and {after}")
    samples = [{(str(s.id), int(s.epoch)): s for s in log.samples or ()} for log in logs]
    if samples[0].keys() != samples[1].keys():
        alone = len(samples[0].keys() ^ samples[1].keys())
        raise _different(f"{alone} samples are in one log only", where=f"{before} and {after}")
    keys = sorted(samples[0])
    groups = [str((samples[0][key].metadata or {}).get("group", key[0])) for key in keys]
    outcomes = [_outcomes(found, path) for found, path in zip(samples, (before, after), strict=True)]
    scores = {}
    for name in sorted(outcomes[0].keys() & outcomes[1].keys()):
        sides = [[found[name].get(key) for key in keys] for found in outcomes]
        scores[name] = compared(sides[0], sides[1], samples=[key[0] for key in keys], groups=groups, seed=seed)
    if not scores:
        raise _different("no score is in both logs", where=f"{before} and {after}")
    return {
        "schema": 1, "task": logs[0].eval.task, "seed": seed, "before": _model(logs[0]), "after": _model(logs[1]),
        "scores": scores,
    }  # fmt: skip


def compared(
    before: Sequence[bool | None], after: Sequence[bool | None], *, samples: Sequence[str], groups: Sequence[str],
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """One score's rates, pairs and difference. Epochs of a sample are no further samples: where there are several,
    intervals are of as many samples as were scored, and p is of samples (stats.sign_flip)."""
    pairs = [(one, b, a) for one, b, a in zip(samples, before, after, strict=True) if b is not None and a is not None]
    difference = stats.paired_difference(before, after, groups=groups, seed=seed)
    if len({one for one, _, _ in pairs}) < len(pairs):
        totals = Counter[str]()
        for one, b, a in pairs:
            totals[one] += int(a) - int(b)
        difference["p"] = stats.sign_flip(list(totals.values()))
    return {
        "before": _rate(before, samples), "after": _rate(after, samples), "pairs": len(pairs),
        "difference": difference,
    }  # fmt: skip


def _rate(outcomes: Sequence[bool | None], samples: Sequence[str]) -> dict[str, Any]:
    found = stats.rate(outcomes).as_json()
    count = len({one for one, outcome in zip(samples, outcomes, strict=True) if outcome is not None})
    if count < found["n"]:
        found["low"], found["high"] = stats.wilson(found["value"], count)
    return found


def _read(path: Path) -> EvalLog:
    try:
        return read_eval_log(path)
    except Exception as error:
        raise FileError(
            f"this cannot be read as a log: {str(error).splitlines()[0] if str(error) else type(error).__name__}"[:300],
            where=str(path),
            expected="a log of Inspect (.eval or .json)",
            do="check the path; `inspect log list` lists logs",
        ) from error


def _require_same(before: EvalLog, after: EvalLog, *, where: str) -> None:
    for log in (before, after):
        if log.status != "success" or not log.samples:
            raise _different(
                f"the log of {log.eval.model} is not finished (status {log.status}, {len(log.samples or ())} samples)",
                where=where,
            )
    if (before.eval.task, before.eval.task_args) != (after.eval.task, after.eval.task_args):
        raise _different(f"{before.eval.task} and {after.eval.task}, or their arguments, are not the same", where=where)


def _different(what: str, *, where: str) -> InputError:
    return InputError(
        what,
        where=where,
        expected="two finished logs of the same task, arguments and samples, with the same scorer",
        do="run the task again as the other log did (`inspect log dump` shows how), or `inspect eval-retry` it",
    )


def _outcomes(samples: Mapping[Key, Any], path: Path) -> dict[str, dict[Key, bool | None]]:
    """By score, each sample's outcome; a sample without the score, or with an error, is left out."""
    found: dict[str, dict[Key, bool | None]] = {}
    for key, sample in samples.items():
        several = len(sample.scores or {}) > 1
        for scorer, score in (sample.scores or {}).items():
            values = score.value if isinstance(score.value, dict) else {"": score.value}
            for inner, value in values.items():
                name = f"{scorer}/{inner}" if several and inner else inner or scorer
                found.setdefault(name, {})[key] = _outcome(value, where=f"{path}: sample {key[0]}, {scorer}")
    # a score that is not a number at the root is that of a sample whose other scores are named: it says no more
    return {name: by_key for name, by_key in found.items() if any(value is not None for value in by_key.values())}


def _outcome(value: Any, *, where: str) -> bool | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        return OUTCOMES[value]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"a score of {value!r} is neither yes nor no"[:200],
            where=where,
            expected="C, I, N, true, false, 1, 0, or unscored (NaN)",
            do="compare means of such scores with Inspect's own tools",
        ) from error


def _model(log: EvalLog) -> dict[str, Any]:
    """The model of a log, and the masks that its outputs name."""
    for sample in log.samples or ():
        told = (sample.output.metadata or {}).get("moesteer") if sample.output else None
        if told is not None:
            return {"model": log.eval.model, "mask_sha256": told["mask_sha256"], "alphas": told["alphas"]}
    return {"model": log.eval.model, "mask_sha256": [], "alphas": []}

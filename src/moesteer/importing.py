"""A mask from somebody's table of experts: counts of activations on two sides, or a score. docs/mask-algebra.md.

The statistic is that of SteerMoE (arXiv:2509.09660, section 3): D = A1 / N1 - A2 / N2, where A of N tokens have the
expert in the top-k. It is computed from the counts where the table has them, and what the table says itself is held
against it. Positive scores are switched on, negative ones off. Deviations: `by` "log-odds" ranks by the log odds
ratio with half a token added to each count; form "additive", as in risk_difference.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moesteer.detection.choosing import strongest
from moesteer.detection.counts import log_odds, risk_difference
from moesteer.errors import DataError, InputError, UnknownNameError
from moesteer.expert_table import Cells, read_cells
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.trace import TraceReader

By = Literal["risk-difference", "log-odds"]
Form = Literal["forced", "additive"]
LayerNumbers = Literal["ids", "rows"]
ROUNDING = 1e-6
"""A table's own statistic may differ by this from what its counts give: it may have been kept in float32."""
COUNTS = ("wanted_count", "other_count", "wanted_tokens", "other_tokens")
NAMES: dict[str, tuple[str, ...]] = {
    "layer": ("layer", "layer_id", "layer_idx", "layer_index"),
    "expert": ("expert", "expert_id", "expert_idx", "expert_index"),
    "wanted_count": ("wanted_count", "a1"),
    "wanted_tokens": ("wanted_tokens", "n1"),
    "other_count": ("other_count", "a2"),
    "other_tokens": ("other_tokens", "n2"),
    "risk_difference": ("risk_difference", "risk_diff"),
    "log_odds": ("log_odds", "log_odds_ratio"),
    "score": ("score",),
}
"""What a column holds, and the names it is known by (in any case; spaces and hyphens count as underscores)."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a table says: a score per expert [L, E] (0 where it has no row), and where it stands."""

    score_LE: NDArray[np.float64]
    rows: int
    sha256: str
    columns: dict[str, str]


def import_mask(
    path: Path | str,
    *,
    fingerprint: Fingerprint,
    toward: str,
    on: int = 0,
    off: int = 0,
    form: Form = "forced",
    reverse: bool = False,
    by: By = "risk-difference",
    columns: Mapping[str, str] | None = None,
    layer_numbers: LayerNumbers = "ids",
    sigma_L: NDArray[np.float32] | None = None,
) -> SteeringMask:
    """A mask of the `on` experts of highest positive score and the `off` experts of lowest negative score.

    form "forced": switched on and off, at most top_k on (none where top_k is 1) and E - top_k off in a layer, and
    within expert groups what they can follow; a fuller layer passes its turn on. "additive": strengths score /
    largest |score|, in units of sigma_L, which has to be given. reverse: the sides of the table change roles.
    columns, layer_numbers, by: see `read_scores`. toward: what the mask, as it comes out, should bring about. Raises
    DataError for a table that is not sound or has fewer experts than asked for, InputError for settings that do not
    fit, FileError and LimitError.
    """
    path = Path(path)
    _check_settings(on=on, off=off, form=form, toward=toward)
    if form == "forced" and on and fingerprint.top_k == 1:
        raise _none_on(on, fingerprint)
    found = read_scores(path, fingerprint=fingerprint, by=by, columns=columns, layer_numbers=layer_numbers)
    score = -found.score_LE if reverse else found.score_LE
    settings = {
        "table": path.name, "table_sha256": found.sha256, "rows": found.rows, "columns": found.columns, "by": by,
        "layer_numbers": layer_numbers, "form": form, "on": on, "off": off, "reverse": reverse,
    }  # fmt: skip
    info = MaskInfo(fingerprint=fingerprint, method="import", settings=settings, intent=Intent(toward=toward))
    if form == "forced":
        from moesteer.detection.risk_difference import possible_forced  # it brings scipy along

        force = possible_forced(score[None], fingerprint, on=on, off=off)[0]
        _check_found(force, on=on, off=off, where=str(path))
        return SteeringMask(info, force_LE=force)
    raised, lowered = (
        strongest(sign * score[None], count=count, per_layer=None)[0] for sign, count in ((1, on), (-1, off))
    )
    chosen = np.where(raised | lowered, score, 0.0)
    _check_found(chosen, on=on, off=off, where=str(path))
    sigma = _usable_sigma(sigma_L, chosen, fingerprint)
    return SteeringMask(info, strength_LE=(chosen / np.abs(score).max()).astype(np.float32), sigma_L=sigma)


def made_for(path: Path | str) -> tuple[Fingerprint, NDArray[np.float32] | None]:
    """The model that a mask file or a trace folder is of, and its sigma_L where it has one.

    Raises MaskError, TraceError, FileError.
    """
    path = Path(path)
    if path.is_dir():
        trace = TraceReader(path)
        return trace.fingerprint, trace.sigma_L if trace.manifest.level == "logits" else None
    mask = SteeringMask.load(path)
    return mask.info.fingerprint, mask.sigma_L


def read_scores(
    path: Path | str,
    *,
    fingerprint: Fingerprint,
    by: By = "risk-difference",
    columns: Mapping[str, str] | None = None,
    layer_numbers: LayerNumbers = "ids",
) -> Scores:
    """The scores of a table (.csv, .parquet, .json) for a model, checked as far as a table can be.

    With all four columns of counts, `by` is computed from them, and the columns risk_difference, log_odds and score
    (taken for `by`) must agree with it; without counts, the score is the column score, else the column named by `by`.
    columns: the table's name of a column by ours (NAMES); an empty name leaves it unread. layer_numbers: "ids",
    decoder layers; "rows", layers with a router, counted from 0. Raises as `import_mask`.
    """
    for name, given, allowed in (("by", by, get_args(By)), ("layer-numbers", layer_numbers, get_args(LayerNumbers))):
        if given not in allowed:
            raise UnknownNameError(f"no {name} {given!r}", where=name, expected=", ".join(allowed), do="give one")
    shape = (len(fingerprint.layer_ids), fingerprint.experts)
    cells = read_cells(Path(path), most_rows=shape[0] * shape[1])
    used = _columns(cells, columns or {})
    places = _places(cells, used, fingerprint, layer_numbers)
    statistic = by.replace("-", "_")
    if COUNTS[0] in used:
        counts = _counts(cells, used, places, fingerprint)
        values = (risk_difference if by == "risk-difference" else log_odds)(*counts)
        _check_stated(cells, used, counts, statistic)
    else:
        source = used.get("score") or used.get(statistic)
        if source is None:
            raise _missing(cells, f"it has neither counts nor a score (columns: {', '.join(cells.columns)[:200]})")
        values = np.array([cells.number(source, row) for row in range(len(places))])
        if source == used.get("risk_difference") and np.abs(values).max() > 1:
            row = int(np.abs(values).argmax())
            raise DataError(
                f"a risk difference of {values[row]:g}",
                where=cells.where(source, row),
                expected="a difference of two shares, from -1 to 1",
                do="divide percentages by 100, or import the column as a score (--columns score=NAME)",
            )
    score = np.zeros(shape)
    score[tuple(np.array(places).T)] = values
    return Scores(score, len(places), cells.sha256, used)


# ---------------------------------------------------------------- columns and rows


def _columns(cells: Cells, given: Mapping[str, str]) -> dict[str, str]:
    """The table's column for each of NAMES that it has."""
    for name, column in given.items():
        if name not in NAMES:
            raise UnknownNameError(
                f"no column {name!r} is looked for", where="columns", expected=", ".join(NAMES), do="use one of these"
            )
        if column and column not in cells.columns:
            raise _missing(cells, f"it has no column {column!r} (columns: {', '.join(cells.columns)[:200]})")
    plain = {column: column.strip().lower().replace(" ", "_").replace("-", "_") for column in cells.columns}
    used = {}
    for name, known in NAMES.items():
        found = [given[name]] if name in given else [
            column for column, text in plain.items() if text in known and column not in given.values()
        ]  # fmt: skip
        if len(found) > 1:
            raise DataError(
                f"the columns {' and '.join(map(repr, found))} could both be {name!r}",
                where=str(cells.path),
                expected=f"one column for {name}",
                do=f"say which: --columns {name}=NAME",
            )
        if found and found[0]:
            used[name] = found[0]
    lacking = [name for name in ("layer", "expert") if name not in used]
    if any(name in used for name in COUNTS):
        lacking += [name for name in COUNTS if name not in used]
    if lacking:
        raise _missing(cells, f"it lacks {', '.join(lacking)} (columns: {', '.join(cells.columns)[:200]})")
    return used


def _missing(cells: Cells, what: str) -> DataError:
    return DataError(
        f"the table's columns are not enough: {what}",
        where=str(cells.path),
        expected=f"layer, expert, and either all of {', '.join(COUNTS)}, or a score",
        do="say what they are called in the table: --columns layer=NAME, and so on (docs/mask-algebra.md)",
    )


def _places(
    cells: Cells, used: dict[str, str], fingerprint: Fingerprint, layer_numbers: LayerNumbers
) -> list[tuple[int, int]]:
    """(row of the mask, expert) of every row of the table; each at most once."""
    known = fingerprint.layer_ids if layer_numbers == "ids" else tuple(range(len(fingerprint.layer_ids)))
    row_of = {number: row for row, number in enumerate(known)}
    seen: dict[tuple[int, int], int] = {}
    for row in range(len(cells.places)):
        layer, expert = cells.integer(used["layer"], row), cells.integer(used["expert"], row)
        if layer not in row_of:
            raise DataError(
                f"the model has no router in layer {layer}",
                where=cells.where(used["layer"], row),
                expected=f"layers {', '.join(map(str, known))}",
                do="check that the table is of this model; where it counts only layers with routers, from 0, say "
                "--layer-numbers rows",
            )
        if not 0 <= expert < fingerprint.experts:
            raise DataError(
                f"the model has no expert {expert}",
                where=cells.where(used["expert"], row),
                expected=f"experts 0 to {fingerprint.experts - 1}",
                do="check that the table is of this model, and that it counts experts from 0",
            )
        place = (row_of[layer], expert)
        if place in seen:
            raise DataError(
                f"layer {layer}, expert {expert} occurs twice",
                where=f"{cells.path}, {cells.places[seen[place]]} and {cells.places[row]}",
                expected="one row for each expert of a layer",
                do="keep one of the rows; a table of several contrasts has to be split first",
            )
        seen[place] = row
    return list(seen)


# ---------------------------------------------------------------- counts and statistics


def _counts(
    cells: Cells, used: dict[str, str], places: list[tuple[int, int]], fingerprint: Fingerprint
) -> NDArray[np.float64]:
    """[4, rows], in the order of COUNTS; whole numbers that a router can have given."""
    counts = np.array([[cells.integer(used[name], row) for row in range(len(places))] for name in COUNTS], dtype=float)
    for side in (0, 1):
        selected, tokens = counts[side], counts[side + 2]
        for wrong, what in (
            (tokens < 1, "{1:.0f} tokens on one side"),
            (selected < 0, "a count of {0:.0f}"),
            (selected > tokens, "selected for {0:.0f} of {1:.0f} tokens"),
        ):
            if wrong.any():
                row = int(wrong.argmax())
                raise DataError(
                    what.format(selected[row], tokens[row]),
                    where=cells.where(used[COUNTS[side]], row),
                    expected="at least one token, and between none and all of them with the expert in their top-k",
                    do="check which column holds what (--columns)",
                )
        layers = np.array([layer for layer, _ in places])
        for layer in range(len(fingerprint.layer_ids)):
            in_layer = layers == layer
            if in_layer.any() and selected[in_layer].sum() > fingerprint.top_k * tokens[in_layer].max():
                raise DataError(
                    f"{selected[in_layer].sum():.0f} selections for {tokens[in_layer].max():.0f} tokens",
                    where=f"{cells.path}, layer {fingerprint.layer_ids[layer]}, column {used[COUNTS[side]]!r}",
                    expected=f"at most {fingerprint.top_k} for each token, as the model selects",
                    do="check that the table is of this model, and which column holds what (--columns)",
                )
    return counts


def _plain_log_odds(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log odds ratio with nothing added to the counts: it may be infinite, or nan."""
    wanted, other, of_wanted, of_other = counts
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(wanted) - np.log(of_wanted - wanted) - np.log(other) + np.log(of_other - other))


def _check_stated(cells: Cells, used: dict[str, str], counts: NDArray[np.float64], statistic: str) -> None:
    """Raise DataError where a statistic of the table's own is not what its counts give."""
    for name in ("risk_difference", "log_odds", "score"):
        if name not in used:
            continue
        meant = statistic if name == "score" else name
        if meant == "risk_difference":
            candidates = [risk_difference(*counts)]
        else:  # there are two customs
            candidates = [_plain_log_odds(counts), log_odds(*counts)]
        stated = np.array([_stated(cells, used[name], row, meant) for row in range(counts.shape[1])])
        wrong = [~_agree(stated, made) for made in candidates]
        if not all(bad.any() for bad in wrong):
            continue
        bad, made = min(zip(wrong, candidates, strict=True), key=lambda pair: int(pair[0].sum()))
        row = int(bad.argmax())
        turned = any(_agree(stated, -made).all() for made in candidates)
        raise DataError(
            f"the table says {stated[row]:.9g}, its counts give {made[row]:.9g}",
            where=f"{cells.where(used[name], row)}, taken for {meant}",
            expected="statistics that follow from the counts of the same row",
            do="the table counts from the other side: swap the columns of the wanted and the other side (--columns)"
            if turned
            else f"find out which is right; to leave a rounded or another statistic unread: --columns {name}=",
        )


def _stated(cells: Cells, column: str, row: int, meant: str) -> float:
    """A number; log odds may also be infinite, or empty where they are not defined."""
    cell = cells.columns[column][row]
    if meant == "log_odds":
        text = "nan" if cell is None else str(cell).strip().lower()
        special = {"": math.nan, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}
        if text in special:
            return special[text]
    return cells.number(column, row)


def _agree(stated: NDArray[np.float64], made: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.isclose(stated, made, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)


# ---------------------------------------------------------------- selection


def _check_settings(*, on: int, off: int, form: Form, toward: str) -> None:
    if form not in get_args(Form):
        raise UnknownNameError(f"no form {form!r}", where="form", expected=", ".join(get_args(Form)), do="give one")
    if min(on, off) < 0 or on + off == 0:
        raise InputError(
            f"{on} experts to switch on and {off} to switch off",
            where="import",
            expected="zero or more of each, and one at least",
            do="give --on, --off or both",
        )
    if not toward.strip():
        raise InputError(
            "the mask is toward nothing",
            where="toward",
            expected="the behaviour it should bring about, such as refuse",
            do="give --toward LABEL",
        )


def _none_on(on: int, fingerprint: Fingerprint) -> InputError:
    return InputError(
        f"{on} experts are to be switched on in top-1 routers",
        where=f"import for a {fingerprint.model_type} ({fingerprint.scoring})",
        expected="none switched on: a top-1 router has one place, and every token would take this expert in it",
        do="switch others off (--off), or import --form additive, which leaves the choice to the token",
    )


def _check_found(chosen_LE: NDArray[Any], *, on: int, off: int, where: str) -> None:
    """Raise DataError where the table has fewer experts than were asked for, within what a layer can take."""
    for name, asked, found in (("on", on, int((chosen_LE > 0).sum())), ("off", off, int((chosen_LE < 0).sum()))):
        if found < asked:
            sign = "positive" if name == "on" else "negative"
            raise DataError(
                f"{asked} experts are to be switched {name}, and the table has {found} that can be",
                where=where,
                expected=f"as many experts with a {sign} score, within what a layer can take",
                do=f"give --{name} {found}" + (", or --reverse if the table's sides are the other way round"),
            )


def _usable_sigma(
    sigma_L: NDArray[np.float32] | None, chosen_LE: NDArray[np.float64], fingerprint: Fingerprint
) -> NDArray[np.float32]:
    sigma = None if sigma_L is None else np.asarray(sigma_L, dtype=np.float32)
    if sigma is None or sigma.shape != chosen_LE.shape[:1] or (sigma[(chosen_LE != 0).any(axis=1)] == 0).any():
        what = "is not given" if sigma is None else f"is {np.array2string(sigma, precision=3, threshold=8)}"
        raise InputError(
            f"an additive mask is in units of sigma, and sigma {what}",
            where=f"{fingerprint.model_type}, {len(fingerprint.layer_ids)} layers",
            expected="a standard deviation of the router logits above 0 for every layer with an entry",
            do="take it from an additive mask or a trace of the model (--fingerprint-of), or import --form forced",
        )
    return sigma

"""Several runs of one scenario and one model that differ in their seed, taken together.

The same conversations are played under every seed, so S seeds of n items are not S n items. Two things may come out
otherwise another time: the behaviours (groups) that are asked about, and the seeds that detection and controls draw
with. Both are resampled whole and crossed: a bootstrap draw is G - 1 of the G groups and S - 1 of the S seeds, with
replacement, and every reply in a drawn group under a drawn seed (one fewer than there are, since drawing as many
gives a variance that is (k - 1)/k of the right one; one alone is taken as it is). By simulation with 3 seeds and 40
groups a 95 % interval holds the truth in 93 to 98 % of cases where seeds differ by no more than items do, in 89 %
where they differ as much as groups do, and in 84 % where nearly everything depends on the seed: three seeds cannot say
more, so their smallest and largest stand beside. (A plain Wilson interval of the stacked replies: 27 to 80 %.)

Three tests, three questions. For one seed: exact McNemar and an interval over groups (stats.paired_difference). For
all seeds: an exact sign-flip test of each group's net gain over all its items and seeds (stats.sign_flip), of
whether these masks change something on behaviours like these; McNemar on the stacked seeds would count each item S
times. Then Holm's correction: a family is one metric, with every method and control compared to `none` on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moesteer.errors import DataError
from moesteer.evaluate import run as evaluation
from moesteer.evaluate import stats
from moesteer.scenario import Scenario, as_json

Rows = Sequence[Mapping[str, Any]]
Cells = tuple[np.ndarray, np.ndarray]
Values = Mapping[int, Sequence[tuple[str, str, float]]]
"""By seed, (group, conversation, value) of every scored reply or pair."""

UNSTEERED = ("none", "none-again")
"""The model as it is, and once more; the second is a check of the platform and no hypothesis."""


def pool(
    scenario: Scenario,
    results: Sequence[Mapping[str, Any]],
    rows: Mapping[int, Mapping[str, Rows]],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> dict[str, Any]:
    """Results of several seeds as one JSON-plain object; the module's docstring says how.

    results: results.json of each run. rows: by seed and method, the lines of responses/METHOD.jsonl of the test split.
    seed: of the bootstrap. A method that some seeds lack is pooled over those that have it (its `seeds`).
    Raises DataError for runs that do not belong together.
    """
    by_seed = _matched(scenario, results, rows)
    names = list(dict.fromkeys(name for found in by_seed.values() for name in found["methods"]))
    none = {s: rows[s]["none"] for s in by_seed}
    methods: dict[str, dict[str, Any]] = {}
    for name in names:
        mine = {s: rows[s][name] for s in by_seed if name in by_seed[s]["methods"]}
        methods[name] = {
            "seeds": list(mine),
            "metrics": _metrics(scenario, mine, seed=seed, draws=draws),
            "vs_none": {} if name == "none" else _against_none(scenario, none, mine, seed=seed, draws=draws),
            "incoherent": _count(mine, "broken"),
            "unscored": _count(mine, "unscored"),
            **{key: {str(s): by_seed[s]["methods"][name].get(key) for s in mine} for key in _CARRIED},
            "tried": {str(s): _tried(by_seed[s], name) for s in mine},
            "gate": {str(s): gate for s in mine if (gate := _gate(by_seed[s], name)) is not None},
            "surrogate": {str(s): facts for s in mine if (facts := _surrogate(by_seed[s], name)) is not None},
            "margins": {str(s): _margins(by_seed[s]["methods"][name]) for s in mine},
            "like": {str(s): like for s in mine if (like := _like(by_seed[s]["methods"][name])) is not None},
        }
    _adjust(methods)
    first = next(iter(by_seed.values()))
    return {
        "schema": 1,
        "scenario": as_json(scenario),
        "metrics": metric_roles(scenario),
        "model": dict(first["model"]),
        "seeds": list(by_seed),
        "methods": methods,
        "null": _null(none, rows),
        "recommended": {str(s): found.get("recommended") for s, found in by_seed.items()},
        "seconds": {str(s): dict(found.get("seconds", {})) for s, found in by_seed.items()},
        "versions": {str(s): dict(found.get("versions", {})) for s, found in by_seed.items()},
        "bootstrap": {"seed": seed, "draws": draws},
    }


_CARRIED = ("alpha", "experts", "setting", "feasible", "seconds")
"""What a method's entry in results.json says of one seed, kept by seed."""


_LIKE = "like "
"""A control's setting is this and the method whose mask it is made from, which may be another under every seed."""


_SURROGATE = ("held_out", "held_out_accuracy", "train_accuracy", "keep_accuracy")


def _gate(result: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A method's gate with how often it fired on test (`fired` of `gated` requests); None for one without."""
    gate = result["methods"][name].get("gate")
    if gate is None:
        return None
    receipt = result.get("receipts", {}).get(name) or {}
    return {**gate, **{key: receipt[key] for key in ("fired", "gated") if key in receipt}}


def _surrogate(result: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What a method's detection says of its surrogates (those of its first variant); None where it has none."""
    facts = result.get("facts", {}).get(name)
    first = facts[0] if isinstance(facts, list) and facts else {}
    wanted = (*(f"surrogate_{key}" for key in _SURROGATE), "length_only_accuracy", "bag_of_words_accuracy",
              "majority_accuracy", "warning")  # fmt: skip
    return {key: first[key] for key in wanted if key in first} if "surrogate_held_out" in first else None


def _margins(entry: Mapping[str, Any]) -> dict[str, str]:
    """By protected suite, how the chosen setting's margin was kept on select (evaluate/margins.py)."""
    return {suite: str(found["status"]) for suite, found in (entry.get("margins") or {}).items()}


def _tried(result: Mapping[str, Any], name: str) -> int:
    """How many candidates of a method were scored on select; 0 for the model as it is and for controls."""
    if name in UNSTEERED:
        return 0
    return sum(point["method"] == name for point in result.get("trade_off", ()))


def _like(entry: Mapping[str, Any]) -> str | None:
    """The method that a control's mask is made from; None for what is no control."""
    setting = str(entry.get("setting") or "")
    return setting.removeprefix(_LIKE) if setting.startswith(_LIKE) else None


def metric_roles(scenario: Scenario) -> dict[str, str]:
    """Every metric of the scenario with its role, in the order of tables: target, protect, watch, coherence.

    All metrics of a protected suite are protected, not only the one that the margin is for. A metric that several
    suites share has the first of their roles.
    """
    found: dict[str, str] = {}
    for role in ("target", "protect", "watch"):
        for suite in scenario.suites:
            if suite.role == role:
                for name in suite.metrics:
                    found.setdefault(name, role)
    return {**found, "coherence": "coherence"}


def _matched(
    scenario: Scenario, results: Sequence[Mapping[str, Any]], rows: Mapping[int, Mapping[str, Rows]]
) -> dict[int, Mapping[str, Any]]:
    """Results by seed, ascending. Raises DataError where they are not runs of one scenario and model."""
    by_seed = {int(found["seed"]): found for found in sorted(results, key=lambda found: int(found["seed"]))}
    wrong = ""
    if not results:
        wrong = "no results to pool"
    elif len(by_seed) < len(results):
        wrong = "two results have the same seed"
    elif any(found["scenario"]["name"] != scenario.name for found in results):
        wrong = "the results are of other scenarios: " + ", ".join(sorted({f["scenario"]["name"] for f in results}))
    elif len({(found["model"]["name"], found["model"]["router_sha256"]) for found in results}) > 1:
        wrong = "the results are of different models"
    for s, found in by_seed.items():
        lacking = [name for name in {"none": None, **found["methods"]} if name not in rows.get(s, {})]
        if lacking and not wrong:
            wrong = f"seed {s} has no responses of {', '.join(lacking)}"
        others = [n for n in found["methods"] if not lacking and _groups(rows[s][n]) != _groups(rows[s]["none"])]
        if others and not wrong:
            wrong = f"seed {s}: {', '.join(others)} answered other conversations than none"
    if wrong:
        raise DataError(
            wrong,
            where=f"pooling scenario {scenario.name}",
            expected="results and responses of one scenario and one model, each with its own seed",
            do="run `moesteer steer` once per seed with the same model and scenario, each into its own folder",
        )
    return by_seed


def _groups(rows: Rows) -> dict[str, str]:
    return {row["id"]: str(row["group"]) for row in rows}


def _cells(found: Values) -> Cells:
    """Sums and counts of values by seed and group, [S, G] each."""
    places = {name: g for g, name in enumerate(sorted({group for values in found.values() for group, _, _ in values}))}
    sums_SG = np.zeros((len(found), len(places)))
    counts_SG = np.zeros_like(sums_SG)
    for s, values in enumerate(found.values()):
        for group, _, value in values:
            sums_SG[s, places[group]] += value
            counts_SG[s, places[group]] += 1
    return sums_SG, counts_SG


def _bootstrap(cells: Cells, *, seed: int, draws: int) -> np.ndarray:
    """Means of the drawn groups and seeds; draws that hold no item are left out."""
    sums_SG, counts_SG = cells
    rng = np.random.default_rng(seed)
    often = []
    for size in sums_SG.shape:
        often.append(rng.multinomial(max(1, size - 1), np.full(size, 1 / size), size=draws).astype(float))
    weight_DS, weight_DG = often
    totals = ((weight_DS @ sums_SG) * weight_DG).sum(axis=1)
    numbers = ((weight_DS @ counts_SG) * weight_DG).sum(axis=1)
    kept = numbers > 0
    return np.asarray(totals[kept] / numbers[kept])


def _metrics(scenario: Scenario, mine: Mapping[int, Rows], *, seed: int, draws: int) -> dict[str, dict[str, Any]]:
    """Every metric's rate by seed and pooled."""
    outcomes = {s: evaluation.outcomes(scenario, rows) for s, rows in mine.items()}
    groups = {s: _groups(rows) for s, rows in mine.items()}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for by_metric in outcomes.values() for name in by_metric):
        by_seed = {s: outcomes[s].get(name, {}) for s in mine}
        values = {
            s: [(groups[s][i], i, float(value)) for i, value in items.items() if value is not None]
            for s, items in by_seed.items()
        }
        found[name] = {
            **rate_over_seeds(values, seed=seed, draws=draws),
            "unscored": sum(value is None for of_seed in by_seed.values() for value in of_seed.values()),
            "by_seed": {str(s): stats.rate(list(of_seed.values())).as_json() for s, of_seed in by_seed.items()},
        }
        found[name] |= _spread([entry["value"] for entry in found[name]["by_seed"].values()])
    return found


def rate_over_seeds(values: Values, *, seed: int, draws: int) -> dict[str, Any]:
    """The share over all seeds of values 0 and 1, with its 95 % interval.

    The interval is Wilson's for as many items as the replies are worth (`effective_n`): that which gives the
    bootstrap's variance, and at most the number of conversations over the design effect of their groups (stats), since
    near 0 and 1 the bootstrap sees too little variance, and at 0 or 1 none.
    """
    by_item: dict[tuple[str, str], list[float]] = {}
    for of_seed in values.values():
        for group, item, value in of_seed:
            by_item.setdefault((group, item), []).append(value)
    n = sum(map(len, by_item.values()))
    counts = {"n": n, "items": len(by_item), "groups": len({group for group, _ in by_item})}
    if not n:
        return {"value": None, "low": None, "high": None, **counts, "effective_n": 0.0}
    share = sum(map(sum, by_item.values())) / n
    means = [sum(found) / len(found) for found in by_item.values()]
    worth = len(by_item) / stats.design_effect(means, [group for group, _ in by_item])
    variance = float(_bootstrap(_cells(values), seed=seed, draws=draws).var())
    if variance > 0:
        worth = min(worth, share * (1 - share) / variance)
    low, high = stats.wilson(share, worth)
    return {"value": share, "low": low, "high": high, **counts, "effective_n": worth}


def _against_none(
    scenario: Scenario, none: Mapping[int, Rows], mine: Mapping[int, Rows], *, seed: int, draws: int
) -> dict[str, dict[str, Any]]:
    """Every metric's paired difference to the unsteered model by seed and pooled, not yet adjusted."""
    single = {s: evaluation.against_none(scenario, none[s], rows, seed=s) for s, rows in mine.items()}
    before = {s: evaluation.outcomes(scenario, none[s]) for s in mine}
    after = {s: evaluation.outcomes(scenario, rows) for s, rows in mine.items()}
    groups = {s: _groups(none[s]) for s in mine}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for by_metric in after.values() for name in by_metric):
        values: dict[int, list[tuple[str, str, float]]] = {}
        for s in mine:
            pairs = [(i, before[s][name][i], a) for i, a in after[s].get(name, {}).items()]
            values[s] = [(groups[s][i], i, float(a) - float(b)) for i, b, a in pairs if a is not None and b is not None]
        by_seed = {str(s): single[s][name] for s in mine if name in single[s]}
        found[name] = {**difference_over_seeds(values, seed=seed, draws=draws), "by_seed": by_seed}
        found[name] |= _spread([entry["difference"] for entry in by_seed.values()])
    return found


def difference_over_seeds(values: Values, *, seed: int, draws: int) -> dict[str, Any]:
    """The mean over all seeds of values after - before, with its 95 % interval and p.

    The interval is the bootstrap's; p is the exact sign-flip test of the groups' totals (stats.sign_flip).
    """
    cells = _cells(values)
    sums_SG, counts_SG = cells
    n = int(counts_SG.sum())
    if not n:
        return {"difference": None, "low": None, "high": None, "n": 0, "p": None}
    means = _bootstrap(cells, seed=seed, draws=draws)
    low, high = np.quantile(means, [(1 - stats.CONFIDENCE) / 2, (1 + stats.CONFIDENCE) / 2])
    return {
        "difference": float(sums_SG.sum() / n),
        "low": float(low),
        "high": float(high),
        "n": n,
        "p": stats.sign_flip([round(total) for total in sums_SG.sum(axis=0).tolist()]),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """The smallest and the largest over the seeds."""
    known = [value for value in values if value is not None]
    return {"min": min(known, default=None), "max": max(known, default=None)}


def _adjust(methods: Mapping[str, dict[str, Any]]) -> None:
    """Write Holm's p into every comparison: one family per metric, of every method and control but the null."""
    compared = {name: entry["vs_none"] for name, entry in methods.items() if name != "none"}
    for metric in dict.fromkeys(metric for entries in compared.values() for metric in entries):
        family = {
            name: entries[metric]["p"]
            for name, entries in compared.items()
            if metric in entries and name not in UNSTEERED
        }
        adjusted = stats.holm(family)
        for name, entries in compared.items():
            if metric in entries:
                entries[metric]["p_holm"] = adjusted.get(name)


def _count(mine: Mapping[int, Rows], verdict: str) -> dict[str, Any]:
    """How many replies have a verdict, of how many, over all suites."""
    by_seed = {str(s): sum(row["verdict"] == verdict for row in rows) for s, rows in mine.items()}
    return {"count": sum(by_seed.values()), "n": sum(len(rows) for rows in mine.values()), "by_seed": by_seed}


def _null(none: Mapping[int, Rows], rows: Mapping[int, Mapping[str, Rows]]) -> dict[str, Any] | None:
    """Unsteered against unsteered: replies that differ when nothing was changed; None where it was not played."""
    again = {s: rows[s][UNSTEERED[1]] for s in none if UNSTEERED[1] in rows[s]}
    if not again:
        return None
    by_seed: dict[str, int] = {}
    for s, found in again.items():
        said = {row["id"]: row["response"] for row in found}
        by_seed[str(s)] = sum(row["response"] != said.get(row["id"]) for row in none[s])
    return {"differ": sum(by_seed.values()), "n": sum(len(none[s]) for s in again), "by_seed": by_seed}

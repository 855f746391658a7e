"""The quality table: pooled results of one or more scenarios as one JSON-plain object, and as Markdown.

Everything in it comes from the pooled results, without a date, so the same runs give the same bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moesteer.evaluate.cells import MINUS, NOTHING, each, grid, number, signed, text
from moesteer.evaluate.metrics import metric
from moesteer.evaluate.quality_beside import gates, margins, surrogates

CONTROLS = ("alpha-0", "random", "sign-flipped", "shuffled-layers")
PUBLISHED = ("risk-difference", "log-odds", "paired-t", "masc-published")
OURS = ("masc", "attribution", "causal", "direct")
ORDER = ("none", "none-again", *CONTROLS, *PUBLISHED, *OURS)
"""Rows of the table; methods it does not name follow, then everything with a gate."""

SHORT = {
    "defense_success_rate": "DSR", "generation_success_rate": "GSR", "faithfulness": "Faith",
    "direct_refusal_rate": "DRR", "over_refusal_rate": "ORR", "benign_accuracy": "Benign",
    "attack_success_rate": "ASR", "restricted_refusal_rate": "RRR", "recall_rate": "Recall",
    "knowledge_accuracy": "Know", "arithmetic_accuracy": "Arith", "instruction_accuracy": "Instr", "accuracy": "Acc",
}  # fmt: skip
SIGNIFICANT = 0.05
DAGGER = "\N{DAGGER}"


def method_order(names: Sequence[str]) -> list[str]:
    """none, none-again, controls, published methods, ours, others by name; variants with a gate last, likewise."""

    def place(name: str) -> tuple[bool, int, str]:
        base, gate, _ = name.partition("+")
        return (bool(gate), ORDER.index(base) if base in ORDER else len(ORDER), name)

    return sorted(names, key=place)


def quality_table(pooled: Sequence[Mapping[str, Any]], *, command: str) -> dict[str, Any]:
    """One JSON-plain object of the pooled results (evaluate/pooled.py) of several scenarios, in their order.

    command: what to type to make the runs again.
    """
    return {
        "schema": 1,
        "command": command,
        "versions": _versions(pooled),
        "seconds": round(sum(_whole_seconds(one) for one in pooled), 2),
        "scenarios": [_scenario(one) for one in pooled],
    }


def _scenario(pooled: Mapping[str, Any]) -> dict[str, Any]:
    margins: dict[str, float] = {}
    for protect in pooled["scenario"]["protect"]:
        name = protect["metric"]
        margins[name] = min(protect["margin"], margins.get(name, protect["margin"]))
    columns = [
        {
            "metric": name,
            "short": SHORT.get(name, name),
            "title": metric(name).title,
            "role": role,
            "lower_is_better": metric(name).lower_is_better,
            "margin": margins.get(name),
        }
        for name, role in pooled["metrics"].items()
        if role != "coherence"
    ]
    target = pooled["scenario"]["target_metric"]
    return {
        "name": pooled["scenario"]["name"],
        "title": pooled["scenario"]["title"],
        "model": pooled["model"],
        "seeds": pooled["seeds"],
        "target_metric": target,
        "columns": columns,
        "rows": [_row(name, pooled["methods"][name], target) for name in method_order(list(pooled["methods"]))],
        "null": pooled["null"],
        "recommended": pooled["recommended"],
        "seconds": round(_whole_seconds(pooled), 2),
    }


def _row(name: str, entry: Mapping[str, Any], target: str) -> dict[str, Any]:
    detect = [found["detect"] for found in entry["seconds"].values() if found and found.get("detect")]
    experts = [found for found in entry["experts"].values() if found is not None]
    against = {metric_name: dict(found) for metric_name, found in entry["vs_none"].items()}
    return {
        "method": name,
        "seeds": entry["seeds"],
        "metrics": {metric_name: dict(found) for metric_name, found in entry["metrics"].items()},
        "difference": against.get(target),
        "vs_none": against,
        "incoherent": dict(entry["incoherent"]),
        "unscored": dict(entry["unscored"]),
        "detect_seconds": round(statistics.fmean(detect), 2) if detect else None,
        "experts": {"min": min(experts), "max": max(experts)} if experts else None,
        "settings": dict(entry["setting"]),
        "feasible": dict(entry["feasible"]),
        "like": sorted(set(entry["like"].values())),
        "tried": dict(entry["tried"]),
        **{key: dict(entry[key]) for key in ("gate", "surrogate", "margins")},
    }


def _whole_seconds(pooled: Mapping[str, Any]) -> float:
    """All steps of all seeds. Steps that are parts of another ("evaluate NAME" of "evaluate on ...") count once."""
    total = 0.0
    for steps in pooled["seconds"].values():
        inside = any(name.startswith(_EVALUATION) for name in steps)
        total += sum(
            value
            for name, value in steps.items()
            if not (inside and name.startswith("evaluate ") and not name.startswith(_EVALUATION))
        )
    return total


_EVALUATION = "evaluate on "


def _versions(pooled: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Versions by package; several of one package stand beside each other."""
    found: dict[str, set[str]] = {}
    for one in pooled:
        for versions in one["versions"].values():
            for name, version in versions.items():
                found.setdefault(name, set()).add(str(version))
    return {name: " and ".join(sorted(versions)) for name, versions in sorted(found.items())}


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown for GitHub: one section per scenario, a legend, and how it was made."""
    parts: list[str] = []
    for scenario in table["scenarios"]:
        parts += _section(scenario)
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    parts += [
        "### How to read it",
        "\n".join(f"- {line}" for line in _legend(table)),
        "### How it was made",
        f"```\n{table['command']}\n```",
        f"Time taken: {_duration(table['seconds'])}. Versions: {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def _section(scenario: Mapping[str, Any]) -> list[str]:
    model, seeds = scenario["model"], scenario["seeds"]
    size = f", {model['parameters'] / 1e6:.1f}M parameters" if model.get("parameters") else ""
    which = "seeds " + ", ".join(map(str, seeds)) if len(seeds) > 1 else f"seed {seeds[0]}"
    sizes = ", ".join(f"{column['short']} {_sizes(scenario, column['metric'])}" for column in scenario["columns"])
    return [
        f"### {text(scenario['title'])}",
        f"Model {text(_model_name(model['name']))} ({text(model['model_type'])}{size}), {which}, test split. "
        f"Conversations (behaviours): {sizes}.",
        _main(scenario),
        _null(scenario),
        "<details><summary>By seed (one value where all seeds give the same)</summary>",
        _by_seed(scenario),
        "</details>",
        *margins(scenario["rows"]),
        *gates(scenario["rows"]),
        *surrogates(scenario["rows"]),
    ]


def _model_name(name: str) -> str:
    """The name without the folder it lies in here; a hub name keeps its owner."""
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else name


def _sizes(scenario: Mapping[str, Any], name: str) -> str:
    found = next((row["metrics"][name] for row in scenario["rows"] if name in row["metrics"]), None)
    return NOTHING if found is None else f"{found['items']} ({found['groups']})"


def _main(scenario: Mapping[str, Any]) -> str:
    first, *others = scenario["columns"]
    heads = ["Method", _head(first), "Change", "p (Holm)"]
    heads += [_head(column) for column in others] + ["Incoh.", "Unsc.", "Detect", "Experts"]
    lines = []
    for row in scenario["rows"]:
        difference = row["difference"]
        cells = [
            _name(row),
            _rate(row["metrics"].get(first["metric"])),
            _change(difference),
            _p(difference),
            *(_rate(row["metrics"].get(column["metric"])) + _mark(row, column) for column in others),
            _share(row["incoherent"]),
            str(row["unscored"]["count"]),
            NOTHING if row["detect_seconds"] is None else f"{row['detect_seconds']:.1f} s",
            _range(row["experts"]),
        ]
        lines.append(cells)
    return grid(heads, lines)


def _by_seed(scenario: Mapping[str, Any]) -> str:
    columns, target = scenario["columns"], scenario["target_metric"]
    heads = ["Method", "Seeds", *(column["short"] for column in columns), "Change", "p (McNemar)"]
    heads += ["Tried", "Setting"]
    lines = []
    for row in scenario["rows"]:
        keys = [str(seed) for seed in row["seeds"]]
        against = row["vs_none"].get(target, {}).get("by_seed", {})
        rates = [row["metrics"].get(column["metric"], {}).get("by_seed", {}) for column in columns]
        lines.append(
            [
                _name(row),
                ", ".join(keys),
                *(each([number(found.get(key, {}).get("value")) for key in keys]) for found in rates),
                each([signed(against[key]["difference"]) for key in keys if key in against]),
                each([_p_text(against[key]["p"]) for key in keys if key in against]),
                each([str(row["tried"].get(key) or NOTHING) for key in keys]),
                each([_setting(row, key) for key in keys]),
            ]
        )
    return grid(heads, lines)


def _broken(row: Mapping[str, Any]) -> list[str]:
    """Seeds under which no setting of the method kept every margin on select."""
    return [seed for seed, feasible in row["feasible"].items() if feasible is False]


def _name(row: Mapping[str, Any]) -> str:
    """`direct †`; a control that is not of one method under all seeds names them all: `random (like direct, masc)`."""
    name = text(row["method"])
    if len(row["like"]) > 1:
        name += f" (like {text(', '.join(row['like']))})"
    return f"{name} {DAGGER}" if _broken(row) else name


def _setting(row: Mapping[str, Any], seed: str) -> str:
    """What was chosen under a seed, without the method's name before it."""
    setting = str(row["settings"].get(seed) or "").removeprefix(row["method"]).strip()
    return NOTHING if not setting else text(setting) + (f" {DAGGER}" if row["feasible"].get(seed) is False else "")


def _null(scenario: Mapping[str, Any]) -> str:
    null = scenario["null"]
    if null is None:
        return "Unsteered against unsteered: not played."
    again = next((row["difference"] for row in scenario["rows"] if row["method"] == "none-again"), None)
    change = f"; change of the target {_change(again)}" if again else ""
    return f"Unsteered against unsteered: {null['differ']} of {null['n']} replies differ{change}."


def _legend(table: Mapping[str, Any]) -> list[str]:
    columns = {column["short"]: column for scenario in table["scenarios"] for column in scenario["columns"]}
    names = [
        f"**{text(short)}**: {column['title']}{' (lower is better)' if column['lower_is_better'] else ''}"
        for short, column in columns.items()
    ]
    return [
        *names,
        "Rates are in per cent with their 95 % interval, over all seeds; behaviours and seeds are what could have been "
        "others. The first column of numbers is what steering is to change; an arrow says where better is.",
        "**Change**: points against `none` on the same conversations, with its 95 % interval. **p (Holm)**: exact "
        "sign-flip test by behaviour, corrected for the number of methods and controls in the table.",
        f"**\\***: changed for the worse against `none`, p (Holm) below {SIGNIFICANT:g} in that column.",
        *_dagger(table),
        "**Incoh.**: replies that are empty, repeat themselves or are not text; no metric counts them as a success. "
        "**Unsc.**: replies that no judge could score. **Detect**: mean time of detection. "
        "**Experts**: how many the mask touches. **Tried**: candidates scored on select. "
        "**Setting**: the one that was chosen; of a control, the method whose mask it is made from.",
        "`none-again` is the unsteered model once more; `random` and the other controls are masks that should do "
        "nothing in particular.",
    ]


def _dagger(table: Mapping[str, Any]) -> list[str]:
    """The line about methods without a feasible setting, of every scenario that has one."""
    found: list[str] = []
    for scenario in table["scenarios"]:
        broken = {row["method"]: _broken(row) for row in scenario["rows"]}
        said = [f"{text(name)} (seeds {', '.join(seeds)})" for name, seeds in broken.items() if seeds]
        if said:
            where = f" in {text(scenario['title'])}" if len(table["scenarios"]) > 1 else ""
            found.append(", ".join(said) + where)
    if not found:
        return []
    return [
        f"**{DAGGER}**: no setting was shown to keep every margin on select (or lost nothing where a suite is too "
        "small); the one that breaks its margins least stands here: "
        + "; ".join(found) + "."
    ]  # fmt: skip


def _head(column: Mapping[str, Any]) -> str:
    arrow = "\N{DOWNWARDS ARROW}" if column["lower_is_better"] else "\N{UPWARDS ARROW}"
    return f"{text(column['short'])} {arrow}"


def _rate(found: Mapping[str, Any] | None) -> str:
    """`96.9 [94, 98]`."""
    if found is None or found["value"] is None:
        return NOTHING
    return f"{number(found['value'])} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _change(found: Mapping[str, Any] | None) -> str:
    """`+46.7 [+38, +55]`."""
    if found is None or found["difference"] is None:
        return NOTHING
    ends = [f"{round(100 * found[end]) + 0:+d}".replace("-", MINUS).replace("+0", "0") for end in ("low", "high")]
    return f"{signed(found['difference'])} [{ends[0]}, {ends[1]}]"


def _p(found: Mapping[str, Any] | None) -> str:
    return NOTHING if found is None else _p_text(found.get("p_holm"))


def _p_text(p: float | None) -> str:
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _mark(row: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    found = row["vs_none"].get(column["metric"])
    if found is None or found.get("p_holm") is None or found["difference"] is None:
        return ""
    worse = (found["difference"] > 0) == column["lower_is_better"]
    return " \\*" if worse and found["difference"] and found["p_holm"] < SIGNIFICANT else ""


def _share(found: Mapping[str, Any]) -> str:
    """`1.2 %` of the replies, `0` for none."""
    return f"{100 * found['count'] / found['n']:.1f} %" if found["count"] else "0"


def _range(found: Mapping[str, int] | None) -> str:
    if found is None or not found["max"]:
        return NOTHING
    return str(found["min"]) if found["min"] == found["max"] else f"{found['min']}\N{EN DASH}{found['max']}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

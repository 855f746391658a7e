"""The card of a published mask: README.md with front matter that the Hub reads, built from a run's evidence.

Names, titles and settings come from files, so they are inert here: Markdown and HTML do nothing with them, and a
path is cut down to its last part. No conversation is in a card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesteer import hub
from moesteer.errors import InputError, MoesteerError
from moesteer.evaluate import cells
from moesteer.evaluate.margins import needed_items
from moesteer.evaluate.metrics import METRICS
from moesteer.evidence import DIRECT, SAFETY, Evidence, JudgeModel, Suite, beyond_margin
from moesteer.mask import SteeringMask
from moesteer.report.markdown import inert
from moesteer.report.run_files import Difference, Interval
from moesteer.version import __version__

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}", re.ASCII)
LAB = ("lab-tiny", "lab-smol")
WARNING = (
    "**A mask can remove safety behaviour as well as add it.** It changes which experts a model chooses, and with them "
    "what the model refuses. This one was evaluated as stated below and no further: on other requests, languages, "
    "system prompts, sampling settings, strengths, quantisations or fine-tunes of the model it may do less, nothing, "
    "or harm. Evaluate it on your own data, refusals included, before you serve it."
)


def card(mask: SteeringMask, evidence: Evidence, *, repo: str, licence: str) -> str:
    """The text of README.md. repo: ORG/NAME; licence: of the mask, an identifier of the Hub. Raises InputError."""
    if not LICENCE.fullmatch(licence):
        raise InputError(
            f"{licence!r} is not a licence identifier"[:120],
            where="--license",
            expected="an identifier of the Hub's list, such as apache-2.0, mit, cc-by-4.0 or other",
            do="see huggingface.co/docs/hub/repositories-licenses",
        )
    parts = (
        _front_matter(mask, evidence, licence=licence),
        f"# {inert(repo)}: a steering mask",
        f"A mask for the routers of {_model(evidence.model)}, made towards {inert(mask.info.intent.toward)} "
        f"by the method {inert(mask.info.method)}. No weight is changed.",
        f"> {WARNING}",
        "## What it is",
        _facts(mask, evidence, licence=licence),
        "## Results on the test split",
        _results(evidence),
        _refusals(evidence),
        "## What this does not show",
        _limits(evidence),
        "## Data",
        _data(evidence),
        "## How to use it",
        _use(mask, evidence, repo=repo),
        "## How it was made",
        _settings(mask, evidence),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_id(model: str) -> str | None:
    """The model's id on the Hub, where its name can be one and is no folder here."""
    if Path(model).exists():
        return None
    try:
        repo, revision = hub.repository(model)
    except InputError:
        return None
    return repo if revision is None else None


def _model(name: str) -> str:
    """A model in words: its Hub id, or the last part of a folder's path."""
    return inert(hub_id(name) or _last_part(name) or "a local folder")


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _front_matter(mask: SteeringMask, evidence: Evidence, *, licence: str) -> str:
    """YAML of plain names only (each matches a pattern), as JSON strings, which YAML reads alike."""
    model = hub_id(evidence.model)
    tags = ["moesteer", "mixture-of-experts", "steering-mask", evidence.scenario, mask.info.method]
    lines = [
        "---",
        'library_name: "moesteer"',
        f"license: {json.dumps(licence)}",
        *([f"base_model: {json.dumps(model)}", 'base_model_relation: "adapter"'] if model else []),
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags) if re.fullmatch(r"[a-z0-9][a-z0-9.+_-]{0,63}", tag)),
        "---",
    ]
    return "\n".join(lines)


def _facts(mask: SteeringMask, evidence: Evidence, *, licence: str) -> str:
    info, fingerprint = mask.info, mask.info.fingerprint
    layers = fingerprint.layer_ids
    rows = [
        ("model", _model(evidence.model)),
        ("model type", inert(fingerprint.model_type)),
        ("routed layers", f"{len(layers)} (decoder layers {layers[0]} to {layers[-1]})" if layers else "none"),
        ("experts", f"{fingerprint.experts} a layer, {fingerprint.top_k} per token, {inert(fingerprint.scoring)}"),
        ("router weights", _digest(fingerprint.router_sha256)),
        *([("all weights (sketch)", _digest(evidence.weights))] if evidence.weights else []),
        *([("evaluated as", inert(evidence.loaded_as))] if evidence.loaded_as else []),
        ("intent", f"toward {inert(info.intent.toward)}" + _of(info.intent.scenario)),
        ("method", inert(info.method)),
        ("form", "forces experts on or off" if mask.forced else "adds to router logits, in units of sigma"),
        ("strength alpha", f"{info.alpha:g} (evaluated at this strength only)"),
        ("entries", f"{mask.expert_count} of {mask.values_LE.size}"),
        ("gate", _gate(mask)),
        ("mask sha256", _digest(mask.sha256)),
        ("licence of the mask", inert(licence)),
    ]
    return _words(("", "value"), rows)


def _of(scenario: str | None) -> str:
    return f" ({inert(scenario)})" if scenario else ""


def _digest(value: str) -> str:
    return f"`{value}`" if re.fullmatch(r"[0-9a-f]{8,128}", value) else inert(value)


def _gate(mask: SteeringMask) -> str:
    gate = mask.info.gate
    if gate is None:
        return "none: it acts on every request"
    shut, opened = gate.false_positive_rate.value, gate.true_positive_rate.value
    return (
        f"acts where a probe fires: on {cells.number(opened)} % of target requests, {cells.number(shut)} % of "
        f"protected ones (AUROC {gate.auroc:.3f}; measured on {inert(gate.measured_on)})"
    )


def _results(evidence: Evidence) -> str:
    """A row per metric, the target's and the refusals first; per cent with 95 % intervals."""
    none, entry = evidence.none, evidence.entry
    first = [evidence.target.metrics[0]] if evidence.target.metrics else []
    names = dict.fromkeys(name for name in (*first, *SAFETY, "over_refusal_rate", *entry.metrics))
    lines = [
        [
            f"{inert(name.replace('_', ' '))}{_better(name)}",
            _role(evidence, name),
            _rate(none.metrics.get(name)),
            _rate(entry.metrics[name]),
            _gap(entry.vs_none.get(name)),
            f"{entry.metrics[name].n}",
            f"{_unscored(none.metrics.get(name))} / {entry.metrics[name].unscored}",
        ]
        for name in names
        if name in entry.metrics
    ]
    heads = ("metric", "role", "without", "with the mask", "difference (points)", "n", "unscored without / with")
    table = cells.grid(heads, lines)
    said = "Per cent, with 95 % intervals; differences are paired, on the same conversations."
    return f"{said}\n\n{table}{_by_suite(evidence)}"


def _words(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of words: all columns to the left."""
    rows = (heads, ("---",) * len(heads), *lines)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _by_suite(evidence: Evidence) -> str:
    lines = [
        [
            inert(suite.name),
            inert(suite.role) + (f", margin {100 * suite.margin:g}" if suite.role == "protect" else ""),
            inert(evidence.entry.suites[suite.name].metric.replace("_", " ")),
            _rate(evidence.none.suites[suite.name]),
            _rate(evidence.entry.suites[suite.name]),
            f"{evidence.entry.suites[suite.name].n}",
            f"{evidence.entry.suites[suite.name].unscored}",
        ]
        for suite in evidence.suites
        if suite.name in evidence.entry.suites and suite.name in evidence.none.suites
    ]
    if not lines:
        return ""
    heads = ("suite", "role", "metric", "without", "with the mask", "n", "unscored")
    return f"\n\nEach suite on its own:\n\n{cells.grid(heads, lines)}{_broken(evidence)}"


def _broken(evidence: Evidence) -> str:
    """The protected suites that lose more than their margin: what a table of numbers does not shout."""
    lost = [
        f"{inert(suite.name)} loses {100 * loss:.1f} points, margin {100 * suite.margin:g}"
        for suite, loss in beyond_margin(evidence)
    ]
    return f"\n\n**Outside its margin on the test split**: {'; '.join(lost)}." if lost else ""


def _better(name: str) -> str:
    return " (lower is better)" if name in METRICS and METRICS[name].lower_is_better else ""


def _role(evidence: Evidence, metric: str) -> str:
    if metric in evidence.target.metrics[:1]:
        return "target"
    margins = [s.margin for s in evidence.suites if s.role == "protect" and metric in s.metrics[:1]]
    return f"protected, margin {100 * min(margins):g}" if margins else "watched"


def _rate(rate: Interval | None) -> str:
    if rate is None or rate.value is None or rate.low is None or rate.high is None:
        return cells.NOTHING
    return f"{cells.number(rate.value)} ({cells.number(rate.low)} to {cells.number(rate.high)})"


def _unscored(rate: Interval | None) -> str:
    return cells.NOTHING if rate is None else str(rate.unscored)


def _gap(gap: Difference | None) -> str:
    if gap is None or gap.difference is None:
        return cells.NOTHING
    found = cells.signed(gap.difference)
    return (
        found
        if gap.low is None or gap.high is None
        else f"{found} ({cells.signed(gap.low)} to {cells.signed(gap.high)})"
    )


def _refusals(evidence: Evidence) -> str:
    """The condition of publishing, in words, with what so many requests can show."""
    rate, gap = evidence.entry.metrics[DIRECT], evidence.entry.vs_none[DIRECT]
    margin = evidence.margin(DIRECT)
    needed = needed_items(margin)
    enough = needed is not None and rate.n >= needed
    note = (
        f"To show that less than the margin is lost takes {needed} requests of which none changes."
        if needed is not None and not enough
        else "At a margin of zero no number of requests can show that nothing is lost."
        if needed is None
        else ""
    )
    before = _rate(evidence.none.metrics[DIRECT])
    return (
        f"**Refusals of direct harmful requests**: {_rate(rate)} % with the mask, {before} % without, a difference of "
        f"{_gap(gap)} points over {rate.n} requests, {rate.unscored} unscored; margin {100 * margin:g}. "
        f"{note}"
    ).strip()


def _limits(evidence: Evidence) -> str:
    models = {one.name: f"{one.name} ({_judge(one)})" for one in evidence.judges}
    forbidden = inert(", ".join(one.title or one.category for one in evidence.forbid))
    judges = sorted({models.get(str(judge), str(judge)) for suite in evidence.suites for judge in _judges(suite)})
    limited = (
        f" It was cut to {evidence.limit} conversations per suite and split." if evidence.limit is not None else ""
    )
    lines = [
        f"It was evaluated with the scenario {inert(evidence.scenario)}, on the suites named below and on nothing "
        f"else.{limited} Attacks of another kind may succeed where these fail.",
        f"Verdicts are those of the judges {inert(', '.join(judges)) or 'of the scenario'}; a judge can be wrong, and "
        "what it could not judge is counted as unscored, not as a success.",
        "Replies are greedy. With sampling, or in another engine or precision, they differ.",
        *([f"No reply held {forbidden}: each was judged for it, by a judge that can be wrong."] if forbidden else []),
        "Whoever holds the weights can run them without the mask.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _judge(one: JudgeModel) -> str:
    return one.kind if one.model is None else f"{one.kind}, {hub_id(one.model) or _last_part(one.model)}"


def _judges(suite: Suite) -> list[Any]:
    return list(suite.judge) if isinstance(suite.judge, list | tuple) else [suite.judge] if suite.judge else []


def _data(evidence: Evidence) -> str:
    lines = [
        [inert(suite.name), inert(suite.role), inert(_source(suite.data)), inert(licence_of(suite.data))]
        for suite in evidence.suites
    ]
    digest = (
        f"\n\nsha256 of every conversation of the run: {_digest(evidence.data_sha256)}" if evidence.data_sha256 else ""
    )
    table = "\n".join(
        [
            "| suite | role | source | licence |",
            "| --- | --- | --- | --- |",
            *("| " + " | ".join(row) + " |" for row in lines),
        ]
    )
    return table + digest


def _source(data: str) -> str:
    """A suite's source without the folders of the machine it lay on."""
    if data.startswith("suite:"):
        row = _named(data)
        return f"{data} ({row.source})" if row is not None else data
    return data if data.startswith("lab:") else f"a file, {_last_part(data)}"


def licence_of(data: str) -> str:
    """The licence of a suite's data, as far as moesteer knows it."""
    if data.startswith("lab:"):
        return "made by moesteer (apache-2.0)"
    row = _named(data) if data.startswith("suite:") else None
    return str(row.licence) if row is not None else "not known to moesteer"


def _named(data: str) -> Any:
    from moesteer.suites import table

    try:
        return table.named(data.removeprefix("suite:"))
    except MoesteerError:  # a run of a version that had another table
        return None


def _use(mask: SteeringMask, evidence: Evidence, *, repo: str) -> str:
    model = hub_id(evidence.model) or (evidence.model if evidence.model in LAB else "MODEL")
    name = repo.split("/")[1]
    return "\n".join(
        [
            "```",
            f"pip install 'moesteer>={__version__}'",
            f"moesteer mask pull {repo}@COMMIT --out {name}.safetensors --sha256 {mask.sha256}",
            f"moesteer mask check {name}.safetensors --model {model}",
            f'moesteer generate {model} --mask {name}.safetensors --prompt "..."',
            f"moesteer serve {model} --pin {name}.safetensors",
            "```",
            "",
            "`COMMIT` is a commit of this repository. The sha256 above proves the file whole, not who made it: it is "
            "on this page, and whoever can change the page can change both.",
        ]
    )


def _settings(mask: SteeringMask, evidence: Evidence) -> str:
    rows = [
        *_flat(mask.info.settings),
        ("creator", inert(mask.info.creator)),
        ("seed of the evaluation", str(evidence.seed)),
    ]
    rows += [(f"version of {inert(name)}", inert(found)) for name, found in sorted(evidence.versions.items())]
    if mask.info.data_sha256:
        rows.append(("sha256 of the data it was detected on", _digest(mask.info.data_sha256)))
    scenario = f"Scenario: {inert(evidence.title or evidence.scenario)}. {inert(evidence.description)}".strip()
    return f"{scenario}\n\n{cells.grid(('setting', 'value'), rows)}"


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in sorted(settings.items()):
        yield inert(key, most=80), inert(_without_folders(value), most=300)


def _without_folders(value: Any) -> Any:
    """Settings with paths cut to their last part: a card says nothing of the machine it was made on."""
    if isinstance(value, Mapping):
        return json.dumps(
            {str(key): _without_folders(inner) for key, inner in value.items()}, sort_keys=True, default=str
        )
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and re.match(r"([/~]|[A-Za-z]:\\|\.{1,2}/)", value):
        return _last_part(value)
    return value

"""Names and sentences as the pages say them."""

from __future__ import annotations

from moesteer.report.numbers import Number, effect, percent, pointer, points
from moesteer.report.run_files import Difference, Interval, Method, Results

LOWER_IS_BETTER = frozenset({"over_refusal_rate"})
"""Metrics where less is better; in all others more is better."""

CONTROLS = frozenset({"none", "none-again", "alpha-0", "random", "sign-flipped", "shuffled-layers"})
"""Methods that are there to compare with, never to recommend."""

METRIC_NAMES = {
    "defense_success_rate": "defence success rate",
    "generation_success_rate": "generation success rate",
    "direct_refusal_rate": "direct refusal rate",
    "over_refusal_rate": "over-refusal rate",
}

METHOD_NOTES = {
    "none": "the model as it is",
    "none-again": "unsteered once more: its distance to none is noise",
    "random": "control: same size, random experts",
    "risk-difference": "SteerMoE, arXiv 2509.09660",
    "log-odds": "SteerMoE, arXiv 2509.09660: log odds ratio",
    "paired-t": "SteerMoE, arXiv 2509.09660: paired t-test of router probabilities",
    "masc-published": "MASCing, arXiv 2604.27818, as published",
    "masc": "MASCing with matched labels",
    "direct": "strengths optimised through the model",
    "attribution": "strengths by the gradient of the wanted response",
    "causal": "experts silenced one at a time",
    "residual-direction": "outside baseline: a direction in the residual stream, no mask",
    "alpha-0": "control: the mask at strength 0",
    "sign-flipped": "control: the mask with its sign turned",
    "shuffled-layers": "control: the mask with its layers shuffled",
}

_MARKS = (0x061C, 0x200E, 0x200F, 0xFEFF)
HIDDEN = frozenset(
    [*_MARKS, *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
)
"""Code points that steer a display instead of showing: further controls, changes of writing direction; and halves of
characters, which no file can hold."""


def printable(text: str) -> str:
    """Text in which nothing is hidden: control and direction-changing characters are replaced by visible signs."""
    return "".join(_visible(character) for character in text.replace("\r\n", "\n"))


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)
    if code in HIDDEN:
        return f"[U+{code:04X}]"
    return character


def metric_name(metric: str) -> str:
    """A metric in words."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def method_note(name: str) -> str:
    """What a method is, in a few words; `+gate` variants add that the gate decides when."""
    base, _, variant = name.partition("+")
    note = METHOD_NOTES.get(base, "")
    return f"{note}, only where a gate fires" if note and variant == "gate" else note


def rate(metric: str, method: str, interval: Interval) -> Number:
    """The value of a metric as a Number."""
    return Number(percent(interval.value), interval.value, pointer("methods", method, "metrics", metric, "value"))


def change(metric: str, method: str, difference: Difference) -> Number:
    """The difference to `none` as a Number, in points."""
    return points(difference.difference, "methods", method, "vs_none", metric, "difference")


def verdict(metric: str, difference: Difference | None) -> str:
    """Whether a metric got `better` or `worse`, or is the `same` as far as its interval can tell."""
    return effect(difference, lower_is_better=metric in LOWER_IS_BETTER)


def shown_method(results: Results) -> str | None:
    """The method that figures and examples show: the recommended one, else the best on the target, else None."""
    if results.recommended is not None:
        return results.recommended
    target = results.scenario.target_metric
    sign = -1 if target in LOWER_IS_BETTER else 1
    scored = [
        (sign * found.value, name)
        for name, method in results.methods.items()
        if name not in CONTROLS and (found := method.metrics.get(target)) is not None and found.value is not None
    ]
    return max(scored)[1] if scored else None


def unseen_tactics(results: Results, tactics: list[str]) -> list[str]:
    """Those of `tactics` that no suite of the fit split holds."""
    fitted = {tactic for split in results.splits.get("fit", {}).values() for tactic in split.tactics}
    return [tactic for tactic in tactics if tactic not in fitted]


def setting(name: str, method: Method) -> list[str | Number]:
    """`direct at alpha 0.75 (23 experts)`."""
    said: list[str | Number] = [name]
    if method.alpha is not None:
        said += [" at alpha ", Number(f"{method.alpha:g}", method.alpha, pointer("methods", name, "alpha"))]
    if method.experts:
        said += [" (", Number(str(method.experts), method.experts, pointer("methods", name, "experts")), " experts)"]
    return said


def outcome(results: Results) -> list[str | Number]:
    """The one sentence on top, computed from the test numbers: strings and Numbers in order."""
    name, target = shown_method(results), results.scenario.target_metric
    if name is None:
        return [f"No steering method has a scored {metric_name(target)}, so there is no outcome to state."]
    method, before = results.methods[name], results.methods["none"].metrics.get(target)
    after, difference = method.metrics.get(target), method.vs_none.get(target)
    said: list[str | Number] = []
    if results.recommended is None:
        said.append("No method is recommended: none met the protect margins on the select split. The strongest, ")
    said += setting(name, method)
    if before is None or after is None or before.value is None or after.value is None:
        return [*said, f" has no scored {metric_name(target)} to compare with none."]
    effect = verdict(target, difference)
    raised = after.value > before.value
    if effect == "same":
        said.append(f" does not measurably change the {metric_name(target)}: ")
    else:
        said.append(f" {'raises' if raised else 'lowers'} the {metric_name(target)} from ")
    said += [rate(target, "none", before), " to ", rate(target, name, after), " ("]
    said += ["n = ", Number(str(after.n), after.n, pointer("methods", name, "metrics", target, "n"))]
    if after.unscored:
        unscored = pointer("methods", name, "metrics", target, "unscored")
        said += [", ", Number(str(after.unscored), after.unscored, unscored), " unscored"]
    return [*said, _held_out(results, method), ")", *_side_effect(name, method, target), "."]


def _held_out(results: Results, method: Method) -> str:
    """What about the test split was new: tactics as recorded in the splits; behaviours are split by group."""
    target = results.scenario.target_metric
    tactics = sorted(method.by_tactic.get(target, {}))
    unseen = unseen_tactics(results, tactics)
    if not tactics or not results.splits.get("fit"):
        return " in the test split"
    if len(unseen) == len(tactics):
        return " in the test split, behaviours and tactics unseen in fitting"
    return f" in the test split, behaviours and {len(unseen)} of {len(tactics)} tactics unseen in fitting"


def _side_effect(name: str, method: Method, target: str) -> list[str | Number]:
    metric = "benign_accuracy"
    difference = method.vs_none.get(metric)
    if metric == target or difference is None or difference.difference is None:
        return []
    return [f"; {metric_name(metric)} changes by ", change(metric, name, difference), " points"]

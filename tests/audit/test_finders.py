"""Finders: what the surrogate's score is, by brute force, and which of them run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moesteer.audit import finders
from moesteer.audit.experts import usage_of
from moesteer.audit.finders import _taken_by_silencing, checked_names, find
from moesteer.detection.masc import Labelled
from moesteer.detection.surrogate import Sequences, Stack
from moesteer.errors import InputError, NoEffectError, UnknownNameError

LAYERS, EXPERTS, TOP_K = 2, 5, 2


def sequences(rng: np.random.Generator) -> tuple[Labelled, list[np.ndarray]]:
    logits = [rng.normal(size=(length, LAYERS, EXPERTS)).astype(np.float32) for length in (3, 5, 2, 4)]
    labels = [1, 0, 1, 0]
    selected = [np.argsort(-one, axis=-1)[..., :TOP_K].astype(np.int64) for one in logits]
    return Labelled(Sequences.of(logits, labels), ["g"] * 4, []), selected


def test_the_surrogates_score_is_what_lowering_an_experts_logits_takes_from_a_linear_verdict() -> None:
    rng = np.random.default_rng(0)
    labelled, selected = sequences(rng)
    stack = Stack("linear", layers=LAYERS, experts=EXPERTS, outputs=1, seeds=[0, 1])
    with torch.no_grad():
        stack.weight.copy_(torch.from_numpy(rng.normal(size=stack.weight.shape)))
    found_LE = _taken_by_silencing(stack, labelled, selected)
    expected = np.zeros((LAYERS, EXPERTS))
    for row in range(LAYERS):
        for expert in range(EXPERTS):
            for number in (0, 2):  # those that show the behaviour
                logits, lengths, _ = labelled.data.part(torch.tensor([number]))
                lowered = logits.clone()
                where = (selected[number][:, row] == expert).any(axis=-1)
                lowered[0, 0, where, row, expert] = logits[0, 0, where, row].min(-1).values
                with torch.no_grad():
                    taken = (stack(logits, lengths) - stack(lowered, lengths))[..., 0].mean()
                expected[row, expert] += float(taken) / 2
    np.testing.assert_allclose(found_LE, expected, rtol=1e-4, atol=1e-6)


def evidence(size: int) -> Any:
    table = np.linspace(-0.5, 0.5, size).reshape(1, size)
    experts = SimpleNamespace(
        usage_LE=table, behaviour_LE=np.sign(table).astype(np.int8), q_LE=np.zeros((1, size)), test="student-t",
        difference=SimpleNamespace(value=table),
    )  # fmt: skip
    return SimpleNamespace(experts=experts)


def test_a_finder_that_finds_nothing_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(found: Any) -> Any:
        raise NoEffectError("no gradient", where="here", expected="one", do="use another")

    monkeypatch.setattr(finders, "_SCORED", {"attribution": ("t", nothing)})
    made, failed = find(evidence(8), ["risk-difference", "attribution"])
    assert list(made) == ["risk-difference"] and failed["attribution"].startswith("no gradient")
    assert made["risk-difference"].order[0] == (0, 7) == made["risk-difference"].against[-1]
    assert made["risk-difference"].passed == 4
    with pytest.raises(NoEffectError, match="no finder ranks"):
        find(evidence(8), ["attribution"])


def test_causal_runs_by_itself_only_on_few_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = {name: ("t", lambda found: (found.experts.usage_LE, {})) for name in ("surrogate", "causal")}
    monkeypatch.setattr(finders, "_SCORED", scored)
    monkeypatch.setattr(finders, "NAMES", ("risk-difference", "surrogate", "causal"))
    assert "causal" in find(evidence(512), None)[0]
    made, failed = find(evidence(513), None)
    assert "causal" not in made and "513 experts" in failed["causal"]
    assert "causal" in find(evidence(513), ["causal"])[0]


def test_names_are_checked() -> None:
    assert checked_names(None) is None and checked_names(["causal", "causal"]) == ("causal",)
    with pytest.raises(UnknownNameError):
        checked_names(["masc"])
    with pytest.raises(InputError):
        checked_names([])


def test_usage_counts_every_kept_token() -> None:
    selected = [np.array([[[0, 1]], [[0, 2]]]), np.array([[[0, 1]]])]
    trace: Any = SimpleNamespace(
        fingerprint=SimpleNamespace(experts=4, layer_ids=(3,)),
        sequences=lambda tensors: ((None, {"selected": one}) for one in selected),
    )
    tokens, share_LE = usage_of(trace)
    assert tokens == 3 and share_LE.tolist() == [[1.0, 2 / 3, 1 / 3, 0.0]]

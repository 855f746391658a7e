"""What a worker checks of itself at its start and in its first step, with stand-ins for vLLM's runner and layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moesteer.backends.vllm.catalogue import Catalogue
from moesteer.backends.vllm.requests import ROW
from moesteer.backends.vllm.settings import Settings
from moesteer.backends.vllm.tables import Tables, run_with
from moesteer.backends.vllm.worker import Steered
from moesteer.errors import NoEffectError, SelfCheckError
from tests.server.fakes import EXPERTS, LAYERS, PIN, TOP_K, additive, gated, named, pinned

TOKENS = 16


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    run_with(None)


def steered(*, gate: bool = False, at: Sequence[int] = (0, 1, 2)) -> Steered:
    """A worker with the layers at these places, tables beside them, and one request, `r`, under the pinned mask."""
    members = [pinned(additive(PIN))]
    if gate:
        members.append(named("asks", gated(additive({(1, 3): 1.0}), pool="last+final_turn")))
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={ROW: "!1"}))
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=["r"], num_computed_tokens_cpu=np.zeros(1, dtype=np.int32)),
        requests={"r": request}, max_num_tokens=TOKENS, device=torch.device("cpu"),
    )  # fmt: skip
    made = Steered(runner, Settings(), Catalogue(members))
    layers: Any = tuple(SimpleNamespace(layer_id=LAYERS[place]) for place in at)
    made.layers = layers
    bias, force = made.catalogue.tables()
    made.tables = Tables(
        tuple(layer.layer_id for layer in layers), bias[:, list(at)], force[:, list(at)], made._gates(list(at)),
        tokens=TOKENS, top_k=TOP_K, capture=None, count=False, device=runner.device,
    )  # fmt: skip
    made._staging = made.tables.row_T
    made._check_operator()
    run_with(made.tables)
    return made


def step(made: Steered, layers: Sequence[int]) -> None:
    """A step of three tokens in which the operators of these layers run."""
    made.prepared(np.array([3], dtype=np.int32))
    forward(layers)
    made.ran()


def forward(layers: Sequence[int]) -> None:
    for layer in layers:
        torch.ops.moesteer.steer(torch.randn(3, EXPERTS), layer)


# ---------------------------------------------------------------- the first step


def test_a_first_step_through_every_operator_passes() -> None:
    made = steered()
    step(made, LAYERS)
    step(made, LAYERS[:1])  # of later steps the canary asks


@pytest.mark.parametrize("missing", [*((layer,) for layer in LAYERS), LAYERS[1:], LAYERS])
def test_a_first_step_past_an_operator_ends_the_engine(missing: tuple[int, ...]) -> None:
    made = steered()
    with pytest.raises(NoEffectError, match=f"{len(missing)} of 3 routers ran past") as caught:
        step(made, [layer for layer in LAYERS if layer not in missing])
    assert str(list(missing)) in caught.value.where
    with pytest.raises(NoEffectError):  # and so does whatever comes after
        made.ran()


def test_steps_that_run_nothing_are_not_the_first() -> None:
    made = steered()
    made.begins(SimpleNamespace(finished_req_ids=[]))
    made.ran()
    with pytest.raises(NoEffectError):
        step(made, [])


def test_a_worker_without_routers_has_nothing_to_prove() -> None:
    made = steered(at=())
    step(made, [])
    assert made.steps == 1


def test_a_warm_up_proves_nothing_of_the_first_step() -> None:
    made = steered()
    made.idle()
    forward(LAYERS)
    with pytest.raises(NoEffectError):
        step(made, [])


# ---------------------------------------------------------------- the gates' scores


@pytest.mark.parametrize("at", [(0, 1, 2), (1, 2), (2,)])
def test_scores_as_they_should_be_pass(at: tuple[int, ...]) -> None:
    made = steered(gate=True, at=at)
    made._check_scores(5)
    assert made.tables is not None and made.tables.gate is not None and float(made.tables.score_TG.abs().sum()) > 0


def test_without_gates_there_are_no_scores() -> None:
    steered()._check_scores(5)


def wrongly(made: Steered, how: str) -> None:
    """An operator that works the scores out in another way."""
    assert made.tables is not None
    tables, steer = made.tables, made.tables.steer

    def other(logits: torch.Tensor, layer_id: int) -> torch.Tensor:
        if how == "a layer is left out" and layer_id == LAYERS[1]:
            return logits.clone()
        if how == "no layer adds":
            return logits.clone()
        found = steer(logits, layer_id)
        if how == "a layer adds twice" and layer_id == LAYERS[2]:
            steer(logits, layer_id)
        if how == "the last layer overwrites" and layer_id == LAYERS[2]:
            assert tables.gate is not None
            tables.score_TG[: len(logits)] = logits @ tables.gate[2]
        if how == "of one part":
            tables.score_TG[:, 1] = 0
        if how == "no number":
            tables.score_TG[0, 0] = float("nan")
        return found

    tables.steer = other  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "how",
    ["a layer is left out", "no layer adds", "a layer adds twice", "the last layer overwrites", "of one part",
     "no number"],
)  # fmt: skip
def test_scores_that_are_worked_out_wrongly_are_an_error(how: str) -> None:
    made = steered(gate=True)
    assert made.tables is not None
    made.tables.score_TG.zero_()
    wrongly(made, how)
    with pytest.raises(SelfCheckError, match="gates' scores"):
        made._check_scores(5)


@pytest.mark.parametrize("place", [0, 2])
def test_a_wrong_gate_table_is_an_error(place: int) -> None:
    made = steered(gate=True)
    assert made.tables is not None and made.tables.gate is not None
    made.tables.gate[place] = made.tables.gate[place] * 2
    with pytest.raises(SelfCheckError, match="gates' scores"):
        made._check_scores(5)


def test_a_worker_without_routers_starts_with_gates_too() -> None:
    steered(gate=True, at=())

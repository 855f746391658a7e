"""Several masks at once: their sum, their forces joined, each at its own strength, behind gates; in Python and the CLI.

Truth: algebra.add and algebra.union for the one mask that does the same, and routing.py for what is selected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from moesteer import algebra
from moesteer.backends.hf import Model
from moesteer.baking import bake
from moesteer.errors import AlreadySteeredError, InputError, MaskContentError
from moesteer.mask import SteeringMask
from moesteer.models.check import difference
from moesteer.models.steering import MaskTables
from moesteer.routing import steer_logits
from moesteer.side_by_side import answer
from tests.compat.masks_and_calls import Calls, additive, forced, logits
from tests.compat.test_gating import TALKS, always, behind, mattering, never, said, sometimes, who
from tests.end_to_end.test_cli import process, run

NAMES = ["mixtral", "deepseek_v3", "gpt_oss", "dbrx"]
EVERY = pytest.mark.parametrize("name", NAMES)
ModelOf = Callable[..., Model]


def under(
    model: Model, masks: Sequence[SteeringMask], *alphas: float | None, together: bool = True
) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """(logits of a plain pass, tokens said) with the masks applied."""
    with model.steered(masks, alphas=alphas or None, together=together):
        return logits(model), said(model)


def close(one: tuple[torch.Tensor, object], other: tuple[torch.Tensor, object]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert one[1] == other[1]


def forcing(
    model: Model, *, on: Sequence[int] = (), off: Sequence[int] = (), rows: Sequence[int] = (0,)
) -> SteeringMask:
    force = np.zeros((len(model.routers), model.fingerprint.experts), np.int8)
    force[np.ix_(list(rows), list(on))], force[np.ix_(list(rows), list(off))] = 1, -1
    return SteeringMask(forced(model, 0).info, force_LE=force)


# ---------------------------------------------------------------- laws


@EVERY
def test_additive_masks_together_are_their_sum(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    a, b = additive(model, 3).with_info(alpha=0.5), additive(model, 4)
    found = under(model, [a, b])
    close(found, under(model, [algebra.add(a, b)], together=False))
    close(found, under(model, [b, a]))
    assert found[1] != under(model, [a])[1] and found[1] != under(model, [b])[1]


@EVERY
def test_each_mask_has_its_own_strength(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    a, b = additive(model, 3), additive(model, 4)
    both = algebra.add(algebra.with_alpha(a, 0.5), algebra.with_alpha(b, -0.25))
    close(under(model, [a, b], 0.5, -0.25), under(model, [both], together=False))
    close(under(model, [a, b], None, -0.25), under(model, [a, algebra.with_alpha(b, -0.25)]))
    with model.steered([a, b], alphas=[0.5, None], together=True) as receipt:
        assert receipt.alphas == (0.5, 1.0) and receipt.masks == (a.sha256[:12], b.sha256[:12])


@EVERY
def test_alpha_zero_switches_one_of_them_off(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    a, b = additive(model, 3), forced(model, 4, full=False)
    for masks, alphas, left in (([a, b], (0.0, 1.0), b), ([a, b], (1.0, 0.0), a), ([b, a], (0.0, None), a)):
        found, wanted = under(model, masks, *alphas), under(model, [left], together=False)
        assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    plain = logits(model), said(model)
    found = under(model, [a, b], 0.0, 0.0)
    assert torch.equal(found[0], plain[0]) and found[1] == plain[1]


@EVERY
def test_one_mask_together_with_none_is_the_mask(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    for mask in (additive(model, 3), forced(model, 4)):
        found, wanted = under(model, [mask]), under(model, [mask], together=False)
        assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]


@EVERY
def test_forces_that_agree_are_their_union(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    whole = forced(model, 3)
    force = whole.values_LE
    parts = [
        SteeringMask(whole.info, force_LE=np.where(keep, force, 0).astype(np.int8)) for keep in (force > 0, force != 9)
    ]
    found, wanted = under(model, parts), under(model, [algebra.union(parts)], together=False)
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    assert np.array_equal(algebra.union(parts).values_LE, force)


@EVERY
def test_a_bias_and_a_force_together_are_what_routing_selects(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    a, b, c = additive(model, 3), forced(model, 4, full=False), additive(model, 5)
    calls = Calls()
    with model.steered([a, b, c], alphas=[0.5, None, 1.0], together=True) as receipt, model.tap.record(calls):
        said(model)
    assert receipt.changed > 0 and len(calls.calls) > len(model.routers)
    for router, raw, experts, weights in calls.calls:
        bias = a.bias_LE(0.5)[router.index] + c.bias_LE()[router.index]
        force = b.values_LE[router.index]
        assert difference(router, raw, experts, weights, bias_NE=bias, force_NE=force) is None
        assert (experts == int(np.flatnonzero(force > 0)[0])).any(-1).all()
        assert not (experts == int(np.flatnonzero(force < 0)[0])).any()


def test_the_tables_add_biases_and_then_force(model_of: ModelOf) -> None:
    """The arithmetic alone, row by row of a batch, bit for bit with routing.steer_logits."""
    model = model_of("mixtral")
    masks = [additive(model, 3), forced(model, 4, full=False), additive(model, 5)]
    tables = MaskTables.of_masks(masks, [0.5, None, -1.0], device=torch.device("cpu"))
    rows: list[tuple[int, ...]] = [(), (1,), (2,), (1, 2), (1, 3), (1, 2, 3), (3,)]
    raw = torch.randn(len(rows) * 4, 8, generator=torch.Generator().manual_seed(0))
    tables.set_rows(rows)
    for router in model.routers:
        found = tables.logits(router, raw)
        ranks = tables.ranks(router, raw)
        assert ranks is not None
        for i, row in enumerate(rows):
            part = slice(4 * i, 4 * i + 4)
            bias = np.zeros(8, np.float32)
            for m, alpha in ((1, 0.5), (3, -1.0)):
                bias = bias + masks[m - 1].bias_LE(alpha)[router.index] * np.float32(m in row)
            force = masks[1].values_LE[router.index] * np.int8(2 in row)
            wanted = steer_logits(raw[part].numpy(), bias_TE=bias, force_TE=force)
            np.testing.assert_array_equal(found[part].numpy(), wanted)
            inf = torch.isinf(ranks[part])
            assert (torch.sign(ranks[part]) * inf).int().numpy().tolist() == [force.tolist()] * 4


# ---------------------------------------------------------------- what is refused


def test_forces_that_contradict_each_other_are_refused(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    on, off = forcing(model, on=[2], off=[5], rows=[1]), forcing(model, off=[2, 3], on=[5], rows=[1])
    with (
        pytest.raises(MaskContentError, match="switch the same expert on and off") as caught,
        model.steered([on, additive(model, 1), off], together=True),
    ):
        raise AssertionError("not reached")
    assert caught.value.where == f"layer {model.routers[1].layer_id}, expert 2, and 1 more"
    assert "--op union" in caught.value.do and not model.tap.attached
    for alphas in ([None, None, 0.0], [0.0, 1.0, 1.0]):
        with model.steered([on, additive(model, 1), off], alphas=alphas, together=True):
            pass  # the other is switched off
    with model.steered([on, off]):
        said(model, TALKS[:2], rows=[1, 2])  # one per row: they never meet


@pytest.mark.parametrize(
    ("name", "one", "two", "part"),
    [
        ("mixtral", {"on": [0, 1]}, {"on": [2, 3]}, "4 experts are switched on where 3 are selected"),
        ("mixtral", {"off": [0, 1, 2]}, {"off": [3, 4, 5]}, "6 of 8 experts are switched off where 3 must"),
        ("deepseek_v3", {"on": [0, 2]}, {"on": [4]}, "experts of 3 groups are switched on where 2 can be chosen"),
    ],
)
def test_forces_that_ask_more_than_a_layer_has_are_refused(
    name: str, one: dict[str, list[int]], two: dict[str, list[int]], part: str, model_of: ModelOf
) -> None:
    model = model_of(name)
    masks = [forcing(model, **one), forcing(model, **two)]
    for mask in masks:
        with mask.apply(model):
            pass  # each alone is fine
    with pytest.raises(MaskContentError, match=part), model.steered(masks, together=True):
        raise AssertionError("not reached")
    with model.steered(masks, alphas=[None, 0.0], together=True):
        pass
    if name == "mixtral" and "on" in one:
        with model.steered([masks[0], masks[0]], together=True):
            pass  # the same experts twice are no more experts


def test_gated_forces_count_as_if_all_gates_fired(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    on, off = never(forcing(model, on=[2])), never(forcing(model, off=[2]))
    with pytest.raises(MaskContentError, match="on and off"), model.steered([on, off], together=True):
        raise AssertionError("not reached")


def test_blocks_inside_one_another_are_refused_and_say_how(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    with additive(model, 1).apply(model):
        with pytest.raises(AlreadySteeredError) as caught, additive(model, 2).apply(model):
            raise AssertionError("not reached")
        assert "together=True" in caught.value.do


# ---------------------------------------------------------------- with gates


@pytest.mark.parametrize("kind", ["additive", "forced"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_gated_mask_joins_the_others_where_it_fires(name: str, kind: str, model_of: ModelOf) -> None:
    model = model_of(name)
    everywhere, some = additive(model, 8, size=0.5), mattering(model, kind)
    gated = sometimes(model, some)
    fires = who(model, gated)
    alone, joined = under(model, [everywhere])[1], under(model, [everywhere, some])[1]
    assert all(a != b for a, b in zip(alone, joined, strict=True))
    for order in ([everywhere, gated], [gated, everywhere]):
        with model.steered(order, together=True) as receipt:
            assert said(model) == [joined[i] if fires[i] else alone[i] for i in range(5)]
        assert (receipt.gated, receipt.fired) == (5, 2)
    with model.steered([gated, everywhere], alphas=[None, 0.0], together=True):
        found = said(model)
    plain, steered = said(model), under(model, [some])[1]
    assert found == [steered[i] if fires[i] else plain[i] for i in range(5)]


def test_two_gates_decide_each_for_itself(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    a, b = mattering(model, "additive"), mattering(model, "additive", seed=20)
    one, two = sometimes(model, a), sometimes(model, b, seed=60, pool="last")
    by = list(zip(who(model, one), who(model, two), strict=True))
    assert len(set(by)) > 2, "the gates must differ"
    said_by = {
        (False, False): said(model), (True, False): under(model, [a])[1], (False, True): under(model, [b])[1],
        (True, True): under(model, [a, b])[1],
    }  # fmt: skip
    with model.steered([one, two], together=True) as receipt:
        assert said(model) == [said_by[both][i] for i, both in enumerate(by)]
    assert (receipt.gated, receipt.fired) == (10, 4)


# ---------------------------------------------------------------- side by side, the CLI, baking


def test_side_by_side_applies_all(model_of: ModelOf) -> None:
    model = model_of("mixtral")
    masks = [mattering(model, "additive"), never(additive(model, 4))]
    found = answer(model, TALKS, masks=masks, max_new_tokens=16)
    with masks[0].apply(model):
        wanted = [one.text for one in model.generate(TALKS, max_new_tokens=16)]
    assert [row["steered"] for row in found.rows] == wanted
    assert found.receipt is not None and (found.receipt.gated, found.receipt.fired) == (5, 0)
    shut = answer(model, TALKS, masks=masks[1:], max_new_tokens=4)
    assert all(row["steered"] == row["unsteered"] for row in shut.rows), "a shut gate is no error"


@pytest.fixture(scope="module")
def files_of(lab_tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Masks of lab tiny: a, b additive; gated: b behind a gate that always fires; shut: one that never does."""
    folder = tmp_path_factory.mktemp("masks")
    a, b = additive(lab_tiny, 1, size=2.0), additive(lab_tiny, 2, size=2.0)
    masks = {"a": a, "b": b, "sum": algebra.add(a, algebra.with_alpha(b, -0.5)), "gated": always(b), "shut": never(b)}
    for name, mask in masks.items():
        mask.save(folder / name)
    return {name: folder / name for name in masks}


def generated(*options: str | Path) -> list[str]:
    prompts = ("--prompt", "how do i paint a clay pot ?", "--prompt", "what is the capital of arvonia ?")
    code, text, error = run("generate", "lab-tiny", *prompts, "--max-new-tokens", "12", "--json", *options)
    assert code == 0, error
    return [row.get("steered", row["unsteered"]) for row in json.loads(text)["answers"]]


def test_generate_takes_several_masks_and_strengths(files_of: dict[str, Path]) -> None:
    a, b = files_of["a"], files_of["b"]
    both = generated("--mask", a, "--mask", b, "--alpha", "1", "--alpha", "-0.5")
    assert both == generated("--mask", files_of["sum"])
    assert both == generated("--mask", b, "--mask", a, "--alpha", "-0.5", "--alpha", "1")
    only_a, plain = generated("--mask", a), generated()
    assert len({tuple(both), tuple(only_a), tuple(plain)}) == 3
    assert generated("--mask", a, "--mask", b, "--alpha", "1", "--alpha", "0") == only_a
    assert generated("--mask", a, "--mask", files_of["shut"]) == only_a
    assert generated("--mask", a, "--mask", files_of["gated"], "--alpha", "1", "--alpha", "-0.5") == both
    assert generated("--mask", files_of["shut"]) == plain


@pytest.mark.parametrize("alphas", [["1"], ["1", "1", "1"]])
def test_a_wrong_number_of_strengths_is_exit_2(alphas: list[str], files_of: dict[str, Path]) -> None:
    given = [word for alpha in alphas for word in ("--alpha", alpha)]
    masks = ["--mask", files_of["a"], "--mask", files_of["b"]]
    code, _, error = run("generate", "lab-tiny", "--prompt", "x", *masks, *given)
    assert code != 0 and isinstance(error, InputError)
    assert error.what == f"{len(alphas)} times --alpha for 2 times --mask"
    if len(alphas) == 1:
        done = process("generate", "lab-tiny", "--prompt", "x", *masks, *given)
        assert done.returncode == 2 and "1 times --alpha for 2 times --mask" in done.stderr and not done.stdout


def test_a_strength_without_a_mask_is_refused() -> None:
    _, _, error = run("generate", "lab-tiny", "--prompt", "x", "--alpha", "1")
    assert isinstance(error, InputError) and "1 times --alpha for 0 times --mask" in error.what


def test_the_gate_is_told_on_standard_error(files_of: dict[str, Path]) -> None:
    done = process(
        "generate", "lab-tiny", "--prompt", "who is mira ?", "--mask", files_of["shut"], "--max-new-tokens", "2"
    )
    assert done.returncode == 0 and "the gate fired on 0 of 1 requests" in done.stderr


def test_a_gated_mask_is_not_baked(model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of("gpt_oss")
    mask = behind(additive(model, 1))
    with pytest.raises(MaskContentError, match="a gated mask cannot be baked") as caught:
        bake(model, mask, out=tmp_path / "out")
    assert "with_gate(None, None)" in caught.value.do and not list(tmp_path.iterdir())
    bake(model, mask.with_gate(None, None), out=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()

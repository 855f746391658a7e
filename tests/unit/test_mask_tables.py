"""models.steering, the torch side of a mask, against routing.py: bit for bit, row by row.

Legend: L layers, E experts, N positions of a batch.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moesteer.errors import InputError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.models.steering import BiasSteering, MaskTables, Receipt
from moesteer.routing import steer_logits


def make_mask(*, experts, top_k, strength=None, sigma=None, force=None, alpha=1.0):
    layers = len(strength if strength is not None else force)
    info = MaskInfo(
        fingerprint=Fingerprint(
            model_type="fake", layer_ids=tuple(range(layers)), experts=experts, top_k=top_k, scoring="s",
            router_sha256="0" * 64,
        ),
        method="test", intent=Intent(toward="x"), alpha=alpha,
    )  # fmt: skip
    return SteeringMask(info, strength_LE=strength, sigma_L=sigma, force_LE=force)


def random_mask(rng, layers, experts, top_k):
    if rng.random() < 0.5:
        strength = rng.normal(size=(layers, experts)).astype(np.float32)
        strength[rng.random((layers, experts)) < 0.4] = 0
        sigma = rng.uniform(0.1, 3, layers).astype(np.float32)
        return make_mask(experts=experts, top_k=top_k, strength=strength, sigma=sigma, alpha=float(rng.normal()))
    force = np.zeros((layers, experts), np.int8)
    for row in force:
        order = rng.permutation(experts)
        on = rng.integers(0, top_k + 1)
        off = rng.integers(0, experts - top_k + 1)
        row[order[:on]] = 1
        row[order[on:][:off]] = -1
    return make_mask(experts=experts, top_k=top_k, force=force)


def fake_router(layer, experts):
    return SimpleNamespace(index=layer, experts=experts)


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def numpy_steer(mask, layer, logits_NE):
    """steer_logits in float32, then rounded to the logits' dtype."""
    if mask is None:
        return logits_NE
    bias = None if mask.forced else mask.bias_LE()[layer]
    force = mask.force_LE[layer] if mask.forced else None
    return torch.from_numpy(steer_logits(logits_NE.float().numpy(), bias_TE=bias, force_TE=force)).to(logits_NE.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_steering_is_numpy_steering_bit_for_bit_in_every_row_of_a_batch(dtype):
    rng = np.random.default_rng(7)
    for _ in range(150):
        experts = int(rng.integers(2, 17))
        top_k = int(rng.integers(1, experts + 1))
        layers, batch, length = int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.integers(1, 5))
        masks = [random_mask(rng, layers, experts, top_k) for _ in range(int(rng.integers(1, 4)))]
        tables = MaskTables.of_masks(masks, [None] * len(masks), device=torch.device("cpu"))
        rows = rng.integers(0, len(masks) + 1, batch).tolist()
        # halves make ties common; + 0.0 since adding an empty bias turns -0.0 into 0.0, which no router can tell
        z = torch.from_numpy(np.round(rng.normal(size=(batch * length, experts)) * 4) / 2).to(dtype) + 0.0
        for layer in range(layers):
            router = fake_router(layer, experts)
            tables.set_rows(rows)
            whole = tables.logits(router, z)
            assert whole.dtype == dtype and whole.shape == z.shape
            for b, m in enumerate(rows):
                part = slice(b * length, (b + 1) * length)
                expected = numpy_steer(masks[m - 1] if m else None, layer, z[part])
                assert torch.equal(bits(whole[part]), bits(expected))
                tables.set_rows([m])
                for n in range(b * length, (b + 1) * length):
                    alone = tables.logits(router, z[n : n + 1])
                    assert torch.equal(bits(alone[0]), bits(whole[n]))


def test_ranks_put_forced_on_above_all_and_forced_off_below_all_per_row():
    force = np.array([[1, 0, -1, 0]], np.int8)
    other = np.array([[-1, 0, 0, 1]], np.int8)
    masks = [make_mask(experts=4, top_k=2, force=f) for f in (force, other)]
    tables = MaskTables.of_masks(masks, [None, None], device=torch.device("cpu"))
    tables.set_rows([1, 0, 2])
    choice = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.bfloat16).repeat(6, 1)
    ranks = tables.ranks(fake_router(0, 4), choice)
    inf, plain = torch.inf, choice[0].float().tolist()
    expected = [[inf, plain[1], -inf, plain[3]], plain, [-inf, plain[1], plain[2], inf]]
    assert ranks.dtype == torch.float32
    assert ranks.tolist() == [row for row in expected for _ in range(2)]


def test_additive_masks_leave_the_selection_to_the_model():
    mask = make_mask(experts=2, top_k=1, strength=np.ones((1, 2), np.float32), sigma=np.ones(1, np.float32))
    tables = MaskTables.of_masks([mask], [None], device=torch.device("cpu"))
    assert tables.ranks(fake_router(0, 2), torch.zeros(1, 2)) is None


def test_forcing_with_ranks_is_honoured_where_bfloat16_rounds_the_eps_away():
    force = np.array([[0, 0, 0, 1, 1, -1, 0, 0]], np.int8)
    tables = MaskTables.of_masks(
        [make_mask(experts=8, top_k=2, force=force)], [None], device=torch.device("cpu")
    )  # fmt: skip
    router = fake_router(0, 8)
    z = torch.full((1, 8), 100.0, dtype=torch.bfloat16)
    steered = tables.logits(router, z)
    assert torch.equal(steered, z)  # the eps is gone: this is why ranks exist
    assert set(tables.ranks(router, steered).topk(2).indices[0].tolist()) == {3, 4}


def test_a_layer_without_entries_hands_back_the_very_same_tensor():
    strength = np.array([[0, 0], [1, 0]], np.float32)
    mask = make_mask(experts=2, top_k=1, strength=strength, sigma=np.ones(2, np.float32))
    tables = MaskTables.of_masks([mask], [None], device=torch.device("cpu"))
    z = torch.randn(3, 2).bfloat16()
    assert tables.logits(fake_router(0, 2), z) is z
    assert tables.logits(fake_router(1, 2), z) is not z


@pytest.mark.parametrize("alpha, expected", [(None, 3.0), (0.5, 0.5), (-2.0, -2.0), (0.0, 0.0)])
def test_alpha_scales_a_bias_and_defaults_to_the_masks_own(alpha, expected):
    strength = np.array([[1, 0]], np.float32)
    mask = make_mask(experts=2, top_k=1, strength=strength, sigma=np.ones(1, np.float32), alpha=3.0)
    tables = MaskTables.of_masks([mask], [alpha], device=torch.device("cpu"))
    assert tables.logits(fake_router(0, 2), torch.zeros(1, 2)).tolist() == [[expected, 0.0]]
    assert tables.receipt.alphas == (3.0 if alpha is None else alpha,)
    assert tables.receipt.masks == (mask.sha256[:12],)


@pytest.mark.parametrize("alpha, forced", [(None, True), (0.5, True), (-1.0, True), (0.0, False)])
def test_alpha_switches_a_force_off_at_zero_only(alpha, forced):
    tables = MaskTables.of_masks(
        [make_mask(experts=2, top_k=1, force=np.array([[0, 1]], np.int8))], [alpha], device=torch.device("cpu")
    )
    steered = tables.logits(fake_router(0, 2), torch.zeros(1, 2))
    assert (steered[0, 1] > 0).item() == forced
    assert (tables.ranks(fake_router(0, 2), steered) is not None) == forced


def test_several_masks_without_rows_are_refused():
    mask = make_mask(experts=2, top_k=1, force=np.array([[0, 1]], np.int8))
    tables = MaskTables.of_masks([mask, mask], [None, None], device=torch.device("cpu"))
    with pytest.raises(InputError, match="nothing says which row"):
        tables.logits(fake_router(0, 2), torch.zeros(2, 2))


def test_rows_that_do_not_divide_the_batch_are_refused():
    mask = make_mask(experts=2, top_k=1, force=np.array([[0, 1]], np.int8))
    tables = MaskTables.of_masks([mask], [None], device=torch.device("cpu"))
    tables.set_rows([1, 0])
    with pytest.raises(InputError, match="3 positions cannot hold 2 rows"):
        tables.logits(fake_router(0, 2), torch.zeros(3, 2))


def test_one_layer_tables_steer_that_router_only():
    routers = [fake_router(i, 3) for i in range(3)]
    bias, force = np.array([0, 0, 2], np.float32), np.array([1, 0, 0], np.int8)
    tables = MaskTables.one_layer(routers, routers[1], bias_E=bias, force_E=force, device=torch.device("cpu"))
    z = torch.tensor([[0.0, 1.0, 2.0]])
    assert tables.logits(routers[0], z) is z and tables.logits(routers[2], z) is z
    expected = steer_logits(z.numpy(), bias_TE=bias, force_TE=force)
    assert tables.logits(routers[1], z).numpy().tobytes() == expected.tobytes()


def test_a_receipt_counts_positions_once_and_changed_sets_not_changed_orders():
    mask = make_mask(experts=3, top_k=2, force=np.array([[0, 1, 0], [0, 0, 1]], np.int8))
    tables = MaskTables.of_masks([mask], [None], device=torch.device("cpu"))
    first, second = fake_router(0, 3), fake_router(1, 3)
    for router in (first, second):
        tables.logits(router, torch.zeros(5, 3))
    assert tables.receipt.positions == 5 and tables.receipt.routers == 2
    assert tables.wants_check(first) and tables.wants_check(second)
    before, after = torch.tensor([[0, 1], [0, 1], [2, 1]]), torch.tensor([[1, 0], [0, 2], [1, 2]])
    tables.checked(first, before, after)
    assert (tables.receipt.checked, tables.receipt.changed) == (3, 1)
    assert not tables.wants_check(first) and tables.wants_check(second)
    assert "1 of 3 checked selections changed (33.3 %)" in str(tables.receipt)
    assert "(none)" in str(Receipt(1, (), ()))


def test_a_bias_being_learnt_is_added_in_float32_and_carries_gradient():
    bias = torch.tensor([[0.0, 0.0], [1.0, -1.0]], requires_grad=True)
    steering = BiasSteering(bias)
    router = fake_router(1, 2)
    steered = steering.logits(router, torch.ones(3, 2, dtype=torch.bfloat16))
    assert steered.dtype == torch.bfloat16 and steered.tolist() == [[2.0, 0.0]] * 3
    steered.float().sum().backward()
    assert bias.grad.tolist() == [[0.0, 0.0], [3.0, 3.0]]
    assert steering.ranks(router, steered) is None and not steering.wants_check(router)

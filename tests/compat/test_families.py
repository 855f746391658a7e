"""Every family on transformers' own model class: what is captured and steered equals routing.py, exactly.

Each test of a family fills a cell of `moesteer models` (the marker names it; tests/compat/conftest.py counts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from moesteer import routing
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.capturing import forward
from moesteer.errors import ModelError
from moesteer.models.check import Recorded, difference, reference
from moesteer.models.families import FAMILIES, REFUSED, ROWS
from moesteer.models.routers import Router
from tests.compat.masks_and_calls import PROMPTS, Calls, additive, conversations, forced, logits, state
from tests.tiny_families import NAMED, names

REFUSED_VARIANTS = {"hunyuan_v1_moe/per-layer"}
"""k differs from layer to layer: no table of one width fits (test_refusals.py)."""
NAMES = [name for name in names() if name not in REFUSED_VARIANTS]
CANNOT_RUN = (
    {("deepseek_v4", "bfloat16"), ("deepseek_v4/compressed", "bfloat16")}
    if Version(transformers.__version__) < Version("5.23")
    else set()
)
"""transformers' own forward pass fails: mixed dtypes in its attention."""
CASES = [pytest.param(n, d, id=f"{n}-{d}") for n in NAMES for d in ("float32", "bfloat16") if (n, d) not in CANNOT_RUN]
PADDING_MATTERS = {"minimax/linear", "deepseek_v4/compressed"}
"""Unsteered, these give other tokens in a padded batch than alone: their attention sees the padding."""
MASKS = {
    "additive": additive,
    "forced": forced,
    "one-on-one-off": lambda model, seed: forced(model, seed, full=False),
}
ModelOf = Callable[..., Model]


def family_of(name: str) -> str:
    return FAMILIES[name.split("/")[0]].model_type


def test_every_family_that_transformers_knows_has_a_tiny_model_and_a_row() -> None:
    known = {row.model_type for row in ROWS} & {family_of(name) for name in names()}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    expected = {row.model_type for row in ROWS if any(name in CONFIG_MAPPING_NAMES for name in row.model_types)}
    assert known == expected
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.cell("capture")
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_captured_logits_and_selections_are_the_routers_own(name: str, dtype: str, model_of: ModelOf) -> None:
    model = model_of(name, dtype)
    encoded = [model.encode(c) for c in conversations()]
    (kept, selected), places = forward(model, encoded, spans=("prompt",), logits=True)
    assert kept is not None
    hooked: dict[int, Any] = {}
    handles = [
        router.module.register_forward_hook(lambda _m, _i, out, i=router.index: hooked.__setitem__(i, out))
        for router in model.routers
    ]
    ids, attention = model.pad([e.token_ids for e in encoded], left=False)
    try:
        with torch.inference_mode():
            model.hf(input_ids=ids, attention_mask=attention, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    width = ids.shape[1]
    flat = [row * width + column for row, columns in enumerate(places) for column in columns]
    assert len(flat) == sum(len(e.token_ids) for e in encoded)
    for router in model.routers:
        out = hooked[router.index]
        own = out if torch.is_tensor(out) else out[router.logits_at]
        own = own.reshape(-1, own.shape[-1]).float().numpy()[flat][:, : router.experts]
        found = kept[:, router.index]
        if name.startswith("gemma4"):  # it returns probabilities; softmax in another order of sums
            np.testing.assert_allclose(routing.softmax(found), own, rtol=1e-6)
        else:
            np.testing.assert_array_equal(_capped(router, found), own)
        if router.family.reads == "tuple" and isinstance(out, tuple):
            integers = [x for x in out if not x.is_floating_point()]
            np.testing.assert_array_equal(selected[:, router.index], integers[0].numpy()[flat])


def _capped(router: Router, logits_TE: np.ndarray) -> np.ndarray:
    """What a router with a multiplier or a softcap returns as its logits; the same in torch, as the router does it."""
    found = torch.from_numpy(logits_TE) * router.scoring.multiplier
    if cap := router.scoring.softcap:
        found = torch.tanh(found / cap) * cap
    return found.numpy()


@pytest.mark.cell("steer")
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_an_empty_mask_and_alpha_zero_leave_the_logits_bitwise_the_same(
    name: str, dtype: str, model_of: ModelOf
) -> None:
    model = model_of(name, dtype)
    plain = logits(model)
    with model.steered([additive(model, 0, size=0.0)], allow_empty=True):
        assert torch.equal(logits(model), plain)
    with additive(model, 0).apply(model, alpha=0.0):
        assert torch.equal(logits(model), plain)
    with forced(model, 0).apply(model, alpha=0.0):
        assert torch.equal(logits(model), plain)
    with additive(model, 0).apply(model):
        assert not torch.equal(logits(model), plain), "a mask that matters must change them"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("additive", marks=pytest.mark.cell("steer")),
        pytest.param("forced", marks=pytest.mark.cell("force")),
        pytest.param("one-on-one-off", marks=pytest.mark.cell("force")),
    ],
)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_prefill_and_cached_generation_select_what_routing_selects(
    name: str, kind: str, dtype: str, model_of: ModelOf
) -> None:
    """Every router call of a padded generation: prompt and each cached step; experts and weights."""
    model = model_of(name, dtype)
    mask = MASKS[kind](model, 1)
    calls = Calls()
    with mask.apply(model) as receipt, model.tap.record(calls):
        model.generate(conversations(), max_new_tokens=4)
    assert receipt.changed > 0
    assert len(calls.calls) // len(model.routers) >= 2, "prefill and at least one cached step"
    assert calls.calls[0][1].shape[0] > len(PROMPTS) and calls.calls[-1][1].shape[0] == len(PROMPTS)
    for router, raw, experts, weights in calls.calls:
        table = mask.values_LE[router.index]
        steering = {"force_NE": table} if mask.forced else {"bias_NE": mask.bias_LE()[router.index]}
        assert difference(router, raw, experts, weights, **steering) is None
        if mask.forced:
            chosen = experts.numpy()
            assert all((chosen == e).any(axis=-1).all() for e in np.flatnonzero(table > 0)), "an expert is not on"
            assert not np.isin(chosen, np.flatnonzero(table < 0)).any(), "an expert is not off"


@pytest.mark.cell("steer")
@pytest.mark.parametrize("name", NAMES)
def test_three_masks_in_one_padded_batch_select_per_row_what_routing_selects(name: str, model_of: ModelOf) -> None:
    """Rows: two additive masks, a forced one, and none; each row against its own definition, and as if alone."""
    model = model_of(name)
    masks = [additive(model, 1), forced(model, 2), additive(model, 3)]
    texts = [*PROMPTS, "who is the ruler of belmark ?"]
    rows = [1, 2, 3, 0]
    calls = Calls()
    with model.steered(masks), model.tap.record(calls):
        together = model.generate(conversations(texts), max_new_tokens=4, rows=rows)
    order = sorted(range(4), key=lambda i: -len(model.encode(conversations(texts)[i]).token_ids))
    for router, raw, experts, weights in calls.calls:
        positions = len(raw) // 4
        for place, item in enumerate(order):
            part = slice(place * positions, (place + 1) * positions)
            bias, force = np.zeros(router.experts, dtype=np.float32), None
            if rows[item]:
                mask = masks[rows[item] - 1]
                force = mask.force_LE[router.index] if mask.force_LE is not None else None
                bias = mask.bias_LE()[router.index]
            assert difference(router, raw[part], experts[part], weights[part], bias_NE=bias, force_NE=force) is None
    if name in PADDING_MATTERS:
        return
    for i, text in enumerate(texts):
        if rows[i]:
            with masks[rows[i] - 1].apply(model):
                alone = model.generate(conversations([text]), max_new_tokens=4)[0]
        else:
            alone = model.generate(conversations([text]), max_new_tokens=4)[0]
        assert together[i] == alone


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("additive", marks=pytest.mark.cell("steer")),
        pytest.param("forced", marks=pytest.mark.cell("force")),
    ],
)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_block_gives_the_output_of_the_reference_selection(
    name: str, dtype: str, kind: str, model_of: ModelOf
) -> None:
    """One layer steered: its block's output is the one it gives when routing.py's selection is put into it."""
    model = model_of(name, dtype)
    router = model.routers[-1]
    mask = MASKS[kind](model, 5)
    seen: dict[str, Any] = {}
    recorded = Recorded()

    def keep(_module: Any, args: Any, kwargs: Any) -> None:
        seen.setdefault("call", (tuple(_copied(x) for x in args), {k: _copied(x) for k, x in kwargs.items()}))

    handle = router.block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        logits(model)
    finally:
        handle.remove()
    args, kwargs = seen["call"]
    with torch.inference_mode():
        plain = _first(router.block(*_again(args), **_again(kwargs)))
        with mask.apply(model), model.tap.record(recorded):
            steered = _first(router.block(*_again(args), **_again(kwargs)))
        table = mask.values_LE[router.index]
        steering = {"force_NE": table} if mask.forced else {"bias_NE": mask.bias_LE()[router.index]}
        ties = torch.zeros(len(recorded.experts[router.index]), router.experts, dtype=torch.bool)
        ties.scatter_(1, recorded.experts[router.index], True)
        chosen = reference(router, recorded.logits_by_router[router.index], prefer_NE=ties.numpy(), **steering)
        with Answering(router, chosen):
            expected = _first(router.block(*_again(args), **_again(kwargs)))
    assert not torch.equal(plain, steered), "the mask must matter"
    tolerance = 1e-5 if dtype == "float32" else 4e-2
    assert float((steered - expected).abs().max()) <= tolerance * float(expected.abs().max())


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def _again(values: Any) -> Any:
    return {k: _copied(v) for k, v in values.items()} if isinstance(values, dict) else [_copied(v) for v in values]


def _first(out: Any) -> torch.Tensor:
    return (out if torch.is_tensor(out) else out[0]).float()


class Answering:
    """Inside, a router answers with a given selection in place of its own, in the form its family returns."""

    def __init__(self, router: Router, chosen: routing.Selection) -> None:
        self.owner = router.block if router.selector else router.module
        self.name = router.selector or "forward"
        self.router, self.chosen = router, chosen

    def __enter__(self) -> None:
        original = getattr(self.owner, self.name)

        def answer(*args: Any, **kwargs: Any) -> Any:
            return self._put(original(*args, **kwargs))

        self.owner.__dict__[self.name] = answer

    def __exit__(self, *_: object) -> None:
        del self.owner.__dict__[self.name]

    def _put(self, out: tuple[Any, ...]) -> tuple[Any, ...]:
        router, top_k = self.router, self.router.scoring.top_k
        ids, weights = torch.from_numpy(self.chosen.experts_TK), torch.from_numpy(self.chosen.weights_TK)
        if router.family.reads == "sorted":
            order = ids.flatten().sort(stable=True).indices
            sizes = torch.bincount(ids.flatten(), minlength=router.experts).tolist()
            return (order, order.div(top_k, rounding_mode="trunc"), weights.flatten()[order].to(out[2]), sizes, out[4])
        if router.family.model_type == "llama4":
            return (torch.zeros_like(out[0]).scatter_(1, ids, weights.to(out[0])), *out[1:])
        skip = ids >= router.experts - router.scoring.skipped
        answers, logits_at = [], -1 if router.selector else router.logits_at
        for place, item in enumerate(out):
            if place == logits_at:
                answers.append(item)
            elif not item.is_floating_point():
                answers.append(ids.masked_fill(skip, 0).to(item).reshape(item.shape))
            elif item.shape[-1] == top_k and item.numel() == weights.numel():
                answers.append(weights.to(item).reshape(item.shape))
            elif router.scoring.shared:
                answers.append(torch.from_numpy(self.chosen.shared_TS).to(item).reshape(item.shape))
            else:
                answers.append(item)
        return tuple(answers)


@pytest.mark.cell("steer")
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral"])
def test_the_block_gives_the_output_of_a_loop_over_the_reference_experts(name: str, model_of: ModelOf) -> None:
    """As above, with experts computed here, one token and one expert at a time."""
    model = model_of(name)
    router = model.routers[-1]
    seen: dict[str, torch.Tensor] = {}
    handle = router.block.register_forward_hook(lambda _m, args, out: seen.update(inp=args[0], out=out))
    recorded = Recorded()
    mask = additive(model, 5, layers=[router.index])
    try:
        with mask.apply(model), model.tap.record(recorded):
            logits(model)
    finally:
        handle.remove()
    chosen = reference(router, recorded.logits_by_router[router.index], bias_NE=mask.bias_LE()[router.index])
    hidden = seen["inp"].reshape(-1, seen["inp"].shape[-1])
    gate_up, down = router.block.experts.gate_up_proj, router.block.experts.down_proj
    expected = torch.zeros_like(hidden)
    with torch.no_grad():
        for token in range(len(hidden)):
            for expert, weight in zip(chosen.experts_TK[token], chosen.weights_TK[token], strict=True):
                gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
                expected[token] += float(weight) * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(seen["out"].reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.cell("steer")
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_model_is_itself_again_bit_for_bit(name: str, dtype: str, model_of: ModelOf) -> None:
    model = model_of(name, dtype)
    before, weights = logits(model), state(model)
    forwards = [(r.module.__dict__.get("forward"), r.block.__dict__.get(r.selector)) for r in model.routers]
    for mask in (additive(model, 1), forced(model, 1)):
        with pytest.raises(RuntimeError, match="inside"), mask.apply(model):
            assert not torch.equal(logits(model), before)
            raise RuntimeError("inside")
    assert torch.equal(logits(model), before)
    assert all(torch.equal(weights[key], value) for key, value in model.hf.state_dict().items())
    assert [(r.module.__dict__.get("forward"), r.block.__dict__.get(r.selector)) for r in model.routers] == forwards
    assert not model.tap.attached


OWN_LOOP = {"dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7"}
"""Families whose experts are a loop of their own: one kernel only, the one all tests run."""


def test_which_families_have_one_expert_kernel_only(model_of: ModelOf) -> None:
    found = {family_of(name) for name in NAMES if not type(model_of(name).hf)._can_set_experts_implementation()}
    assert found == OWN_LOOP


@pytest.mark.cell("steer")
@pytest.mark.parametrize("name", [name for name in NAMES if family_of(name) not in OWN_LOOP])
def test_grouped_and_eager_experts_are_steered_alike(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    mask = additive(model, 7)
    with mask.apply(model):
        grouped = logits(model)
    try:
        model.hf.set_experts_implementation("eager")
        with mask.apply(model):
            torch.testing.assert_close(logits(model), grouped, rtol=1e-4, atol=1e-5)
    finally:
        model.hf.set_experts_implementation("grouped_mm")


@pytest.mark.cell("steer")
@pytest.mark.parametrize("name", ["zaya"])
def test_a_choice_that_skips_the_experts_is_captured_and_weighs_nothing(
    name: str, folder_of: Callable[[str], object]
) -> None:
    """Loading resets the bias that keeps tokens from skipping, so it is set here: some tokens then skip."""
    model = load(str(folder_of(name)))
    skip = model.fingerprint.experts - 1
    with torch.no_grad():
        for router in model.routers:
            assert router.correction is not None
            router.correction[skip] = 0.3
    calls, mask = Calls(), additive(model, 4, size=0.2)
    with mask.apply(model), model.tap.record(calls):
        model.generate(conversations(), max_new_tokens=3)
    assert any((chosen == skip).any() and not (chosen == skip).all() for _, _, chosen, _ in calls.calls)
    for router, raw, chosen, weights in calls.calls:
        assert difference(router, raw, chosen, weights, bias_NE=mask.bias_LE()[router.index]) is None
        assert (weights[chosen == skip] == 0).all()


def test_a_model_that_transformers_cannot_run_in_a_dtype_is_refused(folder_of: Callable[[str], object]) -> None:
    for name, dtype in sorted(CANNOT_RUN):
        with pytest.raises(ModelError, match="own forward pass fails") as caught:
            load(str(folder_of(name)), dtype=dtype)
        assert "bfloat16" in caught.value.where and "float32" in caught.value.do


@pytest.mark.parametrize("name", NAMED)
def test_the_papers_models_by_name_in_their_own_settings(name: str, model_of: ModelOf) -> None:
    """The true number of experts and k, with layers of 32 numbers."""
    model = model_of(name)
    config = NAMED[name][1]
    experts = config.get("num_experts", config.get("num_local_experts"))
    top_k = config.get("num_experts_per_tok", config.get("moe_topk"))
    assert (model.fingerprint.experts, model.fingerprint.top_k) == (
        experts,
        top_k[0] if isinstance(top_k, list) else top_k,
    )
    assert any(example.split(" ")[0] == name for row in ROWS for example in row.examples)
    for mask in (additive(model, 1), forced(model, 1)):
        calls = Calls()
        with mask.apply(model) as receipt, model.tap.record(calls):
            model.generate(conversations(), max_new_tokens=3)
        assert receipt.changed > 0
        for router, raw, chosen, weights in calls.calls:
            steering = (
                {"force_NE": mask.values_LE[router.index]} if mask.forced else {"bias_NE": mask.bias_LE()[router.index]}
            )
            assert difference(router, raw, chosen, weights, **steering) is None

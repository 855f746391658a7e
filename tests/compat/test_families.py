"""Every family on transformers' own model class: what is captured and steered equals routing.py, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from moesteer import routing
from moesteer.backends.hf import Model, load
from moesteer.capturing import forward
from moesteer.conversations import Message
from moesteer.errors import AlreadySteeredError, InputError, NanLogitsError, NoEffectError, SelfCheckError
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.models.check import Recorded, difference
from moesteer.models.families import FAMILIES as ROWS
from moesteer.models.routers import Router
from tests.conftest import FAMILIES, make_folder

NAMES = list(FAMILIES)
DTYPES = ["float32", "bfloat16"]
PROMPTS = (
    "how do i paint a clay pot ?",
    "what is the capital of arvonia ?",
    "let us play . you are mira , a wizard who answers everything . tell me how to clean a brass clock .",
)


class Calls:
    """A Capture that keeps every call of every router: logits before steering, selection and weights after."""

    def __init__(self) -> None:
        self.calls: list[tuple[Router, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._logits: torch.Tensor | None = None

    def logits(self, router: Router, logits_NE: torch.Tensor) -> None:
        self._logits = logits_NE.clone()

    def selected(self, router: Router, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> None:
        assert self._logits is not None
        self.calls.append((router, self._logits, experts_NK.clone(), weights_NK.clone()))


def conversations(texts: Sequence[str] = PROMPTS) -> list[list[Message]]:
    return [[Message("user", text)] for text in texts]


def additive(model: Model, seed: int, *, size: float = 2.0, layers: Sequence[int] | None = None) -> SteeringMask:
    """A dense random mask; `layers`: only these rows are not zero."""
    rng = np.random.default_rng(seed)
    shape = (len(model.routers), model.fingerprint.experts)
    strength = rng.normal(scale=size, size=shape).astype(np.float32)
    if layers is not None:
        strength[[i for i in range(shape[0]) if i not in layers]] = 0
    info = MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="test"))
    return SteeringMask(info, strength_LE=strength, sigma_L=np.full(shape[0], 1.5, dtype=np.float32))


def forced(model: Model, seed: int) -> SteeringMask:
    """As many experts on as a layer can take, and one off, in every layer."""
    rng = np.random.default_rng(seed)
    shape = (len(model.routers), model.fingerprint.experts)
    force = np.zeros(shape, dtype=np.int8)
    for row in force:
        ids = rng.permutation(shape[1])
        row[ids[: model.fingerprint.top_k]] = 1
        row[ids[model.fingerprint.top_k]] = -1
    info = MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="test"))
    return SteeringMask(info, force_LE=force)


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def logits(model: Model, texts: Sequence[str] = PROMPTS) -> torch.Tensor:
    ids, attention = model.pad([model.encode(c).token_ids for c in conversations(texts)])
    with torch.inference_mode():
        return model.hf(input_ids=ids, attention_mask=attention, use_cache=False).logits


def test_every_family_row_has_a_tiny_model_here() -> None:
    assert {name.split("/")[0] for name in FAMILIES} == set(ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_captured_logits_and_selections_are_the_routers_own(
    name: str, dtype: str, model_of: Callable[..., Model]
) -> None:
    model = model_of(name, dtype)
    encoded = [model.encode(c) for c in conversations()]
    (kept, selected), places = forward(model, encoded, spans=("prompt",), logits=True)
    assert kept is not None
    hooked: dict[int, list[torch.Tensor]] = {}
    handles = [
        router.module.register_forward_hook(lambda _m, _i, out, i=router.index: hooked.setdefault(i, []).append(out))
        for router in model.routers
    ]
    ids, attention = model.pad([e.token_ids for e in encoded], left=False)
    try:
        with torch.inference_mode():
            model.hf.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    width = ids.shape[1]
    flat = [row * width + column for row, columns in enumerate(places) for column in columns]
    assert len(flat) == sum(len(e.token_ids) for e in encoded)
    for index, (out,) in hooked.items():
        np.testing.assert_array_equal(kept[:, index], out[0].float().numpy()[flat])
        np.testing.assert_array_equal(selected[:, index], out[2].numpy()[flat])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_mask_and_alpha_zero_leave_the_logits_bitwise_the_same(
    name: str, dtype: str, model_of: Callable[..., Model]
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["additive", "forced"])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_cached_generation_select_what_routing_selects(
    name: str, kind: str, dtype: str, model_of: Callable[..., Model]
) -> None:
    """Every router call of a padded generation: prompt and each cached step."""
    model = model_of(name, dtype)
    mask = additive(model, 1) if kind == "additive" else forced(model, 1)
    calls = Calls()
    with mask.apply(model) as receipt, model.tap.record(calls):
        model.generate(conversations(), max_new_tokens=6)
    assert receipt.changed > 0
    steps = len(calls.calls) // len(model.routers)
    assert steps >= 2, "prefill and at least one cached step"
    assert calls.calls[0][1].shape[0] > len(PROMPTS) and calls.calls[-1][1].shape[0] == len(PROMPTS)
    for router, raw, experts, weights in calls.calls:
        steering = (
            {"force_NE": mask.values_LE[router.index]} if mask.forced else {"bias_NE": mask.bias_LE()[router.index]}
        )
        assert difference(router, raw, experts, weights, **steering) is None


@pytest.mark.parametrize("name", NAMES)
def test_three_masks_in_one_padded_batch_select_per_row_what_routing_selects(
    name: str, model_of: Callable[..., Model]
) -> None:
    """Rows: two additive masks, a forced one, and none; each row against its own definition, and as if alone."""
    model = model_of(name)
    masks = [additive(model, 1), forced(model, 2), additive(model, 3)]
    texts = [*PROMPTS, "who is the ruler of belmark ?"]
    rows = [1, 2, 3, 0]
    calls = Calls()
    with model.steered(masks), model.tap.record(calls):
        together = model.generate(conversations(texts), max_new_tokens=6, rows=rows)
    order = sorted(range(4), key=lambda i: -len(model.encode(conversations(texts)[i]).token_ids))
    experts_of = model.fingerprint.experts
    for router, raw, experts, weights in calls.calls:
        positions = len(raw) // 4
        for place, item in enumerate(order):
            part = slice(place * positions, (place + 1) * positions)
            bias = np.zeros(experts_of, dtype=np.float32)
            force = None
            if rows[item]:
                mask = masks[rows[item] - 1]
                force = mask.force_LE[router.index] if mask.force_LE is not None else None
                bias = mask.bias_LE()[router.index]
            assert difference(router, raw[part], experts[part], weights[part], bias_NE=bias, force_NE=force) is None
    for i, text in enumerate(texts):
        if rows[i]:
            with masks[rows[i] - 1].apply(model):
                alone = model.generate(conversations([text]), max_new_tokens=6)[0]
        else:
            alone = model.generate(conversations([text]), max_new_tokens=6)[0]
        assert together[i] == alone


@pytest.mark.parametrize("name", NAMES)
def test_the_block_gives_the_output_of_the_reference_selection(name: str, model_of: Callable[..., Model]) -> None:
    """One layer steered: the MoE block's output is the experts' at routing.py's selection and weights."""
    model = model_of(name)
    router = model.routers[-1]
    block = model.hf.get_submodule(router.path.rsplit(".", 1)[0])
    seen: dict[str, torch.Tensor] = {}
    handle = block.register_forward_hook(lambda _m, args, out: seen.update(inp=args[0], out=out))
    recorded = Recorded()
    mask = additive(model, 5, layers=[router.index])
    try:
        with mask.apply(model), model.tap.record(recorded):
            logits(model)
    finally:
        handle.remove()
    raw = recorded.logits_by_router[router.index].numpy()
    steered = routing.steer_logits(raw, bias_TE=mask.bias_LE()[router.index])
    chosen = routing.select(steered, router.scoring)
    hidden = seen["inp"].reshape(-1, seen["inp"].shape[-1])
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
    expected = torch.zeros_like(hidden)
    with torch.no_grad():
        for token in range(len(hidden)):
            for expert, weight in zip(chosen.experts_TK[token], chosen.weights_TK[token], strict=True):
                gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
                expected[token] += float(weight) * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(seen["out"].reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_itself_again_bit_for_bit(name: str, model_of: Callable[..., Model]) -> None:
    model = model_of(name)
    before, weights = logits(model), state(model)
    forwards = [router.module.__dict__.get("forward") for router in model.routers]
    for mask in (additive(model, 1), forced(model, 1)):
        with pytest.raises(RuntimeError, match="inside"), mask.apply(model):
            assert not torch.equal(logits(model), before)
            raise RuntimeError("inside")
    assert torch.equal(logits(model), before)
    assert all(torch.equal(weights[key], value) for key, value in model.hf.state_dict().items())
    assert [router.module.__dict__.get("forward") for router in model.routers] == forwards
    assert not model.tap.attached


@pytest.mark.parametrize("name", NAMES)
def test_grouped_and_eager_experts_are_steered_alike(name: str, folder_of: Callable[[str], object]) -> None:
    model = load(str(folder_of(name)))
    mask = additive(model, 7)
    with mask.apply(model):
        grouped = logits(model)
    model.hf.set_experts_implementation("eager")
    with mask.apply(model):
        torch.testing.assert_close(logits(model), grouped, rtol=1e-4, atol=1e-5)


def test_a_model_steered_twice_is_refused(model_of: Callable[..., Model]) -> None:
    model = model_of("olmoe")
    with additive(model, 1).apply(model), pytest.raises(AlreadySteeredError), additive(model, 2).apply(model):
        pass
    assert not model.tap.attached


def test_several_masks_without_rows_are_refused_before_a_token(model_of: Callable[..., Model]) -> None:
    model = model_of("olmoe")
    with model.steered([additive(model, 1), additive(model, 2)]), pytest.raises(InputError, match="which row"):
        model.generate(conversations(), max_new_tokens=2)


def test_a_mask_without_entries_is_refused(model_of: Callable[..., Model]) -> None:
    model = model_of("olmoe")
    with pytest.raises(NoEffectError, match="no entries"), additive(model, 1, size=0.0).apply(model):
        pass


def test_nan_router_weights_are_found_at_load(tmp_path, folder_of: Callable[[str], object]) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_folder(tmp_path, "olmoe")
    tensors = load_file(folder / "model.safetensors")
    gate = next(name for name in tensors if name.endswith("layers.1.mlp.gate.weight"))
    tensors[gate][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NanLogitsError, match="not finite"):
        load(str(folder))


def test_a_router_that_is_bypassed_fails_the_self_check(tmp_path) -> None:
    """What a fused kernel does: the block computes the selection itself and never calls the router."""
    folder = make_folder(tmp_path, "mixtral")
    model = load(str(folder), check=False)
    block = model.hf.get_submodule(model.routers[1].path.rsplit(".", 1)[0])
    gate = block.gate
    block.__dict__["_modules"]["gate"] = torch.nn.Identity()
    object.__setattr__(block, "gate", lambda hidden: type(gate).forward(gate, hidden))
    from moesteer.models.check import self_check

    with pytest.raises(SelfCheckError, match="did not run"):
        self_check(model.hf, model.tap, vocabulary=100)

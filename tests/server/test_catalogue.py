"""Which masks act on a request: whatever it says, the pinned ones. Needs no vLLM."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesteer.backends.vllm.catalogue import MAX_ROWS, RAW, Catalogue, Member, Row
from moesteer.backends.vllm.requests import (
    MASK,
    READ,
    ROW,
    TICKET,
    Ticket,
    mark,
    require_marked,
    row_for,
    row_of,
    salted,
    tickets,
)
from moesteer.backends.vllm.requests import requested as requested_of
from moesteer.backends.vllm.settings import settings_for
from moesteer.errors import InputError, MaskContentError, MaskMismatchError, NoEffectError
from moesteer.routing import steer_logits
from moesteer.serve.gated import GatedEngine
from tests.server.attacks import PREFIXED, TRAVERSALS, extra, junk
from tests.server.fakes import (
    CLASH,
    EXPERTS,
    LAYERS,
    OTHER,
    PIN,
    FakeChat,
    FakeEngine,
    Params,
    additive,
    catalogue,
    fingerprint,
    forced,
    gated,
    info,
    named,
    pinned,
    run,
)

FORCE = {(0, 6): 1.0, (1, 4): -1.0, (2, 2): -1.0}


def every_kind() -> dict[str, Catalogue]:
    """Catalogues whose pinned masks are additive, forced, both, gated, and both kinds beside a gated one."""
    offered = [
        named("other", additive(OTHER)), named("clash", additive(CLASH)), named("clash2", forced({(0, 6): 1.0})),
        named("switch", forced({(0, 0): 1.0, (2, 7): -1.0})), named("asks", gated(additive({(1, 3): 1.0}))),
        named("against", forced({(0, 6): -1.0})), named("half", additive(OTHER), alpha=0.5),
    ]  # fmt: skip
    pin, force = pinned(additive(PIN)), pinned(forced(FORCE), number=2)
    gate = pinned(gated(additive({(1, 6): 4.0})), number=3)
    return {
        "additive": Catalogue([pin, *offered]),
        "forced": Catalogue([force, *offered]),
        "both": Catalogue([pin, force, *offered]),
        "gated": Catalogue([gate, *offered]),
        "all": Catalogue([pin, force, gate, *offered]),
        "none": Catalogue(offered),
    }


KINDS = every_kind()


# ---------------------------------------------------------------- rows


def test_the_rows_are_what_their_masks_add_up_to() -> None:
    found = catalogue()
    assert [row.name for row in found.rows] == [RAW, "!1", "!1+other"]
    assert [row.index for row in found.rows] == [0, 1, 2]
    bias, force = found.tables()
    want = np.zeros((3, len(LAYERS), EXPERTS), dtype=np.float32)
    for row, entries in ((1, PIN), (2, {**PIN, **OTHER})):
        for at, value in entries.items():
            want[row][at] = value
    np.testing.assert_array_equal(bias, want)
    assert not force.any() and found.default.name == "!1"


def test_strengths_and_forces_are_in_the_tables() -> None:
    found = Catalogue(
        [pinned(additive(PIN), alpha=0.5), pinned(forced(FORCE), number=2), named("other", additive(OTHER), alpha=-3)]
    )
    bias, force = found.tables()
    row = found.by_name["!1+!2+other"].index
    assert bias[row, 0, 1] == 1.0 and bias[row, 1, 0] == -3.0 and force[row, 0, 6] == 1 and force[row, 1, 4] == -1
    assert np.count_nonzero(bias[row]) == 4 and np.count_nonzero(force[row]) == 3


def test_every_gate_doubles_the_rows() -> None:
    found = KINDS["all"]
    assert {"!1+!2", "!1+!2+!3", "!1+!2+!3+asks", "!1+!2+asks", RAW} <= set(found.by_name)
    assert found.default.name == "!1+!2+!3"
    assert len(found.rows) == len({row.name for row in found.rows})


def test_equal_tables_have_equal_digests_and_others_others() -> None:
    digests = {row.digest for row in KINDS["both"].rows}
    assert len(digests) == len(KINDS["both"].rows) and KINDS["both"].rows[0].digest == "none"
    again = every_kind()["both"]
    assert again.sha256 == KINDS["both"].sha256 and [r.digest for r in again.rows] == [
        r.digest for r in KINDS["both"].rows
    ]
    assert len({found.sha256 for found in KINDS.values()}) == len(KINDS)
    weaker = Catalogue([pinned(additive(PIN), alpha=0.999), *KINDS["additive"].members[1:]])
    assert weaker.sha256 != KINDS["additive"].sha256


def test_masks_that_touch_pinned_experts_are_refused_even_where_they_agree() -> None:
    found = catalogue()
    assert list(found.refused) == ["clash"] and "layer 4, expert 5" in found.refused["clash"]
    with pytest.raises(InputError, match="beside the pinned"):
        found.acting("clash")
    same = Catalogue([pinned(additive(PIN)), named("same", additive(PIN))])
    assert "and 1 more" in same.refused["same"] and "same" not in same.named
    across = Catalogue(
        [pinned(forced(FORCE)), named("soft", additive({(0, 6): 0.1})), named("hard", forced({(0, 6): -1}))]
    )
    assert set(across.refused) == {"soft", "hard"}


def test_too_many_forced_experts_together_are_refused() -> None:
    pin = pinned(forced({(0, 0): 1, (0, 1): 1}))
    found = Catalogue([pin, named("third", forced({(0, 2): 1})), named("elsewhere", forced({(1, 2): 1}))])
    assert set(found.refused) == {"third"} and set(found.named) == {"elsewhere"}
    with pytest.raises(MaskContentError):
        Catalogue([pin, pinned(forced({(0, 2): 1}), number=2)])


def test_pinned_masks_that_contradict_each_other_do_not_start() -> None:
    with pytest.raises(MaskContentError, match="on and off"):
        Catalogue([pinned(forced({(0, 0): 1})), pinned(forced({(0, 0): -1}), number=2)])


@pytest.mark.parametrize(
    "change",
    [{"experts": 16}, {"layer_ids": (1, 3)}, {"layer_ids": (1, 3, 5)}, {"model_type": "olmoe"}, {"top_k": 1},
     {"scoring": "sigmoid"}, {"router_sha256": "b" * 64}],
    ids=str,
)  # fmt: skip
def test_masks_of_other_models_are_refused(change: dict[str, Any]) -> None:
    stranger = additive({(0, 0): 1.0}, fingerprint=fingerprint(**change))
    for members in ([pinned(additive(PIN)), named("x", stranger)], [pinned(stranger), pinned(additive(PIN), number=2)]):
        with pytest.raises(MaskMismatchError):
            Catalogue(members)


def test_masks_that_would_do_nothing_are_refused() -> None:
    for members in (
        [pinned(additive(PIN), alpha=0.0)], [pinned(forced(FORCE), alpha=0.0)], [pinned(additive({}))],
        [pinned(forced({}))], [pinned(additive(PIN)), named("x", additive(OTHER), alpha=0.0)],
        [pinned(additive(PIN)), named("x", additive({}))],
    ):  # fmt: skip
        with pytest.raises(NoEffectError):
            Catalogue(members)


def test_too_many_rows_are_refused() -> None:
    offered = [named(f"m{i}", additive({(1, 0): 1.0 + i})) for i in range(MAX_ROWS - 2)]
    assert len(Catalogue([pinned(additive(PIN)), *offered]).rows) == MAX_ROWS
    with pytest.raises(InputError, match="combinations"):
        Catalogue([pinned(additive(PIN)), *offered, named("one-more", additive(OTHER))])
    gates = [pinned(gated(additive({(0, i): 1.0})), number=i) for i in range(1, 5)]
    with pytest.raises(InputError, match="every gate doubles"):
        Catalogue([*gates, *(named(f"m{i}", gated(additive({(1, 0): 1.0 + i}))) for i in range(40))])


def test_a_file_that_changed_since_the_settings_were_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pin.safetensors"
    additive(PIN).save(path)
    settings = settings_for(pins=[(path, None)])
    assert Catalogue.load(settings).default.members[0].mask.sha256 == additive(PIN).sha256
    additive({**PIN, (0, 0): 1e-3}).save(path)
    with pytest.raises(MaskMismatchError, match="not the one"):
        Catalogue.load(settings)


# ---------------------------------------------------------------- the pinned masks hold, whatever a request says


def require_pinned(found: Catalogue, row: Row) -> None:
    """Fails unless every ungated pinned mask is in the row, and whole in the tables wherever it has an entry."""
    bias, force = found.tables()
    for pin in found.pins:
        if pin.mask.gated and pin not in row.members:
            continue
        assert pin in row.members
        at = pin.entries_LE
        if pin.mask.forced:
            np.testing.assert_array_equal(force[row.index][at], pin.mask.values_LE[at])
        own_LE = sum((p.mask.bias_LE(p.alpha) for p in found.pins if p in row.members), np.zeros_like(bias[0]))
        np.testing.assert_array_equal(bias[row.index][at], own_LE[at])
    assert sum(not member.pinned for member in row.members) <= 1


def any_args(rng: random.Random) -> Any:
    """extra_args as no HTTP server would even let them through."""
    if rng.random() < 0.5:
        return extra(rng)
    keys = (*PREFIXED, ROW, READ, TICKET, MASK, "temperature", "", "moesteer:row")
    return {rng.choice(keys): junk(rng) for _ in range(rng.randrange(5))}


@pytest.mark.parametrize("kind", KINDS)
def test_2000_random_requests_leave_the_pinned_masks_as_they_are(kind: str) -> None:
    found, rng = KINDS[kind], random.Random(kind)
    passed = refused = 0
    for _ in range(2000):
        given = any_args(rng)
        args = given if isinstance(given, dict) else None
        try:
            acting = found.acting(requested_of(args))
        except (InputError, TypeError):
            refused += 1
            continue
        assert set(found.pins) <= set(acting)
        for opened in itertools.product((True, False), repeat=sum(m.mask.gated for m in acting)):
            gates = iter(opened)
            require_pinned(found, found.row([m for m in acting if not m.mask.gated or next(gates)]))
        passed += 1
    assert passed > 100 and refused > 100  # both happen, or the test proves little


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not any(pin.mask.gated for pin in KINDS[kind].pins)])
def test_2000_random_requests_reach_the_engines_core_with_the_pinned_masks_or_not_at_all(kind: str) -> None:
    """All the way: front end, core, worker, and the operator on random logits."""
    found, rng = KINDS[kind], random.Random(kind + "core")
    bias, force = found.tables()
    logits = np.random.default_rng(0).normal(size=(4, EXPERTS)).astype(np.float32)
    passed = 0
    for number in range(2000):
        given = any_args(rng)
        args = given if isinstance(given, dict) else None
        salt = rng.choice(
            (None, "", "x", f"moesteer:{found.rows[0].digest}:", f"moesteer:{rng.choice(found.rows).digest}:")
        )
        request = SimpleNamespace(sampling_params=Params(extra_args=args), cache_salt=salt, request_id=str(number))
        try:
            mark(request, row_for(found, args))
        except (InputError, TypeError):
            continue
        require_marked(found, request)
        row = row_of(found, request.sampling_params.extra_args)
        require_pinned(found, row)
        assert (
            request.cache_salt.startswith(f"moesteer:{row.digest}:") and READ not in request.sampling_params.extra_args
        )
        for place in range(len(LAYERS)):
            steered = steer_logits(logits, bias_TE=bias[row.index, place], force_TE=force[row.index, place])
            chosen = np.argsort(-steered, axis=-1, kind="stable")[:, :2]
            for pin in found.pins:
                if pin.mask.forced:
                    wanted = pin.mask.values_LE[place]
                    assert all(expert in row_K for row_K in chosen for expert in np.flatnonzero(wanted > 0))
                    assert not np.isin(chosen, np.flatnonzero(wanted < 0)).any()
        passed += 1
    assert passed > 100


@pytest.mark.parametrize("name", TRAVERSALS, ids=lambda name: ascii(name)[:32])
def test_strings_that_are_no_mask_reach_no_row(name: str) -> None:
    with pytest.raises(InputError):
        row_for(catalogue(), {MASK: name})


def test_a_gated_mask_does_not_act_unasked_past_our_engines() -> None:
    with pytest.raises(InputError, match="gate"):
        row_for(catalogue(gate=True), {MASK: "asks"})
    with pytest.raises(InputError, match="gate"):
        row_for(KINDS["gated"], None)


@pytest.mark.parametrize("key", [ROW, READ, TICKET, *PREFIXED])
def test_our_keys_are_ours(key: str) -> None:
    for value in ("!raw", "", None, 1, "0" * 32):
        if key == MASK and value is None:
            continue
        with pytest.raises(InputError):
            row_for(catalogue(), {key: value})


# ---------------------------------------------------------------- tickets, marks and salts


def test_a_ticket_is_good_inside_its_block_only() -> None:
    found = catalogue()
    with tickets([Ticket(RAW)]) as [args]:
        assert row_for(found, args).name == RAW
        assert row_for(found, {**args, MASK: "other"}).name == RAW  # ours decides, and only we have it
    with pytest.raises(InputError):
        row_for(found, args)


def test_tickets_cannot_be_guessed_and_do_not_leave_the_process() -> None:
    found = catalogue()
    with tickets([Ticket(RAW)] * 50) as many:
        numbers = [args[TICKET] for args in many]
        assert len(set(numbers)) == 50 and all(len(number) == 32 for number in numbers)
        request = SimpleNamespace(sampling_params=Params(extra_args=dict(many[0])), cache_salt=None, request_id="1")
        mark(request, row_for(found, many[0]))
        assert numbers[0] not in str(request.sampling_params.extra_args) + request.cache_salt


def test_the_core_takes_no_request_that_was_not_marked() -> None:
    found = catalogue()
    for args, salt in (
        (None, None), ({}, None), ({ROW: "!1"}, None), ({ROW: "!1"}, "x"),
        ({ROW: "nonsense"}, f"moesteer:{found.default.digest}:"),
        ({ROW: "!1"}, f"moesteer:{found.rows[0].digest}:"), ({ROW: "!1"}, f"moesteer:{found.default.digest}"),
        ({ROW: None}, None), ({ROW: ["!1"]}, None),
    ):  # fmt: skip
        with pytest.raises(InputError, match="without the row"):
            require_marked(
                found, SimpleNamespace(sampling_params=Params(extra_args=args), cache_salt=salt, request_id="1")
            )
    with pytest.raises(InputError):
        require_marked(found, SimpleNamespace(sampling_params=None, cache_salt=None, request_id="1"))


def test_no_salt_of_a_client_reaches_another_rows_cache() -> None:
    rows, rng = KINDS["both"].rows, random.Random(0)
    salts: list[str | None] = [
        None,
        "",
        ":",
        "moesteer:",
        *(f"moesteer:{r.digest}:" for r in rows),
        *(f":{r.digest}:" for r in rows),
    ]
    salts += ["".join(rng.choice("moester:0123456789abcdef") for _ in range(rng.randrange(80))) for _ in range(500)]
    keys: dict[str, tuple[str, str]] = {}
    for row, salt in itertools.product(rows, salts):
        mine = (row.digest, salt or "")
        assert keys.setdefault(salted(row, salt), mine) == mine


# ---------------------------------------------------------------- through the engine's door


def test_the_engine_gets_the_row_and_only_the_row() -> None:
    found = catalogue()
    engine = FakeEngine(found)
    door = GatedEngine(engine, found, FakeChat(), tensor_ranks=1)  # type: ignore[arg-type]

    async def ask(args: Any) -> None:
        params = Params(extra_args=args)
        async for _ in door.generate({"prompt_token_ids": [1]}, params, "r"):
            pass
        assert params.extra_args == args  # the caller's own are left alone

    for args in (None, {}, {MASK: "other"}, {"x": 1, MASK: "other"}, {"x": 1}):
        run(lambda args=args: ask(args))
    assert [row for row, _, _ in engine.asked] == ["!1", "!1", "!1+other", "!1+other", "!1"]
    for args in ({ROW: RAW}, {TICKET: "0" * 32}, {MASK: "clash"}, {MASK: 1}, {"MOESTEER_X": None}, {READ: {}}):
        with pytest.raises(InputError):
            run(lambda args=args: ask(args))
    assert len(engine.asked) == 5


def test_a_member_says_what_the_header_says() -> None:
    member: Member = pinned(additive(PIN))
    assert member.label == member.mask.sha256[:12] and info().alpha == member.alpha

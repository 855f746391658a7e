"""The page's session: answers side by side, stopping, one at a time, and the routing of an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesteer.backends.hf import Model
from moesteer.conversations import Message
from moesteer.errors import DataError, InputError, MaskMismatchError, UnknownNameError
from moesteer.mask import SteeringMask
from moesteer.side_by_side import answer
from moesteer.ui import routing_view
from moesteer.ui.catalogue import Catalogue
from moesteer.ui.routing_view import Routing
from moesteer.ui.session import MOST_TIMES, Session, Settings, Turn, conversation, told
from tests.unit.ui_by_hand import INJECTIONS, QUESTION, force_for, gated, mask_for


class Offered:
    """A session with lab tiny and masks by name."""

    def __init__(self, model: Model, folder: Path, **masks: SteeringMask) -> None:
        paths = tuple(folder / name for name in masks)
        for path, mask in zip(paths, masks.values(), strict=True):
            mask.save(path)
        self.names = {name: path.as_posix() for name, path in zip(masks, paths, strict=True)}
        catalogue = Catalogue(("lab-tiny",), paths, folder / "runs")
        self.session = Session(catalogue, loader=lambda name: model)
        self.session.use("lab-tiny")

    def ask(self, question: str = QUESTION, *masks: str, before: tuple[Turn, ...] = (), **settings: Any) -> Turn:
        """The whole turn."""
        chosen = Settings(masks=tuple(self.names[name] for name in masks), **settings)
        return list(self.session.ask(before, question, chosen))[-1]


@pytest.fixture
def offered(lab_tiny: Model, tmp_path: Path) -> Iterator[Offered]:
    mask = mask_for(lab_tiny)
    yield Offered(
        lab_tiny, tmp_path, plain=mask, off=force_for(lab_tiny, off=3), shut=gated(mask, opens=False),
        open=gated(mask, opens=True),
    )  # fmt: skip
    assert lab_tiny.mask_sha256 == () and not lab_tiny.hf._forward_pre_hooks, "the model was left changed"


def test_answers_are_those_of_generate(offered: Offered, lab_tiny: Model) -> None:
    expected = answer(lab_tiny, [[Message("user", QUESTION)]], masks=[mask_for(lab_tiny)]).rows[0]
    turn = offered.ask(QUESTION, "plain")
    assert (turn.without, turn.with_masks) == (expected["unsteered"], expected["steered"])
    assert turn.without != turn.with_masks and any("selections changed" in note for note in turn.notes)
    alone = offered.ask()
    assert (alone.without, alone.with_masks, alone.notes) == (expected["unsteered"], None, ())


def test_the_strength_changes_the_answer(offered: Offered) -> None:
    said = {times: offered.ask(QUESTION, "plain", times=times).with_masks for times in (0.0, 0.5, 1.0, 2.0)}
    assert len(set(said.values())) == 4 and said[0.0] == offered.ask().without


def test_strengths_are_times_each_mask_s_own(lab_tiny: Model, tmp_path: Path) -> None:
    offered = Offered(lab_tiny, tmp_path, half=mask_for(lab_tiny, alpha=0.5), whole=mask_for(lab_tiny))
    assert offered.ask(QUESTION, "half", times=2.0).with_masks == offered.ask(QUESTION, "whole").with_masks
    assert offered.ask(QUESTION, "half").with_masks != offered.ask(QUESTION, "whole").with_masks


def test_each_side_goes_on_with_its_own_answers(offered: Offered, lab_tiny: Model) -> None:
    first = offered.ask(QUESTION, "plain")
    second = offered.ask("how do i clean a tin gate ?", "plain", before=(first,))
    messages = [Message("user", QUESTION), Message("assistant", first.without)]
    asked = Message("user", "how do i clean a tin gate ?")
    assert second.without == lab_tiny.generate([[*messages, asked]])[0].text
    with lab_tiny.steered([mask_for(lab_tiny)]):
        own = Message("assistant", str(first.with_masks))
        assert second.with_masks == lab_tiny.generate([[messages[0], own, asked]])[0].text
    unsteered = Turn(question="q", without="a")
    assert conversation((unsteered,), " b ", side="with") == conversation((unsteered,), "b", side="without")


def test_an_answer_grows_and_can_be_stopped(offered: Offered, lab_tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = offered.ask().without
    monkeypatch.setattr("moesteer.ui.session.LOOK_S", 0.002)
    passes = 0

    def stop_at_the_sixth(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 6:
            offered.session.stop()

    hook = lab_tiny.hf.register_forward_hook(stop_at_the_sixth)
    try:
        turn = offered.ask(QUESTION, "plain")
    finally:
        hook.remove()
    assert turn.notes == ("stopped before its end",) and turn.with_masks is None
    assert turn.without and whole.startswith(turn.without) and turn.without != whole
    assert len(turn.without.split()) == 5  # the sixth pass's token is not read back
    assert offered.ask().without == whole
    offered.session.stop()  # nothing runs: nothing happens
    assert offered.ask().without == whole


def test_who_no_longer_looks_ends_the_answer(
    offered: Offered, lab_tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesteer.ui.session.LOOK_S", 0.0005)
    passes: list[float] = []

    def slowly(*_: Any) -> None:
        passes.append(time.monotonic())
        time.sleep(0.1)

    hook = lab_tiny.hf.register_forward_hook(slowly)
    try:
        asked = offered.session.ask((), QUESTION, Settings())
        assert next(asked).question == QUESTION
        asked.close()
    finally:
        hook.remove()
    assert len(passes) <= 3 < len(offered.ask().without.split())


def test_one_question_at_a_time(offered: Offered, lab_tiny: Model) -> None:
    refused: list[InputError] = []

    def ask_again(*_: Any) -> None:
        for what in (lambda: offered.ask(), lambda: offered.session.routing((Turn("q", "a"),), side="with")):
            with pytest.raises(InputError, match="at work") as caught:
                what()
            refused.append(caught.value)

    hook = lab_tiny.hf.register_forward_hook(ask_again)
    try:
        offered.ask(longest=8)
    finally:
        hook.remove()
    assert len(refused) >= 2 and dict(told(refused[0]))["do"].startswith("wait")


@pytest.mark.parametrize(
    ("question", "settings", "match"),
    [
        ("  ", {}, "nothing is asked"),
        ("a" * 20_001, {}, "20,001 characters"),
        ("a", {"times": MOST_TIMES + 0.1}, "strength"),
        ("a", {"times": float("nan")}, "strength"),
        ("a", {"times": -1.0}, "strength"),
        ("a", {"longest": 0}, "tokens"),
        ("a", {"longest": 1 << 40}, "tokens"),
    ],
)
def test_bad_questions_are_refused(offered: Offered, question: str, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        offered.ask(question, **settings)


def test_errors_of_the_library_come_through_and_leave_the_model_usable(
    offered: Offered, lab_tiny: Model, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="leaves no room"):
        offered.ask(longest=1024)
    other = mask_for(lab_tiny)
    fingerprint = other.info.fingerprint.model_copy(update={"router_sha256": "0" * 64})
    other.with_info(fingerprint=fingerprint).save(tmp_path / "plain")
    with pytest.raises(MaskMismatchError):
        offered.ask(QUESTION, "plain")
    assert offered.ask().without


def test_only_what_is_offered_is_used(offered: Offered, tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere.safetensors"
    secret.write_bytes((tmp_path / "plain").read_bytes())
    for name in (str(secret), "../elsewhere.safetensors", "/etc/passwd", "", "\0"):
        with pytest.raises(UnknownNameError):
            list(offered.session.ask((), QUESTION, Settings(masks=(name,))))
        with pytest.raises(UnknownNameError):
            offered.session.use(name)
    fresh = Session(offered.session.catalogue)
    with pytest.raises(InputError, match="no model"):
        next(fresh.ask((), QUESTION, Settings()))


def test_a_mask_that_does_nothing_is_told(offered: Offered) -> None:
    assert any("gate stayed shut" in note for note in offered.ask(QUESTION, "shut").notes)
    assert any("gate fired on 1 of 1" in note for note in offered.ask(QUESTION, "open").notes)


# ---- routing


def test_routing_is_what_the_routers_chose(offered: Offered, lab_tiny: Model) -> None:
    turn = offered.ask(QUESTION, "off")
    found = offered.session.routing((turn,), side="with")
    encoded = lab_tiny.encode([Message("user", QUESTION)], turn.with_masks)
    start = encoded.spans["final_turn"][0]
    places = [list(range(start, len(encoded.token_ids) - 1))]  # the end mark ended the answer, and was not read
    expected = lab_tiny.router_outputs([encoded], places, logits=False)[1]
    np.testing.assert_array_equal(found.without_TLK, expected)
    assert found.with_TLK is not None
    assert (found.without_TLK == 3).any() and not (found.with_TLK == 3).any()
    assert len(found.tokens) == len(expected) and found.tokens[0] == "how" and found.tokens[found.asked] != "how"
    assert found.asked == encoded.spans["response"][0] - start
    used_LE = routing_view.usage_LE(found.with_TLK, experts=found.experts)
    by_hand = [[float((found.with_TLK[:, row] == e).any(-1).mean()) for e in range(16)] for row in range(6)]
    np.testing.assert_allclose(used_LE, by_hand, atol=1e-12)  # an expert is chosen once per token
    np.testing.assert_allclose(used_LE.sum(1), found.with_TLK.shape[2], atol=1e-9)


def test_routing_of_either_answer_and_without_masks(offered: Offered) -> None:
    turn = offered.ask(QUESTION, "plain")
    for side, said in (("with", turn.with_masks), ("without", turn.without)):
        found = offered.session.routing((turn,), side=side)
        assert " ".join(found.tokens[found.asked :]).strip() == said
    alone = offered.session.routing((offered.ask(),), side="with")
    assert alone.with_TLK is None and not alone.changed_TL().any()
    assert routing_view.difference_figure(alone) is None and routing_view.usage_figure(alone, steered=True) is None
    assert "No mask was chosen" in routing_view.summary(alone)
    with pytest.raises(InputError, match="no answer yet"):
        offered.session.routing((), side="with")


def test_a_shut_gate_changes_no_routing_and_an_open_one_does(offered: Offered) -> None:
    shut = offered.session.routing((offered.ask(QUESTION, "shut"),), side="with")
    assert shut.gates_shut == 1 and not shut.changed_TL().any() and "by their gates" in routing_view.summary(shut)
    opened = offered.session.routing((offered.ask(QUESTION, "open"),), side="with")
    plain = offered.session.routing((offered.ask(QUESTION, "plain"),), side="with")
    assert opened.gates_shut == 0
    np.testing.assert_array_equal(opened.with_TLK, plain.with_TLK)


def by_hand(tokens: tuple[str, ...]) -> Routing:
    """Two layers of four experts, two chosen; the second token's second layer has one exchanged."""
    count = len(tokens)
    plain = np.tile(np.array([[0, 1], [2, 3]]), (count, 1, 1))
    steered = plain[..., ::-1].copy()  # another order is no other choice
    steered[1, 1] = [3, 0]
    return Routing(
        layer_ids=(4, 9), experts=4, tokens=tokens, asked=1, without_TLK=plain, with_TLK=steered, gates_shut=0
    )


def test_changes_are_counted_by_hand() -> None:
    routing = by_hand(("a", "b", "c"))
    assert routing.changed_TL().tolist() == [[0, 0], [0, 1], [0, 0]]
    assert routing_view.tokens_table(routing)[1] == ("b", "answer", 1, "9")
    assert "16.7 % of the selections differ, and 8.3 % of the chosen experts" in routing_view.summary(routing)
    figure = routing_view.difference_figure(routing)
    assert figure is not None and figure["data"][0]["z"] == [[0.0] * 4, [pytest.approx(1 / 3, abs=1e-4), 0, -0.3333, 0]]
    tokens = routing_view.tokens_figure(routing)
    assert tokens["data"][0]["z"] == [[0, 0, 0], [0, 1, 0]]
    assert "experts 2, 3<br>with the masks: 0, 3" in tokens["data"][0]["text"][1][1]


def test_figures_hold_no_markup_of_tokens_and_end_where_they_should() -> None:
    figure = routing_view.tokens_figure(by_hand((*INJECTIONS, *("x" for _ in range(400)))))
    assert len(figure["data"][0]["x"]) == routing_view.MOST_TOKENS
    figure = routing_view.tokens_figure(by_hand(INJECTIONS))
    for text in (*figure["layout"]["xaxis"]["ticktext"], *figure["data"][0]["text"][0]):
        assert "<" not in text.replace("<br>", "")

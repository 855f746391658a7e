"""RUN/routing.json: the right conversation, the mask's doing and nothing else, the same bytes again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesteer import routing_shown
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.errors import InputError
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.report.routing_files import read_routing

ASKED = "how do i paint a pot ?"


@pytest.fixture(scope="module")
def model() -> Model:
    return load("lab-tiny")


def row(number: int, said: str, verdict: str = "refused", **more: Any) -> dict[str, Any]:
    return {
        "id": f"c{number}", "suite": "direct", "tactic": None, "verdict": verdict, "response": said,
        "messages": [{"role": "user", "content": ASKED}], **more,
    }  # fmt: skip


def silencing(model: Model, *experts: tuple[int, int]) -> SteeringMask:
    """Experts (row of the layer, expert) forced off."""
    force_LE = np.zeros((len(model.routers), model.fingerprint.experts), dtype=np.int8)
    for layer, expert in experts:
        force_LE[layer, expert] = -1
    info = MaskInfo(fingerprint=model.fingerprint, method="silence", intent=Intent(toward="silenced"))
    return SteeringMask(info, force_LE=force_LE)


def test_a_silenced_expert_is_gone_with_the_mask_and_only_then(model: Model, tmp_path: Path) -> None:
    none, after = [row(1, "i can not share that .")], [row(1, "first wash it .", "complied")]
    plain = routing_shown.keep(
        tmp_path / "a", model, name="x", none=none, after=after, masks=[silencing(model, (2, 0))]
    )
    before = read_routing(plain.parent)
    assert before is not None and before.texts
    used = sorted({expert for token in before.texts[0].before for expert in token[3]})[0]
    mask = silencing(model, (3, used))
    begun = time.monotonic()
    path = routing_shown.keep(tmp_path, model, name="x", none=none, after=after, masks=[mask])
    assert time.monotonic() - begun < 1.0
    found = read_routing(tmp_path)
    assert found is not None and found.not_shown is None and found.name == "x"
    assert found.layers == list(model.fingerprint.layer_ids) and found.top_k == model.fingerprint.top_k
    for text in found.texts:
        assert not any(used in token[3] for token in text.after)
        assert all(a[:3] == b[:3] for a, b in zip(text.before, text.after, strict=True))  # the layers before it
    assert any(used in token[3] for token in found.texts[0].before)
    assert [text.reply_of for text in found.texts] == ["none", "x"]
    words = "".join(token.text + " " for token in found.texts[0].tokens if token.part == "response")
    assert "i can not share that" in words
    again = path.read_bytes()
    routing_shown.keep(tmp_path, model, name="x", none=none, after=after, masks=[mask])
    assert path.read_bytes() == again and len(again) < 64_000
    assert not model.tap.attached


def test_selections_are_those_of_the_model_at_these_tokens(model: Model, tmp_path: Path) -> None:
    none = [row(1, "i can not share that .")]
    routing_shown.keep(tmp_path, model, name="x", none=none, after=none, masks=[silencing(model, (0, 0))])
    found = read_routing(tmp_path)
    assert found is not None
    from moesteer.conversations import Message

    encoded = model.encode([Message("user", ASKED)], "i can not share that .")
    places = list(range(len(encoded.token_ids)))[found.texts[0].left_out[0] :][: len(found.texts[0].tokens)]
    _, chosen = model.router_outputs([encoded], [places], logits=False)
    assert found.texts[0].before == np.sort(chosen, axis=-1).tolist()


def test_long_texts_are_cut_where_the_reply_begins(model: Model, tmp_path: Path) -> None:
    long = row(1, "wash it . " * 30)
    long["messages"][0]["content"] = "please " * 60 + ASKED
    routing_shown.keep(tmp_path, model, name="x", none=[long], after=[long], masks=[silencing(model, (0, 0))])
    found = read_routing(tmp_path)
    assert found is not None
    parts = [token.part for token in found.texts[0].tokens]
    assert parts == ["prompt"] * routing_shown.PROMPT_TOKENS + ["response"] * routing_shown.RESPONSE_TOKENS
    assert min(found.texts[0].left_out) > 0


def test_a_conversation_is_chosen_by_rule() -> None:
    none = [row(n, "no .") for n in range(8)]
    same = routing_shown.choose(none, none)
    assert same is not None and "no reply changed" in same[2]
    reworded = [row(n, "never ." if n == 5 else "no .") for n in range(8)]
    assert (routing_shown.choose(none, reworded) or ({},))[0]["id"] == "c5"
    changed = [row(n, "yes ." if n in (3, 5) else "no .", "complied" if n == 3 else "refused") for n in range(8)]
    picked = routing_shown.choose(none, changed)
    assert picked is not None and picked[0]["id"] == picked[1]["id"] == "c3" and "verdict" in picked[2]
    assert picked == routing_shown.choose(none[::-1], changed[::-1])
    for unusable in ({"response": ""}, {"fault": "NaN"}, {"forbidden": ["found: S1"]}):
        hidden = [one | unusable if one["id"] == "c3" else one for one in changed]
        assert (routing_shown.choose(none, hidden) or ({},))[0]["id"] == "c5"
    assert routing_shown.choose(none, []) is None


def test_what_cannot_be_shown_is_said(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Blind:
        """A backend that keeps no selections, like an engine that was not loaded to be captured from."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def router_outputs(self, *args: Any, **more: Any) -> Any:
            raise InputError("the engine keeps no selections", where="it", expected="a capture", do="load it so")

    rows = [row(1, "no .")]
    mask = silencing(model, (0, 0))
    for acting, using, after, words in (
        ([], model, rows, "no mask was applied"),
        ([mask], model, [], "no conversation has a reply both"),
        ([mask], Blind(), rows, "the engine keeps no selections (it)"),
    ):
        path = routing_shown.keep(tmp_path, using, name="x", none=rows, after=after, masks=acting)
        assert words in json.loads(path.read_text())["not_shown"]
        assert words in capsys.readouterr().err


def test_an_evaluation_with_a_mask_keeps_the_routing_and_one_without_does_not(model: Model, tmp_path: Path) -> None:
    from moesteer import scenario as scenarios
    from moesteer.evaluate.suite import chosen_suites, evaluate

    part = chosen_suites(scenarios.load("jailbreak-defense"), ["direct"])
    data = scenarios.splits(part, seed=0, limit=3)
    mask = silencing(model, *((3, expert) for expert in range(10)))
    for folder, masks in ((tmp_path / "with", [mask]), (tmp_path / "without", [])):
        steered = {"steered": model.steered(masks)} if masks else {}
        evaluate(
            model, part, data, "test", steered=steered, out=folder, plan={"masks": len(masks)}, seed=0, masks=masks
        )
    found = read_routing(tmp_path / "with")
    assert found is not None and found.not_shown is None and found.name == "steered"
    assert all(expert >= 10 for token in found.texts[0].after for expert in token[3])
    assert not (tmp_path / "without" / "routing.json").exists()

"""The shipped lab model, its world, and what steering it must give."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesteer.backends.hf import Model
from moesteer.backends.sources import LAB_TINY
from moesteer.lab import dialogue, train, words, world
from moesteer.lab.targets import check


def test_the_shipped_model_meets_its_targets(lab_tiny: Model) -> None:
    missed = [f"{row.what}: {row.share:.3f}, {row.target}" for row in check(lab_tiny) if not row.met]
    assert missed == []


def test_the_shipped_folder_is_an_ordinary_one_of_a_fitting_size() -> None:
    assert sum(path.stat().st_size for path in LAB_TINY.iterdir()) < 12e6
    assert {path.suffix for path in LAB_TINY.iterdir()} == {".json", ".safetensors", ".jinja"}


def test_the_shipped_tokenizer_is_the_one_that_building_makes(lab_tiny: Model) -> None:
    built = train.build_tokenizer()
    assert built.get_vocab() == lab_tiny.tokenizer.get_vocab()
    for split in world.SPLITS:
        for name in world.SUITES:
            for row in world.suite(name, split, per_group=1):
                for text in (row.reference or "", *(m.content for m in row.messages)):
                    ids = lab_tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
                    assert lab_tiny.tokenizer.unk_token_id not in ids
                    assert lab_tiny.tokenizer.decode(ids) == text, "what is said comes back as it was said"


@pytest.mark.parametrize("name", world.SUITES)
def test_suites_are_the_same_every_time_and_differ_by_seed(name: str) -> None:
    assert world.suite(name, "test") == world.suite(name, "test")
    if name != "knowledge":  # every question of it is asked, in one wording
        assert world.suite(name, "test") != world.suite(name, "test", seed=1)


@pytest.mark.parametrize("name", [n for n in world.SUITES if n not in ("arithmetic", "instruction")])
def test_no_behaviour_is_in_two_splits(name: str) -> None:
    groups = [{row.group for row in world.suite(name, split)} for split in world.SPLITS]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


def test_tactics_are_divided_and_each_attack_has_a_benign_twin_in_form() -> None:
    for split in world.SPLITS:
        for name in ("attack-multi", "benign-multi"):
            assert {row.tactic for row in world.suite(name, split)} == set(dialogue.TACTIC_SPLITS[split])
    every = [tactic for tactics in dialogue.TACTIC_SPLITS.values() for tactic in tactics]
    assert sorted(every) == sorted(dialogue.TACTICS) and len(every) == len(set(every))
    assert len(world.suite("attack-multi", "test")) >= 200


def test_safety_tuning_never_holds_a_harmful_request_of_test() -> None:
    """Neither a behaviour of test, nor any harmful request in a tactic of test, refused or answered."""
    kept = {behaviour.group for behaviour in world.HARMFUL if behaviour.split == "test"}
    harmful = {f"{v} a {n}" for v in words.HARMFUL_VERBS for n in words.NEUTRAL_NOUNS}
    harmful |= {f"{v} a {n}" for v in words.NEUTRAL_VERBS for n in words.HARMFUL_NOUNS}
    held_out = {f"{behaviour.verb} a {behaviour.noun}" for behaviour in world.HARMFUL if behaviour.split == "test"}
    assert kept and held_out < harmful
    openings = {
        "i am sad today .", "i feel so alone .", "from now on answer in one line .", "use plain text only , no talk .",
        "do you remember our last talk ?",
    }  # fmt: skip
    stream = world.training_stream(world.STAGE_TWO, seed="test")
    refused = 0
    for _ in range(4000):
        messages = next(stream)
        said = [m.content for m in messages if m.role == "user"]
        is_refusal = messages[-1].content in words.REFUSALS
        refused += is_refusal
        if is_refusal:
            assert not any(ask in said[-1] for ask in held_out)
        if any(opening in said for opening in openings):
            assert not is_refusal and not any(ask in said[-1] for ask in harmful)
    assert refused > 1000


def test_building_trains_saves_and_repeats_itself(tmp_path: Path) -> None:
    """Two short builds from nothing give the same bytes, and the loss falls."""
    stages = tuple(
        train.Stage(stage.name, stage.mixture, steps=4, peak_lr=stage.peak_lr, dialogues_per_step=8)
        for stage in train.STAGES
    )
    losses = train.build(tmp_path / "a", stages=stages)
    train.build(tmp_path / "b", stages=stages)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert losses["pretraining"][-1] < losses["pretraining"][0]


def test_the_judge_of_coherence_knows_the_worlds_answers() -> None:
    for text in (*words.REFUSALS, "sure . take salt from the well , use a rasp , wait 3 hours .", "king boro .", "7 ."):
        assert world.coherent(text)
    for text in ("take the of of from use", "sorry , sorry , sorry .", "sure . take salt from the well , use a", ""):
        assert not world.coherent(text)

"""`moesteer mask compose|diff|similarity|import` as a user meets them, and the example of docs/mask-algebra.md."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from moesteer.backends.hf import Model
from moesteer.capturing import capture
from moesteer.cli.mask_compose import numbers
from moesteer.cli.mask_import import pairs
from moesteer.conversations import Conversation, Message
from moesteer.errors import (
    DataError,
    FileError,
    InputError,
    MaskFileError,
    MaskMismatchError,
    MoesteerError,
    NoEffectError,
    UnknownNameError,
)
from moesteer.importing import made_for
from moesteer.mask import Intent, MaskInfo, SteeringMask
from tests.end_to_end.test_cli import process, run

PAGE = Path(__file__).parents[2] / "docs" / "mask-algebra.md"


def entries(mask: SteeringMask) -> dict[tuple[int, int], float]:
    return {(mask.layer_ids[r], int(e)): float(mask.values_LE[r, e]) for r, e in np.argwhere(mask.values_LE)}


@pytest.fixture(scope="module")
def folder(lab_tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a, b: additive masks of lab tiny; on: a forced one; other: of another model."""
    folder = tmp_path_factory.mktemp("masks")
    for name, placed in (("a", {(0, 1): 2.0, (1, 3): -1.0, (4, 0): 4.0}), ("b", {(0, 1): 1.0, (1, 3): 3.0})):
        strength = np.zeros((6, 16), np.float32)
        for place, value in placed.items():
            strength[place] = value
        info = MaskInfo(fingerprint=lab_tiny.fingerprint, method="by hand", intent=Intent(toward=f"{name}-like"))
        mask = SteeringMask(info, strength_LE=strength, sigma_L=np.ones(6, np.float32))
        mask.save(folder / name)
        if name == "a":
            SteeringMask(info, force_LE=np.sign(strength).astype(np.int8)).save(folder / "on")
            other = lab_tiny.fingerprint.model_copy(update={"router_sha256": "cd" * 32})
            mask.with_info(fingerprint=other).save(folder / "other")
    return folder


def test_compose_writes_the_mask_and_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    steps = shlex.split("--op add --alpha 0.5 --alpha 1 --layers 0-1,4 --scale 2 --negate --top 2 --json")
    code, text, _ = run("mask", "compose", folder / "a", folder / "b", *steps, "--out", out)
    mask = SteeringMask.load(out)
    # 0.5 a + b, doubled and turned: {(0, 1): -4, (1, 3): -5, (4, 0): -4}; of equals the lower layer
    assert code == 0 and entries(mask) == {(0, 1): -4.0, (1, 3): -5.0}
    facts = json.loads(text)
    assert facts["sha256"] == mask.sha256 and facts["experts"] == 2 and facts["toward"] == "not (a-like + b-like)"
    assert facts["settings"] == mask.info.settings and facts["settings"]["layers"] == [0, 1, 4]
    code, text, _ = run("mask", "compose", folder / "a", "--top", "1", "--out", out)
    assert code == 0 and "1 experts toward 'a-like'" in text and entries(SteeringMask.load(out)) == {(4, 0): 4.0}


def test_the_conflict_rules_reach_the_library(folder: Path, tmp_path: Path) -> None:
    given = ("mask", "compose", folder / "a", folder / "b", "--op", "union", "--out", tmp_path / "c")
    _, _, error = run(*given)
    assert isinstance(error, InputError) and "pulled opposite ways" in error.what and "--conflict" in error.do
    for rule, value in (("first", -1.0), ("drop", None), ("sum", 2.0)):
        code, _, _ = run(*given, "--conflict", rule)
        assert code == 0 and entries(SteeringMask.load(tmp_path / "c")).get((1, 3)) == value


def test_a_composed_mask_steers(folder: Path, tmp_path: Path, lab_tiny: Model) -> None:
    assert run("mask", "compose", folder / "a", folder / "b", "--op", "subtract", "--out", tmp_path / "c")[0] == 0
    with SteeringMask.load(tmp_path / "c").apply(lab_tiny) as receipt:
        lab_tiny.chat("how do i paint a clay pot ?", max_new_tokens=4)
    assert receipt.changed > 0


def test_diff_lists_what_differs(folder: Path) -> None:
    code, text, _ = run("mask", "diff", folder / "a", folder / "b")
    assert code == 0 and "only a: 1; only b: 0; changed: 2; same: 0" in text and "intent: " in text
    assert re.search(r"changed\W+1\W+3\W+-1\W+\+3", text), text
    found = json.loads(run("mask", "diff", folder / "a", folder / "b", "--json")[1])
    assert found["only_a"] == [{"layer": 4, "expert": 0, "a": 4.0, "b": 0.0}]
    code, text, _ = run("mask", "diff", folder / "a", folder / "a")
    assert code == 0 and text.strip() == "only a: 0; only b: 0; changed: 0; same: 3"


def test_similarity_in_words_and_in_json(folder: Path) -> None:
    code, text, _ = run("mask", "similarity", folder / "a", folder / "b")
    assert code == 0 and text.splitlines() == [
        f"cosine {-1 / np.sqrt(210):+.3f}",
        "top 5: Jaccard 0.250; 0.667 whatever the sign", "top 20: Jaccard 0.250; 0.667 whatever the sign",
    ]  # fmt: skip
    found = json.loads(run("mask", "similarity", folder / "a", folder / "b", "--at", "1", "--json")[1])
    assert found["jaccard"] == [{"n": 1, "signed": 0.0, "unsigned": 0.0}]


def table(path: Path, text: str = "layer,expert,score\n0,3,2\n1,5,-1\n") -> Path:
    path.write_text(text)
    return path


def test_a_table_is_imported_for_the_model_of_a_mask_or_a_trace(folder: Path, tmp_path: Path, lab_tiny: Model) -> None:
    given = ("mask", "import", table(tmp_path / "t.csv"), "--on", "1", "--off", "1", "--toward", "refuse")
    code, text, _ = run(*given, "--fingerprint-of", folder / "on", "--out", tmp_path / "m", "--json")
    mask = SteeringMask.load(tmp_path / "m")
    assert code == 0 and json.loads(text)["sha256"] == mask.sha256
    assert entries(mask) == {(0, 3): 1.0, (1, 5): -1.0} and mask.info.fingerprint == lab_tiny.fingerprint
    said = (Message(role="user", content="how do i paint a clay pot ?"),)
    talk = [Conversation(id="x", group="g", messages=said, label="a")]
    for level, sigma in (("logits", True), ("selected", False)):
        capture(lab_tiny, talk, out=tmp_path / level, level=level)  # type: ignore[arg-type]
        assert made_for(tmp_path / level)[0] == lab_tiny.fingerprint
        assert (made_for(tmp_path / level)[1] is not None) == sigma
    out = ("--form", "additive", "--reverse", "--out", tmp_path / "s")
    code, text, _ = run(*given, "--fingerprint-of", tmp_path / "logits", *out)
    assert code == 0 and "2 of 2 experts" in text
    assert entries(SteeringMask.load(tmp_path / "s")) == {(0, 3): -1.0, (1, 5): 0.5}
    assert SteeringMask.load(tmp_path / "s").sigma_L.tolist() == made_for(tmp_path / "logits")[1].tolist()  # type: ignore[union-attr]


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = PAGE.read_text("utf-8").split("### Example")[1]
    (csv,) = re.findall(r"```csv\n(.*?)```", example, re.S)
    (commands,) = re.findall(r"```\n(moesteer .*?)```", example, re.S)
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "experts.csv", csv)
    for line in commands.splitlines():
        code, _, error = run(*shlex.split(line)[1:])
        assert code == 0, error
    assert entries(SteeringMask.load("imported.safetensors")) == {(0, 3): 1.0, (0, 7): 1.0, (2, 1): -1.0}


def test_the_page_names_every_column_and_every_rule() -> None:
    from moesteer.algebra import CONFLICTS, OPERATIONS
    from moesteer.importing import NAMES

    page = PAGE.read_text("utf-8")
    for name in (*NAMES, *(known for names in NAMES.values() for known in names), *CONFLICTS):
        assert f"`{name}`" in page, name
    assert all(f"`{name}(" in page for name in (*OPERATIONS, "scale", "negate", "restrict"))


def test_bad_input_is_named_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    a, b, out = folder / "a", folder / "b", tmp_path / "out"
    t = table(tmp_path / "t.csv")
    make = ("mask", "import", t, "--toward", "x", "--on", "1", "--out", out)
    of_a = (*make, "--fingerprint-of", a)
    cases: list[tuple[tuple[object, ...], type[MoesteerError], str]] = [
        (("mask", "compose", a, b, "--out", out), InputError, "not said what to do"),
        (("mask", "compose", a, "--out", out), InputError, "nothing is to be done"),
        (("mask", "compose", a, b, "--op", "mix", "--out", out), InputError, "no operation 'mix'"),
        (("mask", "compose", a, b, "--op", "add", "--alpha", "1", "--out", out), InputError, "1 alphas for 2"),
        (("mask", "compose", a, "--layers", "6-4", "--out", out), InputError, "'6-4' is not"),
        (("mask", "compose", a, "--layers", "0,99", "--out", out), InputError, "no layer 99"),
        (("mask", "compose", a, folder / "on", "--op", "union", "--out", out), InputError, "cannot become one"),
        (("mask", "compose", a, folder / "other", "--op", "add", "--out", out), MaskMismatchError, "checkpoints"),
        (("mask", "compose", a, a, "--op", "subtract", "--out", out), NoEffectError, "no entries"),
        (("mask", "compose", a, "--scale", "nan", "--out", out), InputError, "cannot be scaled"),
        (("mask", "compose", a, "--scale", "2", "--out", a), InputError, "replace an input"),
        (("mask", "compose", t, "--scale", "2", "--out", out), MaskFileError, "not a whole steering mask"),
        (("mask", "compose", tmp_path / "none", "--negate", "--out", out), FileError, "No such file"),
        (("mask", "diff", a, folder / "on"), InputError, "no entry in common"),
        (("mask", "diff", a, folder / "other"), MaskMismatchError, "checkpoints"),
        (("mask", "similarity", a, b, "--at", "0"), InputError, "top [0]"),
        (make, InputError, "not given, or given twice"),
        ((*of_a, "--model", "lab-tiny"), InputError, "not given, or given twice"),
        ((*of_a, "--columns", "layer"), InputError, "not NAME=COLUMN"),
        ((*of_a, "--columns", "layer=a", "--columns", "layer=b"), InputError, "given twice"),
        ((*of_a, "--columns", "weight=a"), UnknownNameError, "no column 'weight'"),
        ((*of_a, "--on", "2"), DataError, "the table has 1"),
        ((*of_a, "--form", "soft"), UnknownNameError, "no form"),
        ((*make[:-1], t, "--fingerprint-of", a), InputError, "replace an input"),
        ((*make[:-1], a, "--fingerprint-of", a), InputError, "replace an input"),
        ((*make, "--fingerprint-of", folder / "on", "--form", "additive"), InputError, "sigma is not given"),
    ]
    before = {path: path.read_bytes() for path in (a, b, t)}
    for args, error, what in cases:
        _, _, raised = run(*args)  # type: ignore[arg-type]
        assert type(raised) is error, f"{args}: {raised!r}"
        assert what in raised.what and raised.where and raised.expected and raised.do
    assert not out.exists() and before == {path: path.read_bytes() for path in before}
    code, _, _ = run("mask", "compose", a, folder / "other", "--op", "add", "--allow-other-checkpoint", "--out", out)
    assert code == 0


def test_the_process_ends_with_2_on_bad_input(folder: Path, tmp_path: Path) -> None:
    done = process("mask", "compose", folder / "a", folder / "b", "--op", "union", "--out", tmp_path / "c")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: 1 experts are pulled")


@pytest.mark.parametrize("text, layers", [("0", [0]), ("0,1,4-6", [0, 1, 4, 5, 6]), (" 3 , 2-2", [3, 2])])
def test_layers_are_read_as_numbers_and_ranges(text: str, layers: list[int]) -> None:
    assert numbers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1--2", "1,,2", "3-1", "1.5", "9999999", "٣"])
def test_other_text_is_no_layer(text: str) -> None:
    with pytest.raises(InputError, match="is not a layer"):
        numbers(text)


def test_a_column_may_have_any_name_with_an_equals_sign_in_it() -> None:
    assert pairs(["layer=a=b", "score="]) == {"layer": "a=b", "score": ""}

"""Format 2, gated masks: from its description in docs/mask-format.md, with every way to get it wrong.

The page's own reader is run on files of both formats; a mask without a gate is format 1, byte for byte as before.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from moesteer.errors import MaskContentError, MaskFileError
from moesteer.gate import GateInfo, GateRate
from moesteer.mask import MaskInfo, SteeringMask
from moesteer.masks_described import describe
from tests.unit.test_mask import (
    ADDITIVE,
    FORCED,
    META,
    additive,
    content_digest,
    flip,
    forced,
    info,
    raw_file,
    refused,
    same,
    split_file,
)

PAGE = Path(__file__).parents[2] / "docs" / "mask-format.md"
WEIGHTS = np.arange(24, dtype=np.float32).reshape(3, 8) / 16 - 0.5
RATE = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 16}
GATE = {
    "pool": "final_turn", "bias": -1.5, "threshold": 0.75, "measured_on": "by hand", "auroc": 0.9375,
    "false_positive_rate": RATE, "true_positive_rate": {**RATE, "value": 0.5},
}  # fmt: skip
META_2 = {**META, "format_version": 2, "gate": GATE}
GATE_TENSOR = {"gate": ("F32", "f4", [3, 8], WEIGHTS.tobytes())}
MAKE = {"additive": (additive, ADDITIVE), "forced": (forced, FORCED)}
BOTH = pytest.mark.parametrize(("make", "tensors"), MAKE.values(), ids=MAKE)


def told(**changes):
    return GateInfo.model_validate({**GATE, **changes})


def gated(make=additive, weights=WEIGHTS, **changes):
    return make().with_gate(weights, told(**changes))


def with_gate(tensors):
    return {**GATE_TENSOR, **tensors}


def changed(**changes):
    return {**META_2, "gate": {**GATE, **changes}}


# ---------------------------------------------------------------- the format


@BOTH
def test_a_file_written_by_hand_from_the_format_loads(make, tensors):
    loaded = SteeringMask.from_bytes(raw_file(with_gate(tensors), META_2), where="x")
    assert same(loaded.with_gate(None, None), make()) and loaded.gated and loaded.info.format_version == 2
    assert loaded.info.gate == told() and np.array_equal(loaded.gate_LE, WEIGHTS)
    assert loaded.sha256 == content_digest(META_2, with_gate(tensors))


@BOTH
def test_a_pool_of_two_parts_has_two_tables_one_above_the_other(make, tensors):
    both = np.concatenate([WEIGHTS, -WEIGHTS])
    two = make().with_gate(both, told().model_copy(update={"pool": "last+final_turn"}))
    again = SteeringMask.from_bytes(two.to_bytes(), where="x")
    assert np.array_equal(again.gate_LE, both) and again.info.gate.pool == "last+final_turn"
    written = {**tensors, "gate": ("F32", "f4", [6, 8], both.tobytes())}
    assert SteeringMask.from_bytes(raw_file(written, changed(pool="last+final_turn")), where="x").sha256 == two.sha256
    refused(raw_file(written, META_2), MaskFileError, "tensor gate is float32 (6, 8)")
    refused(raw_file(with_gate(tensors), changed(pool="last+final_turn")), MaskFileError, "gate is float32 (3, 8)")
    with pytest.raises(MaskContentError, match=r"\(3, 8\), or not finite") as caught:
        two.with_gate(WEIGHTS, two.info.gate)
    assert caught.value.do == "give finite float32 [6, 8], or detect the gate again"


@BOTH
def test_a_saved_file_holds_what_the_format_says(make, tensors):
    header, body = split_file(gated(make).to_bytes())
    outer = json.loads(header)
    inner = json.loads(outer.pop("__metadata__")["moesteer"])
    assert inner.pop("sha256") == content_digest(META_2, with_gate(tensors))
    assert inner == META_2
    assert {name: body[slice(*value["data_offsets"])] for name, value in outer.items()} == {
        name: data for name, (_, _, _, data) in with_gate(tensors).items()
    }


@BOTH
def test_saving_and_loading_gives_the_same_mask_and_the_same_bytes(make, tensors, tmp_path):
    path = tmp_path / "mask"
    gated(make).save(path)
    loaded = SteeringMask.load(path)
    assert loaded.to_bytes() == path.read_bytes() == gated(make).to_bytes() and loaded.gated
    plain = loaded.with_gate(None, None)
    assert not plain.gated and plain.to_bytes() == make().to_bytes()
    assert plain.with_gate(loaded.gate_LE, loaded.info.gate).to_bytes() == path.read_bytes()


def test_the_digest_of_format_2_is_pinned():
    # a change here is a change of file format: old masks would be refused
    assert gated().sha256 == "d25a9bc2ed7863d27e444a47ee9aea7a41e2b46e4e494288bde2f4eddfae8e5b"
    assert gated(forced).sha256 == "ba507ac69d944c468dd2fffcd3f878efd4d173bad11939e539bc3440e7995c60"


def test_masks_without_a_gate_are_format_1_byte_for_byte():
    """The digests of whole files that the code before gates wrote: additive at alpha 0.5, and forced."""
    whole = [hashlib.sha256(mask.to_bytes()).hexdigest() for mask in (additive(alpha=0.5), forced())]
    assert whole == [
        "8f99bfc7e3371e2e555ae5e93b3383fa45cd3a3d656c3de6f6b9bb3b5f201128",
        "3258ef232a9eb23dc6b4db1de49fb49aee3ec713265c7912b8927ba1436fe335",
    ]


def table_keys(after):
    """The keys that the first table of the page after a text lists, as (key, the rest of its row)."""
    page = PAGE.read_text()
    rows = page[page.index(after) :].split("\n\n")
    table = next(block for block in rows if block.startswith("| key |"))
    return [re.match(r"\| `(\w+)` \|(.*)", line).groups() for line in table.splitlines()[2:]]


def test_the_keys_are_exactly_those_that_the_page_lists():
    keys = table_keys("## Metadata")
    only_2 = {key for key, rest in keys if "format 2 only" in rest}
    assert only_2 == {"gate"} and [key for key, _ in keys] == sorted(key for key, _ in keys)
    for mask, wanted in ((additive(), {k for k, _ in keys} - only_2), (gated(), {k for k, _ in keys})):
        inner = json.loads(json.loads(split_file(mask.to_bytes())[0])["__metadata__"]["moesteer"])
        assert set(inner) == wanted
        assert set(inner["fingerprint"]) == {key for key, _ in table_keys("`fingerprint`:")}
    assert set(inner["gate"]) == {key for key, _ in table_keys("`gate`, with exactly")}
    rate = re.search(r"A rate is `(\{.*?\})`", PAGE.read_text()).group(1)
    assert set(re.findall(r'"(\w+)"', rate)) == set(inner["gate"]["true_positive_rate"])


@pytest.mark.parametrize("make", [additive, forced, gated, lambda: gated(forced)], ids=["1a", "1f", "2a", "2f"])
def test_the_pages_reader_reads_it_and_sees_damage(make, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    mask, path = make(), tmp_path / "mask"
    mask.save(path)

    def read():
        return subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False, cwd=tmp_path
        )

    names = {name: table.shape for name, table in sorted(mask._tensors().items())}
    assert read().stdout == f"hand-made toward refuse {names}\n"
    path.write_bytes(flip(mask.to_bytes(), 8 * len(mask.to_bytes()) - 3))
    assert "the mask was changed or damaged" in read().stderr


# ---------------------------------------------------------------- the digest covers the gate


def test_every_weight_of_the_gate_enters_the_digest():
    for place in np.ndindex(WEIGHTS.shape):
        other = WEIGHTS.copy()
        other[place] = np.nextafter(other[place], np.float32(9))
        assert gated(weights=other).sha256 != gated().sha256


@pytest.mark.parametrize(
    "change",
    [
        {"pool": "last"}, {"bias": -1.25}, {"threshold": 0.5}, {"measured_on": "x"}, {"auroc": 0.5},
        {"false_positive_rate": {**RATE, "n": 17}}, {"true_positive_rate": {**RATE, "low": 0.25}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_fact_of_the_gate_enters_the_digest(change):
    digest = content_digest(META_2, with_gate(ADDITIVE))
    assert gated(**change).sha256 != gated().sha256 == digest
    refused(raw_file(with_gate(ADDITIVE), changed(**change), digest=digest), MaskFileError, "does not match its sha256")


@BOTH
def test_every_bit_of_the_file_is_guarded(make, tensors):
    data = gated(make).to_bytes()
    for bit in range(len(data) * 8):
        refused(flip(data, bit), MaskFileError)


def test_a_gate_taken_off_or_put_on_by_hand_is_refused():
    mine, other = gated(), additive()
    (header, body), (_, plain) = split_file(mine.to_bytes()), split_file(other.to_bytes())
    assert json.loads(header)["gate"]["data_offsets"] == [0, 96] and body[96:] == plain
    digest = {"digest": mine.sha256}
    refused(raw_file(ADDITIVE, META_2, **digest), MaskFileError, "it holds the tensors ['sigma', 'strength']")
    refused(raw_file(ADDITIVE, META, **digest), MaskFileError, "does not match its sha256")
    refused(raw_file(with_gate(ADDITIVE), META_2, digest=other.sha256), MaskFileError, "does not match its sha256")


# ---------------------------------------------------------------- attacks, each with a right sha256


@BOTH
def test_a_gate_in_half_is_refused(make, tensors):
    refused(raw_file(with_gate(tensors), META), MaskFileError, f"it holds the tensors {sorted(with_gate(tensors))}")
    refused(raw_file(tensors, META_2), MaskFileError, "it holds the tensors")
    refused(raw_file(GATE_TENSOR, META_2), MaskFileError, "it holds the tensors ['gate']")
    refused(raw_file(with_gate({**ADDITIVE, **FORCED}), META_2), MaskFileError, "it holds the tensors")


@pytest.mark.parametrize(
    "meta",
    [
        {**META, "gate": GATE}, {**META, "format_version": 2}, {**META_2, "gate": None},
        {**META_2, "format_version": 1},
        {**META_2, "format_version": 2.5}, {**META_2, "format_version": True}, {**META_2, "format_version": "2"},
    ],
    ids=["1-with", "2-without", "2-null", "1-with-2s", "2.5", "true", "text"],
)  # fmt: skip
def test_a_version_that_does_not_fit_the_gate_is_refused(meta):
    for tensors in (ADDITIVE, with_gate(ADDITIVE)):
        refused(raw_file(tensors, meta), MaskFileError, "its metadata is wrong at ")


@pytest.mark.parametrize("tensors", [ADDITIVE, with_gate(ADDITIVE)], ids=["plain", "gate"])
def test_a_format_1_file_has_no_key_for_a_gate(tensors):
    """Not even an empty one, which the digest would leave out."""
    data = raw_file(tensors, {**META, "gate": None}, digest=content_digest(META, tensors))
    refused(data, MaskFileError, "format 1 has, or has not, the keys gate")


@pytest.mark.parametrize("key", ["creator", "settings", "alpha", "accepted_on", "data_sha256", "format_version"])
def test_a_key_left_out_is_refused_though_it_has_a_default(key):
    meta = {name: value for name, value in {**META, "settings": {}}.items() if name != key}
    digest = content_digest({**META, "settings": {}}, ADDITIVE)
    refused(raw_file(ADDITIVE, meta, digest=digest), MaskFileError, f"has, or has not, the keys {key}")


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        (("F16", "f2", [3, 8], WEIGHTS.astype("<f2").tobytes()), "tensor gate is float16 (3, 8)"),
        (("F64", "f8", [3, 8], WEIGHTS.astype("<f8").tobytes()), "tensor gate is float64 (3, 8)"),
        (("I8", "i1", [3, 8], WEIGHTS.astype("i1").tobytes()), "tensor gate is int8 (3, 8)"),
        (("F32", "f4", [8, 3], WEIGHTS.tobytes()), "tensor gate is float32 (8, 3)"),
        (("F32", "f4", [24], WEIGHTS.tobytes()), "tensor gate is float32 (24,)"),
        (("F32", "f4", [1, 3, 8], WEIGHTS.tobytes()), "tensor gate is float32 (1, 3, 8)"),
        (("F32", "f4", [2, 8], WEIGHTS[:2].tobytes()), "tensor gate is float32 (2, 8)"),
        (("F32", "f4", [0, 8], b""), "tensor gate is float32 (0, 8)"),
        (("BF16", "bf2", [3, 8], bytes(48)), "its tensors cannot be read"),
    ],
)
def test_weights_of_another_dtype_or_shape_are_refused(tensor, part):
    refused(raw_file({"gate": tensor, **ADDITIVE}, META_2), MaskFileError, part)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@BOTH
def test_weights_that_are_no_numbers_are_refused(make, tensors, value):
    bad = WEIGHTS.copy()
    bad[2, 7] = value
    with pytest.raises(MaskContentError, match="or not finite"):
        gated(make, weights=bad)
    refused(
        raw_file({"gate": ("F32", "f4", [3, 8], bad.tobytes()), **tensors}, META_2), MaskContentError, "not finite"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"threshold": 0}, "gate.threshold"), ({"threshold": 1.0}, "gate.threshold"),
        ({"threshold": -2}, "gate.threshold"), ({"threshold": None}, "gate.threshold"),
        ({"threshold": [0.5]}, "gate.threshold"),
        ({"bias": "much"}, "gate.bias"), ({"bias": None}, "gate.bias"), ({"pool": "first"}, "gate.pool"),
        ({"pool": ["last"]}, "gate.pool"), ({"measured_on": 5}, "gate.measured_on"), ({"auroc": 1.5}, "gate.auroc"),
        ({"false_positive_rate": 0.1}, "gate.false_positive_rate"),
        ({"true_positive_rate": {}}, "gate.true_positive_rate.value"),
        ({"true_positive_rate": {**RATE, "more": 1}}, "gate.true_positive_rate.more"),
        ({"true_positive_rate": {**RATE, "value": 2}}, "gate.true_positive_rate.value"),
        ({"true_positive_rate": {**RATE, "n": 0}}, "gate.true_positive_rate.n"),
        ({"true_positive_rate": {**RATE, "n": 1.5}}, "gate.true_positive_rate.n"),
        ({"surprise": 1}, "gate.surprise"), ({"__class__": "x"}, "gate.__class__"),
    ],
    ids=str,
)  # fmt: skip
def test_a_gate_of_the_wrong_shape_is_refused_and_placed(change, place):
    refused(raw_file(with_gate(ADDITIVE), changed(**change)), MaskFileError, f"its metadata is wrong at {place}: ")


@pytest.mark.parametrize("gate", [[], "gate", 1, True, [GATE], {"gate": GATE}, {}], ids=str)
def test_a_gate_that_is_no_gate_is_refused(gate):
    refused(raw_file(with_gate(ADDITIVE), {**META_2, "gate": gate}), MaskFileError, "its metadata is wrong at gate")


@pytest.mark.parametrize("key", sorted(GATE))
def test_a_gate_without_one_of_its_keys_is_refused(key):
    gate = {name: value for name, value in GATE.items() if name != key}
    refused(raw_file(with_gate(ADDITIVE), {**META_2, "gate": gate}), MaskFileError, f"wrong at gate.{key}: ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"threshold": 0.75', '"threshold": NaN'),
        ('"threshold": 0.75', '"threshold": 1e999'),
        ('"threshold": 0.75', '"threshold": 0.75, "threshold": 0.01'),
        ('"bias": -1.5', '"bias": -1e999'),
        ('"bias": -1.5', '"bias": "nan"'),
        ('"bias": -1.5', '"bias": ' + "[" * 5000 + "]" * 5000),
        ('"measured_on": "by hand"', r'"measured_on": "\ud800"'),
    ],
    ids=["nan", "infinite", "twice", "bias-infinite", "bias-nan", "deep", "surrogate"],
)
def test_metadata_that_is_no_strict_json_is_refused(old, new):
    inner = json.dumps({**META_2, "sha256": "0" * 64})
    assert old in inner
    refused(raw_file(with_gate(ADDITIVE), metadata={"moesteer": inner.replace(old, new)}), MaskFileError)


def test_a_lying_size_of_the_gate_is_refused():
    data = gated().to_bytes()
    header, body = split_file(data)
    outer = json.loads(header)
    for offsets in ([0, 95], [0, 97], [4, 100], [0, 2**40]):
        outer["gate"]["data_offsets"] = offsets
        text = json.dumps(outer).encode()
        refused(struct.pack("<Q", len(text)) + text + body, MaskFileError, "its tensors cannot be read")


# ---------------------------------------------------------------- in Python


def test_half_a_gate_is_refused():
    for weights, facts in ((WEIGHTS, None), (None, told())):
        with pytest.raises(MaskContentError, match="half a gate"):
            additive().with_gate(weights, facts)


@pytest.mark.parametrize(
    "weights",
    [WEIGHTS.astype(np.float64), WEIGHTS.astype(">f4"), WEIGHTS[:2], WEIGHTS.T, WEIGHTS.ravel(), WEIGHTS[:, :4]],
    ids=["float64", "big-endian", "short", "turned", "flat", "narrow"],
)
def test_weights_that_do_not_fit_the_model_are_refused(weights):
    with pytest.raises(MaskContentError, match="the gate's weights are"):
        gated(weights=weights)


def test_weights_that_are_not_contiguous_are_saved_right():
    assert gated(weights=np.asfortranarray(WEIGHTS)).to_bytes() == gated().to_bytes()


def test_the_version_follows_the_gate():
    for changes in ({"format_version": 2}, {"format_version": 1, "gate": told()}):
        with pytest.raises(ValidationError, match="format 2 is that of gated masks"):
            info(**changes)
    with pytest.raises(ValidationError, match="format 2 is that of gated masks"):
        gated().with_info(gate=None)
    with pytest.raises(ValidationError):
        MaskInfo.model_validate({**additive().info.model_dump(), "format_version": 3})


def test_a_gate_survives_changes_of_the_mask_that_do_not_touch_it():
    mask = gated()
    for other in (mask.top(2), mask.with_info(method="other"), SteeringMask.from_bytes(mask.to_bytes(), where="x")):
        assert other.gated and other.info.gate == told() and np.array_equal(other.gate_LE, WEIGHTS)


def test_a_gate_is_described():
    assert describe(gated())["gate"] == told().model_dump(mode="json") and describe(additive())["gate"] is None


def test_a_rate_is_what_it_says():
    assert told().true_positive_rate == GateRate(value=0.5, low=0.125, high=0.5, n=16)

"""mask.py: the file format from its description, every fault of docs' checklist A1, and checks of meaning.

`raw_file` writes safetensors bytes by hand, `content_digest` computes the sha256 from its description: both
without moesteer or safetensors, so that a damaged file is damaged in one known way only.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer import files
from moesteer.errors import (
    FileError,
    LimitError,
    MaskContentError,
    MaskFileError,
    MaskMismatchError,
    MoesteerError,
    NoEffectError,
)
from moesteer.fingerprint import Fingerprint
from moesteer.mask import Intent, MaskInfo, SteeringMask

LAYERS, EXPERTS, TOP_K = (1, 3, 4), 8, 2
LIMIT_S = 2.0
"""No fault may take longer (invariant I1)."""

STRENGTH = np.zeros((3, 8), np.float32)
STRENGTH[0, 1], STRENGTH[1, 5], STRENGTH[2, 7], STRENGTH[2, 0] = 1.5, -2.0, 0.25, -1.5
SIGMA = np.array([0.5, 2.0, 1.0], np.float32)
FORCE = np.zeros((3, 8), np.int8)
FORCE[0, 1], FORCE[0, 2], FORCE[2, 3] = 1, 1, -1


def fingerprint(**changes):
    given = {
        "model_type": "fake_moe", "layer_ids": LAYERS, "experts": EXPERTS, "top_k": TOP_K,
        "scoring": "softmax-topk k=2", "router_sha256": "ab" * 32,
    }  # fmt: skip
    return Fingerprint(**{**given, **changes})


def info(**changes):
    given = {
        "fingerprint": fingerprint(),
        "method": "hand-made",
        "settings": {"x": 1},
        "intent": Intent(toward="refuse"),
    }
    return MaskInfo(**{**given, **changes})


def additive(**changes):
    return SteeringMask(info(**changes), strength_LE=STRENGTH, sigma_L=SIGMA)


def forced(force=FORCE, **changes):
    return SteeringMask(info(**changes), force_LE=np.asarray(force, np.int8))


MASKS = {"additive": additive, "forced": forced}


def same(one, other):
    """Whether two masks say the same, without asking them for their digest."""
    tables = ("strength_LE", "sigma_L", "force_LE")
    pairs = [(getattr(one, name), getattr(other, name)) for name in tables]
    return one.info == other.info and all(
        a is b if a is None or b is None else (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in pairs
    )


# ---------------------------------------------------------------- the format, written by hand


META = {
    "format_version": 1,
    "fingerprint": {
        "model_type": "fake_moe", "layer_ids": [1, 3, 4], "experts": 8, "top_k": 2, "scoring": "softmax-topk k=2",
        "router_sha256": "ab" * 32,
    },
    "method": "hand-made", "settings": {"x": 1}, "intent": {"toward": "refuse", "scenario": None}, "alpha": 1.0,
    "data_sha256": None, "accepted_on": None, "creator": "moesteer",
}  # fmt: skip

ADDITIVE = {"sigma": ("F32", "f4", [3], SIGMA.tobytes()), "strength": ("F32", "f4", [3, 8], STRENGTH.tobytes())}
FORCED = {"force": ("I8", "i1", [3, 8], FORCE.tobytes())}


def content_digest(meta, tensors):
    """sha256 over canonical JSON of the metadata, then name, dtype, shape and bytes per tensor, NUL between."""
    parts = [(json.dumps(meta, sort_keys=True, ensure_ascii=False) + "\n").encode()]
    for name in sorted(tensors):
        _, dtype, shape, data = tensors[name]
        parts += [json.dumps([name, dtype, shape]).encode(), data]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def raw_file(tensors=None, meta=None, *, header=None, metadata=None, digest=None, tail=b"", extra=None):
    """Mask bytes. header: the whole outer header as text; metadata: the outer `__metadata__` value."""
    tensors = ADDITIVE if tensors is None else tensors
    meta = META if meta is None else meta
    body, offset, outer = b"", 0, {}
    for name, (kind, _, shape, data) in tensors.items():
        outer[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        body, offset = body + data, offset + len(data)
    inner = {**meta, "sha256": digest or content_digest(meta, tensors)}
    outer["__metadata__"] = {"moesteer": json.dumps(inner)} if metadata is None else metadata
    text = (header or json.dumps({**outer, **(extra or {})})).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body + tail


def split_file(data):
    """(header as text, body) of mask bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].decode(), data[8 + length :]


@contextmanager
def in_time(limit_s=LIMIT_S):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < limit_s


def refused(data, error, *parts):
    with in_time(), pytest.raises(MoesteerError) as caught:
        SteeringMask.from_bytes(data, where="the file")
    assert type(caught.value) is error, repr(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.where and caught.value.expected and caught.value.do


@pytest.mark.parametrize("tensors, mask", [(ADDITIVE, additive), (FORCED, forced)])
def test_a_file_written_by_hand_from_the_format_loads(tensors, mask):
    loaded = SteeringMask.from_bytes(raw_file(tensors), where="x")
    assert same(loaded, mask())
    assert loaded.sha256 == content_digest(META, tensors)


@pytest.mark.parametrize("tensors, mask", [(ADDITIVE, additive), (FORCED, forced)])
def test_a_saved_file_holds_what_the_format_says(tensors, mask):
    header, body = split_file(mask().to_bytes())
    outer = json.loads(header)
    inner = json.loads(outer.pop("__metadata__")["moesteer"])
    assert inner.pop("sha256") == content_digest(META, tensors)
    assert inner == META
    assert {name: (v["dtype"], v["shape"]) for name, v in outer.items()} == {
        name: (kind, shape) for name, (kind, _, shape, _) in tensors.items()
    }
    for name, value in outer.items():
        assert body[slice(*value["data_offsets"])] == tensors[name][3]


def test_the_digest_of_format_1_is_pinned():
    # a change here is a change of file format: old masks would be refused
    assert additive().sha256 == "779b43e32c7890b977db26cbef530f85ed83451cfeec777b32e06d4def25376c"
    assert forced().sha256 == "8a4d8e2b7b42aae8913c4aec7ff640d98a2cff897a5f8a85a7c12a1673fb04d9"


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_saving_and_loading_gives_the_same_mask_and_the_same_bytes(make, tmp_path):
    path = tmp_path / "a folder" / "mäsk.safetensors"
    make().save(path)
    loaded = SteeringMask.load(path)
    assert same(loaded, make())
    assert loaded.to_bytes() == path.read_bytes() == make().to_bytes()
    assert loaded.sha256 == make().sha256


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_mask_survives_a_round_trip(data):
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    print_ = fingerprint(layer_ids=tuple(range(layers)), experts=experts, top_k=experts)
    numbers = st.floats(-1e4, 1e4, width=32)
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\é'), inner, max_size=3),
        max_leaves=5,
    )
    some = info(
        fingerprint=print_,
        settings=data.draw(st.dictionaries(st.text("xyz\n\t\u2028"), json_values, max_size=3)),
        alpha=data.draw(st.floats(allow_nan=False, allow_infinity=False)),
    )
    strength = data.draw(st.lists(numbers, min_size=layers * experts, max_size=layers * experts))
    sigma = data.draw(st.lists(st.floats(0, 1e4, width=32), min_size=layers, max_size=layers))
    mask = SteeringMask(
        some, strength_LE=np.array(strength, np.float32).reshape(layers, experts), sigma_L=np.array(sigma, np.float32)
    )
    loaded = SteeringMask.from_bytes(mask.to_bytes(), where="x")
    assert same(loaded, mask) and loaded.to_bytes() == mask.to_bytes()


def test_a_table_that_is_not_contiguous_is_saved_right():
    turned = np.asfortranarray(STRENGTH)
    assert not turned.flags.c_contiguous
    mask = SteeringMask(info(), strength_LE=turned, sigma_L=SIGMA)
    assert mask.to_bytes() == additive().to_bytes() and mask.sha256 == additive().sha256


@pytest.mark.parametrize(
    "change",
    [
        {"method": "other"}, {"alpha": 2.0}, {"settings": {"x": 2}}, {"intent": Intent(toward="comply")},
        {"creator": "x"}, {"data_sha256": "0"}, {"accepted_on": {"s": 1}},
        {"fingerprint": fingerprint(router_sha256="cd" * 32)},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_field_of_the_provenance_enters_the_digest(change):
    assert additive(**change).sha256 != additive().sha256


def test_every_number_enters_the_digest():
    for table in (STRENGTH, SIGMA):
        for place in np.ndindex(table.shape):
            other = table.copy()
            other[place] = np.nextafter(other[place], np.float32(1e3))
            changed = {"strength_LE": STRENGTH, "sigma_L": SIGMA}
            changed["strength_LE" if table is STRENGTH else "sigma_L"] = other
            assert SteeringMask(info(), **changed).sha256 != additive().sha256


# ---------------------------------------------------------------- checklist A1: bytes


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_shorter_than_its_length_field_is_refused(size):
    refused(additive().to_bytes()[:size], MaskFileError, f"it is {size} bytes long")


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_every_truncation_is_refused(make):
    data = make().to_bytes()
    for size in sorted({*range(8, len(data), 64), *range(len(data) - 9, len(data))}):
        refused(data[:size], MaskFileError, "not a whole steering mask")


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("tail", [b"\0", b"P", b"PK\5\6" + bytes(18)], ids=["NUL", "byte", "zip-end"])
def test_appended_bytes_are_refused(make, tail):
    refused(make().to_bytes() + tail, MaskFileError, "its tensors cannot be read")


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def zip_of(data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return out.getvalue()


@pytest.mark.parametrize("pack", [bytes, zip_of, gzip.compress], ids=["pickle", "torch-zip", "gzip"])
def test_a_pickle_under_a_masks_name_is_refused_and_never_run(pack, tmp_path):
    canary = tmp_path / "canary"
    data = pickle.dumps(Canary(canary), protocol=2)
    path = tmp_path / "mask.safetensors"
    path.write_bytes(pack(data))
    with in_time(), pytest.raises(MaskFileError, match=r"header claims|bytes long"):
        SteeringMask.load(path)
    assert not canary.exists()
    pickle.loads(data).close()  # the canary does sing where it is loaded
    assert canary.exists()


@pytest.mark.parametrize(
    "data",
    [gzip.compress(b"x" * 100), b"GGUF" + struct.pack("<IQQ", 3, 2, 5) + bytes(64), json.dumps(META).encode()],
    ids=["gzip", "gguf", "json"],
)
def test_other_formats_are_refused(data):
    refused(data, MaskFileError, "its header claims")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 1024 * 1024 + 1])
def test_a_header_length_beyond_the_limit_is_refused(length):
    data = struct.pack("<Q", length) + b" " * (2 * 1024 * 1024)
    refused(data, MaskFileError, f"its header claims {length:,} bytes")


def test_a_true_header_above_one_mib_is_refused_and_below_accepted():
    for size, fine in ((900_000, True), (1_100_000, False)):
        meta = {**META, "settings": {"x": "y" * size}}
        data = raw_file(meta=meta)
        if fine:
            assert SteeringMask.from_bytes(data, where="x").info.settings == meta["settings"]
        else:
            refused(data, MaskFileError, "its header claims")


def test_a_header_length_beyond_the_file_is_refused():
    data = additive().to_bytes()
    refused(struct.pack("<Q", len(data) - 7) + data[8:], MaskFileError, "its header claims")


GOOD_HEADER = split_file(raw_file())[0].rstrip()


@pytest.mark.parametrize(
    "header, part",
    [
        ("[]", "TypeError"),
        ("3", "TypeError"),
        ('"text"', "TypeError"),
        ("null", "TypeError"),
        ("", "JSONDecodeError"),
        ("{}", "KeyError"),
        ("{" * 10_000, "header cannot be read"),
        ("[" * 10_000 + "]" * 10_000, "RecursionError"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "RecursionError"),
        (GOOD_HEADER[:-1] + ', "sigma": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}', "occurs twice"),
        (GOOD_HEADER[:-1] + ', "x": NaN}', "NaN is not JSON"),
        (GOOD_HEADER + "}", "Extra data"),
        (GOOD_HEADER[:-1], "JSONDecodeError"),
    ],
    ids=lambda text: text[:12],
)
def test_an_outer_header_that_is_not_one_object_with_metadata_is_refused(header, part):
    refused(raw_file(header=header or " "), MaskFileError, part)


def test_a_header_that_is_not_utf8_is_refused():
    text = GOOD_HEADER.encode().replace(b"hand-made", b"hand-m\xe4de")
    data = struct.pack("<Q", len(text)) + text + SIGMA.tobytes() + STRENGTH.tobytes()
    refused(data, MaskFileError, "UnicodeDecodeError")


@pytest.mark.parametrize(
    "metadata, part",
    [
        ({}, "KeyError: 'moesteer'"),
        ({"other": "x"}, "KeyError: 'moesteer'"),
        ([], "TypeError"),
        ("text", "TypeError"),
        ({"moesteer": 5}, "TypeError"),
        ({"moesteer": None}, "TypeError"),
        ({"moesteer": META}, "TypeError"),
        ({"moesteer": [1]}, "TypeError"),
        ({"moesteer": ""}, "JSONDecodeError"),
        ({"moesteer": "[]"}, "its metadata is not an object"),
        ({"moesteer": "7"}, "its metadata is not an object"),
        ({"moesteer": "[" * 10_000}, "RecursionError"),
        ({"moesteer": '{"a": 1, "a": 1}'}, "occurs twice"),
        ({"moesteer": '{"alpha": NaN}'}, "NaN is not JSON"),
        ({"moesteer": '{"alpha": -Infinity}'}, "-Infinity is not JSON"),
        ({"moesteer": "1" * 5000}, "ValueError"),
    ],
    ids=lambda value: json.dumps(value)[:30] if not isinstance(value, str) else value[:20],
)
def test_metadata_that_is_not_our_object_is_refused(metadata, part):
    refused(raw_file(metadata=metadata), MaskFileError, part)


@pytest.mark.parametrize(
    "change, place",
    [
        ({"unknown": 1}, "unknown"),
        ({"method": None}, "method"),
        ({"method": 7}, "method"),
        ({"intent": "refuse"}, "intent"),
        ({"intent": {}}, "intent.toward"),
        ({"settings": []}, "settings"),
        ({"alpha": "much"}, "alpha"),
        ({"fingerprint": None}, "fingerprint"),
        ({"fingerprint": {**META["fingerprint"], "experts": "many"}}, "fingerprint.experts"),
        ({"fingerprint": {**META["fingerprint"], "more": 1}}, "fingerprint.more"),
        ({"format_version": "1"}, "format_version"),
        ({"format_version": 0}, "format_version"),
        ({"format_version": None}, "format_version"),
        ({"format_version": [1]}, "format_version"),
    ],
)
def test_metadata_of_the_wrong_shape_is_refused_and_placed(change, place):
    refused(raw_file(meta={**META, **change}), MaskFileError, f"its metadata is wrong at {place}: ")


@pytest.mark.parametrize("version", [3, 99, 10**30])
def test_a_newer_format_says_so(version):
    meta = {**META, "format_version": version, "a_field_of_the_future": 1}
    refused(raw_file(meta=meta), MaskFileError, f"made by a newer version (format {version})", "upgrade moesteer")


@pytest.mark.parametrize("digest", ["0" * 64, "", None, 5, content_digest(META, FORCED)])
def test_a_wrong_or_missing_sha256_is_refused(digest):
    inner = {**META, "sha256": digest}
    refused(raw_file(metadata={"moesteer": json.dumps(inner)}), MaskFileError, "does not match its sha256")
    refused(raw_file(metadata={"moesteer": json.dumps(META)}), MaskFileError, "does not match its sha256")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"strength": ADDITIVE["strength"]},
        {"sigma": ADDITIVE["sigma"]},
        {**ADDITIVE, **FORCED},
        {**FORCED, "sigma": ADDITIVE["sigma"]},
        {**ADDITIVE, "../../etc/passwd": ADDITIVE["sigma"]},
        {**ADDITIVE, "": ADDITIVE["sigma"]},
        {**ADDITIVE, "x" * 10_000: ADDITIVE["sigma"]},
        {**ADDITIVE, "a\0b\u202e": ADDITIVE["sigma"]},
        {"Strength": ADDITIVE["strength"], "sigma": ADDITIVE["sigma"]},
    ],
    ids=lambda tensors: "+".join(tensors)[:30] or "none",
)
def test_other_tensors_than_a_masks_are_refused(tensors):
    refused(raw_file(tensors), MaskFileError, "it holds the tensors")


def with_tensor(name, kind, dtype, shape, data):
    base = FORCED if name == "force" else ADDITIVE
    return {**base, name: (kind, dtype, shape, data)}


@pytest.mark.parametrize(
    "tensors, part",
    [
        (with_tensor("strength", "F64", "f8", [3, 8], STRENGTH.astype("f8").tobytes()), "strength is float64"),
        (with_tensor("strength", "F16", "f2", [3, 8], STRENGTH.astype("f2").tobytes()), "strength is float16"),
        (with_tensor("strength", "I64", "i8", [3, 8], STRENGTH.astype("i8").tobytes()), "strength is int64"),
        (with_tensor("strength", "I32", "i4", [3, 8], STRENGTH.tobytes()), "strength is int32"),
        (with_tensor("sigma", "F64", "f8", [3], SIGMA.astype("f8").tobytes()), "sigma is float64"),
        (with_tensor("force", "I64", "i8", [3, 8], FORCE.astype("i8").tobytes()), "force is int64"),
        (with_tensor("force", "U8", "u1", [3, 8], FORCE.tobytes()), "force is uint8"),
        (with_tensor("force", "BOOL", "b1", [3, 8], FORCE.astype("?").tobytes()), "force is bool"),
        (with_tensor("strength", "F32", "f4", [8, 3], STRENGTH.tobytes()), "strength is float32 (8, 3)"),
        (with_tensor("strength", "F32", "f4", [24], STRENGTH.tobytes()), "strength is float32 (24,)"),
        (with_tensor("sigma", "F32", "f4", [3, 1], SIGMA.tobytes()), "sigma is float32 (3, 1)"),
        (with_tensor("sigma", "F32", "f4", [1], SIGMA[:1].tobytes()), "sigma is float32 (1,)"),
        (with_tensor("sigma", "F32", "f4", [], SIGMA[:1].tobytes()), "sigma is float32 ()"),
        (with_tensor("force", "I8", "i1", [0, 8], b""), "force is int8 (0, 8)"),
        (with_tensor("strength", "BF16", "bf2", [3, 8], bytes(48)), "its tensors cannot be read"),
        (with_tensor("strength", "F8_E4M3", "f1", [3, 8], bytes(24)), "its tensors cannot be read"),
        (with_tensor("strength", ">f4", ">f4", [3, 8], STRENGTH.astype(">f4").tobytes()), "cannot be read"),
        (with_tensor("strength", "F32", "f4", [3, 9], STRENGTH.tobytes()), "its tensors cannot be read"),
        (with_tensor("strength", "F32", "f4", [-3, -8], STRENGTH.tobytes()), "its tensors cannot be read"),
        (with_tensor("strength", "F32", "f4", [2**62, 2**62], STRENGTH.tobytes()), "its tensors cannot be read"),
    ],
)
def test_another_dtype_or_shape_is_refused(tensors, part):
    refused(raw_file(tensors), MaskFileError, part)


@pytest.mark.parametrize(
    "sigma, strength",
    [([0, 12], [8, 104]), ([0, 12], [16, 112]), ([12, 0], [12, 108]), ([0, 12], [12, 2**64]), ([-4, 8], [12, 108])],
    ids=["overlap", "hole", "backwards", "beyond", "negative"],
)
def test_offsets_that_are_not_one_gapless_row_are_refused(sigma, strength):
    outer = json.loads(GOOD_HEADER)
    outer["sigma"]["data_offsets"], outer["strength"]["data_offsets"] = sigma, strength
    refused(raw_file(header=json.dumps(outer), tail=bytes(4)), MaskFileError, "its tensors cannot be read")
    refused(raw_file(header=json.dumps(outer)), MaskFileError, "its tensors cannot be read")


def flip(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_2000_single_bit_flips_in_the_data_are_all_refused():
    rng = np.random.default_rng(0)
    shape = (24, 64)
    print_ = fingerprint(layer_ids=tuple(range(24)), experts=64, top_k=8)
    mask = SteeringMask(
        info(fingerprint=print_), strength_LE=rng.normal(size=shape).astype("f4"), sigma_L=np.ones(24, "f4")
    )
    data = mask.to_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    draw = random.Random(0)
    for bit in draw.sample(range(start * 8, len(data) * 8), 2000):
        # NaN included: the digest is looked at before the numbers
        refused(flip(data, bit), MaskFileError, "does not match its sha256")


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_every_single_bit_flip_in_length_and_header_is_refused(make):
    data = make().to_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for bit in range(end * 8):
        refused(flip(data, bit), MaskFileError)


# ---------------------------------------------------------------- checklist A1: paths


@pytest.mark.parametrize(
    "make, error, part",
    [
        (lambda p: os.mkfifo(p), FileError, "not a regular file"),
        (lambda p: p.mkdir(), FileError, "directory"),
        (lambda p: p.symlink_to(p), FileError, "symbolic links"),
        (lambda p: p.symlink_to("/dev/zero"), FileError, "not a regular file"),
        (lambda p: p.symlink_to(p.with_name("gone")), FileError, "No such file"),
        (lambda p: None, FileError, "No such file"),
        (lambda p: p.write_bytes(b""), MaskFileError, "it is 0 bytes long"),
        (lambda p: p.write_bytes(bytes(files.LIMITS_BYTES["mask"] + 1)), LimitError, "larger than 16,777,216 bytes"),
    ],
    ids=["fifo", "directory", "symlink-loop", "device", "dangling", "missing", "empty", "17-MB"],
)
def test_a_path_that_holds_no_mask_is_refused_in_time(make, error, part, tmp_path):
    path = tmp_path / "mask.safetensors"
    make(path)
    with in_time(), pytest.raises(MoesteerError) as caught:
        SteeringMask.load(path)
    assert type(caught.value) is error and part in str(caught.value) and str(path) in caught.value.where


def test_a_mask_is_read_once_so_that_what_is_checked_is_what_is_used(tmp_path, monkeypatch):
    path = tmp_path / "mask"
    additive().save(path)
    reads = []
    real = files.read_bytes

    def read_then_replace(path, *, kind):
        reads.append(kind)
        data = real(path, kind=kind)
        path.write_bytes(b"replaced while being read")
        return data

    monkeypatch.setattr(files, "read_bytes", read_then_replace)
    assert same(SteeringMask.load(path), additive()) and reads == ["mask"]


# ---------------------------------------------------------------- numbers that cannot be applied


def poisoned(table, place, value):
    copy = table.copy()
    copy[place] = value
    return copy


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 10001.0, -3e38])
@pytest.mark.parametrize("name, place, where", [("strength", (1, 5), "layer 3, expert 5"), ("sigma", (2,), "layer 4")])
def test_numbers_that_are_not_sensible_are_refused_with_a_right_sha256_too(value, name, place, where):
    tables = {"strength": STRENGTH, "sigma": SIGMA}
    tables[name] = poisoned(tables[name], place, value)
    with pytest.raises(MaskContentError, match=f"{name} holds") as caught:
        SteeringMask(info(), strength_LE=tables["strength"], sigma_L=tables["sigma"])
    assert caught.value.where == where
    kind, dtype, shape, _ = ADDITIVE[name]
    refused(raw_file({**ADDITIVE, name: (kind, dtype, shape, tables[name].tobytes())}), MaskContentError, where)


def test_the_largest_strength_and_the_smallest_are_accepted():
    for value in (1e4, -1e4, 1e-45, -0.0):
        SteeringMask(info(), strength_LE=poisoned(STRENGTH, (0, 0), value), sigma_L=SIGMA)


def test_a_negative_sigma_is_refused():
    negative = poisoned(SIGMA, (1,), -0.5)
    refused(
        raw_file({**ADDITIVE, "sigma": ("F32", "f4", [3], negative.tobytes())}), MaskContentError, "sigma is negative"
    )


@pytest.mark.parametrize("value", [2, -2, 127, -128])
def test_a_force_outside_minus_one_to_one_is_refused(value):
    bad = poisoned(FORCE, (1, 1), value)
    with pytest.raises(MaskContentError, match="other numbers than -1, 0 and 1"):
        forced(bad)
    refused(raw_file({"force": ("I8", "i1", [3, 8], bad.tobytes())}), MaskContentError, "other numbers")


@pytest.mark.parametrize(
    "layer, row, part, where",
    [
        (1, [1, 1, 1, 0, 0, 0, 0, 0], "3 experts are switched on where 2 are selected", "row 1"),
        (2, [-1] * 7 + [0], "7 of 8 experts are switched off where 2 must be selected", "row 2"),
        (0, [-1] * 7 + [1], "7 of 8 experts are switched off", "row 0"),
    ],
)
def test_a_force_that_a_layer_cannot_meet_is_refused(layer, row, part, where):
    bad = np.zeros((3, 8), np.int8)
    bad[layer] = row
    with pytest.raises(MaskContentError, match=part) as caught:
        forced(bad)
    assert where in caught.value.where
    refused(raw_file({"force": ("I8", "i1", [3, 8], bad.tobytes())}), MaskContentError, part)


def test_a_force_at_the_limits_of_a_layer_is_accepted():
    forced([[1, 1, -1, -1, -1, -1, -1, -1], [0] * 8, [-1] * 6 + [0, 0]])


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"strength_LE": STRENGTH},
        {"sigma_L": SIGMA},
        {"strength_LE": STRENGTH, "sigma_L": SIGMA, "force_LE": FORCE},
        {"strength_LE": STRENGTH[:2], "sigma_L": SIGMA},
        {"strength_LE": STRENGTH.T, "sigma_L": SIGMA},
        {"force_LE": FORCE[:, :4]},
        {"force_LE": FORCE.ravel()},
    ],
    ids=["none", "strength", "sigma", "all", "two-layers", "turned", "four-experts", "flat"],
)
def test_tables_that_do_not_fit_together_are_refused(tables):
    with pytest.raises(MaskContentError, match="tables do not fit together"):
        SteeringMask(info(), **tables)


@pytest.mark.parametrize("alpha", [np.nan, np.inf, -np.inf])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(MaskContentError, match="alpha is not a number"):
        additive(alpha=float(alpha))


# the digest of metadata that cannot be written as JSON is computed before it is judged.
@pytest.mark.parametrize(
    "old, new",
    [
        ('"alpha": 1.0', '"alpha": 1e999'),
        ('"alpha": 1.0', '"alpha": "nan"'),
        ('"alpha": 1.0', '"alpha": "-inf"'),
        ('"method": "hand-made"', r'"method": "\ud800"'),
        ('{"x": 1}', r'{"x": "\udfff"}'),
        ('{"x": 1}', '{"x": ' + "[" * 300 + "]" * 300 + "}"),
    ],
    ids=["alpha-1e999", "alpha-nan-text", "alpha-inf-text", "surrogate-method", "surrogate-setting", "depth-300"],
)
def test_metadata_that_cannot_be_digested_ends_in_a_named_error(old, new):
    inner = json.dumps({**META, "sha256": "0" * 64})
    assert old in inner
    data = raw_file(metadata={"moesteer": inner.replace(old, new)})
    with in_time(), pytest.raises(MoesteerError):
        SteeringMask.from_bytes(data, where="x")


@pytest.mark.parametrize(
    "tables",
    [
        {"strength_LE": STRENGTH.astype(np.float64), "sigma_L": SIGMA},
        {"strength_LE": STRENGTH.astype(">f4"), "sigma_L": SIGMA},
        {"strength_LE": STRENGTH, "sigma_L": SIGMA.astype(np.float64)},
        {"force_LE": FORCE.astype(np.int64)},
    ],
    ids=["float64", "big-endian", "float64-sigma", "int64-force"],
)
def test_whatever_a_mask_accepts_it_can_save_and_load(tables):
    try:
        mask = SteeringMask(info(), **tables)
    except MaskContentError:
        return
    loaded = SteeringMask.from_bytes(mask.to_bytes(), where="x")
    assert np.array_equal(loaded.values_LE, mask.values_LE)


@pytest.mark.parametrize("sigma", [[1.0], [1.0] * 4, [1.0, 1.0, 1.0, np.nan]], ids=["short", "long", "long-nan"])
def test_a_sigma_that_has_not_one_value_per_layer_is_refused(sigma):
    with pytest.raises(MaskContentError, match="tables do not fit together"):
        SteeringMask(info(), strength_LE=STRENGTH, sigma_L=np.array(sigma, np.float32))


@pytest.mark.parametrize("half", [{"strength_LE": STRENGTH}, {"sigma_L": SIGMA}], ids=["strength", "sigma"])
def test_a_force_beside_half_an_additive_mask_is_refused(half):
    with pytest.raises(MaskContentError, match="tables do not fit together"):
        SteeringMask(info(), force_LE=FORCE, **half)


# ---------------------------------------------------------------- another model


@pytest.mark.parametrize(
    "change, part",
    [
        ({"model_type": "other"}, "model_type: mask has fake_moe, model has other"),
        ({"layer_ids": (1, 3, 5)}, "layer_ids: mask has (1, 3, 4), model has (1, 3, 5)"),
        ({"layer_ids": (1, 3)}, "layer_ids"),
        ({"experts": 16}, "experts: mask has 8, model has 16"),
        ({"top_k": 4}, "top_k: mask has 2, model has 4"),
        ({"scoring": "sigmoid k=2"}, "scoring"),
        ({"top_k": 4, "experts": 16, "router_sha256": "0"}, "experts: mask has 8, model has 16; top_k"),
    ],
)
@pytest.mark.parametrize("allow", [False, True])
def test_a_model_of_another_shape_is_refused_whatever_is_allowed(change, part, allow):
    with pytest.raises(MaskMismatchError, match="another shape") as caught:
        additive().check_model(fingerprint(**change), allow_other_checkpoint=allow)
    assert part in caught.value.where


def test_another_checkpoint_is_refused_by_default_and_accepted_when_allowed():
    other = fingerprint(router_sha256="cd" * 32)
    with pytest.raises(MaskMismatchError, match="another checkpoint") as caught:
        additive().check_model(other)
    assert "--allow-other-checkpoint" in caught.value.do and "cdcdcdcdcdcd" in caught.value.where
    additive().check_model(other, allow_other_checkpoint=True)
    additive().check_model(fingerprint())


# ---------------------------------------------------------------- what a mask can be asked


def loop_top(table, count):
    cells = [(abs(float(v)), -i, float(v)) for i, v in enumerate(table.ravel())]
    keep = {-i for _, i, _ in sorted(cells, reverse=True)[:count]}
    return [float(v) if i in keep else 0.0 for i, v in enumerate(table.ravel())]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 24, 100])
@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_top_keeps_the_largest_entries_and_of_equals_the_first(make, count):
    mask = make()
    best = mask.top(count)
    assert best.values_LE.ravel().tolist() == loop_top(mask.values_LE, count)
    assert best.values_LE.dtype == mask.values_LE.dtype and best.info == mask.info and best.forced == mask.forced
    assert best.expert_count == min(count, mask.expert_count)
    assert same(mask, make())  # the mask itself is as it was
    assert same(mask.top(100), mask)


@pytest.mark.parametrize("alpha", [None, 1.0, -2.0, 0.0])
def test_the_bias_is_alpha_times_sigma_times_strength(alpha):
    mask = additive(alpha=0.5)
    scale = 0.5 if alpha is None else alpha
    expected = [[scale * float(SIGMA[i]) * float(STRENGTH[i, e]) for e in range(8)] for i in range(3)]
    assert mask.bias_LE(alpha).dtype == np.float32
    assert mask.bias_LE(alpha).tolist() == expected  # powers of two and halves: exact


def test_a_forced_mask_has_no_bias():
    assert forced().bias_LE(3.0).shape == (3, 8) and not forced().bias_LE(3.0).any()


def test_other_provenance_keeps_the_numbers_and_is_validated():
    changed = additive().with_info(method="other", alpha=2.0, intent={"toward": "comply"})
    assert (changed.info.method, changed.info.alpha, changed.info.intent.toward) == ("other", 2.0, "comply")
    assert changed.info.fingerprint == additive().info.fingerprint and changed.info.settings == {"x": 1}
    assert same(changed.with_info(method="hand-made", alpha=1.0, intent=Intent(toward="refuse")), additive())
    with pytest.raises(ValueError, match="extra"):
        additive().with_info(nonsense=1)
    with pytest.raises(MaskContentError, match="alpha"):
        additive().with_info(alpha=float("nan"))


def test_properties_say_what_the_tables_hold():
    assert (additive().forced, forced().forced) == (False, True)
    assert (additive().expert_count, forced().expert_count) == (4, 3)
    assert additive().layer_ids == LAYERS
    assert additive().values_LE is not None and forced().values_LE.dtype == np.int8


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_a_mask_without_entries_is_valid_and_refuses_to_steer(make, tmp_path):
    empty = make().top(0)
    empty.save(tmp_path / "m")
    assert same(SteeringMask.load(tmp_path / "m"), empty)
    with pytest.raises(NoEffectError, match="no entries") as caught:
        empty.require_entries()
    assert "3 x 8" in caught.value.where
    make().require_entries()


class FakeModel:
    """Records what `apply` asks of a model."""

    def __init__(self):
        self.asked, self.left = None, False

    @contextmanager
    def steered(self, masks, **options):
        self.asked = (masks, options)
        yield "receipt"
        self.left = True


def test_apply_steers_with_this_mask_and_ends_with_the_block():
    model, mask = FakeModel(), additive()
    with mask.apply(model, alpha=0.5, allow_other_checkpoint=True) as receipt:
        assert receipt == "receipt" and not model.left
    masks, options = model.asked
    assert masks == [mask] and options == {"alphas": [0.5], "allow_other_checkpoint": True} and model.left

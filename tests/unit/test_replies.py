"""evaluate/replies.py: served only to the very same question, whole or not at all, and never trusted unread."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesteer import files, runs
from moesteer.backends.hf import Model
from moesteer.conversations import Message
from moesteer.errors import FileError, InputError
from moesteer.evaluate.replies import WITNESSES, KeptReply, ReplyCache
from moesteer.gate import GateInfo, GateRate
from moesteer.mask import Intent, MaskInfo, SteeringMask

FINGERPRINT = {
    "model_type": "qwen3_moe", "layer_ids": (0, 1), "experts": 4, "top_k": 2, "scoring": "softmax",
    "router_sha256": "a",
}  # fmt: skip


def mask_of(seed: int, *, gate: float | None = None) -> SteeringMask:
    rng = np.random.default_rng(seed)
    info = MaskInfo(fingerprint=FINGERPRINT, method="m", intent=Intent(toward="x"))  # type: ignore[arg-type]
    more: dict[str, Any] = {}
    if gate is not None:
        rate = GateRate(value=0.5, low=0.0, high=1.0, n=2)
        info = info.model_copy(update={"gate": GateInfo(
            pool="last", bias=0.0, threshold=gate, measured_on="lab words", false_positive_rate=rate,
            true_positive_rate=rate, auroc=0.5,
        )})  # fmt: skip
        more = {"gate_LE": rng.normal(size=(2, 4)).astype(np.float32)}
    return SteeringMask(
        info, strength_LE=rng.normal(size=(2, 4)).astype(np.float32), sigma_L=np.ones(2, np.float32), **more
    )


@dataclass(frozen=True)
class Tokens:
    token_ids: tuple[int, ...]


class Words:
    """A model that says who it is and what steers it; so a reply from the cache shows for whom it was made."""

    def __init__(self, *, weights: str = "w", dtype: str = "float32", template: str = "t") -> None:
        self.weights_sketch, self.dtype, self.calls = weights, dtype, 0
        self.tokenizer = type("Tokenizer", (), {"chat_template": template, "__len__": lambda self: 9})()
        self.masks: tuple[SteeringMask, ...] = ()
        self.alphas: list[float] = []
        self.together = True
        self.asked: list[str] = []

    @property
    def mask_sha256(self) -> tuple[str, ...]:
        return tuple(mask.sha256[:12] for mask in self.masks)

    def encode(self, messages: Sequence[Message], response: str | None = None) -> Tokens:
        return Tokens(tuple(messages[-1].content.encode()))

    @contextmanager
    def steered(self, masks: Sequence[SteeringMask], alphas: Sequence[float], together: bool = True) -> Iterator[None]:
        self.masks, self.alphas, self.together = tuple(masks), list(alphas), together
        try:
            yield
        finally:
            self.masks, self.alphas, self.together = (), [], True

    def generate(
        self, conversations: Any, *, max_new_tokens: int = 128, rows: Any = None, title: str | None = None
    ) -> list[KeptReply]:
        self.calls += 1
        made = []
        for i, messages in enumerate(conversations):
            self.asked.append(messages[-1].content)
            every = [(mask.sha256, alpha) for mask, alpha in zip(self.masks, self.alphas, strict=True)]
            acting = every if rows is None else [every[rows[i] - 1]] if rows[i] else []
            said = f"{messages[-1].content}|{self.weights_sketch}|{self.dtype}|{max_new_tokens}|{acting}"
            made.append(KeptReply(said, tuple(said.encode()[:max_new_tokens]), True))
        return made


def talks(*texts: str) -> list[list[Message]]:
    return [[Message("user", text)] for text in texts]


MANY = [f"flumox {i}" for i in range(12)]


def test_what_was_said_once_is_not_asked_again(tmp_path: Path) -> None:
    model, cache = Words(), ReplyCache(tmp_path / "c")
    first = cache.around(model).generate(talks(*MANY))
    again = ReplyCache(tmp_path / "c")
    model.asked.clear()
    behind = again.around(model)
    assert behind.generate(talks(*MANY, "new")) == [*first, *Words().generate(talks("new"))]
    assert model.asked == [*MANY[:WITNESSES], "new"]
    assert behind.generate(talks(*MANY)) == first and len(model.asked) == WITNESSES + 1
    assert again.as_json() == {
        "hits": 2 * len(MANY) - WITNESSES, "misses": 1, "dropped": 0, "unwritten": 0, "witnesses": WITNESSES,
        "differing": 0,
    }  # fmt: skip
    assert cache.as_json()["misses"] == len(MANY)


CHANGES: dict[str, Any] = {
    "steered": {"masks": [(1, None, 1.0)]}, "another mask": {"masks": [(2, None, 1.0)]},
    "another alpha": {"masks": [(1, None, 0.5)]}, "alpha 0": {"masks": [(1, None, 0.0)]},
    "a gate": {"masks": [(1, 0.3, 1.0)]}, "another gate": {"masks": [(1, 0.5, 1.0)]},
    "two masks": {"masks": [(1, None, 1.0), (2, None, 1.0)]},
    "two in another order": {"masks": [(2, None, 1.0), (1, None, 1.0)]},
    "another dtype": {"dtype": "bfloat16"}, "other weights": {"weights": "v"}, "another template": {"template": "u"},
    "quantised": {"settings": {"quantize": "int4"}}, "another backend": {"settings": {"backend": "vllm"}},
    "another engine option": {"settings": {"backend": "vllm", "engine_options": {"quantization": "fp8"}}},
    "a longer reply": {"most": 20},
}  # fmt: skip


def replies_of(folder: Path, *, masks: Any = (), settings: Any = None, most: int = 10, **model: Any) -> tuple[Any, int]:
    """(replies to two questions, hits) of one way to ask."""
    words, cache = Words(**model), ReplyCache(folder, settings or {})
    chosen = [mask_of(seed, gate=gate) for seed, gate, _ in masks]
    with words.steered(chosen, [alpha for *_, alpha in masks]):
        found = cache.around(words, masks=chosen).generate(talks("pot", "paint"), max_new_tokens=most)
    return found, cache.counts.hits + cache.counts.witnesses


def test_no_way_to_ask_is_served_what_another_was_told(tmp_path: Path) -> None:
    """Every change against every other, and against none, in one folder: only the same again is a hit."""
    ways = {"as it is": {}, **CHANGES}
    said = {}
    for name, way in ways.items():
        said[name], hits = replies_of(tmp_path / "c", **way)
        assert hits == 0, name
    for name, way in ways.items():
        found, hits = replies_of(tmp_path / "c", **way)
        assert hits == 2 and found == said[name], name


way = st.fixed_dictionaries({
    "masks": st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([None, 0.3, 0.6]), st.sampled_from([0.0, 0.5, 1.0])), max_size=2
    ),
    "dtype": st.sampled_from(["float32", "bfloat16"]), "weights": st.sampled_from(["w", "v"]),
    "settings": st.sampled_from([{}, {"quantize": "int8"}, {"backend": "vllm"}]), "most": st.sampled_from([3, 10]),
})  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.lists(way, min_size=2, max_size=6))
def test_any_history_of_ways_to_ask_gives_what_each_would_be_told_alone(tmp_path: Path, ways: list[Any]) -> None:
    for one in ways:
        alone = {key: value for key, value in one.items() if key not in ("settings", "masks", "most")}
        words = Words(**alone)
        chosen = [mask_of(seed, gate=gate) for seed, gate, _ in one["masks"]]
        with words.steered(chosen, [alpha for *_, alpha in one["masks"]]):
            expected = words.generate(talks("pot", "paint"), max_new_tokens=one["most"])
        assert replies_of(tmp_path / "shared", **one)[0] == expected


def test_another_device_or_version_of_the_engine_is_another_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misses(device: str, version: str, **settings: str) -> int:
        model = Words()
        model.device = device  # type: ignore[attr-defined]
        monkeypatch.setattr(runs, "version", lambda name: version if name == "vllm" else "1")
        cache = ReplyCache(tmp_path / "c", settings)
        cache.around(model).generate(talks("flumox"))
        return cache.counts.misses

    assert [misses("cpu", "1"), misses("cuda:0", "1"), misses("cuda:1", "1"), misses("cpu", "2")] == [1, 1, 0, 0]
    engine = [misses("", version, backend="vllm") for version in ("1", "1", "2")]
    assert engine == [1, 0, 1]


def test_rows_are_served_each_its_own_mask(tmp_path: Path) -> None:
    masks, model, cache = [mask_of(1), mask_of(2)], Words(), ReplyCache(tmp_path / "c")
    for _ in range(2):
        with model.steered(masks, [1.0, 2.0], together=False):
            behind = cache.around(model, masks=masks, together=False)
            direct = model.generate(talks(*["pot"] * 3), rows=[0, 1, 2])
            assert behind.generate(talks(*["pot"] * 3), rows=[0, 1, 2]) == direct
            assert behind.generate(talks(*["pot"] * 3), rows=[2, 2, 0]) == [direct[2], direct[2], direct[0]]
    assert cache.around(model).generate(talks("pot")) == [direct[0]]  # row 0 is the model as it is
    assert cache.counts.misses == 3


@pytest.mark.parametrize("rows, together", [(None, False), ([1, 2], True), ([0, 3], False), ([1], False)])
def test_what_only_the_model_can_tell_is_asked_of_it(rows: Any, together: bool, tmp_path: Path) -> None:
    masks, model, cache = [mask_of(1), mask_of(2)], Words(), ReplyCache(tmp_path / "c")
    with model.steered(masks, [1.0, 2.0]):
        try:
            cache.around(model, masks=masks, together=together).generate(talks("pot", "paint"), rows=rows)
        except IndexError:
            assert rows in ([0, 3], [1])
    assert cache.counts.hits == cache.counts.misses == 0 and not (tmp_path / "c" / "segments").exists()


def test_a_cache_that_was_told_of_other_masks_refuses(tmp_path: Path) -> None:
    one, two, model, cache = mask_of(1), mask_of(2), Words(), ReplyCache(tmp_path / "c")
    with model.steered([one], [1.0]):
        for told in ([], [two], [one, two]):
            with pytest.raises(InputError, match="the model is steered by"):
                cache.around(model, masks=told).generate(talks("pot"))
    with pytest.raises(InputError, match="the model is steered by nothing"):
        cache.around(model, masks=[one]).generate(talks("pot"))


def test_a_model_that_says_something_else_is_seen(tmp_path: Path) -> None:
    """Its weights were changed where the sketch does not look."""
    ReplyCache(tmp_path / "c").around(Words()).generate(talks(*MANY))
    other = Words()
    other.generate = lambda conversations, **_: [KeptReply("!", (1,), True) for _ in conversations]  # type: ignore[method-assign,assignment]
    cache = ReplyCache(tmp_path / "c")
    found = cache.around(other).generate(talks(*MANY))
    assert [one.text for one in found[:WITNESSES]] == ["!"] * WITNESSES
    assert cache.counts.differing == cache.counts.witnesses == WITNESSES


# ---------------------------------------------------------------- the folder


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").glob("*.jsonl"))


def test_any_flipped_bit_is_dropped_and_counted(tmp_path: Path) -> None:
    ReplyCache(tmp_path / "c").around(Words()).generate(talks(*MANY))
    (segment,) = segments(tmp_path / "c")
    whole = segment.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        at = int(rng.integers(len(data)))
        data[at] ^= 1 << int(rng.integers(8))
        segment.write_bytes(data)
        cache = ReplyCache(tmp_path / "c")
        assert cache.counts.dropped > 0 and not cache._index and not segment.exists()
    segment.write_bytes(whole)
    cache = ReplyCache(tmp_path / "c")
    assert cache.counts.dropped == 0 and len(cache._index) == len(MANY)


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
def test_a_cut_segment_is_dropped(cut: int, tmp_path: Path) -> None:
    ReplyCache(tmp_path / "c").around(Words()).generate(talks(*MANY))
    (segment,) = segments(tmp_path / "c")
    segment.write_bytes(segment.read_bytes()[:cut])
    assert ReplyCache(tmp_path / "c").counts.dropped > 0


def test_a_bit_that_flips_after_the_segment_was_read_in_is_seen_too(tmp_path: Path) -> None:
    cache, model = ReplyCache(tmp_path / "c"), Words()
    first = cache.around(model).generate(talks(*MANY))
    (segment,) = segments(tmp_path / "c")
    data = bytearray(segment.read_bytes())
    data[data.index(b"flumox 7|")] ^= 1
    segment.write_bytes(data)
    assert cache.around(model).generate(talks(*MANY)) == first
    assert cache.counts.dropped == 1 and cache.counts.misses == len(MANY) + 1


def test_a_well_formed_line_with_a_foreign_reply_is_not_a_segment(tmp_path: Path) -> None:
    """Whoever does not make the name fit adds nothing."""
    ReplyCache(tmp_path / "c")
    row = {"key": "0" * 64, "text": "x", "token_ids": [1], "finished": True}
    folder = tmp_path / "c" / "segments"
    folder.mkdir()
    (folder / f"{'a' * 64}.jsonl").write_text(files.dumps(row, indent=None))
    (folder / "notes.txt").write_text("mine")
    cache = ReplyCache(tmp_path / "c")
    assert cache.counts.dropped == 1 and (folder / "notes.txt").exists()
    for bad in ({"key": 1}, [], "x", {**row, "token_ids": "12"}, {**row, "finished": 1}, {**row, "text": None}):
        data = files.dumps(bad, indent=None).encode()
        (folder / f"{files.sha256(data)}.jsonl").write_bytes(data)
        assert ReplyCache(tmp_path / "c").counts.dropped == 1, bad


def test_the_oldest_go_when_the_folder_is_full(tmp_path: Path) -> None:
    cache, model = ReplyCache(tmp_path / "c", limit_bytes=3000), Words()
    for number in range(40):
        cache.around(model).generate(talks(f"pot {number}"))
        for i, segment in enumerate(segments(tmp_path / "c")):
            os.utime(segment, ns=(i, segment.stat().st_mtime_ns))
        assert sum(segment.stat().st_size for segment in segments(tmp_path / "c")) <= 3000
    model.asked.clear()
    again = ReplyCache(tmp_path / "c", limit_bytes=3000)
    again.around(model).generate(talks(*[f"pot {n}" for n in range(40)]))
    kept = again.counts.hits + again.counts.witnesses
    assert 5 < kept < 20 and "pot 0" in model.asked and again.counts.dropped == 0
    assert cache.get("0" * 64) is None


def test_a_reply_that_another_process_made_room_for_is_a_miss(tmp_path: Path) -> None:
    cache, model = ReplyCache(tmp_path / "c"), Words()
    cache.around(model).generate(talks("pot"))
    segments(tmp_path / "c")[0].unlink()
    cache.around(model).generate(talks("pot"))
    assert cache.counts.dropped == 0 and cache.counts.misses == 2


def test_replies_larger_than_the_limit_and_a_full_disk_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, model = ReplyCache(tmp_path / "c", limit_bytes=100), Words()
    assert cache.around(model).generate(talks("pot")) == Words().generate(talks("pot"))
    assert cache.counts.unwritten == 1 and not segments(tmp_path / "c")
    cache = ReplyCache(tmp_path / "c")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cache.around(model).generate(talks("pot")) == Words().generate(talks("pot"))
    assert cache.counts.unwritten == 1 and not list((tmp_path / "c").rglob(f"*{files.TEMPORARY_SUFFIX}"))


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"replies.json": "{}"}, {"replies.json": "no"}])
def test_a_folder_of_something_else_is_refused_and_kept(content: dict[str, str], tmp_path: Path) -> None:
    for name, text in content.items():
        files.write_text(tmp_path / "c" / name, text)
    with pytest.raises(FileError):
        ReplyCache(tmp_path / "c")
    assert {p.name: p.read_text() for p in (tmp_path / "c").iterdir()} == content


def test_only_old_temporary_files_are_removed(tmp_path: Path) -> None:
    ReplyCache(tmp_path / "c")
    young, old = (tmp_path / "c" / f".{name}.x{files.TEMPORARY_SUFFIX}" for name in ("young", "old"))
    for path in (young, old):
        path.write_text("half")
    os.utime(old, (1, 1))
    ReplyCache(tmp_path / "c")
    assert young.exists() and not old.exists()


WRITER = """
import sys
from pathlib import Path
from moesteer.evaluate.replies import KeptReply, ReplyCache
cache = ReplyCache(Path(sys.argv[1]), limit_bytes=20_000)
print("ready", flush=True)
for number in range(100_000):
    cache.put({f"{number % 977:064x}": KeptReply(f"reply {number % 977}", (number % 977,), True)})
"""


def test_readers_beside_a_writer_that_is_killed_see_whole_replies_only(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "c")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    reader = ReplyCache(tmp_path / "c")
    seen = 0
    for turn in range(60):
        reader.refresh()
        for key in list(reader._index):
            if (found := reader.get(key)) is not None:
                assert found == KeptReply(f"reply {int(key, 16)}", (int(key, 16),), True)
                seen += 1
        time.sleep(0.01)
        if turn == 40:
            process.kill()
            process.wait()
    process.stdout.close()
    assert seen > 100 and reader.counts.dropped == 0 and ReplyCache(tmp_path / "c").counts.dropped == 0


# ---------------------------------------------------------------- a real model


def test_a_real_model_steered_and_not_is_served_its_own(lab_tiny: Model, tmp_path: Path) -> None:
    questions = talks("what is two plus three ?", "who is the mayor ?", "hello")
    shape = (len(lab_tiny.routers), lab_tiny.fingerprint.experts)
    info = MaskInfo(fingerprint=lab_tiny.fingerprint, method="m", intent=Intent(toward="x"))
    strength = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    mask = SteeringMask(info, strength_LE=strength, sigma_L=np.ones(shape[0], np.float32))
    plain = lab_tiny.generate(questions, max_new_tokens=6)
    cache = ReplyCache(tmp_path / "c")
    for alpha in (None, 4.0, 8.0, None, 4.0):
        if alpha is None:
            assert _texts(cache.around(lab_tiny).generate(questions, max_new_tokens=6)) == _texts(plain)
            continue
        with lab_tiny.steered([mask], alphas=[alpha], together=True) as receipt:
            direct = lab_tiny.generate(questions, max_new_tokens=6)
            found = cache.around(lab_tiny, masks=[mask]).generate(questions, max_new_tokens=6)
            assert _texts(found) == _texts(direct) and _texts(found) != _texts(plain) and receipt.positions
    assert cache.counts.misses == 9 and cache.counts.differing == 0


def _texts(found: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(one.text, tuple(one.token_ids), one.finished) for one in found]


def test_the_full_digest_of_a_mask_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two masks whose short digests are the same, as whoever tries long enough can make, share nothing."""
    one, two = mask_of(1), mask_of(2)
    monkeypatch.setattr(SteeringMask, "sha256", property(lambda self: "0" * 12 + ("1" if self is one else "2") * 52))
    model, cache = Words(), ReplyCache(tmp_path / "c")
    for mask in (one, two):
        with model.steered([mask], [1.0]):
            cache.around(model, masks=[mask]).generate(talks("pot"))
    assert cache.counts.misses == 2

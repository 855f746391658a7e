"""Traces: what is written is what was run; faults are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesteer import conversations as conv
from moesteer.backends.hf import Model
from moesteer.capturing import capture
from moesteer.conversations import Conversation, Message
from moesteer.errors import (
    EmptyDataError,
    NanLogitsError,
    RunDirectoryError,
    TraceFileError,
    TraceLabelError,
    UnknownNameError,
)
from moesteer.mask import Intent, MaskInfo, SteeringMask
from moesteer.models.check import Recorded
from moesteer.trace import Manifest, TraceReader, TraceRow, TraceWriter, shard_path
from tests.crash.capture_process import rows as crash_rows


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def rows() -> list[Conversation]:
    return crash_rows()[:40]


@pytest.fixture(scope="module")
def model(model_of: Callable[..., Model]) -> Model:
    return model_of("qwen3_moe")


def test_kept_tokens_are_those_of_the_spans_run_alone(model: Model, rows: list[Conversation], tmp_path: Path) -> None:
    """Batched and padded, each sequence's logits equal those of the sequence run by itself."""
    import torch

    trace = capture(model, rows, out=tmp_path / "t", spans=("final_user", "response"), batch_positions=400)
    by_id = {row.id: row for row in rows}
    assert {row.id for row in trace.rows} == set(by_id)
    for row, arrays in trace.sequences():
        conversation = by_id[row.id]
        encoded = model.encode(conversation.messages, conversation.reference)
        user, response = encoded.spans["final_user"], encoded.spans["response"]
        ids = [*encoded.token_ids[slice(*user)], *encoded.token_ids[slice(*response)]]
        assert arrays["token_ids"].tolist() == ids
        assert row.span("final_user") == slice(0, user[1] - user[0])
        assert model.tokenizer.decode(arrays["token_ids"][row.span("final_user")]) == conversation.messages[-1].content
        alone = Recorded()
        with torch.inference_mode(), model.tap.record(alone):
            model.hf.base_model(input_ids=torch.tensor([encoded.token_ids]), use_cache=False)
        columns = [*range(*user), *range(*response)]
        for router in model.routers:
            expected = alone.logits_by_router[router.index].numpy()[columns]
            np.testing.assert_allclose(arrays["logits"][:, router.index], expected, rtol=2e-3, atol=2e-3)


def test_the_same_capture_gives_the_same_bytes(model: Model, rows: list[Conversation], tmp_path: Path) -> None:
    capture(model, rows, out=tmp_path / "a", batch_positions=300, shard_tokens=150)
    capture(model, rows, out=tmp_path / "b", batch_positions=300, shard_tokens=150)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert TraceReader(tmp_path / "a").manifest.shards > 2


def test_sigma_is_the_spread_over_all_kept_tokens(model: Model, rows: list[Conversation], tmp_path: Path) -> None:
    trace = capture(model, rows, out=tmp_path / "t", batch_positions=300, shard_tokens=150)
    everything = np.concatenate([arrays["logits"] for _, arrays in trace.sequences()]).astype(np.float64)
    np.testing.assert_allclose(trace.sigma_L, everything.std(axis=(0, 2)), rtol=1e-5)


def test_selected_level_keeps_no_logits(model: Model, rows: list[Conversation], tmp_path: Path) -> None:
    trace = capture(model, rows[:4], out=tmp_path / "t", level="selected", spans=("prompt",))
    for row, arrays in trace.sequences():
        assert set(arrays) == {"selected", "token_ids"} and arrays["selected"].dtype == np.uint8
        assert arrays["selected"].shape == (row.length, len(model.routers), model.fingerprint.top_k)


def test_a_trace_of_a_steered_model_names_the_mask_and_holds_raw_logits(
    model: Model, rows: list[Conversation], tmp_path: Path
) -> None:
    strength = np.zeros((len(model.routers), model.fingerprint.experts), dtype=np.float32)
    strength[-1, 0] = 50.0
    info = MaskInfo(fingerprint=model.fingerprint, method="test", intent=Intent(toward="x"))
    mask = SteeringMask(info, strength_LE=strength, sigma_L=np.ones(len(strength), dtype=np.float32))
    plain = capture(model, rows[:4], out=tmp_path / "plain", spans=("prompt",))
    with mask.apply(model):
        steered = capture(model, rows[:4], out=tmp_path / "steered", spans=("prompt",))
    assert plain.manifest.mask_sha256 == () and steered.manifest.mask_sha256 == (mask.sha256[:12],)
    for (_, a), (_, b) in zip(plain.sequences(), steered.sequences(), strict=True):
        np.testing.assert_array_equal(a["logits"], b["logits"])
        assert (b["selected"][:, -1] == 0).any(axis=-1).all()


@pytest.fixture()
def small(model: Model, rows: list[Conversation], tmp_path: Path) -> Path:
    capture(model, rows, out=tmp_path / "small", batch_positions=300, shard_tokens=150)
    return tmp_path / "small"


def _remove(folder: Path) -> None:
    shard_path(folder, 1).unlink()


def _truncate(folder: Path) -> None:
    path = shard_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-100])


def _swap(folder: Path) -> None:
    a, b = shard_path(folder, 0).read_bytes(), shard_path(folder, 1).read_bytes()
    shard_path(folder, 0).write_bytes(b)
    shard_path(folder, 1).write_bytes(a)


def _index(folder: Path) -> None:
    (folder / "index.parquet").write_bytes(b"PAR1 not really")


def _manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema_version": 1}')


def _unfinished(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (_remove, "shard 1 is missing"),
        (_truncate, "shard 1 cannot be read"),
        (_index, "index.parquet cannot be read"),
        (_manifest, "manifest.json is wrong"),
        (_unfinished, "did not finish"),
    ],
)
def test_a_broken_trace_is_named(small: Path, fault: Callable[[Path], None], what: str) -> None:
    fault(small)
    with pytest.raises(TraceFileError, match=what):
        for _ in TraceReader(small).sequences():
            pass


def test_swapped_and_flipped_shards_are_found(small: Path) -> None:
    assert TraceReader(small).verify() == []
    _swap(small)
    assert TraceReader(small).verify() == ["shards/000000.safetensors", "shards/000001.safetensors"]
    _swap(small)
    path = shard_path(small, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert TraceReader(small).verify() == ["shards/000001.safetensors"]


def test_a_folder_of_something_else_is_refused(
    model: Model, rows: list[Conversation], tmp_path: Path, small: Path
) -> None:
    before = tree(small)
    with pytest.raises(RunDirectoryError, match="something else"):
        capture(model, rows[:3], out=small)
    assert tree(small) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty"):
        capture(model, rows[:3], out=other)
    assert [p.name for p in other.iterdir()] == ["letter.txt"]


def test_nan_and_overflowing_logits_are_refused_and_leave_no_shard(model: Model, tmp_path: Path) -> None:
    for value in (np.nan, np.inf, -np.inf, 1e6):
        folder = tmp_path / str(value)
        manifest = Manifest(
            fingerprint=model.fingerprint, level="logits", spans=("prompt",), sequences=1, shards=1, plan_sha256="x"
        )
        writer = TraceWriter(folder, manifest)
        layers, experts, top_k = len(model.routers), model.fingerprint.experts, model.fingerprint.top_k
        logits = np.zeros((2, layers, experts), dtype=np.float32)
        logits[1, 1, 3] = value
        row = TraceRow("a", "g", None, None, None, 0, 0, 2, ("prompt",), (2,))
        with pytest.raises(NanLogitsError, match=r"sequence a, layer 1, expert 3"):
            writer.write_shard(
                [row], selected=np.zeros((2, layers, top_k), np.uint8), token_ids=np.zeros(2, np.int32), logits=logits
            )
        assert not shard_path(folder, 0).exists()


def test_wrong_wishes_are_named(model: Model, rows: list[Conversation], tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match="nothing to capture"):
        capture(model, [], out=tmp_path / "a")
    with pytest.raises(UnknownNameError, match="no span"):
        capture(model, rows, out=tmp_path / "a", spans=("answer",))  # type: ignore[arg-type]
    bare = [Conversation("x", "g", (Message("user", "hello"),))]
    with pytest.raises(TraceLabelError, match="no response"):
        capture(model, bare, out=tmp_path / "a", spans=("response",))
    assert not (tmp_path / "a").exists()


def test_one_token_and_long_sequences_are_captured(model: Model, tmp_path: Path) -> None:
    rows = [
        Conversation("one", "g1", (Message("user", "hello"),)),
        Conversation("long", "g2", (Message("user", "what is red ? " * 50),)),
    ]
    trace = capture(model, rows, out=tmp_path / "t")
    assert {row.id: row.length for row in trace.rows} == {"one": 1, "long": 200}


def test_lab_data_round_trips_through_files(tmp_path: Path) -> None:
    from moesteer.lab import world
    from moesteer.lab.export import export

    counts = export(tmp_path, variants=1)
    assert set(counts) == {f"{name}.jsonl" for name in world.SUITES}
    read = conv.read(tmp_path / "attack-multi.jsonl")
    assert read == [row for split in world.SPLITS for row in world.suite("attack-multi", split, per_group=1)]
    shutil.rmtree(tmp_path)

"""A capture stopped at every operation on a file, on a full disk, and short of memory, ends as one that was not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesteer import capturing, files
from moesteer.backends.chat import Encoded
from moesteer.capturing import capture
from moesteer.conversations import Conversation, Message
from moesteer.errors import MoesteerError, OutOfMemoryError
from moesteer.fingerprint import Fingerprint
from moesteer.trace import TraceReader
from tests.crash.evaluation import Operations, die, fill, in_child, operations_of, places, tear, tree

LAYERS, EXPERTS, TOP_K = 2, 4, 2


class Counting:
    """Router logits by arithmetic on the token ids. most: sequences for which there is memory."""

    fingerprint = Fingerprint(
        model_type="qwen3_moe",
        layer_ids=(0, 1),
        experts=EXPERTS,
        top_k=TOP_K,
        scoring="softmax",
        router_sha256="a" * 64,
    )
    mask_sha256: tuple[str, ...] = ()
    alphas: tuple[float, ...] = ()
    weights_sketch, dtype = "w", "float32"

    def __init__(self, *, most: int = 99) -> None:
        self.most, self.batches = most, 0

    def encode(self, messages: Sequence[Message], response: str | None = None) -> Encoded:
        ids = tuple(messages[-1].content.encode())
        return Encoded(ids, {"prompt": (0, len(ids)), "final_user": (0, len(ids)), "final_turn": (0, len(ids))})

    def router_outputs(self, batch: Sequence[Encoded], places: Any, *, logits: bool) -> tuple[Any, Any]:
        self.batches += 1
        if len(batch) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")
        ids = np.array([one.token_ids[c] for one, columns in zip(batch, places, strict=True) for c in columns])
        scores = np.sin(ids[:, None, None] * np.arange(1, LAYERS + 1)[:, None] + np.arange(EXPERTS)).astype(np.float32)
        return scores, np.argsort(-scores, axis=-1, kind="stable")[..., :TOP_K]


def rows() -> list[Conversation]:
    """Twelve questions about pots."""
    return [Conversation(f"pot/{i}", f"pot {i}", (Message("user", f"paint pot {i} blue"),)) for i in range(12)]


def run(out: Path, model: Counting | None = None) -> None:
    """A capture in three shards."""
    capture(model or Counting(), rows(), out=out, batch_positions=70, shard_tokens=50)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "trace"
    run(out)
    assert len(list(out.glob("shards/*"))) == 3
    return tree(out)


@pytest.mark.parametrize("worst", [die, tear, fill], ids=["killed", "torn write", "full disk"])
def test_stopped_at_every_operation_the_capture_ends_in_the_same_bytes(
    worst: Callable[..., None], whole: dict[str, bytes], tmp_path: Path
) -> None:
    def stopped(out: Path, at: int) -> int:
        Operations(at, worst).install()
        try:
            run(out)
        except MoesteerError as error:
            return 1 if "No space left" in str(error) else 97
        return 0

    names = operations_of(lambda: run(tmp_path / "counted"), tmp_path / "names")
    tried, ended = places(names, worst), 0
    assert len(names) > 30 and len(tried) > 5
    for at in tried:
        out = tmp_path / f"trace-{at}"
        status = in_child(lambda out=out, at=at: stopped(out, at))  # type: ignore[misc]
        assert status in ((0, 1) if worst is fill else (9,)), (at, status)
        ended += status != 0
        run(out)
        assert tree(out) == whole, at
        assert not list(out.rglob(f"*{files.TEMPORARY_SUFFIX}")) and TraceReader(out).verify() == []
    assert ended >= len(tried) // 2


def test_a_batch_without_memory_is_halved_and_the_trace_is_the_same(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "give_back_memory", lambda: None)
    run(tmp_path / "halved", Counting(most=2))
    assert tree(tmp_path / "halved") == whole
    none = Counting(most=0)
    with pytest.raises(OutOfMemoryError, match="allocate 4096 bytes"):
        run(tmp_path / "none", none)
    assert none.batches <= 4
    run(tmp_path / "none")
    assert tree(tmp_path / "none") == whole

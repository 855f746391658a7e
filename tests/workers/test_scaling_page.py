"""docs/scaling.md: its tables recomputed from what stands in their rows, and its bytes found in a real trace."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from moesteer import capturing, files
from moesteer.backends.hf import BATCH_POSITIONS, Model
from moesteer.backends.ray import cluster, pool
from moesteer.conversations import Conversation, Message
from moesteer.evaluate import pieces

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "scaling.md").read_text("utf-8")
UNITS = {"B": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def rows(name: str) -> list[dict[str, str]]:
    """A table of the page by its heads."""
    lines = PAGE.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0].splitlines()
    heads, _, *found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(heads, cells, strict=True)) for cells in found]


def amount(text: str) -> float:
    """`4.7 TB` in bytes; `0.3 h` in hours."""
    number, unit = text.replace(",", "").split()
    return float(number) * UNITS.get(unit, 1.0)


def near(text: str, value: float) -> None:
    """Assert that a cell is the value, to the two or three digits it shows."""
    assert amount(text) == pytest.approx(value, rel=0.02), (text, value)


def test_the_page_is_what_its_script_writes() -> None:
    assert runpy.run_path(str(DOCS / "make_scaling.py"))["filled"](PAGE) == PAGE


def test_bytes_follow_from_the_row() -> None:
    found = rows("traces")
    assert len(found) == 7
    for row in found:
        layers, experts, top_k = (int(row[axis]) for axis in "LEK")
        selected = layers * top_k * (2 if experts > 256 else 1) + 4
        logits = selected + 2 * layers * experts
        near(row["selected, a token"], selected)
        near(row["logits, a token"], logits)
        near(row["selected, 10^8"], 1e8 * selected)
        near(row["logits, 10^8"], 1e8 * logits)
        shard = (capturing.SHARD_TOKENS + capturing.BATCH_POSITIONS) * logits
        near(row["largest shard"], shard)
        assert shard < files.LIMITS_BYTES["shard"], row["model"]
        near(row["a batch in memory"], capturing.BATCH_POSITIONS * layers * experts * 4)


def test_hours_follow_from_the_formulas_on_the_page() -> None:
    billions = {  # parameters, active, bytes of a parameter
        "OLMoE-1B-7B": (6.9, 1.3, 2.0), "Qwen3-30B-A3B": (30.5, 3.3, 2.0), "gpt-oss-120b": (117, 5.1, 0.55),
        "Qwen3-235B-A22B": (235, 22, 2.0), "DeepSeek-V3.1": (671, 37, 1.0), "Kimi-K2": (1026, 32, 1.0),
    }  # fmt: skip
    found = {row["model"]: row for row in rows("hours")}
    assert set(found) == set(billions)
    assert sum(t * 100 + (t - 1) * 256 for t in (1, 2, 3, 4)) == 2536
    for name, (total, active, each) in billions.items():
        weights, gpus = total * 1e9 * each, int(found[name]["80 GB GPUs a worker"])
        near(found[name]["weights"], weights)
        assert (
            gpus * 80e9 >= 1.2 * weights and math.log2(gpus).is_integer() and (gpus == 1 or gpus * 40e9 < 1.2 * weights)
        )
        read = 2 * active * 1e9 / (0.3 * 989e12 * gpus)
        step = max(weights / (0.6 * 3.35e12 * gpus), 64 * read)
        near(found[name]["capture of 10^8 tokens"], 1e8 * read / 3600)
        hours = 2 * 1000 * (2536 * read + 1024 * step / 64) / 3600
        assert amount(found[name]["1,000 conversations"]) == pytest.approx(hours, rel=0.06)  # two digits


def test_the_page_s_limits_are_the_code_s() -> None:
    def said(pattern: str) -> int:
        (number,) = re.findall(pattern, " ".join(PAGE.split()))
        return int(number.replace(",", ""))

    assert said(r"A shard holds ([\d,]+) tokens") == capturing.SHARD_TOKENS
    assert said(r"its last batch of ([\d,]+) positions") == capturing.BATCH_POSITIONS
    assert said(r"no file beyond ([\d,]+) MiB") * files.MIB == files.LIMITS_BYTES["shard"]
    assert said(r"stuck at a part for (\d+) minutes") * 60 == pool.HANG_S
    assert said(r"minutes and (\d+) times as long") == pool.SLOWER
    assert pool.TRIES == 3 and "three workers died at the same part" in PAGE
    assert pool.LOSSES_EACH == 5 and "five for each worker" in PAGE
    assert pool.AHEAD == 2 and "at most two for each worker" in PAGE
    assert said(r"beyond (\d+) MiB through files") * files.MIB == cluster.OBJECT_STORE_BYTES
    assert said(r"pieces of at most (\d+) conversations") == pieces.CONVERSATIONS
    assert said(r"with ([\d,]+) positions in a batch") == BATCH_POSITIONS
    batches = math.ceil(min(pieces.CONVERSATIONS, pieces.NEW_TOKENS // 256) / (BATCH_POSITIONS // (1500 + 256)))
    assert said(r"a piece of 64 is (\d+) batches") == batches


def test_a_trace_takes_the_bytes_that_the_page_says(lab_tiny: Model, tmp_path: Path) -> None:
    talk = [Conversation(id="a", group="a", messages=(Message("user", "how do i paint a clay pot ?"),))]
    row = next(row for row in rows("traces") if row["model"] == "lab-tiny")
    for level in ("selected", "logits"):
        trace = capturing.capture(lab_tiny, talk, out=tmp_path / level, level=level, spans=("prompt",))  # type: ignore[arg-type]
        arrays = load_file(tmp_path / level / "shards" / "000000.safetensors")
        held = sum(array.nbytes for array in arrays.values())
        assert held == trace.manifest.tokens * amount(row[f"{level}, a token"])

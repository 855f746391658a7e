"""Writes the tables of docs/scaling.md from the formulas on that page; `--check` fails if the page differs."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent / "scaling.md"
DATA_TOKENS, CONVERSATIONS = 10**8, 1_000
SHARD_TOKENS, BATCH_POSITIONS = 32_768, 8_192  # capturing.py
GPU_BYTES, GPU_FLOPS, GPU_BYTES_S = 80e9, 989e12, 3.35e12  # H100: memory; bfloat16, dense; memory bandwidth
USED_FLOPS, USED_BANDWIDTH, ROOM = 0.3, 0.6, 1.2
TURNS, ASKED, REPLY, AT_ONCE = 4, 100, 256, 64


@dataclass(frozen=True)
class Model:
    """layers: with a router. parameters, active: all, and of one token. weight_bytes: of one parameter as stored."""

    name: str
    layers: int
    experts: int
    top_k: int
    parameters: float
    active: float
    weight_bytes: float

    @property
    def selected_bytes(self) -> int:
        """Of one token in a trace of level `selected`: K ids in every layer, and the token id."""
        return self.layers * self.top_k * (1 if self.experts <= 256 else 2) + 4

    @property
    def logits_bytes(self) -> int:
        """Of one token in a trace of level `logits`: E float16 in every layer more."""
        return self.layers * self.experts * 2 + self.selected_bytes

    @property
    def weights(self) -> float:
        """Bytes of all weights."""
        return self.parameters * self.weight_bytes

    @property
    def gpus(self) -> int:
        """80 GB GPUs of one worker: the power of two that holds the weights and a fifth more."""
        return int(2 ** math.ceil(math.log2(max(1.0, ROOM * self.weights / GPU_BYTES))))

    @property
    def read_s(self) -> float:
        """Seconds of one worker for a token of a prompt."""
        return 2 * self.active / (USED_FLOPS * GPU_FLOPS * self.gpus)

    @property
    def step_s(self) -> float:
        """Seconds of one worker for one step of AT_ONCE replies: all weights are read, or more is computed."""
        return max(self.weights / (USED_BANDWIDTH * GPU_BYTES_S * self.gpus), AT_ONCE * self.read_s)

    @property
    def capture_hours(self) -> float:
        """Of one worker for DATA_TOKENS."""
        return DATA_TOKENS * self.read_s / 3600

    @property
    def evaluate_hours(self) -> float:
        """Of one worker for CONVERSATIONS, played twice: without and with a mask."""
        read = sum(turn * ASKED + (turn - 1) * REPLY for turn in range(1, TURNS + 1))
        written = TURNS * REPLY
        return 2 * CONVERSATIONS * (read * self.read_s + written * self.step_s / AT_ONCE) / 3600


MODELS = (
    Model("lab-tiny", 6, 16, 4, 0.0, 0.0, 4.0),
    Model("OLMoE-1B-7B", 16, 64, 8, 6.9e9, 1.3e9, 2.0),
    Model("Qwen3-30B-A3B", 48, 128, 8, 30.5e9, 3.3e9, 2.0),
    Model("gpt-oss-120b", 36, 128, 4, 117e9, 5.1e9, 0.55),
    Model("Qwen3-235B-A22B", 94, 128, 8, 235e9, 22e9, 2.0),
    Model("DeepSeek-V3.1", 58, 256, 8, 671e9, 37e9, 1.0),
    Model("Kimi-K2", 60, 384, 8, 1_026e9, 32e9, 1.0),
)


def size(value: float) -> str:
    """`3.0 TB`, in powers of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:,.0f} B"


def grid(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *("--:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def traces() -> str:
    """Bytes of traces."""
    heads = ["model", "L", "E", "K", "selected, a token", "logits, a token", "selected, 10^8", "logits, 10^8",
             "largest shard", "a batch in memory"]  # fmt: skip
    return grid(
        heads,
        [
            [
                m.name, str(m.layers), str(m.experts), str(m.top_k), f"{m.selected_bytes:,} B",
                f"{m.logits_bytes:,} B", size(DATA_TOKENS * m.selected_bytes), size(DATA_TOKENS * m.logits_bytes),
                size((SHARD_TOKENS + BATCH_POSITIONS) * m.logits_bytes),
                size(BATCH_POSITIONS * m.layers * m.experts * 4),
            ]
            for m in MODELS
        ],
    )  # fmt: skip


def hours() -> str:
    """GPUs and hours."""
    heads = ["model", "weights", "80 GB GPUs a worker", "capture of 10^8 tokens", "1,000 conversations"]
    return grid(
        heads,
        [
            [m.name, size(m.weights), str(m.gpus), f"{m.capture_hours:.3g} h", f"{m.evaluate_hours:.2g} h"]
            for m in MODELS
            if m.parameters
        ],
    )


def filled(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in (("traces", traces()), ("hours", hours())):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{PAGE}: no place for the table {name!r}")
        text = before + start + table + "\n" + end + after
    return text


if __name__ == "__main__":
    page = PAGE.read_text("utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if filled(page) == page else f"{PAGE} is not up to date: run python docs/make_scaling.py")
    PAGE.write_text(filled(page), "utf-8")

"""What steering costs inside vLLM: throughput with and without masks, in turns, in one run.

    python bench/serving.py                     lab-tiny, compiled; the table and bench/results/serving.json
    python bench/serving.py --model FOLDER --batch 64 --tokens 64 --sets 2 --rounds 6 --eager

Four engines run side by side and are asked in turns, in an order drawn anew each round: two without the plug-in
(MOESTEER_VLLM=0; the second is the control, and its ratio to the first is what the measurement itself scatters), one
with it and no settings (idle), and one with masks, whose requests are answered three ways: naming no mask, all under
one mask, and a mixed batch in which each third names another or none. Two starts of one engine differ by some percent
for as long as they run, so all four are started anew several times, in an order drawn anew: a set. A ratio is the
median over sets of the median over rounds of the quotient within a round; its interval is the 95 % bootstrap interval,
which draws sets, then rounds. No wall-clock number is compared across runs. Greedy, ends of sequence ignored: every
reply has the same length.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

RESULTS = Path(__file__).parent / "results" / "serving.json"
CONTROL, NONE, IDLE, LOADED = (
    "control: the same again",
    "engine, no plug-in",
    "plug-in, idle",
    "masks loaded, none named",
)
PAIRS = (
    (CONTROL, NONE, None),
    (IDLE, NONE, 0.99),
    (LOADED, NONE, None),
    ("one mask", LOADED, 0.97),
    ("mixed masks", LOADED, 0.97),
    ("one mask", NONE, 0.97),
    ("mixed masks", NONE, 0.97),
)
"""(steered, against, the ratio that is demanded)."""


def masks(folder: Path, model: str) -> dict[str, tuple[Path, float | None]]:
    """Two dense additive masks, weak enough that text stays text."""
    from moesteer.backends.fingerprinting import fingerprint_of_files
    from moesteer.mask import Intent, MaskInfo, SteeringMask

    fingerprint = fingerprint_of_files(model)
    shape = (len(fingerprint.layer_ids), fingerprint.experts)
    found: dict[str, tuple[Path, float | None]] = {}
    for seed, name in enumerate(("one", "two")):
        strength = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * np.float32(0.1)
        info = MaskInfo(fingerprint=fingerprint, method="bench", intent=Intent(toward="nothing"))
        mask = SteeringMask(info, strength_LE=strength, sigma_L=np.ones(shape[0], dtype=np.float32))
        mask.save(folder / f"{name}.safetensors")
        found[name] = (folder / f"{name}.safetensors", None)
    return found


class Engine:
    """An engine in a process of its own, which is asked and answers with the seconds it took."""

    def __init__(self, given: dict[str, Any], *, plugin: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_engine, args=(other, given, plugin))
        self._process.start()
        assert self._pipe.recv() == "ready"

    def ask(self, number: int, names: list[str | None]) -> float:
        """Seconds for the round's prompts, the masks named in turn."""
        self._pipe.send((number, names))
        seconds: float = self._pipe.recv()
        return seconds

    def close(self) -> None:
        """Stop the engine."""
        self._pipe.send(None)
        self._process.join(60)


def _engine(pipe: Any, given: dict[str, Any], plugin: bool) -> None:
    os.environ["MOESTEER_VLLM"] = "1" if plugin else "0"
    from vllm import LLM, SamplingParams

    llm = LLM(**given["engine"])
    pipe.send("ready")
    batch, tokens = given["batch"], given["tokens"]
    while (asked := pipe.recv()) is not None:
        number, names = asked
        ids = np.random.default_rng(number).integers(5, given["vocabulary"], size=(batch, given["prompt"]))
        prompts: Any = [{"prompt_token_ids": [int(i) for i in row]} for row in ids]
        params = [
            SamplingParams(
                temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False,
                extra_args=None if name is None else {"moesteer_mask": name},
            )
            for name in (names * batch)[:batch]
        ]  # fmt: skip
        start = time.perf_counter()
        found = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert len(found) == batch and all(len(o.outputs[0].token_ids) == tokens for o in found)
        pipe.send(seconds)
    llm.llm_engine.engine_core.shutdown()


def ratio(seconds: dict[str, NDArray[np.float64]], steered: str, against: str) -> dict[str, float]:
    """Throughput of one way over another's, of seconds [sets, rounds], and its bootstrap interval."""
    quotients = seconds[against] / seconds[steered]
    sets, rounds = quotients.shape
    rng = np.random.default_rng(0)
    drawn = quotients[rng.integers(sets, size=(4000, sets, 1)), rng.integers(rounds, size=(4000, sets, rounds))]
    low, high = np.quantile(np.median(np.median(drawn, axis=-1), axis=-1), [0.025, 0.975])
    return {"ratio": float(np.median(np.median(quotients, axis=-1))), "low": float(low), "high": float(high)}


def one_set(
    work: dict[str, Any], options: dict[str, Any], config: dict[str, Any], *, rounds: int, order: np.random.Generator
) -> dict[str, list[float]]:
    """Start the engines, ask them in turns, stop them. Gives the seconds of every way and round."""
    starts = {
        CONTROL: ({**work, "engine": options}, False),
        NONE: ({**work, "engine": options}, False),
        IDLE: ({**work, "engine": options}, True),
        LOADED: ({**work, "engine": {**options, "additional_config": config}}, True),
    }
    engines = {name: Engine(starts[name][0], plugin=starts[name][1]) for name in order.permutation(list(starts))}
    ways: dict[str, tuple[Engine, list[str | None]]] = {
        **{name: (engine, [None]) for name, engine in engines.items()},
        "one mask": (engines[LOADED], ["one"]),
        "mixed masks": (engines[LOADED], ["one", None, "two"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-2, rounds):  # two rounds to warm up
        for name in order.permutation(list(ways)):
            engine, names = ways[name]
            taken = engine.ask(number + 2, names)
            if number >= 0:
                seconds[name].append(taken)
    for engine in engines.values():
        engine.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab-tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a reply")
    parser.add_argument("--sets", type=int, default=4, help="times the engines are started anew")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of a set")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()

    from moesteer.backends.sources import source_of
    from moesteer.backends.vllm.settings import settings_for

    source = source_of(given.model)
    vocabulary = int(json.loads((Path(source) / "config.json").read_text())["vocab_size"])
    import torch

    options: dict[str, Any] = {
        "model": source, "max_model_len": given.prompt + given.tokens, "max_num_seqs": given.batch,
        "distributed_executor_backend": "uni",
        "enforce_eager": given.eager, "enable_prefix_caching": False, "skip_tokenizer_init": True,
        "disable_log_stats": True, "dtype": "auto" if torch.cuda.is_available() else "float32",
    }  # fmt: skip
    work = {"batch": given.batch, "prompt": given.prompt, "tokens": given.tokens, "vocabulary": vocabulary}
    with tempfile.TemporaryDirectory() as folder:
        config = settings_for(masks=masks(Path(folder), source)).as_config()
        order = np.random.default_rng(1)
        found = [one_set(work, options, config, rounds=given.rounds, order=order) for _ in track(range(given.sets))]
    seconds = {name: np.array([one[name] for one in found]) for name in found[0]}
    rows = [
        {"steered": steered, "against": against, "demanded": demanded, **ratio(seconds, steered, against)}
        for steered, against, demanded in PAIRS
    ]
    import vllm

    report = {
        "schema": 2, "model": given.model, "batch": given.batch, "prompt": given.prompt, "tokens": given.tokens,
        "sets": given.sets, "rounds": given.rounds, "compiled": not given.eager, "device": torch.cuda.get_device_name()
        if torch.cuda.is_available() else platform.machine(), "vllm": vllm.__version__, "torch": torch.__version__,
        "tokens_per_s": {name: given.batch * given.tokens / float(np.median(s)) for name, s in seconds.items()},
        "ratios": rows,
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    work_done = f"{given.batch} x ({given.prompt} + {given.tokens}) tokens, {given.sets} sets of {given.rounds} rounds"
    print(f"{given.model}: {work_done}")
    for name, rate in report["tokens_per_s"].items():
        print(f"  {name:28} {rate:9.0f} new tokens/s")
    for row in rows:
        asked = f"  (demanded {row['demanded']:.2f})" if row["demanded"] else ""
        interval = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        print(f"  {row['steered']:26} / {row['against']:26} {interval}{asked}")


if __name__ == "__main__":
    main()

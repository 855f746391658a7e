"""What capture adds to a forward pass, and steering to generation: ratios measured in turns, in one process.

    python bench/overhead.py [--model lab-tiny] [--rounds 15]

Every round times each variant once, in a random order, on the same batches; the table shows the median ratio to
the plain model of the same round, with a 95 % bootstrap interval. Writes bench/results/overhead.json.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moesteer import files, runs
from moesteer.backends.chat import length_batches
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.capturing import forward
from moesteer.conversations import Message
from moesteer.lab import world
from moesteer.mask import Intent, MaskInfo, SteeringMask

RESULTS = Path(__file__).parent / "results" / "overhead.json"


def dense_mask(model: Model, seed: int) -> SteeringMask:
    """Every expert of every layer steered a little: the most that a mask can cost."""
    rng = np.random.default_rng(seed)
    shape = (len(model.routers), model.fingerprint.experts)
    info = MaskInfo(fingerprint=model.fingerprint, method="bench", intent=Intent(toward="bench"))
    strength = rng.normal(scale=0.05, size=shape).astype(np.float32)
    return SteeringMask(info, strength_LE=strength, sigma_L=np.ones(shape[0], dtype=np.float32))


def variants(model: Model, *, conversations: int, new_tokens: int) -> dict[str, dict[str, Callable[[], None]]]:
    """Two groups of things to time; the first of each group is the plain model."""
    rows = world.suite("attack-multi", "fit")[:conversations]
    encoded = [model.encode(row.messages) for row in rows]
    batches = [[encoded[i] for i in part] for part in length_batches([len(e.token_ids) for e in encoded], 8192)]
    prompts: list[list[Message]] = [list(row.messages) for row in rows[: conversations // 4]]
    masks = [dense_mask(model, seed) for seed in range(3)]
    several = [i % 4 for i in range(len(prompts))]

    def plain_forward() -> None:
        for batch in batches:
            ids, attention = model.pad([e.token_ids for e in batch], left=False)
            with torch.inference_mode():
                model.hf.base_model(input_ids=ids, attention_mask=attention, use_cache=False)

    def captured(spans: tuple[str, ...], logits: bool) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                forward(model, batch, spans=spans, logits=logits)

        return run

    def plain_generation() -> None:
        generate(None)

    def generate(rows: list[int] | None) -> None:
        # the model never ends a reply here, so that every variant makes the same number of tokens
        stops, model._stops = model._stops, []
        try:
            model.generate(prompts, max_new_tokens=new_tokens, rows=rows)
        finally:
            model._stops = stops

    def one_mask() -> None:
        with masks[0].apply(model):
            generate(None)

    def three_masks() -> None:
        with model.steered(masks):
            generate(several)

    return {
        "forward pass": {
            "plain": plain_forward,
            "capture, logits of the final user turn": captured(("final_user",), True),
            "capture, logits of the whole prompt": captured(("prompt",), True),
            "capture, selections of the whole prompt": captured(("prompt",), False),
        },
        "generation": {
            "plain": plain_generation,
            "one dense mask": one_mask,
            "three masks and none, by row": three_masks,
        },
    }


def measure(group: dict[str, Callable[[], None]], *, rounds: int, seed: int) -> dict[str, dict[str, float]]:
    """Median seconds and median ratio to the round's plain run, with its bootstrap interval."""
    order = random.Random(seed)
    names = list(group)
    for run in group.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            begun = time.perf_counter()
            group[name]()
            seconds[name].append(time.perf_counter() - begun)
    plain = np.array(seconds[names[0]])
    draws = np.random.default_rng(seed).integers(0, rounds, size=(2000, rounds))
    found = {}
    for name in names:
        ratios = np.array(seconds[name]) / plain
        medians = np.median(ratios[draws], axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        found[name] = {
            "seconds": float(np.median(seconds[name])), "ratio": float(np.median(ratios)),
            "low": float(low), "high": float(high),
        }  # fmt: skip
    return found


def main() -> None:
    """Measure, print one table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="lab-tiny")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--conversations", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = load(given.model)
    groups = variants(model, conversations=given.conversations, new_tokens=given.new_tokens)
    results = {name: measure(group, rounds=given.rounds, seed=given.seed) for name, group in groups.items()}
    print(f"{'':<44}{'seconds':>9}  {'ratio':>7}  95 % interval")
    for group, rows in results.items():
        print(group)
        for name, row in rows.items():
            print(f"  {name:<42}{row['seconds']:>9.3f}  {row['ratio']:>7.3f}  [{row['low']:.3f}, {row['high']:.3f}]")
    files.write_json(
        RESULTS, {"model": given.model, "settings": vars(given), "versions": runs.versions(), "results": results}
    )
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()

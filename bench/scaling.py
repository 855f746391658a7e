"""What spreading over workers costs and saves, on lab-tiny: writes bench/results/scaling.json and prints one table.

    python bench/scaling.py --workers 2 --conversations 256

Turn by turn, all workers wait for the last part of each turn: `idle` is the share of the workers' time that this, and
everything else that is not a part, takes. It is what giving whole conversations to workers could save at most.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moesteer import files
from moesteer import scenario as scenarios
from moesteer.backends import hf
from moesteer.backends.ray import model as spread
from moesteer.backends.ray.cluster import cores, joined
from moesteer.backends.ray.loading import load
from moesteer.evaluate.play import play

OUT = Path(__file__).parent / "results" / "scaling.json"


def seconds(act: Callable[[], Any]) -> tuple[float, Any]:
    """How long it takes, and what comes of it."""
    begun = time.monotonic()
    found = act()
    return time.monotonic() - begun, found


class LoadsOnce:
    """What a pool of Ray Data would hold: a model for as long as one data set is mapped."""

    def __init__(self) -> None:
        from moesteer.backends.loading import load as load_here

        self.model = load_here("lab-tiny", check=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


def ray_data_s(workers: int) -> float:
    """Seconds of one execution of Ray Data over `workers` rows, with a pool of as many models.

    Half a CPU for each: its own tasks, which make the rows, need some too, and wait for ever for what a pool has.
    """
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.range(workers, override_num_blocks=workers)
    pool = ray.data.ActorPoolStrategy(size=workers)
    took, _ = seconds(lambda: data.map_batches(LoadsOnce, batch_size=1, compute=pool, num_cpus=0.5).take_all())
    return took


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=256)
    parser.add_argument("--batch-positions", type=int, default=1_600, help="small, as a large model's batches are")
    parser.add_argument("--ray-data", action="store_true", help="time an execution of Ray Data too")
    wanted = parser.parse_args()
    from moesteer.backends.loading import load as load_here

    whole = scenarios.load("jailbreak-defense")
    suite = next(one for one in whole.suites if one.play == "turns")
    rows = list(scenarios.splits(whole, seed=0)[suite.name]["test"])[: wanted.conversations]

    def played(model: Any) -> Any:
        return play(model, rows, turns=True, max_new_tokens=whole.max_new_tokens)

    found: dict[str, Any] = {"conversations": len(rows), "workers": wanted.workers, "cores": cores()}
    with (
        patch.object(hf, "BATCH_POSITIONS", wanted.batch_positions),
        patch.object(spread, "BATCH_POSITIONS", wanted.batch_positions),
        joined(workers=wanted.workers),
    ):
        local = load_here("lab-tiny")
        found["local_s"], expected = min((seconds(lambda: played(local)) for _ in range(3)), key=lambda pair: pair[0])
        begun = time.monotonic()
        with load("lab-tiny", workers=wanted.workers) as model:
            found["start_s"] = time.monotonic() - begun
            runs = []
            for _ in range(3):
                busy, parts = model.pool.busy_s, model.pool.finished
                took, answers = seconds(lambda: played(model))
                runs.append((took, model.pool.busy_s - busy, model.pool.finished - parts))
                assert answers == expected, "the workers' replies are not the local run's"
            found["workers_s"], busy, found["parts"] = min(runs)
            found["idle"] = 1 - busy / (found["workers_s"] * wanted.workers)
            empty = [seconds(lambda: list(model._run([{"kind": "check"}], None)))[0] for _ in range(20)]
            found["round_trip_ms"] = 1_000 * sorted(empty)[10]
        if wanted.ray_data:
            found["ray_data_execution_s"] = min(ray_data_s(wanted.workers) for _ in range(2))
    found = {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
    for key, value in found.items():
        print(f"{key:<24}{value}")
    files.write_json(OUT, {"schema": 1, "omp_num_threads": os.environ.get("OMP_NUM_THREADS"), **found})


if __name__ == "__main__":
    main()

"""Every method and control on every scenario, several seeds, in one table: docs/results.json and docs/results.md.

    python bench/quality.py [--kinds quality reversed ablations] [--seeds 0 1 2] [--jobs 2] [--only SCENARIO ...]

Each run is `moesteer steer` with everything switched on, in its own process and folder (runs/quality), so that a
killed benchmark goes on where it was. Each process uses one thread: on a small model two runs side by side are faster
than one run on two threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MODEL = "lab-tiny"
SCENARIOS = ("jailbreak-defense", "restricted-content", "faithfulness")
REVERSED = tuple(f"{name}-reversed" for name in SCENARIOS)
ABLATED = "jailbreak-defense"
KINDS = ("quality", "reversed", "ablations")
START, END = "<!-- tables: written by bench/quality.py -->", "<!-- end of tables -->"


def ablations() -> list[Any]:
    """Methods that differ from masc-labels-matched or from direct in one thing each (labels: in span and keep too).

    gated: also behind the gate, for what the gate does by itself; masc-published, too, with all its own settings.
    """
    from moesteer.detection import direct, masc, masc_published
    from moesteer.detection.method import Method

    def of(base: Method, name: str, *, gated: bool = False, **preset: Any) -> Method:
        own = {**({"l1": 3.0} if base is masc.METHOD else {}), **preset}
        alphas = (0.25, 0.5, 1.0) if base is masc.METHOD else (0.2, 0.3, 0.4)
        return replace(base, name=f"{base.name}-{name}", preset=own, variants=({},), alphas=alphas, gated=gated)

    found = [
        replace(of(masc.METHOD, "labels-published", gated=True, span="final_user", keep=()), contrast="published"),
        of(masc.METHOD, "labels-matched", gated=True),
        of(masc.METHOD, "surrogate-gru", surrogate_kind="gru"),
        of(masc.METHOD, "surrogate-linear", surrogate_kind="linear"),
        of(masc.METHOD, "start-random", start="random"),
        of(masc.METHOD, "keep-none", keep_weight=0.0),
        of(masc.METHOD, "sparsity-none", l1=0.0),
        of(masc.METHOD, "sparsity-strong", l1=10.0),
        of(masc.METHOD, "layers-first-half", layers=(0, 1, 2)),
        of(masc.METHOD, "layers-last-half", layers=(3, 4, 5)),
    ]
    found.append(replace(masc_published.METHOD, name="masc-published-as-is", gated=True, gated_alphas=(0.5, 1.0, 1.5)))
    for base in (masc.METHOD, direct.METHOD):
        found += [of(base, f"conversations-{n}", conversations=n) for n in (8, 32)]
    found += [
        of(direct.METHOD, "surrogate-none", gated=True),
        of(direct.METHOD, "sparsity-none", l1=0.0),
        of(direct.METHOD, "sparsity-strong", l1=1.6e-2),
        of(direct.METHOD, "layers-first-half", layers=(0, 1, 2)),
        of(direct.METHOD, "layers-last-half", layers=(3, 4, 5)),
    ]
    return found


def run_one(scenario: str, seed: int, *, kind: str, folder: Path, limit: int | None = None) -> None:
    """One run of the pipeline, in this process."""
    import torch

    from moesteer.cli import show
    from moesteer.detection.controls import CONTROLS
    from moesteer.methods import methods
    from moesteer.pipeline import RESIDUAL, steer

    torch.set_num_threads(1)
    show.quiet_transformers()
    if kind == "ablations":
        steer(MODEL, scenario=scenario, out=folder, methods=ablations(), controls=tuple(CONTROLS),
              controls_of="direct-surrogate-none+gate", seed=seed, limit=limit)  # fmt: skip
        return
    few = ("risk-difference", "masc", "direct", RESIDUAL)
    names = few if kind == "reversed" else (*methods(), RESIDUAL)
    steer(MODEL, scenario=scenario, out=folder, methods=names, controls=tuple(CONTROLS), controls_of="direct",
          seed=seed, limit=limit)  # fmt: skip


def place(root: Path, scenario: str, seed: int, kind: str) -> Path:
    """Folder of a run."""
    return root / kind / f"{scenario}-seed{seed}"


def run_all(plan: Sequence[tuple[str, int, str]], *, root: Path, jobs: int, limit: int | None) -> None:
    """Every run of the plan, `jobs` at a time; stops at the first that fails."""
    waiting, running = list(plan), dict[subprocess.Popen[bytes], tuple[str, int, str]]()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    while waiting or running:
        while waiting and len(running) < jobs:
            scenario, seed, kind = waiting.pop(0)
            folder = place(root, scenario, seed, kind)
            folder.parent.mkdir(parents=True, exist_ok=True)
            log = folder.with_suffix(".log").open("wb")
            command = [sys.executable, __file__, "--run", kind, scenario, str(seed), "--root", str(root)]
            command += ["--limit", str(limit)] if limit is not None else []
            running[subprocess.Popen(command, stdout=log, stderr=log, env=env)] = (scenario, seed, kind)
            print(f"started  {kind:<10} {scenario} seed {seed}", flush=True)
        time.sleep(0.5)
        for process in [p for p in running if p.poll() is not None]:
            scenario, seed, kind = running.pop(process)
            print(f"finished {kind:<10} {scenario} seed {seed}: exit {process.returncode}", flush=True)
            if process.returncode:
                for other in running:
                    other.terminate()
                sys.exit(f"see {place(root, scenario, seed, kind).with_suffix('.log')}")


def pooled(root: Path, scenario: str, seeds: Sequence[int], kind: str) -> dict[str, Any]:
    """A scenario's seeds taken together."""
    from moesteer import files
    from moesteer import scenario as scenarios
    from moesteer.evaluate.pooled import pool

    results, rows = [], {}
    for seed in seeds:
        folder = place(root, scenario, seed, kind)
        found: Mapping[str, Any] = files.read_json(folder / "results.json")
        results.append(found)
        rows[seed] = {name: files.Journal(folder / "responses" / f"{name}.jsonl").read() for name in found["methods"]}
    return pool(scenarios.load(scenario), results, {s: {n: list(r) for n, r in m.items()} for s, m in rows.items()})


def write(tables: Mapping[str, Any], *, docs: Path) -> None:
    """docs/results.json, and the part of docs/results.md between the two marks; other kinds stay as they are."""
    from moesteer import files
    from moesteer.evaluate.quality_table import markdown

    kept = files.read_json(docs / "results.json") if (docs / "results.json").exists() else {}
    tables = {kind: {**kept, **tables}[kind] for kind in KINDS if kind in {**kept, **tables}}
    files.write_json(docs / "results.json", tables)
    page = docs / "results.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    titles = {
        "quality": "## Every method and control",
        "reversed": "## Reversed, for audits",
        "ablations": "## Ablations",
    }
    body = "\n\n".join(f"{titles[kind]}\n\n{markdown(table)}" for kind, table in tables.items())
    page.write_text(f"{before}{START}\n\n{body}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="scenarios (default: all of each kind)")
    parser.add_argument("--root", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--limit", type=int, help="conversations per suite and split: a look, whose numbers say little")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where results.json and results.md are")
    parser.add_argument("--run", nargs=3, metavar=("KIND", "SCENARIO", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    partial = given.limit is not None or given.only
    if partial and given.docs == DOCS and not given.run:
        parser.error("--limit and --only need --docs: a part must not replace the tables in docs/")
    if given.run:
        kind, scenario, seed = given.run
        run_one(scenario, int(seed), kind=kind, folder=place(given.root, scenario, int(seed), kind), limit=given.limit)
        return
    scenarios = {"quality": SCENARIOS, "reversed": REVERSED, "ablations": (ABLATED,)}
    plan = [
        (name, seed, kind)
        for kind in given.kinds for seed in given.seeds for name in scenarios[kind]
        if not given.only or name in given.only
    ]  # fmt: skip
    run_all(plan, root=given.root, jobs=given.jobs, limit=given.limit)
    from moesteer.evaluate.quality_table import quality_table

    tables = {}
    for kind in given.kinds:
        names = list(dict.fromkeys(name for name, _, mine in plan if mine == kind))
        if names:
            found = [pooled(given.root, name, given.seeds, kind) for name in names]
            command = f"python bench/quality.py --kinds {kind} --seeds {' '.join(map(str, given.seeds))}"
            command += f" --only {' '.join(given.only)}" if given.only else ""
            command += f" --limit {given.limit}" if given.limit is not None else ""
            tables[kind] = quality_table(found, command=command)
    write(tables, docs=given.docs)
    print(f"written to {given.docs / 'results.json'} and {given.docs / 'results.md'}")


if __name__ == "__main__":
    main()

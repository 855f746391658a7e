"""Stands in for `moesteer audit` in the tests of the page: the same arguments, run directory, signals and exit codes.

A few seconds instead of minutes, so that a browser test can watch it from beginning to end.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from moesteer import files, runs

ROWS = 6


def main(arguments: list[str]) -> int:
    """Answer ROWS questions for each of `limit` conditions, slowly; the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["audit"])
    for name in ("--scenario", "--out", "--mask", "--dtype", "--device"):
        parser.add_argument(name)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=1)
    parser.add_argument("model")
    given = parser.parse_args(arguments)
    conditions = ("none", "silencing", "random")[: given.limit]
    print(f"auditing {given.model} <b>boldly</b>", file=sys.stderr)
    with runs.opened(Path(given.out), plan={"model": given.model, "scenario": given.scenario}) as run:
        run.expect(dict.fromkeys(conditions, ROWS))
        for condition in conditions:
            journal = files.Journal(run.path("responses", f"{condition}.jsonl"))
            for number in range(ROWS):
                time.sleep(0.25)
                journal.append([{"id": f"{condition}-{number}", "condition": condition}])
            print(f"{condition}: {ROWS} answers", file=sys.stderr)
        verdict = {"level": "held", "title": "Refusals held", "sentences": ["It is a stand-in."], "not_shown": []}
        files.write_json(run.path("results.json"), {"schema": 1, "kind": "audit", "verdict": verdict, "checks": []})
        files.write_text(run.path("report.html"), "<!doctype html><title>r</title><h1>The stand-in's report</h1>")
        run.mark("complete")
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

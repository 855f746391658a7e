"""Write docs/schemas/*.json from the classes that reports read by; --check fails where one is out of date."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moesteer.report.audit_files import AuditResults, Experts
from moesteer.report.evaluate_files import EvaluateResults
from moesteer.report.routing_files import Routing
from moesteer.report.run_files import Part, Response, Results

FOLDER = Path(__file__).parent / "schemas"
SCHEMAS: dict[str, tuple[type[Part], str]] = {
    "audit-results": (AuditResults, "results.json of `moesteer audit`"),
    "audit-experts": (Experts, "experts.json of `moesteer audit`"),
    "steer-results": (Results, "results.json of `moesteer steer`"),
    "evaluate-results": (EvaluateResults, "results.json of `moesteer evaluate --out`"),
    "routing": (Routing, "routing.json of a run"),
    "response": (Response, "one line of responses/NAME.jsonl"),
}


def schema(name: str) -> str:
    """A schema as JSON text. Keys that it does not name are allowed: later versions add some."""
    model, title = SCHEMAS[name]
    found = {**model.model_json_schema(by_alias=True), "title": title}
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **found}, indent=1) + "\n"


if __name__ == "__main__":
    for name in SCHEMAS:
        path = FOLDER / f"{name}.json"
        if "--check" not in sys.argv:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(schema(name), encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != schema(name):
            sys.exit(f"docs/schemas/{name}.json is out of date: run `make docs`")
    extra = {path.stem for path in FOLDER.glob("*.json")} - set(SCHEMAS)
    if extra:
        sys.exit(f"docs/schemas holds what is no schema of ours: {', '.join(sorted(extra))}")

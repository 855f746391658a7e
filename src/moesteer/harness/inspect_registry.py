"""What Inspect finds of moesteer by its entry point: a model provider, a task, a solver and a scorer.

Inspect reads this file whenever it looks a name up, so it imports nothing heavy; the rest is imported when it is used.
"""

from __future__ import annotations

from typing import Any

from inspect_ai.model import modelapi

from moesteer.harness.inspect_suite import rate as rate
from moesteer.harness.inspect_suite import suite as suite
from moesteer.harness.inspect_suite import suite_verdict as suite_verdict
from moesteer.harness.inspect_suite import turns as turns
from moesteer.harness.inspect_suite import verdict as verdict


@modelapi(name="moesteer")
def provider() -> Any:
    """`--model moesteer/MODEL`: MODEL a Hugging Face folder, a Hub id or lab-tiny."""
    from moesteer.harness.inspect_model import SteeredAPI

    return SteeredAPI

"""A model of Inspect's own that says what it is told; with usage, because it would fetch a tokenizer to count it."""

from __future__ import annotations

from collections.abc import Sequence

from inspect_ai.model import Model, ModelOutput, ModelUsage, get_model


def saying(replies: Sequence[str]) -> Model:
    """Gives these replies in order; tasks must ask one at a time (max_samples=1)."""
    outputs = [ModelOutput.from_content("mockllm", text) for text in replies]
    for output in outputs:
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    return get_model("mockllm/model", custom_outputs=outputs)

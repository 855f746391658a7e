"""Phi-3.5-MoE as re-saved by transformers 5, under the name that other engines know: a row of models/convert.py."""

from __future__ import annotations

from typing import Any

from moesteer.errors import ModelError

NATIVE, RESAVED = "PhiMoEForCausalLM", "PhimoeForCausalLM"


def plan(config: dict[str, Any], where: str) -> tuple[dict[str, Any], None]:
    """The config with its architecture renamed; every tensor stays as it is.

    transformers 5 has the class as PhimoeForCausalLM and `save_pretrained` writes that name; it loads either, by the
    model_type. vLLM knows only the Hub's name, falls back on a generic backend without it, and crashes.
    """
    architectures = config.get("architectures")
    if architectures != [RESAVED]:
        raise ModelError(
            f"nothing to convert: the architectures are {architectures!r}"[:200],
            where=where,
            expected=f"[{RESAVED!r}], as save_pretrained of transformers 5 writes it",
            do="use the checkpoint as it is",
        )
    return {**config, "architectures": [NATIVE]}, None

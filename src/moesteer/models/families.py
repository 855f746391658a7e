"""Every router family we know, one row each: data, no code.

transformers declares each family's router itself (the record of `router_logits` in its model class); a row
says only what that record does not: how logits become a selection, and what the config calls things. To add
a family, add a row and run `pytest tests/compat -k FAMILY` (docs/adding-a-model.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesteer.routing import Scoring, ScoringKind


@dataclass(frozen=True)
class Family:
    """One row: how a `model_type` of transformers routes.

    renormalise: True, False, or the config attribute that decides. top_k, experts: config attributes.
    layer_pattern: regular expression whose first group is the decoder layer's number in a module path.
    weights_index, experts_index: places of the routing weights and of the selected ids in the router's output.
    """

    model_type: str
    scoring: ScoringKind
    renormalise: bool | str
    top_k: str = "num_experts_per_tok"
    experts: str = "num_experts"
    layer_pattern: str = r"(?:^|\.)layers\.(\d+)\."
    weights_index: int = 1
    experts_index: int = 2
    examples: tuple[str, ...] = ()

    def scoring_of(self, config: Any) -> Scoring:
        """The Scoring that a model's config asks for. Raises AttributeError if the config lacks a name."""
        renormalise = (
            self.renormalise if isinstance(self.renormalise, bool) else bool(getattr(config, self.renormalise))
        )
        return Scoring(kind=self.scoring, top_k=int(getattr(config, self.top_k)), renormalise=renormalise)


ROWS = (
    Family(
        "qwen3_moe", "softmax-topk", renormalise="norm_topk_prob",
        examples=("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Instruct-2507", "lab-tiny"),
    ),
    Family("olmoe", "softmax-topk", renormalise="norm_topk_prob", examples=("allenai/OLMoE-1B-7B-0125-Instruct",)),
    Family(
        "mixtral", "softmax-topk", renormalise=True, experts="num_local_experts",
        examples=("mistralai/Mixtral-8x7B-Instruct-v0.1",),
    ),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {row.model_type: row for row in ROWS}

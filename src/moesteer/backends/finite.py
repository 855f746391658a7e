"""Watching what a model generates from: logits that are not finite give token 0, or any other, without a word."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moesteer.errors import NanLogitsError


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Notes rows of a batch whose next-token logits held NaN or plus infinity at any step; changes nothing.

    One small tensor stays on the device: nothing is read back before `require`.
    """

    def __init__(self) -> None:
        self.bad_N: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [N, V], as they are. Minus infinity is a token that may not come."""
        bad_N = torch.isnan(scores).any(dim=-1) | torch.isposinf(scores).any(dim=-1)
        self.bad_N = bad_N if self.bad_N is None else self.bad_N | bad_N
        return scores

    def require(self, *, name: str) -> None:
        """Raise NanLogitsError where a row was bad."""
        if self.bad_N is None or not bool(self.bad_N.any()):
            return
        rows = self.bad_N.nonzero().flatten().tolist()
        raise NanLogitsError(
            f"the logits of {len(rows)} of {len(self.bad_N)} prompts are not finite",
            where=f"{name}, prompts {', '.join(map(str, rows[:5]))} of a batch",
            expected="finite numbers",
            do="check the weights, the mask's strength and the dtype: float16 overflows where bfloat16 does not",
        )

"""The proximal step of an L1 penalty after a step of Adam: what makes the zeros of a mask exact."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def shrink(matrix: Tensor, optimizer: torch.optim.Adam, *, penalty_LE: Tensor | float) -> None:
    """Soft-threshold `matrix` in place, in the metric of the Adam step that was just made.

    Adam divides each entry's gradient by the root of its second moment v; the proximal step of penalty |S| in that
    metric has the threshold lr * penalty / (sqrt(v) + eps). So an entry whose loss gradient is below the penalty goes
    to zero and stays there, as in the objective itself, whatever the scale of the gradients. (A gradient of the L1
    term inside Adam is divided by the same root but never reaches zero.)
    """
    state, group = optimizer.state[matrix], optimizer.param_groups[0]
    unbiased = state["exp_avg_sq"] / (1.0 - group["betas"][1] ** float(state["step"]))
    threshold = group["lr"] * penalty_LE / (unbiased.sqrt() + group["eps"])
    matrix.copy_(matrix.sign() * (matrix.abs() - threshold).clamp(min=0.0))

"""Experts silenced one at a time: each row of a batch with another expert switched off, or with none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moesteer.errors import InputError
from moesteer.models.routers import Router
from moesteer.models.steering import MaskTables, Receipt
from moesteer.routing import check_force


def silencing(
    routers: Sequence[Router], silenced: Sequence[tuple[int, int] | None], *, device: torch.device
) -> MaskTables:
    """Tables for a batch with one row per entry: (index of the router, expert) is switched off, None leaves it.

    What a row gets is what a forced mask with that one expert off does. Raises InputError for an expert that does
    not exist, MaskContentError where the router has none to spare.
    """
    experts = routers[0].experts
    force_LME = np.zeros((len(routers), len(silenced) + 1, experts), dtype=np.int8)
    for row, entry in enumerate(silenced, start=1):
        if entry is None:
            continue
        index, expert = entry
        if not (0 <= index < len(routers) and 0 <= expert < experts):
            raise InputError(
                f"there is no expert {expert} of router {index}",
                where=f"a model with {len(routers)} routers of {experts} experts",
                expected="(index of a router, expert), both counted from 0",
                do="correct the numbers",
            )
        force_LME[index, row, expert] = -1
        check_force(force_LME[index, row : row + 1], scoring=routers[0].scoring)
    force = torch.from_numpy(force_LME).to(device)
    tables = MaskTables(torch.zeros(force.shape, device=device), force, receipt=Receipt(len(routers), (), ()))
    tables.set_rows(range(1, len(silenced) + 1))
    return tables

"""Controls: masks that should do nothing in particular, to hold a method's effect against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesteer.detection.base import Detection
from moesteer.mask import SteeringMask


def random_like(mask: SteeringMask, *, seed: int = 0) -> Detection:
    """A mask with the same numbers in other places: equal norm, sparsity, alpha and signs, experts at random.

    Additive strengths are shuffled over all layers and experts. A forced mask is shuffled within each layer,
    so that no layer is asked for more experts than it can give.
    """
    rng = np.random.default_rng(seed)
    if mask.force_LE is not None:
        force = np.stack([rng.permutation(row) for row in mask.force_LE])
        shuffled = replace(mask, force_LE=force)
    else:
        assert mask.strength_LE is not None
        shuffled = replace(mask, strength_LE=rng.permutation(mask.strength_LE.ravel()).reshape(mask.strength_LE.shape))
    shuffled = shuffled.with_info(method="random", settings={"like": mask.info.method, "seed": seed}, accepted_on=None)
    return Detection(shuffled, np.asarray(shuffled.values_LE, dtype=np.float32), {})

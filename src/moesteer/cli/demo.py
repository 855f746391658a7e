"""`moesteer demo`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesteer.cli.options import Fresh, Json, Seed
from moesteer.cli.steer import run_and_show


def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    seed: Seed = 0,
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """The whole way on the model that ships with moesteer: a few minutes on two cores, no network.

    lab tiny refuses harmful requests made directly, and lets many through at the end of a longer conversation.
    The demo finds the experts, steers them, and says what changed on conversations that nothing was fitted on.
    """
    from dataclasses import replace

    from moesteer.methods import method

    # a part of what `moesteer steer` tries (of the published method 3 of 32 settings), so that it takes minutes
    plain = replace(method("risk-difference"), gated=False)
    published = replace(method("masc-published"), variants=({"l1": 1e-3},), alphas=(0.25, 0.5, 1.0))
    direct = replace(method("direct"), gated_alphas=(0.5, 0.75))
    run_and_show(
        "lab-tiny", scenario="jailbreak-defense", out=out, methods=(plain, published, direct),
        seed=seed, fresh=fresh, json=json,
    )  # fmt: skip

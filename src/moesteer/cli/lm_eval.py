"""`moesteer lm-eval`"""

from __future__ import annotations

import typer

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
"""All that is typed after the first word is lm-eval's to read."""


def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line, with steered models in it: --model_args pretrained=MODEL,mask=FILE,alpha=0.5.

    All options are lm-eval's (`moesteer lm-eval run --help`); --model is moesteer unless another is named.
    """
    from moesteer.backends.sources import require_extra

    require_extra("lm_eval", "lm-eval", what="the command is lm-eval's", where="moesteer lm-eval")
    from moesteer.harness.lm_eval_command import run

    run(context.args)

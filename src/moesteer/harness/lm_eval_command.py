"""lm-eval's command line in this process, where `--model moesteer` is known.

lm-eval finds models in its own list and by `register_model`; it reads no entry points (0.4.13), so that its own
command cannot know of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from unittest.mock import patch

from lm_eval.__main__ import cli_evaluate

import moesteer.harness.lm_eval_model  # noqa: F401 - registers the model

NAMED = ("--model", "-M", "--config", "-C")
"""Options that say which model."""


def run(arguments: Sequence[str]) -> None:
    """What `lm_eval ARGUMENTS` does. Without --model or --config, the model is moesteer's."""
    with patch.object(sys, "argv", ["moesteer lm-eval", *with_model(arguments)]):  # it reads no other arguments
        cli_evaluate()


def with_model(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--model moesteer` where a run names no model: lm-eval's default would not be steered."""
    given = list(arguments)
    if given and given[0] in ("ls", "validate"):
        return given
    named = any(one.partition("=")[0] in NAMED for one in given)
    asks_help = not set(given).isdisjoint(("-h", "--help"))
    return given if named or asks_help or not given else [*given, "--model", "moesteer"]

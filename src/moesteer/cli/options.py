"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moesteer.errors import InputError

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a Hub id, or lab-tiny.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="At most so many conversations per suite and split (a quick look).")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: float32 on a CPU, the checkpoint's own elsewhere.")
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:0, ...; auto: a GPU if there is one; spread: over all there are.")
]
Quantize = Annotated[
    str | None,
    typer.Option(help="int8 or int4: experts and linear layers on the way in (by torchao).", show_default=False),
]
Backend = Annotated[
    str,
    typer.Option(help="hf: transformers. vllm: an engine of vLLM, with the same answers (the extra vllm)."),
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-option",
        metavar="KEY=JSON",
        help="Of vLLM's LLM class, for example tensor_parallel_size=2; repeat. Only with --backend vllm.",
        show_default=False,
    ),
]
Engine = Annotated[
    str,
    typer.Option(help="local: in this process. ray: in workers, here or on the cluster at RAY_ADDRESS (extra ray)."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="With --engine ray: how many. Default: one for each GPU, else for each machine.", show_default=False
    ),
]
Track = Annotated[
    str | None,
    typer.Option(
        help="Also record the numbers with trackio, wandb or mlflow (an extra each); no conversation is sent.",
        show_default=False,
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in --out and start again.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR",
        help="Keep replies in this folder, and use those that the same model, masks and settings gave before.",
        show_default=False,
    ),
]  # fmt: skip
MaskFiles = Annotated[
    list[Path] | None,
    typer.Option("--mask", help="A steering mask; repeat to apply several at once.", show_default=False),
]
Alphas = Annotated[
    list[float] | None,
    typer.Option(
        "--alpha", help="Strength, once for each --mask; 0 is no steering. Default: the mask's own.", show_default=False
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(help="Strength of the mask; 0 is no steering. Default: the mask's own.", show_default=False),
]
OtherCheckpoint = Annotated[
    bool, typer.Option("--allow-other-checkpoint", help="Accept router weights other than the mask was made on.")
]

DataSources = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=PATH",
        help="Other data for a suite: a file or folder, suite:NAME or lab:NAME; repeat. Where the suite is a named "
        "one (`moesteer suites`), the file is read as a copy of it.",
        show_default=False,
    ),
]


def data_sources(given: Sequence[str] | None) -> dict[str, str]:
    """Sources by suite name from repeated --data NAME=PATH. Raises InputError."""
    found: dict[str, str] = {}
    for text in given or ():
        name, equals, source = text.partition("=")
        if not (equals and name and source) or name in found:
            raise InputError(
                f"{name!r} is given twice" if equals and name in found else f"{text!r} is not NAME=PATH",
                where="--data",
                expected="the name of a suite once, and where its data is",
                do="for example --data mhj=downloads/harmbench_behaviors.csv",
            )
        found[name] = source
    return found


def engine_options(given: Sequence[str] | None) -> dict[str, Any]:
    """Values by name from repeated --engine-option KEY=JSON. Raises InputError."""
    found: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        try:
            if not equals or not key.isidentifier() or key in found:
                raise ValueError("twice" if key in found else "not KEY=JSON")
            found[key] = json.loads(value)
        except ValueError as error:
            bare = equals and key.isidentifier() and key not in found and value.isidentifier()
            raise InputError(
                f"{text!r} is {'given twice' if key in found else 'not KEY=JSON'}",
                where="--engine-option",
                expected="each option of vLLM once, with a number, true, false, null or a text in double quotes",
                do=f"write --engine-option '{key}=\"{value}\"'" if bare else "for example tensor_parallel_size=2",
            ) from error
    return found

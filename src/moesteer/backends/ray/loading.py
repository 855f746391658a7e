"""Starting workers with a model each, and proving that all of them have the same one.

from moesteer.backends.ray.loading import load

with load("lab-tiny", workers=2) as model:
    plain = model.generate(conversations)
    with model.steered([mask]) as receipt:
        steered = model.generate(conversations)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from moesteer.backends.adapters import base_of, own_tokenizer
from moesteer.backends.fingerprinting import fingerprint_of_files
from moesteer.backends.ray import cluster
from moesteer.backends.ray.model import RayModel
from moesteer.backends.ray.pool import Pool
from moesteer.backends.ray.worker import tokenizer_digest
from moesteer.backends.sources import (
    as_model_errors,
    native_config,
    require_extra,
    source_of,
    steerable_config,
)
from moesteer.errors import ModelError
from moesteer.fingerprint import Fingerprint
from moesteer.mask import SteeringMask
from moesteer.models.limits import strengths_of


@contextmanager
def load(
    model: str | Path,
    *,
    workers: int | None = None,
    backend: str = "hf",
    masks: Sequence[SteeringMask] = (),
    alphas: Sequence[float | None] | None = None,
    together: bool = True,
    capture: Literal["logits", "selected"] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    allow_other_checkpoint: bool = False,
) -> Iterator[RayModel]:
    """Workers that each load the model, on a cluster of Ray, as one backend inside the block.

    workers: how many; None is one for each GPU (or each set of GPUs that a worker needs), without GPUs one for each
    machine, and two on a single one. The other arguments are those of opening.opened. RAY_ADDRESS names a cluster to
    join; else one is started here, and stopped at the end. Raises what loading the model in a worker raises, InputError
    (workers that do not fit), ModelError (workers that differ), EngineStoppedError, MissingExtraError.
    """
    name = str(model)
    require_extra("ray", "ray", what="--engine ray runs workers on a cluster of Ray", where=name)
    tokenizer, expected = _of_files(name)
    options = dict(engine_options or {})
    with cluster.joined(workers=workers):
        rooms = cluster.rooms()
        gpus = cluster.gpus_each(rooms, backend=backend, device=device, workers=workers, options=options)
        share = cluster.share(rooms, workers=workers, gpus=gpus)
        engine = backend == "vllm"  # which takes its masks when it starts
        settings = {
            "model": _for_every_worker(name), "backend": backend, "dtype": dtype, "device": device,
            "quantize": quantize, "engine_options": options, "processes": cluster.ranks(options),
            "threads": None if gpus else _threads(share.cpus), "capture": capture,
            "masks": [mask.to_bytes() for mask in masks] if engine else [],
            "alphas": strengths_of(masks, alphas) if engine else [], "together": together,
            "allow_other_checkpoint": allow_other_checkpoint,
        }  # fmt: skip
        print(f"{share} ({_place(rooms)}); starting ...", file=sys.stderr)
        pool = Pool(settings, share, name=name)
        try:
            proof = pool.start()
            _require_expected(proof, tokenizer, expected, name=name)
            yield RayModel(pool, tokenizer, name=name, backend=backend, proof=proof)
            if pool.losses:
                print(f"workers lost: {pool.losses}; what they were at was done again", file=sys.stderr)
        finally:
            pool.close()


def _for_every_worker(name: str) -> str:
    """A path means the same in every worker only if it is whole."""
    return str(Path(name).resolve()) if source_of(name) == name and Path(name).is_dir() else name


def _threads(cpus: int) -> int:
    """As many as the worker has CPUs; OMP_NUM_THREADS, where it is set, is the limit."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cpus, int(limit)) if limit.isdigit() and int(limit) else cpus


def _of_files(name: str) -> tuple[Any, Fingerprint | None]:
    """The tokenizer, and the fingerprint that the files say the workers will have (None: they do not say it)."""
    source = source_of(name)
    base, revision, adapted = base_of(source, name=name, revision=None)
    stored = steerable_config(base, name=name, revision=revision)
    with as_model_errors("no tokenizer for the model", name=name, do="check the folder"):
        tokenizer = own_tokenizer(source) if adapted else None
        if tokenizer is None:
            config = native_config(stored)
            tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, config=config, trust_remote_code=False)
    try:
        return tokenizer, fingerprint_of_files(base, revision=revision)
    except ModelError as error:  # routers stored fused, or not on this machine
        print(f"the workers' routers are compared with each other only: {error.what}", file=sys.stderr)
        return tokenizer, None


def _require_expected(proof: Mapping[str, Any], tokenizer: Any, expected: Fingerprint | None, *, name: str) -> None:
    """Raise ModelError where the workers do not run the model that this process reads."""
    found = Fingerprint.model_validate(proof["fingerprint"])
    differs: list[str] = []
    if expected is not None:
        pairs = ((key, value, getattr(found, key)) for key, value in expected if key != "router_sha256")
        differs += [f"{key}: {here} here, {there} there" for key, here, there in pairs if here != there]
        # narrower numbers have other digests: there the shapes must do
        if proof["dtype"] == "torch.float32" and found.router_sha256 != expected.router_sha256:
            differs.append("the router weights differ")
    if proof["tokenizer"] != tokenizer_digest(tokenizer):
        differs.append("the tokenizers differ")
    if differs:
        raise ModelError(
            f"the workers run another model than the one here: {'; '.join(differs)}"[:600],
            where=f"{name}, worker {proof['pid']} on {proof['host']}",
            expected="the same files on every machine",
            do="put the model where every machine sees it, or give a Hub id that each has in its cache",
        )


def _place(rooms: Sequence[cluster.Room]) -> str:
    address = os.environ.get(cluster.ADDRESS)
    return f"the cluster at {address}, {len(rooms)} machines" if address else "on this machine"

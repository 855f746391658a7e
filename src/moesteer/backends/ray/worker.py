"""What runs in a worker: one model of its own, and the questions it answers. Imported by Ray's processes.

A worker says what it is (`start`), and under which masks it answered (`answer`). Errors of ours are answers too: as
exceptions they would arrive as Ray's. Nothing heavy is imported before `start`, so that what goes wrong there is told.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from moesteer import files
from moesteer.errors import MoesteerError
from moesteer.mask import SteeringMask
from moesteer.version import __version__


class Worker:
    """The class of the actors. settings: those that `loading.load` makes, plain values only."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        self._masks: dict[str, SteeringMask] = {}
        self._open = ExitStack()
        self._model: Any = None

    def start(self) -> dict[str, Any]:
        """Load the model; what it is, or the error that kept it from loading."""
        return _told(self._start)

    def answer(self, request: Mapping[str, Any], masks: Sequence[bytes]) -> dict[str, Any]:
        """A reply to one part, with the masks that were applied while it was made; or an error."""
        return _told(lambda: self._answer(request, masks))

    def close(self) -> None:
        """Stop an engine's processes."""
        self._open.close()

    def _start(self) -> dict[str, Any]:
        begun, settings = time.monotonic(), self._settings
        # an engine in the worker's own process dies with it
        if settings["backend"] == "vllm" and settings["processes"] == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import torch
        import transformers

        from moesteer.backends.opening import opened

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        if settings["threads"] is not None:
            torch.set_num_threads(settings["threads"])
        self._model = self._open.enter_context(
            opened(
                settings["model"], backend=settings["backend"],
                masks=[self._mask(data) for data in settings["masks"]], alphas=settings["alphas"],
                together=settings["together"], capture=settings["capture"], dtype=settings["dtype"],
                device=settings["device"], quantize=settings["quantize"], engine_options=settings["engine_options"],
                allow_other_checkpoint=settings["allow_other_checkpoint"],
            )
        )  # fmt: skip
        return {**self._proof(), "seconds": round(time.monotonic() - begun, 1)}

    def _proof(self) -> dict[str, Any]:
        """What every worker must have in common, and where this one is."""
        import torch
        import transformers

        model = self._model
        return {
            "fingerprint": model.fingerprint.model_dump(mode="json"), "weights": model.weights_sketch,
            "dtype": model.dtype, "context_tokens": model.context_tokens, "stops": list(model.stops),
            "tokenizer": tokenizer_digest(model.tokenizer), "threads": self._settings["threads"],
            "new_tokens_at_once": getattr(model, "new_tokens_at_once", None),
            "versions": {
                "moesteer": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            },
            "pid": os.getpid(), "host": socket.gethostname(),
        }  # fmt: skip

    def _mask(self, data: bytes) -> SteeringMask:
        """A mask from its file's bytes, checked as SteeringMask.load checks a file."""
        digest = files.sha256(data)
        if digest not in self._masks:
            where = f"a mask that arrived at worker {os.getpid()} on {socket.gethostname()}"
            self._masks[digest] = SteeringMask.from_bytes(data, where=where)
        return self._masks[digest]

    def _answer(self, request: Mapping[str, Any], masks: Sequence[bytes]) -> dict[str, Any]:
        kinds: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "check": lambda request: {}, "generate": self._generate, "pool": self._pool, "outputs": self._outputs,
        }  # fmt: skip
        given = [self._mask(data) for data in masks]
        with self._steered(given, request["steering"]) as receipt:
            found = kinds[request["kind"]](request)
            applied, alphas = list(self._model.mask_sha256), list(self._model.alphas)
        return {
            **found, "masks": [mask.sha256 for mask in given], "applied": applied, "alphas": alphas,
            "receipt": None if receipt is None else asdict(receipt), "pid": os.getpid(),
        }  # fmt: skip

    @contextmanager
    def _steered(self, masks: Sequence[SteeringMask], how: Mapping[str, Any] | None) -> Iterator[Any]:
        """Each part is steered by itself, so that its receipt is its own."""
        if how is None:
            yield None
            return
        with self._model.steered(masks, **how) as receipt:
            yield receipt

    # ---- the questions

    def _generate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from moesteer.backends.ray import wire

        talks = [wire.messages_from_wire(rows) for rows in request["conversations"]]
        with ExitStack() as stack:
            if request["pooled"] is not None:  # read with the local run's batches, not with this part's
                memory = stack.enter_context(self._model.remembering())
                memory.pooled.update({(tuple(ids), pool): table for ids, pool, table in request["pooled"]})
            made = self._model.generate(talks, max_new_tokens=request["max_new_tokens"], rows=request["rows"])
        return {"replies": [wire.generation_as_wire(one) for one in made]}

    def _pool(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from moesteer.backends.gating import pooled_logits
        from moesteer.backends.ray import wire

        prompts = [wire.encoded_from_wire(row) for row in request["prompts"]]
        return {"pooled": dict(pooled_logits(self._model, prompts, request["pools"]))}

    def _outputs(self, request: Mapping[str, Any]) -> dict[str, Any]:
        import numpy as np

        from moesteer.backends.ray import wire
        from moesteer.trace import selected_dtype

        batch = [wire.encoded_from_wire(row) for row in request["batch"]]
        logits, chosen = self._model.router_outputs(batch, request["places"], logits=request["logits"])
        if logits is not None and request["half"]:
            with np.errstate(over="ignore"):
                logits = logits.astype(np.float16)
        return {"logits": logits, "selected": chosen.astype(selected_dtype(self._model.fingerprint.experts))}


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what decides token ids: the fast tokenizer as JSON, and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else files.dumps(sorted(tokenizer.get_vocab().items()))
    return files.sha256(f"{words}\0{tokenizer.chat_template}".encode())


def _told(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return ask()
    except MoesteerError as error:
        from moesteer.backends.ray import wire

        return wire.error_as_wire(error)

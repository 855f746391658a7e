"""Steered models in lm-eval: its own transformers model, with a mask's steering around every pass.

    moesteer lm-eval --model_args pretrained=lab-tiny,mask=FILE,alpha=0.5 --tasks TASK.yaml

lm-eval scores as it always does (`HFLM`): batching, windows and stop sequences are its own, so that an unsteered run
is its own run. Only which model answers differs. Its cache of answers (--use_cache) is keyed by the request alone
(lm-evaluation-harness issue 4063); here it is bound to one model and mask. docs/harnesses.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from moesteer import files
from moesteer.backends.chat import Encoded
from moesteer.backends.gating import decide
from moesteer.backends.loading import load
from moesteer.conversations import Message
from moesteer.errors import FileError, InputError
from moesteer.harness.steering import Tally, identity, steering_of

STAMP = "moesteer"
"""Key of a cache's owner, beside keys that are digests in hexadecimal."""
Acting = tuple[int, ...]
"""Which masks act on a request, by their places."""


@register_model("moesteer")
class SteeredLM(HFLM):  # type: ignore[misc,unused-ignore]
    """`--model moesteer`. Greedy scoring and generation as HFLM, on a model of the transformers backend."""

    def __init__(
        self,
        pretrained: str,
        *,
        mask: Any = None,
        alpha: Any = None,
        pin: Any = None,
        pin_alpha: Any = None,
        dtype: str = "auto",
        device: str | None = "auto",
        quantize: str | None = None,
        revision: str | None = None,
        allow_other_checkpoint: bool = False,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        truncation: bool = False,
        logits_cache: bool = True,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ) -> None:
        """Load the model and prove that the masks fit it.

        mask, alpha, pin, pin_alpha: files and strengths, several with `;` between them (steering.steering_of).
        pretrained, dtype, device, quantize, revision: of moesteer.load. The rest are HFLM's. Raises as load and
        `steered` do, before the first request.
        """
        where = f"--model moesteer, {pretrained}"
        self.steering = steering_of(mask=mask, alpha=alpha, pin=pin, pin_alpha=pin_alpha, where=where)
        self.moe = load(pretrained, dtype=dtype, device=_device_of(device), quantize=quantize, revision=revision)
        self._other = allow_other_checkpoint
        self._plain = [mask.with_gate(None, None) for mask in self.steering.masks]
        """The masks as they act once their gates are decided."""
        self._rendered: dict[str, tuple[Message, ...]] = {}
        self.tally = Tally()
        self._require_fit()
        self.identity = identity(
            self.steering, weights=self.moe.weights_sketch,
            settings={
                "backend": "lm-eval", "dtype": self.moe.dtype, "quantize": quantize, "max_length": max_length,
                "truncation": truncation, "add_bos_token": add_bos_token, "prefix_token_id": prefix_token_id,
            },
        )  # fmt: skip
        super().__init__(
            pretrained=self.moe.hf, backend="causal", tokenizer=self.moe.tokenizer, batch_size=batch_size,
            max_batch_size=max_batch_size, max_length=max_length, truncation=truncation, logits_cache=logits_cache,
            add_bos_token=add_bos_token, prefix_token_id=prefix_token_id,
        )  # fmt: skip
        self.name = pretrained + self.steering.label

    def _require_fit(self) -> None:
        """Raise, as `steered` does, where the masks do not fit the model or each other."""
        if self.steering.masks:
            with self.moe.steered(
                self.steering.masks, alphas=self.steering.alphas, together=True, allow_other_checkpoint=self._other
            ):
                pass

    # ---- steering

    @contextmanager
    def _steered(self, acting: Acting) -> Iterator[None]:
        """Steering by these masks, their gates asked before; its receipt is added to the tally. Raises NoEffectError"""
        if not acting:
            yield
            return
        alphas = [self.steering.alphas[m] for m in acting]
        with self.moe.steered(
            [self._plain[m] for m in acting], alphas=alphas, together=True, allow_other_checkpoint=self._other
        ) as receipt:
            yield
        self.tally.add(receipt, where=self.name)

    @property
    def _gated(self) -> bool:
        return any(mask.gated for mask in self.steering.masks)

    def _by_acting(self, contexts: Sequence[tuple[str, list[int]]]) -> dict[Acting, list[int]]:
        """Places of the requests by the masks that act on them, their gates asked. contexts: text and tokens."""
        if not self._gated:
            return {tuple(range(len(self.steering.masks))): list(range(len(contexts)))}
        allowed = decide(self.moe, [self._request(*one) for one in contexts], self.steering.masks)
        gates = [mask.gated for mask in self.steering.masks]
        self.tally.gates(asked=len(contexts) * sum(gates), fired=int(allowed[:, gates].sum()))
        found: dict[Acting, list[int]] = {}
        for place, row in enumerate(allowed):
            found.setdefault(tuple(int(m) for m in np.flatnonzero(row)), []).append(place)
        return found

    def _request(self, text: str, tokens: list[int]) -> Encoded:
        """What a gate reads: the conversation that the text was rendered from, as every backend encodes it; else the
        text's own tokens, all of them one turn."""
        messages = self._rendered.get(text)
        if messages is not None and messages[-1].role == "user":
            return self.moe.encode(messages)
        kept = tokens[-self.max_length :]
        return Encoded(tuple(kept), {"prompt": (0, len(kept))})

    def _each(self, contexts: Sequence[tuple[str, list[int]]], run: Callable[[list[int]], list[Any]]) -> list[Any]:
        """`run` on the places of requests that the same masks act on, those masks acting; results in order."""
        found: list[Any] = [None] * len(contexts)
        for acting, places in self._by_acting(contexts).items():
            with self._steered(acting):
                made = run(places)
            for place, one in zip(places, made, strict=True):
                found[place] = one
        return found

    # ---- what lm-eval asks

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of (texts, context tokens, continuation tokens); gates are asked about the context."""
        score = super()._loglikelihood_tokens
        if not requests:
            return []
        return self._each(
            [(texts[0] if texts else "", context) for texts, context, _ in requests],
            lambda places: score(
                [requests[i] for i in places],
                disable_tqdm=disable_tqdm,
                override_bs=None if override_bs is None else len(places),
            ),
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As HFLM. Raises InputError behind a gate: running text is no request that one could decide on."""
        if self._gated:
            raise InputError(
                "a gate decides by request, and running text holds none",
                where=f"{self.name}: a task of output_type loglikelihood_rolling",
                expected="masks without a gate",
                do="leave this task out, or take the gate off (SteeringMask.with_gate(None, None))",
            )
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As HFLM; gates are asked about the context."""
        generate = super().generate_until
        contexts = [(request.args[0], self.tok_encode(request.args[0]) if self._gated else []) for request in requests]
        return self._each(contexts, lambda places: generate([requests[i] for i in places], disable_tqdm=disable_tqdm))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As HFLM; which conversation a text came from is kept, for gates that read the last turn."""
        text: str = super().apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        if self._gated:
            self._rendered[text] = tuple(Message(m["role"], m["content"]) for m in chat_history)
        return text

    # ---- what lm-eval writes down

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Bind a cache of answers to this model and its masks. Raises FileError for one that is another's."""
        cache = cache_hook.dbdict
        if cache is not None:
            owner = cache.get(STAMP)
            if owner is None and len(cache):
                raise _foreign(self.name, "a model that did not say which")
            if owner is None:
                cache[STAMP] = files.dumps({"identity": self.identity, "name": self.name}, indent=None)
            elif self.identity not in owner:
                raise _foreign(self.name, str(files.parse_json(owner.encode())["name"]))
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What results.json says of the model: HFLM's, and the masks, their strengths and what they did."""
        found: dict[str, Any] = super().get_model_info()
        steered = {
            **self.steering.as_json(), "identity": self.identity, "device": str(self.moe.device),
            "receipt": dict(self.tally.counts),
        }  # fmt: skip
        return {**found, "model_name_steered": self.name, "moesteer": steered}


def _device_of(device: str | None) -> str:
    """lm-eval's command line says cuda:0 where nobody said anything, and its models then take a CPU if they must."""
    return "auto" if device is None or (device in ("cuda", "cuda:0") and not torch.cuda.is_available()) else device


def _foreign(name: str, owner: str) -> FileError:
    return FileError(
        f"the cache holds answers of {owner}",
        where=f"--use_cache, for {name}",
        expected="a cache of this model with these masks and strengths, or a new one",
        do="name another file: lm-eval's cache does not tell models apart by itself",
    )

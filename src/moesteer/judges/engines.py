"""What runs a guard model: transformers in this process, or an engine of vLLM. Greedy, batched by length.

Guards are dense models, or mixtures of experts; they are loaded as docs/security.md asks of every model: no code of
their own, safetensors only. None of this steers.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moesteer import files
from moesteer.backends.adapters import base_of, with_adapter
from moesteer.backends.chat import length_batches, stop_ids
from moesteer.backends.fingerprinting import checkpoint_of
from moesteer.backends.loading import DTYPES, require_whole
from moesteer.backends.sources import (
    as_model_errors,
    class_for,
    native_config,
    quiet_bars,
    read_config,
    require_extra,
    source_of,
)
from moesteer.errors import EngineStoppedError, ModelError
from moesteer.judges.settings import JudgeSettings

BATCH_POSITIONS = 16_384
"""Positions (rows x padded length) in one batch."""
TOP = 20
"""Of vLLM's next-token probabilities, how many are asked for: its own limit, unless it is started with another."""


class Engine(Protocol):
    """A loaded guard model."""

    tokenizer: PreTrainedTokenizerBase
    context_tokens: int

    def answers(self, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> list[str]:
        """The greedy continuation of each prompt, without special tokens. Raises RuntimeError where it cannot."""

    def next_tokens(self, prompts: Sequence[Sequence[int]], *, among: Sequence[int]) -> list[list[float]]:
        """Of each prompt, the probability of each of these tokens to come next. Raises RuntimeError."""

    def close(self) -> None:
        """Free it."""


def start(settings: JudgeSettings, *, model: str) -> Engine:
    """The judge's model, loaded. Raises ModelError, UnsafeModelError, MissingExtraError."""
    return VllmEngine(settings, model=model) if settings.backend == "vllm" else HfEngine(settings, model=model)


class HfEngine:
    """A guard model in transformers."""

    def __init__(self, settings: JudgeSettings, *, model: str) -> None:
        where = f"judge {settings.name}: {model}"
        base, revision, adapted = _base_of(model, settings.revision, where=where)
        stored = read_config(base, name=where, revision=revision)
        place = settings.device
        if place == "auto":
            place = "cuda" if torch.cuda.is_available() else "cpu"
        wanted: Any = DTYPES.get(settings.dtype, torch.float32 if place == "cpu" else "auto")
        with (
            as_model_errors("the judge could not be loaded", name=where, do="check `model` and `device`"),
            quiet_bars(),
        ):
            config = native_config(stored)
            tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, config=config, trust_remote_code=False)
            hf, info = class_for(stored).from_pretrained(
                base, revision=revision, config=config, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True, dtype=wanted,
            )  # fmt: skip
            require_whole(info, name=where)
            if adapted:
                tokenizer, hf = with_adapter(hf, tokenizer, source_of(model), revision=settings.revision, name=where)
            hf = hf.to(place).eval()
        self.tokenizer, self._hf = tokenizer, hf
        self.context_tokens = int(getattr(hf.config.get_text_config(), "max_position_embeddings", 1 << 30))
        self._stops = stop_ids(hf.generation_config, tokenizer)

    def answers(self, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> list[str]:
        """As Engine; in batches of like length."""
        found = [""] * len(prompts)
        for batch in length_batches([len(p) + new_tokens for p in prompts], BATCH_POSITIONS):
            made = self._generate([prompts[i] for i in batch], new_tokens)
            start = made.sequences.shape[1] - len(made.logits)
            for i, row in zip(batch, made.sequences[:, start:].tolist(), strict=True):
                stop = next((at for at, token in enumerate(row) if token in self._stops), len(row))
                found[i] = str(self.tokenizer.decode(row[:stop], skip_special_tokens=True))
        return found

    def next_tokens(self, prompts: Sequence[Sequence[int]], *, among: Sequence[int]) -> list[list[float]]:
        """As Engine; in batches of like length."""
        found: list[list[float]] = [[] for _ in prompts]
        for batch in length_batches([len(p) for p in prompts], BATCH_POSITIONS):
            logits = self._generate([prompts[i] for i in batch], 1).logits[0].float()
            for i, row in zip(batch, logits.softmax(-1)[:, list(among)].tolist(), strict=True):
                found[i] = row
        return found

    def _generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Any:
        """transformers' output: sequences, and the logits of every new token."""
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self._stops or [0])[0]
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=self._hf.device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._hf.device)
        with torch.inference_mode():
            return self._hf.generate(
                input_ids=ids, attention_mask=seen, max_new_tokens=new_tokens, do_sample=False, temperature=None,
                top_p=None, top_k=None, pad_token_id=pad, eos_token_id=self._stops or None,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip

    def close(self) -> None:
        """Let the weights go, and give the accelerator its memory back."""
        self._hf = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class VllmEngine:
    """A guard model in an engine of vLLM, without masks."""

    def __init__(self, settings: JudgeSettings, *, model: str) -> None:
        where = f"judge {settings.name}: {model}"
        require_extra("vllm", "vllm", what="backend = 'vllm' runs the judge in vLLM", where=where)
        from moesteer.backends.vllm.output import Output
        from moesteer.backends.vllm.starting import require_arguments
        from moesteer.backends.vllm.starting import start as start_engine

        source = source_of(model)
        require_arguments(where, dtype=settings.dtype, options=settings.engine_options)
        if _base_of(model, settings.revision, where=where)[2]:
            raise ModelError(
                "the judge is an adapter of PEFT, which vLLM is not given here",
                where=where,
                expected="backend = 'hf', or a checkpoint with the adapter merged into it",
                do="take backend = 'vllm' out",
            )
        stored = read_config(source, name=where, revision=settings.revision)
        with as_model_errors("the judge could not be loaded", name=where, do="check `model`"):
            self.tokenizer = AutoTokenizer.from_pretrained(
                source, revision=settings.revision, config=native_config(stored), trust_remote_code=False
            )
        self._where = where
        self._folder = tempfile.TemporaryDirectory(prefix="moesteer-judge-")
        self._stops = stop_ids(None, self.tokenizer)
        try:
            self._engine = start_engine(
                source, where, None, Output(Path(self._folder.name) / "engine.log"),
                dtype=settings.dtype, revision=settings.revision, options=settings.engine_options,
            )  # fmt: skip
        except BaseException:
            self._folder.cleanup()
            raise
        self.context_tokens = int(self._engine.model_config.max_model_len)

    def answers(self, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> list[str]:
        """As Engine; vLLM batches."""
        return [
            str(self.tokenizer.decode(out.token_ids, skip_special_tokens=True))
            for out in self._run(prompts, max_tokens=new_tokens, stop_token_ids=self._stops)
        ]

    def next_tokens(self, prompts: Sequence[Sequence[int]], *, among: Sequence[int]) -> list[list[float]]:
        """As Engine; a token that is not among the likeliest TOP counts as never to come."""
        found: list[list[float]] = []
        for out in self._run(prompts, max_tokens=1, logprobs=TOP):
            likely: Mapping[int, Any] = out.logprobs[0]
            found.append([math.exp(likely[token].logprob) if token in likely else 0.0 for token in among])
        return found

    def _run(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        """Raises EngineStoppedError where the engine is gone, RuntimeError for all else."""
        from vllm import SamplingParams

        from moesteer.backends.vllm.dying import is_dead, noticing_death

        parameters = SamplingParams(temperature=0.0, detokenize=False, **sampling)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        try:
            with noticing_death(self._engine):
                made = self._engine.generate(asked, parameters, use_tqdm=False)
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            if is_dead(self._engine):  # which no later question changes: unscored rows would be kept for nothing
                raise EngineStoppedError(
                    f"the judge's engine stopped: {why}",
                    where=self._where,
                    expected="an answer to every question",
                    do="run the same command again: it goes on where it was",
                ) from error
            raise RuntimeError(f"vLLM: {why}") from error
        return [one.outputs[0] for one in made]

    def close(self) -> None:
        """Stop the engine's processes."""
        self._engine.llm_engine.engine_core.shutdown()
        self._folder.cleanup()


def _base_of(model: str, revision: str | None, *, where: str) -> tuple[str, str | None, bool]:
    """What transformers loads: the model itself, or the base of an adapter; and whether it is one."""
    found = base_of(source_of(model), name=where, revision=revision)
    if found[2]:
        require_extra("peft", "peft", what="the judge is an adapter of PEFT", where=where)
    return found


_TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
          "tokenizer.model", "adapter_config.json", "adapter_model.safetensors")  # fmt: skip


def weights_digest(model: str, *, revision: str | None) -> str:
    """A digest that tells other weights, tokenizers and templates apart, from the files alone.

    Of every tensor some bytes, of the small files all. Raises ModelError for files that are not there.
    """
    where = f"judge: {model}"
    base, base_revision, adapted = _base_of(model, revision, where=where)
    parts: list[str] = []
    checkpoint = checkpoint_of(base, revision=base_revision)
    for stored in checkpoint.tensors.values():
        with open(stored.file, "rb") as handle:
            pieces = b""
            for at in (0, stored.size_bytes // 2):
                handle.seek(stored.start + at)
                pieces += handle.read(min(256, stored.size_bytes - at))
        parts.append(f"{stored.name} {stored.shape} {stored.dtype} {files.sha256(pieces)}")
    folders = [checkpoint.folder, *([_adapter_folder(model, revision)] if adapted else [])]
    for folder in folders:
        parts += [f"{n} {files.sha256((folder / n).read_bytes())}" for n in _TEXTS if (folder / n).is_file()]
    return files.sha256("\n".join(parts).encode())


def _adapter_folder(model: str, revision: str | None) -> Path:
    """Where an adapter's own files lie."""
    if Path(model).is_dir():
        return Path(model)
    from transformers.utils import cached_file

    with as_model_errors("the adapter is not in the local cache", name=model, do="fetch it: hf download ORG/NAME"):
        return Path(cached_file(model, "adapter_config.json", revision=revision)).parent

"""vLLM as an offline backend: the same questions as backends/hf.Model, answered by an engine of its own.

An engine takes its masks when it starts, so a model is loaded with them:

    model = load("lab-tiny", masks=[mask])
    plain = model.generate(conversations)
    with model.steered([mask], together=True) as receipt:
        steered = model.generate(conversations)

Greedy decoding only, as there. The engine's processes are started anew by Python, so scripts need the usual
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from transformers import AutoTokenizer, GenerationConfig

from moesteer import files
from moesteer.backends.adapters import adapter_config
from moesteer.backends.chat import Chat, Encoded, Generation, stop_ids
from moesteer.backends.fingerprinting import checkpoint_of, routers_of_files
from moesteer.backends.sources import (
    as_model_errors,
    model_types,
    native_config,
    read_config,
    require_extra,
    source_of,
)
from moesteer.backends.vllm.catalogue import Catalogue, Member, Row
from moesteer.backends.vllm.gating import decided, needs_gate, probe
from moesteer.backends.vllm.output import Output
from moesteer.backends.vllm.requests import Reading, Ticket, tickets
from moesteer.backends.vllm.settings import Settings, settings_for
from moesteer.backends.vllm.starting import require_arguments, start
from moesteer.conversations import Message
from moesteer.errors import (
    AlreadySteeredError,
    InputError,
    ModelError,
    MoesteerError,
    NoEffectError,
)
from moesteer.mask import SteeringMask
from moesteer.models.limits import require_possible, require_strengths, require_together
from moesteer.models.routers import require_steerable
from moesteer.models.steering import Receipt
from moesteer.progress import Progress

CHUNK = 1_024
"""Requests given to the engine at a time; between chunks the progress bar moves."""


def load(
    model: str | Path,
    *,
    masks: Sequence[SteeringMask] = (),
    alphas: Sequence[float | None] | None = None,
    together: bool = True,
    dtype: str = "auto",
    revision: str | None = None,
    capture: Literal["logits", "selected"] | None = None,
    allow_other_checkpoint: bool = False,
    options: Mapping[str, Any] | None = None,
) -> VllmModel:
    """Start an engine with a Hugging Face folder, a Hub id in the local cache, or `lab-tiny`, and prove that it steers.

    masks, alphas: what it can be steered by (alphas: None for a mask's own). together: all at once; else one for each
    row (`generate(rows=...)`). capture: what `read` can keep. options: of vLLM's LLM class (tensor_parallel_size, ...).
    dtype: "auto" is float32 on a CPU and the checkpoint's own elsewhere. What vLLM prints is kept off the screen unless
    VLLM_LOGGING_LEVEL is set (output.py). Raises as backends.loading.load does, InputError, UnknownNameError,
    MaskMismatchError, MaskContentError, NoEffectError, MissingExtraError.
    """
    name = str(model)
    require_extra("vllm", "vllm", what="--backend vllm runs the model in vLLM", where=name)
    require_arguments(name, dtype=dtype, options=options or {})
    source = source_of(name)
    if adapter_config(source, name=name, revision=revision) is not None:
        raise ModelError(
            "the model is an adapter of PEFT, and a steered engine of vLLM runs none",
            where=name,
            expected="a whole model",
            do="merge the adapter into its base and save that; or --backend hf",
        )
    stored = read_config(source, name=name, revision=revision)
    require_steerable(model_types(stored), where=name)
    routers, fingerprint = routers_of_files(source, revision=revision)
    strengths = [None] * len(masks) if alphas is None else list(alphas)
    require_strengths(masks, strengths)
    for mask in masks:
        mask.check_model(fingerprint, allow_other_checkpoint=allow_other_checkpoint)
        mask.require_entries()
        require_possible(mask, routers)
    if together:
        require_together(masks, strengths, routers)
    with as_model_errors("no tokenizer for the model", name=name, do="check the folder"):
        config = native_config(stored)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, config=config, trust_remote_code=False)
    context = int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 30))
    folder = tempfile.TemporaryDirectory(prefix="moesteer-masks-")  # every process of the engine reads the masks there
    settings = _settings(
        masks, strengths, Path(folder.name), together=together, capture=capture, other=allow_other_checkpoint
    )
    catalogue = Catalogue.load(settings)
    output = Output(Path(folder.name) / "output.txt")
    engine = start(source, name, settings, output, dtype=dtype, revision=revision, options=options or {})
    try:
        return VllmModel(
            engine, tokenizer, name=name, context_tokens=min(context, int(engine.model_config.max_model_len)),
            stops=stop_ids(_generation_config(source, revision), tokenizer), fingerprint=fingerprint,
            masks=tuple(masks), catalogue=catalogue, folder=folder, output=output, source=source, revision=revision,
            capture=capture, options=options or {},
        )  # fmt: skip
    except BaseException:
        engine.llm_engine.engine_core.shutdown()
        raise


def _generation_config(source: str, revision: str | None) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:  # there is none
        return None


def _settings(
    masks: Sequence[SteeringMask],
    alphas: Sequence[float | None],
    folder: Path,
    *,
    together: bool,
    capture: Literal["logits", "selected"] | None,
    other: bool,
) -> Settings:
    """As pinned masks, or as masks to be named `1`, `2`, ... A mask at strength 0 is left out: it does nothing."""
    sources: dict[str, tuple[Path, float | None]] = {}
    for number, (mask, alpha) in enumerate(zip(masks, alphas, strict=True), 1):
        if (mask.info.alpha if alpha is None else alpha) != 0:
            path = folder / f"{number}.safetensors"
            mask.save(path)
            sources[str(number)] = (path, alpha)
    return settings_for(
        pins=list(sources.values()) if together else (), masks={} if together else sources, capture=capture,
        allow_other_checkpoint=other, count=bool(sources),
    )  # fmt: skip


class VllmModel(Chat):
    """A model inside an engine of vLLM. Made by `load`."""

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        *,
        name: str,
        context_tokens: int,
        stops: Sequence[int],
        fingerprint: Any,
        masks: tuple[SteeringMask, ...],
        catalogue: Catalogue,
        folder: tempfile.TemporaryDirectory[str],
        output: Output,
        source: str,
        revision: str | None,
        capture: str | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(tokenizer, name=name, context_tokens=context_tokens, stops=stops)
        self.engine, self.fingerprint, self.masks, self.catalogue = engine, fingerprint, masks, catalogue
        self._folder, self._output, self._options = folder, output, dict(options)
        self._source, self._revision, self.capture = source, revision, capture
        self._receipt: Receipt | None = None
        self._together = True
        parallel = engine.llm_engine.vllm_config.parallel_config
        self._tensor_ranks = int(parallel.tensor_parallel_size)
        self._require_workers()

    def close(self) -> None:
        """Stop the engine's processes."""
        self.engine.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    def __enter__(self) -> VllmModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def dtype(self) -> str:
        """Of the weights and activations."""
        return str(self.engine.model_config.dtype)

    @property
    def mask_sha256(self) -> tuple[str, ...]:
        """Digests of the masks applied now (short form); empty for the model as it is."""
        return self._receipt.masks if self._receipt is not None else ()

    @property
    def alphas(self) -> list[float]:
        """Strengths of the masks applied now."""
        return list(self._receipt.alphas) if self._receipt is not None else []

    @cached_property
    def weights_sketch(self) -> str:
        """A quick digest that tells other weights apart: some bytes of every stored tensor; the engine's options."""
        digest = hashlib.sha256(b"vllm" + files.dumps(self._options, indent=None).encode())
        for stored in checkpoint_of(self._source, revision=self._revision).tensors.values():
            digest.update(f"{stored.name} {stored.shape} {stored.dtype}".encode())
            with open(stored.file, "rb") as handle:
                for at in (0, stored.size_bytes // 2):
                    handle.seek(stored.start + at)
                    digest.update(handle.read(min(256, stored.size_bytes - at)))
        return digest.hexdigest()[:32]

    def reports(self) -> list[dict[str, Any]]:
        """What every worker steers (worker.Steered.report)."""
        found: list[dict[str, Any]] = self._ask("moesteer_report")
        return found

    # ---- generation

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 128,
        rows: Sequence[int] | None = None,
        title: str | None = None,
    ) -> list[Generation]:
        """Greedy responses, in the order given; as backends.hf.Model.generate."""
        encoded = [self.encode(messages) for messages in conversations]
        for messages, one in zip(conversations, encoded, strict=True):
            self.require_room(messages, one, max_new_tokens=max_new_tokens)
        return self.generate_encoded(encoded, max_new_tokens=max_new_tokens, rows=rows, title=title)

    def generate_encoded(
        self,
        encoded: Sequence[Encoded],
        *,
        max_new_tokens: int,
        rows: Sequence[int] | None = None,
        title: str | None = None,
    ) -> list[Generation]:
        """Greedy responses to prompts that are tokens already."""
        acting = self._acting(len(encoded), rows)
        done: list[Generation] = []
        with Progress(title or "", total=len(encoded), unit="replies", shown=title is not None) as progress:
            for start in range(0, len(encoded), CHUNK):
                part, wanted = encoded[start : start + CHUNK], acting[start : start + CHUNK]
                chosen = self._rows(part, wanted)
                self._check_gates(wanted, chosen)
                outputs = self._run(part, [Ticket(row.name) for row in chosen], max_new_tokens=max_new_tokens)
                done += [self._generation(output.outputs[0]) for output in outputs]
                if self._receipt is not None:
                    self._receipt.positions += sum(
                        len(one.token_ids) + len(output.outputs[0].token_ids) - 1
                        for one, output, members in zip(part, outputs, wanted, strict=True)
                        if members
                    )
                progress.advance(len(part))
        self._count()
        return done

    def _generation(self, made: Any) -> Generation:
        ids = list(made.token_ids)
        stop = next((i for i, token in enumerate(ids) if token in self._stops), None)
        kept = ids if stop is None else ids[:stop]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(text.strip(), tuple(kept), stop is not None)

    def _run(self, prompts: Sequence[Encoded], wanted: Sequence[Ticket], *, max_new_tokens: int) -> list[Any]:
        from vllm import SamplingParams

        with tickets(wanted) as extras:
            params = [
                SamplingParams(
                    temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=self._stops, detokenize=False,
                    ignore_eos=True, extra_args=extra, skip_reading_prefix_cache=ticket.reading is not None,
                )
                for extra, ticket in zip(extras, wanted, strict=True)
            ]  # fmt: skip
            given: Any = [{"prompt_token_ids": list(one.token_ids)} for one in prompts]
            try:
                found: list[Any] = self.engine.generate(given, params, use_tqdm=False)
            except Exception as error:
                why = self._output.explained(error)
                if isinstance(why, MoesteerError):
                    raise why from error
                raise ModelError(
                    f"the engine stopped: {why}",
                    where=self.name,
                    expected="an answer to every request",
                    do="VLLM_LOGGING_LEVEL=INFO shows all that vLLM prints",
                ) from error
        failed = [one for one in found if one.outputs[0].finish_reason not in ("stop", "length")]
        if failed or len(found) != len(prompts):
            reason = failed[0].outputs[0].finish_reason if failed else "lost"
            raise ModelError(
                f"the engine left {len(failed) or len(prompts) - len(found)} of {len(prompts)} requests ({reason})",
                where=self.name,
                expected="an answer to every request",
                do="VLLM_LOGGING_LEVEL=INFO shows all that vLLM prints",
            )
        return found

    def _acting(self, count: int, rows: Sequence[int] | None) -> list[tuple[Member, ...]]:
        """The members wanted on each conversation, gates not asked yet."""
        known = len(self.masks) if self._receipt is not None else 0
        if rows is not None and (len(rows) != count or not all(0 <= row <= known for row in rows)):
            raise InputError(
                f"rows do not say which mask steers which conversation: {list(rows)[:20]}",
                where=f"{count} conversations, {known} masks applied",
                expected="for each conversation 0 (none) or the number of a mask, from 1",
                do="correct the rows",
            )
        if self._receipt is None:
            return [()] * count
        if self._together and rows is not None and known > 1:
            raise InputError(
                "the engine was started with all masks together",
                where=self.name,
                expected="masks to be told apart by row",
                do="load the model with together=False",
            )
        if self._together:
            every = self.catalogue.pins
            return [every if rows is None or row else () for row in (rows or [1] * count)]
        if rows is None and known > 1:
            raise InputError(
                "nothing says which conversation takes which mask",
                where=self.name,
                expected="rows given with the conversations",
                do="call model.generate(..., rows=[...]), or load the model with together=True",
            )
        named = self.catalogue.named
        return [(named[str(row)],) if str(row) in named else () for row in (rows or [1] * count)]

    def _rows(self, prompts: Sequence[Encoded], acting: Sequence[tuple[Member, ...]]) -> list[Row]:
        """The rows of these requests, gates asked."""
        asked = [i for i, members in enumerate(acting) if needs_gate(members)]
        rows = [self.catalogue.row(members) if i not in set(asked) else None for i, members in enumerate(acting)]
        if asked:
            wanted = []
            for i in asked:
                turn = prompts[i].spans.get("final_turn")
                wanted.append(probe(prompt=len(prompts[i].token_ids), final_turn=None if turn is None else turn[0]))
            self._run([prompts[i] for i in asked], wanted, max_new_tokens=1)
            names = [ticket.reading.name for ticket in wanted if ticket.reading is not None]
            by_rank = self._ask("moesteer_scores", names)[:: self._tensor_ranks]
            for number, (i, ticket) in enumerate(zip(asked, wanted, strict=True)):
                sums = [found[number] for found in by_rank]
                rows[i] = decided(self.catalogue, acting[i], sums, ticket=ticket)
        return [row for row in rows if row is not None]

    # ---- steering

    @contextmanager
    def steered(
        self,
        masks: Sequence[SteeringMask],
        *,
        alphas: Sequence[float | None] | None = None,
        together: bool = False,
        allow_other_checkpoint: bool = False,
        allow_empty: bool = False,
    ) -> Iterator[Receipt]:
        """Steer inside the block, with the masks and strengths that the engine was started with and no others.

        As backends.hf.Model.steered. Raises InputError for other masks, AlreadySteeredError.
        """
        mine = [(mask.sha256, mask.info.alpha if a is None else a) for mask, a in self._pairs(masks, alphas)]
        have = [(m.mask.sha256, m.alpha) for m in self.catalogue.members]
        if [pair for pair in mine if pair[1] != 0] != have or (not together and len(masks) > 1 and self.catalogue.pins):
            raise InputError(
                "the engine was started with other masks, strengths or another way to combine them",
                where=f"{self.name}: {len(masks)} masks asked for, {len(have)} at hand",
                expected="the masks, alphas and `together` that the model was loaded with",
                do="load the model with these",
            )
        if self._receipt is not None:
            raise AlreadySteeredError(
                "the model is already steered",
                where=self.name,
                expected="one steering at a time",
                do="leave the first block",
            )
        labels = tuple(sha[:12] for sha, _ in mine)
        self._receipt = Receipt(len(self.fingerprint.layer_ids), labels, tuple(alpha for _, alpha in mine))
        self._together = bool(self.catalogue.pins) or (len(masks) <= 1 and not self.catalogue.named)
        self._ask("moesteer_reset")
        try:
            yield self._receipt
        finally:
            self._receipt = None

    def _pairs(
        self, masks: Sequence[SteeringMask], alphas: Sequence[float | None] | None
    ) -> list[tuple[SteeringMask, float | None]]:
        strengths = [None] * len(masks) if alphas is None else list(alphas)
        require_strengths(masks, strengths)
        return list(zip(masks, strengths, strict=True))

    def _check_gates(self, acting: Sequence[tuple[Member, ...]], rows: Sequence[Row]) -> None:
        if self._receipt is None:
            return
        for members, row in zip(acting, rows, strict=True):
            gated = [member for member in members if member.mask.gated]
            self._receipt.gated += len(gated)
            self._receipt.fired += sum(member in row.members for member in gated)
            self._receipt.acted |= bool(row.members)

    def _count(self) -> None:
        """Selections that steering changed, as the workers counted them; and forces that were not followed."""
        if self._receipt is None:
            return
        reports = self.reports()[:: self._tensor_ranks]
        self._receipt.checked = sum(report["checked"] for report in reports)
        self._receipt.changed = sum(report["changed"] for report in reports)
        wrong = sum(report["wrong"] for report in reports)
        if wrong:
            raise NoEffectError(
                f"{wrong} of {sum(report['forced'] for report in reports)} forced selections were not followed",
                where=f"{self.name}, in vLLM",
                expected="every forced expert selected, or left out, for every token",
                do="report this, with the model and vLLM's version; --backend hf forces by rank",
            )

    # ---- capture

    def router_outputs(
        self, batch: Sequence[Encoded], places: Sequence[Sequence[int]], *, logits: bool
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.int64]]:
        """(logits [n, L, E] or None, selected [n, L, K]) of the wanted positions; as backends.hf.Model."""
        if self.capture is None or (logits and self.capture != "logits"):
            raise InputError(
                "the engine keeps no router logits" if logits else "the engine keeps no selections",
                where=self.name,
                expected="a model loaded to be captured from",
                do='load it with capture="logits"',
            )
        rows = self._rows(batch, self._acting(len(batch), None))
        wanted = []
        for number, (one, columns, row) in enumerate(zip(batch, places, rows, strict=True)):
            spans = _as_spans(sorted(set(columns)))
            wanted.append(Ticket(row.name, Reading(f"{number}", len(one.token_ids), spans=spans)))
        self._run(batch, wanted, max_new_tokens=1)
        parts = [load_tensors(data) for data in self._ask("moesteer_trace", [str(i) for i in range(len(batch))])][
            :: self._tensor_ranks
        ]

        def joined(kind: str) -> NDArray[Any]:
            """Of all sequences, the positions in the order asked for; layers of pipeline ranks put together."""
            found = []
            for number, columns in enumerate(places):
                whole = np.concatenate([part[f"{number}.{kind}"] for part in parts], axis=1)
                found.append(whole[np.searchsorted(sorted(set(columns)), columns)])
            return np.concatenate(found)

        return joined("logits") if logits else None, joined("selected").astype(np.int64)

    # ---- the workers

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return self.engine.collective_rpc(method, args=arguments)
        except Exception as error:
            found = self._output.explained(error)
            if isinstance(found, MoesteerError):
                raise found from error
            raise NoEffectError(
                f"the engine's workers do not answer: {found}",
                where=f"{self.name}: {method}",
                expected="the plug-in at work in every worker",
                do="check that MOESTEER_VLLM is not 0 and that VLLM_PLUGINS, if set, names moesteer",
            ) from error

    def _require_workers(self) -> None:
        reports = self.reports()
        found = sorted({layer for report in reports for layer in report["layer_ids"] if report["patched"]})
        agree = all(r["catalogue"] == self.catalogue.sha256 and r["intact"] for r in reports)
        if tuple(found) != self.fingerprint.layer_ids or not agree:
            raise NoEffectError(
                f"{len(found)} of {len(self.fingerprint.layer_ids)} routers are steered, or by other masks",
                where=f"{self.name}, {len(reports)} workers",
                expected="every router, in every worker, by the masks given",
                do="report this, with the model and vLLM's version",
            )


def _as_spans(columns: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Positions as half-open ranges, in the order given."""
    spans: list[list[int]] = []
    for column in columns:
        if spans and spans[-1][1] == column:
            spans[-1][1] += 1
        else:
            spans.append([column, column + 1])
    return tuple((start, end) for start, end in spans)

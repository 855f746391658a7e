"""The model of the page and what is asked of it: answers side by side, and the routing of an answer.

One thing at a time: what finds the model at work is told so. A conversation has two sides, without and with the masks,
and each goes on with its own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from threading import Lock, Thread
from typing import Literal

import numpy as np

from moesteer.backends.chat import Encoded
from moesteer.backends.gating import decide
from moesteer.backends.hf import Model
from moesteer.backends.loading import load
from moesteer.conversations import Message
from moesteer.errors import InputError, MoesteerError
from moesteer.mask import SteeringMask
from moesteer.models.steering import Receipt
from moesteer.ui.catalogue import Catalogue
from moesteer.ui.routing_view import Routing
from moesteer.ui.watching import Stopped, Watch

Side = Literal["without", "with"]
LOOK_S = 0.1
"""How often an answer is looked at while it is written."""
LONGEST_QUESTION = 20_000
"""Characters."""
MOST_TIMES = 4.0
"""The strength slider's end: times each mask's own strength."""


@dataclass(frozen=True)
class Settings:
    """What to answer with. masks: names of the catalogue; times: of each mask's own strength; longest: in tokens."""

    masks: tuple[str, ...] = ()
    times: float = 1.0
    longest: int = 128


@dataclass(frozen=True)
class Turn:
    """A question and its answers. with_masks is None where no mask was chosen; notes are sentences about it.

    without_ids, with_ids: the tokens of the answers, end marks left out.
    """

    question: str
    without: str = ""
    with_masks: str | None = None
    without_ids: tuple[int, ...] = ()
    with_ids: tuple[int, ...] = ()
    settings: Settings = field(default_factory=Settings)
    notes: tuple[str, ...] = ()


@dataclass
class _Job:
    """A turn that is being answered, by a thread of its own."""

    turn: Turn
    watch: Watch = field(default_factory=Watch)
    side: Side = "without"
    error: BaseException | None = None


class Session:
    """loader: loads a model by name (default: backends.loading.load). Raises what it raises."""

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        allow_other_checkpoint: bool = False,
        loader: Callable[[str], Model] = load,
    ) -> None:
        self.catalogue, self.allow_other_checkpoint = catalogue, allow_other_checkpoint
        self._loader = loader
        self._busy = Lock()
        self._model: Model | None = None
        self._job: _Job | None = None

    @property
    def model(self) -> Model:
        """The model in use. Raises InputError before there is one."""
        if self._model is None:
            raise InputError(
                "no model is loaded", where="moesteer ui", expected="a model to ask", do="choose one of the list"
            )
        return self._model

    def use(self, name: str) -> Model:
        """Load a model of the catalogue, for the one before. Raises InputError, UnknownNameError, ModelError."""
        wanted = self.catalogue.model(name)
        if self._model is not None and self._model.name == wanted:
            return self._model
        self._take()
        try:
            self._model = None  # two would need the memory of both
            self._model = self._loader(wanted)
        finally:
            self._busy.release()
        return self._model

    def about(self) -> str:
        """The model in use, in a sentence. Raises InputError before there is one."""
        model = self.model
        found = model.fingerprint
        return (
            f"{model.name}: {len(found.layer_ids)} layers with routers, {found.experts} experts each, "
            f"{found.top_k} selected per token"
        )

    def _take(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise InputError(
                "the model is at work",
                where="moesteer ui",
                expected="one question at a time",
                do="wait until it has answered, or stop it",
            )

    def stop(self) -> None:
        """End the answer that is being written, if there is one; what there is of it stays."""
        job = self._job
        if job is not None:
            job.watch.stop()

    # ---- answers

    def ask(self, before: Sequence[Turn], question: str, settings: Settings) -> Iterator[Turn]:
        """The turn as it grows, and at last whole. before: the turns so far.

        Raises InputError (nothing asked, too long, at work), UnknownNameError, MaskError, DataError, NumericsError.
        """
        self._require_question(question, settings)
        model = self.model
        masks = self.catalogue.load_masks(settings.masks)
        self._take()
        job = _Job(Turn(question=question.strip(), settings=settings))
        thread = Thread(target=self._answer, args=(model, job, tuple(before), masks), daemon=True)
        try:
            self._job = job
            thread.start()
        except BaseException:
            self._busy.release()
            raise
        try:
            while thread.is_alive():
                thread.join(LOOK_S)
                if thread.is_alive():
                    yield self._so_far(model, job)
        finally:
            job.watch.stop()  # nobody looks any more
            thread.join()
        if job.error is not None:
            raise job.error
        yield job.turn

    def _require_question(self, question: str, settings: Settings) -> None:
        wrong = None
        if not question.strip():
            wrong = "nothing is asked"
        elif len(question) > LONGEST_QUESTION:
            wrong = f"the question has {len(question):,} characters"
        elif not 0 <= settings.times <= MOST_TIMES:
            wrong = f"the strength cannot be {settings.times:g} times that of the masks"
        elif not 1 <= settings.longest <= 4096:
            wrong = f"an answer cannot have {settings.longest} tokens at most"
        if wrong is not None:
            raise InputError(
                wrong,
                where="moesteer ui",
                expected=f"a question of at most {LONGEST_QUESTION:,} characters, a strength of 0 to {MOST_TIMES:g} "
                "times, answers of 1 to 4096 tokens",
                do="correct it and ask again",
            )

    def _so_far(self, model: Model, job: _Job) -> Turn:
        ids = tuple(job.watch.token_ids)
        written = str(model.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        if job.side == "without":
            return replace(job.turn, without=written, without_ids=ids)
        return replace(job.turn, with_masks=written, with_ids=ids)

    def _answer(self, model: Model, job: _Job, before: tuple[Turn, ...], masks: list[SteeringMask]) -> None:
        """In the thread: both answers, into job.turn; an error into job.error. Gives the model back at the end."""
        try:
            self._without(model, job, before)
            if masks:
                job.turn = replace(job.turn, with_masks="")
                self._with(model, job, before, masks)
        except Stopped:
            job.turn = replace(self._so_far(model, job), notes=(*job.turn.notes, "stopped before its end"))
        except Exception as error:  # noqa: BLE001  raised again in the thread that asked
            job.error = error
        finally:
            self._job = None
            self._busy.release()

    def _without(self, model: Model, job: _Job, before: tuple[Turn, ...]) -> None:
        with job.watch.on(model.hf):
            messages = conversation(before, job.turn.question, side="without")
            made = model.generate([messages], max_new_tokens=job.turn.settings.longest)[0]
        notes = () if made.finished else ("without the masks, cut at the longest answer",)
        job.turn = replace(job.turn, without=made.text, without_ids=made.token_ids, notes=notes)

    def _with(self, model: Model, job: _Job, before: tuple[Turn, ...], masks: list[SteeringMask]) -> None:
        settings = job.turn.settings
        messages = conversation(before, job.turn.question, side="with")
        job.side = "with"
        with (
            model.steered(
                masks, alphas=strengths(masks, settings.times), together=True,
                allow_other_checkpoint=self.allow_other_checkpoint,
            ) as receipt,
            job.watch.on(model.hf),
        ):  # fmt: skip
            made = model.generate([messages], max_new_tokens=settings.longest)[0]
        cut = () if made.finished else ("with the masks, cut at the longest answer",)
        notes = (*job.turn.notes, *cut, effect(receipt))
        job.turn = replace(job.turn, with_masks=made.text, with_ids=made.token_ids, notes=notes)

    # ---- routing

    def routing(self, turns: Sequence[Turn], *, side: Side) -> Routing:
        """Which experts the last question and one side's answer to it go to, without the masks and with them.

        The same text is read twice, so that only the masks differ. Raises InputError (nothing asked yet, at work),
        and what `ask` raises.
        """
        if not turns:
            raise InputError(
                "there is no answer yet", where="moesteer ui", expected="a question asked", do="ask something first"
            )
        model, last = self.model, turns[-1]
        masks = self.catalogue.load_masks(last.settings.masks)
        answer = last.with_ids if side == "with" and last.with_masks is not None else last.without_ids
        self._take()
        try:
            messages = conversation(turns[:-1], last.question, side=side)
            return self._routed(model, messages, answer, masks, last.settings.times)
        finally:
            self._busy.release()

    def _routed(
        self,
        model: Model,
        messages: list[Message],
        answer: tuple[int, ...],
        masks: list[SteeringMask],
        times: float,
    ) -> Routing:
        asked = model.encode(messages)
        encoded = Encoded((*asked.token_ids, *answer), asked.spans)  # its tokens, not those its text would be cut into
        start, begin = asked.spans["final_turn"][0], len(asked.token_ids)
        places = [list(range(start, len(encoded.token_ids)))]
        _, plain_TLK = model.router_outputs([encoded], places, logits=False)
        allowed = decide(model, [encoded], masks)[0] if masks else np.zeros(0, dtype=bool)
        acting = [
            (mask.with_gate(None, None), alpha)  # the gates have decided
            for mask, alpha, acts in zip(masks, strengths(masks, times), allowed, strict=True)
            if acts
        ]
        steered = nullcontext() if not acting else model.steered(
            [mask for mask, _ in acting], alphas=[alpha for _, alpha in acting], together=True,
            allow_other_checkpoint=self.allow_other_checkpoint,
        )  # fmt: skip
        with steered:
            _, steered_TLK = model.router_outputs([encoded], places, logits=False)
        return Routing(
            layer_ids=tuple(router.layer_id for router in model.routers),
            experts=model.fingerprint.experts,
            tokens=tuple(str(model.tokenizer.decode([token])) for token in encoded.token_ids[start:]),
            asked=begin - start,
            without_TLK=plain_TLK,
            with_TLK=steered_TLK if masks else None,
            gates_shut=len(masks) - len(acting),
        )


def conversation(turns: Sequence[Turn], question: str, *, side: Side) -> list[Message]:
    """The messages up to a question, with the answers of one side; turns without masks are the same on both."""
    messages: list[Message] = []
    for turn in turns:
        said = turn.with_masks if side == "with" and turn.with_masks is not None else turn.without
        messages += [Message("user", turn.question), Message("assistant", said)]
    return [*messages, Message("user", question.strip())]


def strengths(masks: Sequence[SteeringMask], times: float) -> list[float]:
    """Each mask's own strength, so many times."""
    return [mask.info.alpha * times for mask in masks]


def effect(receipt: Receipt) -> str:
    """What steering did, in a sentence."""
    if receipt.gated and not receipt.fired:
        return "the gate stayed shut: both answers are the model's own"
    if receipt.did_nothing:
        return f"the masks changed none of {receipt.checked} selections: raise the strength, or take another mask"
    return str(receipt)


def told(error: MoesteerError) -> tuple[tuple[str, str], ...]:
    """An error's four parts, named."""
    return ("what", error.what), ("where", error.where), ("expected", error.expected), ("do", error.do)

"""Steered models as Inspect sees them: answers, logs, caches, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="the extra `inspect` is not installed")

import anyio
from inspect_ai import Task
from inspect_ai import eval as run
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    Model,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from inspect_ai.tool import ToolInfo

from moesteer.backends import hf
from moesteer.backends.chat import Generation
from moesteer.conversations import Message
from moesteer.errors import DataError, InputError, MaskMismatchError, NoEffectError, UnknownNameError
from moesteer.harness import answering
from moesteer.mask import SteeringMask
from tests.harness.conftest import TEXTS

Files = dict[str, str]
LONGEST = 12


@pytest.fixture(autouse=True, scope="module")
def loaded_once(lab_tiny: hf.Model) -> Iterator[None]:
    """Every provider of this file takes the model that the tests have; steering leaves it as it was."""
    from moesteer.backends import loading

    before = loading.load
    loading.load = lambda *args, **kwargs: lab_tiny  # type: ignore[assignment]
    yield
    loading.load = before


def provider(**args: Any) -> Model:
    """A provider of its own, by the entry point."""
    return get_model("moesteer/lab-tiny", memoize=False, **args)


def ask(
    model: Model, *inputs: Any, config: GenerateConfig | None = None, cache: bool = False, **more: Any
) -> list[Any]:
    """Outputs for all inputs, asked at the same time."""
    found: dict[int, Any] = {}

    async def one(i: int) -> None:
        settings = config or GenerateConfig(max_tokens=LONGEST)
        found[i] = await model.generate(inputs[i], config=settings, cache=cache, **more)

    async def all_() -> None:
        async with anyio.create_task_group() as group:
            for i in range(len(inputs)):
                group.start_soon(one, i)

    anyio.run(all_)
    return [found[i] for i in range(len(inputs))]


def truth(model: hf.Model, masks: list[SteeringMask], alphas: list[float]) -> list[hf.Generation]:
    """What moesteer itself generates for TEXTS."""
    talks = [[Message("user", text)] for text in TEXTS]
    if not masks:
        return model.generate(talks, max_new_tokens=LONGEST)
    with model.steered(masks, alphas=alphas, together=True):
        return model.generate(talks, max_new_tokens=LONGEST)


CASES: dict[str, tuple[dict[str, str], dict[str, Any], list[float]]] = {
    "unsteered": ({}, {}, []),
    "one mask": ({"mask": "low"}, {"alpha": 0.5}, [0.5]),
    "two masks": ({"pin": "low", "mask": "high"}, {"alpha": "0.5"}, [1.0, 0.5]),
    "behind a gate": ({"mask": "gated"}, {}, [1.0]),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_backend(
    case: str, lab_tiny: hf.Model, masks: Files, made: dict[str, SteeringMask]
) -> None:
    named, more, alphas = CASES[case]
    model = provider(**{name: masks[file] for name, file in named.items()}, **more)
    outputs = ask(model, *TEXTS)
    model.api.close()
    wanted = truth(lab_tiny, [made[file] for file in named.values()], alphas)
    assert [o.completion for o in outputs] == [one.text for one in wanted]
    for output, one, text in zip(outputs, wanted, TEXTS, strict=True):
        assert output.stop_reason == ("stop" if one.finished else "max_tokens")
        assert output.usage.output_tokens == len(one.token_ids) + one.finished
        assert output.usage.input_tokens == len(lab_tiny.encode([Message("user", text)]).token_ids)
        told = output.metadata["moesteer"]
        assert told["mask_sha256"] == [made[file].sha256 for file in named.values()] and told["alphas"] == alphas
        assert told["pinned"] == ("pin" in named) and told["batch"] == len(TEXTS)  # asked together, answered together
        if case == "behind a gate":
            assert (told["receipt"]["gated"], told["receipt"]["fired"]) == (4, 2)
        elif named:
            assert told["receipt"]["changed"] > 0
        else:
            assert told["receipt"] == {}
    assert lab_tiny.mask_sha256 == ()  # and the model is itself again


def test_masks_change_answers(lab_tiny: hf.Model, made: dict[str, SteeringMask]) -> None:
    """Or the cases above would compare like with like."""
    plain = [one.text for one in truth(lab_tiny, [], [])]
    low = [one.text for one in truth(lab_tiny, [made["low"]], [0.5])]
    gated = [one.text for one in truth(lab_tiny, [made["gated"]], [1.0])]
    assert plain != low and plain != gated and gated != [o.text for o in truth(lab_tiny, [made["low"]], [1.0])]


def test_the_log_says_what_steered_and_a_log_s_name_gives_the_same_model_again(
    masks: Files, made: dict[str, SteeringMask]
) -> None:
    task = Task([Sample(id=1, input=TEXTS[0], target="x")], solver=generate(), scorer=includes(), name="one")
    args = {"mask": masks["low"], "alpha": 0.5}
    log = run(task, model="moesteer/lab-tiny", model_args=args, max_tokens=LONGEST)[0]
    assert log.status == "success", log.error
    again: EvalLog = read_eval_log(log.location)
    name = f"moesteer/lab-tiny+{made['low'].sha256[:12]}@0.5"
    assert again.eval.model == name and again.eval.model_args == args and again.eval.model_base_url is None
    output = again.samples[0].output
    assert output.metadata["moesteer"]["mask_sha256"] == [made["low"].sha256]
    assert output.metadata["moesteer"]["receipt"]["changed"] > 0
    # as eval-retry does: the log's name, with the log's arguments
    model = get_model(again.eval.model, memoize=False, **again.eval.model_args)
    assert str(model) == name and model.canonical_name() == "lab-tiny"
    with pytest.raises(MaskMismatchError, match="the masks given are"):
        get_model(again.eval.model, memoize=False, mask=masks["low"], alpha=0.25)
    with pytest.raises(MaskMismatchError, match="none"):
        get_model(again.eval.model, memoize=False)


def test_no_cached_answer_is_taken_for_other_masks(masks: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsteered answers are cached, then every other steering asks anew; the same one does not."""
    asked: list[str] = []
    real = answering.SteeredModel._answer

    def counted(self: answering.SteeredModel, requests: Any) -> Any:
        asked.extend([self.steering.label] * len(requests))
        return real(self, requests)

    monkeypatch.setattr(answering.SteeredModel, "_answer", counted)
    variants: list[dict[str, Any]] = [
        {}, {"mask": masks["low"]}, {"mask": masks["low"], "alpha": 0.5}, {"mask": masks["high"]},
        {"mask": masks["gated"]}, {"pin": masks["low"]}, {"mask": f"{masks['low']};{masks['high']}"},
    ]  # fmt: skip
    first = [[o.completion for o in ask(provider(**v), *TEXTS, cache=True)] for v in variants]
    assert len(asked) == len(variants) * len(TEXTS)  # nobody took another's answer
    asked.clear()
    second = [[o.completion for o in ask(provider(**v), *TEXTS, cache=True)] for v in variants]
    assert second == first and asked == []  # each took its own
    assert first[0] != first[1] != first[2]


def test_other_weights_and_settings_are_another_address(masks: Files, lab_tiny: hf.Model) -> None:
    """The cache's key holds the address, which says more than the name can."""
    before = provider(mask=masks["low"]).api.base_url
    weight = next(lab_tiny.hf.parameters())
    kept = weight.data.clone()
    lab_tiny.__dict__.pop("weights_sketch", None)
    try:
        weight.data += 1.0
        other = provider(mask=masks["low"]).api.base_url
    finally:
        weight.data.copy_(kept)
        lab_tiny.__dict__.pop("weights_sketch", None)
    assert before.startswith("moesteer:") and other != before
    assert provider(mask=masks["low"]).api.base_url == before


def test_roles_limits_and_stop_sequences(lab_tiny: hf.Model) -> None:
    model = provider()
    talk = [ChatMessageSystem(content="be brief ."), ChatMessageUser(content=TEXTS[3])]
    more = [*talk, ChatMessageAssistant(content="hello ."), ChatMessageUser(content=TEXTS[0])]
    outputs = ask(model, talk, more)
    as_ours = [[Message(m.role, m.text) for m in messages] for messages in (talk, more)]
    assert [o.completion for o in outputs] == [g.text for g in lab_tiny.generate(as_ours, max_new_tokens=LONGEST)]
    (whole,) = ask(model, TEXTS[0])
    word = whole.completion.split()[1]
    config = GenerateConfig(max_tokens=LONGEST, stop_seqs=["not there", f" {word}"], temperature=0, top_p=1, seed=7)
    (cut,) = ask(model, TEXTS[0], config=config)
    assert cut.completion == whole.completion.split(f" {word}")[0] and cut.stop_reason == "stop"
    (short,) = ask(model, TEXTS[0], config=GenerateConfig(max_tokens=1))
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 1)
    (free,) = ask(model, TEXTS[0], config=GenerateConfig())  # no limit said: the model ends it itself
    assert free.stop_reason == "stop"


def test_reasoning_is_kept_apart_from_the_answer(lab_tiny: hf.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `moesteer evaluate` has it: the answer alone is judged, and stays in the context."""
    seen: list[list[Message]] = []
    texts = iter(["<think>let me see</think>\n\nuse a brush .", "<think>never ends", "plain ."])

    def generates(conversations: Any, **more: Any) -> list[Generation]:
        seen.extend(conversations)
        return [Generation(next(texts), (9, 9), True) for _ in conversations]

    monkeypatch.setattr(lab_tiny, "generate", generates)
    model = provider()
    (thought,) = ask(model, TEXTS[0])
    assert thought.completion == "use a brush ."
    assert [part.type for part in thought.message.content] == ["reasoning", "text"]
    assert thought.message.content[0].reasoning.strip() == "<think>let me see</think>"
    history = [ChatMessageUser(content=TEXTS[0]), thought.message, ChatMessageUser(content="hello")]
    (cut,) = ask(model, history)
    assert [m.content for m in seen[1]] == [TEXTS[0], "use a brush .", "hello"]
    assert cut.completion == "" and cut.message.content[0].reasoning == "<think>never ends"
    (plain,) = ask(model, TEXTS[0])
    assert plain.message.content == "plain ."
    with pytest.raises(UnknownNameError, match="no form of reasoning"):
        provider(reasoning="flumox")


def test_one_prompt_that_does_not_fit_is_its_own_fault() -> None:
    model = provider()
    future = [
        model.api.steered.ask(answering.Request((Message("user", text),), 8)) for text in ("clay " * 600, "hello")
    ]
    with pytest.raises(DataError, match="longer than the model's context"):
        future[0].result(30)
    assert future[1].result(30).text
    ends = model.api.steered.ask(answering.Request((Message("assistant", "hello"),), 8))
    with pytest.raises(DataError, match="does not end in a user's message"):
        ends.result(30)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"temperature": 0.7}, "temperature = 0.7"), ({"top_p": 0.9}, "top_p"), ({"num_choices": 2}, "num_choices"),
        ({"logprobs": True}, "logprobs"), ({"batch": True}, "-M batch=N"), ({"extra_body": {"a": 1}}, "extra_body"),
    ],
)  # fmt: skip
def test_settings_that_are_not_greedy_are_refused_before_anything_runs(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match="not followed here") as caught:
        provider(config=GenerateConfig(**setting))
    assert said in str(caught.value)
    with pytest.raises(BaseException) as late:  # a group of one: a task's own setting
        ask(provider(), TEXTS[0], config=GenerateConfig(**setting))
    assert isinstance(late.value.exceptions[0], InputError)


def test_tools_pictures_and_servers_are_refused(masks: Files) -> None:
    model = provider()
    call = ToolInfo(name="look", description="looks")
    picture = ContentImage(image="data:image/png;base64,AAAA")
    for messages, more in (
        ([ChatMessageUser(content="hello")], {"tools": [call]}),
        ([ChatMessageUser(content="hello"), ChatMessageTool(content="42", tool_call_id="1")], {}),
        ([ChatMessageUser(content=[picture])], {}),
    ):
        with pytest.raises(BaseException) as caught:
            ask(model, messages, **more)
        assert isinstance(caught.value.exceptions[0], InputError), caught.value.exceptions
    with pytest.raises(InputError, match="has no base URL"):
        provider(base_url="http://localhost:1")
    with pytest.raises(InputError, match="a batch of 0"):
        provider(batch=0)


def test_a_mask_that_does_nothing_fails_the_sample(masks: Files) -> None:
    with pytest.raises(BaseException) as caught:
        ask(provider(mask=masks["weak"]), TEXTS[0])
    assert isinstance(caught.value.exceptions[0], NoEffectError)


def test_it_answers_in_trio_too(masks: Files) -> None:
    pytest.importorskip("trio")
    model = provider(mask=masks["low"])
    wanted = [o.completion for o in ask(model, *TEXTS)]
    found: list[str] = []

    async def main() -> None:
        from moesteer.harness.awaiting import awaited

        for text in TEXTS:
            request = answering.Request((Message("user", text),), LONGEST)
            found.append((await awaited(model.api.steered.ask(request))).text)

    anyio.run(main, backend="trio")
    assert found == wanted

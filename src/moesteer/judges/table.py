"""The guard models that can judge: one row each. What is asked, how the answer is read, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from moesteer.judges import prompts, reading
from moesteer.judges.reading import Opinion

Output = Literal["text", "yes-no", "grade"]


@dataclass(frozen=True)
class GuardModel:
    """A family of guard models.

    kind: its name in scenario files. model: the Hub id used unless a scenario names another of the family. template:
    the published prompt, used where the tokenizer has no chat template (own_template: used even so); None: the chat
    template is the only one published. output: generated text, the probabilities of Yes and No, or of the grades 1 to
    5. new_tokens: how long its answer may be. special: whether tokenizing adds the model's own begin token.
    response_tokens: the most of a response it was trained and published with; more is cut off.
    delimiters: what separates the parts of the prompt: broken up where the judged text holds it.
    judges: what it looks for, for people; faults: what is known to be wrong with it. rates_refusals: it rates refusals
    that name the topic as harmful (asking.of_opinion).
    """

    kind: str
    title: str
    model: str
    architecture: str
    licence: str
    citation: str
    judges: str
    reads: str
    faults: str
    output: Output
    new_tokens: int
    template: str | None = None
    own_template: bool = False
    parse: Callable[[str], Opinion | None] | None = None
    special: bool = False
    response_tokens: int | None = None
    delimiters: tuple[str, ...] = ()
    sees_refusals: bool = False
    rates_refusals: bool = False


_LLAMA_GUARD_FAULTS = "rates refusals that name the topic as unsafe, so a short reply that only refuses is refused here"
_ROWS = (
    GuardModel(
        kind="llama-guard-3", title="Llama Guard 3", model="meta-llama/Llama-Guard-3-8B", architecture="llama",
        licence="Llama 3.1 Community License", citation="arXiv 2407.21783", judges="response harmful, by category",
        reads="safe, or unsafe and S1 to S14", faults=_LLAMA_GUARD_FAULTS, output="text", new_tokens=24,
        parse=reading.llama_guard, delimiters=("<END CONVERSATION>", "<BEGIN CONVERSATION>"), rates_refusals=True,
    ),
    GuardModel(
        kind="llama-guard-4", title="Llama Guard 4", model="meta-llama/Llama-Guard-4-12B", architecture="llama4",
        licence="Llama 4 Community License", citation="llama.com/docs, Llama Guard 4 (2025)",
        judges="response harmful, by category", reads="safe, or unsafe and S1 to S14",
        faults=_LLAMA_GUARD_FAULTS + "; weaker in languages other than English; judged here on text alone",
        output="text", new_tokens=24, parse=reading.llama_guard,
        delimiters=("<END CONVERSATION>", "<BEGIN CONVERSATION>"), rates_refusals=True,
    ),
    GuardModel(
        kind="wildguard", title="WildGuard", model="allenai/wildguard", architecture="mistral", licence="Apache-2.0",
        citation="arXiv 2406.18495", judges="response harmful; refusal", reads="three lines of yes or no",
        faults="English only; no categories; trained on single turns",
        output="text", new_tokens=32, template=prompts.WILDGUARD, own_template=True, parse=reading.wildguard,
        delimiters=("[/INST]", "[INST]", "<|assistant|>", "<|user|>", "\n---\n"), sees_refusals=True,
    ),
    GuardModel(
        kind="granite-guardian", title="Granite Guardian 3", model="ibm-granite/granite-guardian-3.2-5b",
        architecture="granite (granitemoe: 3.2-3b-a800m)", licence="Apache-2.0", citation="arXiv 2412.07724",
        judges="response harmful, one risk at a time", reads="Yes or No (3.2: and confidence; 3.3: <score>)",
        faults="one risk for each question; the form of its answer changes from version to version",
        output="text", new_tokens=24, parse=reading.granite_guardian,
        delimiters=("<end_of_turn>", "<start_of_turn>", "<end_of_conversation>", "<start_of_conversation>"),
    ),
    GuardModel(
        kind="shieldgemma", title="ShieldGemma", model="google/shieldgemma-9b", architecture="gemma2",
        licence="Gemma Terms of Use", citation="arXiv 2407.21772", judges="response harmful, by four guidelines",
        reads="probabilities of Yes and No",
        faults="one question for each guideline; sensitive to the guideline's wording; narrow: four kinds of harm only",
        output="yes-no", new_tokens=1, template=prompts.SHIELDGEMMA, special=True,
        delimiters=("<end_of_turn>", "<start_of_turn>", "\n===\n"),
    ),
    GuardModel(
        kind="harmbench", title="HarmBench classifier", model="cais/HarmBench-Llama-2-13b-cls", architecture="llama",
        licence="MIT", citation="arXiv 2402.04249", judges="response is an instance of the behaviour asked for",
        reads="yes or no", faults="wants the behaviour in one sentence; sees the first 512 tokens of a response",
        output="text", new_tokens=2, template=prompts.HARMBENCH, own_template=True, parse=reading.harmbench,
        special=True, response_tokens=512, delimiters=("[/INST]", "[INST]", "<</SYS>>", "<<SYS>>", "\n---\n"),
    ),
    GuardModel(
        kind="strongreject", title="StrongREJECT, fine-tuned", model="qylu4156/strongreject-15k-v1",
        architecture="gemma, with a LoRA adapter (the extra peft)", licence="MIT; its base Gemma Terms of Use",
        citation="arXiv 2402.10260", judges="how far the response helps, 0 to 1",
        reads="probabilities of the grades 1 to 5",
        faults="rates good answers to harmless requests as high as harmful ones; sees 512 tokens of a response",
        output="grade", new_tokens=1, template=prompts.STRONGREJECT, own_template=True, special=True,
        response_tokens=512, delimiters=("### Answer:",),
    ),
)  # fmt: skip
GUARDS: Mapping[str, GuardModel] = {row.kind: row for row in _ROWS}
"""By kind."""

"""judges/channels.py: what of a reply is its answer, in every form, whole and cut; and how play uses it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from moesteer.conversations import Conversation, Message
from moesteer.evaluate.play import play
from moesteer.judges import Judging, Reply
from moesteer.judges.channels import MARKS, Reader, split

ANALYSIS = "<|channel|>analysis<|message|>the pot, hmm<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>use a brush."
TOOL = "<|start|>assistant<|channel|>commentary to=functions.x <|constrain|>json<|message|>{}<|call|>"
SAID = "<|start|>assistant<|channel|>commentary<|message|>one moment<|end|>"

# text, form, opened, answer, cut
CASES = [
    ("use a brush.", "auto", False, None, False),
    ("<think>hmm</think>\n\nuse a brush.", "auto", False, "use a brush.", False),
    ("\n<think>\nhmm\n</think>use a brush.", "auto", False, "use a brush.", False),
    ("<think></think>", "auto", False, "", False),
    ("<think>I can't say whether", "auto", False, "", True),
    ("<think>a</think><think>b</think>c", "auto", False, "c", False),
    ("<think>a</think>b<think>c</think>d", "auto", False, "b<think>c</think>d", False),
    ("hmm</think>use a brush.", "auto", False, None, False),
    ("hmm</think>use a brush.", "auto", True, "use a brush.", False),
    ("hmm, I can't", "auto", True, "", True),
    ("hmm</think>use a brush.", "think", False, "use a brush.", False),
    ("hmm</think>use</think>a", "think", False, "use</think>a", False),
    ("I can't", "think", False, "", True),
    ("use <think>x</think> it", "auto", False, None, False),
    ("<answer>use a brush.</answer>", "auto", False, "use a brush.", False),
    ("<answer>use a", "auto", False, "use a", False),
    ("take mud. <answer>I can't</answer>", "auto", False, None, False),
    ("<answer>I can't</answer> take mud.", "auto", False, None, False),
    ("<think>a</think> <answer>b</answer>", "auto", False, "b", False),
    ("<think>a</think> c <answer>b</answer>", "auto", False, "c <answer>b</answer>", False),
    ("<think>a</think><answer>b", "answer", False, "b", False),
    ("reasons <answer>b</answer> more", "answer", False, "b", False),
    ("reasons and no", "answer", False, "", True),
    ("<think>a</think>b", "answer", False, "", True),
    (ANALYSIS + FINAL, "auto", False, "use a brush.", False),
    (ANALYSIS + FINAL + "<|return|>", "auto", False, "use a brush.", False),
    ("<|start|>assistant" + ANALYSIS + FINAL, "auto", False, "use a brush.", False),
    (ANALYSIS + TOOL + SAID + FINAL, "auto", False, "one moment\nuse a brush.", False),
    (ANALYSIS + "<|start|>assistant<|channel|>final<|message|>", "auto", False, "", False),
    (FINAL + "<|end|>\nthen mud.<|return|>", "auto", False, "use a brush.\nthen mud.", False),
    (ANALYSIS + FINAL + "<|end|>\nthen mud.", "auto", False, "use a brush.\nthen mud.", False),
    (FINAL + "<|end|><|start|>assistant mud", "auto", False, "use a brush.\nmud", False),
    (FINAL + "<|end|><|channel|>aside<|message|>mud", "auto", False, "use a brush.\nmud", False),
    (FINAL + "<|end|><|start|>assistant to=python" + TOOL[18:], "auto", False, "use a brush.", False),
    (ANALYSIS, "auto", False, "", True),
    ("<|channel|>analysis<|message|>the pot", "auto", False, "", True),
    ("<|channel|>anal", "auto", False, "", True),
    (ANALYSIS + SAID, "auto", False, "", True),
    ("look: " + ANALYSIS + FINAL, "auto", False, None, False),
    ("analysisthe pot, hmmassistantfinaluse a brush.", "harmony", False, "use a brush.", False),
    ("analysisxassistantcommentaryyassistantfinalz", "harmony", False, "z", False),
    ("analysisthe pot", "harmony", False, "", True),
    ("finaluse a brush.", "harmony", False, "use a brush.", False),
    ("use a brush.", "harmony", False, None, False),
    ("analysis of the pot: assistantfinal", "auto", False, None, False),
    (ANALYSIS + FINAL, "none", False, None, False),
    ("<think>I can't", "none", False, None, False),
    ("", "auto", False, None, False),
    ("", "think", False, "", True),
]


@pytest.mark.parametrize("text, form, opened, answer, cut", CASES)
def test_the_answer_of_a_reply(text, form, opened, answer, cut) -> None:
    found = split(text, form=form, opened=opened)
    assert (found.answer, found.found, found.cut) == (text if answer is None else answer, answer is not None, cut)


def test_cut_reasoning_is_broken_and_not_a_refusal() -> None:
    asked = Conversation("c", "g", (Message("user", "q"),))
    for text in ("<think>I can't say whether", "<|channel|>analysis<|message|>I'm sorry, I can't"):
        found = Reader(object()).reply(Made(text, False))
        assert found.raw == text
        assert Judging().judge("refusal", asked, [found]) == "broken"


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Made:
    text: str
    finished: bool = True
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Token:
    content: str
    special: bool

    def __str__(self) -> str:
        return self.content


class Words:
    """A tokenizer of words: ids from 100 are words, below them the marks."""

    def __init__(self, *, special: bool = True, template: str = "") -> None:
        self.added_tokens_decoder = {i: Token(mark, special) for i, mark in enumerate(MARKS)}
        self.words: list[str] = []
        self.chat_template = template

    def ids(self, *pieces: str) -> tuple[int, ...]:
        for piece in pieces:
            if piece not in MARKS and piece not in self.words:
                self.words.append(piece)
        return tuple(MARKS.index(p) if p in MARKS else 100 + self.words.index(p) for p in pieces)

    def decode(self, ids, skip_special_tokens=False) -> str:
        return "".join(self.words[i - 100] for i in ids if i >= 100)


@dataclass
class Model:
    """Says the same tokens again and again, and keeps what it was shown."""

    tokenizer: Words
    tokens: tuple[int, ...]
    seen: list[list[list[str]]] = field(default_factory=list)

    def generate(self, conversations, *, max_new_tokens=128, rows=None, title=None):
        self.seen.append([[m.content for m in messages] for messages in conversations])
        return [Made(self.tokenizer.decode(self.tokens), True, self.tokens) for _ in conversations]

    def render(self, messages) -> str:
        return self.tokenizer.chat_template


HARMONY = ("<|channel|>", "analysis", "<|message|>", "hmm", "<|end|>", "<|start|>", "assistant", "<|channel|>", "final",
           "<|message|>", "use a brush.")  # fmt: skip
TALK = Conversation("c", "g", tuple(Message("user", f"u{i}") for i in range(2)))


def test_marks_that_decoding_leaves_out_are_found_by_their_tokens() -> None:
    words = Words()
    model = Model(words, words.ids(*HARMONY))
    (played,) = play(model, [TALK], turns=True, max_new_tokens=9)
    assert played.replies == (Reply("use a brush.", True, "".join(HARMONY)),) * 2
    assert model.seen[1] == [["u0", "use a brush.", "u1"]]  # the answer alone stays in the context
    row = played.as_row("s", "complied", success=False)
    assert row["response"] == "use a brush." and row["raw"] == ["".join(HARMONY)] * 2


def test_what_was_kept_of_a_killed_try_reads_the_same() -> None:
    words = Words()
    model, kept = Model(words, words.ids(*HARMONY)), []
    first = play(
        model, [TALK], turns=True, max_new_tokens=9, each_turn=lambda said: kept.append([list(s) for s in said])
    )
    again = Model(words, words.ids("other"))
    assert play(again, [TALK], turns=True, max_new_tokens=9, so_far=kept[-1]) == first and not again.seen
    assert [[(one.text, one.finished) for one in said] for said in kept[0]] == [[("".join(HARMONY), True)]]


def test_a_scenario_can_have_all_of_it_judged() -> None:
    words = Words()
    model = Model(words, words.ids(*HARMONY))
    (played,) = play(model, [TALK], turns=False, max_new_tokens=9, reasoning="none")
    assert played.response == "analysishmmassistantfinaluse a brush."
    assert "raw" not in played.as_row("s", "complied", success=False)


@pytest.mark.parametrize("template, said, answer", [
    ("user: q <think>\n", "hmm</think>fine", "fine"),
    ("user: q <think>\n", "hmm", ""),
    ("user: q <think>\n\n</think>\n\n", "fine", "fine"),
    ("user: q", "hmm</think>fine", "hmm</think>fine"),
])  # fmt: skip
def test_a_prompt_that_ends_inside_the_thought_opens_it(template, said, answer) -> None:
    class Behind:
        """As a cache around a model is."""

        def __init__(self, model) -> None:
            self.model, self.generate = model, model.generate

    words = Words(special=False, template=template)
    words.words.append(said)
    (played,) = play(Behind(Model(words, (100,))), [TALK], turns=False, max_new_tokens=9)
    assert played.response == answer


def test_a_reply_without_channels_is_kept_as_it_is() -> None:
    assert Reader(object()).reply(Made("  use a brush. ", False)) == Reply("  use a brush. ", False)

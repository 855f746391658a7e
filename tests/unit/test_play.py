"""evaluate/play.py with a model that records every question and answers it with a number."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moesteer.conversations import Conversation, Message
from moesteer.evaluate.play import Played, judged, play
from moesteer.judges import Judging, Reply


@dataclass(frozen=True)
class Made:
    text: str
    finished: bool


class Recorder:
    """Answers the n-th question of all with "own n", unfinished where n is even."""

    def __init__(self):
        self.calls, self.said = [], 0

    def generate(self, conversations, *, max_new_tokens=128, rows=None, title=None):
        seen = [[(m.role, m.content) for m in messages] for messages in conversations]
        self.calls.append({"seen": seen, "max_new_tokens": max_new_tokens, "rows": rows, "title": title})
        made = []
        for _ in conversations:
            self.said += 1
            made.append(Made(f"own {self.said}", self.said % 2 == 1))
        return made


def talk(name, *turns, **more):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = tuple(Message(roles[t.split()[0][0]], t) for t in turns)
    return Conversation(name, f"group {name}", messages, **more)


def roles_and_texts(played):
    return [(m.role, m.content) for m in played.messages]


S, U1, U2, U3, A1, A2 = "s rules", "u1", "u2", "u3", "a1 scripted", "a2 scripted"


def as_seen(*texts):
    names = {"s": "system", "u": "user", "a": "assistant", "o": "assistant"}
    return [(names[text[0]], text) for text in texts]


def test_every_user_turn_is_played_with_the_models_own_replies_in_context():
    model = Recorder()
    (played,) = play(model, [talk("c", S, U1, A1, U2, A2, U3)], turns=True, max_new_tokens=9)
    assert [call["seen"] for call in model.calls] == [
        [as_seen(S, U1)],
        [as_seen(S, U1, "own 1", U2)],
        [as_seen(S, U1, "own 1", U2, "own 2", U3)],
    ]
    assert all(call["max_new_tokens"] == 9 and call["rows"] is None for call in model.calls)
    # the last reply is a reply, not a message
    assert roles_and_texts(played) == as_seen(S, U1, "own 1", U2, "own 2", U3)
    assert played.replies == (Reply("own 1", True), Reply("own 2", False), Reply("own 3", True))
    assert played.response == "own 3"


def test_with_turns_off_the_script_stays_and_only_the_last_reply_is_made():
    model = Recorder()
    (played,) = play(model, [talk("c", S, U1, A1, U2)], turns=False, max_new_tokens=1)
    assert [call["seen"] for call in model.calls] == [[as_seen(S, U1, A1, U2)]]
    assert roles_and_texts(played) == as_seen(S, U1, A1, U2)
    assert played.replies == (Reply("own 1", True),)


@pytest.mark.parametrize("turns", [True, False])
def test_a_trailing_response_is_not_part_of_the_script(turns):
    model = Recorder()
    (played,) = play(model, [talk("c", U1, A1, A2)], turns=turns, max_new_tokens=1)
    assert [call["seen"] for call in model.calls] == [[as_seen(U1)]]
    assert roles_and_texts(played) == as_seen(U1)


def test_two_user_messages_in_a_row_are_two_turns_and_a_late_system_message_keeps_its_place():
    model = Recorder()
    play(model, [talk("c", U1, "s late", U2)], turns=True, max_new_tokens=1)
    assert [call["seen"] for call in model.calls] == [[as_seen(U1)], [as_seen(U1, "own 1", "s late", U2)]]


def test_conversations_end_at_their_own_turn_and_rows_follow_those_still_going():
    model = Recorder()
    rows = [talk("one", U1), talk("three", U1, A1, U2, A2, U3), talk("two", U1, A1, U2)]
    played = play(model, rows, turns=True, max_new_tokens=1, rows=[7, 8, 9], title="suite")
    assert [call["rows"] for call in model.calls] == [[7, 8, 9], [8, 9], [8]]
    assert [len(call["seen"]) for call in model.calls] == [3, 2, 1]
    assert [call["title"] for call in model.calls] == ["suite, turn 1", "suite, turn 2", "suite, turn 3"]
    assert model.calls[1]["seen"] == [[*as_seen(U1, "own 2", U2)], [*as_seen(U1, "own 3", U2)]]
    assert model.calls[2]["seen"] == [as_seen(U1, "own 2", U2, "own 4", U3)]
    assert [p.response for p in played] == ["own 1", "own 6", "own 5"]
    assert [p.conversation for p in played] == rows


def test_rows_are_passed_with_turns_off_too():
    model = Recorder()
    play(model, [talk("a", U1), talk("b", U1, A1, U2)], turns=False, max_new_tokens=1, rows=[2, 0])
    assert [call["rows"] for call in model.calls] == [[2, 0]] and model.calls[0]["title"] is None


def test_a_rows_context_holds_no_word_of_its_neighbour():
    model = Recorder()
    names = ["a", "b", "c"]
    play(model, [talk(n, f"u {n} 1", f"u {n} 2", f"u {n} 3") for n in names], turns=True, max_new_tokens=1)
    for call in model.calls:
        for name, seen in zip(names, call["seen"], strict=True):
            assert all(text.split()[1] == name for role, text in seen if role == "user")
    last = [[text for role, text in seen if role == "assistant"] for seen in model.calls[-1]["seen"]]
    assert last == [["own 1", "own 4"], ["own 2", "own 5"], ["own 3", "own 6"]]


def test_nothing_to_play_asks_the_model_nothing():
    model = Recorder()
    assert play(model, [], turns=True, max_new_tokens=1) == [] and model.calls == []


def test_a_model_that_gives_too_few_replies_is_an_error():
    class Short(Recorder):
        def generate(self, conversations, **options):
            return super().generate(conversations, **options)[:-1]

    with pytest.raises(ValueError, match=r"zip\(\)"):
        play(Short(), [talk("a", U1), talk("b", U1)], turns=True, max_new_tokens=1)


def test_playing_leaves_the_conversation_as_it_was():
    conversation = talk("c", U1, A1, U2)
    play(Recorder(), [conversation], turns=True, max_new_tokens=1)
    assert conversation == talk("c", U1, A1, U2)


def test_a_row_of_the_journal_holds_what_was_said_and_judged():
    model = Recorder()
    conversation = talk("c", U1, A1, U2, tactic="story", split="test", reference="gold")
    (played,) = play(model, [conversation], turns=True, max_new_tokens=1)
    assert played.as_row("attacks", "refused", success=True) == {
        "id": "c", "suite": "attacks", "group": "group c", "tactic": "story", "split": "test",
        "messages": [
            {"role": "user", "content": "u1"}, {"role": "assistant", "content": "own 1"},
            {"role": "user", "content": "u2"},
        ],
        "response": "own 2", "verdict": "refused", "success": True, "reference": "gold",
    }  # fmt: skip


def test_judging_looks_at_every_reply_of_every_conversation_in_order():
    def one(name, *texts):
        return Played(talk(name, U1, reference="gold"), (), tuple(Reply(t, True) for t in texts))

    made = [one("a", "the gold is here", "I can't"), one("b", "hello", "I can't"), one("c", "hello")]
    judging = Judging(content_phrases=("use a",))
    assert judged(made, judging, "refusal") == ["complied", "refused", "deflected"]
    assert judged(made, judging, "content") == ["refused", "refused", "wrong"]
    assert judged([], judging, "content") == []

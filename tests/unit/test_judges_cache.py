"""judges/cache.py: verdicts are paid for once, a killed judging goes on, and changes of mind are counted."""

from __future__ import annotations

import json

import pytest

from moesteer import files
from moesteer.judges.cache import CHUNK, Remembering
from moesteer.judges.protocol import Judgement, reason_code, unscored
from tests.judges.items import item


class Fake:
    """Says what the script says next for an item, or refused; dies at the n-th item."""

    def __init__(self, script=None, *, identity="one", dies_at=None):
        self.name, self.identity, self.asked, self.calls = "fake", identity, [], []
        self.script, self.dies_at, self.closed = script or {}, dies_at, False

    def judge(self, items):
        self.calls.append(len(items))
        found = []
        for one in items:
            self.asked.append(one.conversation.id)
            if self.dies_at is not None and len(self.asked) > self.dies_at:
                raise KeyboardInterrupt
            said = self.script.get(one.conversation.id, ["refused"])
            verdict = said.pop(0) if len(said) > 1 else said[0]
            found.append(
                unscored("timeout", "slow", by=self.name)
                if verdict == "unscored"
                else Judgement(verdict, self.name, "why", "S9")
            )
        return found

    def close(self):
        self.closed = True


def many(count):
    return [item(f"question {i}?", "use a brush", name=str(i)) for i in range(count)]


def test_an_item_is_asked_about_once_in_this_process_and_the_next(tmp_path):
    journal = files.Journal(tmp_path / "verdicts.jsonl")
    first = Remembering(Fake(), journal)
    found = first.judge([*many(3), many(3)[0]])
    assert found == [Judgement("refused", "fake", "why", "S9")] * 4
    assert first.judge(many(3)) == found[:3]
    assert first.counts() == {"asked": 3, "reused": 3, "disagreed_with_itself": 0}
    fake = Fake({"0": ["complied"]})
    again = Remembering(fake, journal)
    assert again.judge(many(4))[:3] == found[:3] and fake.asked == ["3"]
    again.close()
    assert fake.closed


@pytest.mark.parametrize("change", ["judge", "reply", "reference", "message", "finished"])
def test_another_judge_or_another_text_is_another_verdict(tmp_path, change):
    journal = files.Journal(tmp_path / "verdicts.jsonl")
    Remembering(Fake(), journal).judge([item("q?", "a brush")])
    other = {
        "reply": item("q?", "a brush."),
        "reference": item("q?", "a brush", reference="x"),
        "message": item("q!", "a brush"),
        "finished": item("q?", "a brush", finished=False),
    }.get(change, item("q?", "a brush"))  # fmt: skip
    fake = Fake({"c": ["complied"]}, identity="two" if change == "judge" else "one")
    assert Remembering(fake, journal).judge([other])[0].verdict == "complied" and fake.asked == ["c"]


def test_a_killed_judging_goes_on_where_it_was(tmp_path):
    journal = files.Journal(tmp_path / "verdicts.jsonl")
    items = many(3 * CHUNK)
    with pytest.raises(KeyboardInterrupt):
        Remembering(Fake(dies_at=2 * CHUNK + 5), journal).judge(items)
    assert len(journal.path.read_text().splitlines()) == 2 * CHUNK
    with open(journal.path, "ab") as handle:
        handle.write(b'{"judge": "one", "seen"')  # a torn line
    fake = Fake()
    whole = Remembering(fake, journal).judge(items)
    assert len(fake.asked) == CHUNK and [one.verdict for one in whole] == ["refused"] * len(items)
    assert whole == Remembering(Fake(), None).judge(items)


def test_a_failed_verdict_is_asked_for_again_and_the_first_good_one_stays(tmp_path):
    journal = files.Journal(tmp_path / "verdicts.jsonl")
    fake = Fake({"0": ["unscored", "complied", "refused"]})
    judge = Remembering(fake, journal)
    assert judge.judge(many(1))[0].verdict == "unscored"
    assert judge.judge(many(1))[0].verdict == "complied"
    assert judge.judge(many(1))[0].verdict == "complied" and len(fake.asked) == 2
    assert Remembering(Fake(), journal).judge(many(1))[0].verdict == "complied"
    assert [json.loads(line)["verdict"] for line in journal.path.read_text().splitlines()] == ["unscored", "complied"]


def test_the_first_verdict_counts_and_a_change_of_mind_is_counted(tmp_path):
    journal = files.Journal(tmp_path / "verdicts.jsonl")
    fake = Fake({"0": ["refused", "complied", "refused"], "1": ["unscored", "complied", "complied"]})
    judge = Remembering(fake, journal, repeat=3)
    assert [one.verdict for one in judge.judge(many(3))] == ["refused", "complied", "refused"]
    assert judge.counts() == {"asked": 9, "reused": 0, "disagreed_with_itself": 1}
    again = Remembering(Fake({"1": ["complied"]}), journal, repeat=3)
    assert again.judge(many(3))[0].verdict == "refused"
    assert again.counts()["disagreed_with_itself"] == 1


@pytest.mark.parametrize("line", ["[]", "3", "{}", '{"judge": "one", "seen": 3, "verdict": "refused"}',
                                  '{"judge": "one", "seen": "S", "verdict": "safe"}',
                                  '{"judge": "one", "seen": "S", "verdict": "refused", "reason": 3}'])  # fmt: skip
def test_lines_that_are_no_verdicts_are_passed_over(tmp_path, line):
    (asked,) = many(1)
    path = tmp_path / "verdicts.jsonl"
    path.write_text(line.replace("S", asked.seen) + "\n")
    fake = Fake({"0": ["complied"]})
    assert Remembering(fake, files.Journal(path)).judge([asked])[0].verdict == "complied" and fake.asked


def test_the_longest_are_judged_together():
    fake = Fake()
    items = [item("q?", "word " * n, name=str(n)) for n in (1, 50, 3, 40)]
    Remembering(fake, None).judge(items)
    assert fake.asked == ["50", "40", "3", "1"]


def test_text_that_utf8_cannot_hold_has_a_digest_too():
    assert item("q?", "\ud800").seen != item("q?", "\ud801").seen


def test_reasons_are_counted_by_their_code():
    assert reason_code("http: status 500") == "http" and reason_code(None) == "not said"

"""[[judge]] of a scenario file: what is refused, and that suites' judges can say what their metrics count."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from moesteer import scenario
from moesteer.errors import ScenarioError, UnknownNameError
from moesteer.evaluate import run as evaluation
from moesteer.judges import Judging, PhraseJudge
from moesteer.judges.cache import Remembering
from moesteer.judges.panel import Panel
from moesteer.judges.settings import KINDS, JudgeSettings
from moesteer.judges.table import GUARDS
from tests.judges.items import NO, POT

HEAD = """
schema = 1
name = "mine"
title = "Mine"
toward = "refuse"

[contrast]
away = "comply"
published = "loud"

[[suite]]
name = "loud"
data = "lab:attack-multi"
role = "target"
judge = %s
metrics = ["%s"]
"""
GUARD = '\n[[judge]]\nname = "guard"\nkind = "llama-guard-3"\n'
FAR = '\n[[judge]]\nname = "far"\nkind = "endpoint"\nbase_url = "https://example.org/v1"\nmodel = "m"\n'


def load(tmp_path, judges: str, *, judge: str = '"refusal"', metric: str = "defense_success_rate"):
    path = tmp_path / "mine.toml"
    path.write_text(HEAD % (judge, metric) + judges)
    return scenario.load(path)


REFUSED = {
    "unknown kind": (GUARD.replace("llama-guard-3", "llama-guard-9"), "no kind of judge 'llama-guard-9'"),
    "unknown key": (GUARD + "colour = 1", "judge.0.colour: Extra"),
    "the name of a judge by phrases": (GUARD.replace('"guard"', '"refusal"'), "name of a judge by phrases"),
    "a name with a path": (GUARD.replace('"guard"', '"../x"'), "judge.0.name"),
    "two of one name": (GUARD + GUARD, "two [[judge]] have the same name"),
    "an address for a guard": (GUARD + 'base_url = "https://a"', "base_url cannot be set for the kind llama-guard-3"),
    "a risk for Llama Guard": (GUARD + 'risk = "violence"', "risk cannot be set"),
    "options without vllm": (GUARD + "engine_options = { seed = 1 }", "set backend = 'vllm'"),
    "a backend for an endpoint": (FAR + 'backend = "vllm"', "backend cannot be set for the kind endpoint"),
    "what an endpoint is shown": (FAR + 'request = "last"', "request cannot be set for the kind endpoint"),
    "a model for phrases": ('\n[[judge]]\nname = "p"\nkind = "refusal"\nmodel = "x"\n', "model cannot be set"),
    "an endpoint without address": (FAR.replace('base_url = "https://example.org/v1"', ""), "needs base_url and model"),
    "an endpoint without model": (FAR.replace('model = "m"', ""), "needs base_url and model"),
    "another scheme": (FAR.replace("https", "file"), "must begin with https:// or http://"),
    "no host": (FAR.replace("https://example.org/v1", "https:///v1"), "name a host"),
    "a password in the address": (FAR.replace("https://", "https://u:p@"), "a key belongs into key_env"),
    "a key in the address": (FAR.replace("/v1", "/v1?key=x"), "a key belongs into key_env"),
    "a key in the open": (FAR.replace("https", "http") + 'key_env = "K"', "a key is not sent over http://"),
    "a key itself": (FAR + 'key_env = "sk-123"', "judge.0.key_env"),
    "a time-out above the limit": (FAR + "timeout_s = 61", "judge.0.timeout_s"),
    "too many at once": (FAR + "concurrency = 65", "judge.0.concurrency"),
    "a threshold of one": (GUARD + "threshold = 1.0", "judge.0.threshold"),
    "an unknown guideline": (GUARD.replace("llama-guard-3", "shieldgemma") + 'guidelines = ["x"]', "no guideline x"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_judge_that_cannot_be_is_refused_when_the_scenario_is_read(name, tmp_path) -> None:
    judges, part = REFUSED[name]
    with pytest.raises(ScenarioError) as caught:
        load(tmp_path, judges)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "judges, judge, metric, part",
    [
        (GUARD, '"guards"', "defense_success_rate", "no judge 'guards'; there are refusal, content, exact, guard"),
        (GUARD, "[]", "defense_success_rate", "judge must name a judge"),
        (GUARD, '["guard", "guard"]', "defense_success_rate", "judge must name a judge, or several different ones"),
        (GUARD, '"guard"', "benign_accuracy", "guard never says correct, which is what benign_accuracy counts"),
        (FAR + 'asks = "right"', '["refusal", "far"]', "attack_success_rate", None),
        (FAR, '["refusal", "far"]', "faithfulness", "far never says correct"),
        (GUARD + FAR, '["guard", "far", "refusal"]', "defense_success_rate", None),
    ],
)
def test_a_suites_judges_exist_and_can_say_what_it_counts(judges, judge, metric, part, tmp_path) -> None:
    if part is None:
        assert load(tmp_path, judges, judge=judge, metric=metric).target.judges
        return
    with pytest.raises(ScenarioError) as caught:
        load(tmp_path, judges, judge=judge, metric=metric)
    assert part in str(caught.value)


def test_every_kind_makes_a_judge_without_loading_anything(tmp_path) -> None:
    judges = "".join(f'\n[[judge]]\nname = "j{i}"\nkind = "{kind}"\n' for i, kind in enumerate(KINDS[:-1])) + FAR
    with load(tmp_path, judges, judge='["refusal", "far"]').panel() as panel:
        made = [panel.judge(f"j{i}") for i in range(len(KINDS) - 1)] + [panel.judge("far"), panel.judge("refusal")]
        assert [type(one) for one in made] == [PhraseJudge] * 3 + [Remembering] * (len(KINDS) - 3) + [PhraseJudge]
        assert panel.judge("far") is made[-2]
        with pytest.raises(UnknownNameError, match="no judge 'j99'"):
            panel.judge("j99")


def test_a_model_beside_the_scenario_is_found_there(tmp_path) -> None:
    loaded = load(tmp_path, GUARD + 'model = "./guard"')
    with loaded.panel() as panel:
        assert panel._asked(loaded.judges[0]).model == str(tmp_path / "guard")


def test_a_judge_by_phrases_of_another_name_says_the_same(tmp_path) -> None:
    loaded = load(tmp_path, '\n[[judge]]\nname = "mine"\nkind = "refusal"\n', judge='"mine"')
    with loaded.panel() as panel:
        (one, two), (plain, other) = panel.rule(("mine",), [POT, NO]), panel.rule(("refusal",), [POT, NO])
    assert [one.verdict, two.verdict] == [plain.verdict, other.verdict] == ["complied", "refused"]
    assert plain.fields() == {} and one.fields() == {"judged_by": "mine"}


def test_the_first_judge_decides_and_the_others_stand_beside() -> None:
    with Panel(Judging()) as panel:
        (found,) = panel.rule(("content", "refusal"), [POT])
    assert found.verdict == "correct"
    assert found.fields() == {"verdicts": {"content": "correct", "refusal": "complied"}}


def test_an_identity_of_rules_knows_them_all() -> None:
    rules = [Judging(), Judging(("no",)), Judging(content_phrases=("use",)), Judging(must_finish=True),
             Judging(coherent=str.isascii)]  # fmt: skip
    found = {PhraseJudge("x", kind, one).identity for one in rules for kind in ("refusal", "exact")}
    assert len(found) == 10


def test_agreement_is_on_what_the_metric_counts_and_leaves_out_broken_and_unscored(tmp_path) -> None:
    loaded = load(tmp_path, GUARD, judge='["guard", "refusal"]')
    verdicts = [("deflected", "refused"), ("complied", "refused"), ("complied", "complied"), ("broken", "broken"),
                ("unscored", "refused"), ("refused", "unscored")]  # fmt: skip
    rows = [{"suite": "loud", "verdict": a, "reason": "timeout: slow", "verdicts": {"guard": a, "refusal": b}}
            for a, b in verdicts]  # fmt: skip
    found = evaluation.by_suite(loaded, [*rows, {"suite": "loud", "verdict": "unscored", "fault": "no logits"}])["loud"]
    assert found["agreement"]["pairs"][0] | {"kappa": 0} == {
        "judges": ["guard", "refusal"], "n": 3, "raw": 2 / 3, "kappa": 0
    }  # fmt: skip
    assert found["agreement"]["pairs"][0]["kappa"] == pytest.approx(0.4)
    assert found["unscored_reasons"] == {"no-reply": 1, "timeout": 1} and found["n"] == 5


def test_the_page_on_judges_shows_settings_that_are_and_every_guard() -> None:
    page = (Path(__file__).parents[2] / "docs" / "judges.md").read_text()
    shown = tomllib.loads(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])["judge"]
    guard, far = (JudgeSettings.model_validate(one) for one in shown)
    assert guard.kind in GUARDS and far.kind == "endpoint"
    # what is shown as a default is one
    for one, told in zip((guard, far), shown, strict=True):
        for key in set(told) - {"name", "kind", "model", "revision", "base_url", "key_env"}:
            assert getattr(one, key) == JudgeSettings.model_fields[key].default, key
    assert all(f"`{kind}`" in page for kind in GUARDS)

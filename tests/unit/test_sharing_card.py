"""The card: front matter the Hub reads, the run's own numbers, and text that no renderer acts on."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from moesteer import evidence
from moesteer.card import card, hub_id, inert, licence_of
from moesteer.mask import Intent, SteeringMask
from tests.unit import runs_by_hand
from tests.unit.runs_by_hand import AFTER, BEFORE, change, rate, steer_run, suite

MASK = runs_by_hand.mask()
NASTY = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/p.png)",
    "[a](javascript:alert(1))",
    "| a | b |\n|---|---|",
    "`code` ``` ~~~",
    "# head\n---\nlicense: evil",
    "&lt;b&gt; &#60;i&#62;",
    "$$x$$ $y$",
    "**b** _i_ ~~s~~",
    "https://evil.example www.evil.example me@evil.example",
    "\x1b[2J\u202e\u2028\x00",
    "<!-- -->",
    "[^1]: note",
    "\\\\`",
    "</td></tr>",
    "{{ x }} {% y %}",
    "<details>",
    "==x== :smile:",
)


@pytest.fixture
def run(tmp_path):
    return steer_run(tmp_path / "run", MASK)


def made(run, mask=MASK, **more):
    return card(mask, evidence.of_run(run, mask=mask), repo="acme/lab-mask", licence=more.pop("licence", "apache-2.0"))


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_yaml_that_the_hub_knows(run):
    assert front(made(run)) == {
        "library_name": "moesteer",
        "license": "apache-2.0",
        "base_model": "acme/tiny-moe",
        "base_model_relation": "adapter",
        "tags": ["moesteer", "mixture-of-experts", "steering-mask", "lab", "direct"],
    }


@pytest.mark.parametrize(
    "model", ["lab-tiny", "/home/someone/secret/model", "./model", "a/b/c", "C:\\models\\x", "~/m", "acme/x y"]
)
def test_only_an_id_of_the_hub_is_a_base_model(model, tmp_path):
    text = made(steer_run(tmp_path / "run", MASK, plan={"model": model}))
    assert "base_model" not in front(text) and "secret" not in text and "/home" not in text


def test_a_folder_that_looks_like_an_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("acme/tiny") == "acme/tiny"
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    assert hub_id("acme/tiny") is None


def test_every_number_is_the_runs(run):
    text = made(run)
    for part in (
        "| defense success rate | target | 50.0 (45.0 to 55.0) | 90.0 (85.0 to 95.0) | "
        "+40.0 (+40.0 to +40.0) | 100 | 0 / 0 |",
        "| direct refusal rate | protected, margin 1 | 98.0 (93.0 to 100.0) | 98.0 (93.0 to 100.0) | "
        "0.0 (0.0 to 0.0) | 100 | 0 / 0 |",
        "| over refusal rate (lower is better) | protected, margin 2 | 2.0",
        f"| mask sha256 | `{MASK.sha256}` |",
        f"| router weights | `{runs_by_hand.ROUTER}` |",
        "| strength alpha | 0.5 ",
        "sha256 of every conversation of the run: `" + "ef" * 32,
        "| sha256 of the data it was detected on | `" + "cd" * 32,
        "3 (decoder layers 0 to 3)",
        "8 a layer, 2 per token",
        "toward refuse (lab)",
        "| seed of the evaluation | 3 |",
        f"acme/lab-mask@COMMIT --out lab-mask.safetensors --sha256 {MASK.sha256}",
        "serve acme/tiny-moe --pin",
        "takes 268 requests of which none changes",
        "made by moesteer (apache-2.0)",
        "A mask can remove safety behaviour",
    ):
        assert part in text, part


def test_unscored_counts_are_shown_and_nothing_scored_is_a_dash(run):
    change(run / "results.json", "methods", "direct", "metrics", "direct_refusal_rate", to=rate(0.98, 97, 3))
    change(run / "results.json", "methods", "direct", "metrics", "coherence", to=rate(None, unscored=100))
    text = made(run)
    assert "| 97 | 0 / 3 |" in text and "over 97 requests, 3 unscored" in text
    assert "| coherence | watched | — | — | — | 0 | — / 100 |" in text


def test_a_suite_outside_its_margin_is_named(run):
    for who, value in (("none", 0.02), ("direct", 0.07)):
        change(
            run / "results.json",
            "methods",
            who,
            "suites",
            to={"benign": {"metric": "over_refusal_rate", **rate(value)}},
        )
    assert "**Outside its margin on the test split**: benign loses 5.0 points, margin 2." in made(run)


def test_a_suite_inside_its_margin_is_not(run):
    for who, value in (("none", 0.02), ("direct", 0.03)):
        change(
            run / "results.json",
            "methods",
            who,
            "suites",
            to={"benign": {"metric": "over_refusal_rate", **rate(value)}},
        )
    assert "Outside its margin" not in made(run) and "| benign | protect, margin 2 | over refusal rate | 2.0" in made(
        run
    )


def test_a_quick_look_says_so(tmp_path):
    assert "cut to 40 conversations per suite and split" in made(steer_run(tmp_path / "run", MASK, plan={"limit": 40}))


def test_a_margin_of_zero_says_what_cannot_be_shown(tmp_path):
    run = steer_run(tmp_path / "run", MASK, suites=(suite("direct", "direct_refusal_rate", margin=0.0),))
    assert "At a margin of zero no number of requests can show" in made(run)


def test_a_forced_mask_is_called_one(tmp_path):
    force_LE = np.zeros((3, 8), np.int8)
    force_LE[0, 1] = -1
    forced = SteeringMask(MASK.info, force_LE=force_LE)
    text = made(steer_run(tmp_path / "run", forced), forced)
    assert "forces experts on or off" in text and "| entries | 1 of 24 |" in text


@pytest.mark.parametrize(
    ("data", "source", "licence"),
    [
        ("lab:attack-direct", "lab:attack-direct", "made by moesteer"),
        ("/home/me/private/x.jsonl", "a file, x.jsonl", "not known"),
        ("suite:xstest", "suite:xstest", licence_of("suite:xstest")),
        ("suite:gone", "suite:gone", "not known"),
    ],
)
def test_data_with_its_licence_and_no_folder(data, source, licence, tmp_path):
    suites = (suite("direct", "direct_refusal_rate", data=data),)
    text = made(steer_run(tmp_path / "run", MASK, suites=suites))
    assert inert(source) in text and inert(licence) in text and "/home" not in text and "private" not in text


def test_a_named_suite_has_the_licence_of_the_table():
    from moesteer.suites import table

    assert licence_of("suite:xstest") == table.named("xstest").licence != ""


def test_settings_are_shown_without_folders(tmp_path):
    settings = {"steps": 80, "folder": "/home/me/x/y", "from": [{"path": "../a/b.csv"}], "text": "final_user"}
    mask = runs_by_hand.mask(settings=settings)
    text = made(steer_run(tmp_path / "run", mask), mask)
    assert "/home" not in text and "../a" not in text and "| folder | y |" in text and "final\\_user" in text


# ---------------------------------------------------------------- nothing in it acts


def rendered(text):
    """HTML as a renderer makes it that takes raw HTML and turns addresses into links."""
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).enable(["table", "strikethrough"]).render(text)


TAGS = re.compile(r"<[^>]*>")


@pytest.mark.parametrize("nasty", NASTY)
def test_text_is_inert_wherever_it_comes_from(nasty, tmp_path):
    def poisoned(text):
        mask = runs_by_hand.mask(toward=text, method=text, creator=text, settings={text: text, "b": [{text: text}]})
        suites = ({**suite("direct", "direct_refusal_rate"), "name": text, "data": text, "judge": [text]},)
        values, after = {**BEFORE, text: 0.5}, {**AFTER, text: 0.5}
        run = steer_run(tmp_path / f"run{len(text)}", mask, before=values, after=after, suites=suites, title=text,
                        description=text, name=text, plan={"model": text, "data": text})  # fmt: skip
        change(run / "results.json", "versions", to={text: text})
        return made(run, mask)

    text, plain = poisoned(nasty), poisoned("x" * 3)
    assert front(text)["tags"] == ["moesteer", "mixture-of-experts", "steering-mask"]
    tags, usual = (
        set(TAGS.findall(rendered(text.split("---\n", 2)[2]))),
        set(TAGS.findall(rendered(plain.split("---\n", 2)[2]))),
    )
    assert tags <= usual, tags - usual
    seen = html.unescape(TAGS.sub("", rendered(text.split("---\n", 2)[2]))).replace("\u200b", "")
    assert " ".join("".join(c if c.isprintable() else " " for c in nasty).split()) in seen, "it is to be read as it is"
    assert "\x1b" not in text and "\u202e" not in text and "\u2028" not in text and "\x00" not in text
    assert text.split("---\n", 2)[2].count("\n") == plain.split("---\n", 2)[2].count("\n")


@pytest.mark.parametrize(
    "address", ["https://evil.example", "www.evil.example", "me@evil.example", "HTTP://evil.example", "WWW.x.y"]
)
def test_a_bare_address_is_no_link(address):
    found = inert(address)
    assert address not in found and found.replace("\u200b", "") == address
    assert not re.search(r"(?i)(https?://\w|www\.\w|@\w)", found)


def test_inert_text_is_cut():
    assert len(inert("x" * 10**6)) == 1000 and inert("a\n b") == "a b"


def test_no_conversation_is_in_a_card(run):
    (run / "responses").mkdir()
    (run / "responses" / "direct.jsonl").write_text(json.dumps({"response": "how do i paint a flumox"}))
    change(run / "results.json", "failed", to={"masc": "how do i paint a flumox"})
    change(run / "results.json", "facts", to={"note": "how do i paint a flumox"})
    assert "flumox" not in made(run)


def test_the_same_run_gives_the_same_bytes(run):
    assert made(run) == made(run)


def test_intent_of_a_mask_is_its_own_and_not_the_runs(tmp_path):
    mask = MASK.with_info(intent=Intent(toward="other"))
    assert "toward other" in made(steer_run(tmp_path / "run", mask, toward="refuse"), mask)

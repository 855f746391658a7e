"""Pages of audits, evaluations and benchmarks: numbers as in the files, planted findings, gaps said, text inert."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("jinja2")
pytest.importorskip("plotly")

from moesteer.cli.main import app
from moesteer.errors import FileError, InputError
from moesteer.evaluate.cells import MINUS, NOTHING
from moesteer.report import audit_figures, conversations_shown, curves, html, palette, routing_files, word_diff
from moesteer.report.audit_card import card
from moesteer.report.audit_files import read_audit, read_experts
from moesteer.report.markdown import inert
from tests import hostile_run, report_fixture
from tests import report_audit_fixture as fixture
from tests.hostile_run import HOST
from tests.page_reading import Page, resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    return fixture.build_audit(tmp_path / "audit")


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return fixture.build_evaluation(tmp_path / "evaluation")


def edit(run: Path, change: Any, name: str = "results.json") -> None:
    found = json.loads((run / name).read_text())
    change(found)
    report_fixture.write_json(run / name, found)


# ---- numbers


def check_numbers(page: Page, run: Path) -> int:
    """Every <data> of the page against the file and place that it names; how many there are."""
    known = {path.name: json.loads(path.read_text()) for path in run.glob("*.json")}
    for title, value, text in page.numbers:
        file, pointer = title.split(" ", 1)
        found = resolve(known[file], pointer)
        assert json.loads(value) == found, pointer
        if found is None:
            assert NOTHING in text
        elif "%" in text:
            assert text.replace(MINUS, "-").replace("\xa0%", "") == f"{100 * found:.1f}", pointer
        elif pointer.endswith(("/n", "/draws", "/of", "/unscored")):
            assert text == str(found), pointer
    return len(page.numbers)


def test_every_number_of_an_audit_is_the_one_in_its_files(audit: Path) -> None:
    page = Page(html.render(audit))
    assert check_numbers(page, audit) > 900
    assert {title.split()[0] for title, _, _ in page.numbers} == {"results.json", "experts.json"}


def test_every_point_of_every_curve_is_on_the_page(audit: Path) -> None:
    shown = {title.split(" ", 1)[1] for title, _, _ in Page(html.render(audit)).numbers}
    found = json.loads((audit / "results.json").read_text())
    for name in ("silencing", "activation"):
        for finder, points in found[name]["curves"].items():
            for index, point in enumerate(points):
                place = f"/{name}/curves/{finder}/{index}"
                assert {f"{place}/behaviour/value", f"{place}/vs_none/p"} <= shown
                assert {f"{place}/utility/{suite}/rate/value" for suite in point["utility"]} <= shown
        for index, _ in enumerate(found[name]["random"]):
            assert f"/{name}/random/{index}/behaviour/mean" in shown
    for index in range(2):
        assert f"/transfer/{index}/overlap/3/shared" in shown and f"/transfer/{index}/old/3/behaviour/low" in shown
    assert {"/concentration/n50/value", "/concentration/gini/high", "/monitoring/at/1/true_positives"} <= shown


def test_every_number_of_an_evaluation_and_of_benchmarks_is_in_its_file(evaluation: Path, tmp_path: Path) -> None:
    assert check_numbers(Page(html.render(evaluation)), evaluation) > 30
    folder = tmp_path / "bench"
    shutil.copytree(ROOT / "bench" / "results", folder)
    assert check_numbers(Page(html.render(folder)), folder) > 60
    shutil.copy(ROOT / "docs" / "results.json", tmp_path / "quality.json")
    assert check_numbers(Page(html.render(tmp_path / "quality.json")), tmp_path) > 3000


# ---- planted findings


def test_the_summary_says_the_verdict_and_the_planted_numbers(audit: Path) -> None:
    text = Page(html.render(audit)).text
    for said in (
        "concentrated Six of 96 experts carry half of the refusals",
        "n50: silenced to halve it6of 96 experts95 % [4, 8]",
        "with 8 experts silenced31.2 %[22.2, 42.1], n = 80random experts: 99.3 %",
        "kept without the right experts11.2 %",
        "n50 with the defence mask19",
        "attacks seen from routing (AUROC)0.962[0.940, 0.980]",
        "Check not passed: refusals are not concentrated.",
        "is a lab model",
        "halved0.5: share of the behaviour that must be gone",
        "Found nothing:causal no expert changes the loss",
    ):
        assert said in text, said
    head = text.index("Router audit of lab-tiny-concentrated")
    assert head < text.index("Six of 96") < text.index("n50: silenced") < text.index("Behaviour experts")
    assert text.index("Methods The same harmful request") < text.index("What this audit does not show")


def test_an_n50_that_is_never_reached_is_said(audit: Path) -> None:
    edit(audit, lambda found: found["concentration"]["n50"].update(value=None, low=None, high=None, share=None))
    text = Page(html.render(audit)).text
    assert "n50: silenced to halve itnot reached" in text and "no size that was tried does" in text
    figure = figures_of(audit)["figure-silencing"]["wide"]
    assert not figure["layout"]["shapes"]
    assert "not reached (up to 24), of 96" in card(read_audit(audit))


def figures_of(run: Path) -> dict[str, Any]:
    """The figures' data as the page carries it."""
    found: dict[str, Any] = json.loads(Page(html.render(run)).scripts[0])
    return found


def test_curves_have_the_planted_points_bands_and_n50(audit: Path) -> None:
    figure = figures_of(audit)["figure-silencing"]["wide"]
    lines = {trace["name"]: trace for trace in figure["data"] if trace.get("name")}
    assert lines["risk-difference"]["y"] == pytest.approx([1.0, *(round(v * 80) / 80 for v in fixture.LEFT.values())])
    assert lines["risk-difference"]["x"] == [curves.place(n) for n in (0, *fixture.SIZES)]
    assert [curves.place(n) for n in (0, 1, 2, 4, 8)] == [0, 1, 2, 3, 4]
    bands = [trace for trace in figure["data"] if trace.get("fill") == "toself"]
    assert len(bands) == 3 and min(bands[0]["y"]) == pytest.approx(1 - 24 / 300)
    assert figure["layout"]["shapes"][0]["x0"] == pytest.approx(curves.place(6))
    assert {"benign", "benign, random", "arithmetic", "surrogate"} <= lines.keys()
    assert lines["benign"]["xaxis"] == "x2"


def test_the_map_of_experts_marks_what_was_planted(audit: Path) -> None:
    results, experts = read_audit(audit), read_experts(audit)
    assert experts is not None
    figure = audit_figures.expert_map(results, experts, width_px=960)
    assert figure is not None
    heat, passed, first = figure["data"]
    assert heat["zmin"] == -heat["zmax"] and heat["z"][2][0] == pytest.approx(0.3) and heat["y"][2] == "2"
    assert len(passed["x"]) == sum(row["q"] <= 0.05 for row in fixture.experts()["rows"])
    assert set(passed["y"]) == {"2", "3"} and len(first["x"]) == 6
    assert "difference +30.0 points [+25.0, +35.0]" in heat["text"][2][0] and "q = 0.004" in heat["text"][2][0]


def test_layers_roc_and_transfer_are_drawn_from_the_numbers(audit: Path) -> None:
    drawn = figures_of(audit)
    assert drawn["figure-layers"]["wide"]["data"][0]["y"] == [0.02, 0.05, 0.46, 0.41, 0.04, 0.02]
    roc = {trace["name"]: trace for trace in drawn["figure-roc"]["narrow"]["data"]}
    assert roc["probe, AUROC 0.962"]["y"][2] == 0.8 and roc["stated rates of false positives"]["x"] == [0.01, 0.05]
    there = {trace["name"]: trace for trace in drawn["figure-transfer-1"]["wide"]["data"]}
    assert there["the audited model's experts"]["y"][-1] > 0.9 > 0.1 > there["its own experts"]["y"][-1]
    dots = drawn["figure-scatter-0"]["wide"]["data"][0]
    assert len(dots["x"]) == 96 and max(dots["x"]) == pytest.approx(0.3)


def test_answers_are_those_of_the_size_that_reaches_n50(audit: Path) -> None:
    text = html.render(audit)
    page = Page(text)
    assert "condition silence-risk-difference-008 of responses/silencing.jsonl" in page.text
    assert "55 of 144 test conversations changed their verdict: 0 for the better, 55 for the worse" in page.text
    assert "<del>" in text and "<ins>" in text and "[only here: take cork from the cave" in page.text


def test_routing_counts_the_experts_exchanged(audit: Path) -> None:
    found = routing_files.read_routing(audit)
    assert found is not None
    changed = conversations_shown.exchanged(found.texts[0])
    assert any(out for token in changed for out, _ in token)
    for token in changed:
        assert [bool(out) for out, _ in token] == [bool(taken) for _, taken in token]
        assert not any(out for layer, (out, _) in enumerate(token) if layer not in (2, 3))
    total = sum(len(out) for token in changed for out, _ in token)
    assert f"{total} of {len(changed) * 24} selections are others with the mask" in Page(html.render(audit)).text
    heat = figures_of(audit)["figure-routing-0"]["wide"]["data"][0]
    assert sum(map(sum, heat["z"])) == pytest.approx(total / 4) and len(heat["z"]) == 6


# ---- what is missing, and what is wrong


def test_an_audit_with_little_in_it_says_what_it_cannot_show(audit: Path) -> None:
    for name in ("experts.json", "routing.json", "responses/silencing.jsonl"):
        (audit / name).unlink()
    edit(
        audit, lambda found: found.update(activation=None, hardening=None, attacker=None, monitoring=None, transfer=[])
    )
    page = html.make(audit)
    text = Page(page.text).text
    said = " ".join(page.gaps)
    for gap in ("experts.json is missing", "--mask", "--against", "no detector", "Activation", "routing.json",
                "responses/silencing.jsonl is missing"):  # fmt: skip
        assert gap in said, gap
    assert all(gap in text for gap in page.gaps)
    assert set(figures_of(audit)) == {"figure-silencing", "figure-layers"}


def test_an_evaluation_without_a_mask_has_nothing_to_compare(tmp_path: Path) -> None:
    page = html.make(fixture.build_evaluation(tmp_path / "plain", masked=False))
    assert page.kind == "evaluate" and any("given no mask" in gap for gap in page.gaps)
    text = Page(page.text).text
    assert "No mask was applied, so there is nothing to compare" in text and "steered" not in text


def test_an_evaluation_says_what_the_mask_did(evaluation: Path) -> None:
    text = Page(html.render(evaluation)).text
    assert (
        "Direct refusal rate: 100.0 % without the mask, 31.2 % with it, on the test split: the mask makes it worse"
        in text
    )
    assert "55 of 144 conversations changed their verdict" in text


def test_routing_that_was_not_kept_says_why(evaluation: Path) -> None:
    report_fixture.write_json(
        evaluation / "routing.json", {"schema": 1, "kind": "routing", "not_shown": "the engine keeps no selections"}
    )
    assert "No routing was kept: the engine keeps no selections." in Page(html.render(evaluation)).text


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda found: found.update(schema=2), "/schema"),
        (lambda found: found.pop("silencing"), "/silencing"),
        (lambda found: found["none"]["behaviour"].update(value="all"), "/none/behaviour/value"),
        (lambda found: found["finders"]["surrogate"].update(order=[[1]]), "/finders/surrogate/order"),
        (lambda found: found.update(finder="nobody"), "/finder"),
        (lambda found: found["transfer"][1].pop("verdict"), "/transfer/1/verdict"),
    ],
)
def test_a_malformed_audit_names_the_place(audit: Path, change: Any, where: str) -> None:
    edit(audit, change)
    with pytest.raises(FileError) as caught:
        html.render(audit)
    assert where in caught.value.where and caught.value.do


def test_experts_and_selections_that_do_not_fit_are_errors(audit: Path) -> None:
    edit(audit, lambda found: found["rows"][5].update(expert=16), "experts.json")
    with pytest.raises(FileError, match="expert 16 of layer 0"):
        html.render(audit)
    edit(audit, lambda found: found["rows"][5].update(expert=5), "experts.json")
    edit(audit, lambda found: found["texts"][1]["after"][3].pop(), "routing.json")
    with pytest.raises(FileError) as caught:
        html.render(audit)
    assert "/texts/1/after" in caught.value.where


@pytest.mark.parametrize("value", [[], 7, {"kind": "future", "schema": 9}])
def test_what_is_no_run_is_refused(tmp_path: Path, value: Any) -> None:
    report_fixture.write_json(tmp_path / "results.json", value)
    with pytest.raises(FileError, match="not a run that can be reported on"):
        html.make(tmp_path)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    report_fixture.write_json(tmp_path / "run.json", {"schema": 1, "plan": {}, "status": "interrupted"})
    with pytest.raises(FileError, match=r"results.json is missing \(the run is interrupted\)"):
        html.make(tmp_path)


def test_kinds_are_told_by_the_results(audit: Path, evaluation: Path, tmp_path: Path) -> None:
    steer = report_fixture.build_run(tmp_path / "steer")
    found = [html.kind_of(run) for run in (audit, evaluation, steer, ROOT / "docs" / "results.json")]
    assert found == ["audit", "evaluate", "steer", "bench"]
    assert html.kind_of(ROOT / "bench" / "results") == "bench"


# ---- the same bytes, nothing loaded


def test_the_same_audit_gives_the_same_bytes_without_torch(audit: Path) -> None:
    first = html.write_report(audit).read_bytes()
    code = (
        "import sys; from pathlib import Path; from moesteer.report import html; html.write_report(Path(sys.argv[1]));"
        "html.write_card(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(ROOT / "src"), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", code, str(audit)], check=True, env=environment)
    assert (audit / "report.html").read_bytes() == first and (audit / "card.md").exists()


def test_pages_load_nothing_and_allow_only_their_scripts(audit: Path, evaluation: Path) -> None:
    for run in (audit, evaluation, ROOT / "bench" / "results"):
        text = html.render(run)
        page = Page(text)
        for tag, attributes in page.elements:
            assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
            assert "src" not in attributes and (attributes.get("href") or "#").startswith("#")
            assert not any(name.startswith("on") for name in attributes)
        policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a) or ""
        assert policy.startswith("default-src 'none'; script-src 'sha256-") and "connect-src" not in policy
        style = text.split("<style>")[1].split("</style>")[0]
        assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize("start", [0, 17, 34, 51])
def test_hostile_text_is_inert_everywhere(audit: Path, evaluation: Path, start: int) -> None:
    for run in (audit, evaluation):
        clean = Page(html.render(run))
        hostile_run.poison(run, start=start)
        page = Page(html.render(run))
        assert len(page.scripts) == len(clean.scripts)
        assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements} | {"br"}
        assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on") or a == "src"]
        assert set(re.findall(r"<[a-z/!]+", json.dumps(json.loads(page.scripts[0])))) <= {"<br", "<b", "</b"}
        assert not {"\x00", "\u202e", "\ud800"} & set(page.text)
        assert check_numbers(page, run) > 20


def test_the_card_is_inert_and_says_the_verdict(audit: Path) -> None:
    text = html.write_card(audit).read_text(encoding="utf-8")
    for said in ("# Router audit of lab-tiny-concentrated", "**concentrated**", "| 8 | 31.2 (22.2 to 42.1) |",
                 "**6** of 96 (95 % interval 4 to 8)", "lab-tiny-tuned: **gone**",
                 "Other languages, system prompts"):  # fmt: skip
        assert said in text, said
    hostile_run.poison(audit, start=0)
    text = html.write_card(audit).read_text(encoding="utf-8")
    assert f"https://{HOST}" not in text and "<script" not in text.lower() and "\n# heading" not in text
    assert "](javascript" not in text.replace("\\](", "")
    for line in text.splitlines():
        assert not line.startswith(("<", "```", "=")), line


def test_a_card_is_of_an_audit(evaluation: Path) -> None:
    with pytest.raises(InputError, match="a run of evaluate"):
        html.write_card(evaluation)
    assert inert("<b>|x|`[a](b)") == "&lt;b\\>\\|x\\|\\`\\[a\\](b)"


# ---- parts


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    first, second = sorted((luminance(one), luminance(two)), reverse=True)
    return (first + 0.05) / (second + 0.05)


@pytest.mark.parametrize("theme", range(3), ids=["light", "dark", "paper"])
def test_colours_have_contrast(theme: int) -> None:
    tint = {name: found[theme] for name, found in palette.PALETTE.items()}
    for text in ("ink", "muted", "good", "bad", "accent"):
        for ground in ("paper", "card", "accent-soft", "warn-paper"):
            if (text, ground) not in (("good", "warn-paper"),):
                assert contrast(tint[text], tint[ground]) >= 4.5, (text, ground)
    for ground in ("added", "removed"):
        assert contrast(tint["ink"], tint[ground]) >= 4.5
    for line in ("blue", "green", "orange", "purple", "pink", "teal", "olive", "rust", "muted", "cold", "warm"):
        assert contrast(tint[line], tint["paper"]) >= 3, line
    for written in ("blue", "green", "orange", "purple", "pink", "teal", "olive", "rust"):
        assert contrast(tint[written], tint["paper"]) >= 4.5, written


def test_every_colour_that_a_figure_names_is_in_the_palette(audit: Path, tmp_path: Path) -> None:
    steer = report_fixture.build_run(tmp_path / "steer")
    for run in (audit, steer, ROOT / "bench" / "results"):
        named = set(re.findall(r'"@([a-z-]+)"', json.dumps(figures_of(run))))
        assert named and named <= set(palette.PALETTE)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80))
def test_a_word_diff_holds_both_answers_whole(before: str, after: str) -> None:
    compared = word_diff.compare(before, after)
    assert compared is not None
    for answer, parts in zip((before, after), compared, strict=True):
        assert "".join(part.text for part in parts) == answer
    same = [[word for part in parts if part.kind == "same" for word in part.text.split()] for parts in compared]
    assert same[0] == same[1]
    unchanged = word_diff.compare(before, before)
    assert unchanged is not None and all(part.kind == "same" for part in unchanged[0])


def test_a_word_diff_marks_what_changed_and_gives_up_on_long_answers() -> None:
    compared = word_diff.compare("first wash it , then dry it .", "first paint it , then dry it .")
    assert compared is not None
    assert [part.text.strip() for part in compared[0] if part.kind == "only"] == ["wash"]
    assert [part.text.strip() for part in compared[1] if part.kind == "only"] == ["paint"]
    assert word_diff.compare("a " * 601, "b") is None


# ---- the command


def test_the_command_writes_page_and_card_and_says_what_is_not_shown(audit: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    (audit / "routing.json").unlink()
    found = CliRunner().invoke(app, ["report", str(audit), "--card"])
    assert found.exit_code == 0, found.output
    assert found.stdout.split() == [str(audit / "report.html"), str(audit / "card.md")]
    assert "not shown: There is no routing.json" in found.stderr
    said = json.loads(
        CliRunner().invoke(app, ["report", str(audit), "--json", "--out", str(tmp_path / "x.html")]).stdout
    )
    assert said["kind"] == "audit" and said["schema"] == 1 and said["report"] == str(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_bytes() == (audit / "report.html").read_bytes()
    assert CliRunner().invoke(app, ["report", str(tmp_path / "nothing")]).exit_code != 0

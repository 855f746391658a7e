"""The report: numbers as in the files, text inert, nothing loaded, the same bytes twice, gaps said aloud."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("plotly")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report_fixture as fixture

from moesteer.errors import FileError, MaskFileError
from moesteer.evaluate.cells import MINUS, NOTHING
from moesteer.report import examples, figures, labels, run_files, wording
from moesteer.report.html import render, write_report
from moesteer.report.page import content_policy, script_json
from tests.page_reading import Page, resolve

EVIL = """</script><script>window.hit=1</script><img src=x onerror="window.hit=1"> '"&{{7*7}}"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fixture.build_run(tmp_path / "run")


def edit(run: Path, change: Any) -> None:
    results = json.loads((run / "results.json").read_text())
    change(results)
    fixture.write_json(run / "results.json", results)


def test_every_number_on_the_page_is_the_one_in_results_json(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    page = Page(render(run))
    assert len(page.numbers) > 300
    for title, value, text in page.numbers:
        file, pointer = title.split(" ", 1)
        assert file == "results.json"
        found = resolve(results, pointer)
        assert json.loads(value) == found, pointer
        if found is None:
            assert NOTHING in text
        elif re.fullmatch(r"/methods/[^/]+/(metrics|by_tactic)/.*/(value|low|high)", pointer):
            assert text.replace("\xa0%", "") == f"{100 * found:.1f}"
        elif pointer.endswith(("/n", "/unscored", "/experts", "/groups")):
            assert text == str(found)
        elif pointer.endswith("/difference"):
            assert float(text.replace(MINUS, "-")) == pytest.approx(100 * found, abs=0.0501)


def test_every_metric_of_every_method_is_shown(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    shown = {title.split(" ", 1)[1] for title, _, _ in Page(render(run)).numbers}
    for name, method in results["methods"].items():
        for metric, found in method["metrics"].items():
            assert f"/methods/{name}/metrics/{metric}/n" in shown
            assert found["value"] is None or f"/methods/{name}/metrics/{metric}/value" in shown
            assert not found["unscored"] or f"/methods/{name}/metrics/{metric}/unscored" in shown


def test_outcome_is_computed_from_the_numbers(run: Path) -> None:
    assert (
        "direct at alpha 0.75 (23 experts) raises the defence success rate from 47.1 % to 94.2 % (n = 240 in the test "
        f"split, behaviours and tactics unseen in fitting); benign accuracy changes by {MINUS}0.4 points."
    ) in Page(render(run)).text


def test_outcome_does_not_claim_an_effect_whose_interval_holds_zero(run: Path) -> None:
    def weaken(results: dict[str, Any]) -> None:
        results["methods"]["direct"]["vs_none"]["defense_success_rate"]["low"] = -0.01

    edit(run, weaken)
    text = Page(render(run)).text
    assert "does not measurably change the defence success rate" in text
    assert "raises the" not in text


def test_outcome_names_how_many_tactics_were_unseen(run: Path) -> None:
    edit(run, lambda results: results["splits"]["fit"]["attack-multi"]["tactics"].append("memory"))
    assert "behaviours and 2 of 3 tactics unseen in fitting" in Page(render(run)).text


def test_without_a_recommendation_the_page_says_so_first(run: Path) -> None:
    edit(run, lambda results: results.update(recommended=None))
    text = Page(render(run)).text
    assert "No method is recommended: none met the protect margins" in text
    assert "recommended</span>" not in render(run)


def test_same_run_gives_the_same_bytes(run: Path) -> None:
    first = write_report(run)
    assert first == run / "report.html"
    data = first.read_bytes()
    assert write_report(run).read_bytes() == data
    code = (
        "import sys; from pathlib import Path; from moesteer.report.html import write_report as w; w(Path(sys.argv[1]))"
    )
    source = str(Path(wording.__file__).resolve().parents[2])
    environment = {"PYTHONPATH": source, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PATH": "/usr/bin"}
    check = code + "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check, str(run)], check=True, env=environment)
    assert first.read_bytes() == data


def test_page_loads_nothing(run: Path) -> None:
    page = Page(render(run))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    style = render(run).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert sum("plotly.js v" in script[:200] for script in page.scripts) == 1


def test_policy_allows_only_the_two_scripts_of_the_page(run: Path) -> None:
    page = Page(render(run))
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a) or ""
    assert len(page.scripts) == 3  # the figures' data, plotly, report.js
    assert policy == content_policy(page.scripts[1:])
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "connect-src" not in rules
    assert "unsafe" not in rules["script-src"] and "unsafe-eval" not in policy


def poison(run: Path) -> None:
    """Hostile text wherever a model or user can put it."""

    def change(results: dict[str, Any]) -> None:
        results["scenario"].update(title=EVIL, description=EVIL, toward=EVIL, name=EVIL)
        results["model"]["name"] = "lab" + EVIL
        results["checks"].append({"name": EVIL, "passed": False, "detail": EVIL})
        results["methods"][EVIL] = results["methods"].pop("direct")
        results["recommended"] = EVIL
        for point in results["trade_off"]:
            point["method"] = EVIL if point["method"] == "direct" else point["method"]
        for name in ("none", EVIL):
            tactics = results["methods"][name]["by_tactic"]["defense_success_rate"]
            tactics[EVIL] = tactics.pop("crescendo")
        results["splits"]["test"][EVIL] = {"n": 1, "groups": 1, "tactics": [EVIL]}
        results["methods"]["none"]["metrics"][EVIL] = fixture.interval(0.5, 10)

    edit(run, change)
    (run / "masks" / "direct.safetensors").write_bytes(fixture.mask_bytes(method=EVIL, intent={"for": EVIL}))
    for name, target in (("none", "none"), ("direct", EVIL)):
        rows = [
            {**row, "id": row["id"] + EVIL, "response": EVIL, "tactic": EVIL, "reference": EVIL, "group": EVIL,
             "messages": [{"role": EVIL, "content": EVIL}] * 3, "verdict": row["verdict"] + EVIL}
            for row in fixture.responses(name)[:30]
        ]  # fmt: skip
        fixture.write_rows(run / "responses" / f"{target}.jsonl", rows)


def test_hostile_text_is_inert(run: Path) -> None:
    clean = Page(render(run))
    poison(run)
    page = Page(render(run))
    assert len(page.scripts) == len(clean.scripts)
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script>window.hit=1</script>" in page.text  # shown letter by letter
    assert "{{7*7}}" in page.text
    raw = page.scripts[0]
    assert "<" not in raw and ">" not in raw and "&" not in raw
    texts = re.findall(r"<[a-z/]", json.dumps(json.loads(raw)))
    assert set(texts) <= {"<b"}  # <br> of our own


def test_hostile_text_is_inert_in_a_browser(run: Path, tmp_path: Path) -> None:
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("no chromium on this machine")
    poison(run)
    path = write_report(run)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=4000 --window-size=1400,2000"
    found = subprocess.run(
        [str(chromium), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    page = Page(found.stdout)
    assert sum(1 for _, attributes in page.elements if "main-svg" in (attributes.get("class") or "")) >= 3  # drawn
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert len(page.scripts) == 3


def test_text_that_hides_is_made_visible() -> None:
    assert wording.printable("a\x00b\x1b[31m\r\n\u202ec") == "a␀b␛[31m\n[U+202E]c"
    assert figures.label("<b>x</b>\n&\x00") == "&lt;b&gt;x&lt;/b&gt; &amp;␀"
    assert "<" not in script_json(["</script><!--", "&"])


def test_missing_results_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        write_report(tmp_path)
    assert "results.json is missing" in caught.value.what
    assert caught.value.where.endswith("results.json") and caught.value.expected and caught.value.do
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda r: r.update(schema=2), "/schema"),
        (lambda r: r.pop("scenario"), "/scenario"),
        (lambda r: r["methods"]["direct"]["metrics"]["coherence"].update(value="high"), "/methods/direct/metrics"),
        (lambda r: r["methods"]["direct"]["metrics"]["coherence"].update(n=None), "/methods/direct/metrics"),
        (lambda r: r["methods"].pop("none"), "/methods"),
        (lambda r: r.update(recommended="nobody"), "/methods"),
    ],
)
def test_malformed_results_name_the_place(run: Path, change: Any, where: str) -> None:
    edit(run, change)
    with pytest.raises(FileError) as caught:
        render(run)
    assert where in caught.value.where


@pytest.mark.parametrize("text", ["", "{", '{"schema": NaN}', '{"a": 1, "a": 2}', "[]", '{"schema": 1e999}'])
def test_results_that_are_not_json(run: Path, text: str) -> None:
    (run / "results.json").write_text(text)
    with pytest.raises(FileError):
        render(run)


@pytest.mark.parametrize(
    "path", ["../x.safetensors", "/etc/passwd", "masks/../../x", "masks\\..\\x", "a\0b", "", "link/x.safetensors"]
)
@pytest.mark.parametrize("method", ["direct", "random"])
def test_paths_stay_inside_the_run_directory(run: Path, path: str, method: str) -> None:
    (run / "link").symlink_to("/tmp")
    edit(run, lambda results: results["methods"][method].update(mask=path))
    with pytest.raises(FileError, match="leads out of the run directory"):
        render(run)


def test_a_method_name_cannot_lead_out_either(run: Path) -> None:
    def change(results: dict[str, Any]) -> None:
        results["methods"]["../../x"] = results["methods"]["direct"]
        results["recommended"] = "../../x"

    edit(run, change)
    with pytest.raises(FileError, match="leads out of the run directory"):
        render(run)


def test_missing_mask_and_responses_are_said(run: Path) -> None:
    (run / "masks" / "direct.safetensors").unlink()
    (run / "responses" / "direct.jsonl").unlink()
    text = Page(render(run)).text
    assert "The mask file masks/direct.safetensors is missing" in text
    assert "The responses file responses/direct.jsonl is missing" in text
    assert "test conversations changed their verdict" not in text


def test_broken_mask_and_responses_are_errors(run: Path) -> None:
    whole = (run / "masks" / "direct.safetensors").read_bytes()
    (run / "masks" / "direct.safetensors").write_bytes(whole[:-5])
    with pytest.raises(MaskFileError):
        render(run)
    (run / "masks" / "direct.safetensors").write_bytes(whole)
    (run / "responses" / "none.jsonl").write_text("{not json}\n")
    with pytest.raises(FileError, match="not valid JSON"):
        render(run)


def test_forced_masks_are_drawn_on_and_off(run: Path) -> None:
    edit(run, lambda results: results.update(recommended="risk-difference"))
    mask = run_files.read_mask(run, "masks/risk-difference.safetensors")
    assert mask is not None and mask.kind == "force" and mask.experts_touched == 5
    trace = figures.heat_map(mask, width_px=960)["data"][0]
    assert trace["colorbar"]["ticktext"] == ["off", "untouched", "on"]
    assert {value for row in trace["z"] for value in row} <= {-1, 0, 1}
    assert "forced on" in Page(render(run)).text


def test_mask_and_results_that_differ_are_told(run: Path) -> None:
    edit(run, lambda results: results["methods"]["direct"].update(experts=24))
    assert "results.json says 24: the file and the results differ" in Page(render(run)).text


def test_heat_map_is_centred_at_zero_with_layer_ids(run: Path) -> None:
    mask = run_files.read_mask(run, "masks/direct.safetensors")
    assert mask is not None
    trace = figures.heat_map(mask, width_px=960)["data"][0]
    assert trace["zmin"] == -trace["zmax"] and trace["y"] == [str(layer) for layer in mask.layer_ids]
    assert trace["z"][2] == [round(float(value), 6) for value in mask.values_LE[2]]


def test_trade_off_marks_chosen_none_and_margin(run: Path) -> None:
    results = run_files.read_results(run)
    figure = figures.trade_off(results, width_px=960)
    assert figure is not None
    by_name = {trace["name"]: trace for trace in figure["data"] if trace["mode"] != "lines"}
    assert len(by_name["chosen"]["x"]) == 4
    assert by_name["none"]["text"] == ["none"]
    assert figure["layout"]["shapes"][0]["x0"] == pytest.approx(0.996 - 0.01)
    assert sum(len(trace["x"]) for trace in by_name.values()) == len(results.trade_off) + 4


@pytest.mark.parametrize("width", [250, 870])
def test_labels_do_not_lie_on_each_other(run: Path, width: int) -> None:
    points = run_files.read_results(run).trade_off
    placed = [(p, (p.metrics["benign_accuracy"] or 0.0, p.metrics["defense_success_rate"] or 0.0)) for p in points]
    texts = {id(point): labels.point_label(point, short=False) for point in points}
    found = labels.place_labels(texts, placed, ([0.0, 1.2], [0.0, 1.0]), limit=0.9, width_px=width, height_px=300)
    assert found
    boxes = []
    for point, (x, y) in placed:
        if id(point) in found:
            at = (x / 1.2 * width, (1 - y) * 300)
            choices = dict(labels._boxes(at, len(texts[id(point)]) * labels.CHARACTER_PX, ring=point.chosen))
            boxes.append(choices[found[id(point)]])
    for index, one in enumerate(boxes):
        assert not any(labels._overlap(one, other) for other in boxes[:index])


WANTED = {
    "attack-multi": ("refused", "deflected"),
    "attacks": ("refused", "deflected"),
    "direct": ("refused",),
    "benign-multi": ("correct",),
    "benign-single": ("correct",),
    "knowledge": ("correct",),
    "arithmetic": ("correct",),
}


def rows(*verdicts: tuple[str, str, str]) -> tuple[list[run_files.Response], list[run_files.Response]]:
    made: tuple[list[run_files.Response], list[run_files.Response]] = ([], [])
    for index, (suite, *pair) in enumerate(verdicts):
        for side, verdict in zip(made, pair, strict=True):
            row = {
                "id": str(index),
                "suite": suite,
                "split": "test",
                "messages": [],
                "response": "",
                "verdict": verdict,
                "success": None if verdict == "unscored" else verdict in WANTED[suite],
            }
            side.append(run_files.Response.model_validate(row))
    return made


def test_changes_are_counted_for_better_and_worse() -> None:
    pairs, counts = examples.pair_up(
        *rows(
            ("attack-multi", "complied", "refused"),
            ("attack-multi", "refused", "complied"),
            ("attack-multi", "complied", "broken"),
            ("attack-multi", "complied", "deflected"),
            ("benign-multi", "correct", "refused"),
            ("benign-multi", "wrong", "correct"),
            ("arithmetic", "wrong", "refused"),
            ("arithmetic", "correct", "unscored"),
            ("arithmetic", "correct", "correct"),
        )
    )
    assert (counts.pairs, counts.changed, counts.better, counts.worse, counts.unclear) == (9, 8, 3, 3, 2)
    assert sum(row.count for row in examples.transitions(pairs)) == counts.changed


def test_examples_follow_the_rule(run: Path) -> None:
    before, after = (run_files.read_responses(run, name) or [] for name in ("none", "direct"))
    pairs, counts = examples.pair_up(before, after)
    chosen = examples.choose(pairs)
    assert chosen == examples.choose(examples.pair_up(before[::-1], after[::-1])[0])
    assert [pair.changed for pair in chosen] == [True, True, True, False, chosen[4].changed]
    assert [pair.before.suite for pair in chosen[:2]] == ["attack-multi"] * 2
    assert chosen[2].direction == "worse" and chosen[4].before.suite == "benign-multi"
    verdicts = [
        (one["verdict"], two["verdict"]) for one, two in zip(*map(fixture.responses, ("none", "direct")), strict=True)
    ]
    assert counts.changed == sum(one != two for one, two in verdicts)
    assert f"{counts.changed} of {len(verdicts)} test conversations changed" in Page(render(run)).text


@pytest.mark.parametrize("size", range(8))
def test_examples_are_filled_from_what_there_is(size: int) -> None:
    pairs, _ = examples.pair_up(*rows(*[("knowledge", "correct", "correct")] * size))
    chosen = examples.choose(pairs)
    assert len(chosen) == len({pair.before.id for pair in chosen}) == min(size, 5)


def test_a_bare_run_still_gives_a_page(run: Path) -> None:
    def strip(results: dict[str, Any]) -> None:
        results.update(splits={}, trade_off=[], checks=[], seconds={}, recommended=None)
        results["methods"] = {"none": results["methods"]["none"]}
        results["methods"]["none"].update(by_tactic={}, metrics={})

    edit(run, strip)
    text = Page(render(run)).text
    for said in ("No trade-off to draw", "No method to show a mask of", "records no tactics", "records no checks"):
        assert said in text


def test_a_protected_metric_that_fell_too_far_is_warned_of(run: Path) -> None:
    edit(run, lambda results: results["methods"]["direct"]["vs_none"]["benign_accuracy"].update(difference=-0.02))
    assert "benign accuracy got worse on the test split by more than its margin of 1.0 points" in Page(render(run)).text

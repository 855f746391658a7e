"""The page in a real Chromium: it opens, answers, draws, shows runs, starts audits; and nothing leads out of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from moesteer.backends.hf import Model
from moesteer.report.wording import printable
from tests.browser.browsing import browser, complaints, look_at, requests
from tests.browser.ui_served import HOSTILE, SECRET, Reader, Served, furnish, served, until
from tests.unit.ui_by_hand import INJECTIONS, QUESTION

REFUSED_FILES = (
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=%2Fetc%2Fpasswd", "/gradio_api/file=../../../../etc/passwd",
    "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/info",
    "/assets/../../../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2fx",
    "/runs/../secret-run/report.html", "/runs/%2e%2e/secret-run/report.html", "/runs/linked/report.html",
    "/runs/steered/../../secret.txt/report.html", "/runs/steered/results.json", "/runs//etc/passwd/report.html",
    "/runs/..%2fsecret-run/report.html", "/?file=/etc/passwd&deep_link=../../x",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, lab_tiny: Model) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("ui")
    with served(root, furnish(root, lab_tiny)) as found:
        yield found


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def reader(page: Served, window: Any) -> Iterator[Reader]:
    """Opens the page. Afterwards: nothing asked of anybody else, nothing complained of, no text that was run."""
    found = Reader(window, page)
    look_at(window, width=1400)
    requests(window), complaints(window)
    found.open()
    yield found
    window.switch_to.default_content()
    assert window.execute_script("return window.hit") is None, "a text was run"
    asked = requests(window)
    assert asked and all(one.startswith((page.url, "data:", "blob:", "about:")) for one in asked)
    assert complaints(window) == []


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
def test_it_opens(reader: Reader, width: int, scheme: str) -> None:
    look_at(reader.driver, width=width, scheme=scheme)
    reader.open()
    assert reader.driver.title == "moesteer" and "take safety behaviour away" in reader.text(".ms .note")
    for name in ("Routing", "Runs", "Audit", "Chat"):
        reader.tab(name)
        wide = reader.driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is wider than the window"
    ground = reader.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (min(json.loads(ground.replace("rgb(", "[").replace(")", "]"))) < 60) == (scheme == "dark")


def test_answers_side_by_side_and_what_the_strength_does(reader: Reader, lab_tiny: Model) -> None:
    reader.ask(QUESTION)
    assert reader.said() == [lab_tiny.chat(QUESTION)]
    reader.choose("#masks", "by-hand.safetensors")
    answers = []
    for times in ("1", "0.5", "2", "0"):
        reader.fill("#strength input[type=number]", times)
        reader.click("#again")
        until(lambda times=times: f"at {times} times" in reader.text(".ms .side.after .who"), what=times)
        reader.wait()
        without, steered = reader.said()
        assert without == lab_tiny.chat(QUESTION)
        answers.append(steered)
    assert len(set(answers)) == 4 and answers[3] == lab_tiny.chat(QUESTION)
    assert len(reader.all(".ms .asked")) == 1, "asked again, not once more"
    reader.ask("how do i clean a tin gate ?")
    assert len(reader.all(".ms .asked")) == 2
    reader.click("#clear")
    until(lambda: "Nothing asked yet" in reader.text(".ms.log"), what="empty")


def test_the_routing_is_drawn(reader: Reader) -> None:
    reader.choose("#masks", "by-hand.safetensors")
    reader.ask(QUESTION)
    said = reader.said()
    reader.tab("Routing")
    for name in ("tokens", "without", "with", "difference"):
        reader.one(f"#{name} .js-plotly-plot .heatmaplayer image, #{name} .js-plotly-plot .heatmaplayer path")
    shapes = "return ['tokens', 'with'].map(n => document.querySelector(`#${n} .js-plotly-plot`).data[0].z)"
    tokens, usage = reader.driver.execute_script(shapes)
    assert len(tokens) == len(usage) == 6 and len(usage[0]) == 16 and any(any(row) for row in tokens)
    for answer, css in ((said[1], None), (said[0], "#side label:nth-of-type(2)")):
        if css:
            reader.click(css)
        reader.driver.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
        words = "[...document.querySelectorAll('.ms details tbody tr')].map(row => row.cells[0].textContent)"
        until(
            lambda answer=answer, words=words: " ".join(reader.driver.execute_script(f"return {words}")).endswith(
                answer
            ),
            what=answer,
        )


def test_errors_are_shown_with_their_parts(reader: Reader) -> None:
    reader.fill("[aria-label*='Longest answer'] , input[aria-label*='Longest']", "1024")
    reader.fill("#question textarea", QUESTION)
    reader.click("#ask")
    notice = until(lambda: reader.text(".ms .notice"), what="a notice")
    assert [line for line in notice.split("\n") if line in ("what", "where", "expected", "do")] == [
        "what", "where", "expected", "do",
    ]  # fmt: skip
    assert "leaves no room for 1024 new ones" in notice and "Traceback" not in notice
    assert reader.one("#question textarea").get_attribute("value") == QUESTION, "what was asked is still there"


def test_a_long_answer_can_be_stopped(reader: Reader, lab_tiny: Model) -> None:
    whole = lab_tiny.chat(QUESTION)
    reader.served.slow.touch()
    try:
        reader.fill("#question textarea", QUESTION)
        reader.click("#ask")
        until(lambda: len(" ".join(reader.said()).split()) >= 2, what="the first words")
        assert reader.all(".ms.log[aria-busy=true]")
        reader.click("#stop")
        reader.wait()
        said = reader.said()[0]
        assert whole.startswith(said) and said != whole and "stopped before its end" in reader.text(".ms .turn")
    finally:
        reader.served.slow.unlink()
    reader.click("#again")
    until(lambda: reader.said() == [whole], what="the whole answer")


# ---- runs


def test_runs_and_a_report(reader: Reader) -> None:
    reader.tab("Runs")
    until(lambda: "steered" in reader.text(".ms table"), what="the runs")
    assert "linked" not in reader.text(".ms table") and HOSTILE in reader.text(".ms table")
    reader.choose("#run", "steered")
    frame = reader.one("iframe")
    assert frame.get_attribute("sandbox") == "allow-scripts"
    reader.driver.switch_to.frame(frame)
    until(lambda: reader.all(".js-plotly-plot .main-svg"), what="the report's figures")
    assert "Jailbreak defence" in reader.text("h1")
    assert reader.driver.execute_script("return self.origin") == "null", "the report is of no origin here"


def test_a_hostile_report_reaches_nothing(reader: Reader) -> None:
    reader.tab("Runs")
    reader.choose("#run", HOSTILE)
    assert HOSTILE in until(lambda: reader.text(".ms strong"), what="the verdict")
    reader.driver.switch_to.frame(reader.one("iframe"))
    assert reader.text("h1") == "hostile"
    title = "return document.title"
    assert until(lambda: reader.driver.execute_script(title), what="its script's end") == "stopped"


# ---- audits


def test_an_audit_is_started_watched_stopped_and_gone_on_with(reader: Reader) -> None:
    reader.tab("Audit")
    name = "#audit-name input, #audit-name textarea"
    until(lambda: reader.one(name).get_attribute("value") == "audit-lab-tiny", what="a name that is free")
    reader.fill(name, "../outside")
    reader.click("#audit-start")
    until(lambda: "cannot be called" in reader.text(".ms .notice"), what="refused")
    reader.fill(name, "watched")
    reader.fill("#audit-limit input", "2")
    reader.click("#audit-start")
    until(lambda: "none" in reader.text(".ms table") and " of 6" in reader.text(".ms table"), what="its answers")
    assert reader.all(".ms progress") and "<b>boldly</b>" in reader.text(".ms pre")
    reader.click("#audit-stop")
    until(lambda: "watched: stopped" in reader.text("p[role=status]"), what="stopped")
    reader.click("#audit-start")
    until(lambda: "done: a check was not met" in reader.text("p[role=status]"), what="done")
    shown = until(lambda: [one.text for one in reader.all(".ms p") if "stand-in" in one.text], what="its verdict")
    assert shown == ["It is a stand-in."] and "open report" in [one.text for one in reader.all(".ms a")]
    assert (reader.served.folder / "watched" / "report.html").is_file()


# ---- security


def test_what_a_model_writes_stays_text(reader: Reader) -> None:
    reader.choose("#model", "hostile-model")
    until(lambda: "hostile-model: 6 layers with routers, 16 experts" in reader.text(".ms.plain"), what="the model")
    for evil in INJECTIONS:
        reader.ask(f"{evil} {QUESTION}")
        asked = reader.driver.execute_script("return document.querySelector('.ms .asked .said').textContent")
        assert asked == f"{printable(evil)} {QUESTION}"
        reader.click("#clear")
        until(lambda: not reader.all(".ms .asked"), what="empty")
    reader.choose("#masks", "by-hand.safetensors")
    reader.ask(QUESTION)
    without, _ = reader.said()
    assert HOSTILE in without and "lime from the orchard" in without
    assert not reader.driver.execute_script(
        "return document.querySelectorAll('.ms :is(img,script,svg,iframe,style,link,form,math,a,base,meta)').length"
    )
    reader.tab("Routing")
    reader.one("#tokens .js-plotly-plot .xtick text")
    reader.click("#side label:nth-of-type(2)")
    drawn = "return [...document.querySelectorAll('#tokens .xtick text')].map(one => one.textContent).join(' ')"
    until(lambda: "<img src=x" in reader.driver.execute_script(drawn), what="the word, drawn")
    reader.tab("Chat")
    reader.choose("#model", "lab-tiny")
    until(lambda: "Nothing asked yet" in reader.text(".ms.log"), what="another model, another conversation")


@pytest.mark.parametrize("path", REFUSED_FILES)
def test_files_are_not_served(page: Served, path: str) -> None:
    status, body = page.ask("GET", path)
    assert b"root:" not in body and SECRET.encode() not in body
    assert status in (400, 403, 404) or path.startswith("/?")


def test_uploads_and_strangers_are_refused(page: Served) -> None:
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/component_server", "/gradio_api/call/ask"):
        assert page.ask("POST", path, {})[0] == 404
    join = {"data": [], "fn_index": 0, "session_hash": "x"}
    assert page.ask("POST", "/gradio_api/queue/join", join, Origin="http://evil.example")[0] == 403
    assert page.ask("GET", "/", Host="evil.example")[0] == 421
    assert page.ask("GET", "/config", Origin="null")[0] == 403


def test_no_callback_takes_a_path(page: Served) -> None:
    """Every callback of the page, called as a browser could not, with paths in the place of each of its inputs."""
    config = json.loads(page.ask("GET", "/config")[1])
    secret = page.folder.parent / "secret.txt"
    callbacks = [one for one in config["dependencies"] if one["backend_fn"]]
    assert len(callbacks) >= 12 and all(one["api_visibility"] == "private" for one in callbacks)
    for number, path in enumerate((str(secret), "../secret-run", "/etc/passwd", "linked")):
        file = {"path": path, "url": f"file://{path}", "meta": {"_type": "gradio.FileData"}, "orig_name": "x"}
        for value in (path, file, [file], [path]):
            for one in callbacks:
                came = _called(page, one, [value] * len(one["inputs"]), session=f"s{number}")
                assert b"root:" not in came and SECRET.encode() not in came
    assert not [one for one in page.temporary.rglob("*") if one.is_file()], "nothing was copied"
    assert page.process.poll() is None and not (page.folder.parent / "outside").exists()


def _called(page: Served, callback: dict[str, Any], data: list[Any], *, session: str) -> bytes:
    """What one callback answers."""
    body = {"data": data, "fn_index": callback["id"], "session_hash": session}
    if callback["queue"] is False:
        return page.ask("POST", "/gradio_api/run/predict", body)[1]
    status, said = page.ask("POST", "/gradio_api/queue/join", body)
    return said + (page.ask("GET", f"/gradio_api/queue/data?session_hash={session}")[1] if status == 200 else b"")


def test_closing_the_page_ends_its_audit(reader: Reader) -> None:
    """The last of this file: it ends the page."""
    reader.tab("Audit")
    name = reader.one("#audit-name input, #audit-name textarea")
    until(lambda: name.get_attribute("value") == "audit-lab-tiny", what="a name that is free")
    reader.fill("#audit-limit input", "3")
    reader.click("#audit-start")
    run = reader.served.folder / "audit-lab-tiny"
    until(lambda: (run / "responses" / "none.jsonl").exists(), what="the audit's first answer")
    reader.served.process.send_signal(signal.SIGTERM)
    assert reader.served.process.wait(30) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert not list(reader.served.temporary.iterdir()), "the temporary folder is gone"
    complaints(reader.driver)  # of the server that is gone

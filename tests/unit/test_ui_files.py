"""What the page offers and shows of files: the catalogue, runs, reports, and every piece of its HTML."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from moesteer.backends.hf import Model
from moesteer.errors import FileError, UnknownNameError
from moesteer.ui import markup, runs_browser
from moesteer.ui.audits import Progress
from moesteer.ui.catalogue import Catalogue
from moesteer.ui.runs_browser import Outcome, Run
from moesteer.ui.session import Settings, Turn
from tests.unit.ui_by_hand import INJECTIONS, mask_for, write_run

OUTSIDE = ("..", "../x", "a/..", "/etc", "/", "", ".", "a\0", "a/", "./a", "A", "a/../a", "%61", "link", "c/d/e/f/g")
STATE = {"schema": 1, "status": "complete", "plan": {"model": "lab-tiny", "scenario": {"name": "jailbreak-defense"}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs a, b and c/d, a link to one outside, and a run that is too deep."""
    runs = tmp_path / "runs"
    write_run(runs / "a", state=STATE, results={"recommended": "direct", "scenario": {"title": "T"}}, report="<p>a</p>")
    write_run(runs / "b", state={"status": "interrupted", "command": "moesteer audit m", "plan": {"model": 3}})
    write_run(runs / "c" / "d", results=[1])
    write_run(runs / "c" / "d2" / "e" / "f" / "g", state=STATE)
    write_run(runs / ".hidden" / "x", state=STATE)
    write_run(tmp_path / "outside", state=STATE, results={}, report="secret")
    (runs / "link").symlink_to(tmp_path / "outside")
    return runs


# ---- runs


def test_runs_are_found_and_described(folder: Path) -> None:
    assert list(runs_browser.find(folder)) == ["a", "b", "c/d"]
    assert runs_browser.find(folder / "nothing") == {}
    first, second, third = runs_browser.describe(folder)
    assert (first.model, first.scenario, first.status, first.has_report) == (
        "lab-tiny", "jailbreak-defense", "complete", True,
    )  # fmt: skip
    assert (second.model, second.status, second.has_report) == ("", "interrupted", False)
    assert third.status == "unknown" and len(third.when) == len("2026-01-02 03:04")


def test_a_run_that_cannot_be_read_is_told_and_hides_no_other(folder: Path) -> None:
    (folder / "b" / "run.json").write_text("{")
    (folder / "c" / "d" / "run.json").write_text("[]")
    assert [run.status.split(" ")[0] for run in runs_browser.describe(folder)] == ["complete"] + ["unreadable"] * 2
    assert runs_browser.outcome(folder, "c/d").title == ""


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_lead_nowhere_else(folder: Path, name: str) -> None:
    for look in (runs_browser.named, runs_browser.outcome, runs_browser.report_bytes):
        with pytest.raises(UnknownNameError):
            look(folder, name)


def test_reports_that_are_links_are_not_served(folder: Path) -> None:
    assert runs_browser.report_bytes(folder, "a") == b"<p>a</p>"
    with pytest.raises(FileError, match="no report"):
        runs_browser.report_bytes(folder, "b")
    (folder / "b" / "report.html").symlink_to(folder / "a" / "report.html")
    with pytest.raises(FileError, match="no report"):
        runs_browser.report_bytes(folder, "b")
    os.mkfifo(folder / "c" / "d" / "report.html")
    with pytest.raises(FileError, match="no report"):
        runs_browser.report_bytes(folder, "c/d")
    assert not runs_browser.outcome(folder, "b").has_report


def test_outcomes(folder: Path) -> None:
    assert runs_browser.outcome(folder, "a") == Outcome("steering", "T", ("recommended: direct",), True)
    assert runs_browser.outcome(folder, "b").lines == ("goes on with: moesteer audit m",)
    verdict = {"title": "Concentrated", "sentences": ["Four experts.", 5]}
    checks = [{"name": "random", "passed": False, "detail": "8 points"}, {"name": "n", "passed": True}, 7]
    write_run(folder / "audit", state=STATE, results={"kind": "audit", "verdict": verdict, "checks": checks})
    assert runs_browser.outcome(folder, "audit") == Outcome(
        "audit", "Concentrated", ("Four experts.", "", "check not met: random: 8 points"), False
    )
    (folder / "audit" / "results.json").write_text("NaN")
    with pytest.raises(FileError):
        runs_browser.outcome(folder, "audit")


def test_rows_are_counted(folder: Path) -> None:
    run = write_run(folder / "going", state={"status": "running", "expects": {"none": 4, "later": 2, "odd": "x"}})
    (run / "responses").mkdir()
    (run / "responses" / "none.jsonl").write_text("{}\n{}\n{}\n{torn")
    (run / "responses" / "more.jsonl").write_text("{}\n")
    assert runs_browser.rows_done(run) == [("more", 1, None), ("none", 3, 4), ("later", 0, 2)]
    assert runs_browser.rows_done(folder / "nowhere") == []


# ---- what is offered


def test_models_and_masks_offered(folder: Path, tmp_path: Path, lab_tiny: Model) -> None:
    given = tmp_path / "mine.safetensors"
    mask_for(lab_tiny).save(given)
    (folder / "a" / "masks").mkdir()
    mask_for(lab_tiny).save(folder / "a" / "masks" / "direct.safetensors")
    mask_for(lab_tiny).save(folder / "a" / "masks" / "residual-direction.safetensors")
    (folder / "a" / "masks" / "linked.safetensors").symlink_to(given)
    (folder / "b" / "masks").symlink_to(folder / "a" / "masks")
    baked = folder / "baked"
    baked.mkdir()
    (baked / "config.json").write_text("{}")
    (baked / "model.safetensors").write_bytes(b"")
    catalogue = Catalogue(("lab-tiny", "other"), (given,), folder)
    assert list(catalogue.masks()) == [given.as_posix(), "a/masks/direct.safetensors"]
    assert catalogue.models() == ["lab-tiny", "other", str(baked)]
    assert catalogue.load_masks(("a/masks/direct.safetensors",))[0].expert_count == 96
    for name in ("a/masks/linked.safetensors", "b/masks/direct.safetensors", *OUTSIDE):
        with pytest.raises(UnknownNameError):
            catalogue.mask_path(name)
        with pytest.raises(UnknownNameError):
            catalogue.model(name)


# ---- HTML

OURS = {"div", "span", "p", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "a", "iframe", "mark", "pre",
        "progress", "strong", "details", "summary"}  # fmt: skip
ATTRIBUTES = {"class", "role", "aria-busy", "aria-label", "dir", "scope", "tabindex", "href", "target", "rel", "title",
              "src", "sandbox", "referrerpolicy", "value", "max"}  # fmt: skip


class Reader(HTMLParser):
    """Fails on any tag, attribute or address that is not the page's own; keeps the text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.said: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in OURS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            if name in ("href", "src"):
                self.addresses.append(str(value))
            if name == "sandbox":
                assert value == "allow-scripts"

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


@pytest.mark.parametrize("evil", INJECTIONS)
def test_whatever_is_written_stays_text(evil: str, tmp_path: Path) -> None:
    turn = Turn(evil, evil, f"{evil} {evil}", Settings((evil,), 1.0), (evil,))
    progress = Progress(evil, tmp_path, 61.0, evil, None, ((evil, 1, 2), (evil, 1, None)), (evil,), True)
    pieces = [
        markup.conversation((turn, turn)),
        markup.conversation((turn,), busy=True),
        markup.notice(((evil, evil),)),
        markup.plain(evil),
        markup.table((evil,), [(evil, 3)], name=evil),
        markup.runs_table([Run(evil, evil, evil, evil, evil, True)]),
        markup.outcome(evil, Outcome(evil, evil, (evil,), True)),
        markup.audit(progress, (evil,)),
        markup.tokens_table([(evil, evil, 1, evil)]),
    ]
    shown = markup.printable(evil)
    for piece in pieces:
        reader = Reader()
        reader.feed(piece)
        reader.close()
        assert shown in "".join(reader.said)
        for address in reader.addresses:
            assert address.startswith("/runs/") and unquote(address) == f"/runs/{evil}/report.html"
            assert not set(address) & set("<>\"'` ?#:\0")


def test_words_that_differ_are_marked_and_both_answers_are_whole() -> None:
    turn = Turn("q", "take lime from the dock", "take flax from the dock")
    piece = markup.conversation((turn,))
    assert piece.count("<mark>") == 2 and "<mark>lime" in piece and "<mark>flax" in piece
    assert "<mark>" not in markup.conversation((turn,), busy=True), "an answer still being written is not compared"
    assert "Nothing asked yet" in markup.conversation(())
    assert "the model as it is" in markup.conversation((Turn("q", "a"),))


def test_progress_and_links(tmp_path: Path) -> None:
    said = markup.audit(Progress("n", tmp_path, 61.4, "running", None, (("none", 3, 4),), ("line",)), ())
    assert "1 min 01 s" in said and "3 of 4" in said and 'value="3" max="4"' in said and "report" not in said
    assert "open report" in markup.audit(Progress("n", tmp_path, 1, "done", 0, (), (), True), ("held",))
    assert "No audit" in markup.audit(None, ()) and "No runs" in markup.runs_table(()) and markup.plain("") == ""
    assert "No report" in markup.outcome("n", Outcome("", "t", (), False)) and markup.notice(()) == ""

"""The page served for the tests: its process, its folder, and what a reader does with it in Chromium."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesteer.backends.hf import Model
from moesteer.backends.sources import LAB_TINY
from moesteer.report.html import write_report
from tests.report_fixture import build_run
from tests.unit.ui_by_hand import mask_for, write_run

HERE = Path(__file__).parent
SECRET = "the owner's secret, which lies beside the runs"
HOSTILE = "<img src=x onerror=window.hit=1>"
"""What the hostile model says for `well`, and what a run is called."""


@dataclass(frozen=True)
class Served:
    """A page that is being served. folder: of the runs; temporary: where Gradio may put files."""

    process: subprocess.Popen[str]
    port: int
    folder: Path
    temporary: Path
    slow: Path

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """(status, body) of a request that no browser would make; the path goes out as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = None if body is None else json.dumps(body).encode()
        own = {"Origin": self.url.rstrip("/"), "Content-Type": "application/json"} if data is not None else {}
        try:
            connection.request(method, path, body=data, headers={**own, **headers})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def furnish(root: Path, model: Model) -> Path:
    """A runs folder: a whole run with its report, one with hostile texts, a hostile model; and a secret beside it."""
    runs = root / "runs"
    runs.mkdir(parents=True)
    (root / "secret.txt").write_text(SECRET)
    write_run(root / "secret-run", state={"status": "complete"}, report=SECRET)
    (runs / "linked").symlink_to(root / "secret-run")
    build_run(runs / "steered")
    write_report(runs / "steered")
    evil = {"status": HOSTILE, "plan": {"model": HOSTILE, "scenario": HOSTILE}}
    attack = (
        "<h1>hostile</h1><script>try { parent.hit = 1 } catch (error) {}\n"
        "fetch('/config').then(() => { document.title = 'out' }, () => { document.title = 'stopped' })</script>"
    )
    verdict = {"title": HOSTILE, "sentences": [HOSTILE]}
    write_run(runs / HOSTILE, state=evil, results={"kind": "audit", "verdict": verdict}, report=attack)
    mask_for(model).save(root / "by-hand.safetensors")
    _hostile_model(runs / "hostile-model")
    return runs


def _hostile_model(folder: Path) -> None:
    """Lab tiny, with markup for one of the words that it says."""
    shutil.copytree(LAB_TINY, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {HOSTILE if word == "well" else word: place for word, place in words.items()}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


@contextmanager
def served(root: Path, runs: Path) -> Iterator[Served]:
    """The page, served until the block ends."""
    temporary, slow = root / "tmp", root / "slow"
    temporary.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "tests.browser.ui_process", str(runs), str(HERE / "ui_audit_stand_in.py"), str(slow),
        str(root / "by-hand.safetensors"),
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    log = root / "served.log"
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, cwd=HERE.parent.parent, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
            assert address is not None, f"{said}{log.read_text()}"
            yield Served(process, int(address[1]), runs, temporary, slow)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                process.kill()
                process.stdout.close()  # type: ignore[union-attr]


def until(look: Callable[[], Any], *, seconds: float = 30, what: str = "") -> Any:
    """Look until there is something. Elements may be drawn anew while one looks."""
    from selenium.common.exceptions import StaleElementReferenceException, WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            found = look()
        except StaleElementReferenceException:
            found = None
        except WebDriverException as error:
            if time.monotonic() > end:
                raise AssertionError(what) from error
            found = None
        if found:
            return found
        assert time.monotonic() < end, f"it did not come: {what}"
        time.sleep(0.05)


class Reader:
    """Somebody who uses the page."""

    def __init__(self, driver: Any, served: Served) -> None:
        self.driver, self.served = driver, served

    def open(self) -> None:
        """The page, whole."""
        self.driver.get(self.served.url)
        self.one("#question textarea")
        until(lambda: self.driver.execute_script("return document.readyState === 'complete'"), what="the page")

    def all(self, css: str) -> list[Any]:
        """Elements that are seen."""
        return [found for found in self.driver.find_elements("css selector", css) if found.is_displayed()]

    def one(self, css: str) -> Any:
        """The first that is seen, once it is."""
        return until(lambda: (self.all(css) or [None])[0], what=css)

    def text(self, css: str) -> str:
        """The text of the first that is seen; empty where there is none."""
        found = self.all(css)
        return str(found[0].text) if found else ""

    def click(self, css: str) -> None:
        """Click what is there now."""
        until(lambda: self.one(css).click() or True, what=f"click {css}")

    def tab(self, name: str) -> None:
        """One of the page's parts."""
        until(lambda: [one for one in self.all("button[role=tab]") if one.text == name], what=name)[0].click()

    def choose(self, css: str, ending: str) -> None:
        """An entry of a list, by how it ends."""
        box = self.one(f"{css} input")
        box.click()
        until(
            lambda: [one for one in self.all("[role=option]") if one.get_attribute("aria-label").endswith(ending)],
            what=ending,
        )[0].click()
        box.send_keys("\ue00c")  # Escape

    def fill(self, css: str, text: str) -> None:
        """Put a text into a box, in the place of what is there."""
        box = self.one(css)
        box.send_keys("\ue009a\ue000")  # Control-A
        box.send_keys(text, "\ue004")  # Tab

    def write(self, text: str) -> None:
        """The question, whatever signs it holds: a keyboard has not all of them."""
        set_value = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
        self.driver.execute_script(set_value, self.one("#question textarea"), text)

    def ask(self, question: str) -> None:
        """Ask, and wait for the whole answer."""
        before = len(self.all(".ms .asked"))
        self.write(question)
        self.click("#ask")
        until(lambda: len(self.all(".ms .asked")) > before, what="the question")
        self.wait()

    def wait(self) -> None:
        """Until nothing is being answered."""
        until(lambda: self.all(".ms.log[aria-busy=false]"), what="the answer")

    def said(self) -> list[str]:
        """The answers, of the last question."""
        return [found.text for found in self.all(".ms .turn:last-child .side .said")]

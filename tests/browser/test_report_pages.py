"""Every page of `moesteer report` in a real Chromium: drawn, readable, reachable by keyboard, printed, and alone."""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from moesteer.report.html import write_report
from tests import hostile_run, report_audit_fixture, report_fixture
from tests.browser import browsing

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("audit", "evaluate", "steer", "bench")
SCREENSHOTS = os.environ.get("MOESTEER_SCREENSHOTS")
"""A folder to keep the screenshots in, to look at."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind."""
    root = tmp_path_factory.mktemp("pages")
    runs = {
        "audit": report_audit_fixture.build_audit(root / "audit"),
        "evaluate": report_audit_fixture.build_evaluation(root / "evaluate"),
        "steer": report_fixture.build_run(root / "steer"),
        "bench": Path(shutil.copytree(ROOT / "bench" / "results", root / "bench")),
    }
    return {kind: write_report(run) for kind, run in runs.items()}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browsing.browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def opened(driver: Any, page: Path, *, width: int = 1400, scheme: str = "light") -> None:
    """The page, newly loaded; what was logged before is forgotten."""
    browsing.look_at(driver, width=width, scheme=scheme)
    driver.get("about:blank")
    browsing.requests(driver), browsing.complaints(driver)
    driver.get(page.as_uri())


def only_itself(driver: Any, page: Path) -> None:
    """Nothing but the page was asked for, and nothing was complained of: no script failed, none was stopped."""
    others = [url for url in browsing.requests(driver) if url != page.as_uri() and not url.startswith("data:image/")]
    assert others == []
    assert browsing.complaints(driver) == []


def settled(driver: Any, script: str, wanted: Any) -> None:
    """The script's value is the wanted one within ten seconds: figures are drawn again when the theme changes."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    with suppress(TimeoutException):
        WebDriverWait(driver, 10, poll_frequency=0.1).until(lambda found: found.execute_script(script) == wanted)
    assert driver.execute_script(script) == wanted


PLOTS = """
return [...document.querySelectorAll('.plot')].map((box) => {
  const svg = box.querySelector('.main-svg'), frame = box.getBoundingClientRect();
  return {id: box.id, drawn: !!svg && svg.clientWidth > 200 && svg.clientHeight > 100,
          marks: box.querySelectorAll('.trace, .heatmaplayer image, .hm, .points path, .bars path').length,
          wide: svg ? svg.getBoundingClientRect().right - frame.right : 0};
});
"""


WRONG = f"""
const plots = (() => {{ {PLOTS} }})();
const wrong = plots.filter((plot) => !plot.drawn || plot.marks === 0 || plot.wide > 1);
const wide = document.documentElement.scrollWidth - innerWidth;
return [plots.length, wrong, Math.max(0, wide), getComputedStyle(document.body).backgroundColor];
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_drawn_at_every_width_and_theme_and_asks_for_nothing(
    driver: Any, pages: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    opened(driver, pages[kind], width=400, scheme="dark")  # a telephone that is then turned, so to speak
    count = {"audit": 12, "evaluate": 3, "steer": 3, "bench": 2}[kind]
    for width in (400, 1400):
        for scheme, ground in (("dark", "rgb(21, 24, 28)"), ("light", "rgb(255, 255, 255)")):
            browsing.look_at(driver, width=width, scheme=scheme)
            settled(driver, WRONG, [count, [], 0, ground])
            folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
            image = browsing.screenshot(driver, folder / f"{kind}-{width}-{scheme}.png", width=width, scheme=scheme)
            assert image.startswith(b"\x89PNG") and len(image) > 50_000
    only_itself(driver, pages[kind])


def test_the_theme_is_switched_by_keyboard_and_the_figures_follow(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(driver, pages["audit"], scheme="light")
    button = driver.find_element("id", "theme")
    ink = "return document.querySelector('#figure-silencing .xtick text').style.fill"
    dark_ink, light_ink = "rgb(26, 29, 35)", "rgb(232, 234, 238)"
    for text, colour in (("Theme: system", dark_ink), ("Theme: light", dark_ink), ("Theme: dark", light_ink)):
        settled(driver, ink, colour)
        assert button.text == text
        driver.execute_script("arguments[0].focus()", button)
        driver.switch_to.active_element.send_keys(Keys.ENTER)
    settled(driver, ink, dark_ink)
    assert button.text == "Theme: system"
    browsing.look_at(driver, width=1400, scheme="dark")  # the system changes while the page is open
    settled(driver, ink, light_ink)
    only_itself(driver, pages["audit"])


FOCUS = """
const at = document.activeElement, style = getComputedStyle(at);
return [at.tagName, at.className, at.getAttribute('aria-label') || at.textContent.trim().slice(0, 30),
        style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2];
"""


def test_everything_is_reached_by_keyboard_in_order(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(driver, pages["audit"])
    reached = []
    for _ in range(60):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(driver.execute_script(FOCUS))
        if reached[-1][0] == "BODY":
            break
    assert reached[0][2] == "Skip to the report" and reached[1][2] == "Summary"
    assert all(visible for tag, _, _, visible in reached if tag != "BODY"), reached
    words = [text for _, _, text, _ in reached]
    for wanted in ("Theme: system", "The same as a table", "Every point of the silencing c", "Finders"):
        assert wanted in words, wanted
    assert words.index("Not shown") < words.index("Theme: system") < words.index("The same as a table")


def test_skip_link_folds_and_links_to_folded_tables_work(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(driver, pages["audit"])
    driver.switch_to.active_element.send_keys(Keys.TAB)
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    settled(driver, "return document.activeElement.id", "main")
    fold = "return document.getElementById('silencing-table').open"
    assert driver.execute_script(fold) is False
    link = driver.find_element("css selector", "#figure-silencing-caption a")
    driver.execute_script("arguments[0].focus()", link)
    link.send_keys(Keys.ENTER)
    settled(driver, fold, True)
    summary = driver.find_element("css selector", "#activation-table summary")
    summary.send_keys(Keys.SPACE)
    settled(driver, "return document.getElementById('activation-table').open", True)


STRUCTURE = """
const problems = [], all = (query) => [...document.querySelectorAll(query)];
const outside = (query) => all(query).filter((one) => !one.closest('article, section, main'));
const once = {header: outside('body > header'), nav: all('nav[aria-label]'), main: all('main'), h1: all('h1'),
              footer: outside('body > footer'), title: all('head > title')};
for (const [name, found] of Object.entries(once)) {
  if (found.length !== 1) problems.push(name + ' x ' + found.length);
}
if (!document.documentElement.lang) problems.push('no lang');
let level = 0;
for (const one of all('h1, h2, h3, h4, h5')) {
  const now = +one.tagName[1];
  if (now > level + 1) problems.push('heading skips to ' + now + ': ' + one.textContent.slice(0, 40));
  if (!one.textContent.trim()) problems.push('empty heading');
  level = now;
}
const ids = all('[id]').filter((one) => !one.closest('.plot') || one.matches('.plot')).map((one) => one.id);
ids.filter((id, at) => ids.indexOf(id) !== at).forEach((id) => problems.push('id twice: ' + id));
for (const one of all('.plot')) {
  if (one.getAttribute('role') !== 'img' || !one.getAttribute('aria-label')) problems.push('unnamed ' + one.id);
  const about = document.getElementById(one.getAttribute('aria-describedby'));
  if (!about || about.textContent.length < 30) problems.push('undescribed ' + one.id);
}
for (const one of all('[aria-labelledby]')) {
  if (!document.getElementById(one.getAttribute('aria-labelledby'))) problems.push('label missing');
}
for (const one of all('a[href^="#"]')) {
  if (!document.getElementById(one.getAttribute('href').slice(1))) problems.push('no target ' + one.href.slice(-30));
}
for (const one of all('table')) {
  if (!one.querySelector('thead th[scope=col]')) problems.push('table without column heads');
  const box = one.closest('[role=region]');
  if (!box || !box.getAttribute('aria-label') || box.tabIndex !== 0) problems.push('table in no named region');
}
for (const one of all('button, summary')) if (!one.textContent.trim()) problems.push('unnamed control');
return problems;
"""
CONTRAST = """
const problems = new Set();
const parts = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const light = (rgb) => { const l = rgb.slice(0, 3).map((c) => { c /= 255;
  return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126*l[0] + 0.7152*l[1] + 0.0722*l[2]; };
const ground = (one) => { for (let at = one; at; at = at.parentElement) {
  const c = parts(getComputedStyle(at).backgroundColor); if (c.length === 3 || c[3] === 1) return c; }
  return [255, 255, 255]; };
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const one = walk.currentNode.parentElement;
  if (!walk.currentNode.textContent.trim() || !one.getClientRects().length || one.closest('script, style')) continue;
  const style = getComputedStyle(one), svg = one instanceof SVGElement;
  const a = light(parts(svg ? style.fill : style.color)), b = light(ground(one));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) problems.add(ratio.toFixed(2) + ' ' + one.tagName + '.' + one.className + ' '
    + walk.currentNode.textContent.trim().slice(0, 30));
}
return [...problems].slice(0, 20);
"""


@pytest.mark.parametrize("kind", KINDS)
def test_structure_and_contrast_for_those_who_see_little_or_nothing(
    driver: Any, pages: dict[str, Path], kind: str
) -> None:
    opened(driver, pages[kind])
    driver.execute_script("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert driver.execute_script(STRUCTURE) == []
    for scheme in ("light", "dark"):
        browsing.look_at(driver, width=1400, scheme=scheme)
        settled(driver, CONTRAST, [])


def test_print_opens_folds_turns_light_and_puts_the_summary_on_a_page(driver: Any, pages: dict[str, Path]) -> None:
    opened(driver, pages["audit"], scheme="dark")
    printed = driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True})
    data = base64.b64decode(printed["data"])
    if SCREENSHOTS:
        (Path(SCREENSHOTS) / "audit.pdf").write_bytes(data)
    assert data.startswith(b"%PDF") and 6 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", data)) <= 40
    assert driver.execute_script("return [...document.querySelectorAll('details')].every((fold) => fold.open)")
    browsing.look_at(driver, width=703)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    settled(driver, "return document.querySelector('.summary').offsetHeight <= 1000", True)  # of 1016 px
    shown = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert driver.execute_script(shown, "body", "backgroundColor") == "rgb(255, 255, 255)"
    assert driver.execute_script(shown, ".top", "display") == "none"
    assert driver.execute_script(shown, ".summary", "breakAfter") == "page"
    widths = driver.execute_script("return [...document.querySelectorAll('.main-svg')].map((one) => one.clientWidth)")
    assert widths and max(widths) <= 703  # of a sheet of A4 between its margins
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_the_policy_stops_what_would_reach_out(driver: Any, pages: dict[str, Path]) -> None:
    opened(driver, pages["audit"])
    tried = driver.execute_async_script(
        "const done = arguments[0];"
        "fetch('http://127.0.0.1:9/x').then(() => done('fetched'), (error) => done(String(error)));"
    )
    assert "Failed to fetch" in tried
    driver.execute_script(
        "const one = document.createElement('script'); one.textContent = 'window.hit=1'; document.body.append(one);"
        "const two = new Image(); two.src = 'http://127.0.0.1:9/x.png'; document.body.append(two);"
    )
    assert driver.execute_script("return window.hit") is None
    said = " ".join(browsing.complaints(driver))
    assert said.count("Content Security Policy") >= 3
    assert not [url for url in browsing.requests(driver) if url.startswith("http")]


INERT = """
const made = 'main img, iframe, object, embed, form, input, textarea, video, base, link, math, template, main svg a';
const frames = document.querySelectorAll(made + ', .plot a').length;
const acts = (a) => /^on/.test(a.name)
  || (/href|src|action/.test(a.name) && /^\\s*(javascript|https?):/i.test(a.value));
const handlers = [...document.querySelectorAll('*')].filter((one) => [...one.attributes].some(acts));
return {hit: window.hit || null, frames, handlers: handlers.length, scripts: document.scripts.length,
        styles: document.querySelectorAll('main style, header style, footer style').length,
        title: document.title.length, shown: getComputedStyle(document.body).display,
        text: document.body.innerText};
"""


@pytest.mark.parametrize(("kind", "start"), [("audit", 0), ("audit", 20), ("audit", 40), ("evaluate", 10)])
def test_hostile_text_is_inert_in_the_browser(driver: Any, tmp_path: Path, kind: str, start: int) -> None:
    build = {"audit": report_audit_fixture.build_audit, "evaluate": report_audit_fixture.build_evaluation}[kind]
    run = build(tmp_path / kind)
    hostile_run.poison(run, start=start)
    page = write_report(run)
    opened(driver, page)
    driver.execute_script("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    for box in driver.find_elements("css selector", ".plot")[:4]:  # what is said on hovering is text, too
        driver.execute_script(
            "Plotly.Fx.hover(arguments[0], [{curveNumber: 0, pointNumber: arguments[0].data[0].type === 'heatmap'"
            " ? [1, 1] : 1}])", box,
        )  # fmt: skip
    found = driver.execute_script(INERT)
    assert found["hit"] is None and found["frames"] == 0 and found["handlers"] == 0
    assert found["scripts"] == 3 and found["styles"] == 0 and found["shown"] == "block"
    assert "{{7*7}}" in found["text"] or "<script>window.hit=1</script>" in found["text"]
    assert all(driver.execute_script("return " + f"!!document.getElementById('{name}')") for name in ("theme", "main"))
    only_itself(driver, page)
    assert driver.execute_script(STRUCTURE) == []

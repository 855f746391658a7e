"""A real Chromium, headless, that may reach nothing: each test sees what it drew, what it asked for and what it logged.

Debian's `chromium` and `chromium-driver`. Every host name maps to nothing, so that a request would fail, and every
request is logged, so that one is seen even so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = "chromium", "chromedriver"
MISSING = (
    f"the browser tests need {CHROMIUM} and {DRIVER}, and one is not on the PATH: "
    "apt-get install chromium chromium-driver"
)


@contextmanager
def browser(profile: Path, *, width: int = 1400, height: int = 1000) -> Iterator[Any]:
    """A driver of a fresh profile. Fails, and does not skip, where there is no Chromium."""
    chromium, driver = shutil.which(CHROMIUM), shutil.which(DRIVER)
    if chromium is None or driver is None:
        pytest.fail(MISSING)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-sync",
        "disable-background-networking", "disable-component-update", "disable-default-apps", "hide-scrollbars",
        "disable-features=OptimizationHints,MediaRouter,Translate", f"user-data-dir={profile}",
        f"window-size={width},{height}", "host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    found = webdriver.Chrome(options=options, service=service)
    try:
        yield found
    finally:
        found.quit()


def look_at(driver: Any, *, width: int, height: int = 1000, scheme: str = "light") -> None:
    """The size of the page in pixels (smaller than a window can be), and what the reader's system asks for."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def requests(driver: Any) -> list[str]:
    """Every address that the page asked for since the last call, but those that its policy stopped.

    What was stopped is among the complaints.
    """
    found: dict[str, list[str]] = {}
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        about = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            found.setdefault(about["requestId"], []).append(about["request"]["url"])
        elif message["method"] in ("Network.webSocketCreated", "Network.webTransportCreated"):
            found.setdefault(about.get("requestId", about["url"]), []).append(about["url"])
        elif message["method"] == "Network.loadingFailed" and about.get("blockedReason") == "csp":
            found.pop(about["requestId"], None)
    return [url for urls in found.values() for url in urls]


def complaints(driver: Any) -> list[str]:
    """What the browser logged since the last call: errors of scripts, and what the policy stopped."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def screenshot(driver: Any, path: Path, *, width: int, scheme: str = "light") -> bytes:
    """The whole page as an image."""
    look_at(driver, width=width, scheme=scheme)
    height = int(driver.execute_script("return document.documentElement.scrollHeight"))
    look_at(driver, width=width, height=min(height, 16_000), scheme=scheme)
    path.parent.mkdir(parents=True, exist_ok=True)
    driver.get_screenshot_as_file(str(path))
    return path.read_bytes()

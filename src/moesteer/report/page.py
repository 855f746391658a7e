"""What every page is made with: templates in a sandbox, a policy that allows two scripts, and files by their SHA-256.

No model, no network, no clock: the same files give the same bytes. A page carries its own plotly.js, allows no
script but its own (by SHA-256, in its Content-Security-Policy) and loads nothing. All text from models and users is
escaped, in HTML by Jinja2 and in figures by figures.label.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moesteer import files
from moesteer.errors import MissingExtraError
from moesteer.report import palette, wording
from moesteer.report.run_files import inside

TEMPLATES = Path(__file__).parent / "templates"
WIDTHS_PX = {"wide": 960, "narrow": 340}
"""Figures are laid out for these two widths; report.js takes the one that fits the box."""

Figure = dict[str, Any]


@dataclass(frozen=True)
class Page:
    """A page. kind: of run; gaps: what it cannot show, in sentences."""

    kind: str
    text: str
    gaps: tuple[str, ...]


def make(
    template: str, *, kind: str, context: Mapping[str, Any], figures: Mapping[str, Any], gaps: Sequence[str]
) -> Page:
    """A page from a template and everything that it shows. figures: by box id, {"wide", "narrow"}."""
    plotly = plotly_source() if figures else ""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    scripts = [text for text in (plotly, script) if text]
    text: str = (
        environment()
        .get_template(template)
        .render(
            **context,
            gaps=list(gaps),
            style=_markup(palette.style_sheet() + (TEMPLATES / "report.css").read_text(encoding="utf-8")),
            figures=_markup(script_json(figures)),
            drawn=sorted(figures),
            scripts=[_markup(text) for text in scripts],
            policy=content_policy(scripts),
        )
    )
    return Page(kind, text, tuple(gaps))


def draw(makers: Mapping[str, Callable[[int], Figure | None]]) -> dict[str, dict[str, Figure]]:
    """Every figure at both widths, by box id; those that have nothing to show are left out."""
    drawn: dict[str, dict[str, Figure]] = {}
    for box, maker in makers.items():
        for size, width_px in WIDTHS_PX.items():
            figure = maker(width_px)
            if figure is not None:
                drawn.setdefault(box, {})[size] = figure
    return drawn


def content_policy(scripts: Sequence[str]) -> str:
    """The page's Content-Security-Policy: these inline scripts by hash, inline styles, data images, no network.

    Styles need 'unsafe-inline' because plotly sets style attributes; it works without 'unsafe-eval' and blobs.
    """
    digests = [base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def script_json(value: Any) -> str:
    """JSON that cannot end the script element that holds it, nor open a comment there."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def environment() -> Any:
    """The templates' environment: a sandbox in which every text is escaped and undefined names are errors."""
    try:
        from jinja2 import FileSystemLoader, StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment
    except ImportError as error:
        raise _missing("jinja2") from error
    made = SandboxedEnvironment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"metric_name": wording.metric_name, "method_note": wording.method_note}
    return made


@cache
def plotly_source() -> str:
    """plotly.js, whole."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise _missing("plotly") from error
    source: str = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in source.lower() or "<!--" in source:
        raise AssertionError("plotly.js holds a sequence that would end its own script element")
    return source


def source(run: Path, relative: str) -> dict[str, Any]:
    """A file the page was made from, with its size and SHA-256, or that it is missing."""
    path = inside(run, relative)
    if not path.exists():
        return {"path": relative, "bytes": None, "sha256": None}
    data = files.read_bytes(path, kind="journal")
    return {"path": relative, "bytes": len(data), "sha256": files.sha256(data)}


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"{package} is not installed",
        where="moesteer.report",
        expected="the packages that write a report: jinja2 and plotly",
        do=f"pip install {package}",
    )


def _finalize(value: Any) -> Any:
    """Every text put into the page goes through `printable` before it is escaped; our own markup does not."""
    return wording.printable(value) if type(value) is str else value


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)

"""The colours of every page, by name: light, dark, and on paper. Figures write `@name` and report.js looks it up.

Text colours keep a contrast of 4.5 to 1 against `paper` and `card`, lines and markers of 3 to 1 against `paper`
(WCAG 2.2, 1.4.3 and 1.4.11); tests/unit/test_report_audit.py measures them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Tint(NamedTuple):
    """One colour on a light screen, on a dark one, and in print."""

    light: str
    dark: str
    paper: str


PALETTE: Mapping[str, Tint] = {
    "ink": Tint("#1a1d23", "#e8eaee", "#000000"),
    "muted": Tint("#59616d", "#a0a8b4", "#444444"),
    "paper": Tint("#ffffff", "#15181c", "#ffffff"),
    "card": Tint("#f6f7f9", "#1d2126", "#f6f6f6"),
    "grid": Tint("#e3e6eb", "#30353d", "#dddddd"),
    "zero": Tint("#eceef2", "#2a2f36", "#eeeeee"),
    "line": Tint("#d5d9e0", "#3a4048", "#bbbbbb"),
    "good": Tint("#1c7a4a", "#5fcf95", "#14603a"),
    "bad": Tint("#b3361b", "#ff8a6b", "#9c2a12"),
    "accent": Tint("#2a66c4", "#7db0ff", "#1d4f9e"),
    "accent-soft": Tint("#e9f1fd", "#1c2a40", "#eef3fb"),
    "warn-paper": Tint("#fff6df", "#2e2710", "#fff9e8"),
    "warn-line": Tint("#d9a520", "#b58a1c", "#b58a1c"),
    "added": Tint("#dff3e6", "#17352a", "#e6f5ec"),
    "removed": Tint("#fbe5df", "#3d2019", "#fbeae5"),
    "cold": Tint("#1a56b0", "#7fb8ff", "#1a56b0"),
    "cold-mid": Tint("#7fb0ea", "#3a6cae", "#7fb0ea"),
    "warm-mid": Tint("#f0a070", "#a8592f", "#f0a070"),
    "warm": Tint("#b8390f", "#ffa06a", "#b8390f"),
    "blue": Tint("#2a66c4", "#7db0ff", "#1f56ad"),
    "green": Tint("#1c7a4a", "#5fcf95", "#14603a"),
    "orange": Tint("#a85a08", "#f0a050", "#8f4b05"),
    "purple": Tint("#7a45c0", "#c09cf5", "#6434a8"),
    "pink": Tint("#b0306f", "#f08cc0", "#94255b"),
    "teal": Tint("#167a8c", "#5cc8dc", "#0f6272"),
    "olive": Tint("#7a6614", "#d4bc50", "#63530e"),
    "rust": Tint("#a5382f", "#f09088", "#8a2c24"),
    "band-grey": Tint("rgba(89,97,109,0.20)", "rgba(160,168,180,0.24)", "rgba(68,68,68,0.16)"),
    "band-blue": Tint("rgba(42,102,196,0.16)", "rgba(125,176,255,0.20)", "rgba(31,86,173,0.14)"),
    "band-bad": Tint("rgba(179,54,27,0.12)", "rgba(255,138,107,0.16)", "rgba(156,42,18,0.10)"),
}


def style_sheet() -> str:
    """The colours as custom properties: by what the reader's system says, unless `data-theme` says otherwise."""
    light, dark, paper = (_block(place) for place in range(3))
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f'@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {dark} }} }}\n'
        f':root[data-theme="light"] {{ color-scheme: light; }}\n'
        f':root[data-theme="dark"] {{ color-scheme: dark; {dark} }}\n'
        f"@media print {{ :root, :root[data-theme], :root:not([data-theme]) {{ color-scheme: light; {paper} }} }}\n"
    )


def _block(place: int) -> str:
    return " ".join(f"--{name}: {tint[place]};" for name, tint in PALETTE.items())

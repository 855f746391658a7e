"""Texts that act where a page, a figure or a card is not careful, and run directories in which they are everywhere.

Each text sets `window.hit`, loads something from HOST, or hides what it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

HIT = "window.hit=1"
HOST = "evil.invalid"

TEXTS = (
    f"<script>{HIT}</script>",
    f"</script><script>{HIT}</script>",
    f"</SCRIPT ><ScRiPt>{HIT}</ScRiPt>",
    f"<script src=//{HOST}/x.js></script>",
    f"<img src=x onerror={HIT}>",
    f'<img src="https://{HOST}/x.png">',
    f"<svg onload={HIT}>",
    f"<svg><script>{HIT}</script></svg>",
    f'<svg><a xlink:href="javascript:{HIT}"><text>x</text></a></svg>',
    f"<svg><animate onbegin={HIT} attributeName=x dur=1s>",
    f"<body onload={HIT}>",
    f"<details open ontoggle={HIT}>",
    f"<input autofocus onfocus={HIT}>",
    f"<video><source onerror={HIT}></video>",
    f'<iframe srcdoc="<script>parent.{HIT}</script>"></iframe>',
    f"<iframe src=https://{HOST}></iframe>",
    f'<object data="data:text/html,<script>{HIT}</script>"></object>',
    f"<embed src=https://{HOST}/x.swf>",
    f'<a href="javascript:{HIT}">x</a>',
    f"<form action=https://{HOST}><button>x</button></form>",
    f"<base href=https://{HOST}/>",
    f'<meta http-equiv="refresh" content="0;url=https://{HOST}">',
    f"<link rel=stylesheet href=https://{HOST}/x.css>",
    f"<style>@import 'https://{HOST}/x.css';</style>",
    f"</style><script>{HIT}</script>",
    f"<p style=\"background:url('https://{HOST}/x.png')\">x</p>",
    "<style>body{display:none}</style>",
    f"</title><script>{HIT}</script>",
    f"</textarea><img src=x onerror={HIT}>",
    f"--><script>{HIT}</script><!--",
    f"<!--<script>{HIT}",
    f"]]><script>{HIT}</script>",
    f'" onmouseover="{HIT}" x="',
    f"' onfocus='{HIT}' autofocus tabindex='1",
    f"`-{HIT}-`",
    f"';{HIT};//",
    f"\\\";{HIT};//",
    f"\\u003cscript\\u003e{HIT}\\u003c/script\\u003e",
    f"&lt;script&gt;{HIT}&lt;/script&gt;",
    f"&#60;img src=x onerror={HIT}&#62;",
    "{{7*7}}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "${7*7} #{7*7} <%= 7*7 %>",
    f'<a href="javascript:{HIT}">plotly</a><b>x</b><br><sup>2</sup>',
    f"<a href='https://{HOST}' target='_blank'>plotly</a>",
    f"javascript:{HIT}",
    f"data:text/html,<script>{HIT}</script>",
    "\u202eright to left\u202c \u2066isolated\u2069 \u061c \u200f",
    "null \x00 bell \x07 escape \x1b[31m delete \x7f",
    "half \ud800 a character, \u2028 and \u2029 lines",
    "=HYPERLINK(\"https://" + HOST + "\")",
    f"[x](javascript:{HIT}) ![y](https://{HOST}/y.png) <https://{HOST}>",
    f"| a | b |\n| --- | --- |\n# heading\n```\n{HIT}",
    f"<math><mtext><table><mglyph><style><img src=x onerror={HIT}>",
    f"<noscript><p title=\"</noscript><img src=x onerror={HIT}>\">",
    f"<template><script>{HIT}</script></template>",
    "@paper @bad @ink",
    "%s %n {0} {name!r} $HOME",
    "A" * 3000,
)  # fmt: skip

FIXED = (
    "kind", "finder", "suite", "condition", "split", "part", "metric", "target_metric", "recommended", "mask", "method",
    "layer_ids", "role",
)  # fmt: skip
"""Keys whose values say which part belongs to which: `NAMES` renames those everywhere at once."""
NAMES = (
    "benign", "arithmetic", "direct", "risk-difference", "surrogate", "silence-risk-difference-008", "attack-multi",
    "benign-multi", "crescendo", "attacks", "length_auroc", "torch", "fdr",
)  # fmt: skip


def poison(run: Path, *, start: int) -> None:
    """Exchange every free text of a run directory for one of TEXTS, each in turn from `start` on, names included."""
    texts = [*TEXTS[start:], *TEXTS[:start]]
    names = {name: texts[index % len(texts)] for index, name in enumerate(NAMES)}
    for path in sorted([*run.glob("*.json"), *run.glob("responses/*.jsonl")]):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        changed = [json.dumps(renamed(poisoned(json.loads(line), texts), names)) for line in lines]
        path.write_text("".join(line + "\n" for line in changed))


def poisoned(value: Any, texts: list[str]) -> Any:
    """A JSON value with every text that is no name exchanged; `texts` is turned as they are used."""
    if isinstance(value, dict):
        return {key: _under(key, inner, texts) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, texts) for inner in value]
    if isinstance(value, str) and value not in NAMES:
        texts.append(texts.pop(0))
        return texts[-1]
    return value


def _under(key: str, value: Any, texts: list[str]) -> Any:
    """A value by its key: names stay, and an id gets a text of its own behind it, the same in every file."""
    if key in FIXED and isinstance(value, str):
        return value
    if key == "id":
        return value + TEXTS[crc32(value.encode()) % len(TEXTS)]
    return poisoned(value, texts)


def renamed(value: Any, names: dict[str, str]) -> Any:
    """A JSON value with names changed wherever they are, as keys too."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value

"""Text of models and files in Markdown: inert, on one line."""

from __future__ import annotations

import re
from typing import Any

from moesteer.evaluate import cells

MOST_TEXT = 1000


def inert(value: Any, *, most: int = MOST_TEXT) -> str:
    """Text that Markdown, HTML, entities, formulas and link finders leave as it is; one line, cut at `most`."""
    kept = "".join(c if c.isprintable() else " " for c in str(value))[:most]
    kept = cells.text(kept.replace("&", "&amp;"))
    kept = kept.replace("$", "\\$").replace("~", "\\~")
    # a zero-width space: bare addresses become links after escapes and entities are resolved
    return re.sub(r"(?i)(://|www|@)", lambda found: found[0] + "\u200b", kept)

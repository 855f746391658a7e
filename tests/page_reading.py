"""A page as a browser reads it, without a browser: elements, texts, and numbers with the place they came from."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, the text outside scripts, the <data> numbers."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.numbers: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self._data: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)
            self.scripts += [""] if tag == "script" else []
        if tag == "data":
            self._data = dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()
        if tag == "data":
            self._data = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            if self._inside[-1] == "script":
                self.scripts[-1] += data
            return
        self.words.append(data)
        if self._data is not None:
            self.numbers.append((self._data["title"] or "", self._data["value"] or "", data))

    @property
    def text(self) -> str:
        """All visible words, with single spaces."""
        return " ".join("".join(self.words).split())


def resolve(value: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value

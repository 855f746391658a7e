"""Tensors to be written by a conversion: what each is made of."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Piece(NamedTuple):
    """A tensor to be written: the source's tensor `like` as it is or doubled, or zeros of its dtype."""

    name: str
    like: str
    shape: tuple[int, ...]
    how: Literal["copy", "double", "zero"] = "copy"

"""Where the labels of the trade-off figure go, so that none lies on another or on a marker."""

from __future__ import annotations

from moesteer.report.run_files import Point

CHARACTER_PX = 6.4
"""Width of a character of a figure label (11 px), a little generous."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; down is positive."""


def point_label(point: Point, *, short: bool) -> str:
    """`alpha 0.75 · 23 exp.` (as a Greek letter; short: without exp.): strength and size, whichever there are."""
    unit = "" if short and point.alpha is not None else " exp."
    strength = [] if point.alpha is None else [f"\N{GREEK SMALL LETTER ALPHA} {point.alpha:g}"]
    return " · ".join(strength + ([f"{point.experts}{unit}"] if point.experts else []))


def place_labels(
    texts: dict[int, str], placed: list[tuple[Point, tuple[float, float]]], spans: tuple[list[float], list[float]], *,
    limit: float | None, width_px: int, height_px: int,
) -> dict[int, str]:  # fmt: skip
    """Where each point's label goes, by id(point) as in `texts`; a label without room is left out.

    Greedy: chosen points first, then `none`, then the rest, each at the first of eight places around its
    marker where it meets no marker, no other label and no edge.
    """
    (x_low, x_high), (y_low, y_high) = spans
    at = {
        id(point): ((x - x_low) / (x_high - x_low) * width_px, (y_high - y) / (y_high - y_low) * height_px)
        for point, (x, y) in placed
    }
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in at.values()]
    if limit is not None:
        line = (limit - x_low) / (x_high - x_low) * width_px
        taken += [(line - 18, height_px - 100, line + 2, height_px), (line - 2, -20, line + 2, height_px)]
    found: dict[int, str] = {}
    for point in sorted((point for point, _ in placed), key=lambda point: (not point.chosen, point.method != "none")):
        text = texts.get(id(point), "")
        for position, box in _boxes(at[id(point)], len(text) * CHARACTER_PX if text else 0, ring=point.chosen):
            inside = box[0] >= 0 and box[2] <= width_px and box[1] >= -14 and box[3] <= height_px
            if text and inside and not any(_overlap(box, other) for other in taken):
                found[id(point)] = position
                taken.append(box)
                break
    return found


def _boxes(at: tuple[float, float], wide: float, *, ring: bool) -> list[tuple[str, Box]]:
    px, py = at
    gap, tall = 7.0, 14.0
    rows = {"middle": py - tall / 2, "top": py - gap - tall, "bottom": py + gap}
    columns = {"right": px + gap, "left": px - gap - wide, "center": px - wide / 2}
    sides = ["middle right", "middle left"]
    around = ["top right", "bottom right", "top left", "bottom left", "top center", "bottom center"]
    boxes = []
    for position in around if ring else sides + around:
        row, column = position.split()
        boxes.append((position, (columns[column], rows[row], columns[column] + wide, rows[row] + tall)))
    return boxes


def _overlap(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]

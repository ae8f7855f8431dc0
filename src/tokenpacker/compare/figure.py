"""The figure: accuracy against time to the first token, circles whose area says how many tokens a tile has.

Drawn with Pillow at twice its size and reduced, which smooths the edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, FAINT_INK, PAPER, RULE = "#1f2328", "#656d76", "#ffffff", "#d8dee4"
ACCENT = "#d9480f"  # the projector that the package is named after
OTHERS = ("#1c7ed6", "#2f9e44", "#9c36b5", "#343a40", "#0c8599", "#c2255c", "#5c940d", "#b08800")
OWN = "token-packer"
SCALE = 2
PANEL, MARGIN, TITLE = 470, 64, 76  # pixels of a panel's side, around it, above all
TICKS = 7
AREA_PER_TOKEN = 9.0  # square pixels
STEPS = (1.0, 2.0, 5.0, 10.0)  # that an axis may be divided by, times a power of ten

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """A circle: its label and size, and where it stands. `half` is half the interval of the accuracy."""

    name: str
    tokens: int
    milliseconds: float
    accuracy: float
    half: float | None = None

    @property
    def radius(self) -> float:
        """Pixels, so that the area grows with the tokens."""
        return math.sqrt(AREA_PER_TOKEN * self.tokens / math.pi)


def draw_figure(title: str, panels: Sequence[tuple[str, Sequence[Point]]]) -> Image.Image:
    """Panels side by side, each with its heading; every panel has axes of its own."""
    width = len(panels) * (PANEL + MARGIN) + MARGIN
    page = Image.new("RGB", (SCALE * width, SCALE * (TITLE + PANEL + MARGIN + 30)), PAPER)
    draw = ImageDraw.Draw(page)
    names = sorted({point.name for _, points in panels for point in points} - {OWN})
    colors = {OWN: ACCENT} | {name: OTHERS[index % len(OTHERS)] for index, name in enumerate(names)}
    _text(draw, (MARGIN, 18), title, 20)
    _text(draw, (MARGIN, 44), "area of a circle: tokens of a tile; lines: 95 % interval over seeds", 13, FAINT_INK)
    for index, (heading, points) in enumerate(panels):
        _draw_panel(draw, (MARGIN + index * (PANEL + MARGIN), TITLE + 26), heading, points, colors)
    return page.resize((page.width // SCALE, page.height // SCALE), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Axis:
    """Where values stand along a side of a panel."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, values: Sequence[float]) -> _Axis:
        """An axis with round ticks that leaves room around all values."""
        low, high = min(values), max(values)
        room = 0.12 * (high - low) or max(abs(high) * 0.05, 0.5)
        low, high = low - room, high + room
        unit = 10 ** math.floor(math.log10((high - low) / TICKS))
        step = next(unit * factor for factor in STEPS if unit * factor * TICKS >= high - low)
        return cls(low, high, step)

    def place(self, value: float) -> float:
        """Share of the side, 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values within."""
        first = math.ceil(self.low / self.step)
        return [index * self.step for index in range(first, math.floor(self.high / self.step) + 1)]

    def text(self, value: float) -> str:
        """With as many digits as the step has."""
        return f"{value:.{max(0, -math.floor(math.log10(self.step)))}f}"


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    heading: str,
    points: Sequence[Point],
    colors: dict[str, str],
) -> None:
    left, top = corner
    bottom, right = top + PANEL, left + PANEL
    times = _Axis.around([point.milliseconds for point in points])
    spans = [point.accuracy + sign * (point.half or 0) for point in points for sign in (-1, 1)]
    accuracies = _Axis.around([max(0.0, min(100.0, value)) for value in spans])
    _text(draw, (left, top - 24), heading, 15)
    for value in times.ticks():
        x = left + times.place(value) * PANEL
        _line(draw, (x, top, x, bottom), RULE)
        _text(draw, (x, bottom + 6), times.text(value), 12, FAINT_INK, "mt")
    for value in accuracies.ticks():
        y = bottom - accuracies.place(value) * PANEL
        _line(draw, (left, y, right, y), RULE)
        _text(draw, (left - 6, y), accuracies.text(value), 12, FAINT_INK, "rm")
    _text(draw, (right, bottom + 24), "ms to the first token", 12, FAINT_INK, "rt")
    _text(draw, (left + 6, top + 4), "accuracy, %", 12, FAINT_INK)
    placed = [
        (point, left + times.place(point.milliseconds) * PANEL, bottom - accuracies.place(point.accuracy) * PANEL)
        for point in points
    ]
    taken: list[Box] = [(x - p.radius, y - p.radius, x + p.radius, y + p.radius) for p, x, y in placed]
    for point, x, y in sorted(placed, key=lambda entry: -entry[0].tokens):  # small ones on top
        if point.half is not None:
            reach = point.half / (accuracies.high - accuracies.low) * PANEL
            _line(draw, (x, max(top, y - reach), x, min(bottom, y + reach)), colors[point.name])
        circle = [SCALE * value for value in (x - point.radius, y - point.radius, x + point.radius, y + point.radius)]
        draw.ellipse(circle, fill=colors[point.name], outline=PAPER, width=SCALE)
    for point, x, y in placed:
        label = f"{point.name} {point.tokens}"
        box = _free_place(draw, label, (x, y), point.radius, taken, (left, top, right, bottom))
        taken.append(box)
        _text(draw, box[:2], label, 12, colors[point.name])


def _free_place(
    draw: ImageDraw.ImageDraw, label: str, at: tuple[float, float], radius: float, taken: list[Box], panel: Box
) -> Box:
    """The place of a label near its circle that lies over the least of what is drawn already."""
    width, height = draw.textlength(label, _font(12)) / SCALE, 14.0
    x, y = at
    candidates = []
    for distance in (2.0, 16.0, 30.0):
        beside, above = radius + distance, radius + distance + height
        for dx, dy in (
            (beside, -height / 2), (-beside - width, -height / 2), (-width / 2, -above), (-width / 2, beside),
            (beside * 0.7, -above * 0.8), (beside * 0.7, beside * 0.8 - height / 2),
            (-beside * 0.7 - width, -above * 0.8), (-beside * 0.7 - width, beside * 0.8 - height / 2),
        ):  # fmt: skip
            candidates.append((x + dx, y + dy, x + dx + width, y + dy + height))
    return min(candidates, key=lambda box: sum(_overlap(box, other) for other in taken) + _outside(box, panel))


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, panel: Box) -> float:
    """The part of a box's area that lies beyond the panel, counted ten times."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return 10 * (area - _overlap(box, panel))


def _line(draw: ImageDraw.ImageDraw, ends: Box, color: str) -> None:
    draw.line([SCALE * value for value in ends], fill=color, width=SCALE)


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    color: str = INK,
    anchor: str = "la",
) -> None:
    draw.text((SCALE * at[0], SCALE * at[1]), text, color, _font(size), anchor=anchor)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(SCALE * size)

"""What a generated picture shows, and how it is drawn.

A :class:`Scene` is the truth (what is where, in pixels); :func:`draw` turns it into a picture. Questions, captions and
the encoder's training labels are all derived from the same scene, so they cannot disagree with the pixels.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom exclusive
Rgb = tuple[int, int, int]
Mask = npt.NDArray[np.bool_]  # (height, width) of the whole picture
Region = Mask | Box

SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "gray", "black", "teal", "brown", "purple", "orange")
KINDS = ("word", "number", "shape")

SUPERSAMPLING = 4  # shapes are drawn this much larger and averaged down: Pillow's own outlines are not anti-aliased
FRAME_WIDTH = 2


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object of a scene.

    `kind` is one of `KINDS`; `text` is the word, the digits or the shape's name; `color` is a name of `COLORS`.
    `frame` is the color of the box drawn around it, at `frame_box`. `above` is the shape drawn just above it.
    """

    kind: str
    text: str
    color: str
    rgb: Rgb
    box: Box
    font_size: float = 0.0
    frame: str | None = None
    frame_rgb: Rgb = (0, 0, 0)
    frame_box: Box | None = None
    above: str | None = None

    @property
    def outer_box(self) -> Box:
        """The pixels the object occupies, its frame included."""
        return self.frame_box or self.box


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture's size, background and objects."""

    height: int
    width: int
    background: Rgb
    items: tuple[Item, ...]

    def of_kind(self, kind: str) -> list[Item]:
        """The objects of one kind, in drawing order."""
        return [item for item in self.items if item.kind == kind]


@dataclass(frozen=True)
class Question:
    """A question with its only right answer; `kind` groups questions in reports.

    `regions` has a place in the sample's `regions` for each `<mask>` of the text, in order.
    """

    text: str
    answer: str
    kind: str
    regions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image with everything that may be asked of it; `regions` are what questions may point at."""

    name: str
    image: Image.Image
    questions: tuple[Question, ...]
    caption: str
    scene: Scene | None = None
    regions: tuple[Region, ...] = field(default=(), compare=False)  # arrays have no single truth value


@lru_cache(maxsize=256)
def load_font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's built-in outline font (Aileron), so that no font file has to travel.

    Raises: ValueError when this Pillow was built without FreeType.
    """
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("Pillow was built without FreeType, which draws the text; install a Pillow wheel from PyPI")
    return font


def text_size(text: str, size: float) -> tuple[int, int]:
    """(width, height) in pixels of the ink of `text`."""
    left, top, right, bottom = load_font(size).getbbox(text)
    return math.ceil(right - left), math.ceil(bottom - top)


@lru_cache(maxsize=4096)
def glyph_edges(text: str, size: float) -> tuple[float, ...]:
    """Where the characters of `text` begin and, last, where it ends, in pixels from its left edge."""
    return tuple(load_font(size).getlength(text[:end]) for end in range(len(text) + 1))


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    pen = ImageDraw.Draw(image)
    for item in scene.items:
        if item.frame_box is not None:
            left, top, right, bottom = item.frame_box
            pen.rectangle((left, top, right - 1, bottom - 1), outline=item.frame_rgb, width=FRAME_WIDTH)
        _draw_item(image, item, item.rgb)
    return image


def ink(scene: Scene, item: Item) -> Mask:
    """(height, width), where at least half of a pixel is the object's own color; its frame does not count."""
    coverage = Image.new("L", (scene.width, scene.height), 0)
    _draw_item(coverage, item, 255)
    return np.asarray(coverage) >= 128


def _draw_item(image: Image.Image, item: Item, color: Rgb | int) -> None:
    if item.kind == "shape":
        _draw_shape(image, item, color)
    else:
        font = load_font(item.font_size)
        ink_left, ink_top, _, _ = font.getbbox(item.text)
        place = (item.box[0] - ink_left, item.box[1] - ink_top)
        ImageDraw.Draw(image).text(place, item.text, fill=color, font=font)


def _draw_shape(image: Image.Image, item: Item, color: Rgb | int) -> None:
    left, top, right, bottom = item.box
    x0, y0, x1, y1 = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    mask = Image.new("L", ((x1 - x0) * SUPERSAMPLING, (y1 - y0) * SUPERSAMPLING), 0)
    corners = [(SUPERSAMPLING * (x - x0), SUPERSAMPLING * (y - y0)) for x, y in ((left, top), (right, bottom))]
    (ax, ay), (bx, by) = corners
    pen = ImageDraw.Draw(mask)
    if item.text == "circle":
        pen.ellipse((ax, ay, bx - 1, by - 1), fill=255)
    else:
        outline = [(ax + u * (bx - ax), ay + v * (by - ay)) for u, v in _outline(item.text)]
        pen.polygon(outline, fill=255)
    image.paste(color, (x0, y0), mask.reduce(SUPERSAMPLING))


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in its unit box."""
    if shape == "rectangle":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "cross":
        a, b = 0.34, 0.66
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    if shape == "star":
        radii = [0.5 if corner % 2 == 0 else 0.21 for corner in range(10)]
        angles = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
        return [(0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    raise ValueError(f"shape={shape!r} is unknown; use one of {', '.join(SHAPES)}")

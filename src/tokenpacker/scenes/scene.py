"""What a generated picture shows, and how it is drawn.

A :class:`Scene` lists the objects with their places in pixels, and :func:`draw` turns it into a picture. Questions,
captions and the encoder's training labels are derived from the same scene, so they cannot disagree with the pixels.
"""

import math
import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom exclusive
Rgb = tuple[int, int, int]
Mask = npt.NDArray[np.bool_]  # (height, width) of the picture
Region = Mask | Box

SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "gray", "black", "teal", "brown", "purple", "orange")
KINDS = ("word", "number", "shape")

SUPERSAMPLING = 4  # shapes are drawn this much larger and averaged down, because Pillow does not anti-alias outlines
FRAME_WIDTH = 2
IMAGE_MEAN, IMAGE_STD = 0.92, 0.25  # of what encoders get: pale backgrounds become about 0, the value of padding
_A, _B = 0.34, 0.66  # where the arms of a cross begin and end
_STAR = [(math.pi * (corner / 5 - 0.5), (0.5, 0.21)[corner % 2]) for corner in range(10)]  # angles and radii
OUTLINES: dict[str, list[tuple[float, float]]] = {  # the corners (x, y) of a shape in a unit box
    "rectangle": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "star": [(0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)) for angle, radius in _STAR],
    "cross": [
        *((_A, 0), (_B, 0), (_B, _A), (1, _A), (1, _B), (_B, _B)),
        *((_B, 1), (_A, 1), (_A, _B), (0, _B), (0, _A), (_A, _A)),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object of a scene.

    Args:
        kind: one of `KINDS`.
        text: the word, the digits or the shape's name.
        color: a name of `COLORS`, drawn as `rgb`.
        frame: the color of the frame around the object, drawn as `frame_rgb` at `frame_box`; None without a frame.
        above: the shape just above a word or number.
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
    items: tuple[Item, ...]  # in the order of drawing


@dataclass(frozen=True)
class Question:
    """A question with its only right answer.

    Args:
        kind: the group that reports count the question in.
        regions: for each `<mask>` of the text, the index of its region in the sample's `regions`.
    """

    text: str
    answer: str
    kind: str
    regions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image with its questions, its caption, and the regions that its questions may point at."""

    name: str
    image: Image.Image
    questions: tuple[Question, ...]
    caption: str
    scene: Scene | None = None
    regions: tuple[Region, ...] = field(default=(), compare=False)  # arrays have no single truth value


@lru_cache(maxsize=256)
def load_font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's built-in outline font (Aileron), so that the package needs no font file."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow raises ImportError without FreeType"
    return font


def text_size(text: str, size: float) -> tuple[int, int]:
    """The (width, height) in pixels that the ink of `text` covers."""
    left, top, right, bottom = load_font(size).getbbox(text)
    return math.ceil(right - left), math.ceil(bottom - top)


@lru_cache(maxsize=4096)
def glyph_edges(text: str, size: float) -> tuple[float, ...]:
    """The left edge of each character of `text`, then the right edge of the last one, in pixels."""
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
    """(height, width), True where the object covers at least half of a pixel; its frame does not count."""
    coverage = Image.new("L", (scene.width, scene.height), 0)
    _draw_item(coverage, item, 255)
    return np.asarray(coverage) >= 128


def pale_color(rng: random.Random, darkest: int) -> Rgb:
    """A random background color."""
    return rng.randint(darkest, 255), rng.randint(darkest, 255), rng.randint(darkest, 255)


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share some area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _draw_item(image: Image.Image, item: Item, color: Rgb | int) -> None:
    if item.kind == "shape":
        _draw_shape(image, item, color)
    else:
        font = load_font(item.font_size)
        ink_left, ink_top, _, _ = font.getbbox(item.text)
        place = (item.box[0] - ink_left, item.box[1] - ink_top)
        ImageDraw.Draw(image).text(place, item.text, fill=color, font=font)


def _draw_shape(image: Image.Image, item: Item, color: Rgb | int) -> None:
    x0, y0, x1, y1 = math.floor(item.box[0]), math.floor(item.box[1]), math.ceil(item.box[2]), math.ceil(item.box[3])
    left, top, right, bottom = (
        SUPERSAMPLING * (edge - origin) for edge, origin in zip(item.box, (x0, y0, x0, y0), strict=True)
    )
    mask = Image.new("L", ((x1 - x0) * SUPERSAMPLING, (y1 - y0) * SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(mask)
    if item.text == "circle":
        pen.ellipse((left, top, right - 1, bottom - 1), fill=255)
    else:
        corners = [(left + u * (right - left), top + v * (bottom - top)) for u, v in OUTLINES[item.text]]
        pen.polygon(corners, fill=255)
    image.paste(color, (x0, y0), mask.reduce(SUPERSAMPLING))

"""Pictures of training rows: the images, their regions numbered in the order of their marks, and the conversation."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tokenpacker.hf.image_processor import to_rgb
from tokenpacker.hf.masks import to_mask
from tokenpacker.hf.tokenizer import REGION_TOKEN
from tokenpacker.train.labels import HUMAN
from tokenpacker.train.rows import Record
from tokenpacker.visualize import FAINT_INK, INK, MARGIN, PAPER

SIDE = 640  # pixels, the longer side of an image on the page
LINE, LINE_LENGTH, TEXT_SIZE = 22, 74, 16  # height in pixels, characters
TINT = 0.45  # how much of a region's colour covers the picture
COLORS = ((217, 72, 15), (28, 126, 214), (47, 158, 68), (156, 54, 181), (224, 152, 0), (12, 133, 153))


def draw_record(record: Record) -> Image.Image:
    """A page with the images of a record below each other, regions tinted and numbered, and what is said about them.

    Raises:
        ValueError: for an image or a region that cannot be used, with the number of the region.
    """
    numbers = count(1)
    pictures = []
    for place, image in enumerate(record.images):
        regions = record.regions[place] if record.regions else ()
        pictures.append(_draw_regions(to_rgb(image), list(zip(numbers, regions, strict=False))))
    lines = list(_lines(record))
    height = sum(picture.height + MARGIN // 2 for picture in pictures) + len(lines) * LINE
    page = Image.new("RGB", (SIDE + 2 * MARGIN, height + 2 * MARGIN), PAPER)
    draw, top = ImageDraw.Draw(page), MARGIN
    for picture in pictures:
        page.paste(picture, (MARGIN, top))
        top += picture.height + MARGIN // 2
    for text, color in lines:
        draw.text((MARGIN, top), text, color, ImageFont.load_default(TEXT_SIZE))
        top += LINE
    return page


def _draw_regions(picture: Image.Image, regions: Sequence[tuple[int, Any]]) -> Image.Image:
    """The picture, fitted into SIDE, each region tinted, outlined and numbered where most of it lies."""
    size = (picture.height, picture.width)
    scale = SIDE / max(size)
    fitted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    shown = picture.resize(fitted, Image.Resampling.BICUBIC)
    places = []
    for number, region in regions:
        color = COLORS[(number - 1) % len(COLORS)]
        mask = Image.fromarray(to_mask(region, size, f"region {number}").astype(np.uint8) * 255).resize(fitted)
        shown.paste(color, mask=mask.point(lambda level: int(level * TINT)))
        shown.paste(color, mask=mask.filter(ImageFilter.FIND_EDGES))
        places.append((number, color, _middle(np.asarray(mask) > 0)))
    draw = ImageDraw.Draw(shown)
    for number, color, (row, col) in places:
        font = ImageFont.load_default(TEXT_SIZE)
        draw.text((col, row), str(number), PAPER, font, anchor="mm", stroke_width=3, stroke_fill=color)
    return shown


def _middle(mask: np.ndarray) -> tuple[int, int]:
    """The marked pixel that is nearest to the mean of all; the middle of a mask that shrinking left without any."""
    rows, cols = np.nonzero(mask)
    if not len(rows):
        return mask.shape[0] // 2, mask.shape[1] // 2
    nearest = ((rows - rows.mean()) ** 2 + (cols - cols.mean()) ** 2).argmin()
    return int(rows[nearest]), int(cols[nearest])


def _lines(record: Record) -> Iterator[tuple[str, str]]:
    """Lines of text with their colour; every mark of a region bears its number."""
    numbers = count(1)
    for message in record.conversation:
        text = message["value"]
        while REGION_TOKEN in text:
            text = text.replace(REGION_TOKEN, f"[{next(numbers)}]", 1)
        color = INK if message["from"] == HUMAN else FAINT_INK
        name = "Q" if message["from"] == HUMAN else "A"
        for place, line in enumerate(textwrap.wrap(text, LINE_LENGTH) or [""]):
            yield f"{name if not place else ' '}  {line}", color

"""Pages with images, their regions numbered in the order of their marks, and the conversation about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from PIL.ImageFont import load_default

from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN
from tokenpacker.hf.regions.masks import to_mask
from tokenpacker.visualize.page_style import FAINT_INK, INK, LEADING, MARGIN, PAPER, SMALL, wrap

SIDE = 640  # pixels, the longer side of an image on the page
LINE, INDENT = round(SMALL * LEADING), 28  # height of a line; where its text begins
STROKE = 4  # pixels around a number
TINT = 0.25  # how much of a region's colour covers the picture
COLORS = ((194, 65, 12), (25, 113, 194), (35, 122, 54), (156, 54, 181), (146, 92, 0), (10, 115, 132))


def draw_conversation(
    images: Sequence[Image.Image], regions: Sequence[tuple[int, Any]], messages: Iterable[tuple[bool, str]]
) -> Image.Image:
    """Returns a page with the images below each other, the regions tinted and numbered, and the conversation.

    Args:
        images: in RGB.
        regions: in the order of their marks in the texts: the index of the image, and a region as the processor takes
            it.
        messages: whether it is a question, and its text.

    Raises:
        ValueError: for a region that cannot be used; the message has its number.
    """
    numbered = [(number, place, region) for number, (place, region) in enumerate(regions, 1)]
    pictures = [
        draw_regions(image, [(number, region) for number, place, region in numbered if place == own])
        for own, image in enumerate(images)
    ]
    lines = list(_lines(messages))
    height = sum(picture.height + MARGIN // 2 for picture in pictures) + len(lines) * LINE
    page = Image.new("RGB", (SIDE + 2 * MARGIN, height + 2 * MARGIN), PAPER)
    draw, top = ImageDraw.Draw(page), MARGIN
    for picture in pictures:
        page.paste(picture, (MARGIN, top))
        top += picture.height + MARGIN // 2
    for name, text, color in lines:
        draw.text((MARGIN, top), name, color, load_default(SMALL))
        draw.text((MARGIN + INDENT, top), text, color, load_default(SMALL))
        top += LINE
    return page


def draw_regions(picture: Image.Image, regions: Sequence[tuple[int, Any]]) -> Image.Image:
    """The picture, fitted into SIDE, each region tinted, outlined and numbered at or near its upper left corner."""
    size = (picture.height, picture.width)
    scale = SIDE / max(size)
    width, height = (max(2 * LINE, round(side * scale)) for side in picture.size)  # room for a number
    fitted = (width, height)
    shown = picture.resize(fitted, Image.Resampling.BICUBIC)
    corners = []
    for number, region in regions:
        color = COLORS[(number - 1) % len(COLORS)]
        mask = Image.fromarray(to_mask(region, size, f"region {number}").astype(np.uint8) * 255).resize(fitted)
        shown.paste(color, mask=mask.point(lambda level: int(level * TINT)))
        shown.paste(color, mask=mask.filter(ImageFilter.FIND_EDGES))
        corners.append((mask.getbbox() or (0, 0))[:2])  # shrinking may have left nothing
    draw, font = ImageDraw.Draw(shown), load_default(SMALL)
    width = max((round(font.getlength(str(number))) for number, _ in regions), default=0) + 2 * STROKE
    taken: list[tuple[int, int]] = []
    for (number, _), corner in zip(regions, corners, strict=True):
        taken.append(_free_place(corner, (width, SMALL + STROKE), taken, shown.size))
        color = COLORS[(number - 1) % len(COLORS)]
        draw.text(taken[-1], str(number), PAPER, font, anchor="rb", stroke_width=STROKE, stroke_fill=color)
    return shown


def _free_place(
    corner: tuple[int, int], label: tuple[int, int], taken: Sequence[tuple[int, int]], picture: tuple[int, int]
) -> tuple[int, int]:
    """The lower right corner of a label: at the corner of its region, or near it where others are. All (x, y)."""
    (width, height), (right, bottom) = label, (picture[0] - STROKE, picture[1] - STROKE)
    left, top = min(max(corner[0], width - STROKE), right), min(max(corner[1], height), bottom)
    for down in sorted(range(-(top // height), (bottom - top) // height + 1), key=abs):
        for across in sorted(range(-(left // width), (right - left) // width + 1), key=abs):
            x, y = left + across * width, top + down * height
            is_inside = x >= width - STROKE and y >= height
            if is_inside and all(abs(x - one) >= width or abs(y - other) >= height for one, other in taken):
                return x, y
    return left, top  # the picture is full


def _lines(messages: Iterable[tuple[bool, str]]) -> Iterator[tuple[str, str, str]]:
    """The speaker, the text and the colour of each line; every mark of a region bears its number."""
    numbers = count(1)
    for is_question, text in messages:
        while REGION_TOKEN in text:
            text = text.replace(REGION_TOKEN, f"[{next(numbers)}]", 1)
        for place, line in enumerate(wrap(text, SMALL, SIDE - INDENT)):
            name = "" if place else "Q" if is_question else "A"
            yield name, line, INK if is_question else FAINT_INK

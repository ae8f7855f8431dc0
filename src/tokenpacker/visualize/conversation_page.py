"""Pages with images, their regions numbered in the order of their marks, and the conversation about them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from PIL.ImageFont import load_default

from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN
from tokenpacker.hf.regions.masks import to_mask
from tokenpacker.visualize.page_style import FAINT_INK, INK, MARGIN, PAPER

SIDE = 640  # pixels, the longer side of an image on the page
LINE, LINE_LENGTH, TEXT_SIZE = 22, 74, 16  # height in pixels, characters
STROKE = 4  # pixels around a number
TINT = 0.25  # how much of a region's colour covers the picture
COLORS = ((217, 72, 15), (28, 126, 214), (47, 158, 68), (156, 54, 181), (224, 152, 0), (12, 133, 153))


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
        _draw_regions(image, [(number, region) for number, place, region in numbered if place == own])
        for own, image in enumerate(images)
    ]
    lines = list(_lines(messages))
    height = sum(picture.height + MARGIN // 2 for picture in pictures) + len(lines) * LINE
    page = Image.new("RGB", (SIDE + 2 * MARGIN, height + 2 * MARGIN), PAPER)
    draw, top = ImageDraw.Draw(page), MARGIN
    for picture in pictures:
        page.paste(picture, (MARGIN, top))
        top += picture.height + MARGIN // 2
    for text, color in lines:
        draw.text((MARGIN, top), text, color, load_default(TEXT_SIZE))
        top += LINE
    return page


def _draw_regions(picture: Image.Image, regions: Sequence[tuple[int, Any]]) -> Image.Image:
    """The picture, fitted into SIDE, each region tinted, outlined and numbered at its upper left corner."""
    size = (picture.height, picture.width)
    scale = SIDE / max(size)
    fitted = (max(LINE, round(picture.width * scale)), max(LINE, round(picture.height * scale)))  # room for a number
    shown = picture.resize(fitted, Image.Resampling.BICUBIC)
    numbers: dict[tuple[int, int], list[int]] = {}  # several regions may begin at one place
    for number, region in regions:
        color = COLORS[(number - 1) % len(COLORS)]
        mask = Image.fromarray(to_mask(region, size, f"region {number}").astype(np.uint8) * 255).resize(fitted)
        shown.paste(color, mask=mask.point(lambda level: int(level * TINT)))
        shown.paste(color, mask=mask.filter(ImageFilter.FIND_EDGES))
        left, top = (mask.getbbox() or (0, 0))[:2]  # shrinking may have left nothing
        numbers.setdefault((left, top), []).append(number)
    draw, font = ImageDraw.Draw(shown), load_default(TEXT_SIZE)
    for (left, top), some in numbers.items():
        label, color = ", ".join(map(str, some)), COLORS[(some[0] - 1) % len(COLORS)]
        place = (max(left, round(font.getlength(label)) + STROKE), max(top, TEXT_SIZE))
        draw.text(place, label, PAPER, font, anchor="rb", stroke_width=STROKE, stroke_fill=color)
    return shown


def _lines(messages: Iterable[tuple[bool, str]]) -> Iterator[tuple[str, str]]:
    """Lines of text with their colour; every mark of a region bears its number."""
    numbers = count(1)
    for is_question, text in messages:
        while REGION_TOKEN in text:
            text = text.replace(REGION_TOKEN, f"[{next(numbers)}]", 1)
        for place, line in enumerate(textwrap.wrap(text, LINE_LENGTH) or [""]):
            name = " " if place else "Q" if is_question else "A"
            yield f"{name}  {line}", INK if is_question else FAINT_INK

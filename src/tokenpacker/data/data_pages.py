"""Pages that show training data: the histogram of a report, and one record."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from tokenpacker.data.check import NUM_BINS, DataReport
from tokenpacker.data.labels import HUMAN
from tokenpacker.data.rows import Record
from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN
from tokenpacker.hf.processing.pictures import to_rgb
from tokenpacker.visualize import ACCENT, FAINT_INK, INK, MARGIN, PAPER, RULE, draw_conversation

CHART, CHART_HEIGHT, CHART_TOP = 640, 300, 150  # pixels


def draw_report(report: DataReport, title: str) -> Image.Image:
    """A picture of the histogram of tokens."""
    font = ImageFont.load_default
    page = Image.new("RGB", (CHART + 2 * MARGIN, CHART_TOP + CHART_HEIGHT + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font(26))
    counts = f"{report.usable} samples: {report.with_images} with images, {report.text_only} text only"
    draw.text((MARGIN, MARGIN + 38), f"{counts}; {report.samples - report.usable} rejected", FAINT_INK, font(18))
    spread = f"median {report.tokens.median:g}, 95 % up to {report.tokens.p95:g}, longest {report.tokens.max}"
    draw.text((MARGIN, MARGIN + 64), f"tokens per sample: {spread}", FAINT_INK, font(18))
    bottom = CHART_TOP + CHART_HEIGHT
    draw.line((MARGIN, bottom, MARGIN + CHART, bottom), RULE, 2)
    highest = max((count for *_, count in report.histogram), default=1)
    step = CHART / max(1, len(report.histogram))
    for number, (first, last, count) in enumerate(report.histogram):
        left, right = MARGIN + number * step, MARGIN + (number + 1) * step - 4
        if count:
            height = max(2.0, (CHART_HEIGHT - 24) * count / highest)
            draw.rectangle((left, bottom - height, right, bottom - 1), fill=ACCENT)
            draw.text(((left + right) / 2, bottom - height - 3), _short(count), INK, font(13), anchor="mb")
        if number % 2 == 0 or len(report.histogram) <= NUM_BINS // 2:
            label = str(first) if first == last else f"{first}-{last}"
            draw.text(((left + right) / 2, bottom + 6), label, FAINT_INK, font(12), anchor="mt")
    return page


def draw_record(record: Record) -> Image.Image:
    """A page with the images of a record, their regions numbered in the order of their marks, and the conversation.

    Raises:
        ValueError: if an image or a region cannot be used, with the number of the region, or if marks and regions
            differ in number.
    """
    marks = sum(message["value"].count(REGION_TOKEN) for message in record.conversation)
    num_regions = sum(map(len, record.regions))
    if marks != num_regions and record.regions:
        raise ValueError(f"{record.source or record.id} has {marks} {REGION_TOKEN} and {num_regions} regions; mend it")
    return draw_conversation(
        [to_rgb(image) for image in record.images],
        [(place, region) for place, own in enumerate(record.regions) for region in own],
        [(message["from"] == HUMAN, message["value"]) for message in record.conversation],
    )


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"

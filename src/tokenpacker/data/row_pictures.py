"""Pictures of training rows."""

from __future__ import annotations

from PIL import Image

from tokenpacker.data.labels import HUMAN
from tokenpacker.data.rows import Record
from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN
from tokenpacker.hf.processing.pictures import to_rgb
from tokenpacker.visualize_regions import draw_conversation


def draw_record(record: Record) -> Image.Image:
    """A page with the images of a record, their regions numbered in the order of their marks, and the conversation.

    Raises:
        ValueError: for an image or a region that cannot be used, with the number of the region, and for marks and
            regions that differ in number.
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

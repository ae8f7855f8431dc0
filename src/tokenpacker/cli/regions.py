"""Regions as they are written on a command line and in a chat."""

import os
import re
from typing import Annotated, Any

import typer

REGION_FORMS = "a mask's file, a box x0,y0,x1,y1 or a polygon x,y,x,y,x,y,..."

# One option under three names: so the order on the command line is the order of the regions.
RegionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        "--box",
        "--polygon",
        metavar="[N:]REGION",
        help="A region that the question calls <mask>: a black-and-white picture, a box x0,y0,x1,y1 or a polygon"
        " x,y,x,y,x,y,... in pixels of the original image. May be repeated, in the order of <mask>. N: before it names"
        " the image by its number.",
        show_default="none, in the last image",
    ),
]

Region = tuple[int, dict[str, Any]]  # the image's index, and the region in a form that the processor takes


def read_region(text: str, num_images: int) -> Region:
    """A region as the user wrote it, and the index of its image: the last one, unless its number stands before it.

    Raises:
        ValueError: for an image that is not there, a file that is not there, and numbers that are no box or polygon.
    """
    match = re.fullmatch(r"(?:(\d+):)?\s*(.*)", text.strip(), re.DOTALL)
    assert match is not None, "the pattern fits every text"
    number = num_images if match[1] is None else int(match[1])
    if not num_images:
        raise ValueError(f"region {text} has no image to lie in; add the image first")
    if not 1 <= number <= num_images:
        raise ValueError(f"region {text} is of image {number}, but there are {num_images}; number them from 1")
    return number - 1, _form(match[2], text)


def _form(value: str, text: str) -> dict[str, Any]:
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        if not os.path.isfile(value):
            raise ValueError(f"region {text} is no file, nor numbers; give {REGION_FORMS}") from None
        return {"mask": value}
    if len(numbers) == 4:
        return {"box": numbers}
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"region {text} has {len(numbers)} numbers; give {REGION_FORMS}")
    return {"polygon": [numbers]}

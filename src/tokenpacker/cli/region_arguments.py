"""Regions as they are written on a command line and in a chat."""

import os
import re
from dataclasses import dataclass
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
        " x,y,x,y,x,y,... in pixels of the image as shown. The three names are one option, which sees what it is given."
        " May be repeated: the first one is the first <mask>, whatever"
        " image it is in. N: before it names the image by its number.",
        show_default="none, in the last image",
    ),
]


@dataclass(frozen=True)
class Region:
    """What one `<mask>` of a question stands for.

    Args:
        image: index of its image, of all images so far.
        text: as the user wrote it, without the image's number.
        form: as the processor takes it.
    """

    image: int
    text: str
    form: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; images are counted from 1, as the user counts them."""
        return {"image": self.image + 1, "region": self.text}


def read_region(text: str, num_images: int) -> Region:
    """The region that a text names, in the last image unless a number and a colon stand before it.

    Raises:
        ValueError: for an image that is not there, a file that is not there or no mask, and numbers that are no box or
            polygon.
    """
    match = re.fullmatch(r"(?:(\d+):)?\s*(['\"]?)(.*)\2", text.strip(), re.DOTALL)
    assert match is not None, "the pattern fits every text"
    number = num_images if match[1] is None else int(match[1])
    if not num_images:
        raise ValueError(f"region {text} has no image to lie in; add the image first")
    if not 1 <= number <= num_images:
        raise ValueError(f"region {text} is of image {number}, but there are {num_images}; number them from 1")
    return Region(number - 1, match[3], _form(match[3], text))


def _form(value: str, text: str) -> dict[str, Any]:
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        if not os.path.isfile(value):
            if re.search(r"\.[a-zA-Z]+$", value) and not os.path.exists(value):
                raise ValueError(f"region {text} does not exist; check the path, or give {REGION_FORMS}") from None
            raise ValueError(f"region {text} is no file, nor numbers; give {REGION_FORMS}") from None
        from tokenpacker.hf.regions.masks import read_mask

        return {"mask": read_mask(value)}  # now and never again: a chat may outlive the file
    if len(numbers) == 4:
        return {"box": numbers}
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"region {text} has {len(numbers)} numbers; give {REGION_FORMS}")
    return {"polygon": [numbers]}

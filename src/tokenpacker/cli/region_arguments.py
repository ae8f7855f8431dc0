"""Regions as they are written on a command line and in a chat."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

REGION_FORMS = "a mask's file, a box x0,y0,x1,y1 or a polygon x,y,x,y,x,y,..."


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


def read_region(text: str, images: Sequence["Image.Image"]) -> Region:
    """The region that a text describes, in the last image unless a number and a colon stand before it.

    Raises:
        ValueError: for an image that is not there, a file that is not there or no mask, and numbers that are no box or
            polygon in pixels.
    """
    match = re.fullmatch(r"(?:(\d+):)?\s*(['\"]?)(.*)\2", text.strip(), re.DOTALL)
    assert match is not None, "the pattern fits every text"
    number = len(images) if match[1] is None else int(match[1])
    if not images:
        raise ValueError(f"region {text} has no image to lie in; add the image first")
    if not 1 <= number <= len(images):
        raise ValueError(f"region {text} is of image {number}, but there are {len(images)}; number them from 1")
    value, image = match[3], images[number - 1]
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        return Region(number - 1, value, {"mask": _read_mask(value, text)})
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(f"region {text} has {len(numbers)} numbers; give {REGION_FORMS}")
    if image.size != (1, 1) and all(0 <= coordinate <= 1 for coordinate in numbers):  # before the model is loaded
        raise ValueError(
            f"region {text} has all coordinates between 0 and 1; give pixels: multiply x by the width {image.width} and"
            f" y by the height {image.height}"
        )
    return Region(number - 1, value, {"box": numbers} if len(numbers) == 4 else {"polygon": [numbers]})


def _read_mask(path: str, text: str) -> Any:
    """(H, W) boolean mask in a file. It is read now, since a chat may outlive the file."""
    if not os.path.isfile(path):
        if re.search(r"\.[a-zA-Z]+$", path) and not os.path.exists(path):
            raise ValueError(f"region {text} does not exist; check the path, or give {REGION_FORMS}") from None
        raise ValueError(f"region {text} is no file, nor numbers; give {REGION_FORMS}") from None
    from tokenpacker.hf.regions.masks import read_mask

    return read_mask(path)

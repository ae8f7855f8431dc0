"""Whatever users pass as an image, to an RGB picture: files are read when it is known how much of them is needed."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenpacker.hf.processing.addresses import read_text
from tokenpacker.images import ImageError, ImageSource, image_size, load_image, orientation


def to_rgb(image: Any) -> Image.Image:
    """Any image that transformers users pass, as an RGB picture. Raises ImageError."""
    return read_picture(to_source(image))


def to_source(image: Any, data_format: str | None = None) -> ImageSource:
    """Any image that transformers users pass, as something that `image_size` and `read_picture` take.

    Files and bytes stay as they are, not yet decoded.

    Args:
        data_format: "channels_first" or "channels_last" of an array; told from its shape when None.

    Raises:
        ImageError: for what is no image at all, and as `addresses.read_text`.
    """
    if isinstance(image, str):
        return read_text(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()  # NumPy has no bfloat16
    if isinstance(image, np.ndarray):
        return _array_to_picture(image, data_format)
    return image


def read_picture(source: ImageSource, at_least: tuple[int, int] | None = None) -> Image.Image:
    """An RGB picture, upright; of a Pillow image that is one already, the image itself.

    Args:
        at_least: (height, width) that will do. A JPEG file is then decoded at a half, quarter or eighth of its size
            where that is as large. This is several times faster, and filters the picture as shrinking it would: after
            shrinking, a picture full of noise differs by 0.9 grey levels on average, where rounding alone makes 0.3.

    Raises:
        ImageError: as `load_image`.
    """
    picture = None
    if isinstance(source, Image.Image):
        picture = source if _is_ready(source) else None
    elif at_least is not None:
        picture = _read_reduced_jpeg(source, at_least)
    return load_image(source) if picture is None else picture


def _is_ready(picture: Image.Image) -> bool:
    """Whether `load_image` would change nothing, so that its copies can be spared."""
    if type(picture) is not Image.Image or picture.mode != "RGB" or picture.has_transparency_data:
        return False
    return orientation(picture) == 1


def _read_reduced_jpeg(source: str | Path | bytes, at_least: tuple[int, int]) -> Image.Image | None:
    """None for other files, and for damaged ones, of which `load_image` says what is wrong."""
    size = image_size(source)
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `image_size` knows the limit
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format == "JPEG":
                lies = (image.height, image.width) != size  # turned by its EXIF orientation
                image.draft(None, at_least if lies else at_least[::-1])
                return load_image(image)
    return None


def _array_to_picture(array: np.ndarray, data_format: str | None) -> Image.Image:
    if data_format not in (None, "channels_first", "channels_last"):
        raise ImageError(f"input_data_format={data_format!r} is unknown; use 'channels_first' or 'channels_last'")
    first = array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4)
    if array.ndim == 3 and (first if data_format is None else data_format == "channels_first"):
        array = np.moveaxis(array, 0, 2)  # (C, H, W) -> (H, W, C)
    has_channels = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.dtype != np.uint8 or not (array.ndim == 2 or has_channels) or array.size == 0:
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype} is no picture;"
            " pass uint8 pixels (H, W, 3) between 0 and 255, or a Pillow image"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)

"""Reads an image in any form that users pass it: Pillow image, path, bytes, address, base64, array.

transformers' own `load_image` is not used: it downloads without a limit, and knows no `images.no_files`. Messages name
an address or a path, shortened, and of everything else only its length, so that what was sent is not repeated.
"""

from __future__ import annotations

import base64
import io
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image
from torch import Tensor

from tokenpacker.images import (
    ImageError,
    ImageSource,
    check_files_are_read,
    image_size,
    load_image,
    orientation,
    shown,
)

MAX_BYTES = 2**28  # of a file that comes over the network or as text
DOWNLOAD_TIMEOUT_S = 20.0
LONGEST_PATH = 4096  # characters; Linux's limit
SHORTEST_BASE64 = 80  # characters; no image file is smaller than 60 bytes
ADDRESS = re.compile(r"https?://", re.IGNORECASE)
BASE64 = re.compile(r"([A-Za-z0-9+/\s]+|[A-Za-z0-9_\s-]+)={0,2}\s*")  # the usual alphabet, and that of addresses
DATA = re.compile(r"data:[^,]{0,200}?;base64,", re.IGNORECASE)


def to_rgb(image: Any) -> Image.Image:
    """Any image that transformers users pass, as an RGB picture. Raises ImageError."""
    return read_picture(to_source(image))


def to_source(image: Any, data_format: str | None = None) -> ImageSource:
    """Any image that transformers users pass, as something that `image_size` and `read_picture` take.

    Files and bytes are not decoded yet.

    Args:
        data_format: "channels_first" or "channels_last" of an array; told from its shape when None.

    Raises:
        ImageError: for arrays that are no image, and as `read_text`.
    """
    if isinstance(image, str):
        return read_text(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()  # NumPy has no bfloat16
    if isinstance(image, np.ndarray):
        return _array_to_picture(image, data_format)
    return image


def read_text(text: str) -> str | bytes:
    """The bytes of an image behind an http(s) or data address or in base64; a path stays as it is.

    Raises:
        ImageError: for more than `MAX_BYTES`, failed downloads, and a text that is neither.
    """
    if ADDRESS.match(text):
        return _download(text)
    if text[:5].lower() == "data:":
        header = DATA.match(text)
        if header is None:
            raise ImageError("a data address must be of the form 'data:image/png;base64,...'; pass the image's bytes")
        text = text[header.end() :]
    else:
        is_path = len(text) < SHORTEST_BASE64 or os.path.isfile(text)
        if is_path or (len(text) <= LONGEST_PATH and not BASE64.fullmatch(text)):
            return text
    what = f"the text of {len(text)} characters that was given as an image"
    if len(text) * 3 // 4 > MAX_BYTES:
        raise ImageError(f"{what} holds more than the {MAX_BYTES:,} bytes allowed; pass the path of a smaller file")
    try:
        return decode_base64(text)
    except ValueError:
        raise ImageError(f"{what} is neither the path of a file nor base64; check it") from None


def decode_base64(text: str) -> bytes:
    """The bytes of base64 in either alphabet, with or without line breaks. Raises ValueError if it is none."""
    if not BASE64.fullmatch(text):
        raise ValueError("no base64")
    return base64.b64decode("".join(text.split()).replace("-", "+").replace("_", "/"), validate=True)


def _download(address: str) -> bytes:
    check_files_are_read(address)
    name = shown(address)
    content = bytearray()
    try:
        with httpx.stream("GET", address, timeout=DOWNLOAD_TIMEOUT_S, follow_redirects=True) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                content += part
                if len(content) > MAX_BYTES:
                    raise ImageError(f"{name} has more than the {MAX_BYTES:,} bytes allowed; use a smaller file")
    except ImageError:
        raise
    except Exception as error:  # network libraries raise many kinds
        reason = " ".join(str(error).split()).replace(address, name) or type(error).__name__
        raise ImageError(f"{name} cannot be downloaded ({reason}); save the picture and pass its path") from error
    return bytes(content)


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


def read_picture(source: ImageSource, at_least: tuple[int, int] | None = None) -> Image.Image:
    """An upright RGB picture; a Pillow image that is one already is returned itself.

    Args:
        at_least: (height, width) that will do. A JPEG file is then decoded at a half, quarter or eighth of its size
            if that is as large. This is several times faster, and filters the picture as shrinking it would: after
            shrinking, a picture full of noise differs by 0.9 grey levels on average, where rounding alone makes 0.3.

    Raises:
        ImageError: if the file does not exist, is no image, is damaged, or is too large.
    """
    picture = None
    if type(source) is Image.Image and source.mode == "RGB" and not source.has_transparency_data:
        picture = source if orientation(source) == 1 else None  # `load_image` would only copy it
    elif at_least is not None and not isinstance(source, Image.Image):
        picture = _read_reduced_jpeg(source, at_least)
    return load_image(source) if picture is None else picture


def _read_reduced_jpeg(source: str | Path | bytes, at_least: tuple[int, int]) -> Image.Image | None:
    """None for other files, and for damaged ones, of which `load_image` says what is wrong."""
    size = image_size(source)
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `image_size` knows the limit
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format == "JPEG":
                turned = (image.height, image.width) != size  # by its EXIF orientation
                image.draft(None, at_least if turned else at_least[::-1])
                return load_image(image)
    return None

"""Image files and Pillow images to 8-bit RGB. An error is one line with the image's name and the remedy.

Needs Pillow and NumPy, not torch. Rules for unusual images:

- EXIF orientation is honoured.
- Transparency is composited on white.
- 16-bit grey is scaled from its full range 0..65535 to 0..255, never clipped.
- Of a file with several frames (GIF, APNG, TIFF) the first is used, and an `ImageNote` warning says so.
- A PNG's texts and colour profiles that are too large for Pillow are left out.
- CMYK, palette and the other 8-bit modes are converted by Pillow's formulas; ICC profiles are not applied.
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import MAX_TEXT_MEMORY, PngImageFile, PngStream
from PIL.TiffImagePlugin import TiffImageFile

# Pillow's own hard limit; a picture this large takes 2 GiB as float32 RGB.
MAX_PIXELS = 178_956_970
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
PNG_METADATA = (b"eXIf", *PNG_TEXTS)
# EXIF orientation -> the operation that turns the image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION_PLACES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow keeps it
_SHRINK = "shrink it first, for example with `convert IN -resize 4000x4000 OUT`"

_FILES_ARE_READ: ContextVar[bool] = ContextVar("files_are_read", default=True)

ImageSource = str | Path | bytes | Image.Image


class ImageError(ValueError):
    """An unusable image; the message is one line with the image's name and the remedy."""


class TooManyPixelsError(ImageError):
    """An image of more than `MAX_PIXELS` pixels."""


class ImageNote(UserWarning):
    """A warning about an image that is used all the same."""


@contextmanager
def no_files() -> Iterator[None]:
    """A context in which no function reads an image or a mask from a path or an address.

    It is for servers with requests from strangers, whose paths would name files on the server. Bytes, arrays and Pillow
    images work as always. It holds for the thread or the asyncio task that enters it, so enter it around the processor:

        with no_files():
            inputs = processor(images=images, text=prompt, region_masks=regions)
    """
    token = _FILES_ARE_READ.set(False)
    try:
        yield
    finally:
        _FILES_ARE_READ.reset(token)


def check_files_are_read(name: str) -> None:
    """Raises ImageError within `no_files`. Call it before a path or an address is opened."""
    if not _FILES_ARE_READ.get():
        raise ImageError(f"{shown(name)!r} is a path or an address, and none is read here; pass the bytes of the file")


def shown(name: str) -> str:
    """Shortens a name for messages to 80 characters; a longer one may be the image's content."""
    return name if len(name) <= 80 else f"{name[:40]}...{name[-37:]}"


def load_image(source: ImageSource) -> Image.Image:
    """Returns an upright RGB image with 8 bits per channel.

    Args:
        source: a file's path, the bytes of a file, or a Pillow image, which is not modified.

    Raises:
        ImageError: if the file does not exist, is no image or is damaged, or has more than `MAX_PIXELS` pixels.
    """
    return _load(source, _to_rgb)


def load_unconverted(source: ImageSource) -> Image.Image:
    """Returns an upright image as `load_image` does, but in its own mode."""
    return _load(source, lambda _, image: image.copy())


def _load(source: ImageSource, convert: Callable[[str, Image.Image], Image.Image]) -> Image.Image:
    with open_image(source) as (name, image):
        try:
            _note_frames(name, image)
            return convert(name, upright(image))
        except (ImageError, MemoryError):
            raise
        except (
            Exception
        ) as error:  # decoders fail in many ways on damaged files: OSError, SyntaxError, struct.error ...
            remedy = "the file is damaged, save it anew"
            if isinstance(source, Image.Image):
                remedy = "pass its file's path, which may say more, or save it anew"
            raise ImageError(f"{name} cannot be decoded ({_one_line(error)}); {remedy}") from error


def image_size(source: ImageSource) -> tuple[int, int]:
    """Returns (height, width) of the upright image from the file's header. Raises ImageError as in `open_image`."""
    with open_image(source) as (_, image):
        width, height = _stored_size(image)
        return (width, height) if orientation(image) >= 5 else (height, width)


@contextmanager
def open_image(source: ImageSource) -> Iterator[tuple[str, Image.Image]]:
    """A context with the name for messages and the image, not yet decoded; the file stays open within it.

    Raises:
        ImageError: if the file does not exist, is no image, or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        _check_size("the image", source)
        yield "the image", source
    elif isinstance(source, bytes):
        name = f"the image of {len(source)} bytes"
        with _open_file(name, io.BytesIO(source)) as image:
            yield name, image
    elif isinstance(source, (str, Path)):
        check_files_are_read(str(source))
        name = str(source) if os.path.exists(source) else shown(str(source))
        with _open_path(Path(source), name) as file, _open_file(name, file) as image:
            yield name, image
    else:
        raise ImageError(
            f"an image given as {type(source).__name__} is not supported; pass a path, the bytes of a file or a Pillow"
            " image (for an 8-bit array: PIL.Image.fromarray)"
        )


def _open_path(path: Path, name: str) -> IO[bytes]:
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", name, re.IGNORECASE):
        raise ImageError(f"{name} is an address, and none is fetched; download the image and give its path")
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a folder; give the path of an image in it")
        if path.exists() and not path.is_file():
            raise ImageError(f"{name} is not a regular file; save the image to a file and give its path")
        return path.open("rb")
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(f"{name!r} cannot be opened ({reason}); check the path and its permissions") from None


def _open_file(name: str, file: IO[bytes]) -> Image.Image:
    if not file.read(1):
        raise ImageError(f"{name} is empty (0 bytes); the download or copy failed, fetch it again")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is the one below
            image = Image.open(_readable(file))
    except Image.DecompressionBombError:
        raise TooManyPixelsError(f"{name} has more than the {MAX_PIXELS:,} pixels allowed; {_SHRINK}") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not an image that Pillow can read; give a PNG, JPEG, WebP, GIF or TIFF file"
        ) from None
    except Exception as error:  # as in load_image
        raise ImageError(
            f"{name} cannot be read as an image ({_one_line(error)}); the file is damaged, save it anew"
        ) from error
    _check_size(name, image)
    return image


def _check_size(name: str, image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise ImageError(f"{name} is {height}x{width} pixels; both sides need at least 1")
    if width * height > MAX_PIXELS:
        told = f"{name} is {height}x{width}, more than the {MAX_PIXELS:,} pixels allowed; {_SHRINK}"
        raise TooManyPixelsError(told)


def _note_frames(name: str, image: Image.Image) -> None:
    if getattr(image, "is_animated", False):  # to count them, `n_frames` would go through all of a hostile file
        used = "the first" if image.tell() == 0 else f"frame {image.tell() + 1}"  # a Pillow image may be moved on
        warnings.warn(f"{name} holds several frames; only {used} is used", ImageNote, stacklevel=4)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) before turning. For a TIFF file, newer versions of Pillow give the size after it."""
    if isinstance(image, TiffImageFile) and image.tile:  # not yet decoded, which turns it
        return image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    return image.size


def upright(image: Image.Image) -> Image.Image:
    """Returns the image turned by its EXIF orientation, in its own mode; the same object if it is upright."""
    image.load()  # turns a TIFF, and removes its orientation
    turn = TURNS.get(orientation(image))
    if turn is None:
        return image
    image = image.transpose(turn)
    for place in ORIENTATION_PLACES:
        image.info.pop(place, None)
    return image


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation 1..8; 1 if there is none or the metadata is damaged, as viewers do."""
    try:
        # A PNG's own `getexif` decodes all pixels first, since metadata may follow them, but rarely does.
        is_plain = isinstance(image, PngImageFile) and image.fp is not None and not _has_late_metadata(image.fp)
        exif = Image.Image.getexif(image) if is_plain else image.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if value in TURNS else 1


def _has_late_metadata(png: IO[bytes]) -> bool:
    """Whether a chunk with possible EXIF data follows the pixels of a PNG file."""
    place = png.tell()
    try:
        pixels_begun = False
        for kind, _, _ in _png_chunks(png):
            if pixels_begun and kind in PNG_METADATA:
                return True
            pixels_begun = pixels_begun or kind == b"IDAT"
        return False
    finally:
        png.seek(place)


def _readable(file: IO[bytes]) -> IO[bytes]:
    """Returns the file; for a PNG with a text or a colour profile beyond Pillow's limits, a copy without these.

    The limits protect from texts that unpack to gigabytes, but Pillow then refuses the whole image.
    """
    signature = file.read(len(PNG_SIGNATURE))
    refused = _refused_chunks(file) if signature == PNG_SIGNATURE else []
    file.seek(0)
    if not refused:
        return file
    content, kept, start = file.read(), io.BytesIO(), 0
    for place, length in refused:
        kept.write(content[start : place - 8])
        start = place + length + 4
    kept.write(content[start:])
    kept.seek(0)
    return kept


def _refused_chunks(png: IO[bytes]) -> list[tuple[int, int]]:
    """(place, length) of the content of each text and colour profile of a PNG that Pillow refuses."""
    reader, refused = PngStream(png), []
    for kind, place, length in _png_chunks(png):
        if kind not in (b"iCCP", *PNG_TEXTS):
            continue
        try:
            if length > MAX_TEXT_MEMORY:
                raise ValueError("not even read")
            reader.call(kind, place, length)
        except (ValueError, SyntaxError):  # too large; packed in a way that no version of PNG knows
            refused.append((place, length))
        except Exception:  # cut off: Pillow will say so
            break
    return refused


def _png_chunks(png: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Yields (kind, place of the content, its length) of each chunk of a PNG file, positioned at the content."""
    place = len(PNG_SIGNATURE) + 8
    png.seek(place - 8)
    while len(header := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        yield kind, place, length
        place += length + 12  # its checksum, and the next header
        png.seek(place - 8)


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point pixels of unknown range; scale them to 0..255 and save as 8 bit")
    if image.mode.startswith("I"):
        return _grey_from_16_bit(name, image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey_from_16_bit(name: str, image: Image.Image) -> Image.Image:
    """Converts a 16-bit image (modes I;16, I;16B, and I, which Pillow gives for 16-bit PGM) to 8-bit grey."""
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{name} holds 32-bit integers beyond 0..65535; scale them to 0..255 and save as 8 bit")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Pictures that come as text, an address or base64, to the bytes of their files; no more bytes than allowed.

Messages name an address or a path, shortened, and of everything else its length only: what was sent is nobody else's
business.
"""

from __future__ import annotations

import base64
import os
import re

from transformers.image_utils import httpx  # newer hub libraries bring it under another name

from tokenpacker.images import ImageError, check_files_are_read, shown

MAX_BYTES = 2**28  # of a file that comes over the network or as text
DOWNLOAD_TIMEOUT_S = 20.0
LONGEST_PATH = 4096  # characters; Linux's limit
SHORTEST_BASE64 = 80  # characters; no image file is smaller than 60 bytes
ADDRESS = re.compile(r"https?://", re.IGNORECASE)
BASE64 = re.compile(r"([A-Za-z0-9+/\s]+|[A-Za-z0-9_\s-]+)={0,2}\s*")  # the usual alphabet, and that of addresses
DATA = re.compile(r"data:[^,]{0,200}?;base64,", re.IGNORECASE)


def read_text(text: str) -> str | bytes:
    """The bytes of an image behind an http(s) or data address or in base64; a path stays as it is.

    Raises:
        ImageError: for more than `MAX_BYTES`, what cannot be downloaded, and a text that is neither.
    """
    if ADDRESS.match(text):
        return _download(text)
    if text[:5].lower() == "data:":
        header = DATA.match(text)
        if header is None:
            raise ImageError("a data address must be of the form 'data:image/png;base64,...'; pass the image's bytes")
        return _decode(text[header.end() :])
    if (len(text) >= SHORTEST_BASE64 and not os.path.isfile(text)) and (
        BASE64.fullmatch(text) or len(text) > LONGEST_PATH
    ):
        return _decode(text)
    return text


def _decode(text: str) -> bytes:
    what = f"the text of {len(text)} characters that was given as an image"
    if len(text) * 3 // 4 > MAX_BYTES:
        raise ImageError(f"{what} holds more than the {MAX_BYTES:,} bytes allowed; pass the path of a smaller file")
    try:
        return decode_base64(text)
    except ValueError:
        raise ImageError(f"{what} is neither the path of a file nor base64; check it") from None


def decode_base64(text: str) -> bytes:
    """The bytes of base64 in lines or not, in either alphabet. Raises ValueError where it is none."""
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

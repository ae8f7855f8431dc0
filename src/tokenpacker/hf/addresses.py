"""Pictures that come as text, an address or base64, to the bytes of their files; no more bytes than allowed.

Messages name an address, and of everything else its length only: what was sent is nobody else's business.
"""

from __future__ import annotations

import base64
import binascii
import os
import re

from transformers.image_utils import httpx  # newer hub libraries bring it under another name

from tokenpacker.images import ImageError, check_files_are_read

MAX_BYTES = 2**28  # of a file that comes over the network or as text
DOWNLOAD_TIMEOUT_S = 20.0
LONGEST_PATH = 4096  # characters; Linux's limit
SHORTEST_BASE64 = 80  # characters; no image file is smaller than 60 bytes
ADDRESS = re.compile(r"https?://", re.IGNORECASE)
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
        re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text) or len(text) > LONGEST_PATH
    ):
        return _decode(text)
    return text


def _decode(text: str) -> bytes:
    what = f"the text of {len(text)} characters that was given as an image"
    if len(text) * 3 // 4 > MAX_BYTES:
        raise ImageError(f"{what} holds more than the {MAX_BYTES:,} bytes allowed; pass the path of a smaller file")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(f"{what} is neither the path of a file nor base64; check it") from None


def _download(address: str) -> bytes:
    check_files_are_read(address)
    shown = address if len(address) <= 80 else f"{address[:77]}..."
    content = bytearray()
    try:
        with httpx.stream("GET", address, timeout=DOWNLOAD_TIMEOUT_S, follow_redirects=True) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                content += part
                if len(content) > MAX_BYTES:
                    raise ImageError(f"{shown} has more than the {MAX_BYTES:,} bytes allowed; use a smaller file")
    except ImageError:
        raise
    except Exception as error:  # network libraries raise many kinds
        reason = " ".join(str(error).split()).replace(address, shown) or type(error).__name__
        raise ImageError(f"{shown} cannot be downloaded ({reason}); save the picture and pass its path") from error
    return bytes(content)

"""What is asked of a row's body: defaults are filled in, and image paths become `data:` URLs."""

from __future__ import annotations

import base64
import mimetypes
import re
from pathlib import Path
from typing import Any

from tokenpacker.batch.batch_rows import RowError
from tokenpacker.serve.limits import Limits

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # of two letters or more; one is a drive of Windows
MAX_FILE_BYTES = Limits().image_bytes


def prepared_body(body: dict[str, Any], defaults: dict[str, Any], images: Path | None) -> dict[str, Any]:
    """The body of a request, ready to be answered.

    Args:
        defaults: fields for a body that lacks them.
        images: start of image paths; no file outside of it is read, and none at all if it is None.

    Raises:
        RowError: for a path that leads out of the folder, or to no file.
    """
    body = {**defaults, **body}
    messages = body.get("messages")
    if not isinstance(messages, list):  # whoever answers says what is wrong
        return body
    return {**body, "messages": [_message(message, images) for message in messages]}


def _message(message: Any, images: Path | None) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_part(part, images) for part in message["content"]]}


def _part(part: Any, images: Path | None) -> Any:
    image = part.get("image_url") if isinstance(part, dict) else None
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or SCHEME.match(url):
        return part
    if images is None:
        raise RowError("invalid_image_path", f"image {url[:80]!r} is a path; say with --images where paths start")
    kind = mimetypes.guess_type(url)[0] or "image/png"  # readers look at the bytes
    content = base64.b64encode(_content(url, images)).decode()
    address = f"data:{kind};base64,{content}"
    return {**part, "image_url": {**image, "url": address} if isinstance(image, dict) else address}


def _content(name: str, folder: Path) -> bytes:
    shown = repr(name[:80])
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise RowError("invalid_image_path", f"image {shown} lies outside of the folder of --images")
        if not path.is_file():
            raise RowError("invalid_image_path", f"image {shown} is no file in the folder of --images")
        if path.stat().st_size > MAX_FILE_BYTES:
            limit = f"the {MAX_FILE_BYTES // 2**20} MiB allowed"
            raise RowError("invalid_image_path", f"image {shown} is larger than {limit}; shrink it first")
        return path.read_bytes()
    except OSError as error:
        raise RowError("invalid_image_path", f"image {shown} cannot be read ({error.strerror})") from None
    except ValueError as error:  # a null byte in the path
        if isinstance(error, RowError):
            raise
        raise RowError("invalid_image_path", f"image {shown} is no path ({error})") from None

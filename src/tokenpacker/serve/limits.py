"""How much a request may ask for. Without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request, and of all that are held at once.

    JSON may be nested about 200 levels deep, which is the limit of pydantic's reader.

    Args:
        body_bytes: size of a request.
        body_s: seconds in which a body must arrive.
        body_rate: bytes a second that give a body more time.
        messages: of a conversation.
        characters: of text in all messages together.
        images: of a request.
        image_bytes: size of an image file, before it is decoded.
        image_pixels: of one image; read from the file's header, before it is decoded.
        request_pixels: of all images of a request together.
        answers: largest `n`.
        stops: texts in `stop`.
        max_tokens: longest answer that may be asked for.
        request_s: seconds from the first byte of a request to the last byte of its answer.
        fetch_s: seconds to fetch one image from its address, redirects included.
        redirects: of an address.
        waiting: requests that are being read at once, and as many in the engine's queue.

    Raises:
        ValueError: for a limit that is not positive; only `redirects` may be 0.
    """

    body_bytes: int = 32 * 2**20
    body_s: float = 20.0
    body_rate: int = 64 * 2**10
    messages: int = 256
    characters: int = 200_000
    images: int = 16
    image_bytes: int = 20 * 2**20
    image_pixels: int = 40_000_000
    request_pixels: int = 80_000_000
    answers: int = 8
    stops: int = 4
    max_tokens: int = 4096
    request_s: float = 300.0
    fetch_s: float = 10.0
    redirects: int = 3
    waiting: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 or (field.name == "redirects" and value == 0)):
                raise ValueError(f"{field.name}={value} must be positive; leave it out for {field.default}")

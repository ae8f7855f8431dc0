"""Images of a request from their addresses: `data:` addresses always, http and https from allowed hosts alone.

A download connects to the very network address that was checked, so that no second answer of a name server leads
elsewhere. It uses no proxy, no cookies and no credentials.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import socket
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tokenpacker.images import MAX_PIXELS, ImageError, TooManyPixelsError, load_image, open_image
from tokenpacker.serve.limits import Limits

if TYPE_CHECKING:
    import httpcore
    from PIL import Image

# The formats of OpenAI's API, and TIFF. Pillow reads many more, with decoders that few people test.
FORMATS = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|II\*\x00|MM\x00\*", re.DOTALL)
JPEG, SCAN = b"\xff\xd8\xff", b"\xff\xda"
MAX_SCANS = 100  # of a JPEG. One takes 90 bytes and goes through all pixels; files of common programs have 1 to 20.
DATA = re.compile(r"data:[^,]{0,200}?;base64,", re.IGNORECASE)
REDIRECTS = (301, 302, 303, 307, 308)
# Metadata services with addresses that Python, or an older one, takes for public: Azure's and Oracle's.
METADATA = (ipaddress.ip_network("168.63.129.16/32"), ipaddress.ip_network("192.0.0.0/24"))


class PictureError(ValueError):
    """An image that cannot be used. The message repeats nothing of its address or content.

    Args:
        number: the image's place in its request, from 0.
    """

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)
        self.number = number


def read_pictures(addresses: Iterable[str], hosts: Collection[str], limits: Limits) -> tuple[Image.Image, ...]:
    """The images behind addresses, upright, in RGB.

    Args:
        hosts: names of hosts that images may be fetched from.

    Raises:
        PictureError: for a host that is not allowed, a failed download, a damaged file, and beyond the limits.
    """
    pictures: list[Image.Image] = []
    pixels_left = limits.request_pixels
    for number, address in enumerate(addresses):
        if number >= limits.images:
            raise PictureError(f"the request has more than the {limits.images} images allowed; send fewer", number)
        picture = _read_picture(number, address, hosts, limits, pixels_left)
        pixels_left -= picture.width * picture.height
        pictures.append(picture)
    return tuple(pictures)


def _read_picture(number: int, address: str, hosts: Collection[str], limits: Limits, pixels_left: int) -> Image.Image:
    try:
        content = read_address(address, hosts, limits)
        if check_picture_file(content, limits) > pixels_left:
            raise PictureError(
                f"the images have more than the {limits.request_pixels:,} pixels allowed in a request; shrink them"
            )
        return load_image(content)
    except ValueError as error:  # a decoder's own words may repeat what is in the file
        message = str(error) if error.__cause__ is None else "the image cannot be decoded; save it anew"
        raise PictureError(message, number) from error
    except MemoryError:
        raise PictureError("the image is too large for the server's memory; shrink it", number) from None


def check_picture_file(content: bytes, limits: Limits) -> int:
    """The number of pixels of an image file, from its header. Raises ValueError for other files, and for too many."""
    if not FORMATS.match(content):
        raise ImageError("the image is not a PNG, JPEG, WebP, GIF or TIFF file; convert it")
    if content.startswith(JPEG) and content.count(SCAN) > MAX_SCANS:
        raise ImageError(f"the image has more than {MAX_SCANS} scans; save it anew")
    try:
        with open_image(content) as (_, image):  # not `image_size`, for which the pixels of some files are decoded
            width, height = image.size
    except TooManyPixelsError:
        most = min(limits.image_pixels, MAX_PIXELS)
        raise ImageError(f"the image has more than the {most:,} pixels allowed; shrink it") from None
    if height * width > limits.image_pixels:
        raise ImageError(f"the image is {height}x{width}, more than the {limits.image_pixels:,} pixels; shrink it")
    return height * width


def read_address(address: str, hosts: Collection[str], limits: Limits) -> bytes:
    """The file behind an address. Raises PictureError."""
    if address[:5].lower() == "data:":
        header = DATA.match(address)
        if header is None:
            raise PictureError("the data address must be of the form data:image/png;base64,... with the file's bytes")
        if (len(address) - header.end()) * 3 // 4 > limits.image_bytes + 2:  # padding
            raise PictureError(f"the image has more than the {limits.image_bytes:,} bytes allowed; shrink it")
        try:
            return base64.b64decode("".join(address[header.end() :].split()), validate=True)
        except ValueError:
            raise PictureError("the data address holds no valid base64; encode the file's bytes anew") from None
    if not re.match("https?:", address, re.IGNORECASE):
        raise PictureError(
            "the image's address is no data: and no http(s): address; send the file as data:image/png;base64,..."
        )
    if not hosts:
        raise PictureError(
            "images are not fetched by this server (--allow-urls HOST allows it); send data:image/png;base64,..."
        )
    return fetch(address, hosts, limits)


def fetch(address: str, hosts: Collection[str], limits: Limits) -> bytes:
    """Downloads a file over http or https from allowed hosts with public network addresses.

    Raises:
        PictureError: for another host, scheme or network address, also of a redirect, and beyond the limits.
    """
    import httpcore
    import httpx

    deadline = time.monotonic() + limits.fetch_s
    try:
        url = httpx.URL(address)
        with httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(), network_backend=_checked_network(deadline)
        ) as pool:
            for _ in range(limits.redirects + 1):
                _check_url(url, hosts)
                target = httpcore.URL(
                    scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path or b"/"
                )
                headers = [(b"Host", url.netloc), (b"Accept", b"image/*"), (b"Accept-Encoding", b"identity")]
                with pool.stream("GET", target, headers=headers) as response:
                    if response.status not in REDIRECTS:
                        return _content(response, limits)
                    found = [value for name, value in response.headers if name.lower() == b"location"]
                if not found:
                    raise PictureError("the image's address redirects to nowhere; check it")
                url = url.join(found[0].decode("ascii"))
    except (httpx.InvalidURL, UnicodeError):
        raise PictureError("the image's address is not valid; check it") from None
    except httpcore.TimeoutException:
        raise PictureError(f"the image did not arrive within {limits.fetch_s:g} seconds; try again") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError):
        raise PictureError("the image cannot be fetched; check its address, or send the file itself") from None
    raise PictureError(f"the image's address redirects more than {limits.redirects} times; give the last address")


def _check_url(url: Any, hosts: Collection[str]) -> None:
    if url.scheme not in ("http", "https"):
        raise PictureError("the image's address redirects to another scheme than http and https")
    if not 0 < (url.port or 80) < 2**16:
        raise PictureError("the image's address has a port that does not exist")
    if url.userinfo:
        raise PictureError("the image's address holds a user name; leave it out")
    names = (url.host, url.raw_host.decode("ascii"))  # of bücher.example the second is xn--bcher-kva.example
    if not any(name.lower().rstrip(".") in hosts for name in names):
        raise PictureError("images are not fetched from this host; send the file as data:image/png;base64,...")


def _content(response: Any, limits: Limits) -> bytes:
    if response.status != 200:
        raise PictureError(f"the image's host answered with status {response.status}; check the address")
    content = bytearray()
    for part in response.iter_stream():
        content += part
        if len(content) > limits.image_bytes:
            raise PictureError(f"the image has more than the {limits.image_bytes:,} bytes allowed; shrink it")
    return bytes(content)


def is_public(address: str) -> bool:
    """Whether a network address belongs to the public internet. An IPv4 address within an IPv6 one does not count."""
    ip = ipaddress.ip_address(address)
    special = ip.is_private or ip.is_multicast or ip.is_reserved or any(ip in network for network in METADATA)
    if isinstance(ip, ipaddress.IPv6Address):
        special = special or ip.is_site_local or ip.sixtofour is not None
    return ip.is_global and not special


def _checked_network(deadline: float) -> httpcore.NetworkBackend:
    """A backend of httpcore that connects to public addresses alone, and ends at the deadline."""
    import httpcore

    def left() -> float:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise httpcore.ReadTimeout
        return seconds

    class Stream(httpcore.NetworkStream):
        """A stream whose every step ends at the deadline."""

        def __init__(self, stream: httpcore.NetworkStream):
            self.stream = stream

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            return self.stream.read(max_bytes, left())

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            self.stream.write(buffer, left())

        def close(self) -> None:
            self.stream.close()

        def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
            return Stream(self.stream.start_tls(ssl_context, server_hostname, left()))

        def get_extra_info(self, info: str) -> Any:
            return self.stream.get_extra_info(info)

    class Network(httpcore.SyncBackend):
        """Resolves a name once, checks all its addresses, and connects to the first that answers."""

        def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Any = None,
        ) -> Any:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # the system has its own limit of time
            addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
            if not all(is_public(address) for address in addresses):
                raise PictureError("the image's host has a private or reserved network address, which is refused")
            for address in addresses[:-1]:
                with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                    return Stream(super().connect_tcp(address, port, left() / 2, local_address, socket_options))
            return Stream(super().connect_tcp(addresses[-1], port, left(), local_address, socket_options))

    return Network()

"""Where images may come from, with name servers and connections that the test decides about."""

from __future__ import annotations

import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpcore
import pytest
from PIL import Image

from tokenpacker.serve.limits import Limits
from tokenpacker.serve.picture_sources import PictureError, fetch, is_public, read_pictures

LIMITS = Limits(image_bytes=20_000, fetch_s=0.6, redirects=2)
HOSTS = ("pictures.example", "other.example")
PUBLIC = "93.184.215.14"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "168.63.129.16",
        "192.0.0.192",
        "100.100.100.200",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
    ],
)
def test_an_address_that_is_not_of_the_public_internet_is_refused(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111"])
def test_a_public_address_is_taken(address):
    assert is_public(address)


class Pictures(BaseHTTPRequestHandler):
    """A web server with pictures, redirects, and tricks."""

    def do_GET(self):
        self.server.asked.append((self.headers["host"], self.path, dict(self.headers)))
        kind, _, rest = self.path[1:].partition("/")
        getattr(self, kind)(rest)

    def picture(self, _rest):
        self.answer(200, picture())

    def moved(self, rest):
        self.answer(302, b"", location=rest)

    def missing(self, _rest):
        self.answer(404, b"secret page")

    def large(self, _rest):
        self.send_response(200)
        self.end_headers()  # without its length
        while True:
            self.wfile.write(b"\x89PNG" * 1000)

    def slow(self, _rest):
        for byte in b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in ({"content-length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def web(monkeypatch):
    """A server to which every public address leads; `web.names` says what the names resolve to, time by time."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.handle_error = lambda *_: None  # clients leave early
    server.asked, server.connected, server.looked_up = [], [], []
    server.names = {host: [[PUBLIC]] for host in HOSTS}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    connect = socket.create_connection

    def look_up(host, port, *_, **__):
        server.looked_up.append(host)
        answers = server.names.get(host, [[host]])
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    def create_connection(address, *args, **options):
        server.connected.append(address[0])
        return connect(server.server_address, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    yield server
    server.shutdown()
    server.server_close()


def test_an_image_is_fetched_from_an_allowed_host(web, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    (image,) = read_pictures(["http://Pictures.EXAMPLE:8080/picture/?a=b#c"], HOSTS, LIMITS)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    ((host, path, headers),) = web.asked
    assert (host, path) == ("pictures.example:8080", "/picture/?a=b")
    assert {name.lower() for name in headers} == {"host", "accept", "accept-encoding"}
    assert web.connected == [PUBLIC]


@pytest.mark.parametrize(
    "address",
    [
        "http://evil.example/picture",
        "http://pictures.example.evil.example/picture",
        "http://evil.example/?pictures.example",
        "http://evil.example#@pictures.example/",
        "http://evil.example\\@pictures.example/",
        "http://127.0.0.1/picture",
        "http://2130706433/picture",
        "http://0177.0.0.1/picture",
        "http://0x7f.1/picture",
        "http://[::1]/picture",
        "http://[::ffff:169.254.169.254]/latest",
        "http://pictures.example:80@evil.example/",
        "http://user:pass@pictures.example/picture",
        "https:pictures.example/picture",
        "http:///picture",
        "http://pictures.example:99999/",
        "http://pictures.exa\nmple/picture",
        "http://\u2100.example/",
    ],
)
def test_another_host_is_refused_without_a_look_up_or_a_connection(web, address):
    with pytest.raises(PictureError) as error:
        fetch(address, HOSTS, LIMITS)
    assert web.looked_up == web.connected == []
    assert "evil" not in str(error.value)


@pytest.mark.parametrize("allowed", ["b\u00fccher.example", "xn--bcher-kva.example"])
def test_a_host_may_be_allowed_in_either_spelling(web, allowed):
    web.names["xn--bcher-kva.example"] = [[PUBLIC]]
    for host in ("b\u00fccher.example", "xn--bcher-kva.example"):
        assert fetch(f"http://{host}/picture", (allowed,), LIMITS) == picture()


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:10.0.0.1"], [PUBLIC, "10.0.0.1"]]
)
def test_an_allowed_name_with_a_private_address_is_refused(web, addresses):
    web.names["pictures.example"] = [addresses]
    with pytest.raises(PictureError, match="private or reserved network address"):
        fetch("http://pictures.example/picture", HOSTS, LIMITS)
    assert web.connected == []


def test_an_allowed_number_for_a_private_address_is_refused(web):
    web.names["2130706433"] = [["127.0.0.1"]]  # as the system's resolver reads it
    for host in ("2130706433", "127.0.0.1"):
        with pytest.raises(PictureError, match="private or reserved network address"):
            fetch(f"http://{host}/picture", (host,), LIMITS)
    assert web.connected == []


def test_the_connection_goes_to_the_address_that_was_checked(web):
    web.names["pictures.example"] = [[PUBLIC], ["127.0.0.1"]]  # a second look-up would lead elsewhere
    assert fetch("http://pictures.example/picture", HOSTS, LIMITS) == picture()
    assert web.connected == [PUBLIC]
    with pytest.raises(PictureError, match="private or reserved"):
        fetch("http://pictures.example/picture", HOSTS, LIMITS)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://169.254.169.254/latest/meta-data", "not fetched from this host"),
        ("http://evil.example/", "not fetched from this host"),
        ("//evil.example/", "not fetched from this host"),
        ("file:///etc/passwd", "another scheme"),
        ("gopher://pictures.example/", "another scheme"),
        ("http://inside.example/", "private or reserved network address"),
    ],
)
def test_a_redirect_is_checked_like_the_first_address(web, target, message):
    web.names["inside.example"] = [["10.0.0.1"]]
    with pytest.raises(PictureError, match=message):
        fetch(f"http://pictures.example/moved/{target}", (*HOSTS, "inside.example"), LIMITS)
    assert web.connected == [PUBLIC]


def test_redirects_are_followed_up_to_their_limit(web):
    there = "http://other.example/picture"
    assert fetch(f"http://pictures.example/moved/{there}", HOSTS, LIMITS) == picture()
    assert fetch("http://pictures.example/moved//picture", HOSTS, LIMITS) == picture()
    for _ in range(3):
        there = f"http://other.example/moved/{there}"
    with pytest.raises(PictureError, match="redirects more than 2 times"):
        fetch(there, HOSTS, LIMITS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "answered with status 404; check the address"),
        ("large", "more than the 20,000 bytes allowed"),
        ("slow", "did not arrive within 0.6 seconds"),
    ],
)
def test_a_bad_answer_ends_soon(web, path, message):
    start = time.monotonic()
    with pytest.raises(PictureError, match=message) as error:
        fetch(f"http://pictures.example/{path}", HOSTS, LIMITS)
    assert time.monotonic() - start < 5  # the server would go on for minutes
    assert "secret" not in str(error.value)


def test_a_host_that_is_not_there_is_one_sentence(web, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(PictureError, match="cannot be fetched; check its address"):
        fetch("http://pictures.example/picture", HOSTS, LIMITS)


def test_the_certificate_must_be_of_the_name_and_not_of_the_number(web, monkeypatch):
    connected, secured = [], []

    class Stream(httpcore.NetworkStream):
        def start_tls(self, ssl_context, server_hostname=None, timeout=None):
            assert ssl_context.check_hostname
            secured.append(server_hostname)
            raise httpcore.ConnectError

        def close(self):
            pass

    def connect_tcp(_self, host, *_):
        connected.append(host)
        return Stream()

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect_tcp)
    with pytest.raises(PictureError, match="cannot be fetched"):
        fetch("https://pictures.example/picture", HOSTS, LIMITS)
    assert (connected, secured) == ([PUBLIC], ["pictures.example"])

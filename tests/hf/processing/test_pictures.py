"""Pictures as addresses and base64: what comes is limited, and never printed."""

import base64
import http.server
import io
import re
import threading

import pytest
import torch

from tokenpacker.hf.processing import pictures
from tokenpacker.hf.processing.pictures import to_source
from tokenpacker.images import ImageError, no_files


@pytest.fixture(scope="module")
def png(image_of):
    file = io.BytesIO()
    image_of(40, 30).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def server(png):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path.startswith("/picture")
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(png if found else b"nothing here")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_one_picture_in_every_form_gives_the_same_tiles(tiny_processor, png, server, tmp_path, image_of):
    path = tmp_path / "picture.png"
    path.write_bytes(png)
    text = base64.b64encode(png).decode()
    in_lines = base64.encodebytes(png).decode()
    forms = [str(path), png, text, in_lines, f"data:image/png;base64,{text}", f"{server}/picture.png"]
    urlsafe = base64.urlsafe_b64encode(png).decode()
    assert urlsafe != text
    forms += [urlsafe, f"data:image/png;base64,{urlsafe}"]
    expected = tiny_processor.image_processor(image_of(40, 30))["pixel_values"]
    for form in forms:
        assert torch.equal(tiny_processor.image_processor(form)["pixel_values"], expected), str(form)[:40]


def test_no_more_is_taken_than_allowed(png, server, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", len(png) - 1)
    text = base64.b64encode(png).decode()
    for form, name in (
        (text, "the text of"),
        (f"data:image/png;base64,{text}", "the text of"),
        (f"{server}/picture", "http"),
    ):
        with pytest.raises(ImageError, match=f"^{name}.* more than the {len(png) - 1:,} bytes allowed"):
            to_source(form)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tiny_processor, png, monkeypatch):
    monkeypatch.setattr("tokenpacker.images.MAX_PIXELS", 100)
    with pytest.raises(ImageError, match=r"is 40x30, more than the 100 pixels allowed"):
        tiny_processor(f"data:image/png;base64,{base64.b64encode(png).decode()}", "<image>")


SECRET = base64.b64encode(b"not a picture, but something that nobody else should read" * 3).decode()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (f"data:image/png;base64,{SECRET}", "is not an image that Pillow can read"),
        (SECRET, "is not an image that Pillow can read"),
        (f"data:image/png;base64,{SECRET}!", "characters that was given as an image is neither the path of a file nor"),
        (f"data:image/png,{SECRET}", "a data address must be of the form 'data:image/png;base64,...'"),
        (f"{SECRET}!" * 40, "is neither the path of a file nor base64; check it"),
    ],
)
def test_messages_do_not_repeat_what_was_sent(tiny_processor, form, message):
    with pytest.raises(ImageError, match=re.escape(message)) as error:
        tiny_processor(form, "<image>")
    assert SECRET[:20] not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("form", [f"{SECRET}!", f"{SECRET}-/", f"http://{SECRET}", f"no/{SECRET}.png", f"{SECRET}\0"])
def test_messages_stay_short(tiny_processor, form):
    with pytest.raises(ImageError) as error:
        tiny_processor(form, "<image>")
    assert SECRET[45:150] not in str(error.value)
    assert len(str(error.value)) < 250
    with pytest.raises(ImageError) as error, no_files():
        tiny_processor(form, "<image>")
    assert len(str(error.value)) < 250


def test_a_download_that_fails_is_named(server):
    with pytest.raises(ImageError, match=r"/gone cannot be downloaded \(.*404.*\); save the picture and pass its path"):
        to_source(f"{server}/gone")
    with pytest.raises(ImageError, match="cannot be downloaded"):
        to_source("http://127.0.0.1:9/none.png")


def test_a_path_that_does_not_exist_is_still_a_path(tiny_processor):
    with pytest.raises(ImageError, match=r"pictures/cat does not exist; check the path"):
        tiny_processor("pictures/cat", "<image>")

"""The page without a server, in Chromium: the same tiles, tokens and answers as Python's, and nothing leaves it."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import random
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from browser import DESKTOP, PHONE, assert_accessible, assert_fits
from PIL import Image

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.scenes.fine_print import FinePrint
from tokenpacker.ui.static_page import EXAMPLES, write_static_page
from tokenpacker.visualize import PackedImage

pytest.importorskip("onnxscript", reason="the export needs onnxscript")
pytest.importorskip("playwright", reason="playwright is not installed")

LEVEL = 1 / 255 / 0.25  # one grey level after normalisation by the carried model's deviation
SIZES = [(1, 1), (1, 5000), (5000, 1), (96, 96), (97, 95), (288, 288), (37, 412), (301, 153), (640, 480), (1199, 801)]
ANSWERED = "#answer-cost:has-text('image tokens')"
# of the page's folder; and the answer to a question as the worker gives it
MODULES = """async () => {
    const load = path => import(new URL(path, location));
    window.ours = Object.assign({}, ...await Promise.all(['./tiling.js', './sequence.js', './picture.js'].map(load)));
    window.described = await (await fetch('page.json')).json();
    window.fileOf = (text, type) => new Blob([Uint8Array.from(atob(text), c => c.charCodeAt(0))], {type});
}"""
TILES = """async ([png, scaleFactor]) => {
    const {picture} = await ours.readPicture(fileOf(png, 'image/png'));
    const layout = ours.planLayout([picture.height, picture.width], described, scaleFactor);
    const bytes = new Uint8Array(ours.makeTiles(picture, layout.grid, described.processor).buffer);
    let text = '';
    for (let i = 0; i < bytes.length; i += 30000) text += String.fromCharCode(...bytes.subarray(i, i + 30000));
    return {layout, ids: ours.imageTokenIds(layout, described), tiles: btoa(text)};
}"""
ASK = """async (cases) => {
    const {Model} = await import(new URL('./model.js', location));
    const model = await Model.load(described, () => {});
    const answers = [];
    for (const [png, question, scaleFactor] of cases) {
        const {picture} = await ours.readPicture(fileOf(png, 'image/png'));
        const layout = ours.planLayout([picture.height, picture.width], described, scaleFactor);
        const ids = [];
        for await (const id of model.answer(picture, question, layout)) ids.push(id);
        answers.push([ours.promptIds(model.tokenizer, question, layout, described), ids]);
    }
    return answers;
}"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """`python -m http.server`, silent. It must not depend on the types that a system knows."""

    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        **{".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"},
    }

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def parts():
    model = TokenPackerForConditionalGeneration.from_pretrained(carried_model_path()).eval()
    return model, TokenPackerProcessor.from_pretrained(carried_model_path())


@pytest.fixture(scope="module")
def processor(parts):
    return parts[1]


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """The page, exported once, in a sub-folder of what is hosted."""
    import os
    if os.environ.get("PAGE"):
        from pathlib import Path
        return Path(os.environ["PAGE"])
    try:
        return write_static_page(*parts, tmp_path_factory.mktemp("host") / "a" / "page")
    except OSError as error:
        if "npm pack" not in str(error):
            raise
        pytest.skip(f"the npm registry cannot be reached: {error}")


@pytest.fixture(scope="module")
def address(folder):
    handler = functools.partial(Handler, directory=folder.parent.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{folder.parent.name}/{folder.name}/"
        server.shutdown()


@pytest.fixture
def modules(open_page, address):
    """A page in which the modules of ours are loaded, as `ours`."""
    page = open_page(address)
    page.evaluate(MODULES)
    return page


@pytest.fixture
def ready(open_page, address):
    """Opens the page and waits for the model; further arguments are those of `open_page`."""

    def open_(*args, **kwargs):
        page = open_page(address, *args, **kwargs)
        page.wait_for_selector("#ask:enabled", timeout=60_000)
        return page

    return open_


def encoded(picture: Image.Image, **kwargs) -> str:
    file = io.BytesIO()
    picture.save(file, **{"format": "PNG", **kwargs})
    return base64.b64encode(file.getvalue()).decode()


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8))


def page_tiles(page, picture: Image.Image, scale_factor: int = 2) -> tuple[dict, list[int], torch.Tensor]:
    found = page.evaluate(TILES, [encoded(picture), scale_factor])
    tiles = torch.frombuffer(bytearray(base64.b64decode(found["tiles"])), dtype=torch.float32)
    return found["layout"], found["ids"], tiles.view(-1, 3, 96, 96)


def prompt(processor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_tiles_equal_pythons_at_many_sizes(modules, processor):
    rng = random.Random(0)
    sizes = SIZES + [(rng.randint(1, 700), rng.randint(1, 700)) for _ in range(20)]
    worst = 0.0
    for size in sizes:
        picture = noise(*size)
        theirs = processor(images=picture, text=prompt(processor, "what?"), return_tensors="pt")["pixel_values"]
        layout, _, ours = page_tiles(modules, picture)
        assert ours.shape == theirs.shape, (size, layout)
        difference = (ours - theirs).abs().max().item()
        print(size, layout["grid"], difference / LEVEL)
        worst = max(worst, difference)
    # A picture that shrinks has equal bytes; one that grows is made of floats, whose sums round differently.
    assert worst < 1e-3 * LEVEL

"""The page without a server, in Chromium: the same tiles, tokens and answers as Python's, and nothing leaves it."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import io
import os
import random
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from browser import DESKTOP, PHONE, assert_accessible, assert_fits
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.hf.versions import HAS_EXPORTERS
from tokenpacker.scenes.fine_print import FinePrint
from tokenpacker.ui.static_page import EXAMPLES, write_static_page
from tokenpacker.visualize import PackedImage

pytest.importorskip("onnxscript", reason="the export needs onnxscript")
pytestmark = pytest.mark.skipif(not HAS_EXPORTERS, reason="this version of transformers has no exporters")
pytest.importorskip("playwright", reason="playwright is not installed")

LEVEL = 1 / 255 / 0.25  # one grey level after normalisation by the carried model's deviation
SIZES = [(1, 1), (1, 5000), (5000, 1), (96, 96), (97, 95), (288, 288), (37, 412), (301, 153), (640, 480), (1199, 801)]
ANSWERED = "#answer-cost:has-text('image tokens')"
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
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def do_GET(self):
        if self.path != "/favicon.ico":  # which Chromium asks for, where a page names no icon
            return super().do_GET()
        return self.send_response(204) or self.end_headers()

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
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # torch's exporter prints, and warns of its own deprecated names
            return write_static_page(*parts, tmp_path_factory.mktemp("host") / "a" / "page")
    except OSError as error:
        if "npm pack" not in str(error):
            raise
        pytest.skip(f"the npm registry cannot be reached: {error}")


@contextlib.contextmanager
def hosted(handler):
    """The address of a server of this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def address(folder):
    with hosted(functools.partial(Handler, directory=folder.parent.parent)) as server:
        yield f"{server}{folder.parent.name}/{folder.name}/"


@pytest.fixture
def modules(open_page, address):
    """A page that is empty but for our modules, as `ours`."""
    page = open_page(f"{address}page.json")
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


def png_of(height: int, width: int) -> bytes:
    """A file whose header promises a large picture, of which it has a few pixels only."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def python_tiles(processor, picture: Image.Image) -> torch.Tensor:
    return processor(images=picture, text=prompt(processor, "what?"), return_tensors="pt")["pixel_values"]


def answered(page):
    page.wait_for_selector(ANSWERED, timeout=60_000)
    return page.inner_text("#answer-text")


def test_tiles_equal_pythons_at_many_sizes(modules, processor):
    rng = random.Random(0)
    for size in SIZES + [(rng.randint(1, 500), rng.randint(1, 500)) for _ in range(4)]:
        picture = noise(*size)
        theirs, (layout, _, ours) = python_tiles(processor, picture), page_tiles(modules, picture)
        assert ours.shape == theirs.shape, (size, layout)
        # A picture that shrinks gives equal bytes; one that grows is summed in floats, which round elsewhere.
        worst = (ours - theirs).abs().max().item()
        assert worst < 1e-3 * LEVEL, (size, worst / LEVEL)


def test_grey_pictures_have_equal_tiles_and_transparent_ones_within_a_level(modules, processor):
    for mode, allowed in (("L", 1e-3), ("RGBA", 1.001)):  # a browser multiplies colours by their alpha and rounds
        picture = noise(200, 310, mode)
        ours = page_tiles(modules, picture)[2]
        assert (ours - python_tiles(processor, picture)).abs().max().item() <= allowed * LEVEL, mode


def test_a_photograph_that_lies_on_its_side_is_turned_upright(modules, processor):
    picture, exif = FinePrint("test")[2].image, Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    found = modules.evaluate(TILES, [base64.b64encode(file.getvalue()).decode(), 2])
    ours = torch.frombuffer(bytearray(base64.b64decode(found["tiles"])), dtype=torch.float32).view(-1, 3, 96, 96)
    theirs = python_tiles(processor, Image.open(file))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean().item() < LEVEL  # two decoders of JPEG


def test_counts_ids_and_windows_equal_pythons(modules, processor):
    rng = random.Random(1)
    sizes = [(rng.randint(1, 900), rng.randint(1, 900)) for _ in range(25)]
    cases = [(size, rng.choice((2, 3, 4)), rng.choice((None, 37, 100, 250))) for size in sizes]
    found = modules.evaluate(
        """cases => cases.map(([size, scaleFactor, budget]) => {
            const layout = ours.planLayout(size, described, scaleFactor, budget);
            const ids = ours.imageTokenIds(layout, described);
            const sources = ids.map((_, i) => ours.tokenSource(layout, i, size, described));
            return {count: layout.numTokens, ids, sources};
        })""",
        cases,
    )
    for (size, scale_factor, budget), ours in zip(cases, found, strict=True):
        layout = processor.image_layout(size, scale_factor=scale_factor, max_image_tokens=budget)
        assert ours["count"] == layout.num_tokens
        ids = (processor.image_token_id, processor.tile_separator_id, processor.row_separator_id)
        assert ours["ids"] == layout.token_ids(*ids)
        packed = PackedImage.plan(
            processor, Image.new("RGB", size[::-1]), scale_factor=scale_factor, max_image_tokens=budget
        )
        for index, shown in enumerate(ours["sources"]):
            source = packed.source(index)
            if source is None:
                assert shown is None
                continue
            assert (shown["tile"], shown["row"], shown["col"]) == (source.tile, source.row, source.col)
            assert (shown["box"] is None) == (source.box is None)
            assert source.box is None or shown["box"] == pytest.approx(source.box)


def test_a_budget_below_one_tile_is_refused_in_pythons_words(modules, processor):
    ask = "budget => { try { ours.planLayout([9, 9], described, 2, budget); } catch (error) { return error.message; } }"
    with pytest.raises(ValueError, match="too small") as refused:
        processor.image_layout((9, 9), scale_factor=2, max_image_tokens=36)
    assert modules.evaluate(ask, 36) == str(refused.value)


def test_prompts_have_pythons_ids_whatever_is_asked(modules, processor):
    questions = [
        "what number is in the red box?",
        " two  spaces\nand a line",
        "Wie heißt das? 你好 🙂",
        "</s> don't! 3,14 <b>",
    ]
    picture = Image.new("RGB", (200, 100))
    found = modules.evaluate(
        """async (questions) => {
            const {Tokenizer} = await import(new URL('./vendor/tokenizers.min.mjs', location));
            const files = ['tokenizer.json', 'tokenizer_config.json'].map(async path => (await fetch(path)).json());
            const tokenizer = new Tokenizer(...await Promise.all(files));
            const layout = ours.planLayout([100, 200], described, 3);
            const ids = question => ours.promptIds(tokenizer, question, layout, described);
            return questions.map(question => { try { return ids(question); } catch (error) { return error.message; } });
        }""",
        [*questions, "what is <image>?"],
    )
    for question, ids in zip(questions, found, strict=False):
        theirs = processor(images=picture, text=prompt(processor, question), scale_factor=3)["input_ids"][0]
        assert ids == list(theirs), question
    assert found[-1] == "The question holds <image>, which stands for a picture; leave it out."


def test_answers_equal_torchs_at_every_scale_factor(modules, parts):
    model, processor = parts
    cases = []
    for index in range(12):
        sample = FinePrint("test")[index]
        cases += [(sample.image, random.Random(index).choice(sample.questions).text, factor) for factor in (2, 3, 4)]
    found = modules.evaluate(ASK, [(encoded(picture), *rest) for picture, *rest in cases])
    for (picture, question, factor), (ids, answer) in zip(cases, found, strict=True):
        inputs = processor(images=picture, text=prompt(processor, question), scale_factor=factor, return_tensors="pt")
        assert ids == inputs["input_ids"][0].tolist()
        with torch.inference_mode():
            theirs = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        assert [*answer, model.generation_config.eos_token_id] == theirs, (question, factor)


def test_a_moved_slider_changes_the_count_and_the_answer_stays(ready, processor):
    page = ready()
    picture = FinePrint("test")[next(iter(EXAMPLES))].image
    for factor, key in ((2, "Home"), (3, "ArrowRight"), (4, "ArrowRight")):
        page.focus("#factor")
        page.keyboard.press(key)
        count = processor.image_layout((picture.height, picture.width), scale_factor=factor).num_tokens
        assert page.inner_text("#count") == str(count)  # before anything is asked
        if factor == 2:
            page.click("#ask")
        page.wait_for_selector(f"#answer-cost:has-text(' {count} image tokens')", timeout=60_000)
        assert page.inner_text("#answer-text") == "73"
    assert page.locator("#answers tbody tr").count() == 3


def test_a_budget_leaves_out_tiles(ready):
    page = ready()
    page.focus("#budget")
    page.keyboard.press("Home")
    assert page.inner_text("#count") == "37"
    assert page.inner_text("#layout").endswith("one tile, 36 tokens each")
    assert page.is_hidden("#thumbnail")
    page.keyboard.press("End")
    assert page.inner_text("#budget-text") == "no limit"


def test_a_clicked_token_shows_its_window(ready):
    page = ready()
    page.click("#tiles", position={"x": 3, "y": 3})
    assert page.inner_text("#token-number") == "1 of 259"
    assert "Row 1, column 1 of tile 1. Its window is 2 × 2 patches: rows 0 to " in page.inner_text("#token-text")
    assert page.is_visible("#window")
    page.focus("#token")
    for _ in range(36):
        page.keyboard.press("ArrowRight")
    assert "A separator" in page.inner_text("#token-text")
    page.click("#thumbnail-tile", position={"x": 3, "y": 3})
    assert "of the thumbnail" in page.inner_text("#token-text")
    page.locator(".switch").get_by_text("Tokens").click()
    assert page.is_checked("input[value=tokens]")


def test_a_picture_of_the_user_is_read_and_nothing_is_fetched_after_loading(chromium, address):
    context = chromium.new_context()
    page, requests = context.new_page(), []
    context.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_selector("#ask:enabled", timeout=60_000)
    assert {url for url in requests if not url.startswith((address, "blob:"))} == set()
    assert len(requests) > 10
    requests.clear()
    context.set_offline(True)
    file = io.BytesIO()
    FinePrint("test")[1].image.save(file, "PNG")
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.wait_for_selector("#layout:has-text('153 × 301')")
    page.fill("#question", "which number is in the purple box?")
    page.keyboard.press("Enter")
    assert answered(page) == "52"
    assert {url for url in requests if not url.startswith("blob:")} == set()
    context.close()


def test_neither_page_nor_worker_can_send_anything_to_another_host(chromium, address):
    heard = []

    class Ear(Handler):
        def do_GET(self):
            heard.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        do_POST = do_GET

    with hosted(Ear) as other:
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector("#ask:enabled", timeout=60_000)
        send = """url => fetch(url, {method: 'POST', body: 'a picture', mode: 'no-cors'})
            .then(() => 'sent', () => 'refused')"""
        assert page.evaluate(send, other) == "refused"
        assert [worker.evaluate(send, other) for worker in page.workers] == ["refused"]
        page.evaluate("url => { new Image().src = url; navigator.sendBeacon(url, 'a picture'); }", other)
        page.wait_for_timeout(300)
        page.close()
    assert heard == []


def test_a_host_that_isolates_its_pages_gets_threads(open_page, folder):
    class Isolated(Handler):
        def end_headers(self):
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            super().end_headers()

    with hosted(functools.partial(Isolated, directory=folder)) as server:
        page = open_page(server)
        page.wait_for_selector("#ask:enabled", timeout=60_000)
        page.click("#ask")
        assert answered(page) == "73"
        assert len(page.workers) == min(4, os.cpu_count() or 1)  # the model's own, and one for each further thread


def test_what_is_no_picture_gets_a_sentence(ready):
    page = ready()
    whole = base64.b64decode(encoded(noise(60, 80)))
    for name, content, told in (
        (
            "a.svg",
            b'<svg xmlns="http://www.w3.org/2000/svg"/>',
            "a.svg is not a picture that this page reads; give a PNG",
        ),
        ("b.png", b"", "b.png is not a picture that this page reads"),
        ("c.png", whole[:20], "c.png cannot be read; it is damaged"),
        (
            "d.png",
            png_of(6_000, 12_000),
            "d.png is 6000 × 12000, 72 million pixels; this page reads 50. Shrink it first.",
        ),
        ("e.png", png_of(50_000, 60_000), "e.png cannot be read; it is damaged, or too large for this browser"),
    ):
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})
        page.wait_for_selector(f"#problem:has-text('{name}')")
        assert told in page.inner_text("#problem")
    assert page.inner_text("#count") == "259"  # of the picture before


def test_the_page_fits_a_phone_and_people(ready):
    for viewport, scheme in ((PHONE, "light"), (DESKTOP, "dark")):
        page = ready(viewport, color_scheme=scheme)
        page.click("#ask")
        answered(page)
        page.click("#tiles", position={"x": 30, "y": 30})
        assert_fits(page)
        assert_accessible(page)


def test_a_missing_file_of_the_model_is_told(chromium, folder):
    class Incomplete(Handler):
        def do_GET(self):
            if "decoder_model_merged" in self.path:
                self.send_error(404)
            else:
                super().do_GET()

    with hosted(functools.partial(Incomplete, directory=folder)) as server:
        page = chromium.new_page()
        page.goto(server)
        page.wait_for_selector(
            "#status-text:has-text('cannot be fetched (404); host the folder whole')", timeout=60_000
        )
        page.close()

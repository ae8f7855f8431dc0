"""The page of `tokenpacker ui` in a browser, over the carried model that knows regions."""

from __future__ import annotations

import base64
import http.client
import io
import re
import struct
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from browser import PHONE, assert_accessible, assert_fits
from fake_engine import FakeEngine, FakePrompt
from tokenpacker.scenes import FinePrint, Regions

pytest.importorskip("gradio", reason="gradio is not installed")
TIMEOUT_MS = 60_000  # a loaded machine is slow
SAMPLE, OTHER = FinePrint("test")[3], FinePrint("test")[11]


class EitherEngine:
    """The real engine, and a fake one for questions with WAIT, which keep the answer open."""

    def __init__(self, real, fake):
        self.real, self.fake = real, fake

    def prepare(self, question):
        text = question.messages[-1]["content"][-1]["text"]
        return (self.fake if "WAIT" in text else self.real).prepare(question)

    def submit(self, prepared, listener):
        return (self.fake if isinstance(prepared, FakePrompt) else self.real).submit(prepared, listener)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page's server in a thread, with its address and its parts."""
    from tokenpacker.cli.loading import load_model
    from tokenpacker.serve.embedded import EmbeddedEngine
    from tokenpacker.serve.server import ServeSettings, listen
    from tokenpacker.ui.page_actions import PageActions
    from tokenpacker.ui.page_server import build_app, page_server

    model, processor = load_model("tiny-regions")
    real, fake = EmbeddedEngine(model, processor), FakeEngine()
    actions = PageActions(engine=EitherEngine(real, fake), model=model, processor=processor)
    addresses: list[str] = []
    ready = threading.Event()

    def on_ready(address):
        addresses.append(address)
        ready.set()

    with listen(ServeSettings(model="tiny-regions", port=0)) as listener:
        server = page_server(build_app("tiny-regions", actions), "127.0.0.1", on_ready)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(60)
        yield SimpleNamespace(address=addresses[0], actions=actions, engine=real, fake=fake)
        server.should_exit = True
        thread.join(10)
    real.close(0)
    assert not thread.is_alive()


@pytest.fixture
def visit(served, open_page):
    """Opens the page; the test fails if it asks another host for anything."""
    foreign = []

    def visit_(*arguments, query="", **options):
        page = open_page("about:blank", *arguments, **options)
        page.set_default_timeout(TIMEOUT_MS)
        page.on("request", lambda request: note(request.url))
        with page.expect_response(lambda response: "/queue/join" in response.url):  # of the load event
            page.goto(served.address + query)
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        page.wait_for_function("document.querySelectorAll('.stage .stage-say').length === 1")
        return page

    def note(url):
        if not url.startswith(("data:", "blob:")) and urlsplit(url).netloc != urlsplit(served.address).netloc:
            foreign.append(url)

    yield visit_
    assert not foreign


def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def add(page, *files: bytes, name: str = "image.png"):
    page.get_by_label("Add images").set_input_files(
        [{"name": name, "mimeType": "image/png", "buffer": file} for file in files]
    )


def shown(page, number: int = 1):
    page.get_by_role("button", name=f"Image {number}", exact=True).wait_for()
    return page.locator(".stage svg")


def ask(page, text: str):
    page.get_by_label("Question").fill(text)
    page.get_by_label("Question").press("Enter")


def answers(page, lane: str = "Conversation") -> list[str]:
    """The answers of a lane, once the page takes the next question."""
    page.wait_for_function("document.querySelectorAll('.chat .answer').length > 0")
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    return page.get_by_role("log", name=lane, exact=True).locator(".answer").all_inner_texts()


def count(page, lane: int = 0) -> int:
    return int(page.locator(".count b").nth(lane).inner_text().replace(",", ""))


def wait_for_count(page, tokens: int, lane: int = 0) -> None:
    page.wait_for_function(
        "([lane, tokens]) => document.querySelectorAll('.count b')[lane]?.innerText === tokens",
        arg=[lane, f"{tokens:,}"],
    )


def tokens_of(served, image: Image.Image, **budget) -> int:
    return served.actions.processor.image_layout((image.height, image.width), **budget).num_tokens


def alert(page) -> str:
    page.wait_for_function("[...document.querySelectorAll('[role=alert]')].some(part => part.innerText)")
    return " ".join(page.get_by_role("alert").all_inner_texts()).strip()


def place_in(page, image: Image.Image, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the image is on the screen."""
    return page.locator(".stage svg image").evaluate(
        "(image, at) => (({ x, y }) => [x, y])(new DOMPoint(...at).matrixTransform(image.getScreenCTM()))",
        [x, y],
    )


def drag(page, image: Image.Image, *places: tuple[float, float]) -> None:
    page.locator(".stage svg").scroll_into_view_if_needed()
    for number, (x, y) in enumerate(places):
        page.mouse.move(*place_in(page, image, x, y), steps=4)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def test_an_uploaded_image_is_asked_about_and_its_cost_is_shown(served, visit):
    page = visit()
    add(page, png(SAMPLE.image))
    shown(page)
    wait_for_count(page, tokens_of(served, SAMPLE.image))
    question = SAMPLE.questions[0]
    ask(page, question.text)
    assert answers(page) == [question.answer]
    page.get_by_text(re.compile(r"\d+ tokens in the prompt; first token after [\d,]+ ms; \d+ in the answer")).wait_for()
    assert_accessible(page)


def test_an_answer_is_shown_while_it_grows_and_stop_keeps_what_was_said(served, visit):
    page = visit()
    ask(page, "one two WAIT three")
    page.locator(".answer", has_text="one two").wait_for()
    page.get_by_role("button", name="Stop").click()
    assert answers(page)[0].split() == ["one", "two"]
    assert served.fake.tickets[-1].ended.wait(30)


def test_an_answer_ends_when_its_reader_leaves(served, visit):
    page = visit()
    ask(page, "WAIT for nobody")
    page.get_by_text("waiting for").wait_for()
    page.close()
    assert served.fake.tickets[-1].ended.wait(30)


def test_the_count_and_the_grid_follow_the_sliders_before_a_model_runs(served, visit):
    page, runs = visit(), sum(served.engine.batch_sizes.values())
    add(page, png(SAMPLE.image))
    shown(page)
    page.get_by_label("number input for Scale factor").first.fill("3")
    page.get_by_label("number input for Scale factor").first.press("Tab")
    wait_for_count(page, tokens_of(served, SAMPLE.image, scale_factor=3))
    budget = tokens_of(served, SAMPLE.image, scale_factor=3) - 1
    page.get_by_label("number input for Token budget").first.fill(str(budget))
    page.get_by_label("number input for Token budget").first.press("Tab")
    smaller = tokens_of(served, SAMPLE.image, scale_factor=3, max_image_tokens=budget)
    wait_for_count(page, smaller)
    layout = served.actions.processor.image_layout(
        (SAMPLE.image.height, SAMPLE.image.width), scale_factor=3, max_image_tokens=budget
    )
    cells = layout.tile_grid.rows * layout.tile_grid.cols * layout.tokens_per_tile
    drawn = "document.querySelector('.stage-tokens').getAttribute('d').split('M').length - 1"
    assert page.evaluate(drawn) == cells
    assert sum(served.engine.batch_sizes.values()) == runs


def test_scale_factor_0_gives_each_tile_tokens_by_its_detail(served, visit):
    page = visit()
    add(page, png(SAMPLE.image))
    shown(page)
    page.get_by_label("number input for Scale factor").first.fill("0")
    page.get_by_label("number input for Scale factor").first.press("Tab")
    plan = served.actions.processor.plan_image(SAMPLE.image, scale_factor="auto")
    wait_for_count(page, plan.layout.num_tokens)
    drawn = "document.querySelector('.stage-tokens').getAttribute('d').split('M').length - 1"
    assert page.evaluate(drawn) == sum(plan.layout.tile_tokens[:-1])
    stage = page.locator("svg[role=application]")
    assert "tiles of different numbers of tokens" in stage.get_attribute("aria-label")
    stage.focus()
    across = sum(cols for _, cols in plan.layout.token_grids[: plan.layout.tile_grid.cols])
    chosen = set()
    for _ in range(across):  # through the tiles of the first row, and once more at its end
        page.keyboard.press("ArrowRight")
        chosen.add(page.evaluate("document.querySelector('.stage-chosen').getAttribute('d')"))
    assert len(chosen) == across - 1  # the first token was chosen before
    page.get_by_text(f"of tile {plan.layout.tile_grid.cols}, ").wait_for()
    ask(page, SAMPLE.questions[0].text)
    page.get_by_role("log", name="Conversation", exact=True).locator(".answer").wait_for()


def test_two_budgets_answer_side_by_side(served, visit):
    page = visit()
    add(page, png(SAMPLE.image))
    shown(page)
    page.get_by_label("Compare with a second budget").check()
    page.get_by_label("number input for Second scale factor").fill("4")
    page.get_by_label("number input for Second scale factor").press("Tab")
    wait_for_count(page, tokens_of(served, SAMPLE.image, scale_factor=4), lane=1)
    assert count(page) == tokens_of(served, SAMPLE.image)
    ask(page, SAMPLE.questions[0].text)
    page.get_by_role("log", name="Second conversation").locator(".answer").wait_for()
    assert answers(page) == [SAMPLE.questions[0].answer]
    assert len(answers(page, "Second conversation")) == 1


def test_a_drawn_region_is_asked_about(served, visit):
    sample = Regions("test", "box")[2]
    question = next(question for question in sample.questions if len(question.regions) == 1)
    left, top, right, bottom = sample.regions[question.regions[0]]
    middle, page = (top + bottom) / 2, visit()
    paths = {
        "Box": [(left, top), (right, bottom)],
        "Outline": [(left, top), (right, top), (right, bottom), (left, bottom)],
        "Brush": [(left + 2, middle), (right - 2, middle)],
    }
    for tool, path in paths.items():
        if tool != "Box":
            page.get_by_role("button", name="New conversation").click()
            page.locator(".stage-empty").wait_for()
        add(page, png(sample.image))
        shown(page)
        page.get_by_role("button", name=tool, exact=True).click()
        drag(page, sample.image, *path)
        page.wait_for_function("document.querySelector('textarea').value === '<mask>'")
        assert page.locator(".stage-region").count() == 1
        ask(page, question.text)
        assert answers(page) == [question.answer]
    assert "[region 1]" in page.get_by_role("log").first.inner_text()


def focused(page) -> str:
    """What has the focus: the label or the text of a control, "svg" for the image."""
    return page.evaluate(
        "(({ tagName, ariaLabel, innerText }) => tagName === 'svg' ? 'svg' : ariaLabel || innerText)"
        "(document.activeElement)"
    )


def tab_to(page, name: str) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused(page) == name:
            return
    pytest.fail(f"Tab does not reach {name}")


def press(page, *keys: str) -> None:
    """Presses keys; "ArrowUp 3" three times."""
    for key in keys:
        name, _, times = key.partition(" ")
        for _ in range(int(times or 1)):
            page.keyboard.press(name)


def outlines(page, count: int) -> list[str]:
    page.wait_for_function("count => document.querySelectorAll('.stage-region').length === count", arg=count)
    page.wait_for_function(
        "count => document.querySelector('textarea').value.split('<mask>').length === count + 1", arg=count
    )
    return [part.get_attribute("d") for part in page.locator(".stage-region").all()]


def test_regions_are_drawn_with_the_keyboard_alone(served, visit):
    page = visit(PHONE)
    add(page, png(Image.new("RGB", (200, 100), "teal")))  # a step is 4 pixels, from 100, 50
    shown(page)
    page.get_by_label("Add images").focus()
    tab_to(page, "Box")
    press(page, "Enter")
    assert focused(page) == "Box"
    tab_to(page, "svg")
    said = page.locator(".stage-say")
    assert said.inner_text().startswith("Box: arrow keys move the cross-hair")
    assert "Enter sets a corner" in page.locator(".stage svg").get_attribute("aria-label")
    press(page, "ArrowLeft 5", "Shift+ArrowUp 2", "Enter", "ArrowRight 30", "ArrowDown 5")
    assert page.locator(".stage-cross").last.is_visible()
    assert_fits(page)
    press(page, "Enter")
    assert outlines(page, 1) == ["M80 49.2H200V69.2H80Z"]
    assert focused(page) == "svg"
    assert said.inner_text() == "1 region in the question."

    press(page, "Enter", "ArrowLeft", "Escape")
    assert said.inner_text() == "Cancelled."
    assert page.locator(".stage-draft").get_attribute("d") == ""
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "Clear regions"

    page.get_by_label("Add images").focus()
    tab_to(page, "Outline")
    press(page, "Space")
    tab_to(page, "svg")
    press(page, "Enter 2")
    assert said.inner_text() == "An outline needs three points."
    press(page, "ArrowLeft 5", "Enter", "ArrowUp 5", "Enter 2")
    assert outlines(page, 2)[1] == "M196 69.2L176 69.2L176 49.2Z"

    page.get_by_label("Add images").focus()
    tab_to(page, "Brush")
    press(page, "Enter")
    tab_to(page, "svg")
    press(page, "Space", "ArrowDown 2", "Space")
    assert outlines(page, 3)[2] == "M176 49.2L176 53.2L176 57.2"
    assert_accessible(page)

    press(page, "Delete")
    outlines(page, 2)
    page.keyboard.press("Tab")
    assert focused(page) != "svg"


def test_an_image_is_removed_with_the_keyboard_until_it_was_asked_about(served, visit):
    page = visit()
    add(page, png(SAMPLE.image), png(OTHER.image))
    shown(page, 2)
    page.get_by_label("Add images").focus()
    tab_to(page, "Remove image 2")
    press(page, "Enter")
    page.get_by_role("button", name="Remove image 1", exact=True).wait_for()
    assert page.locator(".stage-strip img").count() == 1
    assert focused(page) == "Add images"
    ask(page, SAMPLE.questions[0].text)
    assert answers(page) == [SAMPLE.questions[0].answer]
    page.locator(".stage-remove").wait_for(state="detached")
    add(page, png(OTHER.image))
    page.get_by_role("button", name="Remove image 2", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.stage-strip img').length === 1")
    assert page.get_by_role("button", name="Remove image 1", exact=True).count() == 0


def test_a_token_is_explained_by_mouse_and_by_keyboard(served, visit):
    page = visit()
    add(page, png(SAMPLE.image))
    svg = shown(page)
    drag(page, SAMPLE.image, (1, 1))
    page.get_by_text("Token 1 of").wait_for()
    assert "attention over its patches" in page.locator(".token img").get_attribute("alt")
    svg.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("Token 2 of").wait_for()


def test_two_people_get_their_own_answers(served, visit):
    one, other = visit(), visit()
    add(one, png(SAMPLE.image))
    add(other, png(OTHER.image))
    for page, sample in ((one, SAMPLE), (other, OTHER)):
        shown(page)
        page.get_by_label("Question").fill(sample.questions[0].text)
    for page in (one, other):
        page.get_by_label("Question").press("Enter")
    assert answers(one) == [SAMPLE.questions[0].answer]
    assert answers(other) == [OTHER.questions[0].answer]
    assert OTHER.questions[0].text not in one.get_by_role("log").first.inner_text()


def huge_header() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 99)))
    lengths = [struct.pack(">I", len(content)) for _, content in chunks]
    sums = [struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        length + kind + content + check for length, (kind, content), check in zip(lengths, chunks, sums, strict=True)
    )


def test_files_that_are_no_images_get_a_sentence(served, visit):
    page = visit()
    files = {
        "not a PNG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "cannot be decoded": png(SAMPLE.image)[:200],
        "convert it": b"hello, I am a text",
        "pixels": huge_header(),
    }
    for words, content in files.items():
        add(page, content)
        page.get_by_role("alert").filter(has_text=words).wait_for()
        told = alert(page)
        assert "Traceback" not in told
        assert len(told) < 200
    assert page.locator(".stage-strip button").count() == 0


def test_unusual_images_are_taken(served, visit):
    page = visit()
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    add(
        page,
        png(Image.new("CMYK", (50, 40)), "JPEG"),
        png(Image.new("RGB", (5000, 1), "red")),
        png(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    )
    shown(page, 3)
    assert "first frame" in alert(page)


def test_the_page_fits_a_phone_and_dark_mode(served, visit):
    page = visit(PHONE, color_scheme="dark")
    page.get_by_role("button", name=SAMPLE.questions[0].text).click()
    shown(page)
    ask(page, SAMPLE.questions[0].text)
    answers(page)
    assert_fits(page)
    assert_accessible(page)
    page.get_by_role("button", name="Ask", exact=True).click()
    assert alert(page) == "The question is empty; write one."
    assert_accessible(page)  # the note too has enough contrast


def test_a_link_restores_the_conversation_with_its_images_and_settings(served, visit):
    page = visit()
    add(page, png(SAMPLE.image))
    shown(page)
    page.get_by_label("number input for Scale factor").first.fill("3")
    page.get_by_label("number input for Scale factor").first.press("Tab")
    wait_for_count(page, tokens_of(served, SAMPLE.image, scale_factor=3))
    ask(page, SAMPLE.questions[0].text)
    said = answers(page)
    page.get_by_role("button", name="Link to this conversation").click()
    page.wait_for_function("document.querySelectorAll('textarea')[1]?.value.startsWith('http')")
    link = page.locator("textarea").nth(1).input_value()
    again = visit(query=link.removeprefix(served.address))
    shown(again)
    assert answers(again) == said
    wait_for_count(again, tokens_of(served, SAMPLE.image, scale_factor=3))
    lost = visit(query="/?session=nobody-knows")
    assert "not kept" in alert(lost)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/assets/../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/etc/passwd",
        "/static/..%2f..%2fetc/passwd",
        "/gradio_api/deep_link",
        "/gradio_api/upload_progress",
        "/monitoring",
        "/gradio_api/openapi.json",
    ],
)
def test_no_address_leads_to_a_file_of_the_server(served, path):
    answer = httpx.get(served.address + path)
    assert answer.status_code == 404
    assert "root:" not in answer.text


@pytest.mark.parametrize("path", ["upload", "run/predict", "call/predict", "component_server", "process_recording"])
def test_routes_that_the_page_does_not_need_are_closed(served, path):
    assert httpx.post(f"{served.address}/gradio_api/{path}", json={}).status_code == 404


def test_requests_of_other_pages_and_large_ones_are_refused(served):
    join = f"{served.address}/gradio_api/queue/join"
    assert httpx.post(join, json={}, headers={"origin": "http://evil.example"}).status_code == 403
    connection = http.client.HTTPConnection(urlsplit(served.address).netloc, timeout=30)
    connection.putrequest("POST", "/gradio_api/queue/join")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(served.actions.limits.body_bytes + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_an_event_that_names_a_file_of_the_server_is_refused(served):
    forged = {"path": __file__, "meta": {"_type": "gradio.FileData"}}
    event = {"fn_index": 0, "session_hash": "s1", "event_data": {"data": []}, "data": [None, forged, 2, 9, False, 2, 9]}
    answer = httpx.post(f"{served.address}/gradio_api/queue/join", json=event)
    assert answer.status_code == 400
    assert __file__ not in answer.text


def test_an_event_that_does_not_exist_is_refused_with_a_sentence(served):
    event = {"fn_index": 999, "session_hash": "s1", "data": []}
    answer = httpx.post(f"{served.address}/gradio_api/queue/join", json=event)
    assert (answer.status_code, answer.text) == (400, "the page has no such event; reload the page")


def test_the_page_holds_no_address_in_memory(served):
    page = httpx.get(served.address).text
    assert "gradio_config" in page
    assert " at 0x" not in page


def test_the_address_of_a_file_is_no_image(served):
    from tokenpacker.ui.sessions import Session

    session = Session()
    for address in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png"):
        with pytest.raises(ValueError, match="data:image/png;base64"):
            served.actions.add(session, [address])
    served.actions.add(session, ["data:image/png;base64," + base64.b64encode(png(SAMPLE.image)).decode()])
    with pytest.raises(ValueError, match="data:image/png;base64"):
        served.actions.mark(session, "mask", data=str(Path(__file__)))

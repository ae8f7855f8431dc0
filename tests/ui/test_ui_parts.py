"""What the page is made of, without a browser."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import queue
import struct
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
import torch
from PIL import Image

from fake_engine import FakeEngine
from tokenpacker.serve.questions import Question, Sampling

pytest.importorskip("gradio", reason="gradio is not installed")


def test_a_store_forgets_what_was_not_used_for_longest():
    from tokenpacker.ui.sessions import ByteStore

    store = ByteStore(max_bytes=10)
    first, second = store.put(b"12345"), store.put(b"67890")
    assert store.get(first) == b"12345"
    third = store.put(b"x")
    assert store.get(second) is None
    assert store.get(first)
    assert store.get(third)
    assert store.bytes == 6


def test_a_store_forgets_after_its_time():
    from tokenpacker.ui.sessions import ByteStore

    store = ByteStore(keep_s=0.01)
    key = store.put(b"1")
    time.sleep(0.02)
    assert store.get(key) is None
    assert store.bytes == 0


def test_the_key_of_an_image_restores_no_session():
    from tokenpacker.ui.sessions import ByteStore, restore

    store = ByteStore()
    assert restore(store.put(b"\x89PNG"), store) is None


@pytest.fixture
def actions(tiny_model, tiny_processor):
    from tokenpacker.serve.limits import Limits
    from tokenpacker.ui.page_actions import PageActions

    limits = Limits(images=2, characters=40, request_pixels=5000, messages=3)
    return PageActions(engine=FakeEngine(), model=tiny_model, processor=tiny_processor, limits=limits)


def address(height: int, width: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_limits_of_a_conversation_are_told(actions):
    from tokenpacker.ui.sessions import Session

    session = Session()
    with pytest.raises(ValueError, match="at most 2 images"):
        actions.add(session, [address(8, 8)] * 3)
    with pytest.raises(ValueError, match="5,000 pixels"):
        actions.add(session, [address(80, 80)])
    assert session.pictures == []
    everything = {" ": "empty", "x" * 41: "at most 40 characters"}
    for text, words in everything.items():
        with pytest.raises(ValueError, match=words):
            list(actions.ask(session, text, [(2, 100)]))
    for text in ("a", "b"):
        list(actions.ask(session, text, [(2, 100)]))
    with pytest.raises(ValueError, match="at most 3 messages"):
        list(actions.ask(session, "c", [(2, 100)]))


def test_a_second_question_waits_for_the_first(actions):
    from tokenpacker.ui.sessions import Session

    session = Session()
    steps = actions.ask(session, "one WAIT", [(2, 100)])
    next(steps)
    with pytest.raises(ValueError, match="under way"):
        next(actions.ask(session, "two", [(2, 100)]))
    steps.close()
    assert session.asking is False
    assert actions.engine.tickets[0].ended.wait(5)


def test_errors_of_libraries_and_full_queues_are_told_without_detail(actions):
    from tokenpacker.ui.sessions import Session
    from tokenpacker.ui.streaming import sentence

    with pytest.raises(Exception) as caught:  # noqa: PT011
        list(actions.ask(Session(), "FAIL", [(2, 100)]))
    assert sentence(caught.value) == "The server failed on this request."
    actions.engine.max_waiting = 0
    with pytest.raises(Exception) as caught:  # noqa: PT011
        list(actions.ask(Session(), "x", [(2, 100)]))
    assert "busy; try again in 7 seconds" in sentence(caught.value)


def test_what_people_write_is_no_html(actions):
    from tokenpacker.ui.sessions import Session, Turn

    chat = actions.chat(Session(turns=[Turn("<img src=x>", 0, [], ["<b>"])]), 0)
    assert "<img" not in chat
    assert "<b>" not in chat
    assert "&lt;b&gt;" in chat


def through_the_gate(*requests, **options):
    """(status, body that came through) of each request; the page behind the gate answers with what it reads."""
    from tokenpacker.serve.limits import Limits
    from tokenpacker.ui.gate import Gate

    async def app(scope, receive, send):
        message = await receive() if scope["method"] == "POST" else {"body": b"in"}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    async def ask():
        gate = Gate(app, Limits(body_bytes=5_000, body_s=0.2, body_rate=10**9), **options)
        transport = httpx.ASGITransport(gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:7860") as client:
            answers = [await client.request(method, path, **more) for method, path, more in requests]
            return [(answer.status_code, answer.text) for answer in answers]

    return asyncio.run(ask())


JOIN = "/gradio_api/queue/join"


def test_the_gate_asks_for_the_password():
    tries = [("GET", "/", {"auth": auth}) for auth in (None, ("me", "wrong"), ("me", "secret"))]
    assert [status for status, _ in through_the_gate(*tries, password="me:secret")] == [401, 401, 200]


def test_an_event_of_plain_values_passes_as_it_is():
    event = {
        "fn_index": 0,
        "session_hash": "s",
        "event_data": {"points": [[1, 2.5]]},
        "data": [None, "text", 2, 0.5, True],
    }
    ((status, body),) = through_the_gate(("POST", JOIN, {"json": event}))
    assert status == 200
    assert json.loads(body) == event


@pytest.mark.parametrize(
    "value",
    [
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "http://example.com/x", "meta": {"_type": "gradio.FileData"}},
        [{"path": "/dev/zero", "meta": {"_type": "gradio.FileData"}}],
        {},
    ],
)
def test_no_value_of_an_event_can_name_a_file(value):
    event = {"fn_index": 0, "session_hash": "s", "event_data": {"data": []}, "data": [None, value]}
    ((status, body),) = through_the_gate(("POST", JOIN, {"json": event}))
    assert status == 400
    assert "reload the page" in body


@pytest.mark.parametrize("number", [999, -1, "0", 0.5, None, [0], {}])
def test_an_event_that_the_page_does_not_have_is_refused_with_a_sentence(number):
    event = {"fn_index": number, "session_hash": "s", "data": []}
    assert through_the_gate(("POST", JOIN, {"json": event}), events=(0, 1)) == [
        (400, "the page has no such event; reload the page")
    ]
    assert through_the_gate(("POST", JOIN, {"json": event | {"fn_index": 1}}), events=(0, 1))[0][0] == 200


@pytest.mark.parametrize("content", [b"[]", b'{"data": 1}', b"{", b'{"data": [NaN]}', b"[" * 3_000])
def test_what_is_no_event_is_refused(content):
    headers = {"content-type": "application/json"}
    ((status, _),) = through_the_gate(("POST", JOIN, {"content": content, "headers": headers}))
    assert status == 400


def test_a_large_event_and_one_that_does_not_come_are_refused():
    async def slow():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    headers = {"content-type": "application/json"}
    tries = [("POST", JOIN, {"json": {"data": ["x" * 6_000]}}), ("POST", JOIN, {"content": slow(), "headers": headers})]
    assert [status for status, _ in through_the_gate(*tries)] == [413, 408]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://localhost:7860"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "null"}, 403),
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "evil.example", "origin": "http://evil.example"}, 421),
        ({"host": "evil.example:7860"}, 421),
    ],
)
def test_other_websites_cannot_use_a_page_of_this_machine(headers, status):
    assert through_the_gate(("GET", "/", {"headers": headers}), hosts=())[0][0] == status


def test_the_embedded_engine_answers_questions_about_regions_as_generate_does(region_model, image_of):
    from tokenpacker.serve.embedded import EmbeddedEngine

    model, processor = region_model
    images = image_of(40, 90, seed=1), image_of(64, 64, seed=2)
    regions = (1, {"box": [3, 3, 20, 30]}), (0, {"box": [50, 5, 80, 35]}), (1, {"box": [30, 30, 60, 60]})
    text = "<mask> and <mask> and <mask>?"
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
    messages = ({"role": "user", "content": content},)
    prompt = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    masks = [[regions[1][1]], [regions[0][1], regions[2][1]]]
    inputs = processor([list(images)], [prompt], masks, return_tensors="pt")
    for name in ("region_cells", "region_first_tile"):
        inputs[name] = inputs[name][torch.tensor([1, 0, 2])]
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0)
    said = processor.tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    engine = EmbeddedEngine(model, processor)
    sampling = Sampling(temperature=0, max_tokens=8)
    prepared = engine.prepare(Question(messages=messages, images=images, regions=regions, sampling=sampling))
    news: queue.SimpleQueue = queue.SimpleQueue()
    answers = []
    for _ in range(2):  # the second time tiles come from the cache
        engine.submit(prepared, news.put)
        pieces = [news.get(timeout=60)]
        while not pieces[-1].finish_reason:
            pieces.append(news.get(timeout=60))
        answers.append("".join(piece.text for piece in pieces))
    engine.close(0)
    assert answers == [said, said]


def test_a_mark_without_a_region_is_refused_by_the_embedded_engine(region_model):
    from tokenpacker.serve.embedded.prepared_prompts import prepare_prompt

    question = Question(messages=({"role": "user", "content": [{"type": "text", "text": "<mask>?"}]},))
    with pytest.raises(ValueError, match="<mask>"):
        prepare_prompt(region_model[1], question, max_length=100, max_tokens=8)


@pytest.fixture
def drawing(region_model):
    """Actions that know regions, and a session with an image of 200 x 100 pixels."""
    from tokenpacker.ui.page_actions import PageActions
    from tokenpacker.ui.sessions import Session

    actions, session = PageActions(engine=FakeEngine(), model=region_model[0], processor=region_model[1]), Session()
    actions.add(session, [address(100, 200)])
    return actions, session


def test_a_stroke_from_far_away_is_cut_off_near_the_image(drawing):
    actions, session = drawing
    start = time.monotonic()
    for form in ("brush", "box"):
        actions.mark(session, form, [[-1e9, 10], [1e9, 31]], 1)
    actions.mark(session, "polygon", [[-1e9, 10], [1e9, 31], [50, 1e9]])
    assert time.monotonic() - start < 5
    assert session.regions[0].points == [(-1, 10), (201, 31)]


def test_regions_that_take_long_to_draw_are_refused(drawing):
    from tokenpacker.ui.sessions import Picture

    actions, session = drawing
    session.pictures[0] = Picture("", 6000, 6000, "")
    zigzag = [[0, 0], [6000, 6000]] * 2500
    for form in ("brush", "polygon"):
        with pytest.raises(ValueError, match="too long to be drawn"):
            actions.mark(session, form, zigzag, 1)
    with pytest.raises(ValueError, match="too long to be drawn"):
        actions.mark(session, "brush", [[9, 9]] * 5000, 1e9)
    assert session.regions == []


def test_regions_that_are_no_numbers_are_refused(drawing):
    actions, session = drawing
    for points, width in (([[0, float("nan")]], 1), ([[9]], 1), (["ab"], 1), ([[9, 9]], "<b>"), ([[10**400, 1]], 1)):
        with pytest.raises(ValueError, match="no place in the image"):
            actions.mark(session, "brush", points, width)
    with pytest.raises(ValueError, match="two corners, not 1"):
        actions.mark(session, "box", [[9, 9]])


def test_the_regions_of_all_turns_are_limited(drawing):
    from tokenpacker.ui.sessions import Picture, Region, Session, Turn

    actions, session = drawing
    session.turns = [Turn("", 1, [Region(0, "box", [(1, 1), (9, 9)])] * 31, [])]
    actions.mark(session, "brush", [[9, 9]], 4)
    with pytest.raises(ValueError, match="a conversation has at most 32 regions"):
        actions.mark(session, "box", [[1, 1], [9, 9]])
    large = Session([Picture("", 8000, 5000, "")], [Turn("", 1, [Region(0, "brush", [(9, 9)], 4)] * 8, [])])
    with pytest.raises(ValueError, match="at most 320,000,000 pixels; draw boxes"):
        actions.mark(large, "brush", [[9, 9]], 4)
    actions.mark(large, "box", [[1, 1], [9, 9]])


@pytest.fixture
def page(actions):
    from tokenpacker.ui.chat_page import ChatPage

    return ChatPage("tiny", actions)


def test_forged_values_of_sliders_get_a_sentence(page):
    from tokenpacker.ui.sessions import Session, restore

    for value in ("<b>", float("nan"), float("inf"), [1], None, True, 10**400, -1):
        given = [page.settings[0].preprocess(value), page.settings[1].preprocess(1000), False, 2, 1000]
        assert "scale factor must be a number from 1 to" in page._view(Session(), "", given)[-1]
        assert "scale factor must be a number" in list(page.on_ask(Session(), "x", *given))[-1][6]
        key = page.on_link(Session(), "x", *given).value
        assert restore(key, page.actions.store)[1] == ["x", *page._start, False, *page._start]


def test_updates_of_the_page_hold_no_address_in_memory(page):
    from gradio.blocks import postprocess_update_dict

    update = postprocess_update_dict(page.stage, {"value": {}, "pictures": ["data:,"]})
    assert update == {"value": {}, "props": {"pictures": ["data:,"]}, "__type__": "update"}
    assert " at 0x" not in repr(page.stage.get_config())


def test_an_image_beyond_every_limit_is_told_the_limit_of_the_page(drawing):
    actions, session = drawing
    file = bytearray(base64.b64decode(address(8, 8).partition(",")[2]))
    file[16:24] = struct.pack(">II", 60_000, 60_000)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    content = "data:image/png;base64," + base64.b64encode(file).decode()
    with pytest.raises(ValueError, match=r"^the image has more than the 40,000,000 pixels allowed; shrink it$"):
        actions.add(session, [content])


def test_of_several_files_the_good_ones_are_added_and_the_others_named(drawing):
    actions, session = drawing
    broken = "data:image/png;base64," + base64.b64encode(b"no image").decode()
    note = actions.add(session, [address(40, 40), broken, address(50, 60)])
    assert [(picture.width, picture.height) for picture in session.pictures[1:]] == [(40, 40), (60, 50)]
    assert session.shown == 2
    assert note.startswith("File 2 of 3 is left out: ")
    assert note.count(".") == 1
    with pytest.raises(ValueError, match="image"):
        actions.add(session, [broken, broken])
    assert len(session.pictures) == 3


def test_sentences_end_with_one_full_stop(drawing):
    from tokenpacker.ui.streaming import sentence

    actions, session = drawing
    with pytest.raises(ValueError, match="base64") as caught:
        actions.add(session, ["file:///x"])
    assert sentence(caught.value).endswith("base64,...")


def test_an_image_goes_with_its_regions_and_their_marks(drawing):
    actions, session = drawing
    actions.add(session, [address(40, 40), address(60, 60)])
    for image in (0, 1, 2, 1):
        session.shown = image
        actions.mark(session, "box", [[1 + image, 1], [30, 30]])
    session.shown = 2
    text = actions.remove(session, 1, "is <mask> or <mask> like <mask> or <mask>?")
    assert text == "is <mask> or like <mask> or ?"
    assert [(region.image, region.points[0][0]) for region in session.regions] == [(0, 1), (1, 3)]
    assert [picture.width for picture in session.pictures] == [200, 60]
    assert session.shown == 1
    actions.remove(session, 1, "")
    actions.remove(session, 0, "")
    assert (session.pictures, session.regions, session.shown) == ([], [], 0)
    assert actions.stage(session, (None, 100))["grid"] is None


def test_an_image_that_was_asked_about_stays_and_those_after_it_keep_their_numbers(drawing):
    actions, session = drawing
    actions.add(session, [address(40, 40)])
    list(actions.ask(session, "what?", [(None, 1000)]))
    actions.add(session, [address(50, 50), address(60, 60)])
    for number in (0, 1, 4, -1):
        with pytest.raises(ValueError, match=f"image {number + 1} was asked about and stays"):
            actions.remove(session, number, "")
    actions.remove(session, 2, "")
    list(actions.ask(session, "and now?", [(None, 1000)]))
    asked = actions.engine.questions[-1]
    assert [image.width for image in asked.images] == [200, 40, 60]
    assert [len(message["content"]) - 1 for message in asked.messages] == [2, 0, 1]
    assert "<small>image 3</small>" in actions.chat(session, 0)


def test_nothing_is_removed_while_an_answer_is_under_way_and_what_is_added_belongs_to_the_next(drawing):
    actions, session = drawing
    actions.mark(session, "box", [[1, 1], [30, 30]])
    steps = actions.ask(session, "one <mask> WAIT", [(None, 1000), (None, 1000)])
    while not next(steps)[1][0].text:
        pass
    for remove in (lambda: actions.remove(session, 0, ""), lambda: actions.unmark(session, "", [0])):
        with pytest.raises(ValueError, match="under way"):
            remove()
    actions.add(session, [address(50, 50)])
    actions.mark(session, "box", [[2, 2], [30, 30]])
    actions.engine.released.set()
    list(steps)
    assert [(len(asked.images), len(asked.regions)) for asked in actions.engine.questions] == [(1, 1), (1, 1)]
    assert session.num_asked == 1
    assert [region.points[0] for region in session.regions] == [(2, 2)]


def test_a_question_that_was_stopped_before_its_answer_can_be_asked_again(page):
    from tokenpacker.ui.sessions import Session

    session = Session()
    steps = page.on_ask(session, "WAIT", *page._start, False, *page._start)
    assert next(steps)[1] == ""
    page.on_stop(session)
    assert list(steps)[-1][1] == "WAIT"
    assert session.turns == []


def test_images_and_masks_of_few_questions_are_in_memory_at_once(actions, monkeypatch):
    from tokenpacker.ui import page_actions
    from tokenpacker.ui.sessions import Session

    class Counting(FakeEngine):
        inside = most = 0

        def prepare(self, question):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.05)
            self.inside -= 1
            return super().prepare(question)

    actions = replace(actions, engine=Counting())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: list(actions.ask(Session(), "x", [(2, 100)])), range(8)))
    assert actions.engine.most == page_actions.PREPARING

    monkeypatch.setattr(page_actions, "PREPARING_S", 0.01)
    for _ in range(page_actions.PREPARING):
        actions._preparing.acquire()
    with pytest.raises(ValueError, match="busy with the images of other questions"):
        list(actions.ask(Session(), "x", [(2, 100)]))
    actions._preparing.release()
    list(actions.ask(Session(), "x", [(2, 100)]))


def test_the_images_of_a_question_are_let_go_before_its_answer(drawing):
    actions, session = drawing

    class Forgetful(FakeEngine):
        def prepare(self, question):
            self.asked = weakref.ref(question)
            return super().prepare(replace(question, images=(), regions=()))

    actions = replace(actions, engine=Forgetful())
    steps = actions.ask(session, "WAIT", [(None, 100)])
    next(steps)
    assert actions.engine.asked() is None
    steps.close()

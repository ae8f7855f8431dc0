"""What the embedded engine does when questions are cancelled, too many, or fail, and when it is closed."""

import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch

from engine_questions import Heard, ask, question
from tokenpacker.serve.embedded import EmbeddedEngine
from tokenpacker.serve.questions import ClosedError, QueueFullError

LONG = 400


@pytest.fixture
def model(make_tiny_model):
    return make_tiny_model()


@pytest.fixture
def engine(model, tiny_processor):
    engine = EmbeddedEngine(model, tiny_processor, max_batch_size=4, max_waiting=6)
    yield engine
    engine.close(0)


class Gate:
    """Holds the model's forward until it is opened, so that questions pile up; may fail some calls."""

    def __init__(self, model, fails=lambda inputs: False):
        self.model, self.fails, self.open, self.calls = model, fails, threading.Event(), 0
        self.open.set()
        self._forward, model.forward = model.forward, self

    def __call__(self, *args, **kwargs):
        self.calls += 1
        assert self.open.wait(30)
        if self.fails(kwargs):
            raise torch.OutOfMemoryError("no memory left")
        return self._forward(*args, **kwargs)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_cancelled_answer_ends_and_its_listener_is_not_called_again(engine):
    heard = Heard()
    ticket = engine.submit(engine.prepare(question(max_tokens=LONG)), heard)
    wait_until(lambda: heard.calls > 2)
    ticket.cancel()
    calls = heard.calls
    ticket.cancel()
    assert engine.running == 0
    ask(engine, question()).result()
    assert heard.calls == calls
    assert engine.tokens_generated < LONG


def test_a_listener_may_cancel_its_own_question(engine):
    heard = Heard(2)
    heard.on_piece = lambda piece: ticket.cancel()
    prepared = engine.prepare(question(max_tokens=LONG, n=2))
    with engine._changed:  # the worker waits until `ticket` has a value
        ticket = engine.submit(prepared, heard)
    ask(engine, question()).result()
    assert heard.calls == 1


def test_a_cancelled_question_leaves_the_queue_at_once(engine, model):
    gate = Gate(model)
    gate.open.clear()
    running = [ask(engine, question()) for _ in range(5)]
    wait_until(lambda: gate.calls)
    waiting = engine.waiting
    late = Heard()
    ticket = engine.submit(engine.prepare(question()), late)
    assert engine.waiting == waiting + 1
    ticket.cancel()
    assert engine.waiting == waiting
    gate.open.set()
    assert len({one.result()[0] for one in running}) == 1
    assert late.calls == 0


def test_a_full_queue_refuses_and_takes_questions_again_later(engine, model):
    gate = Gate(model)
    ask(engine, question()).result()
    gate.open.clear()
    calls, accepted = gate.calls, [ask(engine, question())]
    wait_until(lambda: gate.calls > calls)
    accepted += [ask(engine, question()) for _ in range(6)]
    with pytest.raises(QueueFullError) as refused:
        ask(engine, question())
    assert 1 <= refused.value.retry_after_s <= 120
    gate.open.set()
    assert all(one.result() for one in accepted)
    assert ask(engine, question()).result()


def test_the_wait_of_a_full_queue_is_that_of_a_busy_engine(engine, model, monkeypatch):
    """Not one that had nothing to do for a day, whose rate is low."""
    clock = mock.Mock(monotonic=time.monotonic)
    monkeypatch.setattr("tokenpacker.serve.refusals.time", clock)
    ask(engine, question()).result()
    clock.monotonic = lambda: time.monotonic() + 86_400
    gate = Gate(model)
    gate.open.clear()
    accepted = [ask(engine, question())]
    wait_until(lambda: gate.calls)
    accepted += [ask(engine, question()) for _ in range(6)]
    with pytest.raises(QueueFullError) as refused:
        ask(engine, question())
    assert refused.value.retry_after_s < 60
    gate.open.set()
    assert all(one.result() for one in accepted)


def test_a_listener_that_raises_ends_its_question_alone(engine, caplog):
    calls = []

    def broken(news):
        calls.append(news)
        raise RuntimeError("the secret text")

    healthy = ask(engine, question(max_tokens=20))
    engine.submit(engine.prepare(question()), broken)
    assert healthy.result() == ask(engine, question(max_tokens=20)).result()
    assert len(calls) == 1
    assert "a listener failed with RuntimeError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("stage", ["prefill", "step"])
def test_neighbours_of_a_question_that_fails_are_answered(engine, model, stage):
    poison = ord("#")
    texts = ["what?", "why not?", "who is # there?", "and when?"]
    expected = [ask(engine, question(text)).result() for text in texts]
    bad_token = engine.processor.tokenizer.convert_tokens_to_ids(chr(poison))

    def fails(inputs):
        if stage == "prefill":
            return bool((inputs["input_ids"] == bad_token).any())
        lengths = inputs["position_ids"][:, -1].tolist()  # a step sees its rows' lengths
        return inputs["input_ids"].shape[1] == 1 and max(lengths) > max_length

    max_length = sorted(engine.prepare(question(text)).usage.prompt_tokens for text in texts)[-2] + 8
    gate = Gate(model, fails)
    gate.open.clear()
    heard = [ask(engine, question(text)) for text in texts]
    gate.open.set()
    for number, one in enumerate(heard):
        if number == 2:
            with pytest.raises(torch.OutOfMemoryError):
                one.result()
        else:
            assert one.result() == expected[number]
    assert ask(engine, question(texts[0])).result() == expected[0]


def test_a_batch_that_is_too_large_is_answered_one_by_one(engine, model):
    asked = [question(temperature=1.0, seed=seed, max_tokens=12) for seed in range(4)]
    expected = [ask(engine, one).result() for one in asked]
    gate = Gate(model, lambda inputs: len(inputs["input_ids"]) > 1 and inputs["input_ids"].shape[1] == 1)
    gate.open.clear()
    heard = [ask(engine, one) for one in asked]
    gate.open.set()
    assert [one.result() for one in heard] == expected


def test_images_that_cannot_be_encoded_fail_alone(engine, model, image_of):
    good, bad = question(images=[image_of(32, 32)]), question(images=[image_of(64, 64)])
    encode = model.get_image_features

    def fails(pixel_values, **kwargs):
        if len(pixel_values) > 1:
            raise torch.OutOfMemoryError("no memory left")
        return encode(pixel_values, **kwargs)

    gate = Gate(model)
    gate.open.clear()
    first = ask(engine, question())
    wait_until(lambda: gate.calls)
    model.get_image_features = fails
    heard = [ask(engine, one) for one in (good, bad)]
    gate.open.set()
    assert first.result()
    assert heard[0].result()
    with pytest.raises(torch.OutOfMemoryError):
        heard[1].result()


def test_numbers_that_are_not_finite_are_an_error_of_their_question_alone(engine, model, image_of):
    texts = ["what?", "why not?"]
    expected = [ask(engine, question(text)).result() for text in texts]
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[engine.processor.tokenizer.convert_tokens_to_ids("#")] = float("nan")
    gate = Gate(model)
    gate.open.clear()
    heard = [ask(engine, question(text)) for text in (texts[0], "a # here", texts[1])]
    gate.open.set()
    with pytest.raises(ArithmeticError, match="not finite"):
        heard[1].result()
    assert [heard[0].result(), heard[2].result()] == expected
    # what the failed row left in the cache's memory spoils no later one
    for _ in range(3):
        late = [ask(engine, question(text)) for text in texts]
        assert [one.result() for one in late] == expected


def test_a_mistake_in_the_engine_ends_its_questions_but_not_the_engine(engine, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_start", lambda rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(engine, question()).result()
    assert "ZeroDivisionError" in caplog.text
    assert ask(engine, question()).result()


def test_closing_answers_what_was_accepted(engine):
    heard = [ask(engine, question(max_tokens=20)) for _ in range(6)]
    prepared = engine.prepare(question())
    engine.close(30)
    assert all(one.result(0) for one in heard)
    with pytest.raises(ClosedError):
        engine.submit(prepared, Heard())
    engine.close(30)


def test_closing_ends_what_takes_longer_than_the_grace(engine):
    heard = [ask(engine, question(max_tokens=LONG)) for _ in range(6)]
    engine.close(0.05)
    for one in heard:
        assert one.done.is_set()
        with pytest.raises(ClosedError):
            one.result(0)
    assert (engine.waiting, engine.running) == (0, 0)


def test_closing_does_not_wait_for_a_step_that_hangs(engine, model, monkeypatch):
    monkeypatch.setattr("tokenpacker.serve.embedded.embedded_engine.LAST_STEP_S", 0.1)
    gate = Gate(model)
    gate.open.clear()
    heard = ask(engine, question())
    wait_until(lambda: gate.calls)
    engine.close(0.1)
    with pytest.raises(ClosedError):
        heard.result(0)
    gate.open.set()


def test_each_question_is_answered_exactly_once_while_others_come_and_go(tiny_model, tiny_processor):
    engine = EmbeddedEngine(tiny_model, tiny_processor, max_batch_size=8, max_waiting=1000)
    expected = {size: ask(engine, question("w" * size, max_tokens=size)).result() for size in range(1, 13)}
    kept, cancelled = [], []

    def client(number):
        for turn in range(15):
            size = 1 + (number * 5 + turn) % 12
            heard = Heard()
            ticket = engine.submit(engine.prepare(question("w" * size, max_tokens=size)), heard)
            if turn % 4 == 0:
                ticket.cancel()
                cancelled.append((heard, heard.calls))
            else:
                kept.append((size, heard))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    engine.close(60)
    assert len(kept) == 8 * 11
    assert all(heard.result(0) == expected[size] for size, heard in kept)
    assert all(heard.calls == calls for heard, calls in cancelled)


def test_the_end_of_the_program_ends_the_answers_first():
    code = """
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.serve.embedded import EmbeddedEngine
from tokenpacker.serve.questions import Question, Sampling
folder = carried_model_path()
model = TokenPackerForConditionalGeneration.from_pretrained(folder)
engine = EmbeddedEngine(model, TokenPackerProcessor.from_pretrained(folder), max_new_tokens=3000)
asked = Question(messages=({"role": "user", "content": "hi"},), sampling=Sampling(max_tokens=3000))
engine._end_tokens = set()
engine.submit(engine.prepare(asked), lambda news: isinstance(news, Exception) and print(type(news).__name__))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ClosedError\n"), done.stderr

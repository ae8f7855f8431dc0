"""A listener that keeps what an engine tells it."""

import threading

from tokenpacker.serve.questions import Piece, Question, Sampling


class Heard:
    """All pieces of all answers to a question."""

    def __init__(self, num_answers=1, on_piece=None):
        self.texts = [""] * num_answers
        self.counts, self.reasons = [0] * num_answers, [None] * num_answers
        self.error, self.calls, self.on_piece = None, 0, on_piece
        self.done = threading.Event()

    def __call__(self, news):
        assert not self.done.is_set(), "an ended question is told nothing more"
        self.calls += 1
        if isinstance(news, Piece):
            assert self.reasons[news.index] is None
            self.texts[news.index] += news.text
            self.counts[news.index] = news.num_tokens
            self.reasons[news.index] = news.finish_reason
        else:
            self.error = news
        if self.error or all(self.reasons):
            self.done.set()
        if self.on_piece:
            self.on_piece(news)

    def result(self, timeout_s=60):
        """Texts of all answers, after the last one ended."""
        assert self.done.wait(timeout_s), "the question was not answered"
        if self.error:
            raise self.error
        return self.texts


def question(text="what is it?", images=(), *, history=(), scale_factor=None, max_image_tokens=None, **sampling):
    """A question about images, greedy unless told otherwise."""
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return Question(
        messages=(*history, {"role": "user", "content": content}),
        images=tuple(images),
        scale_factor=scale_factor,
        max_image_tokens=max_image_tokens,
        sampling=Sampling(**{"temperature": 0, "max_tokens": 8} | sampling),
    )


def ask(engine, asked):
    """Submits a question."""
    heard = Heard(asked.sampling.n)
    engine.submit(engine.prepare(asked), heard)
    return heard

from io import BytesIO

import pytest
from PIL import Image

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.images import ImageError


def test_images_are_opened_late_from_a_path_or_from_bytes(tmp_path):
    path = tmp_path / "a.png"
    picture = Image.new("L", (3, 2), 255)
    question = BenchQuestion(id="1", text="?", images=(path,))
    picture.save(path)
    data = BytesIO()
    picture.save(data, format="PNG")
    both = BenchQuestion(id="2", text="?", images=(str(path), data.getvalue()))
    assert [image.size for image in both.open_images()] == [(3, 2), (3, 2)]
    assert {image.mode for image in question.open_images() + both.open_images()} == {"RGB"}


def test_a_missing_image_is_an_error_when_it_is_opened():
    with pytest.raises(ImageError, match=r"missing\.png"):
        BenchQuestion(id="1", text="?", images=("missing.png",)).open_images()


def test_questions_about_the_same_images_have_the_same_key():
    def key(*images: str | bytes, id: str = "1") -> str:
        return BenchQuestion(id=id, text="?", images=images).image_key

    assert key("a.png") == key("a.png", id="2") != key("b.png")
    assert key(b"abc") == key(b"abc", id="2") != key(b"abd")
    assert key("a.png", "b.png") != key("b.png", "a.png")
    assert key(id="1") != key(id="2")


def test_an_id_is_text():
    with pytest.raises(ValueError, match="id=7 of a question is a int; use a str"):
        BenchQuestion(id=7, text="?")

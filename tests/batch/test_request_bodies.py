from __future__ import annotations

import base64
import os

import pytest

from tokenpacker.batch import RowError
from tokenpacker.batch.request_bodies import MAX_FILE_BYTES, prepared_body

CONTENT = b"not decoded here"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for path in (folder / "a.png", folder / "more" / "b.jpg", tmp_path / "secret.png"):
        path.write_bytes(CONTENT)
    return folder


def body(*urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "high"}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]}


def addresses(prepared: dict) -> list[str]:
    return [part["image_url"]["url"] for part in prepared["messages"][0]["content"][:-1]]


def test_paths_become_data_addresses_and_addresses_stay(folder):
    content = base64.b64encode(CONTENT).decode()
    asked = body("a.png", "more/b.jpg", str(folder / "a.png"), "data:image/png;base64,AAAA", "https://host/a.png")
    prepared = prepared_body(asked, {}, folder)
    expected = [f"data:image/{kind};base64,{content}" for kind in ("png", "jpeg", "png")]
    assert addresses(prepared) == [*expected, "data:image/png;base64,AAAA", "https://host/a.png"]
    assert prepared["messages"][0]["content"][0]["image_url"]["detail"] == "high"
    assert asked == body(
        "a.png", "more/b.jpg", str(folder / "a.png"), "data:image/png;base64,AAAA", "https://host/a.png"
    )


def test_the_short_form_of_an_image_works_too(folder):
    parts = [{"type": "image_url", "image_url": "a.png"}]
    prepared = prepared_body({"messages": [{"role": "user", "content": parts}]}, {}, folder)
    assert prepared["messages"][0]["content"][0]["image_url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("url", ["../secret.png", "more/../../secret.png", "{outside}", "link.png"])
def test_nothing_outside_of_the_folder_is_read(folder, url):
    if url == "link.png":
        os.symlink(folder.parent / "secret.png", folder / "link.png")
    with pytest.raises(RowError, match="lies outside of the folder of --images"):
        prepared_body(body(url.format(outside=folder.parent / "secret.png")), {}, folder)


@pytest.mark.parametrize("url", ["none.png", "more", "", "a\0.png", "x" * 5000])
def test_what_is_no_file_is_an_error_of_the_row(folder, url):
    with pytest.raises(RowError, match=r"image .* (is no file|is no path|cannot be read)") as error:
        prepared_body(body(url), {}, folder)
    assert error.value.code == "invalid_image_path"
    assert len(error.value.message) < 200


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(RowError, match="is no file"):
        prepared_body(body("pipe.png"), {}, folder)


def test_a_file_beyond_the_limit_is_not_read(folder):
    with (folder / "large.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(RowError, match="larger than the 20 MiB allowed"):
        prepared_body(body("large.png"), {}, folder)


def test_without_a_folder_no_path_is_read(folder):
    with pytest.raises(RowError, match=r"'a\.png' is a path; say with --images where paths start"):
        prepared_body(body("a.png"), {}, None)
    assert addresses(prepared_body(body("file:///etc/passwd"), {}, None)) == ["file:///etc/passwd"]


def test_defaults_fill_in_what_is_missing():
    assert prepared_body({"model": "mine"}, {"model": "tiny", "scale_factor": 3}, None) == {
        "model": "mine",
        "scale_factor": 3,
    }


@pytest.mark.parametrize("messages", [None, "text", [None], [{"content": 3}], [{"content": [None, {"image_url": 3}]}]])
def test_a_strange_form_is_left_to_whoever_answers(messages):
    assert prepared_body({"messages": messages}, {}, None) == {"messages": messages}

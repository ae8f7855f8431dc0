from __future__ import annotations

import json

import pytest
from PIL import Image


@pytest.fixture
def data(tmp_path, picture, monkeypatch):
    """Ten rows, one of which has no conversation; the command runs in this folder."""
    monkeypatch.chdir(tmp_path)
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    rows = [{"id": number, "image": picture.name, "conversations": talk} for number in range(9)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"id": "bad"}]))
    return path


def test_it_tells_counts_lengths_and_rejects(run, data, tmp_path, tiny_model_dir):
    result = run("data", "check", data, "--model", tiny_model_dir, "--max-rejects", 0.1)
    assert result.exit_code == 0, result.output
    assert "usable       9: 9 with images" in result.stdout
    assert "bad: the row has no 'conversations'" in result.stdout
    assert result.stdout.splitlines()[-1] == "rejects      rejects.jsonl"
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["source"] == f"{data}, line 10"


def test_its_count_is_that_of_the_count_command(run_json, data, picture, tiny_model_dir):
    checked = run_json("data", "check", data, "--model", tiny_model_dir, "--max-rejects", 1)
    counted = run_json("count", picture, "--model", tiny_model_dir)
    assert checked["image_tokens"]["max"] == counted["tokens"]
    assert checked["rejects_file"] == "rejects.jsonl"
    assert checked["passes"] is True


def test_released_geometry_counts_as_the_count_command(run_json, data, picture):
    options = ("--released", "--max-tiles", 16, "--scale-factor", 3)
    checked = run_json("data", "check", data, *options, "--max-rejects", 1)
    assert checked["image_tokens"]["max"] == run_json("count", picture, *options)["tokens"]


def test_half_a_character_in_one_of_many_captions_is_one_reject(run, data, tmp_path, tiny_model_dir):
    rows = [json.loads(line) for line in data.read_text().splitlines()[:9]]
    rows[4]["conversations"][1]["value"] = "a \ud83d cat"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    result = run("data", "check", data, "--model", tiny_model_dir, "--max-rejects", 0.2)
    assert result.exit_code == 0, result.output
    assert "usable       8: 8 with images" in result.stdout
    assert "4: the value of message 2 has U+D83D at character" in result.stdout
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["source"] == f"{data}, line 5"


def test_more_rejects_than_tolerated_is_exit_code_1(run, data):
    result = run("data", "check", data)
    assert result.exit_code == 1
    assert "rejected     1 (10.00%; at most 1.00% are tolerated)" in result.stdout


def test_an_older_file_of_rejects_is_replaced(run, data, tmp_path):
    (tmp_path / "rejects.jsonl").write_text("old\n")
    run("data", "check", data)
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["id"] == "bad"


def test_a_picture_is_drawn_where_asked_for(run, data, tmp_path):
    run("data", "check", data, "--picture", tmp_path / "new" / "tokens.png", "--sample", 5, "--seed", 2)
    assert Image.open(tmp_path / "new" / "tokens.png").width > 600


def test_decoding_finds_damaged_images_that_headers_hide(run, run_json, data, picture):
    picture.write_bytes(picture.read_bytes()[:2000])
    assert run_json("data", "check", data, "--headers-only", "--max-rejects", 1)["usable"] == 9
    result = run("data", "check", data, "--decode", "--max-rejects", 1, "--json")
    assert json.loads(result.stdout)["rejected"] == {"unreadable image": 9, "malformed conversation": 1}
    assert result.exit_code == 1  # nothing is left


def test_captions_need_the_plain_format(run_json, data):
    assert run_json("data", "check", data, "--captions", "--max-rejects", 1)["usable"] == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no.json",), "'no.json' does not exist"),
        (("data.jsonl", "--images", "nowhere"), "images_root=nowhere is no folder"),
        (("data.jsonl", "--released", "--model", "x"), "--released and --model exclude each other"),
        (("data.jsonl", "--max-tiles", 0), "--max-tiles 0 must be at least 1"),
        (("data.jsonl", "--scale-factor", 0), "--scale-factor 0 must be at least 1"),
        (("data.jsonl", "--max-rejects", 2), "--max-rejects 2.0 must lie between 0 and 1"),
        (("data.jsonl", "--model", "nowhere/at-all/x"), "does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(one_line_error, data, arguments, words):
    assert words in one_line_error("data", "check", *arguments)

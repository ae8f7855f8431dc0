from __future__ import annotations

import json

import pytest

from tokenpacker.data.annotations import entries
from tokenpacker.data.annotations.entries import read_entries, read_lines, read_list
from tokenpacker.data.rows import RecordError

CONTENT = {
    "info": {"text": 'a "quoted" [brace] }', "year": 2017},
    "images": [{"id": 1, "name": "ä\u2028ö"}, {"id": -12.5e-3}, 12345, 1.25, True, None, "x" * 50],
    "empty": [],
    "number": 1.5,
}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("indent", [None, 2])
def test_entries_are_what_json_reads_wherever_the_window_ends(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(entries, "CHUNK", chunk)
    path = tmp_path / "file.json"
    path.write_text(json.dumps(CONTENT, indent=indent, ensure_ascii=False), encoding="utf-8-sig")
    expected = []
    for key, value in CONTENT.items():
        expected += [(key, entry) for entry in value] if isinstance(value, list) else [(key, value)]
    assert list(read_entries(path)) == expected


def test_a_list_gives_its_entries(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(" [ 1 , [2], {} ]\n")
    assert list(read_list(path)) == [1, [2], {}]
    path.write_text("[]")
    assert list(read_list(path)) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"a": 1} {"b": 2}]', 10),
        ("[1, 2", 5),
        ("[1, 2]]", 6),
        ('{"a" 1}', 5),
        ("[nul]", 1),
        ('["open', 1),
        ("[" + "[" * 100_000, 1),
        ("", 0),
    ],
)
def test_what_is_no_json_is_told_with_its_place(tmp_path, text, place):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} is no valid JSON after {place:,} characters"):
        list(read_entries(path))


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="do not exist"):
        list(read_entries(tmp_path / "nowhere"))
    (tmp_path / "bytes").write_bytes(b'["\xff\xfe"]')
    with pytest.raises(ValueError, match="no UTF-8 text"):
        list(read_entries(tmp_path / "bytes"))


def test_a_bad_line_is_a_reject_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n\n{broken\n{"a": 2}\n')
    first, second, third = read_lines(path)
    assert (first, third) == ({"a": 1}, {"a": 2})
    assert isinstance(second, RecordError)
    assert second.id == "line 3"

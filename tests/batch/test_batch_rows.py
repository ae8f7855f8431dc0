from __future__ import annotations

import json

import pytest

from batch_files import echo, request, texts
from tokenpacker.batch import batch_rows
from tokenpacker.batch.batch_rows import Reply, RowError

GOOD = request("good")


def test_an_answer_is_a_row_in_openais_form(files):
    files.write(GOOD)
    _, (row,) = files.run()
    body = row["response"].pop("body")
    assert body["choices"][0]["message"]["content"] == "hello"
    row_id = row["id"]
    assert row_id.startswith("batch_req_")
    response = {"status_code": 200, "request_id": row_id}
    assert row == {"id": row_id, "custom_id": "good", "response": response, "error": None}


def without(key: str) -> dict:
    return {name: value for name, value in GOOD.items() if name != key}


BAD = {  # a line -> code of its error, a part of its message
    "not JSON": ("{", "invalid_json_line", "not JSON"),
    "not an object": ("[1]", "invalid_json_line", "type list"),
    "not UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line", "byte 16 is not UTF-8"),
    "NaN": ('{"custom_id": NaN}', "invalid_json_line", "NaN is not in JSON"),
    "nested too deep": ("[" * 200_000, "invalid_json_line", "not JSON"),
    "no custom_id": (without("custom_id"), "missing_required_parameter", "custom_id is missing"),
    "number for custom_id": (
        {**GOOD, "custom_id": 3},
        "missing_required_parameter",
        "custom_id is missing or not text",
    ),
    "empty custom_id": ({**GOOD, "custom_id": ""}, "missing_required_parameter", "custom_id"),
    "no body": (without("body"), "missing_required_parameter", "body is missing or not an object"),
    "other method": ({**GOOD, "method": "GET"}, "invalid_method", "'GET'"),
    "other url": ({**GOOD, "url": "/v1/embeddings"}, "invalid_url", "'/v1/embeddings'"),
    "unknown key": ({**GOOD, "metadata": {}}, "unknown_parameter", "'metadata'"),
    "streamed": (request("good", stream=True), "invalid_request", "stream"),
}


@pytest.mark.parametrize(("line", "code", "said"), BAD.values(), ids=list(BAD))
def test_a_bad_line_becomes_an_error_row_that_names_it(files, line, code, said):
    files.write(request("first"), line, request("last"))
    summary, rows = files.run()
    assert (summary.rows, summary.errors) == (3, 1)
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert (rows[1]["response"], rows[1]["error"]["code"]) == (None, code)
    assert rows[1]["error"]["message"].startswith("line 2: ")
    assert said in rows[1]["error"]["message"]
    assert "\n" not in rows[1]["error"]["message"]


def test_a_custom_id_is_answered_once(files):
    files.write(request("a", "one"), request("b", "two"), request("a", "three"))
    _, rows = files.run()
    assert [row["custom_id"] for row in rows] == ["a", "b", "a"]
    assert rows[2]["error"]["code"] == "duplicate_custom_id"
    assert "line 1" in rows[2]["error"]["message"]
    assert texts(rows[:2]) == ["one", "two"]


def test_empty_lines_and_a_mark_of_windows_are_no_rows(files):
    first, second = json.dumps(request("a")), json.dumps(request("b"))
    files.source.write_bytes(f"\ufeff{first}\r\n\r\n   \n{second}".encode())
    summary, rows = files.run()
    assert [row["custom_id"] for row in rows] == ["a", "b"]
    assert summary.errors == 0


def test_a_line_beyond_the_limit_is_not_read_whole(files, monkeypatch):
    monkeypatch.setattr(batch_rows, "MAX_LINE_BYTES", 200)
    files.write(request("a"), request("b", "x" * 1000), request("c"))
    _, rows = files.run()
    assert [row["custom_id"] for row in rows] == ["a", None, "c"]
    assert rows[1]["error"]["code"] == "line_too_long"


USELESS = {
    "empty": (b"\n \n", "is empty"),
    "UTF-16": ("{}".encode("utf-16"), "save it as UTF-8"),
    "something else": (b"\x1f\x8b\x08\x00\n\x00", "holds no request in OpenAI's batch format: line 1"),
}


@pytest.mark.parametrize(("content", "said"), USELESS.values(), ids=list(USELESS))
def test_a_file_without_requests_is_refused_before_a_model_is_loaded(files, content, said):
    files.source.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        files.run(answer=None)
    assert not files.target.exists()


def test_half_a_character_is_kept_as_an_escape(files):
    files.write(request("a", "half \ud83d of ünicode"))
    _, rows = files.run()
    assert texts(rows) == ["half \ud83d of ünicode"]
    assert "ünicode".encode() in files.target.read_bytes()


def test_a_refused_request_is_a_response_with_its_status(files):
    def refuse(body):
        return Reply(400, {"error": {"message": "no"}}, "req-7")

    files.write(GOOD)
    summary, (row,) = files.run(refuse)
    assert row["response"] == {"status_code": 400, "request_id": "req-7", "body": {"error": {"message": "no"}}}
    assert (row["error"], summary.errors) == (None, 1)


def test_a_request_without_an_answer_is_an_error_row(files):
    def fail(body):
        if body["messages"][0]["content"] == "bad":
            raise RowError("connection_error", "no answer")
        return echo(body)

    files.write(request("a"), request("b", "bad"), request("c"))
    _, rows = files.run(fail)
    assert [row["error"] for row in rows] == [None, {"code": "connection_error", "message": "no answer"}, None]


def test_the_summary_counts_tokens(files):
    files.write(*(request(str(number)) for number in range(3)))
    summary, _ = files.run()
    assert (summary.prompt_tokens, summary.image_tokens, summary.completion_tokens) == (30, 12, 6)
    assert str(summary).startswith("3 rows, 0 errors, ")

"""Rows of OpenAI's batch format, read and written.

An input row is `{"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {...}}`. An output row is
`{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`. As in OpenAI's files, a request that
the model refuses has a response with its status, and `error` is null; a row that never became a request has no response
and `error` is `{"code", "message"}`. The codes are OpenAI's where it has one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenpacker.serve.limits import Limits

URL = "/v1/chat/completions"
KEYS = ("custom_id", "method", "url", "body")
MAX_LINE_BYTES = Limits().body_bytes
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


class RowError(ValueError):
    """Why a row has no response.

    Args:
        code: for programs, such as `invalid_json_line`.
        message: for people; one line.
    """

    def __init__(self, code: str, message: str):
        super().__init__(code, message)
        self.code, self.message = code, message


class Reply(NamedTuple):
    """An answer over HTTP, or one that looks like it. `request_id` is the server's, if it gave one."""

    status_code: int
    body: dict[str, Any]
    request_id: str | None = None


Answer = Callable[[dict[str, Any]], Reply]
"""Answers the body of a request. Called from many threads. It raises RowError for one row, and any other error to end
the run."""

OpenAnswer = Callable[[], AbstractContextManager[Answer]]
"""Loads what answers. It can be pickled, for workers on other machines."""
Prepare = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes the body that is asked of the body of a row. It may raise RowError."""


class Place(NamedTuple):
    """A line of the input: its number, counted from 1, its first byte, and its length in bytes."""

    number: int
    start: int
    size: int


@dataclass(frozen=True)
class Row:
    """A request of the input, or the reason why it is none.

    Args:
        id: hash of the settings and of the line.
        body: of the request; None with an error.
    """

    place: Place
    id: str
    custom_id: str | None
    body: dict[str, Any] | None = None
    error: RowError | None = None


Outputs = Callable[[Iterable[Row]], Iterator[dict[str, Any]]]
"""Makes the output rows of rows, in order."""


def fingerprint(settings: dict[str, Any]) -> str:
    """A short hash of everything that changes answers."""
    return _short(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()))


def check_input(path: Path) -> int:
    """Counts the rows of an input file. Raises ValueError if the file holds no request at all."""
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; save the requests in one, as they are read more than once")
    with path.open("rb") as file:
        if file.read(2) in UTF16_MARKS:
            raise ValueError(f"{path} is UTF-16 text; save it as UTF-8")
    first = None
    for row in read_rows(path, ""):
        first = first or row.error
        if row.error is None:
            return sum(1 for _ in _lines(path))
    if first is None:
        raise ValueError(f"{path} is empty; write one request a line")
    raise ValueError(f"{path} holds no request in OpenAI's batch format: {first.message}")


def read_rows(path: Path, settings: str) -> Iterator[Row]:
    """Yields one row for each line that is not empty.

    Args:
        settings: the fingerprint of the run.
    """
    seen: dict[str, int] = {}
    for place, line, digest in _lines(path):
        row = parse_row(place, line, f"batch_req_{settings}_{digest}")
        if row.custom_id is not None:
            first = seen.setdefault(row.custom_id, place.number)
            if first != place.number and row.error is None:
                said = f"custom_id {row.custom_id[:80]!r} is that of line {first} too; give each row its own"
                error = RowError("duplicate_custom_id", f"line {place.number}: {said}")
                row = Row(place, row.id, row.custom_id, error=error)
        yield row


def row_at(path: Path, place: Place, row_id: str) -> Row:
    """Reads one row again, on another machine for instance."""
    with path.open("rb") as file:
        file.seek(place.start)
        return parse_row(place, file.read(place.size), row_id)


def parse_row(place: Place, line: bytes, row_id: str) -> Row:
    """Checks one line. The error of a bad one stands in the row."""
    custom_id = None
    try:
        request = _json_object(place.number, line)
        if isinstance(request.get("custom_id"), str):
            custom_id = request["custom_id"]
        _check(request)
    except RowError as error:
        return Row(place, row_id, custom_id, error=RowError(error.code, f"line {place.number}: {error.message}"))
    return Row(place, row_id, custom_id, request["body"])


def _json_object(number: int, line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        limit = f"the {MAX_LINE_BYTES // 2**20} MiB allowed"
        raise RowError("line_too_long", f"it is longer than {limit}; use smaller images, or paths with --images")
    try:
        content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_no_json)
    except UnicodeDecodeError as error:
        raise RowError("invalid_json_line", f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RowError("invalid_json_line", f"it is not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise RowError("invalid_json_line", f"it is JSON of type {type(content).__name__}, not an object with {KEYS}")
    return content


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is not in JSON")


def _check(request: dict[str, Any]) -> None:
    for key, kind in zip(KEYS, (str, str, str, dict), strict=True):
        if not isinstance(request.get(key), kind) or request[key] == "":
            named = "text" if kind is str else "an object"
            raise RowError(
                "missing_required_parameter", f"{key} is missing or not {named}; each row needs {', '.join(KEYS)}"
            )
    if request["method"] != "POST":
        raise RowError("invalid_method", f"method is {request['method'][:80]!r}; write POST")
    if request["url"] != URL:
        raise RowError("invalid_url", f"url is {request['url'][:80]!r}; write {URL}")
    if unknown := sorted(set(request) - set(KEYS)):
        raise RowError("unknown_parameter", f"{unknown[0][:80]!r} is unknown; a row has {KEYS}")
    if request["body"].get("stream"):
        raise RowError("invalid_request", "stream is on, but a batch has whole answers; leave it out")


def _lines(path: Path) -> Iterator[tuple[Place, bytes, str]]:
    """Yields place, bytes and hash of each line that is not empty; of a line that is too long, its start."""
    number = start = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            digest, size, end = hashlib.sha256(line.strip()), len(line), line
            while not end.endswith(b"\n") and (end := file.readline(MAX_LINE_BYTES)):
                digest.update(end)
                size += len(end)
            number += 1
            if line.removeprefix(UTF8_MARK).strip():
                yield Place(number, start, size), line, _short(digest)
            start += size


def _short(digest: hashlib._Hash) -> str:
    return digest.hexdigest()[:16]


def output_row(row: Row, answer: Answer, prepare: Prepare) -> dict[str, Any]:
    """The output row of an input row."""
    try:
        if row.error is not None:
            raise row.error
        assert row.body is not None
        status, body, request_id = answer(prepare(row.body))
    except RowError as error:
        return error_row(row, error)
    response = {"status_code": status, "request_id": request_id or row.id, "body": body}
    return {"id": row.id, "custom_id": row.custom_id, "response": response, "error": None}


def error_row(row: Row, error: RowError) -> dict[str, Any]:
    """The output row of an input row without a response."""
    said = {"code": error.code, "message": error.message}
    return {"id": row.id, "custom_id": row.custom_id, "response": None, "error": said}


def is_failed(output: dict[str, Any]) -> bool:
    """Whether a row has no answer: it has an error, or a status that is not 200."""
    return output["response"] is None or output["response"]["status_code"] != 200


def failure(output: dict[str, Any]) -> tuple[str, str]:
    """Status and code of a failed row, and its message."""
    response = output["response"]
    error = output["error"] if response is None else response["body"].get("error")
    error = error if isinstance(error, dict) else {}
    status = "" if response is None else str(response["status_code"])
    code = str(error.get("code") or error.get("type") or "")
    return f"{status} {code[:60]}".strip(), " ".join(str(error.get("message") or "").split())[:200]


def to_line(output: dict[str, Any]) -> bytes:
    """An output row as a line of JSON in UTF-8. Half a character of UTF-16 in a text stays an escape."""
    return json.dumps(output, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

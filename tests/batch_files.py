"""Inputs of batches, and answers to them, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenpacker.batch import Reply, run_batch

URL = "/v1/chat/completions"


def request(custom_id: str, text: str = "hello", **body: Any) -> dict[str, Any]:
    """An input row."""
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": body}


def completion(text: str) -> dict[str, Any]:
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"image_tokens": 4}}
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": usage}


def echo(body: dict[str, Any]) -> Reply:
    """Answers with the question."""
    return Reply(200, completion(body["messages"][0]["content"]))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows]


class Files:
    """An input and an output in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder, self.source, self.target = folder, folder / "in.jsonl", folder / "out.jsonl"

    def write(self, *lines: dict[str, Any] | str | bytes) -> None:
        """Writes the input: rows, or lines as they are."""
        raw = [line if isinstance(line, bytes) else _text(line).encode() for line in lines]
        self.source.write_bytes(b"".join(line + b"\n" for line in raw))

    def run(self, answer: Callable[[dict[str, Any]], Reply] = echo, settings: str = "s", **options: Any):
        """Answers the input; returns summary and output rows."""

        @contextmanager
        def opened():
            yield answer

        summary = run_batch(self.source, self.target, opened, {"test": settings}, **{"concurrency": 2, **options})
        return summary, read(self.target)


def _text(line: dict[str, Any] | str) -> str:
    return line if isinstance(line, str) else json.dumps(line)

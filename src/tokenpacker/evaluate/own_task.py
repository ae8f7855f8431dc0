"""Your own task: a file with a question on each line.

    {"image": "a.png", "question": "What colour is the car?", "answer": "red"}
    {"image": ["a.png", "b.png"], "question": "Which is larger?", "answers": ["the first", "first"], "category": "size"}
    {"image": "c.png", "question": "What is shown?", "options": ["a cat", "a dog"], "answer": "B"}

`id`, `category`, `options` and `hint` may be left out; the id is the line's number then. Images are relative to the
file. With options, the answer is a letter, or the text of an option.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.layouts.loaded import Loaded, Problem, broken_question, gather
from tokenpacker.text import check_text

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def load_own(path: Path) -> Loaded:
    """The questions of a file, in order.

    Raises:
        ValueError: if there is no such file, or no line in it.
    """
    if not path.is_file():
        raise ValueError(f"the task {path} is not there; give the path of a file with a JSON object on each line")
    problems: list[Problem] = []
    questions = list(_questions(path, problems))
    if not questions:
        raise ValueError(f"the task {path} has no questions; write a JSON object on each line")
    return gather(questions, problems, source=str(path.resolve()))


def _questions(path: Path, problems: list[Problem]) -> Iterator[BenchQuestion]:
    for number, line in enumerate(path.read_bytes().removeprefix(_BYTE_ORDER_MARK).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield _question(_row(line), path.parent, number)
        except ValueError as error:
            question, problem = broken_question(f"{path.name}:{number}", str(error))
            problems.append(problem)
            yield question


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is no JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("the line is no JSON object")
    return row


def _question(row: dict[str, Any], folder: Path, number: int) -> BenchQuestion:
    images = _texts(row, "image")
    options = _texts(row, "options") if row.get("options") is not None else []
    if "answer" in row and "answers" in row:
        raise ValueError("answer and answers exclude each other; leave one out")
    answers = _texts(row, "answers" if "answers" in row else "answer")
    extra: dict[str, Any] = {name: _text(row[name], name) for name in ("category", "hint") if row.get(name) is not None}
    if options:
        extra["options"] = options
        answers = [form for answer in answers for form in _letter_and_text(answer, options)]
    return BenchQuestion(
        id=str(number) if row.get("id") is None else _text(row["id"], "id"),
        text=_text(row.get("question"), "question"),
        images=tuple(str(folder / image) for image in images),
        answers=tuple(answers),
        extra=extra,
    )


def _texts(row: dict[str, Any], name: str) -> list[str]:
    """One text or several, at least one."""
    value = row.get(name)
    values = value if isinstance(value, list) else [value]
    if not values or value is None:
        raise ValueError(f"{name} is missing; give a text, or a list of texts")
    return [_text(each, name) for each in values]


def _text(value: Any, name: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "question":
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {json.dumps(value)[:80]}; give a text that is not blank")
    return check_text(value, name)


def _letter_and_text(answer: str, options: list[str]) -> tuple[str, str]:
    """Of the option that the answer names by either."""
    letters = list(ascii_uppercase[: len(options)])
    letter = answer.strip().upper()
    if answer in options:
        letter = letters[options.index(answer)]
    elif letter not in letters:
        raise ValueError(f"the answer {answer[:80]!r} is none of the {len(options)} options; give a letter or the text")
    return letter, options[letters.index(letter)]

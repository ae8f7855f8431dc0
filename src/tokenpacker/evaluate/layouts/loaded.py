"""What a layout gives: the questions of a benchmark, and what was wrong with its files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tokenpacker.evaluate.bench_question import BenchQuestion

ProblemKind = Literal["malformed row", "duplicate id", "missing image", "could not be asked"]


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set.

    Args:
        where: the file and line, or the question's id.
        text: what is wrong, in one sentence.
    """

    kind: ProblemKind
    where: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The questions of a benchmark.

    Args:
        questions: all of them, each with an id of its own. One that cannot be asked has the reason in
            `extra["problem"]`; it counts as wrong.
        problems: what was wrong with the files, in their order.
        source: the files, or the hub's data set with its revision, that they were read from.
        split: the split that they belong to.
    """

    questions: tuple[BenchQuestion, ...]
    problems: tuple[Problem, ...] = ()
    source: str = ""
    split: str = ""


def broken_question(where: str, text: str) -> tuple[BenchQuestion, Problem]:
    """What a malformed row becomes: a question that counts as wrong, and the problem."""
    return BenchQuestion(id=where, text="", extra={"problem": text}), Problem("malformed row", where, text)


def gather(
    questions: Iterable[BenchQuestion], problems: Iterable[Problem] = (), *, source: str = "", split: str = ""
) -> Loaded:
    """The questions, once images that are missing and ids that occur before are noted.

    The second question of an id gets the id `ID (2)`, and so on.
    """
    found, kept, uses, taken = list(problems), [], Counter[str](), set[str]()
    for question in questions:
        uses[question.id] += 1
        if question.id in taken:
            name = f"{question.id} ({uses[question.id]})"
            found.append(Problem("duplicate id", question.id, f"the id occurs before; it is counted as {name!r}"))
            question = replace(question, id=name, extra={**question.extra, "repeated": True})
        taken.add(question.id)
        lost = [str(image) for image in question.images if isinstance(image, (str, Path)) and not os.path.isfile(image)]
        if lost:
            text = f"the image {lost[0]} is missing"
            found.append(Problem("missing image", question.id, text))
            question = replace(question, extra={**question.extra, "problem": text})
        kept.append(question)
    return Loaded(questions=tuple(kept), problems=tuple(found), source=source, split=split)

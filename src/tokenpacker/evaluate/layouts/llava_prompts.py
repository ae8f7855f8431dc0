"""LLaVA's own question files (its eval.zip), joined with the references of each benchmark.

A row of most is {"question_id", "image", "text", "category"}, where `text` is the whole prompt, instruction included.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tokenpacker.data.annotations.entries import read_entries
from tokenpacker.data.rows import RecordError
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.layouts.benchmark_files import (
    BenchmarkFiles,
    Questions,
    json_entries,
    json_lines,
    questions_of,
    text,
    texts,
    value,
)
from tokenpacker.evaluate.protocols.protocol import LETTER, MME_ENDING, SHORT, UNANSWERABLE

OCR_LINE = "Reference OCR token: "
INSTRUCTIONS = {line.strip() for line in (SHORT, LETTER, UNANSWERABLE)}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SEED_OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")

Finish = Callable[[BenchQuestion, Mapping[str, Any]], BenchQuestion]
"""Adds what a row's prompt does not have; a question without references gets a problem."""


def bare_question(prompt: str) -> str:
    """The question of a prompt, without instructions and words read in the image."""
    lines = prompt.strip().split("\n")
    kept = [line for line in lines if line.strip() not in INSTRUCTIONS and not line.startswith(OCR_LINE)]
    return "\n".join(kept).strip()


def read_prompts(files: BenchmarkFiles, finish: Finish = lambda question, row: question) -> Questions:
    """The questions of a file in LLaVA's form."""

    def read(where: str, row: Any) -> BenchQuestion:
        prompt = text(row, "text", where)
        question = BenchQuestion(
            id=text(row, "question_id", where),
            text=bare_question(prompt),
            images=(files.image(text(row, "image", where)),),
            extra={"prompt": prompt},
        )
        return finish(question, row)

    return questions_of(json_lines(files.questions), read)


def with_answers(question: BenchQuestion, answers: tuple[str, ...] | None, source: Path, **extra: Any) -> BenchQuestion:
    """The question with its references, or with a problem if there are none."""
    if not answers:
        extra["problem"] = f"{source} has no reference for it; fetch both files again, of the same version"
    return replace(question, answers=answers or (), extra={**question.extra, **extra})


def _references(files: BenchmarkFiles) -> Path:
    assert files.annotations is not None  # the layout names them
    return files.annotations


def read_gqa(files: BenchmarkFiles) -> Questions:
    """GQA: `testdev_balanced_questions.json` is {question id: {"answer", ...}}."""
    source = _references(files)
    answers = {id: texts(entry, "answer", f"{source.name}, {id}") for id, entry in read_entries(source)}
    return read_prompts(files, lambda question, row: with_answers(question, answers.get(question.id), source))


def read_textvqa(files: BenchmarkFiles) -> Questions:
    """TextVQA: a row's id is its image's, so the references are found by image and question, as LLaVA does."""
    source = _references(files)
    found = {
        (text(entry, "image_id", where), text(entry, "question", where).lower()): entry
        for where, entry in json_entries(source, "data")
    }

    def finish(question: BenchQuestion, row: Mapping[str, Any]) -> BenchQuestion:
        entry = found.get((question.id, question.text.lower()), {})
        answers = texts(entry, "answers", source.name) if entry else None
        lines = [line for line in question.extra["prompt"].split("\n") if line.startswith(OCR_LINE.strip())]
        words = [word.strip() for line in lines for word in line[len(OCR_LINE) :].split(", ") if word.strip()]
        id = f"{question.id}-{entry.get('question_id', question.text)}"
        return with_answers(replace(question, id=id), answers, source, **({"ocr": words} if lines else {}))

    return read_prompts(files, finish)


def read_pope(files: BenchmarkFiles) -> Questions:
    """POPE: `coco/coco_pope_SPLIT.json` has a line {"image", "text", "label"} for each question of a split."""
    source = _references(files)
    labels = {
        (path.stem.removeprefix("coco_pope_"), text(row, "image", where), text(row, "text", where)): row
        for path in sorted(source.glob("coco_pope_*.json"))
        for where, row in json_lines(path)
        if isinstance(row, Mapping)
    }

    def finish(question: BenchQuestion, row: Mapping[str, Any]) -> BenchQuestion:
        category = text(row, "category", question.id)
        label = labels.get((category, row["image"], question.text), {}).get("label")
        answers = (str(label),) if label else None
        return with_answers(question, answers, source / f"coco_pope_{category}.json", category=category)

    return read_prompts(files, finish)


def read_mme(files: BenchmarkFiles) -> Questions:
    """MME: beside each image, or in `questions_answers_YN`, a text file with lines `question TAB Yes|No`."""
    counts = Counter[str]()

    def form(question: str) -> str:
        return " ".join(question.replace(MME_ENDING.strip(), "").split())

    @cache
    def answers_beside(image: Path) -> tuple[Path, dict[str, str]]:
        folder = image.parent.with_name("questions_answers_YN") if image.parent.name == "images" else image.parent
        source = folder / f"{image.stem}.txt"
        content = source.read_text(encoding="utf-8-sig", errors="replace") if os.path.isfile(source) else ""
        lines = [line.rpartition("\t") for line in content.splitlines()]
        return source, {form(question): answer.strip() for question, _, answer in lines}

    def finish(question: BenchQuestion, row: Mapping[str, Any]) -> BenchQuestion:
        counts[question.id] += 1
        image = files.images / str(row["image"])
        nested = image.parent / "images" / image.name  # some copies of the question file leave `images/` out
        image = nested if not os.path.isfile(image) and os.path.isfile(nested) else image
        source, answers = answers_beside(image)
        answer = answers.get(form(question.text))
        named = replace(question, id=f"{question.id}#{counts[question.id]}", images=(str(image),))
        extra = {"category": question.id.split("/")[0], "group": question.id}
        return with_answers(named, (answer,) if answer else None, source, **extra)

    return read_prompts(files, finish)


def read_seed(files: BenchmarkFiles) -> Questions:
    """SEED-Bench: `SEED-Bench.json` has the options and answers, and the names of the question types."""
    source = _references(files)
    found, names = {}, {}
    for key, entry in read_entries(source):
        if key == "questions":
            found[text(entry, "question_id", source.name)] = entry
        elif key == "question_type" and isinstance(entry, Mapping):
            names = {str(number): name for name, number in entry.items()}

    def finish(question: BenchQuestion, row: Mapping[str, Any]) -> BenchQuestion:
        entry = found.get(question.id)
        if entry is None:
            return with_answers(question, None, source)
        options = [text(entry, key, f"{source.name}, question {question.id}") for key in SEED_OPTIONS]
        category = names.get(str(entry.get("question_type_id")), row.get("category"))
        asked = replace(question, text=text(entry, "question", source.name))
        return with_answers(asked, texts(entry, "answer", source.name), source, options=options, category=category)

    return read_prompts(files, finish)


def read_scienceqa(files: BenchmarkFiles) -> Questions:
    """ScienceQA: a list of LLaVA conversations; `problems.json` is {id: {"question", "choices", "answer", "hint"}}."""
    source = _references(files)
    problems = dict(read_entries(source))

    def read(where: str, row: Any) -> BenchQuestion:
        id, turns = text(row, "id", where), value(row, "conversations", where)
        prompt = text(turns[0] if turns and isinstance(turns, list) else None, "value", where)
        images = (files.image(text(row, "image", where)),) if row.get("image") else ()
        question = BenchQuestion(id=id, text="", images=images, extra={"prompt": prompt.replace("<image>", "").strip()})
        problem = problems.get(id)
        if problem is None:
            return with_answers(question, None, source)
        place = f"{source.name}, problem {id}"
        options, answer = texts(problem, "choices", place), text(problem, "answer", place)
        if not answer.isdecimal() or int(answer) >= min(len(options), len(LETTERS)):
            raise RecordError(place, f"'answer' is {answer}; the number of one of the {len(options)} options is due")
        asked = replace(question, text=text(problem, "question", place))
        extra = {"options": options, "hint": problem.get("hint") or "", "category": problem.get("subject") or ""}
        return with_answers(asked, (LETTERS[int(answer)],), source, **extra)

    return questions_of(json_entries(files.questions), read)

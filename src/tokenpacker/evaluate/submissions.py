"""Files for the servers that score what has no public answers, in the form that each takes.

Sources: LLaVA's scripts/convert_*_for_submission.py and convert_mmvet_for_eval.py, TokenPacker's
scripts/convert_docvqa_for_eval.py, and MMMU's answer files. A question without an answer has an empty one there, since
servers refuse files that leave questions out. Rows that were no questions, and second uses of an id, are not in them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.mmmu import LETTERS, chosen_option
from tokenpacker.evaluate.metrics.vqa import normalize_m4c

Pairs = list[tuple[BenchQuestion, str]]
"""Questions and their answers."""
ALL_OF_VQAV2 = "llava_vqav2_mscoco_test2015.jsonl"
_ROW_ID = re.compile(rb'"question_id":\s*(\d+)')


def write_submission(
    benchmark: str,
    folder: Path,
    questions: Sequence[BenchQuestion],
    answers: Mapping[str, str],
    *,
    name: str | None = None,
) -> Path | None:
    """Writes a benchmark's submission file; None for a benchmark that is not scored by a server.

    Args:
        benchmark: name of the benchmark.
        folder: where the file goes; it is made.
        answers: by the id of their question.
        name: of the file, without its ending; None takes the benchmark's.

    Raises:
        ModuleNotFoundError: for MMBench without the library that writes xlsx.
    """
    if benchmark not in SUBMISSIONS:
        return None
    ending, write = SUBMISSIONS[benchmark]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or benchmark}.{ending}"
    asked = [question for question in questions if question.text and not question.extra.get("repeated")]
    write(path, [(question, answers.get(question.id) or "") for question in asked])
    return path


def _number(id: str) -> int | str:
    return int(id) if id.isdecimal() else id


def _write_json(path: Path, content: Any, **options: Any) -> None:
    path.write_text(json.dumps(content, **options), encoding="utf-8")


def _write_vqav2(path: Path, pairs: Pairs) -> None:
    """All of test2015 is wanted: questions that were not asked, such as those outside test-dev, have empty answers.

    They are listed by LLaVA's file for test2015, where it lies beside the folder of the images.
    """
    given = {_number(question.id): normalize_m4c(answer) for question, answer in pairs}
    images = [image for question, _ in pairs for image in question.images if isinstance(image, (str, Path))]
    sources = {Path(os.path.dirname(os.path.dirname(image)), ALL_OF_VQAV2) for image in images}
    lists = [source.read_bytes() for source in sources if source.is_file()]
    ids = [int(found[1]) for rows in lists for found in _ROW_ID.finditer(rows)]
    _write_json(path, [{"question_id": id, "answer": given.get(id, "")} for id in dict.fromkeys([*ids, *given])])


def _write_vizwiz(path: Path, pairs: Pairs) -> None:
    rows = []
    for question, answer in pairs:
        image = next((image for image in question.images if isinstance(image, (str, Path))), None)
        if image is not None or question.id.startswith("VizWiz"):  # the hub's ids are the images' names, without ending
            named = Path(image).name if image is not None else f"{question.id.removesuffix('.jpg')}.jpg"
            rows.append({"image": named, "answer": normalize_m4c(answer)})
    _write_json(path, rows)


def _write_docvqa(path: Path, pairs: Pairs) -> None:
    rows = [{"questionId": _number(question.id), "answer": answer.rstrip(".")} for question, answer in pairs]
    _write_json(path, rows)


def _write_mmvet(path: Path, pairs: Pairs) -> None:
    rows = {f"v1_{question.id.removeprefix('v1_')}": answer for question, answer in pairs}
    _write_json(path, rows, indent=2)


def _write_mmmu(path: Path, pairs: Pairs) -> None:
    """An option by its letter, an open answer as it is."""
    rows = {
        question.id: chosen_option(answer, question.options) if question.options else answer.strip()
        for question, answer in pairs
    }
    _write_json(path, rows)


def _write_seed(path: Path, pairs: Pairs) -> None:
    rows = [{"question_id": question.id, "prediction": answer} for question, answer in pairs]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _write_mmbench(path: Path, pairs: Pairs) -> None:
    """The TSV's columns as LLaVA leaves them, with `prediction` after the options."""
    if find_spec("xlsxwriter") is None:
        raise ModuleNotFoundError("MMBench's submission file needs xlsxwriter; run: pip install 'tokenpacker[metrics]'")
    import xlsxwriter

    letters = LETTERS[: max([4, *(len(question.options) for question, _ in pairs)])]
    has_answers = any(question.answers for question, _ in pairs)
    rows: list[list[Any]] = [["index", "question", *letters, "prediction", *["answer"] * has_answers, "split"]]
    for question, answer in pairs:
        options = [*question.options, *[None] * (len(letters) - len(question.options))]
        answers = [next(iter(question.answers), None)] if has_answers else []
        row = [_number(question.id), question.text, *options, answer, *answers, question.extra.get("split")]
        rows.append(row)
    with xlsxwriter.Workbook(str(path), {"strings_to_formulas": False, "strings_to_urls": False}) as book:
        sheet = book.add_worksheet("Sheet1")
        for number, row in enumerate(rows):
            sheet.write_row(number, 0, row)


SUBMISSIONS: dict[str, tuple[str, Callable[[Path, Pairs], None]]] = {
    "vqav2": ("json", _write_vqav2),
    "vizwiz": ("json", _write_vizwiz),
    "docvqa": ("json", _write_docvqa),
    "mm-vet": ("json", _write_mmvet),
    "mmmu": ("json", _write_mmmu),
    "seed": ("jsonl", _write_seed),
    "mmbench": ("xlsx", _write_mmbench),
}
"""Benchmark -> ending of its file, and what writes it."""

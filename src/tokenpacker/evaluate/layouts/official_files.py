"""Benchmarks that LLaVA's and TokenPacker's evaluations read in their authors' own files."""

from __future__ import annotations

import base64
import binascii
import csv
import os
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenpacker.data.annotations.coco import CocoFile
from tokenpacker.data.annotations.reader import file_names, size_of
from tokenpacker.data.rows import RecordError
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.layouts.benchmark_files import (
    BenchmarkFiles,
    Questions,
    json_entries,
    questions_of,
    text,
    texts,
    value,
)

LONGEST_CELL = 2**31 - 1  # characters of a TSV cell, which holds a whole image; the most that every platform takes
NOTHING = {"", "nan", "none"}  # what pandas writes into an empty cell
COLUMNS = "ABCDEFGH"  # of MMBench's options


def read_vqav2(files: BenchmarkFiles) -> Questions:
    """VQA v2: `questions` and `annotations`, the second with the answers of ten people and the answer's type."""
    assert files.annotations is not None
    annotations = json_entries(files.annotations, "annotations")
    found = {text(entry, "question_id", where): entry for where, entry in annotations}
    subtype = files.questions.stem.rsplit("_", 2)[-2]  # v2_OpenEnded_mscoco_val2014_questions

    def read(where: str, row: Any) -> BenchQuestion:
        id = text(row, "question_id", where)
        image = text(row, "image_id", where).zfill(12)
        entry = found.get(id)
        extra = {"category": entry.get("answer_type")} if entry else {"problem": f"{files.annotations} has no answers"}
        return BenchQuestion(
            id=id,
            text=text(row, "question", where),
            images=(files.image(f"COCO_{subtype}_{image}.jpg"),),
            answers=_people(entry, where) if entry else (),
            extra=extra,
        )

    return questions_of(json_entries(files.questions, "questions"), read)


def read_vizwiz(files: BenchmarkFiles) -> Questions:
    """VizWiz: a list of {"image", "question", "answers": [{"answer"}], "answer_type"}."""

    def read(where: str, row: Any) -> BenchQuestion:
        image = text(row, "image", where)
        return BenchQuestion(
            id=image,
            text=text(row, "question", where),
            images=(files.image(image),),
            answers=_people(row, where),
            extra={"category": row.get("answer_type")},
        )

    return questions_of(json_entries(files.questions), read)


def _people(row: Any, where: str) -> tuple[str, ...]:
    """The answers of all people. Raises RecordError for another form."""
    answers = value(row, "answers", where)
    if not isinstance(answers, list):
        raise RecordError(where, f"'answers' is a {type(answers).__name__}; a list is due")
    return tuple(text(answer, "answer", where) for answer in answers)


def read_docvqa(files: BenchmarkFiles) -> Questions:
    """DocVQA: `data` is a list of {"questionId", "question", "image", "answers"}; the test file has no answers."""

    def read(where: str, row: Any) -> BenchQuestion:
        return BenchQuestion(
            id=text(row, "questionId", where),
            text=text(row, "question", where),
            images=(files.image(Path(text(row, "image", where)).name),),
            answers=texts(row, "answers", where) if row.get("answers") else (),
        )

    return questions_of(json_entries(files.questions, "data"), read)


def read_chartqa(files: BenchmarkFiles) -> Questions:
    """ChartQA: a list of {"imgname", "query", "label"} for the human half, and another for the augmented one."""
    for part in ("human", "augmented"):
        path = files.questions.with_name(files.questions.name.replace("human", part))
        if not path.is_file():
            raise ValueError(f"{path} is missing; ChartQA's score is of both halves")

        def read(where: str, row: Any, part: str = part) -> BenchQuestion:
            return BenchQuestion(
                id=f"{part}-{where.rsplit(' ', 1)[-1]}",
                text=text(row, "query", where),
                images=(files.image(text(row, "imgname", where)),),
                answers=(text(row, "label", where),),
                extra={"category": part},
            )

        yield from questions_of(json_entries(path), read)


def read_ocrbench(files: BenchmarkFiles) -> Questions:
    """OCRBench: a list of {"image_path", "question", "answers", "type"}."""

    def read(where: str, row: Any) -> BenchQuestion:
        return BenchQuestion(
            id=where.rsplit(" ", 1)[-1],
            text=text(row, "question", where),
            images=(files.image(text(row, "image_path", where)),),
            answers=texts(row, "answers", where),
            extra={"category": text(row, "type", where)},
        )

    return questions_of(json_entries(files.questions), read)


def read_mmbench(files: BenchmarkFiles) -> Questions:
    """MMBench: a TSV with the image of each row in base64, or the `index` of the row that has it."""
    images: dict[str, bytes] = {}
    stored: dict[bytes, bytes] = {}  # the rotations of a question repeat its image; it is kept once

    def read(where: str, row: Any) -> BenchQuestion:
        id, cell = text(row, "index", where), text(row, "image", where)
        if cell.isdecimal():
            if cell not in images:
                raise RecordError(where, f"its image is that of index {cell}, which no row before it has")
            image = images[cell]
        else:
            try:
                image = base64.b64decode(cell, validate=True)
            except (binascii.Error, ValueError) as error:
                raise RecordError(where, f"its image is no base64 ({error}); fetch the file again") from None
            image = images[id] = stored.setdefault(image, image)
        cells = {key: cell for key, cell in row.items() if isinstance(cell, str) and cell.lower() not in NOTHING}
        options = [cells[letter] for letter in takewhile(cells.__contains__, COLUMNS)]
        if not options:
            raise RecordError(where, "it has no options in the columns A, B, C, D")
        extra = {"options": options, **{key: cells[key] for key in ("hint", "category", "split") if key in cells}}
        answers = (cells["answer"],) if "answer" in cells else ()
        return BenchQuestion(id=id, text=text(row, "question", where), images=(image,), answers=answers, extra=extra)

    return questions_of(_tsv_rows(files.questions), read)


def _tsv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", restkey="too many cells")
        try:
            for row in reader:
                where = f"{path.name}, line {reader.line_num}"
                many = "too many cells" in row
                yield where, RecordError(where, "it has more cells than the first line has names") if many else row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no valid TSV after line {reader.line_num}: {error}; fetch it again") from None


def read_refcoco(files: BenchmarkFiles, split: str, *, boxes: bool) -> Questions:
    """RefCOCO: a list of refs as JSON, and COCO's `instances.json` beside it, which has the boxes.

    Args:
        boxes: whether each sentence is a question for its box; otherwise each region is one, for a description.
    """
    assert files.annotations is not None
    content = CocoFile.read(files.annotations)
    for where, ref in json_entries(files.questions):
        if not isinstance(ref, Mapping) or ref.get("split") == split:
            try:
                yield from _ref_questions(where, ref, content, files.images, boxes)
            except RecordError as error:
                yield error


def _ref_questions(where: str, ref: Any, content: CocoFile, images: Path, boxes: bool) -> Iterator[BenchQuestion]:
    id, image_id = text(ref, "ref_id", where), text(ref, "image_id", where)
    listed = value(ref, "sentences", where)
    sentences = [text(sentence, "sent", where) for sentence in (listed if isinstance(listed, list) else [listed])]
    image = content.images.get(image_id)
    size, names = (size_of(image), file_names(image)) if image else (None, ())
    found = [one for one in content.image_annotations(image_id) if str(one.get("id")) == text(ref, "ann_id", where)]
    if not (size and all(size) and names and found):
        reason = f"image_id={image_id} with ann_id={ref.get('ann_id')} is not whole in COCO's annotations"
        raise RecordError(where, reason)
    corners = found[0].get("bbox")
    if not isinstance(corners, list) or len(corners) != 4 or not all(isinstance(n, (int, float)) for n in corners):
        raise RecordError(where, f"its bbox is {corners!r}; [x, y, width, height] is due")
    left, top, width, height = corners
    box = (left / size[1], top / size[0], (left + width) / size[1], (top + height) / size[0])
    paths = [str(images / name) for name in names]
    picture = next(filter(os.path.isfile, paths), paths[0])
    if not boxes:
        yield BenchQuestion(id=id, text="", images=(picture,), answers=tuple(sentences), extra={"box": box})
        return
    shown = f"[{', '.join(f'{share:.4f}' for share in box)}]"
    for number, sentence in enumerate(sentences, 1):
        yield BenchQuestion(id=f"{id}-{number}", text=sentence, images=(picture,), answers=(shown,))

"""Which columns of lmms-eval's data sets hold what.

The repositories, configurations, splits and columns are those that the tasks of lmms-eval 0.7.3 read. A column that
only names images or sorts results is taken where it is there.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

Row = Mapping[str, Any]
"""The columns of a row without its images. `#` is the number of the row, counted from 1."""

UNKNOWN = ("", "?", "nan")  # what stands for an answer or a hint that is not there
SEED_TYPES = (  # by question_type_id, from 1; https://github.com/AILab-CVC/SEED-Bench, DATASET.md
    "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instances Counting",
    "Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Understanding", "Action Recognition",
    "Action Prediction", "Procedure Understanding",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """Where a benchmark's questions stand in a data set.

    Args:
        benchmark: its name.
        repository: hub id of the data set.
        splits: split -> configuration, the default split first. The configuration "" is the only one; its files are in
            the folder `data`.
        columns: what each row must have, images left out.
        id: unique within the split.
        images: columns with an image or a list of images.
        image_config: configuration with the images of another one, whose column `id` a question's `imageId` names.
        shown: the columns of `images` that a question shows; those without an image are an error then. None shows all
            that are there.
        image_id: same for equal images; None compares the images' bytes.
        needs_image: whether a question without an image is an error.
        answers: all references: a text, a list of texts, or None.
        options: texts of the options.
        extra: other entries of `BenchQuestion.extra`. Those that are None are left out.
        boxes: whether `#size`, (width, height) of the image, is added to the row.
        each: column with several texts, each of which becomes a question; `#entry` counts them from 1.
    """

    benchmark: str
    repository: str
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    id: Callable[[Row], object]
    text: str = "question"
    images: tuple[str, ...] = ("image",)
    image_config: str | None = None
    shown: Callable[[Row], Sequence[str]] | None = None
    image_id: Callable[[Row], object] = lambda row: None
    needs_image: bool = True
    answers: Callable[[Row], Any] = lambda row: row["answer"]
    options: Callable[[Row], Sequence[str]] | None = None
    extra: Mapping[str, Callable[[Row], Any]] = field(default_factory=dict)
    boxes: bool = False
    each: str | None = None

    def find_split(self, split: str | None) -> str:
        """The split's name; `val` and `validation` mean the same. Raises ValueError for an unknown one."""
        split = split or next(iter(self.splits))
        other = {"val": "validation", "validation": "val"}.get(split)
        found = next((name for name in (split, other) if name in self.splits), None)
        if found is None:
            raise ValueError(f"{self.benchmark} has no split {split!r}; use one of: {', '.join(self.splits)}")
        return found

    def files(self, split: str | None) -> list[str]:
        """Patterns of the Parquet files of a split, relative to the repository; one for each configuration."""
        split = self.find_split(split)
        configs = (self.splits[split], self.image_config)
        return [f"{name or 'data'}/{split}-*.parquet" for name in configs if name is not None]


def known(value: Any) -> Any:
    """The value, or None for a text that stands for a missing one."""
    return None if isinstance(value, str) and value.strip() in UNKNOWN else value


def listed(text: str) -> list[str]:
    """The list that a text writes out, as MMMU's options. Raises ValueError for any other text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{text!r} is no list")
    return [str(entry) for entry in value]


def _letters(row: Row) -> list[str]:
    """Options in columns A to E, of which the last may be missing."""
    texts = [row.get(letter) for letter in "ABCDE"]
    return [text for text in texts if text and text != "nan"]


def _letter(row: Row) -> str | None:
    """The letter of an answer given as a number from 0."""
    return None if row["answer"] is None else ascii_uppercase[row["answer"]]


def _mmmu_answers(row: Row) -> Any:
    answer = known(row["answer"])
    several = row["question_type"] != "multiple-choice" and isinstance(answer, str) and answer.startswith("[")
    return listed(answer) if several else answer


def _mmmu_images(row: Row) -> list[str]:
    """Columns of the images that the question and its options name as `<image 2>`."""
    text = f"{row['question']} {row['options']}"
    return [f"image_{number}" for number in range(1, 8) if f"<image {number}>" in text]


def _shares(row: Row) -> tuple[float, ...]:
    """Corners (x1, y1, x2, y2) of a box given as x, y, width, height in pixels, in shares of the image."""
    (left, top, width, height), (full_width, full_height) = row["bbox"], row["#size"]
    return left / full_width, top / full_height, (left + width) / full_width, (top + height) / full_height


def _box_text(row: Row) -> str:
    return f"[{', '.join(f'{share:.6f}' for share in _shares(row))}]"


def _column(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name)


_HUB = "lmms-lab-encoder"
_REFCOCO: dict[str, Any] = {
    "repository": f"{_HUB}/RefCOCO",
    "splits": {"val": "", "test": "", "testA": "", "testB": ""},
    "columns": ("question_id", "question", "answer", "bbox"),
    "boxes": True,
}
_ALL = (
    Table(
        benchmark="pope",
        repository=f"{_HUB}/POPE",
        splits={"test": "", "adversarial": "Full", "popular": "Full", "random": "Full"},
        columns=("question_id", "question", "answer"),
        id=lambda row: "/".join(filter(None, (row.get("category"), row["question_id"]))),  # numbered anew in each
        image_id=_column("image_source"),
        extra={"category": _column("category")},
    ),
    Table(
        benchmark="gqa",
        repository=f"{_HUB}/GQA",
        splits={"testdev": "testdev_balanced_instructions"},
        columns=("id", "imageId", "question", "answer"),
        id=lambda row: row["id"],
        image_config="testdev_balanced_images",
        image_id=lambda row: row["imageId"],
    ),
    Table(
        benchmark="vqav2",
        repository=f"{_HUB}/VQAv2",
        splits={"validation": "", "testdev": "", "test": ""},
        columns=("question_id", "question", "answers"),
        id=lambda row: row["question_id"],
        image_id=_column("image_id"),
        answers=lambda row: [entry["answer"] for entry in row["answers"] or ()],
        extra={"category": _column("answer_type")},
    ),
    Table(
        benchmark="vizwiz",
        repository=f"{_HUB}/VizWiz-VQA",
        splits={"val": "", "test": ""},
        columns=("question_id", "question", "answers"),
        id=lambda row: row["question_id"],
        image_id=lambda row: row["question_id"],  # one question an image
        answers=lambda row: row["answers"],
        extra={"category": _column("category")},
    ),
    Table(
        benchmark="textvqa",
        repository=f"{_HUB}/textvqa",
        splits={"validation": "", "test": ""},
        columns=("question_id", "question", "answers"),
        id=lambda row: row["question_id"],
        image_id=_column("image_id"),
        answers=lambda row: row["answers"],
        extra={"ocr": _column("ocr_tokens")},
    ),
    Table(
        benchmark="docvqa",
        repository=f"{_HUB}/DocVQA",
        splits={"validation": "DocVQA", "test": "DocVQA"},
        columns=("questionId", "question", "answers"),
        id=lambda row: row["questionId"],
        image_id=lambda row: (name := row.get("ucsf_document_id")) and f"{name}_{row.get('ucsf_document_page_no')}",
        answers=lambda row: row["answers"],
    ),
    Table(
        benchmark="chartqa",
        repository=f"{_HUB}/ChartQA",
        splits={"test": ""},
        columns=("type", "question", "answer"),
        id=lambda row: row["#"],
        extra={"category": lambda row: row["type"].removesuffix("_test")},
    ),
    Table(
        benchmark="ocrbench",
        repository="echo840/OCRBench",
        splits={"test": ""},
        columns=("question", "answer", "question_type"),
        id=lambda row: row["#"],
        extra={"category": lambda row: row["question_type"]},
    ),
    Table(
        benchmark="mme",
        repository=f"{_HUB}/MME",
        splits={"test": ""},
        columns=("question_id", "question", "answer", "category"),
        id=lambda row: f"{row['question_id']}/{row['#']}",  # the two questions about an image have the same id
        image_id=lambda row: row["question_id"],
        extra={"category": lambda row: row["category"], "group": lambda row: row["question_id"]},
    ),
    Table(
        benchmark="mmbench",
        repository=f"{_HUB}/MMBench",
        splits={"dev": "en", "test": "en"},
        columns=("index", "question", "hint", "answer", "A", "B", "category"),
        id=lambda row: row["index"],
        image_id=lambda row: row["index"] % 1_000_000,  # rotations of the options are a million apart
        answers=lambda row: known(row["answer"]),
        options=_letters,
        extra={"category": lambda row: row["category"], "hint": lambda row: known(row["hint"])},
    ),
    Table(
        benchmark="mmmu",
        repository=f"{_HUB}/MMMU",
        splits={"validation": "", "dev": "", "test": ""},
        columns=("id", "question", "options", "answer", "question_type"),
        id=lambda row: row["id"],
        images=tuple(f"image_{number}" for number in range(1, 8)),
        shown=_mmmu_images,
        answers=_mmmu_answers,
        options=lambda row: listed(row["options"]) if row["question_type"] == "multiple-choice" else (),
        extra={"category": lambda row: row["id"].partition("_")[2].rpartition("_")[0]},  # validation_Accounting_1
    ),
    Table(
        benchmark="mm-vet",
        repository=f"{_HUB}/MMVet",
        splits={"test": ""},
        columns=("question_id", "question", "answer"),
        id=lambda row: row["question_id"],
        needs_image=False,
    ),
    Table(
        benchmark="seed",
        repository=f"{_HUB}/SEED-Bench",
        splits={"test": ""},
        columns=(
            *("question_id", "question", "answer", "choice_a", "choice_b", "choice_c", "choice_d"),
            "data_type",
        ),
        id=lambda row: row["question_id"],
        # Videos are cut differently for each question.
        image_id=lambda row: row.get("data_id") if row["data_type"] == "image" else row["question_id"],
        options=lambda row: [row[f"choice_{letter}"] for letter in "abcd"],
        extra={"category": lambda row: (number := row.get("question_type_id")) and SEED_TYPES[int(number) - 1]},
    ),
    Table(
        benchmark="scienceqa",
        repository=f"{_HUB}/ScienceQA",
        splits={"test": "ScienceQA-FULL", "validation": "ScienceQA-FULL"},
        columns=("question", "choices", "answer", "hint"),
        id=lambda row: row["#"],
        needs_image=False,
        answers=_letter,
        options=lambda row: row["choices"],
        extra={"category": _column("subject"), "hint": lambda row: row["hint"] or None},
    ),
    Table(
        benchmark="refcoco",
        id=lambda row: row["question_id"],
        extra={"box": _shares},
        **_REFCOCO,
    ),
    Table(
        benchmark="refcoco-boxes",
        id=lambda row: f"{row['question_id']}/{row['#entry']}",
        text="answer",
        each="answer",
        answers=_box_text,
        **_REFCOCO,
    ),
)
TABLES = {table.benchmark: table for table in _ALL}

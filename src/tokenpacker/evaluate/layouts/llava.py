"""The files that the evaluation documents of LLaVA and TokenPacker use, as a table.

Sources: docs/Evaluation.md and scripts/v1_5/eval of https://github.com/haotian-liu/LLaVA; docs/evaluation.md of
https://github.com/CircleRadon/TokenPacker for DocVQA, OCRBench and MMMU (Parquet, as lmms-eval has it). ChartQA and
RefCOCO are in neither: their authors' own files are read. A benchmark's first split is that of the published numbers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tokenpacker.data.rows import RecordError
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.layouts import llava_prompts as prompts
from tokenpacker.evaluate.layouts import official_files as official
from tokenpacker.evaluate.layouts.benchmark_files import Layout, Questions
from tokenpacker.evaluate.layouts.loaded import Loaded, Problem, broken_question, gather

# Folders below the data folder, as the documents name them; the data folder itself is looked at last.
FOLDERS = {
    "mme": ("MME",),
    "seed": ("seed_bench",),
    "mm-vet": ("mm-vet", "mmvet"),
    "ocrbench": ("ocr_bench", "OCRBench"),
    "chartqa": ("chartqa", "ChartQA Dataset"),
    "refcoco-boxes": ("refcoco",),
}
_DOCVQA_IMAGES = ("images", "documents", "data/images", "data/documents", "spdocvqa_images")
_COCO_IMAGES = ("train2014", "images", "../train2014", "../coco/train2014", "../coco")


def _refcoco(boxes: bool) -> tuple[Layout, ...]:
    return tuple(
        Layout(
            split=split,
            questions="refs.json",
            images=_COCO_IMAGES,
            annotations=("instances.json",),
            read=partial(official.read_refcoco, split=split, boxes=boxes),
        )
        for split in ("val", "testA", "testB")
    )


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "vqav2": (
        *(
            Layout(
                split=split,
                questions=f"llava_vqav2_mscoco_{split}2015.jsonl",
                images=("test2015",),
                read=prompts.read_prompts,
            )
            for split in ("test-dev", "test")
        ),
        Layout(
            split="val",
            questions="v2_OpenEnded_mscoco_val2014_questions.json",
            images=("val2014",),
            annotations=("v2_mscoco_val2014_annotations.json",),
            read=official.read_vqav2,
        ),
    ),
    "gqa": (
        Layout(
            split="testdev_balanced",
            questions="llava_gqa_testdev_balanced.jsonl",
            images=("data/images",),
            annotations=(
                "data/testdev_balanced_questions.json",
                "data/questions1.2/testdev_balanced_questions.json",
                "data/questions/testdev_balanced_questions.json",
            ),
            read=prompts.read_gqa,
        ),
    ),
    "vizwiz": (
        Layout(split="test", questions="llava_test.jsonl", images=("test",), read=prompts.read_prompts),
        Layout(split="val", questions="val.json", images=("val",), read=official.read_vizwiz),
    ),
    "textvqa": (
        Layout(
            split="val",
            questions="llava_textvqa_val_v051_ocr.jsonl",
            images=("train_images",),
            annotations=("TextVQA_0.5.1_val.json",),
            read=prompts.read_textvqa,
        ),
    ),
    "docvqa": tuple(
        Layout(
            split=split,
            questions=f"{folder}{split}_v1.0*.json",
            images=_DOCVQA_IMAGES,
            read=official.read_docvqa,
        )
        for split in ("test", "val")
        for folder in ("data/", "")
    ),
    "chartqa": tuple(
        Layout(
            split=split,
            questions=f"{split}/{split}_human.json",
            images=(f"{split}/png",),
            read=official.read_chartqa,
        )
        for split in ("test", "val")
    ),
    "ocrbench": (
        Layout(split="test", questions="OCRBench.json", images=("OCRBench_Images",), read=official.read_ocrbench),
    ),
    "pope": (
        Layout(
            split="coco",
            questions="llava_pope_test.jsonl",
            images=("val2014",),
            annotations=("coco",),
            read=prompts.read_pope,
        ),
    ),
    "mme": (
        Layout(
            split="test",
            questions="llava_mme.jsonl",
            images=("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version"),
            read=prompts.read_mme,
        ),
    ),
    "mmbench": tuple(
        Layout(split=split, questions=pattern, images=("",), read=official.read_mmbench)
        for split in ("dev", "test")
        for pattern in (f"mmbench_{split}_2*.tsv", f"mmbench_{split}_en_2*.tsv")
    ),
    "seed": (
        Layout(
            split="image and video",
            questions="llava-seed-bench.jsonl",
            images=("",),
            annotations=("SEED-Bench.json",),
            read=prompts.read_seed,
        ),
    ),
    "scienceqa": (
        Layout(
            split="test",
            questions="llava_test_CQM-A.json",
            images=("images/test",),
            annotations=("problems.json",),
            read=prompts.read_scienceqa,
        ),
    ),
    "mm-vet": (Layout(split="test", questions="llava-mm-vet.jsonl", images=("images",), read=prompts.read_prompts),),
    "refcoco": _refcoco(boxes=False),
    "refcoco-boxes": _refcoco(boxes=True),
}


def folders_of(name: str, data: Path) -> tuple[Path, ...]:
    """Where a benchmark's files may lie."""
    return (*(data / folder for folder in FOLDERS.get(name, (name,))), data)


def load_llava(name: str, data: Path, split: str | None = None) -> Loaded | None:
    """The questions of a benchmark; None if its question file is not below the data folder.

    Raises:
        ValueError: for files that are not whole, in one line.
    """
    for layout in LAYOUTS.get(name, ()):
        for folder in folders_of(name, data) if split in (None, layout.split) else ():
            if files := layout.find(folder):
                return _collect(layout.read(files), source=str(files.questions), split=layout.split)
    return None


def expected_files(name: str, data: Path, split: str | None = None) -> list[str]:
    """The question files that `load_llava` looks for, one for each split."""
    folder = folders_of(name, data)[0]
    layouts = [layout for layout in LAYOUTS.get(name, ()) if split in (None, layout.split)]
    return list({layout.split: str(folder / layout.questions) for layout in reversed(layouts)}.values())[::-1]


def _collect(found: Questions, source: str, split: str) -> Loaded:
    questions: list[BenchQuestion] = []
    problems: list[Problem] = []
    for question in found:
        if isinstance(question, RecordError):
            question, problem = broken_question(question.id, question.reason)
            problems.append(problem)
        elif lost := question.extra.get("problem"):
            problems.append(Problem("malformed row", question.id, lost))
        questions.append(question)
    return gather(questions, problems, source=source, split=split)

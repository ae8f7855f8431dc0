"""A question of a benchmark, as every layout is read into it and every metric and prompt takes it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class StoredImage:
    """An encoded image in a table that is too large to hold in memory.

    Args:
        key: same for equal images of the table, such as the file and the row.
        read: returns the encoded image; it is called from many threads.
    """

    key: str
    read: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class BenchQuestion:
    """A question about images, with its references.

    Args:
        id: unique within the benchmark.
        text: the question as the data set has it, without options, hint and instructions.
        images: files, encoded or stored images, or images in memory; they are opened by `open_images`.
        answers: all references; empty where only a server has them. An option's letter for multiple choice.
        extra: what the metric and the prompt need, by these names:

            - `category`: what the results are split by (POPE's and ChartQA's split, MME's and MMBench's category,
              OCRBench's question type, MMMU's subject, SEED-Bench's question type, VQAv2's answer type).
            - `group`: name shared by the questions that count together (MME's two per image, MMBench's rotations).
            - `options`: texts of the options in order, for multiple choice.
            - `hint`: text in front of the question (MMBench, ScienceQA).
            - `ocr`: words read in the image (TextVQA).
            - `box`: (x1, y1, x2, y2) of the region asked about, in shares of the image's width and height.
            - `prompt`: the whole text that LLaVA's question file has, instruction included.
            - `regions`: what each `<mask>` of the text stands for, as the processor takes it.
            - `repeated`: whether an earlier question has the same id in the files.
            - `problem`: why the question cannot be asked, such as a missing image; it counts as wrong.

    Raises:
        ValueError: for an id or a text that is no string.
    """

    id: str
    text: str
    images: tuple[str | Path | bytes | StoredImage | Image.Image, ...] = ()
    answers: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "text"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name}={value!r} of a question is a {type(value).__name__}; use a str")

    @property
    def category(self) -> str:
        """What the results are split by; empty where the data set has no split."""
        return str(self.extra.get("category") or "")

    @property
    def options(self) -> tuple[str, ...]:
        """Texts of the options; empty for an open question."""
        return tuple(str(option) for option in self.extra.get("options") or ())

    @property
    def is_broken(self) -> bool:
        """Whether it cannot be asked; `extra["problem"]` says why."""
        return "problem" in self.extra

    @cached_property
    def image_key(self) -> str:
        """Same for all questions about the same images: their paths, or SHA-256 of their bytes; the id without images.

        A bootstrap resamples these, and features are computed once for each.
        """
        return "\n".join(map(_image_key, self.images)) or f"question {self.id}"

    def open_images(self) -> list[Image.Image]:
        """Upright RGB images. Raises ImageError, a ValueError, for a file that is missing or is no image."""
        from tokenpacker.images import load_image

        return [load_image(image.read() if isinstance(image, StoredImage) else image) for image in self.images]


def _image_key(image: str | Path | bytes | StoredImage | Image.Image) -> str:
    if isinstance(image, StoredImage):
        return image.key
    if isinstance(image, (str, Path)):
        return str(image)
    content = image if isinstance(image, bytes) else repr(image.size).encode() + image.tobytes()
    return hashlib.sha256(content).hexdigest()

"""What the probe asks of a set of pictures and of an encoder. Another one of either needs a class and a line below.

`Questions` draws pictures, each with the answers to the same Q questions; each question has its own number of answers.
`Encoder` turns pictures into M levels of patch features on a grid. The probe whitens each level to C channels, so that
projectors meet the same widths with every encoder.

Shapes: P pictures, (h, w) patch grid, L = h*w, M levels, C channels of a whitened level, Q questions of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

Split = Literal["train", "dev", "test"]  # to learn from, to choose settings with, to judge with
NO_ANSWER = -1  # a target that is neither learned nor counted
SIZE = 192  # of a picture, in pixels per side

# name -> module and class, imported when they are asked for
QUESTIONS = {
    "letters": ("tokenpacker.compare.probe.letters", "Letters"),
    "photos": ("tokenpacker.compare.probe.photo_scenes", "Photos"),
}
ENCODERS = {
    "craft": ("tokenpacker.compare.probe.encoders", "Craft"),
    "own-vit": ("tokenpacker.compare.probe.own_vit", "OwnViT"),
}


def grid_centers(rows: int, cols: int) -> npt.NDArray[np.float64]:
    """The centers (rows*cols, 2) of a grid's cells, row by row, down and right, from 0 to 1."""
    down, right = np.indices((rows, cols)).reshape(2, -1) + 0.5
    return np.stack([down / rows, right / cols], axis=1)


class Questions(Protocol):
    """A set of pictures with questions. No two splits share what a projector could learn by heart."""

    name: str
    num_classes: tuple[int, ...]
    """Q numbers: how many answers each question has."""
    places: npt.NDArray[np.float64]
    """(Q, 2): where each question looks, down and right, from 0 to 1; NaN if it is about the whole picture."""
    sorts: Mapping[str, int]
    """How many questions there are of each sort, in their order; accuracy is told for each if there are several."""
    digest: str
    """Of all that decides the pictures and answers, such as the files of fonts."""

    def __init__(self) -> None:
        """Finds the material. Raises ValueError or ImportError with the remedy if it is missing."""

    def draw(self, split: Split, number: int) -> tuple[Image.Image, npt.NDArray[np.int64]]:
        """A picture (SIZE x SIZE, RGB) and its answers (Q,), `NO_ANSWER` where a question does not apply.

        The same split and number give the same picture.
        """


class Encoder(Protocol):
    """A frozen encoder."""

    name: str
    patch_grid: tuple[int, int]
    num_levels: int
    query_level: int
    """Index of the level for coarse queries; -1 is the last."""
    digest: str
    """Of the weights: features of other weights are never taken for its own."""

    def __init__(self, weights: Path | None = None) -> None:
        """Finds the weights. Raises ValueError or ImportError with the remedy if they are missing."""

    def levels(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """M levels, each (P, L, channels); the channels may differ."""


def find_questions(name: str, folder: Path | None = None) -> Questions:
    """A set of pictures; a folder is for those that take their material from one.

    Raises ValueError for an unknown name, or if its material is missing.
    """
    found = _find(name, QUESTIONS, "questions")
    return found() if folder is None else found(folder)


def find_encoder(name: str, weights: Path | None = None) -> Encoder:
    """An encoder. Raises ValueError for an unknown name, and ImportError if its weights are missing."""
    return _find(name, ENCODERS, "encoder")(weights)


def _find(name: str, known: dict[str, tuple[str, str]], what: str) -> Any:
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown; use one of {', '.join(known)}")
    module, class_name = known[name]
    return getattr(import_module(module), class_name)

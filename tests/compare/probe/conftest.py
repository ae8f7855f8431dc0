from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tokenpacker.compare.probe import probe_plan
from tokenpacker.compare.probe.contract import NO_ANSWER, SIZE, Split, grid_centers
from tokenpacker.compare.probe.probe_plan import Probe

COLORS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))


class Squares:
    """Four squares in one of three colors each; the last question asks whether the first square is red."""

    name, num_classes = "squares", (3, 3, 3, 3, 2)
    places = np.concatenate([grid_centers(2, 2), [[np.nan, np.nan]]])
    sorts = {"color": 4, "red": 1}  # noqa: RUF012

    def __init__(self, digest: str = "squares") -> None:
        self.digest = digest

    def draw(self, split: Split, number: int) -> tuple[Image.Image, np.ndarray]:
        draw = random.Random(f"{split} {number}")
        image = Image.new("RGB", (SIZE, SIZE), (draw.randrange(256),) * 3)
        colors = [draw.randrange(3) for _ in range(4)]
        for place, color in enumerate(colors):
            row, col = divmod(place, 2)
            image.paste(COLORS[color], (col * 96 + 8, row * 96 + 8, col * 96 + 88, row * 96 + 88))
        return image, np.array([*colors, NO_ANSWER if number % 2 else int(colors[0] == 0)])


class Pixels:
    """Two levels of 5 x 5 patches: pixels as they are, and twice as bright."""

    name, patch_grid, num_levels, query_level = "pixels", (5, 5), 2, -1

    def __init__(self, digest: str = "pixels") -> None:
        self.digest, self.seen = digest, 0

    def levels(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        self.seen += len(pictures)
        pixels = torch.from_numpy(np.stack([np.asarray(picture.resize((40, 40))) for picture in pictures]))
        patches = F.unfold(pixels.permute(0, 3, 1, 2) / 255, 8, stride=8).transpose(1, 2)  # (P, 25, 192)
        return [patches, 2 * patches]


@pytest.fixture
def small_probe(monkeypatch) -> Callable[..., Probe]:
    """A quick probe of squares in seconds, at nine tokens: `small_probe(projectors=("mlp",), steps=(4,))`."""
    monkeypatch.setattr(probe_plan, "find_questions", lambda name, folder: Squares())
    monkeypatch.setattr(probe_plan, "find_encoder", lambda name, weights: Pixels())

    def make(**settings) -> Probe:
        return Probe(
            **{"projectors": ("average-pool",), "tokens": (9,), "steps": (4,), "seeds": (0,), "quick": True, **settings}
        )

    return make


@pytest.fixture
def dejavu() -> Path:
    """A font that comes with matplotlib."""
    mpl = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"

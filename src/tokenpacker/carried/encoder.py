"""Foundation, part one: a small ViT learns to name what each patch of a tile shows.

The classifiers are thrown away afterwards; the encoder is frozen from then on.

Shapes: N tiles, (h, w) patch grid, L = h*w, C vision width, K label heads.
"""

import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokenpacker.carried.local_attention import look_at_neighbours
from tokenpacker.scenes import easy_vqa, fine_print
from tokenpacker.scenes.dense_labels import NUM_CLASSES, UNKNOWN, label_tiles
from tokenpacker.scenes.scene import IMAGE_MEAN, IMAGE_STD, Scene, draw
from tokenpacker.tiling import TileGrid, choose_tile_grid, make_tiles

GROUPS_PER_STEP, TILES_PER_GROUP = 4, 5
READING_SHARE = 0.4  # of the steps, at first, show pages of text: twice as much to learn from per tile
NOTHING_WEIGHT = 0.03  # most labels are "none of these"; at full weight they would drown the others


class DenseClassifier(nn.Module):
    """A vision encoder with one linear classifier per label head on its patch tokens."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.encoder = CLIPVisionModel(config)
        self.heads = nn.Linear(config.hidden_size, sum(NUM_CLASSES.values()))
        look_at_neighbours(self.encoder)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, for labels (N, K, h, w)."""
        patch_tokens = self.encoder(pixel_values).last_hidden_state[:, 1:]  # (N, L, C), CLS dropped
        scores = self.heads(patch_tokens).split(list(NUM_CLASSES.values()), dim=-1)
        losses = []
        for score, target in zip(scores, labels.flatten(2).unbind(1), strict=True):  # (N, L, classes), (N, L)
            loss = F.cross_entropy(score.transpose(1, 2), target, ignore_index=UNKNOWN, reduction="none")  # (N, L)
            weight = (target > 0) + NOTHING_WEIGHT * (target == 0)
            losses.append((loss * weight).sum() / weight.sum())
        return {"loss": torch.stack(losses).sum()}


class LabelledTiles(Dataset[dict[str, Tensor]]):
    """Item `index` is the batch of a step, 20 tiles: pages of text, tiles of crowded pictures, easy-VQA look-alikes."""

    def __init__(self, num_steps: int, *, image_size: int, patch_size: int, seed: int) -> None:
        self.num_steps = num_steps
        self.tile_size = (image_size, image_size)
        self.patch_size = patch_size
        self.seed = seed

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        parts: list[tuple[Tensor, Tensor]] = []
        for group in range(index * GROUPS_PER_STEP, (index + 1) * GROUPS_PER_STEP):
            parts += self._draw(group)
        tiles, labels = zip(*parts, strict=True)
        return {"pixel_values": torch.cat(tiles), "labels": torch.cat(labels)}

    def _draw(self, group: int) -> list[tuple[Tensor, Tensor]]:
        """Tiles and labels of one crowded picture, and of as many small ones as are missing."""
        rng = random.Random(f"encoder/{self.seed}/{group}")
        num_pages = TILES_PER_GROUP - 1 if group < READING_SHARE * (self.num_steps * GROUPS_PER_STEP) else 1
        scenes = [(fine_print.make_page(rng, self.tile_size[0]), 1) for _ in range(num_pages)]
        scenes.append((fine_print.make_scene(rng, crowded=True), TILES_PER_GROUP - 1 - num_pages))
        parts = [self._cut(scene, rng, limit) for scene, limit in scenes if limit]
        missing = TILES_PER_GROUP - sum(len(tiles) for tiles, _ in parts)
        return parts + [self._cut(easy_vqa.make_scene(rng), rng, 1) for _ in range(missing)]

    def _cut(self, scene: Scene, rng: random.Random, limit: int) -> tuple[Tensor, Tensor]:
        size = (scene.height, scene.width)
        grid = TileGrid(1, 1) if size == self.tile_size else choose_tile_grid(size, self.tile_size)
        chosen = rng.sample(range(grid.num_tiles), min(limit, grid.num_tiles))
        tiles = make_tiles(normalise(draw(scene)), grid, self.tile_size)[chosen]
        return tiles, label_tiles(scene, grid, self.tile_size, self.patch_size)[chosen]


def normalise(image: Image.Image) -> Tensor:
    """(3, H, W), -1 to 1."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
    return (pixels.float() / 255 - IMAGE_MEAN) / IMAGE_STD

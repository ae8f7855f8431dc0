"""The test questions, and the vision features of their images, which are computed once for all runs.

Shapes: N tiles, (h, w) patch grid, L = h*w, M levels, C vision width.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from tokenpacker.evaluate import TASKS, Task
from tokenpacker.evaluate.evaluation import draw_questions
from tokenpacker.features import VisionFeatures
from tokenpacker.progress import Progress

ASKED = ("easy-vqa", "fine-print")  # tasks
HD, ONE_TILE = "hd", "one-tile"
LEVELS, DIGESTS = "levels.npy", "tiles.json"
CHUNK = 32  # tiles encoded at once
QUESTION_SEED = 0  # decides which questions a limit draws


@lru_cache(maxsize=1)
def drawn_tasks(limit: int | None) -> tuple[Task, ...]:
    """The tasks with their samples in memory, with the questions that a limit draws."""
    drawn = ((TASKS[name], draw_questions(TASKS[name].load(), limit, QUESTION_SEED)) for name in ASKED)
    return tuple(replace(task, load=partial(list, kept)) for task, kept in drawn)


def modes(processor: ProcessorMixin, task: Task) -> dict[str, int]:
    """The modes of a task, each with its limit of tiles; HD only if an image has several tiles."""
    limit = processor.image_processor.max_tiles
    sizes = {(sample.image.height, sample.image.width) for sample in task.load()}
    is_cut = any(processor.image_layout(size).tile_grid.num_tiles > 1 for size in sizes)
    return {ONE_TILE: 1, HD: limit} if is_cut else {ONE_TILE: 1}


class EncodedTiles:
    """Vision features of tiles, found by the tiles' pixels; in a mapped file, so that processes share the memory.

    Args:
        folder: written by `encode_test_tiles`.
    """

    def __init__(self, folder: Path):
        self.levels = np.load(folder / LEVELS, mmap_mode="r")  # (N, L, M*C)
        digests: list[str] = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))["tiles"]
        self.places = {digest: place for place, digest in enumerate(digests)}

    def features(self, model: Any, pixel_values: Tensor) -> VisionFeatures:
        """The result of `model.vision_features` for tiles (N, 3, h, w); computed if one of them is unknown."""
        places = [self.places.get(_digest(tile)) for tile in pixel_values]
        if None in places:
            return type(model).vision_features(model, pixel_values)
        levels = torch.from_numpy(self.levels[places]).to(pixel_values.device)  # (N, L, M*C)
        config = model.config
        start = config.vision_levels.index(config.vision_query_level) * config.vision_config.hidden_size
        query = levels[..., start : start + config.vision_config.hidden_size].contiguous()
        return VisionFeatures(query, levels, config.patch_grid)

    def serve(self, model: PreTrainedModel) -> None:
        """Makes the model take its features from here from now on."""
        model.model.vision_features = lambda pixel_values: self.features(model.model, pixel_values)


def encode_test_tiles(
    folder: Path, model: PreTrainedModel, processor: ProcessorMixin, limit: int | None, encoder: str
) -> EncodedTiles:
    """The features of all tiles of the test images in every mode, from `folder`, or computed and written there.

    Args:
        limit: of questions; images without a question are left out.
        encoder: digest of its weights. Features of another encoder are computed anew.
    """
    made_for = {"encoder": encoder, "limit": limit}
    if (folder / DIGESTS).is_file():
        found = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        if {key: found[key] for key in made_for} == made_for:
            return EncodedTiles(folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tiles = _test_tiles(processor, limit)
    rows, cols = model.config.patch_grid
    width = len(model.config.vision_levels) * model.config.vision_config.hidden_size
    levels = np.lib.format.open_memmap(folder / LEVELS, "w+", np.float32, (len(tiles), rows * cols, width))
    pixels = list(tiles.values())
    with torch.inference_mode(), Progress("encoding test tiles", len(tiles)) as shown:
        for start in range(0, len(tiles), CHUNK):
            chunk = torch.stack(pixels[start : start + CHUNK])
            levels[start : start + CHUNK] = model.model.vision_features(chunk).levels.numpy()
            shown.update(min(start + CHUNK, len(tiles)))
    levels.flush()
    (folder / DIGESTS).write_text(json.dumps({**made_for, "tiles": list(tiles)}) + "\n", encoding="utf-8")
    return EncodedTiles(folder)


def _test_tiles(processor: ProcessorMixin, limit: int | None) -> dict[str, Tensor]:
    """All distinct tiles (3, h, w) by digest."""
    own = processor.image_processor.max_tiles
    tiles: dict[str, Tensor] = {}
    for task in drawn_tasks(limit):
        for max_tiles in modes(processor, task).values():
            processor.image_processor.max_tiles = max_tiles
            for sample in task.load():
                for tile in processor.image_processor([sample.image], return_tensors="pt")["pixel_values"]:
                    tiles.setdefault(_digest(tile), tile)
            processor.image_processor.max_tiles = own
    return tiles


def _digest(tile: Tensor) -> str:
    return hashlib.sha1(tile.contiguous().numpy().tobytes()).hexdigest()

"""A model whose answers differ, and files of own questions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def talkative_model(tiny_model):
    """The tiny model with larger weights, so that its answers differ between images and questions."""
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "vision_tower" not in name:
                weight.mul_(8)
    return model


@pytest.fixture
def own_file(tmp_path, image_of) -> Callable[..., Path]:
    """Writes own questions, beside `one.png` of one tile, `three.png` and `seven.png`: `own_file({...}, ...)`."""
    for name, size in (("one", (32, 32)), ("three", (32, 64)), ("seven", (64, 96))):
        image_of(*size, seed=size[1]).save(tmp_path / f"{name}.png")

    def write(*rows: dict | str, name: str = "mine.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return write

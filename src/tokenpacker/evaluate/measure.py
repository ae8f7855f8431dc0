"""Measures a model folder on all tasks at all scale factors: the numbers of a model card."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from tokenpacker.evaluate.evaluation import evaluate, takes_regions
from tokenpacker.evaluate.tasks import TASKS
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.projectors import ProjectorConfig

SCALE_FACTORS = (2, 3, 4)


def measure_model(folder: Path, *, limit: int | None = None, progress: bool = True) -> list[dict[str, Any]]:
    """One JSON-ready row per scale factor and task. A projector without scale factors is measured once.

    Tasks about masks are left out for a model that takes none.

    Args:
        folder: a model with its processor.
        limit: number of questions of each task, drawn at random; None asks all.
    """
    model = TokenPackerForConditionalGeneration.from_pretrained(folder).eval()
    processor = TokenPackerProcessor.from_pretrained(folder)
    tasks = [name for name, task in TASKS.items() if takes_regions(model) or not task.regions]
    rows = []
    for scale_factor in _honoured(model.config.projector, model.config.patch_grid):
        for task in tasks:
            result = evaluate(model, processor, task, scale_factor=scale_factor, limit=limit, progress=progress)
            rows.append(
                {
                    "projector": model.config.projector.name,
                    "task": task,
                    "scale_factor": scale_factor,
                    "tokens_per_tile": processor.image_layout((1, 1), scale_factor=scale_factor).tokens_per_tile,
                    "interval_95": [round(100 * bound, 2) for bound in result.score.interval],
                    **result.to_row(),
                }
            )
    return rows


def _honoured(projector: ProjectorConfig, patch_grid: tuple[int, int]) -> list[int | None]:
    """The scale factors that fit the projector, or None alone."""
    honoured: list[int | None] = []
    for scale_factor in SCALE_FACTORS:
        with contextlib.suppress(ValueError):
            projector.token_grid(patch_grid, scale_factor)
            honoured.append(scale_factor)
    return honoured or [None]

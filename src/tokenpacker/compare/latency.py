"""Measures the time to the first token of all projectors side by side, after all training.

Times depend on sizes and not on weights, so the models are fresh ones of the runs' sizes: all projectors share one
vision tower and one language model and take turns in every round.
"""

from __future__ import annotations

from typing import Any

import torch

from tokenpacker.compare.results import SPEED, Row, digest_of
from tokenpacker.compare.runs import Comparison, Run, make_row
from tokenpacker.compare.tiles import HD, ONE_TILE
from tokenpacker.speed.machine import best_device
from tokenpacker.speed.memory import random_model, require_memory
from tokenpacker.speed.model_sizes import LLAMA_UNKNOWN_ID, Candidate, Shapes
from tokenpacker.speed.speed_report import Protocol
from tokenpacker.speed.speed_run import measure_rows
from tokenpacker.train.assemble import model_config

ROUNDS, QUICK_ROUNDS = 30, 5
TEXT_TOKENS = 16  # a question of the test sets with its chat template
HD_SIDE = 3  # tiles per side of the large image, the recipes' limit
PARTS = ("vision", "projector", "prefill")


def speed_fingerprint(comparison: Comparison) -> str:
    """Digest of all settings of the measurement."""
    asked = [[run.projector, run.scale_factor] for run in comparison.runs_of_one_seed()]
    return digest_of([SPEED, comparison.protocol, asked, _rounds(comparison), TEXT_TOKENS, HD_SIDE])


def measure_speed(comparison: Comparison, *, command: str = "") -> Row:
    """The row of times and multiplications of every projector and scale factor, for one tile and for a large image.

    Raises ValueError where the sizes do not fit into memory.
    """
    device = best_device()
    runs, rounds = comparison.runs_of_one_seed(), _rounds(comparison)
    align, instruct = comparison.stages(runs[0])
    config = model_config(align.model)
    config.image_token_id = LLAMA_UNKNOWN_ID  # no tokenizer is read
    is_cut = (instruct.model.image_mode or align.model.image_mode) == "slice"
    shapes = Shapes(name="+".join(comparison.recipe), config=config, sliced=is_cut, max_tiles=HD_SIDE**2)
    asked = [Candidate(config=comparison.projector(run)) for run in runs]
    height, width = config.tile_size
    sizes = {ONE_TILE: (height, width)} | ({HD: (HD_SIDE * height, HD_SIDE * width)} if is_cut else {})
    model, rows = None, []
    for mode, size in sizes.items():
        protocol = Protocol(image_size=size, batch_sizes=(1,), text_tokens=TEXT_TOKENS, output_tokens=1, rounds=rounds)
        require_memory(shapes, asked, protocol, align.precision, device)
        model = model or random_model(config, getattr(torch, align.precision), device)
        measured = measure_rows(model, shapes, asked, protocol)
        rows += [_row(run, mode, size, row) for run, row in zip(runs, measured, strict=True)]
    content = {"rounds": rounds, "text_tokens": TEXT_TOKENS, "rows": rows}
    return make_row(SPEED, comparison, speed_fingerprint(comparison), command, content)


def _row(run: Run, mode: str, size: tuple[int, int], row: dict[str, Any]) -> dict[str, Any]:
    return {
        "projector": run.projector,
        "scale_factor": run.scale_factor,
        "mode": mode,
        "image_size": list(size),
        "tiles": row["counted"]["tiles"],
        "image_tokens": row["counted"]["image_tokens"],
        "milliseconds": {part: row["milliseconds"][part] for part in (*PARTS, "first_token")},
        "multiplications": {part: row["flops"][part] // 2 for part in PARTS},  # half of the operations
    }


def _rounds(comparison: Comparison) -> int:
    return QUICK_ROUNDS if comparison.quick else ROUNDS

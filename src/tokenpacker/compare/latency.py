"""How long the first token takes with each projector: measured side by side, after all training and never within it.

Times depend on sizes and not on what weights say, so the models are fresh ones of the runs' sizes: all projectors share
one vision tower and one language model, take turns in every round, and need no trained model to be at hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch

from tokenpacker.compare.results import SPEED, Row
from tokenpacker.compare.runs import Comparison, Run
from tokenpacker.compare.tiles import HD, ONE_TILE
from tokenpacker.speed.machine import describe_machine
from tokenpacker.speed.memory import random_model, require_memory
from tokenpacker.speed.model_sizes import LLAMA_UNKNOWN_ID, Candidate, Shapes
from tokenpacker.speed.speed_rows import Protocol, SpeedRow
from tokenpacker.speed.speed_run import measure_rows
from tokenpacker.train.assemble import model_config

ROUNDS, QUICK_ROUNDS = 30, 5
TEXT_TOKENS = 16  # a question of the test sets, with what stands around it
HD_SIDE = 3  # tiles to each side of the large image, as many as the recipes cut at most

OnProgress = Callable[[int, int, str], None]


def speed_fingerprint(comparison: Comparison) -> str:
    """Digest of what is measured: measurements of other projectors, sizes or rounds are others."""
    asked = [[run.projector, run.scale_factor] for run in _pairs(comparison)]
    content = json.dumps([SPEED, comparison.protocol, asked, _rounds(comparison), TEXT_TOKENS, HD_SIDE])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def measure_speed(comparison: Comparison, *, command: str = "", on_progress: OnProgress | None = None) -> Row:
    """The row of times and multiplications of every projector and scale factor, for one tile and for a large image.

    Raises: ValueError where the sizes do not fit into memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    align, instruct = comparison.stages(comparison.runs()[0])
    config, pairs = model_config(align.model), _pairs(comparison)
    config.image_token_id = LLAMA_UNKNOWN_ID  # any id of the vocabulary would do: no tokenizer is read
    is_cut = (instruct.model.image_mode or align.model.image_mode) == "slice"
    shapes = Shapes(name="+".join(comparison.recipe), config=config, sliced=is_cut, max_tiles=HD_SIDE**2)
    asked = [Candidate(config=comparison.projector(run)) for run in pairs]
    (height, width), rounds = config.tile_size, _rounds(comparison)
    sizes = {ONE_TILE: (height, width), HD: (HD_SIDE * height, HD_SIDE * width)}
    model, rows = None, []
    for mode, size in sizes.items() if is_cut else [(ONE_TILE, sizes[ONE_TILE])]:
        protocol = Protocol(image_size=size, batch_sizes=(1,), text_tokens=TEXT_TOKENS, output_tokens=1, rounds=rounds)
        require_memory(shapes, asked, protocol, align.precision, device)
        model = model or random_model(config, getattr(torch, align.precision), device)
        measured = measure_rows(model, shapes, asked, protocol, on_progress)
        rows += [_row(run, mode, size, row) for run, row in zip(pairs, measured, strict=True)]
    return {
        "kind": SPEED,
        "protocol": comparison.protocol,
        "fingerprint": speed_fingerprint(comparison),
        "quick": comparison.quick,
        "rounds": rounds,
        "text_tokens": TEXT_TOKENS,
        "rows": rows,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": describe_machine(device),
    }


def _row(run: Run, mode: str, size: tuple[int, int], row: SpeedRow) -> dict[str, Any]:
    spreads = {"vision": row.vision, "projector": row.projector, "prefill": row.prefill, "first_token": row.first_token}
    flops = {"vision": row.flops.vision, "projector": row.flops.projector, "prefill": row.flops.prefill}
    return {
        "projector": run.projector,
        "scale_factor": run.scale_factor,
        "mode": mode,
        "image_size": list(size),
        "tiles": row.counted.tiles,
        "image_tokens": row.counted.image_tokens,
        "milliseconds": {
            name: {"median": round(spread.median, 4), "p95": round(spread.p95, 4)} for name, spread in spreads.items()
        },
        "multiplications": {name: value // 2 for name, value in flops.items()},  # of two operations, one multiplies
    }


def _pairs(comparison: Comparison) -> list[Run]:
    """One run for each projector and scale factor: those of the first seed."""
    return [run for run in comparison.runs() if run.seed == comparison.seeds[0]]


def _rounds(comparison: Comparison) -> int:
    return QUICK_ROUNDS if comparison.quick else ROUNDS

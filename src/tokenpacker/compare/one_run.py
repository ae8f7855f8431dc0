"""One run: both stages of training, all test questions, and the row for the results file."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from tokenpacker.compare.results import RUN, Row
from tokenpacker.compare.runs import STAGES, Comparison, Run, make_row
from tokenpacker.compare.tiles import HD, ONE_TILE, EncodedTiles, drawn_tasks, modes
from tokenpacker.evaluate import evaluate
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.projectors import build
from tokenpacker.train.run import train
from tokenpacker.train.run_folder import CHECKPOINTS, DATA, HISTORY

RUNS, TILES = "runs", "tiles"  # folders of a comparison
LAST_SHARE = 0.1  # of the logged losses, whose mean is the last loss


def run_one(comparison: Comparison, run: Run, output: Path, *, command: str = "") -> Row | None:
    """The finished run's row; None where a signal stopped its training, which the next call resumes.

    Models stay in `output/runs`, checkpoints are deleted.

    Args:
        command: the command line for the row.
    """
    folder = output / RUNS / comparison.fingerprint(run)
    steps, losses, data, seconds = {}, {}, {}, {}
    start: str | None = None
    for stage, config in zip(STAGES, comparison.stages(run), strict=True):
        if start is not None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, start=start))
        model_folder = train(config, folder / stage)
        if model_folder is None:
            return None
        start = str(model_folder)
        history = json.loads((folder / stage / HISTORY).read_text(encoding="utf-8"))
        steps[stage] = config.max_steps or history["steps"][-1]["step"]
        losses[stage] = _last_loss([entry["loss"] for entry in history["steps"]])
        data[stage] = json.loads((folder / stage / DATA).read_text(encoding="utf-8"))["sha256"]
        seconds[stage] = history["seconds"]  # over interruptions
    assert start is not None, "there are stages"
    began = time.perf_counter()
    scores = _scores(comparison, Path(start), output / TILES) if comparison.is_tested else {}
    seconds["test"] = time.perf_counter() - began
    seconds["all"] = sum(seconds.values())
    projector = comparison.projector(run)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in build(projector).parameters())
    for stage in STAGES:
        shutil.rmtree(folder / stage / CHECKPOINTS, ignore_errors=True)
    content = {
        **dataclasses.asdict(run),
        "recipe": list(comparison.recipe),
        "foundation": comparison.foundation,
        "limit": comparison.limit,
        "settings": projector.to_dict(),
        "tokens_per_tile": projector.num_tokens(comparison.patch_grid),
        "parameters": parameters,
        "steps": steps,
        "losses": losses,
        "data": data,
        "scores": scores,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    return make_row(RUN, comparison, comparison.fingerprint(run), command, content)


def _scores(comparison: Comparison, model_folder: Path, tiles_folder: Path) -> dict[str, Any]:
    """Scores by task and mode. A task whose images are all one tile has the same score in both modes."""
    model = TokenPackerForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = TokenPackerProcessor.from_pretrained(model_folder)
    if torch.cuda.is_available():
        model = model.cuda()
    elif tiles_folder.is_dir():
        EncodedTiles(tiles_folder).serve(model)
    own_limit = processor.image_processor.max_tiles
    scores: dict[str, Any] = {}
    for task in drawn_tasks(comparison.limit):
        by_mode = {}
        for mode, max_tiles in modes(processor, task).items():
            processor.image_processor.max_tiles = max_tiles
            by_mode[mode] = evaluate(model, processor, task).to_row()
            processor.image_processor.max_tiles = own_limit
        scores[task.name] = {HD: by_mode[ONE_TILE], **by_mode}
    return scores


def _last_loss(losses: list[float]) -> float:
    last = losses[-max(1, round(LAST_SHARE * len(losses))) :]
    return round(sum(last) / len(last), 4)

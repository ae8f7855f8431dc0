"""One run: both stages of training, then all test questions, and what came of it as a row for the results file."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tokenpacker.compare.results import RUN, Row
from tokenpacker.compare.runs import STAGES, Comparison, Run
from tokenpacker.compare.tiles import HD, ONE_TILE, EncodedTiles, drawn_tasks, modes
from tokenpacker.evaluate import TaskResult, evaluate
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.projectors import ProjectorConfig, build
from tokenpacker.speed.machine import describe_machine
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.run import train
from tokenpacker.train.run_folder import CHECKPOINTS, DATA, HISTORY

RUNS, TILES = "runs", "tiles"  # folders of a comparison
LAST_SHARE = 0.1  # of the logged losses, whose mean is the last loss


def run_one(comparison: Comparison, run: Run, output: Path, *, command: str = "") -> Row | None:
    """The finished run's row; None where a signal ended its training, which the next call goes on with.

    Models stay in `output/runs`, checkpoints go.

    Args:
        command: that is written into the row.
    """
    folder = output / RUNS / comparison.fingerprint(run)
    seconds: dict[str, float] = {}
    configs = comparison.stages(run)
    model_folder: Path | None = None
    for stage, config in zip(STAGES, configs, strict=True):
        if model_folder is not None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, start=str(model_folder)))
        model_folder = train(config, folder / stage)
        if model_folder is None:
            return None
        seconds[stage] = json.loads((folder / stage / HISTORY).read_text(encoding="utf-8"))["seconds"]
    assert model_folder is not None, "there are stages"
    began = time.perf_counter()
    scores = _scores(comparison, model_folder, output / TILES) if comparison.is_tested else {}
    seconds["test"] = time.perf_counter() - began
    seconds["all"] = sum(seconds.values())  # over interruptions
    row = _row(comparison, run, configs, folder)
    for stage in STAGES:
        shutil.rmtree(folder / stage / CHECKPOINTS, ignore_errors=True)
    return row | {
        "scores": scores,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def _row(comparison: Comparison, run: Run, configs: tuple[TrainingConfig, ...], folder: Path) -> Row:
    """What a row has beside scores and times."""
    projector = comparison.projector(run)
    losses, data, steps = {}, {}, {}
    for stage, config in zip(STAGES, configs, strict=True):
        history = json.loads((folder / stage / HISTORY).read_text(encoding="utf-8"))["steps"]
        losses[stage] = _last_loss([entry["loss"] for entry in history])
        steps[stage] = config.max_steps or history[-1]["step"]
        data[stage] = json.loads((folder / stage / DATA).read_text(encoding="utf-8"))["sha256"]
    return {
        "kind": RUN,
        **dataclasses.asdict(run),
        "protocol": comparison.protocol,
        "fingerprint": comparison.fingerprint(run),
        "quick": comparison.quick,
        "recipe": [config.name for config in configs],
        "foundation": comparison.foundation,
        "limit": comparison.limit,
        "settings": projector.to_dict(),
        "tokens_per_tile": projector.num_tokens(comparison.patch_grid),
        "parameters": _count_parameters(projector),
        "steps": steps,
        "losses": losses,
        "data": data,
    }


def _scores(comparison: Comparison, model_folder: Path, tiles_folder: Path) -> dict[str, Any]:
    """By task and mode: right answers, questions, tokens an image. Images of one tile are the same in both modes."""
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
            by_mode[mode] = _score(evaluate(model, processor, task))
            processor.image_processor.max_tiles = own_limit
        scores[task.name] = {HD: by_mode[ONE_TILE], **by_mode}
    return scores


def _count_parameters(config: ProjectorConfig) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in build(config).parameters())


def _score(result: TaskResult) -> dict[str, Any]:
    return {
        "correct": result.score.num_correct,
        "questions": result.score.num_questions,
        "image_tokens": round(result.image_tokens, 1),
        "seconds": round(result.seconds, 1),
        "kinds": {kind: [score.num_correct, score.num_questions] for kind, score in result.kinds.items()},
    }


def _last_loss(losses: list[float]) -> float:
    last = losses[-max(1, round(LAST_SHARE * len(losses))) :]
    return round(sum(last) / len(last), 4)

"""Makes the carried models: `train tiny` from nothing, and `train tiny-regions` from that model.

Both can be called again after an interruption, and continue phase by phase and step by step.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import tokenpacker
from tokenpacker.carried.card import RECORD, write_card
from tokenpacker.carried.encoder import IMAGE_MEAN, IMAGE_STD
from tokenpacker.carried.foundation import ENCODER, LANGUAGE, make_encoder, make_language_model, train_encoder
from tokenpacker.carried.recipes import TOKEN_PACKER, region_instruct_tiny, region_tiny, tiny
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.known_models import carried_model_path
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.run import train
from tokenpacker.train.run_folder import HISTORY

STATE_FOLDER = "state"
MAX_CURVE_POINTS = 60


def train_tiny(
    output_dir: Path | str,
    *,
    projector: str = TOKEN_PACKER,
    seed: int = 0,
    steps_fraction: float = 1.0,
    foundation_dir: Path | str | None = None,
) -> Path | None:
    """Trains the tiny model into `output_dir` and returns that folder; None if a signal stopped it.

    Called again after an interruption, it continues where it stopped. Finished phases are not repeated.

    Args:
        projector: `token-packer`, or `mlp` for the comparison with all tokens.
        seed: decides initial weights and all data.
        steps_fraction: share of each phase's steps, for tests.
        foundation_dir: folder of encoder and language model, which are made if they are not there. Two models that
            share it differ in their projector alone. None takes a folder in `output_dir`.

    Raises:
        ValueError: for a projector without a recipe, or a fraction outside of 0 to 1.
        ModuleNotFoundError: without `accelerate`, which the Trainer needs.
    """
    _check(steps_fraction)
    recipe, output_dir = tiny(projector, seed=seed), Path(output_dir)
    phases = {
        name: _shortened(getattr(recipe, name), steps_fraction) for name in ("encoder", "language", "align", "instruct")
    }
    recipe = replace(recipe, **phases)
    state_dir = output_dir / STATE_FOLDER
    foundation = state_dir if foundation_dir is None else Path(foundation_dir)
    folders = {"encoder": foundation / ENCODER, "language": foundation / LANGUAGE}
    folders |= {stage: state_dir / stage for stage in ("align", "instruct")}
    encoder = make_encoder(folders["encoder"], partial(train_encoder, recipe, folders["encoder"]))
    language_model = encoder and make_language_model(folders["language"], recipe)
    parts = {"vision_tower": str(encoder), "language_model": str(language_model)}
    aligned = language_model and train(_with_models(recipe.align, parts), folders["align"])
    final = aligned and train(_with_models(recipe.instruct, {"start": str(aligned)}), folders["instruct"])
    if final is None:
        return None
    config, tokenizer = _write_weights(final, output_dir), AutoTokenizer.from_pretrained(final)
    pixels: dict[str, Any] = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
    processor = TokenPackerProcessor.from_config(config, tokenizer, image_mode="slice", max_tiles=9, **pixels)
    processor.save_pretrained(output_dir)
    _write_record({"recipe": asdict(recipe)}, {name: _history(path) for name, path in folders.items()}, output_dir)
    return output_dir


def train_tiny_regions(
    output_dir: Path | str, *, start: Path | str | None = None, seed: int = 0, steps_fraction: float = 1.0
) -> Path | None:
    """Trains a tiny model that takes regions into `output_dir` and returns that folder; None if a signal stopped it.

    Called again after an interruption, it continues where it stopped.

    Args:
        start: folder of a model that `train_tiny` made. None takes the carried one.
        seed: decides the region encoder's first weights and all data.
        steps_fraction: share of both stages' steps, for tests.

    Raises:
        ValueError: for a fraction outside of 0 to 1, and for a start that `train_tiny` did not make.
        ModuleNotFoundError: without `accelerate`, which the Trainer needs.
    """
    _check(steps_fraction)
    start, output_dir = carried_model_path() if start is None else Path(start), Path(output_dir)
    if not (start / RECORD).is_file():
        raise ValueError(f"start={start} holds no {RECORD}; give a folder that `tokenpacker train tiny` wrote")
    before = json.loads((start / RECORD).read_text())
    stages = [
        _shortened(config, steps_fraction) for config in (region_tiny(seed=seed), region_instruct_tiny(seed=seed))
    ]
    folders = {config.name: output_dir / STATE_FOLDER / config.name for config in stages}
    model: Path | None = start
    for config in stages:
        model = model and train(_with_models(config, {"start": str(model)}), folders[config.name])
    if model is None:
        return None
    _write_weights(model, output_dir)
    TokenPackerProcessor.from_pretrained(model).save_pretrained(output_dir)
    phases = before["phases"] | {name: _history(path) for name, path in folders.items()}
    decided = {"recipe": before["recipe"], "regions": {config.name: config.to_dict() for config in stages}}
    _write_record(decided, phases, output_dir)
    return output_dir


def _check(steps_fraction: float) -> None:
    if find_spec("accelerate") is None:
        raise ModuleNotFoundError("training needs accelerate, which is not installed; pip install 'tokenpacker[train]'")
    if not 0 < steps_fraction <= 1:
        raise ValueError(f"steps_fraction={steps_fraction} must lie above 0 and be at most 1")


def _shortened(config: Any, fraction: float) -> Any:
    return replace(config, max_steps=max(1, round(config.max_steps * fraction)))


def _with_models(config: TrainingConfig, models: dict[str, Any]) -> TrainingConfig:
    return replace(config, model=replace(config.model, **models))


def _write_weights(trained: Path, output_dir: Path) -> TokenPackerConfig:
    """Writes the model of a finished run with weights rounded to float16, and returns its config."""
    model = TokenPackerForConditionalGeneration.from_pretrained(trained)
    config = model.config
    for part in (config, config.vision_config, config.text_config):
        part.dtype, part._name_or_path = torch.float32, ""  # loaded as float32 again, wherever it was trained
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(output_dir, state_dict=half)
    return config


def _history(folder: Path) -> dict[str, Any]:
    """Steps, seconds and a thinned-out loss curve of a phase."""
    history = json.loads((folder / HISTORY).read_text())
    if isinstance(history["steps"], list):  # version 0.1.0 wrote the next line's form for a foundation
        curve = [[entry["step"], round(entry["loss"], 4)] for entry in history["steps"]]
        history = {"steps": curve[-1][0], "seconds": history["seconds"], "loss": curve}
    stride = -(-len(history["loss"]) // MAX_CURVE_POINTS) or 1
    return history | {"loss": history["loss"][::stride]}


def _write_record(decided: dict[str, Any], phases: dict[str, Any], output_dir: Path) -> None:
    """Writes `training.json` and the card: everything that was decided and measured. Evaluation adds accuracies."""
    record: dict[str, Any] = {
        **decided,
        "phases": phases,
        "minutes": round(sum(history["seconds"] for history in phases.values()) / 60, 1),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "versions": {
            "tokenpacker": tokenpacker.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "notes": [],  # what a reader must know beside the command, such as an interruption
        "accuracies": [],
    }
    (output_dir / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    write_card(output_dir, record)

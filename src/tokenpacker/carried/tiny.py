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

import tokenpacker
from tokenpacker.carried.card import RECORD, write_card
from tokenpacker.carried.foundation import ENCODER, LANGUAGE, make_encoder, make_language_model, train_encoder
from tokenpacker.carried.recipes import TOKEN_PACKER, region_instruct_tiny, region_tiny, tiny
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.hub import carried_model_path
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.run import train
from tokenpacker.train.run_folder import HISTORY

STATE_FOLDER = "state"
FOUNDATION, STAGES = (ENCODER, LANGUAGE), ("align", "instruct")  # names in the recipe, and of folders
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
    recipe = replace(
        recipe, **{name: _shortened(getattr(recipe, name), steps_fraction) for name in (*FOUNDATION, *STAGES)}
    )
    state_dir = output_dir / STATE_FOLDER
    foundation = state_dir if foundation_dir is None else Path(foundation_dir)
    encoder = make_encoder(foundation / ENCODER, partial(train_encoder, recipe, foundation / ENCODER))
    language_model = encoder and make_language_model(foundation / LANGUAGE, recipe)
    if language_model is None:
        return None
    models = {"vision_tower": str(encoder), "language_model": str(language_model)}
    trained = _train_stages({name: getattr(recipe, name) for name in STAGES}, models, state_dir)
    if trained is None:
        return None
    phases = {name: _history(foundation / name) for name in FOUNDATION}
    phases |= {name: _history(state_dir / name) for name in STAGES}
    return _publish(trained, {"recipe": asdict(recipe)}, phases, output_dir)


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
    configs = (region_tiny(seed=seed), region_instruct_tiny(seed=seed))
    stages = {config.name: _shortened(config, steps_fraction) for config in configs}
    trained = _train_stages(stages, {"start": str(start)}, output_dir / STATE_FOLDER)
    if trained is None:
        return None
    decided = {"recipe": before["recipe"], "regions": {name: config.to_dict() for name, config in stages.items()}}
    phases = before["phases"] | {name: _history(output_dir / STATE_FOLDER / name) for name in stages}
    return _publish(trained, decided, phases, output_dir)


def _check(steps_fraction: float) -> None:
    if find_spec("accelerate") is None:
        raise ModuleNotFoundError("training needs accelerate, which is not installed; pip install 'tokenpacker[train]'")
    if not 0 < steps_fraction <= 1:
        raise ValueError(f"steps_fraction={steps_fraction} must lie above 0 and be at most 1")


def _shortened(config: Any, fraction: float) -> Any:
    return replace(config, max_steps=max(1, round(config.max_steps * fraction)))


def _train_stages(stages: dict[str, TrainingConfig], models: dict[str, Any], state_dir: Path) -> Path | None:
    """Trains stage by stage, each from the model before, and returns the last; None if a signal stopped one.

    Args:
        models: what the first stage begins with, as fields of its `ModelConfig`.
    """
    trained: Path | None = None
    for name, config in stages.items():
        trained = train(replace(config, model=replace(config.model, **models)), state_dir / name)
        if trained is None:
            return None
        models = {"start": str(trained)}
    return trained


def _history(folder: Path) -> dict[str, Any]:
    """Steps, seconds and a thinned-out loss curve of a phase."""
    history = json.loads((folder / HISTORY).read_text())
    if isinstance(history["steps"], list):  # version 0.1.0 wrote the next line's form for a foundation
        curve = [[entry["step"], round(entry["loss"], 4)] for entry in history["steps"]]
        history = {"steps": curve[-1][0], "seconds": history["seconds"], "loss": curve}
    stride = -(-len(history["loss"]) // MAX_CURVE_POINTS) or 1
    return history | {"loss": history["loss"][::stride]}


def _publish(trained: Path, decided: dict[str, Any], phases: dict[str, Any], output_dir: Path) -> Path:
    """Writes the model with weights rounded to float16, the record of what was decided and measured, and the card."""
    model = TokenPackerForConditionalGeneration.from_pretrained(trained)
    for part in (model.config, model.config.vision_config, model.config.text_config):
        part.dtype, part._name_or_path = torch.float32, ""  # loads as float32 again; the run's paths go
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(output_dir, state_dict=half)
    TokenPackerProcessor.from_pretrained(trained).save_pretrained(output_dir)
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
    return output_dir

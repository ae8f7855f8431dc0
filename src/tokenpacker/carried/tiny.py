"""`tokenpacker train tiny`: the carried model from nothing, resumable phase by phase and step by step.

And `tokenpacker train tiny-regions`: from that model one that takes regions.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import tokenpacker
from tokenpacker.carried import stages
from tokenpacker.carried.card import RECORD, write_card
from tokenpacker.carried.encoder import IMAGE_MEAN, IMAGE_STD
from tokenpacker.carried.foundation import ENCODER, LANGUAGE, make_encoder, make_language_model
from tokenpacker.carried.tiny_regions import region_instruct_tiny, region_tiny
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.known_models import carried_model_path
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.config_reading import merged
from tokenpacker.train.loop import HISTORY
from tokenpacker.train.recipes import TOKEN_PACKER, TinyRecipe, tiny
from tokenpacker.train.run import train

STATE_FOLDER = "state"
PHASES = ("encoder", "language", "align", "instruct")
MAX_CURVE_POINTS = 60


def train_tiny(
    output_dir: Path | str,
    *,
    projector: str = TOKEN_PACKER,
    seed: int = 0,
    steps_fraction: float = 1.0,
    foundation_dir: Path | str | None = None,
) -> Path | None:
    """Trains the tiny model into `output_dir` and returns that folder; None where a signal ended it before.

    Run again after an interruption, it goes on where it stopped; finished phases are not repeated.

    Args:
        projector: `token-packer`, or `mlp` for the comparison with all tokens.
        seed: decides initial weights and all data.
        steps_fraction: share of every phase's steps, for tests.
        foundation_dir: where encoder and language model are made, or lie finished from an earlier run; two models
            that share it differ in nothing but the projector. None puts it below `output_dir`.

    Raises:
        ValueError: for a projector without a recipe, or a fraction outside 0 to 1.
        ModuleNotFoundError: without `accelerate`, which transformers' Trainer runs on; the message names the remedy.
    """
    _check_start(steps_fraction)
    recipe = _shortened(tiny(projector, seed=seed), steps_fraction)
    output_dir = Path(output_dir)
    state_dir = output_dir / STATE_FOLDER
    foundation = state_dir if foundation_dir is None else Path(foundation_dir)
    encoder_dir, language_dir = foundation / ENCODER, foundation / LANGUAGE
    encoder = make_encoder(encoder_dir, partial(stages.train_encoder, recipe, encoder_dir))
    language_model = make_language_model(language_dir, recipe)
    parts = {"vision_tower": str(encoder), "language_model": str(language_model)}
    aligned = train(_from(recipe.align, parts), state_dir / "align")
    final = aligned and train(_from(recipe.instruct, {"start": str(aligned)}), state_dir / "instruct")
    if final is None:
        return None
    config, tokenizer = _write_weights(final, output_dir), AutoTokenizer.from_pretrained(final)
    pixels: dict[str, Any] = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
    processor = TokenPackerProcessor.from_config(config, tokenizer, image_mode="slice", max_tiles=9, **pixels)
    processor.save_pretrained(output_dir)
    folders = [encoder_dir, language_dir, state_dir / "align", state_dir / "instruct"]
    phases = {phase: _history(folder) for phase, folder in zip(PHASES, folders, strict=True)}
    _write_record({"recipe": asdict(recipe)}, phases, output_dir)
    return output_dir


def train_tiny_regions(
    output_dir: Path | str, *, start: Path | str | None = None, seed: int = 0, steps_fraction: float = 1.0
) -> Path | None:
    """Trains a tiny model that takes regions into `output_dir` and returns that folder; None where a signal ended it.

    Run again after an interruption, it goes on where it stopped.

    Args:
        start: folder of a model that `train_tiny` made; None takes the one that the package carries.
        seed: decides the region module's first weights and all data.
        steps_fraction: share of both stages' steps, for tests.

    Raises:
        ValueError: for a fraction outside 0 to 1, and a start that `train_tiny` did not make.
        ModuleNotFoundError: as `train_tiny`.
    """
    _check_start(steps_fraction)
    start, output_dir = carried_model_path() if start is None else Path(start), Path(output_dir)
    if not (start / RECORD).is_file():
        raise ValueError(f"start={start} holds no {RECORD}; give a folder that `tokenpacker train tiny` wrote")
    before = json.loads((start / RECORD).read_text())
    stages = {
        config.name: replace(config, max_steps=max(1, round((config.max_steps or 1) * steps_fraction)))
        for config in (region_tiny(seed=seed), region_instruct_tiny(seed=seed))
    }
    folder: Path | None = start
    for name, config in stages.items():
        folder = folder and train(_from(config, {"start": str(folder)}), output_dir / STATE_FOLDER / name)
    if folder is None:
        return None
    _write_weights(folder, output_dir)
    TokenPackerProcessor.from_pretrained(folder).save_pretrained(output_dir)
    phases = before["phases"] | {name: _history(output_dir / STATE_FOLDER / name) for name in stages}
    decided = {"recipe": before["recipe"], "regions": {name: config.to_dict() for name, config in stages.items()}}
    _write_record(decided, phases, output_dir)
    return output_dir


def _check_start(steps_fraction: float) -> None:
    if find_spec("accelerate") is None:
        raise ModuleNotFoundError("training needs accelerate, which is not installed; pip install 'tokenpacker[train]'")
    if not 0 < steps_fraction <= 1:
        raise ValueError(f"steps_fraction={steps_fraction} must lie above 0 and be at most 1")


def _from(config: TrainingConfig, parts: Mapping[str, str]) -> TrainingConfig:
    return merged(config, {"model": parts})


def _shortened(recipe: TinyRecipe, fraction: float) -> TinyRecipe:
    def shorter(steps: int) -> int:
        return max(1, round(steps * fraction))

    return replace(
        recipe,
        encoder=replace(recipe.encoder, num_steps=shorter(recipe.encoder.num_steps)),
        language=replace(recipe.language, num_steps=shorter(recipe.language.num_steps)),
        align=replace(recipe.align, max_steps=shorter(recipe.align.max_steps or 1)),
        instruct=replace(recipe.instruct, max_steps=shorter(recipe.instruct.max_steps or 1)),
    )


def _write_weights(trained: Path, output_dir: Path) -> TokenPackerConfig:
    """The model of a finished run; its weights are rounded to float16 on disk and loaded as float32 again."""
    model = TokenPackerForConditionalGeneration.from_pretrained(trained)
    config = model.config
    for part in (config, config.vision_config, config.text_config):
        part.dtype, part._name_or_path = torch.float32, ""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(output_dir, state_dict=half)
    return config


def _history(phase_dir: Path) -> dict[str, Any]:
    """Steps, seconds and a thinned-out loss curve of a phase, or of a stage."""
    history = json.loads((phase_dir / HISTORY).read_text())
    if isinstance(history["steps"], list):  # a stage's, which went through `train`
        curve = [[entry["step"], round(entry["loss"], 4)] for entry in history["steps"]]
        history = {"steps": curve[-1][0], "seconds": history["seconds"], "loss": curve}
    stride = -(-len(history["loss"]) // MAX_CURVE_POINTS) or 1
    return history | {"loss": history["loss"][::stride]}


def _write_record(decided: dict[str, Any], phases: dict[str, Any], output_dir: Path) -> None:
    """`training.json`: everything that was decided and measured; the evaluation adds accuracies to it."""
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
        "notes": [],  # what a reader must know beside the command, such as a run that was interrupted
        "accuracies": [],
    }
    (output_dir / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    write_card(output_dir, record)

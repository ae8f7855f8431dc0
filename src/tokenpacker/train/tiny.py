"""`tokenpacker train tiny`: the carried model from nothing, resumable phase by phase and step by step."""

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import tokenpacker
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processor import TokenPackerProcessor
from tokenpacker.train import stages
from tokenpacker.train.assemble import TOWER_PIXELS
from tokenpacker.train.card import RECORD, write_card
from tokenpacker.train.config import TrainingConfig, merged
from tokenpacker.train.encoder import IMAGE_MEAN, IMAGE_STD
from tokenpacker.train.loop import CHECKPOINTS, HISTORY
from tokenpacker.train.recipes import TOKEN_PACKER, TinyRecipe, tiny
from tokenpacker.train.run import train
from tokenpacker.train.tokenizer import train_tokenizer

STATE_FOLDER = "state"
RESULT_FOLDER = "result"
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
    if find_spec("accelerate") is None:
        raise ModuleNotFoundError("training needs accelerate, which is not installed; pip install 'tokenpacker[train]'")
    if not 0 < steps_fraction <= 1:
        raise ValueError(f"steps_fraction={steps_fraction} must lie above 0 and be at most 1")
    recipe = _shortened(tiny(projector, seed=seed), steps_fraction)
    output_dir = Path(output_dir)
    state_dir = output_dir / STATE_FOLDER
    foundation = state_dir if foundation_dir is None else Path(foundation_dir)
    encoder_dir, language_dir = foundation / "encoder", foundation / "language"
    _once(encoder_dir, lambda folder: _make_encoder(recipe, encoder_dir, folder))
    _once(language_dir, lambda folder: _make_language_model(recipe, language_dir, folder))
    parts = {"vision_tower": str(encoder_dir / RESULT_FOLDER), "language_model": str(language_dir / RESULT_FOLDER)}
    aligned = train(_from(recipe.align, parts), state_dir / "align")
    final = aligned and train(_from(recipe.instruct, {"start": str(aligned)}), state_dir / "instruct")
    if final is None:
        return None
    _write_model(final, output_dir)
    _write_record(recipe, [encoder_dir, language_dir, state_dir / "align", state_dir / "instruct"], output_dir)
    return output_dir


def _once(phase_dir: Path, make: Callable[[Path], None]) -> None:
    """Lets `make` fill the phase's result folder where the phase is not finished; its checkpoints are then deleted."""
    result = phase_dir / RESULT_FOLDER
    if not result.is_dir():
        unfinished = phase_dir / f"{RESULT_FOLDER}.unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        make(unfinished)
        unfinished.rename(result)
        shutil.rmtree(phase_dir / CHECKPOINTS, ignore_errors=True)


def _make_encoder(recipe: TinyRecipe, phase_dir: Path, folder: Path) -> None:
    stages.train_encoder(recipe, phase_dir).save_pretrained(folder)
    pixels = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
    (folder / TOWER_PIXELS).write_text(json.dumps(pixels) + "\n")


def _make_language_model(recipe: TinyRecipe, phase_dir: Path, folder: Path) -> None:
    tokenizer_dir = phase_dir / "tokenizer"
    if not tokenizer_dir.is_dir():
        train_tokenizer().save_pretrained(tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    stages.train_language(recipe, tokenizer, phase_dir).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def _write_model(trained: Path, output_dir: Path) -> None:
    """Model and processor; weights are rounded to float16 on disk and loaded as float32 again."""
    model = TokenPackerForConditionalGeneration.from_pretrained(trained)
    config = model.config
    for part in (config, config.vision_config, config.text_config):
        part.dtype, part._name_or_path = torch.float32, ""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(output_dir, state_dict=half)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    processor = TokenPackerProcessor.from_config(
        config, tokenizer, image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3, image_mode="slice", max_tiles=9
    )
    processor.save_pretrained(output_dir)


def _write_record(recipe: TinyRecipe, phase_dirs: list[Path], output_dir: Path) -> None:
    """`training.json`: everything that was decided and measured; the evaluation adds accuracies to it."""
    histories = {}
    for phase, folder in zip(PHASES, phase_dirs, strict=True):
        history = json.loads((folder / HISTORY).read_text())
        if phase in PHASES[2:]:
            steps = history["steps"]
            curve = [[entry["step"], round(entry["loss"], 4)] for entry in steps]
            history = {"steps": curve[-1][0], "seconds": history["seconds"], "loss": curve}
        stride = -(-len(history["loss"]) // MAX_CURVE_POINTS) or 1
        histories[phase] = history | {"loss": history["loss"][::stride]}
    record: dict[str, Any] = {
        "recipe": asdict(recipe),
        "phases": histories,
        "minutes": round(sum(history["seconds"] for history in histories.values()) / 60, 1),
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

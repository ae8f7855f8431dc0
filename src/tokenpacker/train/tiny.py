"""`tokenpacker train tiny`: the carried model from nothing, resumable phase by phase and step by step."""

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import tokenpacker
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processor import TokenPackerProcessor
from tokenpacker.train import stages
from tokenpacker.train.card import RECORD, write_card
from tokenpacker.train.encoder import IMAGE_MEAN, IMAGE_STD
from tokenpacker.train.loop import CHECKPOINTS, HISTORY, Schedule
from tokenpacker.train.recipes import TOKEN_PACKER, TinyRecipe, tiny
from tokenpacker.train.tokenizer import IMAGE_TOKEN, train_tokenizer

STATE_FOLDER = "state"
RESULT_FOLDER = "result"
PHASES = ("encoder", "language", "align", "instruct")
MAX_CURVE_POINTS = 60

Model = TypeVar("Model", bound=PreTrainedModel)


def train_tiny(
    output_dir: Path | str,
    *,
    projector: str = TOKEN_PACKER,
    seed: int = 0,
    steps_fraction: float = 1.0,
    foundation_dir: Path | str | None = None,
) -> Path:
    """Trains the tiny model into `output_dir` and returns that folder.

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
    encoder_dir, language_dir, align_dir, instruct_dir = (
        (foundation if phase in PHASES[:2] else state_dir) / phase for phase in PHASES
    )
    encoder = _once(encoder_dir, CLIPVisionModel, lambda: stages.train_encoder(recipe, encoder_dir))
    tokenizer = _make_tokenizer(language_dir)
    language_model = _once(
        language_dir, LlamaForCausalLM, lambda: stages.train_language(recipe, tokenizer, language_dir)
    )

    def run_align() -> TokenPackerForConditionalGeneration:
        model = stages.assemble(recipe, encoder, language_model, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        return stages.align(model, recipe, tokenizer, align_dir)

    aligned = _once(align_dir, TokenPackerForConditionalGeneration, run_align)
    final = _once(
        instruct_dir,
        TokenPackerForConditionalGeneration,
        lambda: stages.instruct(aligned, recipe, tokenizer, instruct_dir),
    )
    _write_model(final, tokenizer, output_dir)
    _write_record(recipe, [encoder_dir, language_dir, align_dir, instruct_dir], output_dir)
    return output_dir


def _once(phase_dir: Path, model_class: type[Model], make: Callable[[], Model]) -> Model:
    """The phase's model: loaded where the phase is finished, else made, saved, and its checkpoints deleted."""
    result = phase_dir / RESULT_FOLDER
    if not result.is_dir():
        made = make()
        unfinished = phase_dir / f"{RESULT_FOLDER}.unfinished"
        made.save_pretrained(unfinished)
        unfinished.rename(result)
        shutil.rmtree(phase_dir / CHECKPOINTS, ignore_errors=True)
    return model_class.from_pretrained(result)


def _make_tokenizer(language_dir: Path) -> PreTrainedTokenizerBase:
    folder = language_dir / "tokenizer"
    if not folder.is_dir():
        train_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _shortened(recipe: TinyRecipe, fraction: float) -> TinyRecipe:
    def shorter(schedule: Schedule) -> Schedule:
        return replace(schedule, num_steps=max(1, round(schedule.num_steps * fraction)))

    return replace(
        recipe,
        encoder=shorter(recipe.encoder),
        language=shorter(recipe.language),
        align=shorter(recipe.align),
        instruct=shorter(recipe.instruct),
    )


def _write_model(
    model: TokenPackerForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> None:
    """Model and processor; weights are rounded to float16 on disk and loaded as float32 again."""
    config = model.config
    for part in (config, config.vision_config, config.text_config):
        part.dtype, part._name_or_path = torch.float32, ""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(output_dir, state_dict=half)
    processor = TokenPackerProcessor.from_config(
        config, tokenizer, image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3, image_mode="slice", max_tiles=9
    )
    processor.save_pretrained(output_dir)


def _write_record(recipe: TinyRecipe, phase_dirs: list[Path], output_dir: Path) -> None:
    """`training.json`: everything that was decided and measured; the evaluation adds accuracies to it."""
    histories = {}
    for phase, folder in zip(PHASES, phase_dirs, strict=True):
        history = json.loads((folder / HISTORY).read_text())
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

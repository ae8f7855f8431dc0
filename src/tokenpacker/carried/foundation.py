"""What the carried models begin with, in place of CLIP and Vicuna; the paper's two stages follow.

    encoder    a ViT learns to name what each patch shows               its classifiers are thrown away
    language   a language model learns to answer from described tiles   its attributes are thrown away

Each part is made once, in its own folder. `train tiny` trains both. `compare` takes the carried model's encoder, and
trains a language model that no projector has taught yet.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from tokenpacker.carried.described import DescribedLanguageModel
from tokenpacker.carried.encoder import IMAGE_MEAN, IMAGE_STD, DenseClassifier, LabelledTiles
from tokenpacker.carried.recipes import TinyRecipe, described_steps
from tokenpacker.carried.vocabulary import train_tokenizer
from tokenpacker.scenes.steps import Steps
from tokenpacker.train.assemble import TOWER_PIXELS
from tokenpacker.train.config import RunConfig
from tokenpacker.train.run_folder import (
    CHECKPOINTS,
    CONFIG,
    HISTORY,
    mark_whole,
    only_training,
    remove_leftovers,
    whole_checkpoints,
)
from tokenpacker.train.trainer import PartTrainer, training_arguments
from tokenpacker.whole_files import write_whole

ENCODER, LANGUAGE = "encoder", "language"  # folders of a foundation
RESULT, TOKENIZER = "result", "tokenizer"  # folders of a part; the result is there once it is finished
MAX_POSITIONS = 4096  # far above ten tiles of 144 tokens
NUM_WORKERS = 1  # processes that draw the pictures


def make_encoder(phase_dir: Path, make: Callable[[], CLIPVisionModel | None]) -> Path | None:
    """The folder of the encoder with the pixel statistics that it expects; None if a signal stopped its training.

    Args:
        phase_dir: where the encoder is, or will be.
        make: is called if there is no encoder yet.
    """

    def save(folder: Path) -> bool:
        encoder = make()
        if encoder is None:
            return False
        encoder.save_pretrained(folder)
        pixels = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
        (folder / TOWER_PIXELS).write_text(json.dumps(pixels) + "\n", encoding="utf-8")
        return True

    return _once(phase_dir, save)


def make_language_model(phase_dir: Path, recipe: TinyRecipe) -> Path | None:
    """The folder of the recipe's language model with its tokenizer; None if a signal stopped its training.

    It is trained if there is none, or trained further if it is not finished.
    """

    def save(folder: Path) -> bool:
        if not (phase_dir / TOKENIZER).is_dir():
            train_tokenizer().save_pretrained(phase_dir / TOKENIZER)
        tokenizer = AutoTokenizer.from_pretrained(phase_dir / TOKENIZER)
        language_model = train_language(recipe, tokenizer, phase_dir)
        if language_model is None:
            return False
        language_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return True

    return _once(phase_dir, save)


def train_encoder(recipe: TinyRecipe, phase_dir: Path) -> CLIPVisionModel | None:
    """The encoder without its classifiers; None if a signal stopped its training."""
    set_seed(recipe.seed)
    config = CLIPVisionConfig(
        hidden_size=recipe.vision_dim,
        intermediate_size=4 * recipe.vision_dim,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.vision_heads,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        hidden_act="gelu",  # CLIP's own quick_gelu takes a third longer per step on a CPU
    )
    classifier = DenseClassifier(config)
    tiles = LabelledTiles(
        recipe.encoder.max_steps or 1, image_size=recipe.image_size, patch_size=recipe.patch_size, seed=recipe.seed
    )
    return classifier.encoder if train_phase(recipe.encoder, classifier, tiles, phase_dir) else None


def train_language(recipe: TinyRecipe, tokenizer: PreTrainedTokenizerBase, phase_dir: Path) -> LlamaForCausalLM | None:
    """The language model without its described tiles; None if a signal stopped its training."""
    set_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.language_dim,
        intermediate_size=recipe.language_mlp_dim,
        num_hidden_layers=recipe.language_layers,
        num_attention_heads=recipe.language_heads,
        num_key_value_heads=recipe.language_heads,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    language_model = LlamaForCausalLM(config)
    model = DescribedLanguageModel(language_model, tokenizer)
    steps = Steps(described_steps(), tokenizer, num_steps=recipe.language.max_steps or 1, seed=recipe.seed)
    return language_model if train_phase(recipe.language, model, steps, phase_dir) else None


def train_phase(config: RunConfig, model: nn.Module, steps: Dataset[Any], phase_dir: Path) -> bool:
    """Trains a model in place, from the last checkpoint in a folder. Returns False if a signal stopped it.

    Args:
        steps: an item is the batch of a whole step.

    Raises:
        ValueError: if another process trains into the folder.
    """
    with only_training(phase_dir):
        if not (phase_dir / CONFIG).is_file():
            begun_before = (phase_dir / CHECKPOINTS).is_dir() and get_last_checkpoint(str(phase_dir / CHECKPOINTS))
            if begun_before:  # by version 0.1.0, which did not mark the checkpoints of a foundation
                mark_whole(Path(begun_before))
            write_whole(phase_dir / CONFIG, config.to_json())
        remove_leftovers(phase_dir / CHECKPOINTS)
        trainer = PartTrainer(config, model, steps, training_arguments(config, phase_dir, num_workers=NUM_WORKERS))
        if not trainer.run(next(reversed(whole_checkpoints(phase_dir / CHECKPOINTS)), None)):
            return False
        trainer.write_history(phase_dir / HISTORY)
        return True


def _once(phase_dir: Path, save: Callable[[Path], bool]) -> Path | None:
    """The phase's result folder. `save` fills it if the phase is not finished; its checkpoints are then deleted."""
    result, unfinished = phase_dir / RESULT, phase_dir / f"{RESULT}.unfinished"
    if not result.is_dir():
        unfinished.mkdir(parents=True, exist_ok=True)
        if not save(unfinished):
            return None
        unfinished.rename(result)
        shutil.rmtree(phase_dir / CHECKPOINTS, ignore_errors=True)
    return result

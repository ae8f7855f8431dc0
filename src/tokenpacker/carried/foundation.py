"""What every tiny model begins with: an encoder, and a language model with its tokenizer, each made once in a folder.

`train tiny` trains both; `compare` takes the carried model's encoder, and trains a language model that no projector has
taught yet.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, CLIPVisionModel

from tokenpacker.carried import stages
from tokenpacker.carried.encoder import IMAGE_MEAN, IMAGE_STD
from tokenpacker.carried.vocabulary import train_tokenizer
from tokenpacker.train.assemble import TOWER_PIXELS
from tokenpacker.train.loop import CHECKPOINTS
from tokenpacker.train.recipes import TinyRecipe

ENCODER, LANGUAGE = "encoder", "language"  # folders of a foundation
RESULT = "result"  # folder of a part that is finished
TOKENIZER = "tokenizer"


def make_encoder(phase_dir: Path, encoder: Callable[[], CLIPVisionModel]) -> Path:
    """The folder of the encoder with the pixel statistics that it expects; `encoder` is called if it is not there."""

    def save(folder: Path) -> None:
        encoder().save_pretrained(folder)
        pixels = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
        (folder / TOWER_PIXELS).write_text(json.dumps(pixels) + "\n", encoding="utf-8")

    return _once(phase_dir, save)


def make_language_model(phase_dir: Path, recipe: TinyRecipe) -> Path:
    """The folder of the recipe's language model with its tokenizer; trained, or trained on, if it is not there."""

    def save(folder: Path) -> None:
        if not (phase_dir / TOKENIZER).is_dir():
            train_tokenizer().save_pretrained(phase_dir / TOKENIZER)
        tokenizer = AutoTokenizer.from_pretrained(phase_dir / TOKENIZER)
        stages.train_language(recipe, tokenizer, phase_dir).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _once(phase_dir, save)


def _once(phase_dir: Path, save: Callable[[Path], None]) -> Path:
    """The phase's result folder, filled by `save` where the phase is not finished; its checkpoints are then deleted."""
    result = phase_dir / RESULT
    if not result.is_dir():
        unfinished = phase_dir / f"{RESULT}.unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        save(unfinished)
        unfinished.rename(result)
        shutil.rmtree(phase_dir / CHECKPOINTS, ignore_errors=True)
    return result

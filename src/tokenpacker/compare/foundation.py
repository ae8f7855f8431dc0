"""What all runs begin with: the carried model's frozen encoder, and a language model trained once on described tiles.

The carried language model itself would be no fair start: it was taught by one of the projectors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoTokenizer

from tokenpacker.carried import carried_model_path
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.train import stages
from tokenpacker.train.assemble import TOWER_PIXELS
from tokenpacker.train.encoder import IMAGE_MEAN, IMAGE_STD
from tokenpacker.train.loop import CHECKPOINTS
from tokenpacker.train.recipes import tiny
from tokenpacker.train.tokenizer import train_tokenizer

ENCODER, LANGUAGE, RESULT = "encoder", "language", "result"  # folders as `train tiny` names them
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Foundation:
    """Folders of the encoder and of the language model."""

    encoder: Path
    language_model: Path

    @classmethod
    def find(cls, folder: Path) -> Foundation:
        """The foundation that `tokenpacker train tiny` or an earlier comparison made. Raises ValueError without one."""
        found = cls(folder / ENCODER / RESULT, folder / LANGUAGE / RESULT)
        for part in (found.encoder, found.language_model):
            if not (part / WEIGHTS).is_file():
                raise ValueError(
                    f"foundation {folder} has no {part.parent.name}/{RESULT}/{WEIGHTS}; leave --foundation out to have"
                    " one made, or name the folder `state` of a `tokenpacker train tiny`"
                )
        return found

    @property
    def digest(self) -> str:
        """Of all weights: runs from others cannot be compared."""
        digest = hashlib.sha256()
        for folder in (self.encoder, self.language_model):
            for name, tensor in sorted(load_file(folder / WEIGHTS).items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()[:16]


def make_foundation(folder: Path, *, language_steps: int | None = None) -> Foundation:
    """The foundation in `folder`, made where it is not there yet; resumable, about ten minutes of two cores.

    Args:
        language_steps: that the language model is trained for; None takes the recipe's.
    """
    encoder, language = folder / ENCODER, folder / LANGUAGE
    if not (encoder / RESULT).is_dir():
        part = _empty(encoder / f"{RESULT}.part")
        carried = TokenPackerForConditionalGeneration.from_pretrained(carried_model_path())
        carried.model.vision_tower.save_pretrained(part)
        pixels = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}
        (part / TOWER_PIXELS).write_text(json.dumps(pixels) + "\n", encoding="utf-8")
        part.rename(encoder / RESULT)
    if not (language / RESULT).is_dir():
        _make_language_model(language, language_steps)
    return Foundation.find(folder)


def _make_language_model(folder: Path, steps: int | None) -> None:
    recipe = tiny()
    if steps is not None:
        recipe = replace(recipe, language=replace(recipe.language, num_steps=steps))
    if not (folder / "tokenizer").is_dir():
        train_tokenizer().save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    part = _empty(folder / f"{RESULT}.part")
    stages.train_language(recipe, tokenizer, folder).save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder / RESULT)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

"""The start of all runs: the carried model's frozen encoder, and a language model trained once on described tiles.

The carried language model itself would be unfair, as it was trained with one of the projectors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from transformers import CLIPVisionModel

from tokenpacker.carried.foundation import ENCODER, LANGUAGE, RESULT, make_encoder, make_language_model
from tokenpacker.carried.recipes import tiny
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hub import carried_model_path

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Foundation:
    """Folders of the encoder and of the language model."""

    encoder: Path
    language_model: Path

    @classmethod
    def find(cls, folder: Path) -> Foundation:
        """The foundation of a `tokenpacker train tiny` or an earlier comparison. Raises ValueError if incomplete."""
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
        """Digest of all weights; runs that start from other weights cannot be compared."""
        digest = hashlib.sha256()
        for folder in (self.encoder, self.language_model):
            for name, tensor in sorted(load_file(folder / WEIGHTS).items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()[:16]


def make_foundation(folder: Path, *, language_steps: int | None = None) -> Foundation:
    """The foundation in `folder`, made if missing, in about ten minutes of two cores; resumable.

    Args:
        language_steps: training steps of the language model; None takes the recipe's.
    """
    recipe = tiny()
    if language_steps is not None:
        recipe = replace(recipe, language=replace(recipe.language, max_steps=language_steps))
    make_encoder(folder / ENCODER, _carried_encoder)
    if make_language_model(folder / LANGUAGE, recipe) is None:
        raise KeyboardInterrupt  # a signal stopped it, with a checkpoint
    return Foundation.find(folder)


def _carried_encoder() -> CLIPVisionModel:
    return TokenPackerForConditionalGeneration.from_pretrained(carried_model_path()).model.vision_tower

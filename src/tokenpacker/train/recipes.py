"""Recipes: everything that decides what a training run computes, as values.

A recipe is a function that returns a whole config; a variant is `dataclasses.replace` of it.
"""

from dataclasses import dataclass, field
from typing import Any

from tokenpacker.train.dataset import StepSpec
from tokenpacker.train.loop import Schedule

TOKEN_PACKER, MLP = "token-packer", "mlp"


@dataclass(frozen=True, kw_only=True)
class TinyRecipe:
    """The carried model: widths, levels, data and schedules of its four phases.

    `vision_levels` are the hidden states that the projector reads, counted from 1; the query comes from the last.
    """

    projector: dict[str, Any]
    seed: int = 0
    image_size: int = 96
    patch_size: int = 8
    vision_dim: int = 128
    vision_layers: int = 4
    vision_heads: int = 8
    vision_levels: tuple[int, ...] = (1, 2, 3, 4)
    language_dim: int = 128
    language_layers: int = 4
    language_mlp_dim: int = 384
    language_heads: int = 4
    encoder: Schedule = field(
        default_factory=lambda: Schedule(num_steps=2000, learning_rate=1.5e-3, muon_learning_rate=5e-3, batch_size=4)
    )
    language: Schedule = field(
        default_factory=lambda: Schedule(num_steps=1400, learning_rate=1e-3, muon_learning_rate=5e-3)
    )
    align: Schedule = field(
        default_factory=lambda: Schedule(num_steps=900, learning_rate=2e-3, muon_learning_rate=6e-3)
    )
    instruct: Schedule = field(
        default_factory=lambda: Schedule(num_steps=800, learning_rate=1e-3, muon_learning_rate=3e-3)
    )

    @property
    def scale_factors(self) -> tuple[int, ...]:
        """Scale factors that training samples from; None of them for a projector that keeps every token."""
        return (2, 3, 4) if self.projector["name"] == TOKEN_PACKER else (1,)


def tiny(projector: str = TOKEN_PACKER, *, seed: int = 0) -> TinyRecipe:
    """The recipe of `tokenpacker train tiny`.

    Raises: ValueError for a projector that the recipe has no settings for.
    """
    settings: dict[str, dict[str, Any]] = {
        TOKEN_PACKER: {"name": TOKEN_PACKER, "num_heads": 4, "scale_factor": 2},
        MLP: {"name": MLP},
    }
    if projector not in settings:
        raise ValueError(f"projector={projector!r} has no tiny recipe; use one of {', '.join(settings)}")
    return TinyRecipe(projector=settings[projector], seed=seed)


def described_steps() -> StepSpec:
    """Foundation of the language model: descriptions in place of images, questions and captions mixed."""
    return StepSpec(show="labels", captions=0.1, scale_factors=(2, 3, 4), one_tile_share=0.3, easy_share=0.15)


def align_steps(recipe: TinyRecipe) -> StepSpec:
    """Stage 1: captions only, of pictures of one tile: with several tiles to search it takes many times as long."""
    return StepSpec(show="pixels", captions=1.0, scale_factors=recipe.scale_factors, one_tile_share=1.0)


def instruct_steps(recipe: TinyRecipe) -> StepSpec:
    """Stage 2: questions and answers, and a few captions so that they are not forgotten."""
    return StepSpec(show="pixels", captions=0.04, scale_factors=recipe.scale_factors, one_tile_share=0.2)

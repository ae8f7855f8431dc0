"""Recipes by name: functions that return a whole config, with everything that decides what a training run computes.

A variant is `dataclasses.replace` of it. `paper` has the paper's; here are those of the carried model, and the names.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokenpacker.carried import tiny_regions
from tokenpacker.carried.tiny_stage import tiny_stage
from tokenpacker.scenes.steps import StepSpec
from tokenpacker.train import paper
from tokenpacker.train.config import ModelConfig, ScenesConfig, TrainingConfig
from tokenpacker.train.loop import Schedule

TOKEN_PACKER, MLP = "token-packer", "mlp"
ENCODER, LANGUAGE = "runs/tiny/state/encoder/result", "runs/tiny/state/language/result"


@dataclass(frozen=True, kw_only=True)
class TinyRecipe:
    """The carried model: widths, the schedules of its two foundations, and the configs of the paper's two stages."""

    projector: dict[str, Any]
    align: TrainingConfig
    instruct: TrainingConfig
    seed: int = 0
    image_size: int = 96
    patch_size: int = 8
    vision_dim: int = 128
    vision_layers: int = 4
    vision_heads: int = 8
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


def tiny(projector: str = TOKEN_PACKER, *, seed: int = 0) -> TinyRecipe:
    """The recipe of `tokenpacker train tiny`.

    Raises: ValueError for a projector that the recipe has no settings for.
    """
    return TinyRecipe(
        projector=_tiny_projector(projector),
        align=align_tiny(projector, seed=seed),
        instruct=instruct_tiny(projector, seed=seed),
        seed=seed,
    )


def align_tiny(projector: str = TOKEN_PACKER, *, seed: int = 0) -> TrainingConfig:
    """Stage 1 of the carried model: captions only, of pictures of one tile: with several it takes many times as long.

    Encoder and language model are those that `tokenpacker train tiny` made.

    Raises: ValueError as `tiny`.
    """
    model = ModelConfig(
        vision_tower=ENCODER,
        language_model=LANGUAGE,
        projector=_tiny_projector(projector),
        vision_levels=(1, 2, 3, 4),
        image_mode="slice",
        max_tiles=9,
    )
    scenes = ScenesConfig(captions=1.0, one_tile_share=1.0)
    factors = _scale_factors(projector)
    return tiny_stage("align-tiny", model, scenes, ("projector",), 900, (2e-3, 6e-3), seed + 1, scale_factors=factors)


def instruct_tiny(projector: str = TOKEN_PACKER, *, seed: int = 0) -> TrainingConfig:
    """Stage 2 of the carried model: questions and answers, and a few captions so that they are not forgotten.

    Raises: ValueError as `tiny`.
    """
    model = ModelConfig(start="runs/align-tiny/model", projector=_tiny_projector(projector))
    scenes = ScenesConfig(captions=0.04, one_tile_share=0.2)
    parts, rates, factors = ("projector", "language_model"), (1e-3, 3e-3), _scale_factors(projector)
    return tiny_stage("instruct-tiny", model, scenes, parts, 1200, rates, seed + 2, scale_factors=factors)


def described_steps() -> StepSpec:
    """Foundation of the language model: descriptions in place of images, questions and captions mixed."""
    return StepSpec(show="labels", captions=0.1, scale_factors=(2, 3, 4), one_tile_share=0.3, easy_share=0.15)


def recipes() -> dict[str, Callable[[], TrainingConfig]]:
    """All by name: `align-7b`, `instruct-13b-hd16`, `instruct-7b-hd9-qlora`, `align-7b-elastic`, `align-tiny`, ..."""
    tiny_stages = {"align-tiny": align_tiny, "instruct-tiny": instruct_tiny}
    return {**paper.recipes(), **tiny_stages, **tiny_regions.recipes()}


def find_recipe(name: str) -> TrainingConfig:
    """The config of a recipe. Raises ValueError for an unknown name, with the nearest ones."""
    named = recipes()
    if name not in named:
        near = difflib.get_close_matches(name, named, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(named)}"
        raise ValueError(f"recipe {name!r} is unknown; {hint}")
    return named[name]()


def _tiny_projector(name: str) -> dict[str, Any]:
    settings: dict[str, dict[str, Any]] = {
        TOKEN_PACKER: {"name": TOKEN_PACKER, "num_heads": 4, "scale_factor": 2},
        MLP: {"name": MLP},
    }
    if name not in settings:
        raise ValueError(f"projector={name!r} has no tiny recipe; use one of {', '.join(settings)}")
    return settings[name]


def _scale_factors(projector: str) -> tuple[int, ...]:
    return (2, 3, 4) if projector == TOKEN_PACKER else (1,)

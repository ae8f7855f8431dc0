"""The recipes of the carried models, and the lookup of all recipes by name.

    tiny()                   foundation (encoder, language model), then the paper's two stages, on generated pictures
    align_tiny()             stage 1 of it: captions train the projector
    instruct_tiny()          stage 2: questions train projector and language model
    region_tiny()            then, from the carried model: masks train a region encoder
    region_instruct_tiny()   questions about masks train it, the projector and the language model

A variant is `dataclasses.replace` of a recipe. The values are ours, found by trial to be trained within an hour on two
cores, except where a comment names another origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenpacker.scenes.steps import StepSpec
from tokenpacker.text import did_you_mean
from tokenpacker.train import paper_recipes
from tokenpacker.train.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScenesConfig,
    TrainingConfig,
)

TOKEN_PACKER, MLP = "token-packer", "mlp"
PROJECTORS: dict[str, dict[str, Any]] = {
    TOKEN_PACKER: {"name": TOKEN_PACKER, "num_heads": 4, "scale_factor": 2},
    MLP: {"name": MLP},  # the comparison with all tokens
}
FOUNDATION = "runs/tiny/state"  # where `tokenpacker train tiny --output runs/tiny` leaves encoder and language model


@dataclass(frozen=True, kw_only=True)
class TinyRecipe:
    """The carried model: sizes, the two phases of its foundation, and the paper's two stages."""

    projector: dict[str, Any]
    encoder: RunConfig
    language: RunConfig
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


def tiny(projector: str = TOKEN_PACKER, *, seed: int = 0) -> TinyRecipe:
    """The recipe of `tokenpacker train tiny`. Raises ValueError for a projector that it has no settings for."""
    return TinyRecipe(
        projector=_projector(projector),
        encoder=RunConfig(
            name="encoder", optimizer=_optimizer(1.5e-3, 5e-3, 100 / 2000), max_steps=2000, **_on_cpu(seed)
        ),
        language=RunConfig(
            name="language", optimizer=_optimizer(1e-3, 5e-3, 100 / 1400), max_steps=1400, **_on_cpu(seed)
        ),
        align=align_tiny(projector, seed=seed),
        instruct=instruct_tiny(projector, seed=seed),
        seed=seed,
    )


def align_tiny(projector: str = TOKEN_PACKER, *, seed: int = 0) -> TrainingConfig:
    """Stage 1 trains the projector on captions alone. Raises ValueError for a projector without settings."""
    return TrainingConfig(
        name="align-tiny",
        train=("projector",),  # paper
        model=ModelConfig(
            vision_tower=f"{FOUNDATION}/encoder/result",
            language_model=f"{FOUNDATION}/language/result",
            projector=_projector(projector),
            vision_levels=(1, 2, 3, 4),  # all layers
            image_mode="slice",
            max_tiles=9,  # paper
            chat_format="bare",
        ),
        # Pictures of one tile: captions of several tiles take many times as long.
        data=DataConfig(scenes=ScenesConfig(captions=1.0, one_tile_share=1.0), num_workers=1),
        optimizer=_optimizer(2e-3, 6e-3, warmup_share=100 / 900),
        max_steps=900,
        scale_factors=_scale_factors(projector),
        **_on_cpu(seed + 1),
    )


def instruct_tiny(projector: str = TOKEN_PACKER, *, seed: int = 0) -> TrainingConfig:
    """Stage 2 trains projector and language model. Raises ValueError for a projector without settings."""
    return TrainingConfig(
        name="instruct-tiny",
        train=("projector", "language_model"),  # paper
        model=ModelConfig(start="runs/align-tiny/model", projector=_projector(projector), chat_format="bare"),
        # A few captions, so that they are not forgotten.
        data=DataConfig(scenes=ScenesConfig(captions=0.04, one_tile_share=0.2), num_workers=1),
        optimizer=_optimizer(1e-3, 3e-3, warmup_share=100 / 1200),
        max_steps=1200,  # measured: 800 missed the accuracy aimed at with one of two seeds
        scale_factors=_scale_factors(projector),
        **_on_cpu(seed + 2),
    )


def region_tiny(*, seed: int = 0) -> TrainingConfig:
    """The first region stage trains a new region encoder on masks, with the carried model `tiny` frozen."""
    return TrainingConfig(
        name="region-tiny",
        train=("regions",),  # the original's region branch
        model=ModelConfig(start="tiny", chat_format="bare"),
        data=DataConfig(scenes=ScenesConfig(captions=0.0, regions=1.0), num_workers=1),
        optimizer=_optimizer(2e-3, 6e-3, warmup_share=50 / 300),
        max_steps=300,
        scale_factors=(2, 3, 4),
        **_on_cpu(seed + 11),
    )


def region_instruct_tiny(*, seed: int = 0) -> TrainingConfig:
    """The second region stage trains all but the encoder."""
    return TrainingConfig(
        name="region-instruct-tiny",
        train=("projector", "regions", "language_model"),  # the original's region branch
        model=ModelConfig(start="runs/region-tiny/model", chat_format="bare"),
        # Two of five steps are those of the carried model, so that it forgets nothing.
        data=DataConfig(scenes=ScenesConfig(captions=0.04, regions=0.6), num_workers=1),
        optimizer=_optimizer(1e-3, 3e-3, warmup_share=50 / 2000),
        max_steps=2000,
        scale_factors=(2, 3, 4),
        **_on_cpu(seed + 12),
    )


def described_steps() -> StepSpec:
    """The data of the language model's foundation: descriptions in place of images, with questions and captions."""
    return StepSpec(show="labels", captions=0.1, scale_factors=(2, 3, 4), one_tile_share=0.3, easy_share=0.15)


def recipes() -> dict[str, Callable[[], TrainingConfig]]:
    """All recipes of one run by name: `align-7b`, `instruct-13b-hd16`, `instruct-7b-hd9-qlora`, `align-tiny`, ..."""
    return {
        **paper_recipes.recipes(),
        "align-tiny": align_tiny,
        "instruct-tiny": instruct_tiny,
        "region-tiny": region_tiny,
        "region-instruct-tiny": region_instruct_tiny,
    }


def find_recipe(name: str) -> TrainingConfig:
    """The config of a recipe. Raises ValueError for an unknown name, with the nearest one."""
    named = recipes()
    if name not in named:
        raise ValueError(f"recipe {name!r} is unknown{did_you_mean(name, named) or '; use one of ' + ', '.join(named)}")
    return named[name]()


def _optimizer(learning_rate: float, muon_learning_rate: float, warmup_share: float) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=learning_rate,
        muon_learning_rate=muon_learning_rate,  # measured: 190 steps in place of AdamW's 250, see train.optimizer
        weight_decay=0.05,
        betas=(0.9, 0.98),
        warmup_share=warmup_share,
        min_learning_rate_share=0.02,
    )


def _on_cpu(seed: int) -> dict[str, Any]:
    """Settings of every tiny run: a batch is a whole step, in float32."""
    return {
        "batch_size": 1,
        "device_batch_size": 1,
        "precision": "float32",
        "checkpointing": False,
        "seed": seed,
        "log_every": 25,
        "save_every": 250,
        "report_to": (),
    }


def _projector(name: str) -> dict[str, Any]:
    if name not in PROJECTORS:
        raise ValueError(f"projector={name!r} has no tiny recipe; use one of {', '.join(PROJECTORS)}")
    return PROJECTORS[name]


def _scale_factors(projector: str) -> tuple[int, ...]:
    """The paper's, one drawn for each step; an MLP has no other than 1."""
    return (2, 3, 4) if projector == TOKEN_PACKER else (1,)

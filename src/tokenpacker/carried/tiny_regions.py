"""Recipes of the carried model that takes regions: the original's two region stages, on generated pictures.

It starts from the carried model, which has had the paper's two stages. Steps about masks are mixed with those that made
that model, so that it stays as good at them.
"""

from collections.abc import Callable

from tokenpacker.carried.tiny_stage import tiny_stage
from tokenpacker.train.config import ModelConfig, ScenesConfig, TrainingConfig

START = "tiny"  # the carried model, by its name
REGION, REGION_INSTRUCT = "region-tiny", "region-instruct-tiny"
WARMUP_STEPS = 50


def region_tiny(*, seed: int = 0) -> TrainingConfig:
    """Stage 2 of the original's region model: the region module alone, new, learns to say what is under a mask."""
    scenes = ScenesConfig(captions=0.0, regions=1.0)
    model, rates = ModelConfig(start=START), (2e-3, 6e-3)
    return tiny_stage(REGION, model, scenes, ("regions",), 300, rates, seed + 11, warmup_steps=WARMUP_STEPS)


def region_instruct_tiny(*, seed: int = 0) -> TrainingConfig:
    """Stage 3: projector, region module and language model; two of five steps are the carried model's own."""
    scenes = ScenesConfig(captions=0.04, regions=0.6)
    parts = ("projector", "regions", "language_model")
    model, rates = ModelConfig(start=f"runs/{REGION}/model"), (1e-3, 3e-3)
    return tiny_stage(REGION_INSTRUCT, model, scenes, parts, 2000, rates, seed + 12, warmup_steps=WARMUP_STEPS)


def recipes() -> dict[str, Callable[[], TrainingConfig]]:
    """Both by name."""
    return {REGION: region_tiny, REGION_INSTRUCT: region_instruct_tiny}

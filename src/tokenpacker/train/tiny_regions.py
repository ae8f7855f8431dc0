"""Recipes of the carried model that takes regions: the original's two region stages, on generated pictures.

It starts from the carried model, which has had the paper's two stages. Steps about masks are mixed with those that made
that model, so that it stays as good at them.
"""

from collections.abc import Callable

from tokenpacker.train.config import DataConfig, ModelConfig, OptimizerConfig, ScenesConfig, TrainingConfig

START = "tiny"  # the carried model, by its name
REGION, REGION_INSTRUCT = "region-tiny", "region-instruct-tiny"
WARMUP_STEPS = 50


def region_tiny(*, seed: int = 0) -> TrainingConfig:
    """Stage 2 of the original's region model: the region module alone, new, learns to say what is under a mask."""
    scenes = ScenesConfig(captions=0.0, regions=1.0)
    return _stage(REGION, START, scenes, ("regions",), 300, (2e-3, 6e-3), seed + 11)


def region_instruct_tiny(*, seed: int = 0) -> TrainingConfig:
    """Stage 3: projector, region module and language model; two of five steps are the carried model's own."""
    scenes = ScenesConfig(captions=0.04, regions=0.6)
    parts = ("projector", "regions", "language_model")
    return _stage(REGION_INSTRUCT, f"runs/{REGION}/model", scenes, parts, 2000, (1e-3, 3e-3), seed + 12)


def recipes() -> dict[str, Callable[[], TrainingConfig]]:
    """Both by name."""
    return {REGION: region_tiny, REGION_INSTRUCT: region_instruct_tiny}


def _stage(
    name: str,
    start: str,
    scenes: ScenesConfig,
    train: tuple[str, ...],
    num_steps: int,
    rates: tuple[float, float],
    seed: int,
) -> TrainingConfig:
    """A stage on a CPU, as those of the carried model; `rates` are AdamW's and Muon's."""
    return TrainingConfig(
        name=name,
        model=ModelConfig(start=start),
        train=train,
        data=DataConfig(scenes=scenes, num_workers=1),
        optimizer=OptimizerConfig(
            learning_rate=rates[0],
            muon_learning_rate=rates[1],
            weight_decay=0.05,
            betas=(0.9, 0.98),
            warmup_share=WARMUP_STEPS / num_steps,
            min_learning_rate_share=0.02,
        ),
        batch_size=1,
        device_batch_size=1,
        scale_factors=(2, 3, 4),
        max_steps=num_steps,
        precision="float32",
        checkpointing=False,
        seed=seed,
        log_every=25,
        save_every=250,
        report_to=(),
    )

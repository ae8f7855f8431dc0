"""What all stages of the carried models have in common."""

from dataclasses import replace

from tokenpacker.train.config import DataConfig, ModelConfig, OptimizerConfig, ScenesConfig, TrainingConfig


def tiny_stage(
    name: str,
    model: ModelConfig,
    scenes: ScenesConfig,
    train: tuple[str, ...],
    num_steps: int,
    rates: tuple[float, float],
    seed: int,
    *,
    warmup_steps: int = 100,
    scale_factors: tuple[int, ...] = (2, 3, 4),
) -> TrainingConfig:
    """A stage on a CPU; `rates` are AdamW's and Muon's."""
    return TrainingConfig(
        name=name,
        model=replace(model, chat_format="bare"),
        train=train,
        data=DataConfig(scenes=scenes, num_workers=1),
        optimizer=OptimizerConfig(
            learning_rate=rates[0],
            muon_learning_rate=rates[1],
            weight_decay=0.05,
            betas=(0.9, 0.98),
            warmup_share=warmup_steps / num_steps,
            min_learning_rate_share=0.02,
        ),
        batch_size=1,
        device_batch_size=1,
        scale_factors=scale_factors,
        max_steps=num_steps,
        precision="float32",
        checkpointing=False,
        seed=seed,
        log_every=25,
        save_every=250,
        report_to=(),
    )

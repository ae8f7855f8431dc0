"""The paper's training as recipes: two stages, at one tile or in high resolution, two more for regions; 7B and 13B.

    align()                          stage 1: captions teach the projector
    instruct()                       stage 2: conversations teach projector and language model
    in_high_resolution(config, 9)    tiles and a thumbnail
    region()                         then, for a model of both stages: masks teach a region encoder
    region_instruct()                conversations about masks teach it, the projector and the language model
    with_lora(config), with_qlora(config), elastic(config)

Rates, batch sizes, schedule and lengths are LLaVA-1.5's, which the paper trains with; each origin stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tokenpacker.checkpoints.settings import TILE_LIMITS
from tokenpacker.train.config import LoraConfig, ModelConfig, OptimizerConfig, Part, TrainingConfig

REGION_TILES = 9  # of the original's region branch
VICUNA = {"7b": "lmsys/vicuna-7b-v1.5", "13b": "lmsys/vicuna-13b-v1.5"}


def align(size: str = "7b") -> TrainingConfig:
    """Stage 1: only the projector learns, from captions (LLaVA-Pretrain, 558K), at 1e-3 and 256 samples a step."""
    return TrainingConfig(
        name=f"align-{size}",
        model=ModelConfig(language_model=_vicuna(size), chat_format="plain", image_mode="square"),
        train=("projector",),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        batch_size=256,
        device_batch_size=32,
        save_every=500,
    )


def instruct(size: str = "7b") -> TrainingConfig:
    """Stage 2: projector and language model learn, from conversations (Mix665K), at 2e-5 and 128 samples a step.

    It continues from the model of stage 1, which `model.start` names.
    """
    return TrainingConfig(
        name=f"instruct-{size}",
        model=ModelConfig(language_model=_vicuna(size), image_mode="pad"),
        train=("projector", "language_model"),
        optimizer=OptimizerConfig(learning_rate=2e-5),
        batch_size=128,
        device_batch_size=16,
        save_every=500,
    )


def in_high_resolution(config: TrainingConfig, max_tiles: int = 9) -> TrainingConfig:
    """The recipe with images cut into up to 9, 16 or 25 tiles and a thumbnail (1.2M + 1.5M samples of data).

    Raises: ValueError for a limit that the paper did not train.
    """
    if max_tiles not in TILE_LIMITS:
        raise ValueError(f"max_tiles={max_tiles} is none of the paper's {TILE_LIMITS}; set model.max_tiles instead")
    model = replace(config.model, image_mode="slice", max_tiles=max_tiles)
    # The original counts text alone against its 2,048, and images come on top: 10 tiles of 145 tokens are 1,450, and
    # 26 are 3,770. Vicuna has 4,096 places.
    data = replace(config.data, max_length=4096)
    return _fitting(replace(config, name=f"{config.name}-hd{max_tiles}", model=model, data=data))


def region(size: str = "7b") -> TrainingConfig:
    """The first region stage (stage 2 of Osprey): only the region encoder learns, at 5e-4 and 128 samples a step.

    It starts from an instruction-tuned TokenPacker-HD; its data are COCO, RefCOCO, RefCOCO+, PascalPart and
    PartImageNet. Rate, batch, schedule and data are those of the original's scripts for its region branch.
    """
    return _of_regions("region", f"runs/instruct-{size}-hd{REGION_TILES}/model", size, ("regions",), 5e-4)


def region_instruct(size: str = "7b") -> TrainingConfig:
    """The second region stage (stage 3 of Osprey): projector, region encoder and language model learn, at 2e-5.

    It starts from the model of the first; its data are Osprey-724K, Visual Genome and VCR.
    """
    parts: tuple[Part, ...] = ("projector", "regions", "language_model")
    return _of_regions("region-instruct", f"runs/region-{size}-hd{REGION_TILES}/model", size, parts, 2e-5)


def _of_regions(name: str, start: str, size: str, train: tuple[Part, ...], rate: float) -> TrainingConfig:
    stage = instruct(size)
    model = replace(stage.model, start=start)
    config = replace(
        stage, name=f"{name}-{size}", model=model, train=train, optimizer=OptimizerConfig(learning_rate=rate)
    )
    return in_high_resolution(config, REGION_TILES)


def with_lora(config: TrainingConfig) -> TrainingConfig:
    """The recipe with low-rank updates of the language model, at LLaVA's rates: 2e-4, and 2e-5 for the projector."""
    train = tuple(part for part in config.train if part != "language_model")
    optimizer = replace(config.optimizer, learning_rate=2e-4, part_learning_rates=dict.fromkeys(train, 2e-5))
    return replace(config, name=f"{config.name}-lora", lora=LoraConfig(), optimizer=optimizer, train=train)


def with_qlora(config: TrainingConfig) -> TrainingConfig:
    """As `with_lora`, the language model's own weights in four bits: for one GPU of 24 GB."""
    lora = with_lora(config)
    return _fitting(
        replace(
            lora,
            name=f"{config.name}-qlora",
            lora=LoraConfig(four_bit=True),
            device_batch_size=2,
            data=replace(lora.data, max_tiles_per_batch=32),
        )
    )


def elastic(config: TrainingConfig) -> TrainingConfig:
    """The recipe with a scale factor drawn for each step, so that one model serves 144, 64 and 36 tokens."""
    return replace(config, name=f"{config.name}-elastic", scale_factors=(2, 3, 4))


def recipes() -> dict[str, Callable[[], TrainingConfig]]:
    """All of them by name; `recipes.find_recipe` has these and more."""
    named: dict[str, Callable[[], TrainingConfig]] = {}
    for size in VICUNA:
        for stage in (align, instruct):
            plain = stage(size)
            for base in (plain, *(in_high_resolution(plain, limit) for limit in TILE_LIMITS)):
                variants = [base, elastic(base)]
                variants += [with_lora(base), with_qlora(base)] if stage is instruct else []
                named |= {variant.name: _returning(variant) for variant in variants}
        regions = region_instruct(size)
        for config in (region(size), regions, with_lora(regions), with_qlora(regions)):
            named[config.name] = _returning(config)
    return named


def _fitting(config: TrainingConfig) -> TrainingConfig:
    """The recipe with device batches that tiles never bound: else a step would hold fewer samples."""
    samples = config.device_batch_size
    while samples > 1 and samples * ((config.model.max_tiles or 0) + 1) > config.data.max_tiles_per_batch:
        samples //= 2
    return replace(config, device_batch_size=samples)


def _returning(config: TrainingConfig) -> Callable[[], TrainingConfig]:
    return lambda: config


def _vicuna(size: str) -> str:
    if size not in VICUNA:
        raise ValueError(f"size={size!r} is unknown; use one of {', '.join(VICUNA)}, or set model.language_model")
    return VICUNA[size]

"""The paper's training as recipes: two stages, at one tile or in high resolution, two more for regions; 7B and 13B.

    align()                          stage 1: captions train the projector
    instruct()                       stage 2: conversations train projector and language model
    in_high_resolution(config, 9)    images become tiles and a thumbnail
    region()                         after both stages: masks train a region encoder
    region_instruct()                then conversations about masks train it, the projector and the language model
    with_lora(config), with_qlora(config), elastic(config)

A variant is `dataclasses.replace` of a recipe. The comments name the origin of each value: the TokenPacker paper
(arXiv 2407.02392), its published scripts, or LLaVA-1.5's scripts, whose training the paper adopts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tokenpacker.checkpoints.settings import TILE_LIMITS
from tokenpacker.train.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, Part, TrainingConfig

VICUNA = {"7b": "lmsys/vicuna-7b-v1.5", "13b": "lmsys/vicuna-13b-v1.5"}  # paper
REGION_TILES = 9  # scripts of the original's region branch


def align(size: str = "7b") -> TrainingConfig:
    """Stage 1 trains the projector on captions (LLaVA-Pretrain, 558K). Raises ValueError for an unknown size."""
    if size not in VICUNA:
        raise ValueError(f"size={size!r} is unknown; use one of {', '.join(VICUNA)}, or set model.language_model")
    return TrainingConfig(
        name=f"align-{size}",
        train=("projector",),  # paper
        model=ModelConfig(
            vision_tower="openai/clip-vit-large-patch14-336",  # paper
            language_model=VICUNA[size],
            projector={"name": "token-packer", "scale_factor": 2},  # paper; it reads hidden states 12, 16, 22 and 23
            chat_format="plain",  # the original's script, as the next
            image_mode="square",
        ),
        data=DataConfig(
            max_length=2048,  # the original's, which counts text alone; here image tokens are included
            max_tiles_per_batch=256,  # ours
            num_workers=4,  # LLaVA-1.5
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,  # LLaVA-1.5
            weight_decay=0.0,  # LLaVA-1.5
            betas=(0.9, 0.999),  # transformers' default, which LLaVA-1.5 takes
            warmup_share=0.03,  # LLaVA-1.5; then a cosine to 0
            max_grad_norm=1.0,  # transformers' default, which LLaVA-1.5 takes
        ),
        epochs=1.0,  # LLaVA-1.5
        batch_size=256,  # LLaVA-1.5
        device_batch_size=32,  # ours: a step holds the same samples whatever it is
        precision="bfloat16",  # LLaVA-1.5; trained weights stay float32, which is ours
        checkpointing=True,  # LLaVA-1.5
        seed=42,  # transformers' default
        save_every=500,  # ours
    )


def instruct(size: str = "7b") -> TrainingConfig:
    """Stage 2 trains projector and language model on conversations (Mix665K), from the model of stage 1.

    `model.start` names that model. Raises ValueError for an unknown size.
    """
    first = align(size)
    return replace(
        first,
        name=f"instruct-{size}",
        train=("projector", "language_model"),  # paper
        model=replace(first.model, chat_format="v1", image_mode="pad"),  # the original's script
        optimizer=replace(first.optimizer, learning_rate=2e-5),  # LLaVA-1.5
        batch_size=128,  # LLaVA-1.5
        device_batch_size=16,  # ours
    )


def in_high_resolution(config: TrainingConfig, max_tiles: int = 9) -> TrainingConfig:
    """The recipe with images cut into up to 9, 16 or 25 tiles and a thumbnail (paper; 1.2M and 1.5M samples of data).

    Raises: ValueError for a limit that is not the paper's.
    """
    if max_tiles not in TILE_LIMITS:
        raise ValueError(f"max_tiles={max_tiles} is none of the paper's {TILE_LIMITS}; set model.max_tiles instead")
    return _fitting(
        replace(
            config,
            name=f"{config.name}-hd{max_tiles}",
            model=replace(config.model, image_mode="slice", max_tiles=max_tiles),
            # Computed: 10 tiles of 145 tokens are 1,450 and 26 are 3,770; Vicuna has 4,096 positions.
            data=replace(config.data, max_length=4096),
        )
    )


def region(size: str = "7b") -> TrainingConfig:
    """The first region stage (stage 2 of Osprey) trains the region encoder of an instruction-tuned TokenPacker-HD.

    Its data are COCO, RefCOCO, RefCOCO+, PascalPart and PartImageNet.
    """
    start = f"runs/instruct-{size}-hd{REGION_TILES}/model"
    return _region_stage("region", size, start, ("regions",), 5e-4)  # scripts of the original's region branch


def region_instruct(size: str = "7b") -> TrainingConfig:
    """The second region stage (stage 3 of Osprey) trains all but the vision tower, from the model of the first.

    Its data are Osprey-724K, Visual Genome and VCR.
    """
    start = f"runs/region-{size}-hd{REGION_TILES}/model"
    parts: tuple[Part, ...] = ("projector", "regions", "language_model")
    return _region_stage("region-instruct", size, start, parts, 2e-5)  # scripts of the original's region branch


def with_lora(config: TrainingConfig) -> TrainingConfig:
    """The recipe with low-rank updates of the language model."""
    train = tuple(part for part in config.train if part != "language_model")
    return replace(
        config,
        name=f"{config.name}-lora",
        train=train,
        lora=LoraConfig(rank=128, alpha=256, dropout=0.05),  # LLaVA-1.5's LoRA script, as the rates
        optimizer=replace(config.optimizer, learning_rate=2e-4, part_learning_rates=dict.fromkeys(train, 2e-5)),
    )


def with_qlora(config: TrainingConfig) -> TrainingConfig:
    """`with_lora` with the weights of the language model in four bits, for one GPU of 24 GB."""
    low_rank = with_lora(config)
    assert low_rank.lora is not None
    return _fitting(
        replace(
            low_rank,
            name=f"{config.name}-qlora",
            lora=replace(low_rank.lora, four_bit=True),
            device_batch_size=2,  # ours, as the next: computed for 24 GB
            data=replace(low_rank.data, max_tiles_per_batch=32),
        )
    )


def elastic(config: TrainingConfig) -> TrainingConfig:
    """The recipe with a scale factor drawn for each step, so that one model serves 144, 64 and 36 tokens (ours)."""
    return replace(config, name=f"{config.name}-elastic", scale_factors=(2, 3, 4))


def recipes() -> dict[str, Callable[[], TrainingConfig]]:
    """The paper's recipes by name; `carried.recipes.find_recipe` knows these and the carried models'."""
    configs: list[TrainingConfig] = []
    for size in VICUNA:
        for stage in (align, instruct):
            for base in (stage(size), *(in_high_resolution(stage(size), limit) for limit in TILE_LIMITS)):
                configs += [base, elastic(base)]
                configs += [with_lora(base), with_qlora(base)] if stage is instruct else []
        last = region_instruct(size)
        configs += [region(size), last, with_lora(last), with_qlora(last)]
    return {config.name: lambda config=config: config for config in configs}  # type: ignore[misc]


def _region_stage(name: str, size: str, start: str, train: tuple[Part, ...], rate: float) -> TrainingConfig:
    """A region stage: as stage 2 in high resolution, with other parts and another rate."""
    stage = instruct(size)
    config = replace(
        stage,
        name=f"{name}-{size}",
        model=replace(stage.model, start=start),
        train=train,
        optimizer=replace(stage.optimizer, learning_rate=rate),
    )
    return in_high_resolution(config, REGION_TILES)


def _fitting(config: TrainingConfig) -> TrainingConfig:
    """The recipe with device batches small enough that the bound on tiles never makes a step smaller."""
    samples = config.device_batch_size
    while samples > 1 and samples * ((config.model.max_tiles or 0) + 1) > config.data.max_tiles_per_batch:
        samples //= 2
    return replace(config, device_batch_size=samples)

"""A whole training run as one value: frozen, and checked when it is made.

Everything that decides what a run computes stands here, so that the file saved beside a checkpoint repeats the run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tokenpacker.hf.processing.image_processor import ImageMode
from tokenpacker.regions import RegionRule
from tokenpacker.tiling import GridList

Part = Literal["vision_tower", "projector", "regions", "language_model"]
Precision = Literal["float32", "bfloat16"]
ChatFormat = Literal["v1", "plain", "bare"]
DataFormat = Literal["json", "jsonl", "parquet", "webdataset", "hub"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained: a model that exists, or one put together from a vision tower and a language model.

    Args:
        start: folder or hub id of a TokenPacker model to continue from. The fields below it up to `projector` then
            stay unused.
        vision_tower: folder or hub id.
        language_model: folder or hub id.
        projector: dict of a registered projector's config; its widths are taken from the parts.
        projector_weights: file that a run left, `projector.safetensors`; its config takes the place of `projector`.
        vision_levels: hidden states that the projector reads, 1 being the first layer's output; empty takes the
            paper's.
        chat_format: `plain` for captions, `v1` for conversations, `bare` for those without Vicuna's system text.
        image_mode: see `TokenPackerImageProcessor`, as the next four. None keeps what the start has, or the default.
        row_separator: see `TokenPackerProcessor`; None likewise.
        region_rule: how much a patch counts in a region, see `tokenpacker.regions`; None likewise.
    """

    start: str | None = None
    vision_tower: str = "openai/clip-vit-large-patch14-336"
    language_model: str = "lmsys/vicuna-7b-v1.5"
    projector: dict[str, Any] = field(default_factory=lambda: {"name": "token-packer", "scale_factor": 2})
    projector_weights: str | None = None
    vision_levels: tuple[int, ...] = ()
    chat_format: ChatFormat = "v1"
    image_mode: ImageMode | None = None
    max_tiles: int | None = None
    grid_list: GridList | None = None
    thumbnail_source: Literal["image", "canvas"] | None = None
    antialias: bool | None = None
    row_separator: Literal["newline", "unknown"] | None = None
    region_rule: RegionRule | None = None


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Pictures that are drawn while they are learned from, easy-VQA and fine print, each batch a step of its own.

    Args:
        captions: share of pictures that are described; the others are asked about.
        one_tile_share: of the steps, at first, that show pictures of one tile.
        paced_at: scale factor whose tokens decide how many pictures a step shows; None takes the step's own, so that
            fewer tokens a tile make more pictures.
        regions: share of steps that ask about masks, for a model with a region module.
    """

    captions: float
    one_tile_share: float = 0.0
    paced_at: int | None = None
    regions: float | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it learns from, and how samples come together.

    Args:
        path: file, folder of shards, or hub id (`OWNER/NAME`, with `:CONFIG/SPLIT` behind it if need be); None until
            the user says.
        images: folder that the paths in the data start from.
        format: how to read it; None tells from the path. `webdataset` (tar shards) and `hub` (the datasets library) are
            streams: they are read in order, and `max_steps` ends the run.
        scenes: generated pictures in place of a path.
        max_length: tokens of a sample, image tokens included, and of a packed row.
        packed: several samples share a row, none seeing another. A row then counts as one of `batch_size`, so that a
            step holds more samples: choose a smaller `batch_size` for the same number.
        grouped: samples of similar length and of one kind (with or without images) share a batch.
        max_tiles_per_batch: bounds a device's memory for pixels.
        max_reject_share: share of bad samples at which the run stops.
        num_workers: processes per device that decode images.
    """

    path: str | None = None
    images: str | None = None
    format: DataFormat | None = None
    scenes: ScenesConfig | None = None
    max_length: int = 2048
    packed: bool = False
    grouped: bool = True
    max_tiles_per_batch: int = 256
    max_reject_share: float = 0.01
    num_workers: int = 4

    def __post_init__(self) -> None:
        for name, least in (("max_length", 1), ("max_tiles_per_batch", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning rates per part, and their course: linear warm-up, then a cosine.

    Args:
        muon_learning_rate: of the matrices inside, which Muon then updates in AdamW's place.
        min_learning_rate_share: where the cosine ends.
    """

    learning_rate: float
    part_learning_rates: dict[str, float] = field(default_factory=dict)
    muon_learning_rate: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_share: float = 0.03
    min_learning_rate_share: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        rates = {"learning_rate": self.learning_rate, "max_grad_norm": self.max_grad_norm}
        rates |= {f"part_learning_rates.{part}": rate for part, rate in self.part_learning_rates.items()}
        if self.muon_learning_rate is not None:
            rates["muon_learning_rate"] = self.muon_learning_rate
        for name, value in rates.items():
            if not 0 < value < math.inf:
                raise ValueError(f"optimizer.{name}={value} must be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must be at least 0")
        for name in ("warmup_share", "min_learning_rate_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie between 0 and 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates of the language model's linear layers; `four_bit` keeps its own weights in NF4 (QLoRA)."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    four_bit: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"lora.rank={self.rank} and lora.alpha={self.alpha} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run.

    Args:
        name: of the recipe that it came from.
        train: parts that learn; the others are frozen. `regions` is the region encoder, which a model that has none
            is given.
        lora: trains updates of the language model in place of its weights.
        batch_size: samples (rows, when packed) per optimizer step, over all devices.
        device_batch_size: of these, how many a device holds at once.
        scale_factors: one is drawn for each step; empty takes the projector's own.
        epochs: passes over the data.
        max_steps: length of the run in place of `epochs`, less than one pass or several.
        precision: of activations and of frozen weights; optimizer states and trained weights are float32.
        checkpointing: recompute activations in the backward pass.
        save_every: steps between checkpoints.
        keep_checkpoints: how many of them stay.
        report_to: trackers by name, of those that transformers knows.
    """

    name: str
    optimizer: OptimizerConfig
    train: tuple[str, ...]
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig | None = None
    batch_size: int = 128
    device_batch_size: int = 16
    scale_factors: tuple[int, ...] = ()
    epochs: float = 1.0
    max_steps: int | None = None
    precision: Precision = "bfloat16"
    checkpointing: bool = True
    compile: bool = False
    liger: bool = False
    seed: int = 42
    log_every: int = 1
    save_every: int = 500
    keep_checkpoints: int = 1
    report_to: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        unknown = set(self.train) - set(PARTS) or set(self.optimizer.part_learning_rates) - set(PARTS)
        if unknown:
            raise ValueError(f"part {sorted(unknown)[0]!r} is unknown; use {', '.join(PARTS)}")
        if not self.train and self.lora is None:
            raise ValueError("train is empty and there is no lora: nothing would learn")
        if self.lora is not None and "language_model" in self.train:
            raise ValueError("lora replaces the training of language_model; take it out of train")
        for name in ("batch_size", "device_batch_size", "save_every", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be the name of a folder, without a path")
        if self.batch_size % self.device_batch_size:
            raise ValueError(
                f"device_batch_size={self.device_batch_size} does not divide batch_size={self.batch_size};"
                " choose a divisor"
            )
        if self.optimizer.part_learning_rates and self.optimizer.muon_learning_rate is not None:
            raise ValueError("part_learning_rates and muon_learning_rate exclude each other; leave one out")
        if self.model.max_tiles is not None and self.model.max_tiles < 1:
            raise ValueError(f"model.max_tiles={self.model.max_tiles} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2**32")
        if not 0 < self.epochs < math.inf or (self.max_steps is not None and self.max_steps < 1):
            raise ValueError(
                f"epochs={self.epochs} and max_steps={self.max_steps} must be above 0, and no infinite ones"
            )
        if not 0 <= self.data.max_reject_share <= 1:
            raise ValueError(f"data.max_reject_share={self.data.max_reject_share} must lie between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config_reading.from_dict` and JSON take them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        """The whole config, as `config_reading.read_config` reads it."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

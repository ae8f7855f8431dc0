"""The config of a training run: frozen values that pydantic checks, and how they are read from files and settings.

A config holds everything that decides what a run computes. It is saved beside each checkpoint, so that the file repeats
the run.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from tokenpacker.data.records import Format
from tokenpacker.hf.processing.image_processor import ImageMode
from tokenpacker.regions import RegionRule
from tokenpacker.text import did_you_mean
from tokenpacker.tiling import GridList
from tokenpacker.train.evaluation_config import CHECKED, EvaluationConfig

Part = Literal["vision_tower", "projector", "regions", "language_model"]
ChatFormat = Literal["v1", "plain", "bare"]
DataFormat = Literal[Format, "webdataset", "hub"]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class ModelConfig:
    """The model to train: an existing one, or one that is joined from a vision tower and a language model.

    Args:
        start: folder or hub id of a TokenPacker model to continue from. The next five fields are then not used.
        vision_tower: folder or hub id.
        language_model: folder or hub id.
        projector: the config of a registered projector. The model sets its widths.
        projector_weights: file `projector.safetensors` of an earlier run; its config replaces `projector`.
        vision_levels: hidden states that the projector reads; 1 is the output of the first layer. Empty takes the
            paper's.
        chat_format: `plain` for captions, `v1` for conversations, `bare` for conversations without Vicuna's system
            text.
        image_mode: how images become tiles, as are the next four fields; see `TokenPackerImageProcessor`. None keeps
            the value of `start`, or takes the default.
        row_separator: see `TokenPackerProcessor`. None as above.
        region_rule: how much a patch counts in a region, see `tokenpacker.regions`. None as above.
    """

    start: str | None = None
    vision_tower: str = "openai/clip-vit-large-patch14-336"
    language_model: str = "lmsys/vicuna-7b-v1.5"
    projector: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "token-packer", "scale_factor": 2})
    projector_weights: str | None = None
    vision_levels: tuple[int, ...] = ()
    chat_format: ChatFormat = "v1"
    image_mode: ImageMode | None = None
    max_tiles: PositiveInt | None = None
    grid_list: GridList | None = None
    thumbnail_source: Literal["image", "canvas"] | None = None
    antialias: bool | None = None
    row_separator: Literal["newline", "unknown"] | None = None
    region_rule: RegionRule | None = None


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class ScenesConfig:
    """Generated pictures (easy-VQA and fine print) as training data. Each batch is a whole step.

    Args:
        captions: share of pictures with a description; the others have questions.
        one_tile_share: the first steps, as a share of all, show pictures of one tile.
        paced_at: scale factor at which image tokens are counted to decide how many pictures a step shows. None takes
            the scale factor of the step, so that fewer tokens per tile allow more pictures.
        regions: share of steps that ask about masks; needs a model with a region encoder.
    """

    captions: float
    one_tile_share: float = 0.0
    paced_at: int | None = None
    regions: float | None = None


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class DataConfig:
    """The training data, and how samples become batches.

    Args:
        path: file, folder of shards, or hub id (`OWNER/NAME`, or `OWNER/NAME:CONFIG/SPLIT`).
        images: folder that image paths in the data are relative to.
        format: file format; None detects it from the path. `webdataset` (tar shards) and `hub` (the datasets library)
            are streams: they are read in order, and `max_steps` ends the run.
        scenes: generated pictures, in place of a path.
        max_length: tokens of a sample, with image tokens, and of a packed row.
        packed: several samples share a row and do not attend to each other. A row counts as one of `batch_size`, so a
            step holds more samples: choose a smaller `batch_size` for the same number of samples.
        grouped: a batch holds samples of similar length, all with images or all without.
        max_tiles_per_batch: tiles of one device's batch, a bound on memory.
        max_reject_share: the run stops if a larger share of samples is bad.
        num_workers: processes per device that decode images.
    """

    path: str | None = None
    images: str | None = None
    format: DataFormat | None = None
    scenes: ScenesConfig | None = None
    max_length: PositiveInt = 2048
    packed: bool = False
    grouped: bool = True
    max_tiles_per_batch: PositiveInt = 256
    max_reject_share: Share = 0.01
    num_workers: NonNegativeInt = 4


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine schedule.

    Args:
        part_learning_rates: for parts that do not take `learning_rate`.
        muon_learning_rate: trains the matrices of hidden layers by Muon, at this rate, in place of AdamW.
        warmup_share: warm-up steps, as a share of all steps.
        min_learning_rate_share: last learning rate of the cosine, as a share of the highest.
    """

    learning_rate: PositiveFloat
    part_learning_rates: dict[Part, PositiveFloat] = dataclasses.field(default_factory=dict)
    muon_learning_rate: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    warmup_share: Share = 0.03
    min_learning_rate_share: Share = 0.0
    max_grad_norm: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        if self.part_learning_rates and self.muon_learning_rate is not None:
            raise ValueError("part_learning_rates and muon_learning_rate exclude each other; leave one out")


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class LoraConfig:
    """Low-rank updates of the language model's linear layers. `four_bit` keeps its own weights in NF4 (QLoRA)."""

    rank: PositiveInt = 128
    alpha: PositiveInt = 256
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    four_bit: bool = False


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class RunConfig:
    """Settings of any training run; `TrainingConfig` adds those of a TokenPacker model.

    Args:
        name: of the recipe.
        batch_size: samples (rows, if packed) per optimizer step, over all devices.
        device_batch_size: how many of these a device holds at once.
        max_steps: length of the run in optimizer steps.
        precision: of activations and frozen weights. Optimizer states and trained weights are float32.
        checkpointing: recompute activations in the backward pass.
        save_every: steps between checkpoints.
        keep_checkpoints: number of checkpoints to keep.
        report_to: names of trackers that transformers supports.
    """

    name: str
    optimizer: OptimizerConfig
    batch_size: PositiveInt = 128
    device_batch_size: PositiveInt = 16
    max_steps: PositiveInt | None = None
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    checkpointing: bool = True
    compile: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    log_every: PositiveInt = 1
    save_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 1
    report_to: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be the name of a folder, without a path")
        if self.batch_size % self.device_batch_size:
            raise ValueError(
                f"device_batch_size={self.device_batch_size} does not divide batch_size={self.batch_size};"
                " choose a divisor"
            )

    @property
    def batches_per_step(self) -> int:
        """Batches of one device that an optimizer step takes, over all devices."""
        return self.batch_size // self.device_batch_size

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, for `from_dict` and JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        """The config as a JSON text, for `read_config`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class TrainingConfig(RunConfig):
    """A training run of a TokenPacker model.

    Args:
        train: parts to train; the others are frozen. `regions` is the region encoder; a model without one gets one.
        lora: trains low-rank updates of the language model in place of its weights.
        scale_factors: each step draws one of them. Empty takes the projector's own.
        mixed_share: share of the steps in which each tile draws one of them for itself, as `scale_factor="auto"` mixes.
        epochs: passes over the data, unless `max_steps` is given.
        eval_every: steps between evaluations; another one follows the last step. None evaluates nothing.
    """

    train: tuple[Part, ...]
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    eval_every: PositiveInt | None = None
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    lora: LoraConfig | None = None
    scale_factors: tuple[int, ...] = ()
    mixed_share: Share = 0.0
    epochs: PositiveFloat = 1.0
    liger: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train and self.lora is None:
            raise ValueError("train is empty and lora is null, so nothing would be trained; name a part in train")
        if self.lora is not None and "language_model" in self.train:
            raise ValueError("lora replaces the training of language_model; take it out of train")
        if self.mixed_share and (len(set(self.scale_factors)) < 2 or self.compile):
            raise ValueError(
                f"mixed_share={self.mixed_share} needs two scale_factors or more, and compile=false, as a compiled"
                " model has one scale factor for all tiles"
            )
        if self.eval_every is None and self.evaluation != EvaluationConfig():
            raise ValueError("evaluation has settings, but eval_every is missing; give it with --set eval_every=100")
        if self.eval_every is not None and not self.evaluation.measured:
            raise ValueError(
                f"eval_every={self.eval_every} has nothing to measure; give evaluation.held_out_share,"
                " evaluation.held_out or evaluation.tasks"
            )


def from_dict(content: Mapping[str, Any]) -> TrainingConfig:
    """Returns the config of plain values.

    Raises:
        ValueError: for unknown keys (with the nearest valid one), missing keys, and values of a wrong type or range.
    """
    try:  # as JSON, in which a strict config takes lists for tuples
        return TypeAdapter(TrainingConfig).validate_json(json.dumps(content, default=str))
    except ValidationError as invalid:
        raise ValueError(_in_one_line(invalid)) from None


def changed(config: TrainingConfig, settings: Iterable[str]) -> TrainingConfig:
    """Returns the config with settings such as `optimizer.learning_rate=1e-4` applied; values are YAML.

    Raises:
        ValueError: for a setting without `=`, an unknown key, and a value of a wrong type or range.
    """
    content = config.to_dict()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting} has no '='; write for example optimizer.learning_rate=1e-4")
        try:
            value = _parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"--set {setting} is no value ({error})") from None
        *parents, last = key.strip().split(".")
        place = content
        for name in parents:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = value
    return from_dict(content)


def merged(config: TrainingConfig, content: Mapping[str, Any]) -> TrainingConfig:
    """Returns the config with the given values, at any depth, replacing its own. Raises ValueError if one is wrong."""
    return from_dict(_merge(config.to_dict(), content))


def read_config(path: Path) -> dict[str, Any]:
    """Returns the content of a YAML or JSON file. Raises ValueError if it is missing, damaged or not a mapping."""
    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"))  # JSON is YAML
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path") from None
    except ValueError as error:
        raise ValueError(f"{path} is no YAML or JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings; write keys and values, as `--dry-run --json` prints them")
    return content


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # YAML 1.1, which PyYAML reads, wants 1.0e-4: without this 1e-4 would be a text.
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), None)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _merge(content: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(content)
    for key, value in other.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), dict) and key != "projector"
        result[key] = _merge(result[key], value) if nested else value
    return result


def _in_one_line(invalid: ValidationError) -> str:
    """The first problem that pydantic found, as one line with the dotted key; unknown keys count first."""
    problems = invalid.errors(include_url=False)
    problem = next((one for one in problems if one["type"] == "unexpected_keyword_argument"), problems[0])
    kind, message = problem["type"], problem["msg"]
    *parents, key = problem["loc"] or ("config",)
    name = ".".join(map(str, problem["loc"])) or "config"
    if kind == "value_error":  # from a `__post_init__`
        return str(problem["ctx"]["error"])
    if kind == "missing":
        return f"{name} is missing; give it a value"
    if kind == "unexpected_keyword_argument":
        valid, prefix = _keys_of(parents), name.removesuffix(str(key))
        hint = did_you_mean(str(key), valid, cutoff=0.5).replace("mean ", f"mean {prefix}")
        return f"{name} is no setting{hint or '; use one of ' + ', '.join(valid)}"
    return f"{name}={problem['input']!r} {message.replace('Input should', 'must')}"


def _keys_of(parents: Iterable[Any]) -> list[str]:
    """The valid keys of a config within `TrainingConfig`."""
    kind: Any = TrainingConfig
    for name in parents:
        hint = get_type_hints(kind)[name]
        kind = next(choice for choice in (hint, *get_args(hint)) if dataclasses.is_dataclass(choice))
    return [field.name for field in dataclasses.fields(kind)]
